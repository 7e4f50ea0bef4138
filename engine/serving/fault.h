// Fault: what the engine thread does in the place of one of its steps, for tests of what happens then.
#ifndef ENGINE_SERVING_FAULT_H_
#define ENGINE_SERVING_FAULT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace dejavu {

struct Fault {
  bool hang = false;  // else it throws
  int64_t step = 0;   // 0: none
};

// "throw@STEP", "hang@STEP", or nothing.
absl::StatusOr<Fault> ParseFault(const std::string& text);

}  // namespace dejavu

#endif  // ENGINE_SERVING_FAULT_H_
