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
#include "grpc/support/log.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/error_details.h"
#include "server/parse.h"
#include "server/reflection.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kKeepaliveTimeMs = 60'000;     // an idle connection is pinged that often
constexpr int kKeepaliveTimeoutMs = 20'000;  // and dropped when no answer comes
constexpr int kMinClientPingIntervalMs = 10'000;
// How long calls may take to send their last words after they were told to end.
constexpr std::chrono::milliseconds kLastWords(500);

// gRPC writes to stderr by itself, even what any client can provoke: its lines go to our log, where they are usually
// off.
void OnGrpcLog(gpr_log_func_args* args) {
  spdlog::log(args->severity == GPR_LOG_SEVERITY_DEBUG ? spdlog::level::trace : spdlog::level::debug, "grpc: {}",
              args->message);
}

absl::Status CheckListen(const std::string& listen) {
  const size_t colon = listen.rfind(':');
  int port = -1;
  if (colon == std::string::npos || colon == 0 || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port < 0 ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("listen is ", Printable(listen, 256), "; it must be host:port with a port of 0 to 65535"));
  }
  return absl::OkStatus();
}

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
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinClientPingIntervalMs);
  grpc::ResourceQuota quota("dejavud");
  quota.Resize(static_cast<size_t>(options.max_transport_mib) << 20);
  builder->SetResourceQuota(quota);
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

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      const EngineOptions& engine_options) {
  RETURN_IF_ERROR(CheckListen(options.listen));
  gpr_set_log_function(OnGrpcLog);
  RouteProtobufLog();
  std::unique_ptr<Server> server(new Server(options, engine_options, ServedModelName(options, engine_options.model)));
  RETURN_IF_ERROR(server->Listen());
  RETURN_IF_ERROR(server->WritePortFile());
  return server;
}

Server::Server(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name)
    : options_(options),
      model_name_(std::move(model_name)),
      gate_(&lifecycle_),
      dispatcher_(&gate_, &writer_),
      generation_(options, engine_options, model_name_, &lifecycle_),
      health_(&lifecycle_) {
  generation_.Register(&dispatcher_);
  health_.Register(&dispatcher_);
  if (options_.reflection) RegisterReflection(&dispatcher_);
}

Server::~Server() { Stop(); }

absl::Status Server::Listen() {
  grpc::ServerBuilder builder;
  Configure(options_, &builder);
  builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port_);
  builder.RegisterCallbackGenericService(&dispatcher_);
  grpc_server_ = builder.BuildAndStart();
  if (grpc_server_ == nullptr || port_ == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options_.listen,
                                               ": the port is in use, or the address is not this machine's"));
  }
  return absl::OkStatus();
}

// Whoever sees the file sees the whole number: it is written aside and renamed.
absl::Status Server::WritePortFile() const {
  if (options_.port_file.empty()) return absl::OkStatus();
  const std::string aside = options_.port_file + ".new";
  std::ofstream file(aside);
  file << port_ << "\n";
  file.close();
  if (!file || std::rename(aside.c_str(), options_.port_file.c_str()) != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot write port file ", options_.port_file, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

void Server::SetReady(Engine* engine, const Tokenizer* tokenizer) {
  engine_ = engine;
  generation_.SetModel(engine, tokenizer);
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
  const bool complete = generation_.live_requests().WaitIdle(deadline);
  Stop();
  return complete;
}

void Server::Stop() {
  if (grpc_server_ == nullptr) return;
  lifecycle_.Advance(Phase::kStopped);  // ends Watch calls
  generation_.live_requests().StopAll(
      UnavailableRetry("the server stopped before the request was done", std::chrono::seconds(1)));
  grpc_server_->Shutdown(std::chrono::system_clock::now() + kLastWords);
  grpc_server_->Wait();
  grpc_server_.reset();
}

}  // namespace dejavu
