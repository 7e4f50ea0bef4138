// ScoreCall: Score. It checks the request and sends the log-probabilities that the engine gives its prompt.
#ifndef SERVER_API_SCORE_CALL_H_
#define SERVER_API_SCORE_CALL_H_

#include <memory>

#include "server/api/engine_call.h"

namespace dejavu {

class ScoreCall final : public EngineCall {
 public:
  using EngineCall::EngineCall;

  bool large_replies() const override { return true; }

 private:
  absl::Status Read(const Asking& asking, const grpc::ByteBuffer& bytes) override;
};

}  // namespace dejavu

#endif  // SERVER_API_SCORE_CALL_H_
