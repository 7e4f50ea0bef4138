// RepeatFilter: keeps repeated warnings from filling the log. The first of a kind goes through; the same message is
// counted and left out during the next ten seconds. One thread at a time.
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
  static constexpr std::chrono::seconds kWindow{10};
  static constexpr size_t kMaxMessages = 256;  // watched at a time; any others go through

  // False: leave the message out.
  bool Admit(spdlog::level::level_enum level, absl::string_view message, Time now);

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
    int64_t left_out = 0;
  };
  absl::flat_hash_map<std::string, Window> windows_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_REPEAT_FILTER_H_
