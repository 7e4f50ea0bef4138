// GenerateCall: a generation, in whatever protocol it is asked for (Dialect). It checks the request, gives the engine a
// TokenStream for each sample, and sends what the dialect makes of their chunks.
#ifndef SERVER_API_GENERATE_CALL_H_
#define SERVER_API_GENERATE_CALL_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dejavu/v1/generation.pb.h"
#include "server/api/dialect.h"
#include "server/api/engine_call.h"
#include "server/api/validate.h"

namespace dejavu {

class GenerateCall final : public EngineCall {
 public:
  GenerateCall(ServingState* state, std::unique_ptr<Dialect> dialect)
      : EngineCall(state), dialect_(std::move(dialect)) {}

  bool large_replies() const override { return scores_much_ || dialect_->large_replies(); }
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void ReleaseReply() override;

 private:
  absl::Status Read(const Asking& asking, const grpc::ByteBuffer& bytes) override;
  absl::StatusOr<CheckedGenerate> Check(v1::GenerateRequest* request, const std::string& tenant);
  void NoteChecked(const CheckedGenerate& checked);
  std::vector<std::shared_ptr<ReplySink>> MakeStreams(CheckedGenerate* checked, const Asking& asking);

  const std::unique_ptr<Dialect> dialect_;
  bool scores_much_ = false;         // a reply tells much of the prompt; set before the engine knows of the request
  std::optional<absl::Status> end_;  // of the samples; the dialect may have replies left
};

}  // namespace dejavu

#endif  // SERVER_API_GENERATE_CALL_H_
