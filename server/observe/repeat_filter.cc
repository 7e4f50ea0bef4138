#include "server/observe/repeat_filter.h"

#include <algorithm>

namespace dejavu {

bool RepeatFilter::Admit(spdlog::level::level_enum level, absl::string_view message, Time now) {
  const auto found = windows_.find(message);
  if (found != windows_.end() && now < found->second.end) {
    ++found->second.left_out;
    return false;
  }
  if (found != windows_.end()) {
    found->second = {level, now + kWindow, 0};
  } else if (windows_.size() < kMaxMessages) {
    windows_.emplace(std::string(message), Window{level, now + kWindow, 0});
  }
  return true;
}

std::vector<RepeatFilter::LeftOut> RepeatFilter::TakeEnded(Time now) {
  std::vector<LeftOut> ended;
  for (auto it = windows_.begin(); it != windows_.end();) {
    const auto window = it++;
    if (now < window->second.end) continue;
    if (window->second.left_out > 0) ended.push_back({window->second.level, window->first, window->second.left_out});
    windows_.erase(window);
  }
  return ended;
}

RepeatFilter::Time RepeatFilter::next_end() const {
  Time next = Time::max();
  for (const auto& [message, window] : windows_) next = std::min(next, window.end);
  return next;
}

}  // namespace dejavu
