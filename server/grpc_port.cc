#include "server/grpc_port.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "grpc/grpc.h"
#include "grpc/support/log.h"
#include "grpcpp/resource_quota.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int kKeepaliveTimeMs = 60'000;     // an idle connection is pinged that often
constexpr int kKeepaliveTimeoutMs = 20'000;  // and dropped when no answer comes
constexpr int kMinClientPingIntervalMs = 10'000;
constexpr int kHandshakeTimeoutMs = 10'000;  // for TLS and the first settings

// gRPC writes to stderr by itself, even what any client can provoke: its lines go to our log, where they are usually
// off.
void OnGrpcLog(gpr_log_func_args* args) {
  spdlog::log(args->severity == GPR_LOG_SEVERITY_DEBUG ? spdlog::level::trace : spdlog::level::debug, "grpc: {}",
              args->message);
}

int WholeMilliseconds(double seconds) { return std::max(1, static_cast<int>(seconds * 1000)); }

void Configure(const ServerOptions& options, grpc::ServerBuilder* builder) {
  // gRPC looks at a message's size when it has all of it, and tells us of one that is too large as of a client that has
  // gone. It looks at what is decompressed when that is done. Rpc does both.
  builder->SetMaxReceiveMessageSize(-1);
  builder->AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  builder->SetMaxSendMessageSize(-1);  // replies are bounded before they are made
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kTransportMetadataBytes);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  if (options.connection_max_idle_s > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, WholeMilliseconds(options.connection_max_idle_s));
  }
  if (options.connection_max_age_s > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, WholeMilliseconds(options.connection_max_age_s));
  }
  if (options.connection_max_age_grace_s > 0) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                                WholeMilliseconds(options.connection_max_age_grace_s));
  }
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinClientPingIntervalMs);
  grpc::ResourceQuota quota("dejavud");
  quota.Resize(static_cast<size_t>(options.max_transport_mib) << 20);
  builder->SetResourceQuota(quota);
}

}  // namespace

absl::Status GrpcPort::Listen(const ServerOptions& options, const std::string& address,
                              const std::shared_ptr<grpc::ServerCredentials>& credentials) {
  grpc::ServerBuilder builder;
  Configure(options, &builder);
  using Kind = grpc::ServerBuilder::experimental_type::ExternalConnectionType;
  to_grpc_ = builder.experimental().AddExternalConnectionAcceptor(Kind::FROM_FD, credentials);
  builder.RegisterCallbackGenericService(&dispatcher_);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr) return absl::UnavailableError(absl::StrCat("cannot serve gRPC on ", address));
  ASSIGN_OR_RETURN(acceptor_, Acceptor::Start(address, name_, watch_, [to_grpc = to_grpc_.get()](int fd) {
                     grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
                     connection.fd = fd;
                     to_grpc->HandleNewConnection(&connection);
                   }));
  port_ = acceptor_->port();
  return absl::OkStatus();
}

void GrpcPort::Shutdown(std::chrono::system_clock::time_point deadline) {
  if (acceptor_ != nullptr) acceptor_->Stop();
  server_->Shutdown(deadline);
}

void GrpcPort::CancelCalls() { grpc_server_cancel_all_calls(server_->c_server()); }

void GrpcPort::Stop(std::chrono::system_clock::time_point deadline) {
  if (server_ == nullptr) return;
  Shutdown(deadline);
  server_->Wait();
  server_.reset();
}

absl::Status CheckListen(const char* option, const std::string& address) {
  if (IsHostAndPort(address)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is ", Printable(address, 256), "; it must be host:port with a port of 0 to 65535"));
}

void RouteGrpcLog() { gpr_set_log_function(OnGrpcLog); }

}  // namespace dejavu
