#include "server/rpc/lifecycle.h"

#include "absl/strings/ascii.h"

namespace dejavu {

v1::ServerState StateOf(Phase phase) {
  switch (phase) {
    case Phase::kLoading:
      return v1::SERVER_STATE_LOADING;
    case Phase::kWarming:
      return v1::SERVER_STATE_WARMING;
    case Phase::kServing:
      return v1::SERVER_STATE_SERVING;
    case Phase::kLeaving:
    case Phase::kDraining:
    case Phase::kStopped:
      return v1::SERVER_STATE_DRAINING;
    case Phase::kFailed:
      return v1::SERVER_STATE_FAILED;
  }
  return v1::SERVER_STATE_UNSPECIFIED;
}

std::string Name(v1::ServerState state) {
  return absl::AsciiStrToLower(v1::ServerState_Name(state).substr(sizeof "SERVER_STATE_" - 1));
}

}  // namespace dejavu
