// Bytes from a client into a protobuf message. Any thread.
#ifndef SERVER_RPC_PARSE_H_
#define SERVER_RPC_PARSE_H_

#include "absl/status/status.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"

namespace dejavu {

// INVALID_ARGUMENT when `bytes` are no such message, or a string in it is not UTF-8 (the error names the field).
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);

// libprotobuf writes a line to stderr for every malformed string, so that any client could flood the log. From now on
// what it says about a request goes into ParseMessage's error, all else into our log.
void RouteProtobufLog();

}  // namespace dejavu

#endif  // SERVER_RPC_PARSE_H_
