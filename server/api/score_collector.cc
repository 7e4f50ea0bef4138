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
  scores_.Add(token);
  return true;
}

void ScoreCollector::OnFinish(const dejavu::Finish& finish) {
  {
    MutexLock lock(mutex_);
    end_ = EndStatus(finish);
    outcome_ = {finish, ReasonName(finish.reason)};
    if (end_->ok()) {
      FillTimings(finish, arrival_, response_.mutable_timings());
      response_.set_saturated_kv_values(static_cast<uint64_t>(finish.saturated_kv_values));
    }
  }
  wake_();
}

google::protobuf::MessageLite* ScoreCollector::NextReply(std::optional<absl::Status>* end) {
  MutexLock lock(mutex_);
  *end = end_;
  if (!end_.has_value() || !end_->ok()) return nullptr;
  scores_.AppendTo(response_.mutable_tokens());
  scores_ = PromptScores();
  return &response_;  // nothing changes it any more
}

void ScoreCollector::MoveTo(v1::PromptScore* score) {
  MutexLock lock(mutex_);
  score->mutable_tokens()->Swap(response_.mutable_tokens());
  score->mutable_timings()->Swap(response_.mutable_timings());
  score->set_saturated_kv_values(response_.saturated_kv_values());
}

void ScoreCollector::ReleaseReply() {
  v1::ScoreResponse released;  // freed after the lock
  MutexLock lock(mutex_);
  released.Swap(&response_);
}

}  // namespace dejavu
