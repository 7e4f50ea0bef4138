#include "server/observe/repeat_filter.h"

#include <algorithm>

namespace dejavu {

bool RepeatFilter::Admit(spdlog::level::level_enum level, absl::string_view message, Time now, int64_t most) {
  auto found = windows_.find(message);
  if (found == windows_.end()) {
    const absl::string_view name = windows_.size() < kMaxMessages ? message : kOthers;
    found = windows_.try_emplace(name).first;
  }
  Window& window = found->second;
  if (now >= window.end) window = {level, now + window_};
  const bool admitted = window.admitted < most;
  ++(admitted ? window.admitted : window.left_out);
  return admitted;
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
