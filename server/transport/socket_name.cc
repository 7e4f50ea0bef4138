#include "server/transport/socket_name.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

// An IPv4 address that a socket of both kinds shows as ::ffff:a.b.c.d.
bool UnmapV4(const sockaddr_in6& address, sockaddr_in* v4) {
  if (!IN6_IS_ADDR_V4MAPPED(&address.sin6_addr)) return false;
  *v4 = {};
  v4->sin_family = AF_INET;
  v4->sin_port = address.sin6_port;
  std::memcpy(&v4->sin_addr, &address.sin6_addr.s6_addr[12], 4);
  return true;
}

struct Parts {
  bool v6 = false;
  in6_addr address = {};
  std::string host;
  int port = 0;
};

Parts PartsOf(const sockaddr_storage& storage) {
  Parts parts;
  char text[INET6_ADDRSTRLEN] = "";
  sockaddr_in v4 = {};
  sockaddr_in6 v6 = {};
  if (storage.ss_family == AF_INET6) {
    std::memcpy(&v6, &storage, sizeof(v6));
    parts.v6 = !UnmapV4(v6, &v4);
  } else {
    std::memcpy(&v4, &storage, sizeof(v4));
  }
  if (parts.v6) {
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof(text));
    parts.address = v6.sin6_addr;
    parts.port = ntohs(v6.sin6_port);
  } else {
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof(text));
    parts.port = ntohs(v4.sin_port);
  }
  parts.host = text;
  return parts;
}

}  // namespace

std::string SocketName(const sockaddr_storage& address) {
  const Parts parts = PartsOf(address);
  if (parts.v6) return absl::StrCat("ipv6:%5B", parts.host, "%5D:", parts.port);
  return absl::StrCat("ipv4:", parts.host, ":", parts.port);
}

std::string PeerName(const sockaddr_storage& address) {
  Parts parts = PartsOf(address);
  if (!parts.v6) return parts.host;
  std::memset(&parts.address.s6_addr[8], 0, 8);
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(AF_INET6, &parts.address, text, sizeof(text));
  return absl::StrCat(text, "/64");
}

}  // namespace dejavu
