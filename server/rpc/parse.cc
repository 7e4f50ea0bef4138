#include "server/rpc/parse.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "google/protobuf/stubs/logging.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "server/rpc/error_details.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

// Where this thread's parse wants libprotobuf's complaint; null outside of one.
thread_local std::string* parse_complaint = nullptr;

void OnProtobufLog(google::protobuf::LogLevel level, const char* file, int line, const std::string& message) {
  if (parse_complaint != nullptr) {
    *parse_complaint = message;
  } else if (level >= google::protobuf::LOGLEVEL_ERROR) {
    spdlog::error("protobuf: {} ({}:{})", message, file, line);
  }
}

// libprotobuf: "String field 'dejavu.v1.GenerateRequest.text' contains invalid UTF-8 data when parsing ...".
std::string FieldOf(const std::string& complaint) {
  const size_t open = complaint.find('\'');
  const size_t close = complaint.find('\'', open + 1);
  if (open == std::string::npos || close == std::string::npos) return "";
  const std::string full_name = complaint.substr(open + 1, close - open - 1);
  return full_name.substr(full_name.rfind('.') + 1);
}

}  // namespace

absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  std::string complaint;
  parse_complaint = &complaint;
  grpc::ByteBuffer readable = bytes;  // shares the slices; the reader wants it mutable
  grpc::ProtoBufferReader reader(&readable);
  const bool parsed = reader.status().ok() && message->ParseFromZeroCopyStream(&reader);
  parse_complaint = nullptr;
  if (parsed) return absl::OkStatus();
  const std::string field = FieldOf(complaint);
  if (!field.empty()) return InvalidField(field, "is not valid UTF-8");
  return absl::InvalidArgumentError(absl::StrCat("the request is not a well-formed ", message->GetTypeName()));
}

void RouteProtobufLog() { google::protobuf::SetLogHandler(OnProtobufLog); }

}  // namespace dejavu
