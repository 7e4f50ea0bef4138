#include "server/transport/limits.h"

#include <sys/resource.h>

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int64_t kFilesPerConnection = 2;  // gRPC's and ours (Connection)
constexpr int64_t kOtherFiles = 64;         // logs, files that are loaded, libraries
constexpr int64_t kReserve = kOtherFiles + 3 * kReservedConnections * kFilesPerConnection;
constexpr int64_t kMostConnections = 4096;  // where the options name no number
constexpr int64_t kFewestConnections = 16;
constexpr int kMostConnectionsPerPeer = 256;

// The most files that this process may have open from now on.
int64_t RaiseFileLimit() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1024;
  if (limit.rlim_cur < limit.rlim_max) {
    const rlimit raised = {limit.rlim_max, limit.rlim_max};
    if (setrlimit(RLIMIT_NOFILE, &raised) == 0) limit = raised;
  }
  return static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, 1 << 30));
}

}  // namespace

absl::StatusOr<TransportLimits> MakeTransportLimits(const ServerOptions& options) {
  const int64_t files = RaiseFileLimit();
  // Where there are very few, operators and probes may have to wait: clients must be served at all.
  const int64_t room = std::max((files - kReserve) / kFilesPerConnection, kFewestConnections);
  if (options.max_connections > room) {
    return absl::InvalidArgumentError(absl::StrCat("transport.max_connections is ", options.max_connections,
                                                   "; the limit of ", files, " open files (ulimit -n) leaves room for ",
                                                   room));
  }
  TransportLimits limits;
  limits.connections =
      options.max_connections > 0 ? options.max_connections : static_cast<int>(std::min(room, kMostConnections));
  const auto share = [](int named, int all, int most) {
    return named > 0 ? std::min(named, all) : std::clamp(all / 2, 1, most);
  };
  limits.connections_per_peer = share(options.max_connections_per_peer, limits.connections, kMostConnectionsPerPeer);
  limits.new_connections_per_s = options.max_new_connections_per_s;
  limits.calls = options.max_calls;
  limits.calls_per_peer = share(options.max_calls_per_peer, limits.calls, limits.calls);
  limits.unread_bytes = options.max_unread_mib << 20;
  limits.unread_bytes_per_connection = std::min(options.max_unread_mib_per_connection, options.max_unread_mib) << 20;
  limits.message_bytes = options.max_message_bytes;
  ASSIGN_OR_RETURN(limits.gateways, ParseAddressRanges("transport.gateways", options.transport_gateways));
  spdlog::info("at most {} connections ({} of a peer) and {} calls ({} of a peer) at a time; {} files may be open",
               limits.connections, limits.connections_per_peer, limits.calls, limits.calls_per_peer, files);
  return limits;
}

}  // namespace dejavu
