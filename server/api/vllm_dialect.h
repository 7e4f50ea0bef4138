// VllmDialect: Generate of vLLM's engine protocol. Its client, a gateway, makes the text itself: replies hold token
// ids. In a stream each sample's chunks are followed by a last word that says how it ended.
#ifndef SERVER_API_VLLM_DIALECT_H_
#define SERVER_API_VLLM_DIALECT_H_

#include "server/api/dialect.h"
#include "server/api/serving_state.h"
#include "vllm/engine.pb.h"

namespace dejavu {

class VllmDialect final : public Dialect {
 public:
  absl::Status Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) override;
  absl::Status Renamed(absl::Status status) const override;
  bool streams() const override { return stream_; }
  void Take(v1::GenerateChunk* chunk) override;
  const google::protobuf::MessageLite* Next(bool* more) override;
  void Release() override {
    response_.Clear();
    prompt_.Clear();
  }

 private:
  template <typename Reply>
  void TellPrompt(const v1::GenerateChunk& chunk, Reply* reply);
  void FillComplete(const v1::GenerateChunk& chunk);

  bool stream_ = false;
  uint32_t prompt_tokens_ = 0;
  google::protobuf::RepeatedPtrField<v1::ScoredToken> prompt_;  // what the first sample's first reply will say of it
  v1::GenerateChunk* chunk_ = nullptr;                          // what the next reply is made of
  bool chunk_sent_ = false;                                     // of a stream: its tokens, and the last word is left
  vllm::grpc::engine::GenerateResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_VLLM_DIALECT_H_
