#include "server/api/admin_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/api/sparsity_messages.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr size_t kMaxLiveIds = 1000;
constexpr uint32_t kMaxProfiledSteps = 1000;
constexpr double kDefaultProfileS = 10.0, kMaxProfileS = 600.0;
constexpr std::chrono::milliseconds kLook(2);  // how often a profile looks for steps; the engine tells nobody
constexpr int64_t kTracedSteps = 512;          // that a dump holds: what a reply has room for

absl::Status Stopped() { return UnavailableRetry("the server has stopped", std::chrono::seconds(1)); }

void FillLayer(const LayerSparsityStats& from, const ModelShape& shape, v1::LayerState* to) {
  const LayerShares shares = SharesOf(from, shape);
  to->set_decode_rows(static_cast<uint64_t>(from.rows));
  to->set_mlp_density(shares.mlp_density);
  to->set_head_density(shares.head_density);
  to->set_union_density(shares.union_density);
  to->set_shadow_rows(static_cast<uint64_t>(from.shadow_rows));
  to->set_recall(shares.recall);
  to->set_precision(shares.precision);
  to->set_missed_mass(shares.missed_mass);
  to->set_fallbacks(static_cast<uint64_t>(from.fallbacks));
  to->set_recoveries(static_cast<uint64_t>(from.recoveries));
}

v1::StepPhase PhaseOf(const StepRecord& step) {
  if (step.prefill_rows == 0) return v1::STEP_PHASE_DECODE;
  return step.decode_rows == 0 ? v1::STEP_PHASE_PREFILL : v1::STEP_PHASE_MIXED;
}

void FillStep(const StepRecord& from, SteadyTime origin, v1::StepProfile* to) {
  to->set_step(static_cast<uint64_t>(from.step));
  to->set_start_seconds(std::chrono::duration<double>(from.start - origin).count());
  to->set_total_ms(from.total_ms);
  to->set_plan_ms(from.plan_ms);
  to->set_shadow_ms(from.shadow_ms);
  to->set_forward_ms(from.forward_ms);
  to->set_handout_ms(from.handout_ms);
  to->set_phase(PhaseOf(from));
  to->set_decode_rows(static_cast<uint32_t>(from.decode_rows));
  to->set_prefill_rows(static_cast<uint32_t>(from.prefill_rows));
  to->set_shadow_rows(static_cast<uint32_t>(from.shadow_rows));
  to->set_weight_bytes(static_cast<uint64_t>(from.weight_bytes));
}

absl::Status CheckProfile(const v1::ProfileRequest& request) {
  if (request.steps() < 1 || request.steps() > kMaxProfiledSteps) {
    return InvalidField("steps", absl::StrCat("is ", request.steps(), "; it must be 1 to ", kMaxProfiledSteps));
  }
  if (!(request.timeout_s() >= 0.0 && request.timeout_s() <= kMaxProfileS)) {
    return InvalidField("timeout_s", absl::StrCat("is ", request.timeout_s(), "; it must be 0 to ", kMaxProfileS));
  }
  return absl::OkStatus();
}

}  // namespace

// The call and its errand share the request and the reply: either may be gone first.
template <typename Request, typename Response>
class AdminService::ErrandCall final : public RpcHandler {
 public:
  using Function = std::function<absl::Status(const Request&, const Errand&, Response*)>;
  ErrandCall(AdminService* service, Function function) : service_(service), function_(std::move(function)) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    RETURN_IF_ERROR(ParseMessage(bytes, &work_->request));
    work_->run = [rpc, function = function_, work = work_.get()] {
      work->status = function(work->request, *work, &work->response);
      work->done.store(true, std::memory_order_release);
      rpc->Wake();
    };
    return service_->Post(work_) ? absl::OkStatus() : Stopped();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    if (!work_->done.load(std::memory_order_acquire)) return nullptr;
    *end = work_->status;
    return work_->status.ok() ? &work_->response : nullptr;
  }

  void OnCancel() override { work_->cancelled = true; }

 private:
  struct Work : Errand {
    Request request;
    Response response;  // as the next, constant once `done`
    absl::Status status;
    std::atomic<bool> done{false};
  };

  AdminService* const service_;
  const Function function_;
  const std::shared_ptr<Work> work_ = std::make_shared<Work>();
};

