// Server: the daemon's face. It listens from Start on, answers health, reflection and GetServerInfo at once, and
// everything else once SetReady has given it a model. Start, SetReady, Drain and Stop are called by one thread at a
// time.
#ifndef SERVER_SERVER_H_
#define SERVER_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/options.h"
#include "engine/text/tokenizer.h"
#include "grpcpp/server.h"
#include "server/dispatcher.h"
#include "server/gate.h"
#include "server/generation_service.h"
#include "server/health.h"
#include "server/lifecycle.h"
#include "server/options.h"
#include "server/writer.h"

namespace dejavu {

class Server {
 public:
  // Binds the address and writes the port file. UNAVAILABLE when the port is taken, INVALID_ARGUMENT for a bad address.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       const EngineOptions& engine_options);
  // As Stop.
  ~Server();

  int port() const { return port_; }
  const std::string& model_name() const { return model_name_; }

  // Begins to serve. `tokenizer` may be null; it and the engine must outlive the server.
  void SetReady(Engine* engine, const Tokenizer* tokenizer);

  // The engine has broken: not serving, not live, every request is refused.
  void SetFailed();
  void SetWarming();  // any thread

  // Says that it is not ready, lingers, refuses what is new, waits for what runs, up to the limits in ServerOptions,
  // and ends the rest with UNAVAILABLE. Then as Stop. True: every request was answered in full.
  bool Drain();

  // Ends everything now: open calls get UNAVAILABLE.
  void Stop();

  // No generation or score call is under way.
  bool idle() { return generation_.live_requests().idle(); }

 private:
  Server(const ServerOptions& options, const EngineOptions& engine_options, std::string model_name);

  absl::Status Listen();
  absl::Status WritePortFile() const;

  const ServerOptions options_;
  const std::string model_name_;
  Lifecycle lifecycle_;
  Gate gate_;
  Writer writer_;
  Dispatcher dispatcher_;
  GenerationService generation_;
  Health health_;
  int port_ = 0;
  Engine* engine_ = nullptr;
  std::unique_ptr<grpc::Server> grpc_server_;  // null once stopped; after its Shutdown no call is left
};

// The name of the model in requests and replies: what the options say, or the last part of the model's directory.
std::string ServedModelName(const ServerOptions& options, const std::string& model_directory);

}  // namespace dejavu

#endif  // SERVER_SERVER_H_
