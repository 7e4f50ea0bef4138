// LogPipe: writes lines to a descriptor that may block or be closed at the other end. Only a thread of its own waits
// for the descriptor; lines that do not fit the queue are dropped and counted. Any thread may write.
#ifndef SERVER_OBSERVE_LOG_PIPE_H_
#define SERVER_OBSERVE_LOG_PIPE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace dejavu {

class LogPipe {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // `notice` makes the line that says how many were dropped. The thread calls `tick` at the time that `tick` returned
  // last; it may call Write.
  LogPipe(int fd, size_t max_queued_bytes, std::function<std::string(int64_t)> notice, std::function<Time()> tick);
  ~LogPipe();  // Close without patience

  // A line with its end. Never waits.
  void Write(std::string line);
  // Makes the thread call `tick` at once.
  void Poke();
  // False: what was queued could not be written by then.
  bool Flush(std::chrono::milliseconds patience);
  // Flushes and ends the thread, or leaves it behind if it hangs in a write.
  void Close(std::chrono::milliseconds patience);

  int64_t dropped() const;

 private:
  struct State;
  static void Run(const std::shared_ptr<State>& state);
  static bool WriteLine(State& state, absl::string_view line);

  const std::shared_ptr<State> state_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_LOG_PIPE_H_
