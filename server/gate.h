// Gate: the one door. Every call of every method of every service passes Admit before anything else of it is looked at,
// unknown methods too. It decides by the server's phase; authentication belongs here as well. Any thread.
#ifndef SERVER_GATE_H_
#define SERVER_GATE_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "server/lifecycle.h"

namespace dejavu {

class Gate {
 public:
  explicit Gate(const Lifecycle* lifecycle) : lifecycle_(lifecycle) {}

  // `method` as on the wire: "/dejavu.v1.GenerationService/Generate".
  absl::Status Admit(absl::string_view method, const grpc::CallbackServerContext& context) const;

 private:
  const Lifecycle* const lifecycle_;
};

}  // namespace dejavu

#endif  // SERVER_GATE_H_
