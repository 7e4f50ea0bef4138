// Server: the daemon's face. It listens from Start on, answers health, reflection and GetServerInfo at once, and
// everything else once SetReady has given it a model. Start, SetReady, Drain and Stop are called by one thread at a
// time.
#ifndef SERVER_SERVER_H_
#define SERVER_SERVER_H_

#include <functional>
#include <future>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/options.h"
#include "engine/text/tokenizer.h"
#include "server/api/admin_service.h"
#include "server/api/health.h"
#include "server/api/serving_state.h"
#include "server/grpc_port.h"
#include "server/observe/access_log.h"
#include "server/observe/engine_log.h"
#include "server/observe/http_server.h"
#include "server/observe/metrics.h"
#include "server/observe/trace_exporter.h"
#include "server/options.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/gate.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/open_calls.h"
#include "server/rpc/writer.h"
#include "server/security/security.h"
#include "server/transport/connection_watch.h"

namespace dejavu {

class Server {
 public:
  // Binds the addresses and writes the port files. UNAVAILABLE when a port is taken, INVALID_ARGUMENT for a bad
  // address. `drain` is called when an operator asks to drain: it tells the owner of the server, and returns at once.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       const EngineOptions& engine_options,
                                                       std::function<void()> drain = nullptr);
  // As Stop.
  ~Server();

  int port() const { return public_port_.port(); }
  int admin_port() const { return admin_port_.port(); }    // 0: there is none
  int health_port() const { return health_port_.port(); }  // likewise
  int metrics_port() const { return http_ == nullptr ? 0 : http_->port(); }
  const std::string& model_name() const { return state_.model_name(); }
  const TraceExporter* trace_exporter() const { return trace_exporter_.get(); }  // null: off

  // Begins to serve. `tokenizer` may be null; it and the engine must outlive the server.
  void SetReady(Engine* engine, const Tokenizer* tokenizer);

  // The engine has broken: not serving, not live, every request is refused.
  void SetFailed();
  void SetWarming();  // any thread

  // Has certificates and tokens read again now. Any thread; returns at once.
  void ReloadCredentials() { security_->LookNow(); }

  // Says that it is not ready, lingers, refuses what is new, tells connections to go, waits for what runs, up to the
  // limits in ServerOptions, and ends the rest with UNAVAILABLE. Then as Stop. True: every request was answered in
  // full.
  bool Drain();

  // Ends everything now: open calls get UNAVAILABLE.
  void Stop();

  // Looks whether the ports can be connected to, for health, which says so; to be called often. False: one of them
  // could not for long, though all was tried, and the owner should end the process.
  bool CheckPorts();

  // No generation or score call is under way.
  bool idle() { return state_.live_requests().idle(); }

 private:
  Server(const ServerOptions& options, const EngineOptions& engine_options, std::unique_ptr<Security> security,
         const TransportLimits& limits, std::function<void()> drain);

  RpcWorkers workers() { return {&writer_, &pool_, &calls_}; }
  void RegisterMethods();
  void AddObservers();
  void AddTransportMetrics();
  absl::Status Listen();
  absl::Status WritePortFiles() const;
  void SendGoaway(SteadyTime deadline);

  const ServerOptions options_;
  const std::unique_ptr<Security> security_;
  Lifecycle lifecycle_;
  Gate gate_;
  ServingState state_;
  Engine* engine_ = nullptr;  // null while loading

  // What is told of calls' ends, and what the daemon says of itself.
  AccessLog access_log_;
  const std::unique_ptr<TraceExporter> trace_exporter_;  // null: off
  Metrics metrics_;
  std::unique_ptr<EngineLog> engine_log_;  // while it serves
  Writer writer_;
  const std::shared_ptr<CallEnds> ends_;  // calls hold it too

  // Connections and what is open on them.
  ConnectionTable connections_;
  WorkPool pool_;
  OpenCalls calls_;
  ConnectionWatch watch_;
  std::unique_ptr<HttpServer> http_;  // null: off

  // Services, and then the ports where they are served: without a port no call is left.
  Health health_;
  AdminService admin_;
  GrpcPort public_port_, admin_port_, health_port_;
  std::future<void> goaway_;  // the public port's Shutdown, while what runs goes on
};

// The name of the model in requests and replies: what the options say, or the last part of the model's directory.
std::string ServedModelName(const ServerOptions& options, const std::string& model_directory);

}  // namespace dejavu

#endif  // SERVER_SERVER_H_
