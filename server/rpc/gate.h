// Gate: the one door. Every call of every method of every service passes Admit before anything else of it is looked at,
// unknown methods too. It decides by the server's phase; authentication belongs here as well. Any thread.
#ifndef SERVER_RPC_GATE_H_
#define SERVER_RPC_GATE_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/request_record.h"
#include "server/security/tokens.h"

namespace dejavu {

class Gate {
 public:
  // Null tokens: everybody may call. `admin_tenant`: whose tokens AdminService takes.
  Gate(const Lifecycle* lifecycle, const Tokens* tokens, std::string admin_tenant)
      : lifecycle_(lifecycle), tokens_(tokens), admin_tenant_(std::move(admin_tenant)) {}

  // `method` as on the wire: "/dejavu.v1.GenerationService/Generate". With tokens, the caller's tenant is written into
  // `record`.
  absl::Status Admit(absl::string_view method, const grpc::CallbackServerContext& context, RequestRecord* record) const;

 private:
  absl::Status CheckToken(absl::string_view method, const grpc::CallbackServerContext& context,
                          RequestRecord* record) const;
  absl::Status CheckPhase(absl::string_view method) const;

  const Lifecycle* const lifecycle_;
  const Tokens* const tokens_;
  const std::string admin_tenant_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_GATE_H_
