#include "server/api/admin_service.h"

#include <optional>
#include <string>
#include <utility>

#include "kernels/base/status_macros.h"
#include "server/api/abort.h"
#include "server/api/engine_state.h"
#include "server/api/service_names.h"
#include "server/api/sparsity_messages.h"
#include "server/api/step_profile.h"
#include "server/rpc/error_details.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

absl::Status SetDefaultTier(ServingState& state, const v1::SetDefaultTierRequest& request,
                            v1::SetDefaultTierResponse* response) {
  const std::optional<Tier> tier = FromMessage(request.tier());
  if (!tier.has_value()) return InvalidField("tier", "is not one of the tiers; name the one that requests shall get");
  const Tier previous = state.default_tier();
  RETURN_IF_ERROR(state.SetDefaultTier(*tier));
  response->set_previous(ToMessage(previous));
  spdlog::info("an operator sets the default tier: {}, before {}", std::string(Name(*tier)),
               std::string(Name(previous)));
  return absl::OkStatus();
}

// Waits for the engine: an errand.
absl::Status ReloadPredictor(const ServingState& state, const v1::ReloadPredictorRequest& /*request*/,
                             PauseFunction /*pause*/, v1::ReloadPredictorResponse* response) {
  Engine* const engine = state.model().engine;
  RETURN_IF_ERROR(engine->ReloadPredictor());
  response->set_path(engine->predictor().path);
  response->set_bytes(static_cast<uint64_t>(engine->predictor().bytes));
  return absl::OkStatus();
}

}  // namespace

AdminService::AdminService(ServingState* state, std::function<void()> drain)
    : state_(state), drain_(std::move(drain)) {}

void AdminService::Register(Dispatcher* dispatcher) {
  const std::string name = kAdminService;
  const Needs always = {Caller::kOperator, Resource::kNone};
  const Needs model = {Caller::kOperator, Resource::kModel};

  dispatcher->RegisterUnary(name, "GetEngineState", always, state_, GetEngineState);
  dispatcher->RegisterUnary(name, "Drain", always, this, Drain);
  dispatcher->RegisterUnary(name, "AbortRequest", always, state_, AbortAny);
  dispatcher->RegisterUnary(name, "SetDefaultTier", model, state_, SetDefaultTier);
  dispatcher->RegisterUnary(name, "DumpTrace", model, state_, DumpTrace);
  dispatcher->Register(name, "ReloadPredictor", model,
                       [this] { return MakeErrandCall(&errands_, state_, ReloadPredictor); });
  dispatcher->Register(name, "Profile", model, [this] { return MakeErrandCall(&errands_, state_, Profile); });
}

// A second signal would cut off what runs: only the first call may lead to one.
absl::Status AdminService::Drain(AdminService& service, const v1::DrainRequest& /*request*/,
                                 v1::DrainResponse* response) {
  if (!service.drain_) return absl::UnimplementedError("this server cannot be drained by a call");
  const bool drains = service.state_->phase() > Phase::kServing;
  response->set_already(service.drain_asked_.exchange(true) || drains);
  if (response->already()) return absl::OkStatus();
  spdlog::info("an operator asks to drain");
  service.drain_();
  return absl::OkStatus();
}

}  // namespace dejavu
