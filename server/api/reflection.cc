#include "server/api/reflection.h"

#include <memory>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "grpc/reflection/v1/reflection.pb.h"
#include "grpc/reflection/v1alpha/reflection.pb.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

using google::protobuf::DescriptorPool;
using google::protobuf::FileDescriptor;

// A file and all that it imports, dependencies first, each once.
template <typename FileResponse>
void AddFile(const FileDescriptor& file, std::set<std::string>* seen, FileResponse* response) {
  if (!seen->insert(file.name()).second) return;
  for (int i = 0; i < file.dependency_count(); ++i) AddFile(*file.dependency(i), seen, response);
  google::protobuf::FileDescriptorProto proto;
  file.CopyTo(&proto);
  *response->add_file_descriptor_proto() = proto.SerializeAsString();
}

// The two versions differ in nothing but their package.
template <typename Request, typename Response>
class ReflectionCall final : public RpcHandler {
 public:
  explicit ReflectionCall(const Dispatcher* dispatcher) : dispatcher_(dispatcher) {}

  bool streams_requests() const override { return true; }

  absl::Status OnRequest(const std::shared_ptr<Rpc>&, const grpc::ByteBuffer& bytes) override {
    Request request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    response_.Clear();
    response_.set_valid_host(request.host());
    *response_.mutable_original_request() = request;
    Answer(request);
    answered_ = true;
    return absl::OkStatus();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>*) override {
    return answered_.exchange(false) ? &response_ : nullptr;
  }

 private:
  void Answer(const Request& request) {
    const DescriptorPool& pool = *DescriptorPool::generated_pool();
    switch (request.message_request_case()) {
      case Request::kListServices:
        for (const std::string& name : dispatcher_->services()) {
          response_.mutable_list_services_response()->add_service()->set_name(name);
        }
        return;
      case Request::kFileByFilename:
        return AnswerFile(pool.FindFileByName(request.file_by_filename()), "file", request.file_by_filename());
      case Request::kFileContainingSymbol:
        return AnswerFile(pool.FindFileContainingSymbol(request.file_containing_symbol()), "symbol",
                          request.file_containing_symbol());
      case Request::kFileContainingExtension:
      case Request::kAllExtensionNumbersOfType:
        return AnswerError(absl::UnimplementedError("proto3 has no extensions; none can be asked for"));
      case Request::MESSAGE_REQUEST_NOT_SET:
        return AnswerError(absl::InvalidArgumentError("the request asks for nothing"));
    }
  }

  void AnswerFile(const FileDescriptor* file, const char* kind, const std::string& name) {
    if (file == nullptr) return AnswerError(absl::NotFoundError(absl::StrCat("no ", kind, " ", Printable(name, 200))));
    std::set<std::string> seen;
    AddFile(*file, &seen, response_.mutable_file_descriptor_response());
  }

  void AnswerError(const absl::Status& status) {
    response_.mutable_error_response()->set_error_code(static_cast<int>(status.code()));
    response_.mutable_error_response()->set_error_message(std::string(status.message()));
  }

  const Dispatcher* const dispatcher_;
  Response response_;
  std::atomic<bool> answered_{false};
};

template <typename Request, typename Response>
void RegisterVersion(const std::string& service, Dispatcher* dispatcher) {
  dispatcher->Register(service, "ServerReflectionInfo", {Caller::kTenant, Resource::kNone},
                       [dispatcher] { return std::make_unique<ReflectionCall<Request, Response>>(dispatcher); });
}

}  // namespace

void RegisterReflection(Dispatcher* dispatcher) {
  namespace v1 = grpc::reflection::v1;
  namespace v1alpha = grpc::reflection::v1alpha;
  RegisterVersion<v1::ServerReflectionRequest, v1::ServerReflectionResponse>("grpc.reflection.v1.ServerReflection",
                                                                             dispatcher);
  RegisterVersion<v1alpha::ServerReflectionRequest, v1alpha::ServerReflectionResponse>(
      "grpc.reflection.v1alpha.ServerReflection", dispatcher);
}

}  // namespace dejavu
