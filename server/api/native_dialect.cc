#include "server/api/native_dialect.h"

#include <utility>
#include <vector>

#include "kernels/base/status_macros.h"
#include "server/rpc/parse.h"

namespace dejavu {

absl::Status NativeDialect::Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) {
  RETURN_IF_ERROR(ParseMessage(bytes, request));
  const uint32_t samples = request->sampling().samples();
  if (!streaming_ && samples > 1) gathered_.Expect(samples);
  return absl::OkStatus();
}

void NativeDialect::Take(v1::GenerateChunk* chunk) {
  if (gathered_.expected() == 0) {
    chunk_ = chunk;
  } else {
    gathered_.Take(chunk);
  }
}

// A GenerateResponse is a GenerateChunk that holds everything: same fields, same numbers (server_test compares them).
const google::protobuf::MessageLite* NativeDialect::Next(bool* more) {
  *more = false;
  if (gathered_.expected() == 0) return std::exchange(chunk_, nullptr);
  std::vector<v1::GenerateChunk>* const chunks = gathered_.All();
  if (chunks == nullptr) return nullptr;
  v1::GenerateChunk& first = chunks->front();
  response_.mutable_prompt()->Swap(first.mutable_prompt());
  response_.mutable_text()->swap(*first.mutable_text());
  response_.mutable_token_ids()->Swap(first.mutable_token_ids());
  response_.mutable_logprobs()->Swap(first.mutable_logprobs());
  response_.mutable_prompt_logprobs()->Swap(first.mutable_prompt_logprobs());
  response_.mutable_finish()->Swap(first.mutable_finish());
  for (size_t i = 1; i < chunks->size(); ++i) response_.add_more_samples()->Swap(&(*chunks)[i]);
  return &response_;
}

void NativeDialect::Release() {
  gathered_.Release();
  response_ = v1::GenerateResponse();
}

}  // namespace dejavu
