#include "server/server.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "grpc/grpc.h"
#include "grpc/support/log.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/api/reflection.h"
#include "server/observe/logging.h"
#include "server/observe/status_page.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kKeepaliveTimeMs = 60'000;     // an idle connection is pinged that often
constexpr int kKeepaliveTimeoutMs = 20'000;  // and dropped when no answer comes
constexpr int kMinClientPingIntervalMs = 10'000;
// How long calls may take to send their last words after they were told to end.
constexpr std::chrono::milliseconds kLastWords(500);

std::unique_ptr<TraceExporter> MakeTraceExporter(const ServerOptions& options, const std::string& model_name) {
  if (options.trace_otlp_endpoint.empty()) return nullptr;
  TraceExporterOptions exporter;
  exporter.endpoint = options.trace_otlp_endpoint;
  exporter.model = model_name;
  exporter.version = DEJAVU_VERSION;
  exporter.max_queue = options.trace_max_queue;
  return std::make_unique<TraceExporter>(std::move(exporter));
}

// gRPC writes to stderr by itself, even what any client can provoke: its lines go to our log, where they are usually
// off.
void OnGrpcLog(gpr_log_func_args* args) {
  spdlog::log(args->severity == GPR_LOG_SEVERITY_DEBUG ? spdlog::level::trace : spdlog::level::debug, "grpc: {}",
              args->message);
}

absl::Status CheckListen(const char* name, const std::string& listen) {
  const size_t colon = listen.rfind(':');
  int port = -1;
  if (colon == std::string::npos || colon == 0 || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port < 0 ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", Printable(listen, 256), "; it must be host:port with a port of 0 to 65535"));
  }
  return absl::OkStatus();
}

int Milliseconds(double seconds) { return std::max(1, static_cast<int>(seconds * 1000)); }

void Configure(const ServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  builder->SetMaxSendMessageSize(-1);  // replies are bounded before they are made
  // A few megabytes of gzip may unfold to gigabytes before gRPC looks at their size.
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // else two daemons would share a port unnoticed
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  if (options.connection_max_age_s > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, Milliseconds(options.connection_max_age_s));
  }
  if (options.connection_max_age_grace_s > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, Milliseconds(options.connection_max_age_grace_s));
  }
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinClientPingIntervalMs);
  grpc::ResourceQuota quota("dejavud");
  quota.Resize(static_cast<size_t>(options.max_transport_mib) << 20);
  builder->SetResourceQuota(quota);
}

// What `dispatcher` knows, at that address.
absl::StatusOr<std::unique_ptr<grpc::Server>> Serve(const ServerOptions& options, const std::string& address,
                                                    const std::shared_ptr<grpc::ServerCredentials>& credentials,
                                                    Dispatcher* dispatcher, int* port) {
  grpc::ServerBuilder builder;
  Configure(options, &builder);
  builder.AddListeningPort(address, credentials, port);
  builder.RegisterCallbackGenericService(dispatcher);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server != nullptr && *port != 0) return server;
  return absl::UnavailableError(
      absl::StrCat("cannot listen on ", address, ": the port is in use, or the address is not this machine's"));
}

// Whoever sees the file sees the whole number: it is written aside and renamed.
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
  RETURN_IF_ERROR(CheckListen("listen", options.listen));
  if (!options.admin_listen.empty()) RETURN_IF_ERROR(CheckListen("admin.listen", options.admin_listen));
  if (!options.health_listen.empty()) RETURN_IF_ERROR(CheckListen("health.listen", options.health_listen));
  gpr_set_log_function(OnGrpcLog);
  RouteProtobufLog();
  ASSIGN_OR_RETURN(std::unique_ptr<Security> security, Security::Load(options));
  std::unique_ptr<Server> server(new Server(options, engine_options, ServedModelName(options, engine_options.model),
                                            std::move(security), std::move(drain)));
  RETURN_IF_ERROR(server->Listen());
  RETURN_IF_ERROR(WritePortFile(options.metrics_port_file, server->metrics_port()));
  if (server->admin_port() != 0) RETURN_IF_ERROR(WritePortFile(options.admin_port_file, server->admin_port()));
  if (server->health_port() != 0) RETURN_IF_ERROR(WritePortFile(options.health_port_file, server->health_port()));
  RETURN_IF_ERROR(WritePortFile(options.port_file, server->port()));
  return server;
}

