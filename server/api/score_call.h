// ScoreCall: Score. It checks the request and sends the log-probabilities that the engine gives its prompt, or prompts.
#ifndef SERVER_API_SCORE_CALL_H_
#define SERVER_API_SCORE_CALL_H_

#include <memory>
#include <optional>
#include <vector>

#include "server/api/engine_call.h"
#include "server/api/score_collector.h"

namespace dejavu {

class ScoreCall final : public EngineCall {
 public:
  using EngineCall::EngineCall;

  bool large_replies() const override { return true; }
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void ReleaseReply() override;

 private:
  absl::Status Read(const Asking& asking, const grpc::ByteBuffer& bytes) override;

  std::vector<std::shared_ptr<ScoreCollector>> collectors_;  // of `prompts`; empty: there is one prompt, and its reply
  v1::ScoreResponse response_;                               // of all of them
};

}  // namespace dejavu

#endif  // SERVER_API_SCORE_CALL_H_
