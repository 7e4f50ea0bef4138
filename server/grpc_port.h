// GrpcPort: a port of the daemon, with the methods that are served there. One thread at a time, but CancelCalls beside
// Shutdown.
#ifndef SERVER_GRPC_PORT_H_
#define SERVER_GRPC_PORT_H_

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "server/options.h"
#include "server/rpc/dispatcher.h"
#include "server/transport/acceptor.h"

namespace dejavu {

class GrpcPort {
 public:
  // `name`: kPublicPort or its like. All must outlive the object.
  GrpcPort(std::string name, Gate* gate, ConnectionWatch* watch, const RpcWorkers& workers,
           std::shared_ptr<CallEnds> ends)
      : name_(std::move(name)), watch_(watch), dispatcher_(gate, watch->table(), workers, std::move(ends)) {}

  // Where methods are registered, before Listen.
  Dispatcher* dispatcher() { return &dispatcher_; }

  // UNAVAILABLE where the address cannot be had.
  absl::Status Listen(const ServerOptions& options, const std::string& address,
                      const std::shared_ptr<grpc::ServerCredentials>& credentials);
  bool listens() const { return server_ != nullptr; }
  int port() const { return port_; }  // 0: it never listened
  // For how long nobody could connect. Any thread, between Listen and Stop.
  double seconds_deaf() const { return acceptor_ == nullptr ? 0.0 : acceptor_->seconds_deaf(); }

  // Takes no connections and calls any more, tells those that are there to go, and waits for the calls that run; ends
  // them at `deadline`.
  void Shutdown(std::chrono::system_clock::time_point deadline);
  void CancelCalls();  // now
  // As Shutdown; then no call is left. Nothing where it does not listen.
  void Stop(std::chrono::system_clock::time_point deadline);

 private:
  const std::string name_;
  ConnectionWatch* const watch_;
  Dispatcher dispatcher_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> to_grpc_;
  std::unique_ptr<Acceptor> acceptor_;
  std::unique_ptr<grpc::Server> server_;  // null before Listen and after Stop
  int port_ = 0;
};

// host:port with a port of 0 to 65535, or INVALID_ARGUMENT that names the option.
absl::Status CheckListen(const char* option, const std::string& address);

// Where gRPC's own lines go: to our log. For the whole process.
void RouteGrpcLog();

}  // namespace dejavu

#endif  // SERVER_GRPC_PORT_H_
