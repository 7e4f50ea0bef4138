#include <cstdio>
#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/admin.grpc.pb.h"
#include "loadtest/cli/commands.h"
#include "loadtest/cli/output.h"
#include "loadtest/client/names.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

std::string PhaseName(v1::StepPhase phase) {
  switch (phase) {
    case v1::STEP_PHASE_PREFILL:
      return "prefill";
    case v1::STEP_PHASE_DECODE:
      return "decode";
    case v1::STEP_PHASE_MIXED:
      return "mixed";
    default:
      return "?";
  }
}

// One method. Answer says what came back, and returns the exit code.
class AdminMethod {
 public:
  explicit AdminMethod(CLI::App* app) : app_(app) {}
  virtual ~AdminMethod() = default;
  const CLI::App* app() const { return app_; }
  virtual grpc::Status Call(v1::AdminService::Stub& stub, grpc::ClientContext* context) = 0;
  virtual int Answer(bool json) = 0;

 protected:
  CLI::App* const app_;
};

// One that is a call of the stub's, with an empty request where Request is not overridden.
template <typename RequestType, typename ResponseType>
class MethodOf : public AdminMethod {
 public:
  using Rpc = grpc::Status (v1::AdminService::Stub::*)(grpc::ClientContext*, const RequestType&, ResponseType*);

  MethodOf(CLI::App* app, Rpc rpc) : AdminMethod(app), rpc_(rpc) {}
  grpc::Status Call(v1::AdminService::Stub& stub, grpc::ClientContext* context) final {
    return (stub.*rpc_)(context, Request(), &response_);
  }

 protected:
  virtual RequestType Request() const { return {}; }

  ResponseType response_;

 private:
  const Rpc rpc_;
};

class StateMethod final : public MethodOf<v1::GetEngineStateRequest, v1::GetEngineStateResponse> {
 public:
  explicit StateMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("state", "State, load, requests under way, and what each layer reads"),
                 &v1::AdminService::Stub::GetEngineState) {}

  int Answer(bool json) override {
    const v1::GetServerInfoResponse& server = response_.server();
    const v1::Load& load = server.load();
    if (json) {
      Json layers = Json::array();
      for (const v1::LayerState& layer : response_.layers()) layers.push_back(LayerJson(layer));
      PrintJson({{"state", StateName(server.state())},
                 {"version", server.version()},
                 {"model", server.model()},
                 {"uptime_seconds", server.uptime_seconds()},
                 {"default_tier", TierName(server.sparsity().default_tier())},
                 {"load",
                  {{"running_requests", load.running_requests()},
                   {"waiting_requests", load.waiting_requests()},
                   {"kv_blocks_total", load.kv_blocks_total()},
                   {"kv_blocks_free", load.kv_blocks_free()},
                   {"kv_blocks_cached", load.kv_blocks_cached()},
                   {"steps", load.steps()},
                   {"prompt_tokens", load.prompt_tokens()},
                   {"generated_tokens", load.generated_tokens()},
                   {"preemptions", load.preemptions()}}},
                 {"layers", std::move(layers)},
                 {"live_request_ids",
                  std::vector<std::string>(response_.live_request_ids().begin(), response_.live_request_ids().end())},
                 {"live_request_tenants", std::vector<std::string>(response_.live_request_tenants().begin(),
                                                                   response_.live_request_tenants().end())}});
      return kExitOk;
    }
    std::printf("%s, %s, version %s, up %.0f s, default tier %s\n", server.model().c_str(),
                StateName(server.state()).c_str(), server.version().c_str(), server.uptime_seconds(),
                TierName(server.sparsity().default_tier()).c_str());
    std::printf("%u running, %u waiting; KV blocks: %u free of %u, %u cached; %llu steps, %llu tokens generated\n",
                load.running_requests(), load.waiting_requests(), load.kv_blocks_free(), load.kv_blocks_total(),
                load.kv_blocks_cached(), static_cast<unsigned long long>(load.steps()),
                static_cast<unsigned long long>(load.generated_tokens()));
    if (response_.layers_size() > 0) PrintLayers();
    for (int i = 0; i < response_.live_request_ids_size(); ++i) {
      const std::string tenant = i < response_.live_request_tenants_size() ? response_.live_request_tenants(i) : "";
      std::printf("request %s%s%s\n", response_.live_request_ids(i).c_str(), tenant.empty() ? "" : " of ",
                  tenant.c_str());
    }
    return kExitOk;
  }

 private:
  static Json LayerJson(const v1::LayerState& layer) {
    Json exact = Json::array();
    for (const int tier : layer.exact_tiers()) exact.push_back(TierName(static_cast<v1::Tier>(tier)));
    return {{"layer", layer.layer()},
            {"decode_rows", layer.decode_rows()},
            {"mlp_density", layer.mlp_density()},
            {"head_density", layer.head_density()},
            {"union_density", layer.union_density()},
            {"shadow_rows", layer.shadow_rows()},
            {"recall", layer.recall()},
            {"precision", layer.precision()},
            {"missed_mass", layer.missed_mass()},
            {"fallbacks", layer.fallbacks()},
            {"recoveries", layer.recoveries()},
            {"exact_tiers", std::move(exact)}};
  }

  void PrintLayers() const {
    std::printf("%5s %10s %8s %8s %8s %8s %8s %9s %9s  %s\n", "layer", "rows", "mlp", "heads", "union", "recall",
                "missed", "fallbacks", "recovered", "exact now");
    for (const v1::LayerState& layer : response_.layers()) {
      std::string exact;
      for (const int tier : layer.exact_tiers()) {
        absl::StrAppend(&exact, exact.empty() ? "" : ",", TierName(static_cast<v1::Tier>(tier)));
      }
      std::printf("%5u %10llu %8.3f %8.3f %8.3f %8.3f %8.4f %9llu %9llu  %s\n", layer.layer(),
                  static_cast<unsigned long long>(layer.decode_rows()), layer.mlp_density(), layer.head_density(),
                  layer.union_density(), layer.recall(), layer.missed_mass(),
                  static_cast<unsigned long long>(layer.fallbacks()),
                  static_cast<unsigned long long>(layer.recoveries()), exact.c_str());
    }
  }
};

