#include "server/api/kserve_service.h"

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kserve/inference.pb.h"
#include "server/api/generate_call.h"
#include "server/api/kserve_dialect.h"
#include "server/api/kserve_stream.h"
#include "server/api/server_info.h"
#include "server/api/service_names.h"
#include "server/api/validate.h"

namespace dejavu {
namespace {

namespace kserve = inference;

constexpr char kPlatform[] = "dejavud";
constexpr char kBackend[] = "vllm";  // whose tensors these are: stock tools look for it

absl::Status CheckModel(const std::string& name, const std::string& version, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(name, model));
  return CheckKServeVersion(version);
}

absl::Status ServerMetadata(const ServingState& /*state*/, const kserve::ServerMetadataRequest& /*request*/,
                            kserve::ServerMetadataResponse* response) {
  response->set_name(kPlatform);
  response->set_version(DEJAVU_VERSION);
  for (const char* extension : {"model_configuration", "model_repository", "parameters", "statistics"}) {
    response->add_extensions(extension);
  }
  return absl::OkStatus();
}

template <typename Tensors>
void FillTensors(absl::Span<const KServeTensor> tensors, Tensors* messages) {
  for (const KServeTensor& tensor : tensors) {
    auto* const message = messages->Add();
    message->set_name(tensor.name);
    message->set_datatype(KServeTypeName(tensor.type));
    message->add_shape(tensor.elements);
  }
}

absl::Status ModelMetadata(const ServingState& state, const kserve::ModelMetadataRequest& request,
                           kserve::ModelMetadataResponse* response) {
  RETURN_IF_ERROR(CheckModel(request.name(), request.version(), state.model()));
  response->set_name(state.model().name);
  response->add_versions(kKServeVersion);
  response->set_platform(kPlatform);
  FillTensors(KServeInputs(), response->mutable_inputs());
  FillTensors(KServeOutputs(), response->mutable_outputs());
  return absl::OkStatus();
}

absl::Status ModelConfig(const ServingState& state, const kserve::ModelConfigRequest& request,
                         kserve::ModelConfigResponse* response) {
  RETURN_IF_ERROR(CheckModel(request.name(), request.version(), state.model()));
  kserve::ModelConfig* const config = response->mutable_config();
  config->set_name(state.model().name);
  config->set_backend(kBackend);
  config->mutable_model_transaction_policy()->set_decoupled(true);
  for (const KServeTensor& tensor : KServeInputs()) {
    kserve::ModelInput* const input = config->add_input();
    input->set_name(tensor.name);
    input->set_data_type(tensor.type);
    input->add_dims(tensor.elements);
    input->set_optional(tensor.optional);
  }
  for (const KServeTensor& tensor : KServeOutputs()) {
    kserve::ModelOutput* const output = config->add_output();
    output->set_name(tensor.name);
    output->set_data_type(tensor.type);
    output->add_dims(tensor.elements);
  }
  return absl::OkStatus();
}

void FillDuration(double seconds, int64_t count, kserve::StatisticDuration* duration) {
  duration->set_count(static_cast<uint64_t>(count));
  duration->set_ns(static_cast<uint64_t>(1e9 * seconds));
}

// The sum over the series of a histogram.
void FillDuration(const HistogramFamily& family, kserve::StatisticDuration* duration) {
  double seconds = 0.0;
  int64_t count = 0;
  for (size_t series = 0; series < family.series(); ++series) {
    const Histogram::Snapshot snapshot = family[series].snapshot();
    seconds += snapshot.sum;
    count += snapshot.count();
  }
  FillDuration(seconds, count, duration);
}

absl::Status ModelStatistics(const ServingState& state, const std::string& tenant,
                             const kserve::ModelStatisticsRequest& request, kserve::ModelStatisticsResponse* response) {
  RETURN_IF_ERROR(CheckModel(request.name(), request.version(), state.model()));
  RETURN_IF_ERROR(CheckMayKnowLoad(state, tenant));
  const Engine& engine = *state.model().engine;
  const EngineStats stats = engine.stats();
  kserve::ModelStatistics* const model = response->add_model_stats();
  model->set_name(state.model().name);
  model->set_version(kKServeVersion);
  model->set_inference_count(static_cast<uint64_t>(stats.account.finished));
  model->set_execution_count(static_cast<uint64_t>(stats.steps));
  kserve::InferStatistics* const all = model->mutable_inference_stats();
  FillDuration(engine.metrics().duration, all->mutable_success());
  FillDuration(0.0, stats.account.failed + stats.account.cancelled, all->mutable_fail());
  FillDuration(engine.metrics().queue, all->mutable_queue());
  FillDuration(engine.metrics().prefill, all->mutable_compute_input());
  FillDuration(engine.metrics().decode, all->mutable_compute_infer());
  // perf_analyzer ends itself where the three counts differ; a request of one token has no decoding.
  for (auto* const part : {all->mutable_compute_infer(), all->mutable_compute_output()}) {
    part->set_count(all->compute_input().count());
  }
  return absl::OkStatus();
}

absl::Status RepositoryIndex(const ServingState& state, const kserve::RepositoryIndexRequest& request,
                             kserve::RepositoryIndexResponse* response) {
  if (!request.repository_name().empty()) {
    return absl::UnimplementedError("there are no named repositories; leave repository_name empty");
  }
  const bool ready = state.phase() == Phase::kServing;
  if (request.ready() && !ready) return absl::OkStatus();
  auto* const model = response->add_models();
  model->set_name(state.model_name());
  model->set_version(kKServeVersion);
  model->set_state(ready ? "READY" : "UNAVAILABLE");
  if (!ready) model->set_reason(Name(StateOf(state.phase())));
  return absl::OkStatus();
}

absl::Status TraceSetting(const ServingState& /*state*/, const kserve::TraceSettingRequest& request,
                          kserve::TraceSettingResponse* response) {
  if (!request.settings().empty())
    return absl::UnavailableError("the server does not support trace settings of clients");
  (*response->mutable_settings())["trace_level"].add_value("OFF");
  return absl::OkStatus();
}

absl::Status LogSettings(const ServingState& /*state*/, const kserve::LogSettingsRequest& request,
                         kserve::LogSettingsResponse* response) {
  if (!request.settings().empty()) return absl::UnavailableError("the server does not support dynamic logging");
  for (const char* kind : {"log_info", "log_warning", "log_error"}) {
    (*response->mutable_settings())[kind].set_bool_param(true);
  }
  (*response->mutable_settings())["log_verbose_level"].set_uint32_param(0);
  (*response->mutable_settings())["log_format"].set_string_param("default");
  return absl::OkStatus();
}

// Probes know no token, and are answered in every phase.
void RegisterProbes(const ServingState* state, const Health* health, Dispatcher* dispatcher) {
  using HealthStatus = grpc::health::v1::HealthCheckResponse;
  const std::string name = kKServeService;
  const Needs nothing = {Caller::kAnybody, Resource::kNone};
  const auto is_ready = [health] { return health->Status("") == HealthStatus::SERVING; };
  dispatcher->RegisterUnary<kserve::ServerLiveRequest, kserve::ServerLiveResponse>(
      name, "ServerLive", nothing, [health](const Rpc&, const auto&, kserve::ServerLiveResponse* response) {
        response->set_live(health->Status("liveness") == HealthStatus::SERVING);
        return absl::OkStatus();
      });
  dispatcher->RegisterUnary<kserve::ServerReadyRequest, kserve::ServerReadyResponse>(
      name, "ServerReady", nothing, [is_ready](const Rpc&, const auto&, kserve::ServerReadyResponse* response) {
        response->set_ready(is_ready());
        return absl::OkStatus();
      });
  // Of a model that there is not, Triton says that it is not ready.
  dispatcher->RegisterUnary<kserve::ModelReadyRequest, kserve::ModelReadyResponse>(
      name, "ModelReady", nothing,
      [state, is_ready](const Rpc&, const kserve::ModelReadyRequest& request, kserve::ModelReadyResponse* response) {
        const absl::Status version = CheckKServeVersion(request.version());
        if (absl::IsInvalidArgument(version)) return version;
        response->set_ready(is_ready() && version.ok() && request.name() == state->model_name());
        return absl::OkStatus();
      });
}

// A method whose answer is the same for everybody: empty, or a refusal.
template <typename Request, typename Response>
void RegisterConstant(const char* method, const absl::Status& answer, Dispatcher* dispatcher) {
  dispatcher->RegisterUnary<Request, Response>(kKServeService, method, {Caller::kTenant, Resource::kNone},
                                               [answer](const Rpc&, const Request&, Response*) { return answer; });
}

// Models that come and go, and shared memory. No region is ever registered: there are none to tell of or to forget.
void RegisterWhatThereIsNot(Dispatcher* dispatcher) {
  const absl::Status one_model =
      absl::UnavailableError("explicit model load / unload is not allowed: the server holds one model");
  const absl::Status no_memory = absl::UnavailableError("shared memory is not supported: send tensors in the request");
  RegisterConstant<kserve::RepositoryModelLoadRequest, kserve::RepositoryModelLoadResponse>("RepositoryModelLoad",
                                                                                            one_model, dispatcher);
  RegisterConstant<kserve::RepositoryModelUnloadRequest, kserve::RepositoryModelUnloadResponse>("RepositoryModelUnload",
                                                                                                one_model, dispatcher);
  RegisterConstant<kserve::SystemSharedMemoryStatusRequest, kserve::SystemSharedMemoryStatusResponse>(
      "SystemSharedMemoryStatus", absl::OkStatus(), dispatcher);
  RegisterConstant<kserve::SystemSharedMemoryUnregisterRequest, kserve::SystemSharedMemoryUnregisterResponse>(
      "SystemSharedMemoryUnregister", absl::OkStatus(), dispatcher);
  RegisterConstant<kserve::SystemSharedMemoryRegisterRequest, kserve::SystemSharedMemoryRegisterResponse>(
      "SystemSharedMemoryRegister", no_memory, dispatcher);
  RegisterConstant<kserve::CudaSharedMemoryStatusRequest, kserve::CudaSharedMemoryStatusResponse>(
      "CudaSharedMemoryStatus", absl::OkStatus(), dispatcher);
  RegisterConstant<kserve::CudaSharedMemoryUnregisterRequest, kserve::CudaSharedMemoryUnregisterResponse>(
      "CudaSharedMemoryUnregister", absl::OkStatus(), dispatcher);
  RegisterConstant<kserve::CudaSharedMemoryRegisterRequest, kserve::CudaSharedMemoryRegisterResponse>(
      "CudaSharedMemoryRegister", no_memory, dispatcher);
}

}  // namespace

