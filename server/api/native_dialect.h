// NativeDialect: Generate and GenerateStream of our own API. Chunks are sent as they are, or put together where one
// reply must hold several samples.
#ifndef SERVER_API_NATIVE_DIALECT_H_
#define SERVER_API_NATIVE_DIALECT_H_

#include <vector>

#include "server/api/dialect.h"

namespace dejavu {

class NativeDialect final : public Dialect {
 public:
  explicit NativeDialect(bool streaming) : streaming_(streaming) {}

  absl::Status Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) override;
  bool streams() const override { return streaming_; }
  void Take(v1::GenerateChunk* chunk) override;
  const google::protobuf::MessageLite* Next(bool* more) override;
  void Release() override;

 private:
  const bool streaming_;
  size_t gathered_ = 0;                       // samples that one reply must hold; 0: each chunk is a reply
  size_t taken_ = 0;                          // of them
  const v1::GenerateChunk* chunk_ = nullptr;  // to be sent
  std::vector<v1::GenerateChunk> chunks_;     // by sample
  v1::GenerateResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_NATIVE_DIALECT_H_
