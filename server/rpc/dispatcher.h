// Dispatcher: the one gRPC service. It takes every call, whatever its name, asks the gate, and hands it to the handler
// that is registered for the method.
#ifndef SERVER_RPC_DISPATCHER_H_
#define SERVER_RPC_DISPATCHER_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "grpcpp/generic/async_generic_service.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/gate.h"
#include "server/rpc/rpc.h"
#include "server/rpc/writer.h"

namespace dejavu {

class Dispatcher final : public grpc::CallbackGenericService {
 public:
  using HandlerFactory = std::function<std::unique_ptr<RpcHandler>()>;

  Dispatcher(const Gate* gate, Writer* writer, std::shared_ptr<CallEnds> ends)
      : gate_(gate), writer_(writer), ends_(std::move(ends)) {}

  // Before the server starts. `service` is the full name, "dejavu.v1.GenerationService".
  void Register(const std::string& service, const std::string& method, HandlerFactory factory);

  template <typename Request, typename Response>
  void RegisterUnary(const std::string& service, const std::string& method,
                     typename UnaryHandler<Request, Response>::Function function) {
    Register(service, method, [function] { return std::make_unique<UnaryHandler<Request, Response>>(function); });
  }

  // Full names, in the order of registration.
  const std::vector<std::string>& services() const { return services_; }

  // Called by gRPC, from its threads.
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override;

 private:
  struct Method {
    std::string service, name;
    HandlerFactory factory;
  };

  const Gate* const gate_;
  Writer* const writer_;
  const std::shared_ptr<CallEnds> ends_;
  absl::flat_hash_map<std::string, Method> methods_;  // by path; constant once the server runs
  std::vector<std::string> services_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_DISPATCHER_H_
