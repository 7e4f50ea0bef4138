#include "server/api/score_collector.h"

#include <utility>

#include "kernels/base/check.h"

namespace dejavu {

ScoreCollector::ScoreCollector(v1::ScoreResponse response, SteadyTime arrival, std::function<void()> wake)
    : arrival_(arrival), wake_(std::move(wake)), response_(std::move(response)) {}

bool ScoreCollector::OnToken(const Token& /*token*/) {
  CHECK(false) << "a score request generated a token";
  return false;
}

bool ScoreCollector::OnPromptToken(const Token& token) {
  MutexLock lock(mutex_);
  v1::ScoredToken* scored = response_.add_tokens();
  scored->set_id(static_cast<uint32_t>(token.id));
  FillLogprobs(token, scored);
  return true;
}

void ScoreCollector::OnFinish(const dejavu::Finish& finish) {
  {
    MutexLock lock(mutex_);
    end_ = EndStatus(finish);
    outcome_ = {finish, ReasonName(finish.reason)};
    if (end_->ok()) FillTimings(finish, arrival_, response_.mutable_timings());
  }
  wake_();
}

const google::protobuf::MessageLite* ScoreCollector::NextReply(std::optional<absl::Status>* end) {
  MutexLock lock(mutex_);
  *end = end_;
  return end_.has_value() && end_->ok() ? &response_ : nullptr;  // nothing changes it after OnFinish
}

void ScoreCollector::ReleaseReply() {
  v1::ScoreResponse released;  // freed after the lock
  MutexLock lock(mutex_);
  released.Swap(&response_);
}

}  // namespace dejavu
