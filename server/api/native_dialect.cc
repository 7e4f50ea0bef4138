#include "server/api/native_dialect.h"

#include <utility>

#include "kernels/base/status_macros.h"
#include "server/rpc/parse.h"

namespace dejavu {

absl::Status NativeDialect::Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) {
  RETURN_IF_ERROR(ParseMessage(bytes, request));
  const uint32_t samples = request->sampling().samples();
  if (!streaming_ && samples > 1) gathered_ = samples;
  return absl::OkStatus();
}

void NativeDialect::Take(v1::GenerateChunk* chunk) {
  if (gathered_ == 0) {
    chunk_ = chunk;
    return;
  }
  ++taken_;
  if (chunk->sample() >= chunks_.size()) chunks_.resize(chunk->sample() + 1);
  chunks_[chunk->sample()].Swap(chunk);
}

// A GenerateResponse is a GenerateChunk that holds everything: same fields, same numbers (server_test compares them).
const google::protobuf::MessageLite* NativeDialect::Next(bool* more) {
  *more = false;
  if (gathered_ == 0) return std::exchange(chunk_, nullptr);
  if (taken_ < gathered_) return nullptr;
  taken_ = 0;
  v1::GenerateChunk& first = chunks_[0];
  response_.mutable_prompt()->Swap(first.mutable_prompt());
  response_.mutable_text()->swap(*first.mutable_text());
  response_.mutable_token_ids()->Swap(first.mutable_token_ids());
  response_.mutable_logprobs()->Swap(first.mutable_logprobs());
  response_.mutable_finish()->Swap(first.mutable_finish());
  for (size_t i = 1; i < chunks_.size(); ++i) response_.add_more_samples()->Swap(&chunks_[i]);
  return &response_;
}

void NativeDialect::Release() {
  chunks_.clear();
  response_ = v1::GenerateResponse();
}

}  // namespace dejavu
