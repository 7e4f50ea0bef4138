#include "server/server.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/security/server_credentials.h"
#include "kernels/base/clock.h"
#include "kernels/base/processors.h"
#include "kernels/base/status_macros.h"
#include "server/api/generation_service.h"
#include "server/api/kserve_service.h"
#include "server/api/load_report.h"
#include "server/api/reflection.h"
#include "server/api/vllm_service.h"
#include "server/observe/logging.h"
#include "server/observe/status_page.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

// How long calls may take to send their last words after they were told to end.
constexpr std::chrono::milliseconds kLastWords(500);

// How long a port may try to listen again.
constexpr double kMostDeafS = 10;

std::unique_ptr<TraceExporter> MakeTraceExporter(const ServerOptions& options, const std::string& model_name) {
  if (options.trace_otlp_endpoint.empty()) return nullptr;
  TraceExporterOptions exporter;
  exporter.endpoint = options.trace_otlp_endpoint;
  exporter.model = model_name;
  exporter.version = DEJAVU_VERSION;
  exporter.max_queue = options.trace_max_queue;
  return std::make_unique<TraceExporter>(std::move(exporter));
}

int PoolThreads() { return std::clamp(DefaultThreads().count / 4, 1, 4); }

// Of the blocks, should all of them be written.
int64_t KvBytes(const EngineStats& stats, const ModelShape& model, const KvOptions& options) {
  const int64_t value_bytes = options.dtype == "fp32" ? 4 : 2;
  return int64_t{stats.kv_blocks_total} * options.block_tokens * 2 * model.layers * model.hidden * value_bytes;
}

