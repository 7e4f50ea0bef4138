// Dispatcher: the one gRPC service of a port. It takes every call, whatever its name, asks the gate, and hands it to
// the handler that is registered for the method. Registration is for one thread, before the server starts; calls come
// from gRPC's threads.
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

  // All must outlive the calls.
  Dispatcher(Gate* gate, ConnectionTable* connections, const RpcWorkers& workers, std::shared_ptr<CallEnds> ends)
      : gate_(gate), connections_(connections), workers_(workers), ends_(std::move(ends)) {}

  // Before the server starts. `service` is the full name, "dejavu.v1.GenerationService".
  void Register(const std::string& service, const std::string& method, Needs needs, HandlerFactory factory);

  // A method with one request and one reply, answered at once.
  template <typename Request, typename Response>
  void RegisterUnary(const std::string& service, const std::string& method, Needs needs,
                     typename UnaryHandler<Request, Response>::Function function) {
    Register(service, method, needs,
             [function] { return std::make_unique<UnaryHandler<Request, Response>>(function); });
  }
  // The same by a function that gets `object`, which must outlive the server's calls.
  template <typename Object, typename Taken, typename Request, typename Response>
  void RegisterUnary(const std::string& service, const std::string& method, Needs needs, Object* object,
                     absl::Status (*function)(Taken&, const Request&, Response*)) {
    RegisterUnary<Request, Response>(service, method, needs,
                                     [object, function](const Rpc&, const Request& request, Response* response) {
                                       return function(*object, request, response);
                                     });
  }
  // The same by one that asks whose the call is.
  template <typename Object, typename Taken, typename Request, typename Response>
  void RegisterUnary(const std::string& service, const std::string& method, Needs needs, Object* object,
                     absl::Status (*function)(Taken&, const std::string& tenant, const Request&, Response*)) {
    RegisterUnary<Request, Response>(service, method, needs,
                                     [object, function](const Rpc& rpc, const Request& request, Response* response) {
                                       return function(*object, rpc.tenant(), request, response);
                                     });
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

  Gate* const gate_;
  ConnectionTable* const connections_;
  const RpcWorkers workers_;
  const std::shared_ptr<CallEnds> ends_;
  absl::flat_hash_map<std::string, Method> methods_;  // by path; constant once the server runs
  std::vector<std::string> services_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_DISPATCHER_H_
