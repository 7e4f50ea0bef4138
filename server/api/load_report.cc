#include "server/api/load_report.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "grpcpp/alarm.h"
#include "kernels/base/status_macros.h"
#include "server/api/server_info.h"
#include "server/api/service_names.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "xds/service/orca/v3/orca.pb.h"

namespace dejavu {
namespace {

using xds::data::orca::v3::OrcaLoadReport;
using xds::service::orca::v3::OrcaLoadReportRequest;

constexpr double kShortestIntervalS = 0.1, kDefaultIntervalS = 10.0, kLongestIntervalS = 3600.0;

// All time that steps have taken.
double StepSeconds(const EngineMetrics& metrics) {
  double seconds = 0.0;
  for (size_t phase = 0; phase < metrics.step_duration.series(); ++phase) {
    seconds += metrics.step_duration[phase].snapshot().sum;
  }
  return seconds;
}

absl::StatusOr<double> CheckInterval(const OrcaLoadReportRequest& request) {
  if (!request.has_report_interval()) return kDefaultIntervalS;
  const auto& interval = request.report_interval();
  const double seconds = static_cast<double>(interval.seconds()) + 1e-9 * interval.nanos();
  if (seconds < 0.0) return InvalidField("report_interval", absl::StrCat("is ", seconds, " s; it must not be below 0"));
  return std::clamp(seconds, kShortestIntervalS, kLongestIntervalS);
}

// A report at once, and another one after each interval.
class LoadReportCall final : public RpcHandler {
 public:
  LoadReportCall(ServingState* state, Health* health) : state_(*state), health_(*health) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    OrcaLoadReportRequest request;
    RETURN_IF_ERROR(ParseMessage(bytes, &request));
    ASSIGN_OR_RETURN(interval_s_, CheckInterval(request));
    rpc_ = rpc;
    tenant_ = rpc->tenant();
    health_.AddWatcher(rpc);
    return absl::OkStatus();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    if (state_.phase() == Phase::kStopped) *end = ServerStopped();
    const SteadyTime now = std::chrono::steady_clock::now();
    if (now < next_) return nullptr;
    next_ = now + Lasting(interval_s_);
    alarm_.emplace();  // the one before has gone off
    alarm_->Set(
        std::chrono::system_clock::now() + std::chrono::milliseconds(static_cast<int64_t>(interval_s_ * 1e3) + 1),
        [weak = rpc_](bool) {
          if (const std::shared_ptr<Rpc> waits = weak.lock()) waits->Wake();
        });
    report_ = MakeLoadReport(state_, tenant_);
    return &report_;
  }

 private:
  ServingState& state_;
  Health& health_;
  std::weak_ptr<Rpc> rpc_;  // as the next two, set in OnRequest
  std::string tenant_;
  double interval_s_ = 0.0;
  SteadyTime next_;  // NextReply's, as all that follows
  std::optional<grpc::Alarm> alarm_;
  OrcaLoadReport report_;
};

}  // namespace

OrcaLoadReport MakeLoadReport(ServingState& state, const std::string& tenant) {
  OrcaLoadReport report;
  const ServedModel* const model = state.model_if_loaded();
  if (model == nullptr) return report;
  const SteadyTime now = std::chrono::steady_clock::now();
  const EngineStats stats = model->engine->stats();
  const LoadMeter::Load load = state.load_meter().Read(now);
  const double most = std::max(1, state.engine_options().scheduler.max_batch);
  report.set_application_utilization(load.sequences / most);
  report.set_cpu_utilization(state.load_meter().BusyShare(StepSeconds(model->engine->metrics()), now));
  report.set_rps_fractional(load.requests_per_s);
  report.set_eps(load.errors_per_s);
  // A policy needs no more. What follows tells how many others there are.
  if (!CheckMayKnowLoad(state, tenant).ok()) return report;
  report.set_mem_utilization(1.0 - static_cast<double>(stats.kv_blocks_free) / std::max(1, stats.kv_blocks_total));
  (*report.mutable_utilization())["kv_cache"] = report.mem_utilization();
  (*report.mutable_utilization())["batch"] = std::min(1.0, stats.running / most);
  (*report.mutable_named_metrics())["running_requests"] = stats.running;
  (*report.mutable_named_metrics())["waiting_requests"] = stats.waiting;
  (*report.mutable_named_metrics())["waiting_tokens"] = static_cast<double>(stats.waiting_tokens);
  return report;
}

std::string LoadReportBytes(ServingState& state, const std::string& tenant) {
  return state.options().load_reports ? MakeLoadReport(state, tenant).SerializeAsString() : "";
}

void RegisterLoadReports(ServingState* state, Health* health, Dispatcher* dispatcher) {
  dispatcher->Register(kLoadReportService, "StreamCoreMetrics", {Caller::kTenant, Resource::kNone},
                       [state, health] { return std::make_unique<LoadReportCall>(state, health); });
}

}  // namespace dejavu