AdminService::AdminService(GenerationService* generation, const Lifecycle* lifecycle, std::function<void()> drain)
    : generation_(generation),
      lifecycle_(lifecycle),
      drain_(std::move(drain)),
      started_(std::chrono::steady_clock::now()),
      thread_([this] { RunErrands(); }) {}

AdminService::~AdminService() {
  Stop();
  thread_.join();
}

void AdminService::Register(Dispatcher* dispatcher) {
  dispatcher->RegisterUnary<v1::GetEngineStateRequest, v1::GetEngineStateResponse>(
      kName, "GetEngineState", [this](const v1::GetEngineStateRequest&, v1::GetEngineStateResponse* response) {
        return GetEngineState(response);
      });
  dispatcher->RegisterUnary<v1::DrainRequest, v1::DrainResponse>(
      kName, "Drain", [this](const v1::DrainRequest&, v1::DrainResponse* response) { return Drain(response); });
  dispatcher->RegisterUnary<v1::AbortRequest, v1::AbortResponse>(
      kName, "AbortRequest", [this](const v1::AbortRequest& request, v1::AbortResponse* response) {
        return generation_->Abort(request, /*caller=*/std::nullopt, response);
      });
  dispatcher->RegisterUnary<v1::SetDefaultTierRequest, v1::SetDefaultTierResponse>(
      kName, "SetDefaultTier", [this](const v1::SetDefaultTierRequest& request, v1::SetDefaultTierResponse* response) {
        return SetDefaultTier(request, response);
      });
  dispatcher->RegisterUnary<v1::DumpTraceRequest, v1::DumpTraceResponse>(
      kName, "DumpTrace",
      [this](const v1::DumpTraceRequest&, v1::DumpTraceResponse* response) { return DumpTrace(response); });
  using ReloadCall = ErrandCall<v1::ReloadPredictorRequest, v1::ReloadPredictorResponse>;
  dispatcher->Register(kName, "ReloadPredictor", [this] {
    return std::make_unique<ReloadCall>(
        this, [this](const v1::ReloadPredictorRequest&, const Errand&, v1::ReloadPredictorResponse* response) {
          return ReloadPredictor(response);
        });
  });
  using ProfileCall = ErrandCall<v1::ProfileRequest, v1::ProfileResponse>;
  dispatcher->Register(kName, "Profile", [this] {
    return std::make_unique<ProfileCall>(
        this, [this](const v1::ProfileRequest& request, const Errand& errand, v1::ProfileResponse* response) {
          return Profile(request, errand, response);
        });
  });
}

void AdminService::Stop() {
  MutexLock lock(mutex_);
  stopping_ = true;
  changed_.NotifyAll();
}

bool AdminService::Post(std::shared_ptr<Errand> errand) {
  MutexLock lock(mutex_);
  if (stopping_) {
    errand->run = nullptr;  // it holds the call
    return false;
  }
  errands_.push_back(std::move(errand));
  changed_.NotifyAll();
  return true;
}

// Stopped, it still runs what was posted: each errand then ends at once.
void AdminService::RunErrands() {
  while (true) {
    std::shared_ptr<Errand> errand;
    {
      MutexLock lock(mutex_);
      while (errands_.empty() && !stopping_) changed_.Wait(mutex_);
      if (errands_.empty()) return;
      errand = std::move(errands_.front());
      errands_.pop_front();
    }
    errand->run();
    errand->run = nullptr;  // it holds the call
  }
}

bool AdminService::Pause(const Errand& errand, SteadyTime::duration time) {
  MutexLock lock(mutex_);
  if (!stopping_) changed_.WaitUntil(mutex_, std::chrono::steady_clock::now() + time);
  return !stopping_ && !errand.cancelled && lifecycle_->phase() != Phase::kFailed;
}

