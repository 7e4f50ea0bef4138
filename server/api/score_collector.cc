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
  top_.insert(top_.end(), token.top.begin(), token.top.end());
  scored_.push_back({token, top_.size()});
  scored_.back().token.top = {};
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

void ScoreCollector::MakeMessage() {
  size_t begin = 0;
  for (const Scored& scored : scored_) {
    Token token = scored.token;
    token.top = absl::MakeConstSpan(top_).subspan(begin, scored.top_ends - begin);
    begin = scored.top_ends;
    v1::ScoredToken* message = response_.add_tokens();
    message->set_id(static_cast<uint32_t>(token.id));
    FillLogprobs(token, message);
  }
  scored_ = {};
  top_ = {};
}

google::protobuf::MessageLite* ScoreCollector::NextReply(std::optional<absl::Status>* end) {
  MutexLock lock(mutex_);
  *end = end_;
  if (!end_.has_value() || !end_->ok()) return nullptr;
  MakeMessage();
  return &response_;  // nothing changes it any more
}

void ScoreCollector::ReleaseReply() {
  v1::ScoreResponse released;  // freed after the lock
  MutexLock lock(mutex_);
  released.Swap(&response_);
}

}  // namespace dejavu
