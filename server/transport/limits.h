// How much of the process strangers may hold: connections, calls, unread replies. Made once from the options and from
// what the process may open.
#ifndef SERVER_TRANSPORT_LIMITS_H_
#define SERVER_TRANSPORT_LIMITS_H_

#include <cstdint>

#include <vector>

#include "absl/status/statusor.h"
#include "server/options.h"
#include "server/transport/socket_name.h"

namespace dejavu {

struct TransportLimits {
  int connections = 0;               // of all ports but those of operators and probes, which have some of their own
  int connections_per_peer = 0;      // a peer is an IPv4 address, or the first 64 bits of an IPv6 address
  double new_connections_per_s = 0;  // of a peer; 0: no limit
  int calls = 0;                     // that are open
  int calls_per_peer = 0;
  int64_t unread_bytes = 0;  // of replies that gRPC could not send yet
  int64_t unread_bytes_per_connection = 0;
  int64_t message_bytes = 0;           // of one request
  std::vector<AddressRange> gateways;  // peers that others stand behind: what is counted per peer is not for them
};

// Each of those ports has so many connections of its own, whatever the public one has taken.
inline constexpr int kReservedConnections = 64;

// Raises the soft limit of open files to the hard one. Two of them are needed for a connection, and some are kept back
// for files and the metrics. INVALID_ARGUMENT where the options ask for more connections than that allows.
absl::StatusOr<TransportLimits> MakeTransportLimits(const ServerOptions& options);

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_LIMITS_H_