Server::Server(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name,
               std::unique_ptr<Security> security, std::function<void()> drain)
    : options_(options),
      model_name_(std::move(model_name)),
      security_(std::move(security)),
      gate_(&lifecycle_, security_->tokens(), options.auth_admin_tenant),
      trace_exporter_(MakeTraceExporter(options, model_name_)),
      ends_(std::make_shared<CallEnds>(&writer_, trace_exporter_ == nullptr ? 0.0 : options.trace_sample_ratio)),
      dispatcher_(&gate_, &writer_, ends_),
      admin_dispatcher_(&gate_, &writer_, ends_),
      health_dispatcher_(&gate_, &writer_, ends_),
      generation_(options, engine_options, model_name_, &lifecycle_),
      health_(&lifecycle_),
      admin_(&generation_, &lifecycle_, std::move(drain)),
      metrics_(model_name_, engine_options.metrics.edges, options.metrics_per_layer, &lifecycle_) {
  ends_->Add(&metrics_);
  metrics_.AddCounter("log_lines_dropped_total", "Lines of the log that nobody took in time.", LogLinesDropped);
  const TraceExporter* const traces = trace_exporter_.get();
  metrics_.AddCounter("trace_spans_exported_total", "Spans that the collector took.",
                      [traces] { return traces == nullptr ? 0 : traces->exported(); });
  metrics_.AddCounter("trace_spans_dropped_total", "Spans that it did not: the queue was full, or no answer came.",
                      [traces] { return traces == nullptr ? 0 : traces->dropped(); });
  const Security* const credentials = security_.get();
  metrics_.AddCounter("credential_reloads_total", "Changed certificates and token files that hold now.",
                      [credentials] { return credentials->reloads(); });
  metrics_.AddCounter("credential_reload_failures_total", "Looks at those files that found what cannot be used.",
                      [credentials] { return credentials->reload_failures(); });
  if (credentials->certificates() != nullptr) {
    metrics_.AddGauge("tls_certificate_expiry_timestamp_seconds", "End of the server certificate's life.",
                      [credentials] { return credentials->certificates()->expiry_unix_s(); });
  }
  if (options_.log_access) ends_->Add(&access_log_);
  if (trace_exporter_ != nullptr) ends_->Add(trace_exporter_.get());
  generation_.Register(&dispatcher_);
  health_.Register(&dispatcher_);
  health_.Register(&health_dispatcher_);
  admin_.Register(&admin_dispatcher_);
  if (!options_.reflection) return;
  RegisterReflection(&dispatcher_);
  RegisterReflection(&admin_dispatcher_);
}

Server::~Server() { Stop(); }

absl::Status Server::Listen() {
  if (!options_.metrics_listen.empty()) {
    ASSIGN_OR_RETURN(http_, HttpServer::Start(options_.metrics_listen));
    http_->Handle("/metrics", "text/plain; version=0.0.4; charset=utf-8", [this] { return metrics_.Text(); });
    http_->Handle("/", "text/html; charset=utf-8", StatusPage);
    http_->Handle("/status.json", "application/json", [this] { return StatusJson(generation_); });
  }
  if (!options_.admin_listen.empty()) {
    ASSIGN_OR_RETURN(admin_server_, Serve(options_, options_.admin_listen, security_->CredentialsForPort(),
                                          &admin_dispatcher_, &admin_port_));
  }
  if (!options_.health_listen.empty()) {
    ASSIGN_OR_RETURN(health_server_, Serve(options_, options_.health_listen, grpc::InsecureServerCredentials(),
                                           &health_dispatcher_, &health_port_));
  }
  ASSIGN_OR_RETURN(grpc_server_,
                   Serve(options_, options_.listen, security_->CredentialsForPort(), &dispatcher_, &port_));
  return absl::OkStatus();
}

void Server::SetReady(Engine* engine, const Tokenizer* tokenizer) {
  engine_ = engine;
  generation_.SetModel(engine, tokenizer);
  metrics_.SetEngine(engine);
  if (options_.log_engine_every_s > 0.0) {
    engine_log_ = std::make_unique<EngineLog>(engine, std::chrono::duration<double>(options_.log_engine_every_s));
  }
  lifecycle_.Advance(Phase::kServing);
}

void Server::SetWarming() { lifecycle_.Advance(Phase::kWarming); }

void Server::SetFailed() { lifecycle_.Advance(Phase::kFailed); }

bool Server::Drain() {
  const SteadyTime start = std::chrono::steady_clock::now();
  const SteadyTime deadline = start + std::chrono::milliseconds(static_cast<int64_t>(options_.drain_timeout_s * 1000));
  lifecycle_.Advance(Phase::kLeaving);
  // A pause that is part of the protocol: load balancers need time to see that we are not ready.
  std::this_thread::sleep_until(std::min(deadline, start + std::chrono::milliseconds(options_.drain_linger_ms)));
  lifecycle_.Advance(Phase::kDraining);
  if (engine_ != nullptr && !options_.drain_queue) engine_->Drain(/*refuse_waiting=*/true);
  bool complete = false;
  if (options_.drain_goaway_ms > 0) {
    const SteadyTime goaway = std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.drain_goaway_ms);
    complete = generation_.live_requests().WaitIdle(std::min(deadline, goaway));
    if (!complete) SendGoaway(deadline);
  }
  complete = complete || generation_.live_requests().WaitIdle(deadline);
  Stop();
  return complete;
}

// gRPC tells connections to go only as it shuts the server down, which also closes the port.
void Server::SendGoaway(SteadyTime deadline) {
  const auto left = deadline + kLastWords - std::chrono::steady_clock::now();
  const auto until =
      std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(left);
  goaway_ = std::async(std::launch::async, [this, until] { grpc_server_->Shutdown(until); });
}

void Server::Stop() {
  if (grpc_server_ == nullptr) return;
  lifecycle_.Advance(Phase::kStopped);  // ends Watch calls
  admin_.Stop();
  generation_.live_requests().StopAll(
      UnavailableRetry("the server stopped before the request was done", std::chrono::seconds(1)));
  if (goaway_.valid()) {
    if (goaway_.wait_for(kLastWords) != std::future_status::ready) {
      grpc_server_cancel_all_calls(grpc_server_->c_server());
    }
    goaway_.get();
  }
  for (std::unique_ptr<grpc::Server>* server : {&grpc_server_, &admin_server_, &health_server_}) {
    if (*server == nullptr) continue;
    (*server)->Shutdown(std::chrono::system_clock::now() + kLastWords);
    (*server)->Wait();
    server->reset();
  }
  ends_->Close(std::chrono::steady_clock::now() + kLastWords);
  if (trace_exporter_ != nullptr) trace_exporter_->Stop();
  engine_log_.reset();
}

}  // namespace dejavu
