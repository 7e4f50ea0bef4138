// Sockets that listen. Any thread.
#ifndef SERVER_TRANSPORT_LISTEN_SOCKET_H_
#define SERVER_TRANSPORT_LISTEN_SOCKET_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace dejavu {

struct ListenSockets {
  std::vector<int> fds;  // the caller's to close
  int port = 0;          // the same for all of them
};

// host:port, every address of the host; port 0: a free one. A wildcard takes IPv4 and IPv6. UNAVAILABLE where the port
// is taken or the address is not this machine's.
absl::StatusOr<ListenSockets> OpenListenSockets(const std::string& address);

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_LISTEN_SOCKET_H_
