// Needs: what a call must bring, and what the server must have, before the call is let in. It is said where a method is
// registered (Dispatcher::Register) and asked for by the gate. Plain data.
#ifndef SERVER_RPC_NEEDS_H_
#define SERVER_RPC_NEEDS_H_

namespace dejavu {

// Whose token the call must carry, where the server has tokens. Each is stricter than the one before it.
enum class Caller {
  kAnybody,  // none: probes know no token
  kTenant,
  kOperator,  // of the tenant auth.admin_tenant
};

// Each is stricter than the one before it.
enum class Resource {
  kNone,      // answers in every phase: probes, reflection, what the server is
  kModel,     // needs a loaded model, goes on while the server drains
  kCapacity,  // new work for the engine
};

struct Needs {
  Caller caller = Caller::kTenant;
  Resource resource = Resource::kNone;
  bool operator==(const Needs&) const = default;
};

}  // namespace dejavu

#endif  // SERVER_RPC_NEEDS_H_
