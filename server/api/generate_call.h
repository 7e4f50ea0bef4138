// GenerateCall: Generate and GenerateStream. It checks the request, gives the engine a TokenStream for each sample, and
// sends what they make of its tokens: chunk by chunk, or all in one reply.
#ifndef SERVER_API_GENERATE_CALL_H_
#define SERVER_API_GENERATE_CALL_H_

#include <memory>
#include <optional>
#include <vector>

#include "dejavu/v1/generation.pb.h"
#include "server/api/engine_call.h"
#include "server/api/validate.h"

namespace dejavu {

class GenerateCall final : public EngineCall {
 public:
  GenerateCall(ServingState* state, bool streaming) : EngineCall(state), streaming_(streaming) {}

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;
  void ReleaseReply() override;

 private:
  absl::Status Read(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override;
  void NoteChecked(const CheckedGenerate& checked);
  std::vector<std::shared_ptr<ReplySink>> MakeStreams(CheckedGenerate* checked, const std::shared_ptr<Rpc>& rpc);

  const bool streaming_;
  bool gathers_ = false;                   // one reply must hold several samples
  std::vector<v1::GenerateChunk> chunks_;  // by sample
  v1::GenerateResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_GENERATE_CALL_H_
