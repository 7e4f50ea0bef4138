// Names of the other ends of sockets. Any thread.
#ifndef SERVER_TRANSPORT_SOCKET_NAME_H_
#define SERVER_TRANSPORT_SOCKET_NAME_H_

#include <sys/socket.h>

#include <string>

#include "absl/strings/string_view.h"

namespace dejavu {

// As gRPC names a call's peer: "ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711".
std::string SocketName(const sockaddr_storage& address);

// Whose connections are counted together: the IPv4 address, or the first 64 bits of the IPv6 address, which is what one
// customer of a provider has at least.
std::string PeerName(const sockaddr_storage& address);

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_SOCKET_NAME_H_
