#include "server/rpc/dispatcher.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "server/rpc/error_details.h"
#include "server/transport/socket_name.h"

namespace dejavu {
namespace {

// Who calls, by a gateway's word: the last entry of the last header is its own, the others are what it was told. Empty:
// that is no address.
std::string ForwardedClient(const grpc::CallbackServerContext& context) {
  const auto [begin, end] = context.client_metadata().equal_range("x-forwarded-for");
  if (begin == end) return "";
  const grpc::string_ref last = std::prev(end)->second;
  absl::string_view entry(last.data(), last.size());
  if (const size_t comma = entry.rfind(','); comma != entry.npos) entry.remove_prefix(comma + 1);
  return AddressName(absl::StripAsciiWhitespace(entry));
}

}  // namespace

void Dispatcher::Register(const std::string& service, const std::string& method, Needs needs, HandlerFactory factory) {
  gate_->Register(service, method, needs);
  const bool fresh =
      methods_.emplace(absl::StrCat("/", service, "/", method), Method{service, method, std::move(factory)}).second;
  CHECK(fresh) << service << "/" << method << " is registered twice";
  if (std::find(services_.begin(), services_.end(), service) == services_.end()) services_.push_back(service);
}

grpc::ServerGenericBidiReactor* Dispatcher::CreateReactor(grpc::GenericCallbackServerContext* context) {
  const auto method = methods_.find(context->method());
  const bool known = method != methods_.end();
  // Nobody asked for traces of probes.
  const bool probe = !known || absl::StartsWith(method->second.service, "grpc.");
  RequestRecord record = Rpc::Describe(*context, probe ? 0.0 : ends_->trace_ratio());
  record.service = known ? method->second.service : "";
  record.method = known ? method->second.name : "unknown";
  auto slot = std::make_unique<CallSlot>(connections_, record.peer, MetadataBytes(*context));
  if (slot->through_gateway()) {
    if (std::string client = ForwardedClient(*context); !client.empty()) record.peer = std::move(client);
  }
  if (context->IsCancelled()) slot->NoteEnd(/*by_deadline=*/false);
  absl::Status admitted = slot->Check();
  if (admitted.ok()) admitted = gate_->Admit(context->method(), *context, &record);
  if (!admitted.ok()) return Rpc::Refuse(context, admitted, std::move(record), *ends_);
  if (!known) {
    return Rpc::Refuse(context,
                       absl::UnimplementedError(absl::StrCat("no such method: ", Printable(context->method(), 200))),
                       std::move(record), *ends_);
  }
  return Rpc::Start(context, workers_, std::move(slot), ends_, std::move(record), method->second.factory());
}

}  // namespace dejavu