absl::Status AdminService::GetEngineState(v1::GetEngineStateResponse* response) const {
  RETURN_IF_ERROR(generation_->GetServerInfo(response->mutable_server()));
  for (std::string& id : generation_->live_requests().Ids(kMaxLiveIds)) {
    response->add_live_request_ids(std::move(id));
  }
  const ServedModel* const model = generation_->model_if_loaded();
  if (model == nullptr) return absl::OkStatus();
  const SparsityStats stats = model->engine->sparsity_stats();
  for (size_t l = 0; l < stats.layers.size(); ++l) {
    v1::LayerState* layer = response->add_layers();
    layer->set_layer(static_cast<uint32_t>(l));
    FillLayer(stats.layers[l], model->engine->model(), layer);
  }
  for (const SparsityStats::Fallback& fallback : stats.exact_now) {
    response->mutable_layers(fallback.layer)->add_exact_tiers(ToMessage(fallback.tier));
  }
  return absl::OkStatus();
}

// A second signal would cut off what runs: only the first call may lead to one.
absl::Status AdminService::Drain(v1::DrainResponse* response) {
  if (!drain_) return absl::UnimplementedError("this server cannot be drained by a call");
  const bool drains = lifecycle_->phase() > Phase::kServing;
  response->set_already(drain_asked_.exchange(true) || drains);
  if (response->already()) return absl::OkStatus();
  spdlog::info("an operator asks to drain");
  drain_();
  return absl::OkStatus();
}

absl::Status AdminService::SetDefaultTier(const v1::SetDefaultTierRequest& request,
                                          v1::SetDefaultTierResponse* response) {
  const std::optional<Tier> tier = FromMessage(request.tier());
  if (!tier.has_value()) return InvalidField("tier", "is not one of the tiers; name the one that requests shall get");
  const Tier previous = generation_->default_tier();
  RETURN_IF_ERROR(generation_->SetDefaultTier(*tier));
  response->set_previous(ToMessage(previous));
  spdlog::info("an operator sets the default tier: {}, before {}", std::string(Name(*tier)),
               std::string(Name(previous)));
  return absl::OkStatus();
}

absl::Status AdminService::DumpTrace(v1::DumpTraceResponse* response) const {
  const StepTrace& trace = generation_->model().engine->trace();
  const std::vector<StepRecord> steps = trace.StepsAfter(std::max<int64_t>(0, trace.noted() - kTracedSteps));
  const std::vector<SlowToken> tokens = trace.SlowestTokens();
  response->set_json(ChromeTrace(steps, tokens, started_));
  response->set_slow_tokens(static_cast<uint32_t>(tokens.size()));
  response->set_steps(static_cast<uint32_t>(steps.size()));
  return absl::OkStatus();
}

absl::Status AdminService::ReloadPredictor(v1::ReloadPredictorResponse* response) {
  Engine* const engine = generation_->model().engine;
  RETURN_IF_ERROR(engine->ReloadPredictor());
  response->set_path(engine->predictor().path);
  response->set_bytes(static_cast<uint64_t>(engine->predictor().bytes));
  return absl::OkStatus();
}

absl::Status AdminService::Profile(const v1::ProfileRequest& request, const Errand& errand,
                                   v1::ProfileResponse* response) {
  RETURN_IF_ERROR(CheckProfile(request));
  const StepTrace& trace = generation_->model().engine->trace();
  const double seconds = request.timeout_s() > 0.0 ? request.timeout_s() : kDefaultProfileS;
  const SteadyTime until =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int64_t>(1000 * seconds));
  const int64_t from = trace.noted(), to = from + request.steps();
  while (trace.noted() < to && std::chrono::steady_clock::now() < until) {
    if (!Pause(errand, kLook)) return Stopped();
  }
  const std::vector<StepRecord> steps = trace.StepsAfter(from);
  if (steps.empty()) {
    return UnavailableRetry(absl::StrCat("no step ended within ", seconds, " s: the engine has nothing to do"),
                            std::chrono::seconds(1));
  }
  const size_t count = std::min<size_t>(steps.size(), request.steps());
  for (size_t i = 0; i < count; ++i) FillStep(steps[i], steps[0].start, response->add_steps());
  return absl::OkStatus();
}

}  // namespace dejavu
