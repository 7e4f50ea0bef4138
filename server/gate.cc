#include "server/gate.h"

#include <chrono>

#include "absl/strings/match.h"
#include "server/error_details.h"

namespace dejavu {
namespace {

constexpr absl::string_view kGeneration = "/dejavu.v1.GenerationService/";
constexpr absl::string_view kAdmin = "/dejavu.v1.AdminService/";

enum class Needs {
  kNothing,   // answers in every phase: probes, reflection, what the server is
  kModel,     // needs a loaded model, goes on while the server drains
  kCapacity,  // new work for the engine
};

Needs NeedsOfAdmin(absl::string_view method) {
  return method == "GetEngineState" || method == "Drain" || method == "AbortRequest" ? Needs::kNothing : Needs::kModel;
}

Needs NeedsOf(absl::string_view method) {
  if (absl::StartsWith(method, kAdmin)) return NeedsOfAdmin(method.substr(kAdmin.size()));
  if (!absl::StartsWith(method, kGeneration)) return Needs::kNothing;
  method.remove_prefix(kGeneration.size());
  if (method == "GetServerInfo" || method == "Abort") return Needs::kNothing;
  if (method == "Tokenize" || method == "Detokenize" || method == "GetModelInfo") return Needs::kModel;
  return Needs::kCapacity;
}

}  // namespace

absl::Status Gate::Admit(absl::string_view method, const grpc::CallbackServerContext& /*context*/) const {
  const Needs needs = NeedsOf(method);
  if (needs == Needs::kNothing) return absl::OkStatus();
  switch (lifecycle_->phase()) {
    case Phase::kLoading:
    case Phase::kWarming:
      return UnavailableRetry("the model is still loading", std::chrono::seconds(2));
    case Phase::kServing:
    case Phase::kLeaving:
      return absl::OkStatus();
    case Phase::kDraining:
      if (needs == Needs::kModel) return absl::OkStatus();
      return UnavailableRetry("the server is shutting down and takes no new requests", std::chrono::seconds(1));
    case Phase::kFailed:
      return UnavailableRetry("the engine has failed; the server is about to exit", std::chrono::seconds(5));
    case Phase::kStopped:
      return UnavailableRetry("the server has stopped", std::chrono::seconds(1));
  }
  return absl::InternalError("unknown phase");
}

}  // namespace dejavu
