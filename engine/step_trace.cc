#include "engine/step_trace.h"

#include <algorithm>

namespace dejavu {
void StepTrace::NoteStep(const StepRecord& step) {
  const int64_t n = noted_.load(std::memory_order_relaxed);
  steps_[n % kSteps].Store(step);
  noted_.store(n + 1, std::memory_order_release);
  if (gap_ == SteadyTime::duration::zero()) return;
  slowest_.step = step;
  slowest_.gap_ms = std::chrono::duration<float, std::milli>(gap_).count();
  gap_ = SteadyTime::duration::zero();
  Keep(slowest_);
}

void StepTrace::Keep(const SlowToken& token) {
  if (token.token - current_since_ > kWhile) {
    current_ = 1 - current_;
    current_since_ = token.token;
    Window& next = windows_[current_];
    next.gaps.fill(0.0f);
    for (SeqLock<SlowToken>& entry : next.tokens) entry.Store({});
    next.fastest = 0;
  }
  Window& window = windows_[current_];
  if (token.gap_ms <= window.gaps[window.fastest]) return;
  window.gaps[window.fastest] = token.gap_ms;
  window.tokens[window.fastest].Store(token);
  window.fastest = static_cast<int>(std::min_element(window.gaps.begin(), window.gaps.end()) - window.gaps.begin());
}

std::vector<StepRecord> StepTrace::StepsAfter(int64_t from) const {
  const int64_t to = noted();
  std::vector<StepRecord> steps;
  for (int64_t i = std::max(from, to - kSteps); i < to; ++i) {
    steps.push_back(steps_[i % kSteps].Load());
  }
  // The engine thread may have overwritten the first ones in the meantime with steps that are newer than the last.
  std::sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return steps;
}

std::vector<SlowToken> StepTrace::SlowestTokens() const {
  std::vector<SlowToken> tokens;
  for (const Window& window : windows_) {
    for (const SeqLock<SlowToken>& entry : window.tokens) {
      const SlowToken token = entry.Load();
      if (token.gap_ms > 0.0f) tokens.push_back(token);
    }
  }
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.gap_ms > b.gap_ms; });
  if (tokens.size() > kSlowTokens) tokens.resize(kSlowTokens);
  return tokens;
}

}  // namespace dejavu