// The file never holds half a number: it is written aside and renamed.
absl::Status WritePortFile(const std::string& path, int port) {
  if (path.empty()) return absl::OkStatus();
  const std::string aside = path + ".new";
  std::ofstream file(aside);
  file << port << "\n";
  file.close();
  if (!file || std::rename(aside.c_str(), path.c_str()) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot write port file ", path, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace

std::string ServedModelName(const ServerOptions& options, const std::string& model_directory) {
  if (!options.served_model_name.empty()) return options.served_model_name;
  std::error_code error;
  std::filesystem::path path =
      std::filesystem::weakly_canonical(model_directory, error);  // "." and "dir/" have names too
  if (error) path = model_directory;
  return path.filename().string();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options, const EngineOptions& engine_options,
                                                      std::function<void()> drain) {
  RETURN_IF_ERROR(CheckOptions(engine_options));  // the metrics are made from them before the engine is
  RETURN_IF_ERROR(CheckListen("listen", options.listen));
  if (!options.admin_listen.empty()) RETURN_IF_ERROR(CheckListen("admin.listen", options.admin_listen));
  if (!options.health_listen.empty()) RETURN_IF_ERROR(CheckListen("health.listen", options.health_listen));
  RouteGrpcLog();
  RouteProtobufLog();
  ASSIGN_OR_RETURN(std::unique_ptr<Security> security, Security::Load(options));
  ASSIGN_OR_RETURN(const TransportLimits limits, MakeTransportLimits(options));
  std::unique_ptr<Server> server(new Server(options, engine_options, std::move(security), limits, std::move(drain)));
  RETURN_IF_ERROR(server->Listen());
  RETURN_IF_ERROR(server->WritePortFiles());
  return server;
}

Server::Server(const ServerOptions& options, const EngineOptions& engine_options, std::unique_ptr<Security> security,
               const TransportLimits& limits, std::function<void()> drain)
    : options_(options),
      security_(std::move(security)),
      gate_(&lifecycle_, security_->tokens(), options.auth_admin_tenant,
            static_cast<size_t>(options.max_metadata_bytes)),
      state_(options, engine_options, ServedModelName(options, engine_options.model), &lifecycle_, security_->tokens()),
      access_log_(options.log_refused_per_s),
      trace_exporter_(MakeTraceExporter(options, model_name())),
      metrics_(model_name(), engine_options.metrics.edges, options.metrics_per_layer,
               options.auth_tokens_file.empty() ? 0 : options.metrics_tenants, &lifecycle_),
      ends_(std::make_shared<CallEnds>(&writer_, trace_exporter_ == nullptr ? 0.0 : options.trace_sample_ratio)),
      connections_(limits),
      pool_(PoolThreads(), options.max_waiting_mib << 20),
      calls_(CallTimeouts(options)),
      watch_(&connections_, [this](SteadyTime now) { calls_.Sweep(now); }),
      health_(&lifecycle_),
      admin_(&state_, std::move(drain)),
      public_port_(kPublicPort, &gate_, &watch_, workers(), ends_),
      admin_port_(kAdminPort, &gate_, &watch_, workers(), ends_),
      health_port_(kHealthPort, &gate_, &watch_, workers(), ends_) {
  AddObservers();
  RegisterMethods();
}

void Server::RegisterMethods() {
  RegisterGenerationService(&state_, public_port_.dispatcher());
  RegisterKServe(&state_, &health_, public_port_.dispatcher());
  RegisterVllm(&state_, &health_, public_port_.dispatcher());
  if (options_.load_reports) RegisterLoadReports(&state_, &health_, public_port_.dispatcher());
  admin_.Register(admin_port_.dispatcher());
  for (GrpcPort* port : {&public_port_, &health_port_}) health_.Register(port->dispatcher());
  if (!options_.reflection) return;
  for (GrpcPort* port : {&public_port_, &admin_port_}) RegisterReflection(port->dispatcher());
}

void Server::AddObservers() {
  ends_->Add(&metrics_);
  if (options_.log_access) ends_->Add(&access_log_);
  if (trace_exporter_ != nullptr) ends_->Add(trace_exporter_.get());

  metrics_.AddCounter("log_lines_dropped_total", "Lines of the log that nobody took in time.", LogLinesDropped);
  const TraceExporter* const traces = trace_exporter_.get();
  metrics_.AddCounter("trace_spans_exported_total", "Spans that the collector took.",
                      [traces] { return traces == nullptr ? 0 : traces->exported(); });
  metrics_.AddCounter("trace_spans_dropped_total", "Spans that it did not: the queue was full, or no answer came.",
                      [traces] { return traces == nullptr ? 0 : traces->dropped(); });
  AddTransportMetrics();
  const Security* const credentials = security_.get();
  metrics_.AddCounter("credential_reloads_total", "Changed certificates and token files that hold now.",
                      [credentials] { return credentials->reloads(); });
  metrics_.AddCounter("credential_reload_failures_total", "Looks at those files that found what cannot be used.",
                      [credentials] { return credentials->reload_failures(); });
  if (credentials->certificates() != nullptr) {
    metrics_.AddGauge("tls_certificate_expiry_timestamp_seconds", "End of the server certificate's life.",
                      [credentials] { return credentials->certificates()->expiry_unix_s(); });
  }
}

void Server::AddTransportMetrics() {
  ConnectionTable* const table = &connections_;
  metrics_.AddGauge("connections", "Connections that are open.", [table] { return table->connections(); });
  metrics_.AddGauge("open_calls", "Calls of clients that are open.", [table] { return table->open_calls().load(); });
  metrics_.AddGauge("unread_bytes", "Bytes of replies that clients have no room for.",
                    [table] { return table->unread_bytes().load(); });
  const WorkPool* const pool = &pool_;
  metrics_.AddGauge("large_requests_waiting_bytes", "Bytes of large requests that wait to be read.",
                    [pool] { return pool->waiting_bytes(); });
  metrics_.AddCounter("large_requests_total", "Requests above 8 KiB or compressed, which a pool reads.",
                      [pool] { return pool->requests(); });
  metrics_.AddCounter("large_requests_refused_total", "Those of them for which it had no room.",
                      [pool] { return pool->refused(); });
  const ConnectionWatch* const watch = &watch_;
  metrics_.AddGauge("memory_bound_bytes", "Memory beside mapped files at which the worst connections are closed.",
                    [watch] { return watch->memory_bound_bytes(); });
  for (size_t i = 0; i < kTurnedNames.size(); ++i) {
    metrics_.AddCounter("connections_refused_total", "Connections that were not taken, by the limit that they met.",
                        [table, i] { return table->turned(static_cast<Turned>(i)); }, {{"reason", kTurnedNames[i]}});
  }
  for (size_t i = 0; i < kClosedNames.size(); ++i) {
    metrics_.AddCounter("connections_closed_total", "Connections that were closed from here, by the reason.",
                        [table, i] { return table->closed(static_cast<Closed>(i)); }, {{"reason", kClosedNames[i]}});
  }
}

Server::~Server() { Stop(); }

absl::Status Server::Listen() {
  if (!options_.metrics_listen.empty()) {
    std::vector<HttpDocument> documents = {
        {"/metrics", "text/plain; version=0.0.4; charset=utf-8", [this] { return metrics_.Text(); }},
        {"/", "text/html; charset=utf-8", StatusPage},
        {"/status.json", "application/json", [this] { return StatusJson(state_); }}};
    ASSIGN_OR_RETURN(http_, HttpServer::Start(options_.metrics_listen, std::move(documents), &watch_));
  }
  if (!options_.admin_listen.empty()) {
    RETURN_IF_ERROR(admin_port_.Listen(options_, options_.admin_listen, security_->CredentialsForPort()));
  }
  if (!options_.health_listen.empty()) {
    RETURN_IF_ERROR(health_port_.Listen(options_, options_.health_listen, grpc::InsecureServerCredentials()));
  }
  return public_port_.Listen(options_, options_.listen, security_->CredentialsForPort());
}

// The public port's last: who finds it finds the others.
absl::Status Server::WritePortFiles() const {
  RETURN_IF_ERROR(WritePortFile(options_.metrics_port_file, metrics_port()));
  if (admin_port() != 0) RETURN_IF_ERROR(WritePortFile(options_.admin_port_file, admin_port()));
  if (health_port() != 0) RETURN_IF_ERROR(WritePortFile(options_.health_port_file, health_port()));
  return WritePortFile(options_.port_file, port());
}

void Server::SetReady(Engine* engine, const Tokenizer* tokenizer) {
  engine_ = engine;
  state_.SetModel(engine, tokenizer);
  metrics_.SetEngine(engine, state_.engine_options().kv.block_tokens);
  if (options_.log_engine_every_s > 0.0) {
    engine_log_ = std::make_unique<EngineLog>(engine, std::chrono::duration<double>(options_.log_engine_every_s));
  }
  // What the model took stands; keys and values become resident when they are first used.
  const int64_t kv_bytes = KvBytes(engine->stats(), engine->model(), state_.engine_options().kv);
  watch_.BoundMemory(kv_bytes + ((options_.max_transport_mib + options_.max_unread_mib) << 20));
  lifecycle_.Advance(Phase::kServing);
}

bool Server::CheckPorts() {
  health_.SetReachable(public_port_.seconds_deaf() == 0.0);
  return std::max({public_port_.seconds_deaf(), admin_port_.seconds_deaf(), health_port_.seconds_deaf()}) < kMostDeafS;
}

void Server::SetWarming() { lifecycle_.Advance(Phase::kWarming); }

void Server::SetFailed() { lifecycle_.Advance(Phase::kFailed); }

bool Server::Drain() {
  const SteadyTime start = std::chrono::steady_clock::now();
  const SteadyTime deadline = start + Lasting(options_.drain_timeout_s);
  lifecycle_.Advance(Phase::kLeaving);
  // A pause that is part of the protocol: load balancers need time to see that we are not ready.
  std::this_thread::sleep_until(std::min(deadline, start + std::chrono::milliseconds(options_.drain_linger_ms)));
  lifecycle_.Advance(Phase::kDraining);
  if (engine_ != nullptr && !options_.drain_queue) engine_->Drain(/*refuse_waiting=*/true);
  bool complete = false;
  if (options_.drain_goaway_ms > 0) {
    const SteadyTime goaway = std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.drain_goaway_ms);
    complete = state_.live_requests().WaitIdle(std::min(deadline, goaway));
    if (!complete) SendGoaway(deadline);
  }
  complete = complete || state_.live_requests().WaitIdle(deadline);
  Stop();
  return complete;
}

// gRPC tells connections to go only as it shuts the server down, which also closes the port.
void Server::SendGoaway(SteadyTime deadline) {
  const auto left = deadline + kLastWords - std::chrono::steady_clock::now();
  const auto until =
      std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(left);
  goaway_ = std::async(std::launch::async, [this, until] { public_port_.Shutdown(until); });
}

void Server::Stop() {
  if (!public_port_.listens()) return;
  lifecycle_.Advance(Phase::kStopped);  // ends Watch calls
  admin_.Stop();
  calls_.EndReading(ServerStopped());
  state_.live_requests().StopAll(StoppedBeforeDone());
  if (goaway_.valid()) {
    if (goaway_.wait_for(kLastWords) != std::future_status::ready) public_port_.CancelCalls();
    goaway_.get();
  }
  for (GrpcPort* port : {&public_port_, &admin_port_, &health_port_}) {
    port->Stop(std::chrono::system_clock::now() + kLastWords);
  }
  ends_->Close(std::chrono::steady_clock::now() + kLastWords);
  if (trace_exporter_ != nullptr) trace_exporter_->Stop();
  engine_log_.reset();
}

}  // namespace dejavu
