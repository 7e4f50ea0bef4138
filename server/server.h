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
#include "grpcpp/server.h"
#include "server/api/admin_service.h"
#include "server/api/generation_service.h"
#include "server/api/health.h"
#include "server/observe/access_log.h"
#include "server/observe/engine_log.h"
#include "server/observe/http_server.h"
#include "server/observe/metrics.h"
#include "server/observe/trace_exporter.h"
#include "server/options.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/dispatcher.h"
#include "server/rpc/gate.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/writer.h"
#include "server/security/security.h"

namespace dejavu {

class Server {
 public:
  // Binds the addresses and writes the port files. UNAVAILABLE when a port is taken, INVALID_ARGUMENT for a bad
  // address. `drain` is called when an operator asks to drain: it tells whoever owns the server, and returns at once.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       const EngineOptions& engine_options,
                                                       std::function<void()> drain = nullptr);
  // As Stop.
  ~Server();

  int port() const { return port_; }
  int admin_port() const { return admin_port_; }    // 0: there is none
  int health_port() const { return health_port_; }  // likewise
  int metrics_port() const { return http_ == nullptr ? 0 : http_->port(); }
  const std::string& model_name() const { return model_name_; }
  const TraceExporter* trace_exporter() const { return trace_exporter_.get(); }  // null: off

  // Begins to serve. `tokenizer` may be null; it and the engine must outlive the server.
  void SetReady(Engine* engine, const Tokenizer* tokenizer);

  // The engine has broken: not serving, not live, every request is refused.
  void SetFailed();
  void SetWarming();  // any thread

  // Says that it is not ready, lingers, refuses what is new, tells connections to go, waits for what runs, up to the
  // limits in ServerOptions, and ends the rest with UNAVAILABLE. Then as Stop. True: every request was answered in
  // full.
  bool Drain();

  // Ends everything now: open calls get UNAVAILABLE.
  void Stop();

  // No generation or score call is under way.
  bool idle() { return generation_.live_requests().idle(); }

 private:
  Server(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name,
         std::unique_ptr<Security> security, std::function<void()> drain);

  absl::Status Listen();
  void SendGoaway(SteadyTime deadline);

  const ServerOptions options_;
  const std::string model_name_;
  const std::unique_ptr<Security> security_;
  Lifecycle lifecycle_;
  Gate gate_;
  AccessLog access_log_;
  std::unique_ptr<TraceExporter> trace_exporter_;  // null: off
  Writer writer_;
  const std::shared_ptr<CallEnds> ends_;  // calls hold it too
  Dispatcher dispatcher_, admin_dispatcher_, health_dispatcher_;
  GenerationService generation_;
  Health health_;
  AdminService admin_;
  Metrics metrics_;
  int port_ = 0, admin_port_ = 0, health_port_ = 0;
  Engine* engine_ = nullptr;
  std::unique_ptr<EngineLog> engine_log_;       // while it serves
  std::unique_ptr<HttpServer> http_;            // nullptr: off, or stopped
  std::unique_ptr<grpc::Server> grpc_server_;   // null once stopped; after its Shutdown no call is left
  std::unique_ptr<grpc::Server> admin_server_;  // likewise; null where it is off, too
  std::unique_ptr<grpc::Server> health_server_;
  std::future<void> goaway_;  // grpc_server_'s Shutdown, while what runs goes on
};

// The name of the model in requests and replies: what the options say, or the last part of the model's directory.
std::string ServedModelName(const ServerOptions& options, const std::string& model_directory);

}  // namespace dejavu

#endif  // SERVER_SERVER_H_