void RegisterKServe(ServingState* state, const Health* health, Dispatcher* dispatcher) {
  const std::string name = kKServeService;
  const Needs always = {Caller::kTenant, Resource::kNone};
  const Needs model = {Caller::kTenant, Resource::kModel};
  const Needs capacity = {Caller::kTenant, Resource::kCapacity};

  RegisterProbes(state, health, dispatcher);
  dispatcher->Register(name, "ModelInfer", capacity, [state] {
    return std::make_unique<GenerateCall>(state, std::make_unique<KServeDialect>(state->model(), /*in_stream=*/false));
  });
  dispatcher->Register(name, "ModelStreamInfer", capacity, [state] { return std::make_unique<KServeStream>(state); });
  dispatcher->RegisterUnary(name, "ServerMetadata", always, state, ServerMetadata);
  dispatcher->RegisterUnary(name, "ModelMetadata", model, state, ModelMetadata);
  dispatcher->RegisterUnary(name, "ModelConfig", model, state, ModelConfig);
  dispatcher->RegisterUnary(name, "ModelStatistics", model, state, ModelStatistics);
  dispatcher->RegisterUnary(name, "RepositoryIndex", always, state, RepositoryIndex);
  RegisterWhatThereIsNot(dispatcher);
  dispatcher->RegisterUnary(name, "TraceSetting", always, state, TraceSetting);
  dispatcher->RegisterUnary(name, "LogSettings", always, state, LogSettings);
}

}  // namespace dejavu
