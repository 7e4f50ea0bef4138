#include "server/dispatcher.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "server/error_details.h"

namespace dejavu {

void Dispatcher::Register(const std::string& service, const std::string& method, HandlerFactory factory) {
  const bool fresh = methods_.emplace(absl::StrCat("/", service, "/", method), std::move(factory)).second;
  CHECK(fresh) << service << "/" << method << " is registered twice";
  if (std::find(services_.begin(), services_.end(), service) == services_.end()) services_.push_back(service);
}

grpc::ServerGenericBidiReactor* Dispatcher::CreateReactor(grpc::GenericCallbackServerContext* context) {
  const absl::Status admitted = gate_->Admit(context->method(), *context);
  if (!admitted.ok()) return Rpc::Refuse(admitted);
  const auto method = methods_.find(context->method());
  if (method == methods_.end()) {
    return Rpc::Refuse(absl::UnimplementedError(absl::StrCat("no such method: ", Printable(context->method(), 200))));
  }
  return Rpc::Start(context, writer_, method->second());
}

}  // namespace dejavu