class DrainMethod final : public MethodOf<v1::DrainRequest, v1::DrainResponse> {
 public:
  explicit DrainMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("drain", "Take no more requests, finish what runs, and end the daemon"),
                 &v1::AdminService::Stub::Drain) {}

  int Answer(bool json) override {
    if (json) {
      PrintJson({{"already", response_.already()}});
    } else {
      std::puts(response_.already() ? "was draining already" : "draining");
    }
    return kExitOk;
  }
};

class AbortMethod final : public MethodOf<v1::AbortRequest, v1::AbortResponse> {
 public:
  explicit AbortMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("abort", "End a request of any tenant; exit code 1 when there is none"),
                 &v1::AdminService::Stub::AbortRequest) {
    app_->add_option("request_id", request_id_, "As `admin state` lists it")->required();
    app_->add_option("--tenant", tenant_, "Whose it is, where several tenants have a request of that id");
  }

  v1::AbortRequest Request() const override {
    v1::AbortRequest request;
    request.set_request_id(request_id_);
    if (!tenant_.empty()) request.set_tenant(tenant_);
    return request;
  }
  int Answer(bool json) override {
    if (json) {
      PrintJson({{"found", response_.found()}});
    } else {
      std::puts(response_.found() ? "aborted" : "no such request");
    }
    return response_.found() ? kExitOk : kExitFailed;
  }

 private:
  std::string request_id_, tenant_;
};

class SetDefaultTierMethod final : public MethodOf<v1::SetDefaultTierRequest, v1::SetDefaultTierResponse> {
 public:
  explicit SetDefaultTierMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("set-default-tier", "The tier of new requests that name none"),
                 &v1::AdminService::Stub::SetDefaultTier) {
    app_->add_option("tier", tier_, "dense, exact, high, balanced or fast")
        ->required()
        ->check(CLI::IsMember(kTierNames));
  }

  v1::SetDefaultTierRequest Request() const override {
    v1::SetDefaultTierRequest request;
    request.set_tier(TierOf(tier_).value_or(v1::TIER_UNSPECIFIED));
    return request;
  }
  int Answer(bool json) override {
    if (json) {
      PrintJson({{"tier", tier_}, {"previous", TierName(response_.previous())}});
    } else {
      std::printf("%s, before %s\n", tier_.c_str(), TierName(response_.previous()).c_str());
    }
    return kExitOk;
  }

 private:
  std::string tier_;
};

class ReloadPredictorMethod final : public MethodOf<v1::ReloadPredictorRequest, v1::ReloadPredictorResponse> {
 public:
  explicit ReloadPredictorMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("reload-predictor", "Read the predictor's file again"),
                 &v1::AdminService::Stub::ReloadPredictor) {}

  int Answer(bool json) override {
    if (json) {
      PrintJson({{"path", response_.path()}, {"bytes", response_.bytes()}});
    } else {
      std::printf("%s, %.1f MB\n", response_.path().c_str(), static_cast<double>(response_.bytes()) / 1e6);
    }
    return kExitOk;
  }
};

class TraceMethod final : public MethodOf<v1::DumpTraceRequest, v1::DumpTraceResponse> {
 public:
  explicit TraceMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("trace", "The slowest tokens and the last steps, as Chrome trace JSON"),
                 &v1::AdminService::Stub::DumpTrace) {
    app_->add_option("--output", path_, "File; without it, standard output");
  }

  int Answer(bool json) override {
    if (path_.empty()) {
      std::fwrite(response_.json().data(), 1, response_.json().size(), stdout);
      return kExitOk;
    }
    std::ofstream file(path_, std::ios::binary);
    file << response_.json();
    file.close();
    if (!file) {
      std::fprintf(stderr, "dejavu-cli: cannot write %s\n", path_.c_str());
      return kExitFailed;
    }
    if (json) {
      PrintJson({{"output", path_}, {"slow_tokens", response_.slow_tokens()}, {"steps", response_.steps()}});
    } else {
      std::printf("%u slow tokens and %u steps in %s; open it with ui.perfetto.dev\n", response_.slow_tokens(),
                  response_.steps(), path_.c_str());
    }
    return kExitOk;
  }

 private:
  std::string path_;
};

