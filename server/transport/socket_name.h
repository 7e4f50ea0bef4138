// Names of the other ends of sockets. Any thread.
#ifndef SERVER_TRANSPORT_SOCKET_NAME_H_
#define SERVER_TRANSPORT_SOCKET_NAME_H_

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

// As gRPC names a call's peer: "ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711".
std::string SocketName(const sockaddr_storage& address);

// The same of an IP address in text, without a port: "ipv4:203.0.113.7". Empty where it is none.
std::string AddressName(absl::string_view text);

// Whose connections are counted together: the IPv4 address, or the first 64 bits of the IPv6 address, which is what one
// customer of a provider has at least.
std::string PeerName(const sockaddr_storage& address);

// An address, or all that begin with the same bits: "10.0.0.0/8", "fd00::/8", "127.0.0.1".
struct AddressRange {
  std::array<uint8_t, 16> address = {};  // IPv4 as ::ffff:a.b.c.d
  int bits = 128;
};

// Of a list with commas. INVALID_ARGUMENT names the option and the part that is no address.
absl::StatusOr<std::vector<AddressRange>> ParseAddressRanges(const char* option, absl::string_view list);

bool IsIn(const sockaddr_storage& address, const std::vector<AddressRange>& ranges);

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_SOCKET_NAME_H_
