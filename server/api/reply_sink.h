// ReplySink: a sink whose replies an RPC pulls: TokenStream for Generate and GenerateStream, ScoreCollector for Score.
// And the parts of replies that they share.
#ifndef SERVER_API_REPLY_SINK_H_
#define SERVER_API_REPLY_SINK_H_

#include <optional>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dejavu/v1/generation.pb.h"
#include "engine/request.h"
#include "kernels/base/mutex.h"

namespace dejavu {

// How the engine's work on a request ended, for the record.
struct EngineOutcome {
  dejavu::Finish finish;
  absl::string_view reason;  // as RequestRecord::finish_reason
};

// OnToken, OnPromptToken and OnFinish come from the engine thread, the rest from others.
class ReplySink : public TokenSink {
 public:
  // See RpcHandler::NextReply. The caller may take the message apart.
  virtual google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) = 0;

  // See RpcHandler::ReleaseReply. The record of the call may keep the sink long after.
  virtual void ReleaseReply() = 0;

  // With what the call ends if the engine reports the request as cancelled; the first caller's reason stays.
  void SetCancelReason(absl::Status reason);

  // Nothing before OnFinish. `wake` is called after it has changed.
  std::optional<EngineOutcome> outcome();

 protected:
  // The status that an RPC ends with after the engine has finished so: OK for every regular end.
  absl::Status EndStatus(const Finish& finish) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  std::optional<EngineOutcome> outcome_ ABSL_GUARDED_BY(mutex_);

 private:
  absl::Status cancel_reason_ ABSL_GUARDED_BY(mutex_);
};

// As RequestRecord::finish_reason has it.
absl::string_view ReasonName(FinishReason reason);

void FillTimings(const Finish& finish, SteadyTime arrival, v1::Timings* timings);

// Works for TokenLogprobs and ScoredToken.
template <typename Message>
void FillLogprobs(const Token& token, Message* message) {
  if (token.has_logprob) {
    message->set_logprob(token.logprob);
    message->set_rank(static_cast<uint32_t>(token.rank));
  }
  for (const TokenLogprob& alternative : token.top) {
    v1::TokenLogprob* top = message->add_top();
    top->set_id(static_cast<uint32_t>(alternative.id));
    top->set_logprob(alternative.logprob);
  }
}

}  // namespace dejavu

#endif  // SERVER_API_REPLY_SINK_H_
