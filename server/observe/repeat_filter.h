// RepeatFilter: keeps what repeats from filling the log. The first few of a kind go through; more of it are counted and
// left out until a window of time has ended. One thread at a time.
#ifndef SERVER_OBSERVE_REPEAT_FILTER_H_
#define SERVER_OBSERVE_REPEAT_FILTER_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "spdlog/common.h"

namespace dejavu {

class RepeatFilter {
 public:
  using Time = std::chrono::steady_clock::time_point;
  static constexpr size_t kMaxMessages = 256;  // watched at a time; all others are as one
  static constexpr absl::string_view kOthers = "warnings of further kinds";

  explicit RepeatFilter(std::chrono::seconds window) : window_(window) {}

  // False: leave the message out, as `most` have gone through in this window.
  bool Admit(spdlog::level::level_enum level, absl::string_view message, Time now, int64_t most = 1);

  struct LeftOut {
    spdlog::level::level_enum level;
    std::string message;
    int64_t count;
  };
  // What was left out in the windows that have ended.
  std::vector<LeftOut> TakeEnded(Time now);
  // When the next one ends; Time::max(): there is none.
  Time next_end() const;

 private:
  struct Window {
    spdlog::level::level_enum level;
    Time end;
    int64_t admitted = 0, left_out = 0;
  };
  const std::chrono::seconds window_;
  absl::flat_hash_map<std::string, Window> windows_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_REPEAT_FILTER_H_
