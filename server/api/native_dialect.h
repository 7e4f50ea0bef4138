// NativeDialect: Generate and GenerateStream of our own API. Chunks are sent as they are, or put together where one
// reply must hold several samples.
#ifndef SERVER_API_NATIVE_DIALECT_H_
#define SERVER_API_NATIVE_DIALECT_H_

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
  GatheredSamples gathered_;                  // that one reply must hold; none expected: each chunk is a reply
  const v1::GenerateChunk* chunk_ = nullptr;  // to be sent
  v1::GenerateResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_NATIVE_DIALECT_H_
