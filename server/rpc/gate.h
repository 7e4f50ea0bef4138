// Gate: lets a call in or refuses it. Every call of every method of every service passes Admit before anything else of
// it is looked at, unknown methods too. The gate holds the call's token and the server's phase against what the method
// was registered with. Any thread.
#ifndef SERVER_RPC_GATE_H_
#define SERVER_RPC_GATE_H_

#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "grpcpp/server_context.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/needs.h"
#include "server/rpc/request_record.h"
#include "server/security/tokens.h"

namespace dejavu {

// Of what the client sent, as HTTP/2 counts it: 32 bytes more for each entry.
size_t MetadataBytes(const grpc::CallbackServerContext& context);

// UNAVAILABLE where a server in that phase does not have it.
absl::Status CheckPhase(Phase phase, Resource resource);

class Gate {
 public:
  // Null tokens: everybody may call. `admin_tenant`: whose tokens are an operator's.
  Gate(const Lifecycle* lifecycle, const Tokens* tokens, std::string admin_tenant, size_t max_metadata_bytes)
      : lifecycle_(lifecycle),
        tokens_(tokens),
        admin_tenant_(std::move(admin_tenant)),
        max_metadata_bytes_(max_metadata_bytes) {}

  // Before the server starts; by each dispatcher that serves the method, with the same needs.
  void Register(const std::string& service, const std::string& method, Needs needs);

  // `path` as on the wire: "/dejavu.v1.GenerationService/Generate". With tokens, the caller's tenant is written into
  // `record`.
  absl::Status Admit(absl::string_view path, const grpc::CallbackServerContext& context, RequestRecord* record) const;

 private:
  Needs NeedsOf(absl::string_view path) const;
  absl::Status CheckToken(Caller caller, const grpc::CallbackServerContext& context, RequestRecord* record) const;

  const Lifecycle* const lifecycle_;
  const Tokens* const tokens_;
  const std::string admin_tenant_;
  const size_t max_metadata_bytes_;
  // Constant once the server runs.
  absl::flat_hash_map<std::string, Needs> methods_;    // by path
  absl::flat_hash_map<std::string, Needs> strictest_;  // by service: the most that any of its methods needs
};

}  // namespace dejavu

#endif  // SERVER_RPC_GATE_H_