class ProfileMethod final : public MethodOf<v1::ProfileRequest, v1::ProfileResponse> {
 public:
  explicit ProfileMethod(CLI::App* admin)
      : MethodOf(admin->add_subcommand("profile", "Where the time of the next steps goes"),
                 &v1::AdminService::Stub::Profile) {
    app_->add_option("--steps", steps_, "How many; at most 1000")->capture_default_str();
    app_->add_option("--seconds", seconds_, "How long to wait for them")->capture_default_str();
  }

  v1::ProfileRequest Request() const override {
    v1::ProfileRequest request;
    request.set_steps(steps_);
    request.set_timeout_s(seconds_);
    return request;
  }
  int Answer(bool json) override {
    if (json) {
      Json steps = Json::array();
      for (const v1::StepProfile& step : response_.steps()) steps.push_back(StepJson(step));
      PrintJson({{"steps", std::move(steps)}});
    } else {
      PrintTable();
    }
    return kExitOk;
  }

 private:
  static Json StepJson(const v1::StepProfile& step) {
    return {{"step", step.step()},
            {"start_seconds", step.start_seconds()},
            {"phase", PhaseName(step.phase())},
            {"decode_rows", step.decode_rows()},
            {"prefill_rows", step.prefill_rows()},
            {"shadow_rows", step.shadow_rows()},
            {"total_ms", step.total_ms()},
            {"plan_ms", step.plan_ms()},
            {"shadow_ms", step.shadow_ms()},
            {"forward_ms", step.forward_ms()},
            {"handout_ms", step.handout_ms()},
            {"weight_bytes", step.weight_bytes()}};
  }

  void PrintTable() const {
    std::printf("%10s %-7s %6s %7s %8s %8s %8s %8s %8s %9s\n", "step", "phase", "decode", "prefill", "total", "plan",
                "shadow", "forward", "handout", "weights");
    v1::StepProfile sum;
    for (const v1::StepProfile& s : response_.steps()) {
      std::printf("%10llu %-7s %6u %7u %8.3f %8.3f %8.3f %8.3f %8.3f %9.3f\n",
                  static_cast<unsigned long long>(s.step()), PhaseName(s.phase()).c_str(), s.decode_rows(),
                  s.prefill_rows(), s.total_ms(), s.plan_ms(), s.shadow_ms(), s.forward_ms(), s.handout_ms(),
                  static_cast<double>(s.weight_bytes()) / 1e6);
      sum.set_total_ms(sum.total_ms() + s.total_ms());
      sum.set_plan_ms(sum.plan_ms() + s.plan_ms());
      sum.set_shadow_ms(sum.shadow_ms() + s.shadow_ms());
      sum.set_forward_ms(sum.forward_ms() + s.forward_ms());
      sum.set_handout_ms(sum.handout_ms() + s.handout_ms());
    }
    const double n = response_.steps_size();
    std::printf("%10s %-7s %6s %7s %8.3f %8.3f %8.3f %8.3f %8.3f %9s\n", "mean", "", "", "", sum.total_ms() / n,
                sum.plan_ms() / n, sum.shadow_ms() / n, sum.forward_ms() / n, sum.handout_ms() / n, "");
    std::puts("times in ms, weights read in MB");
  }

  uint32_t steps_ = 20;
  double seconds_ = 10.0;
};

class AdminCommand final : public Command {
 public:
  explicit AdminCommand(CLI::App* program)
      : Command(program->add_subcommand("admin", "For operators: what the daemon serves on its admin.listen")) {
    app_->require_subcommand(1);
    AddJsonFlag();
    app_->fallthrough();
    methods_.push_back(std::make_unique<StateMethod>(app_));
    methods_.push_back(std::make_unique<DrainMethod>(app_));
    methods_.push_back(std::make_unique<AbortMethod>(app_));
    methods_.push_back(std::make_unique<SetDefaultTierMethod>(app_));
    methods_.push_back(std::make_unique<ReloadPredictorMethod>(app_));
    methods_.push_back(std::make_unique<TraceMethod>(app_));
    methods_.push_back(std::make_unique<ProfileMethod>(app_));
    for (CLI::App* method : app_->get_subcommands({})) method->fallthrough();
  }

  int Run(Connection* connection) override {
    for (const auto& method : methods_) {
      if (!method->app()->parsed()) continue;
      const grpc::Status status =
          connection->CallOnce([&](Attempt* attempt) { return method->Call(connection->admin(), &attempt->context); });
      if (!status.ok()) return ReportFailure(status, connection->interrupted(), json_);
      return method->Answer(json_);
    }
    return kExitUsage;
  }

 private:
  std::vector<std::unique_ptr<AdminMethod>> methods_;
};

}  // namespace

std::unique_ptr<Command> MakeAdminCommand(CLI::App* program) { return std::make_unique<AdminCommand>(program); }

}  // namespace dejavu
