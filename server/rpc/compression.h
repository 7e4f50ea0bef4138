// Messages that clients have compressed. gRPC 1.51 would unfold them whatever they become, a few megabytes to
// gigabytes, so it hands them over as they came (GrpcPort). Any thread.
#ifndef SERVER_RPC_COMPRESSION_H_
#define SERVER_RPC_COMPRESSION_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "grpcpp/support/byte_buffer.h"

namespace dejavu {

// By gzip or deflate, as the call's grpc-encoding and the message's flag say.
bool IsCompressed(const grpc::ByteBuffer& bytes);

// What was compressed. RESOURCE_EXHAUSTED where that has more than `most_bytes`, of which no more are ever held;
// INVALID_ARGUMENT where it cannot be told.
absl::StatusOr<grpc::ByteBuffer> Decompress(const grpc::ByteBuffer& bytes, int64_t most_bytes);

// RESOURCE_EXHAUSTED: the request `what`, "has 9 bytes", and `most_bytes` are taken.
absl::Status MessageTooLarge(absl::string_view what, int64_t most_bytes);

}  // namespace dejavu

#endif  // SERVER_RPC_COMPRESSION_H_
