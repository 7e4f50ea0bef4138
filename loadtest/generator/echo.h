// A server that does next to nothing, for measuring the generator itself: every request is answered with the tokens
// that it asks for, at once or one after another.
#ifndef LOADTEST_GENERATOR_ECHO_H_
#define LOADTEST_GENERATOR_ECHO_H_

#include <atomic>
#include <string>

#include "absl/status/status.h"

namespace dejavu {

struct EchoOptions {
  std::string listen = "127.0.0.1:50061";
  std::string port_file;  // gets the port, once it listens; empty: none
  double itl_ms = 0.0;    // between two tokens; 0: all in one message
};

// Serves until `interrupted`.
absl::Status RunEcho(const EchoOptions& options, const std::atomic<bool>& interrupted);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_ECHO_H_
