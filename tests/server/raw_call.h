// A client that sends bytes as they are, with any method name.
#ifndef TESTS_SERVER_RAW_CALL_H_
#define TESTS_SERVER_RAW_CALL_H_

#include <memory>
#include <optional>
#include <string>

#include "dejavu/rpc/status.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"

namespace dejavu {

// One call: at most one message, half-close, the status. `reply` is the first message that comes back.
inline grpc::Status RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                            const std::optional<std::string>& bytes, std::string* reply = nullptr) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto wait = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return ok;
  };
  const std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call = stub.PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  wait();
  if (bytes.has_value()) {
    grpc::Slice slice(*bytes);
    call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    wait();
  }
  call->WritesDone(nullptr);
  wait();
  grpc::ByteBuffer answer;
  call->Read(&answer, nullptr);
  if (wait() && reply != nullptr) {
    std::vector<grpc::Slice> slices;
    answer.Dump(&slices);
    for (const grpc::Slice& slice : slices) reply->append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  wait();
  return status;
}

// Whether the google.rpc detail of that name is there.
inline bool HasDetail(const grpc::Status& status, const std::string& name) {
  rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return false;
  for (const auto& detail : details.details()) {
    if (detail.type_url() == "type.googleapis.com/google.rpc." + name) return true;
  }
  return false;
}

}  // namespace dejavu

#endif  // TESTS_SERVER_RAW_CALL_H_
