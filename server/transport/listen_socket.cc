#include "server/transport/listen_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

absl::Status Failure(const std::string& address, int error) {
  const char* const reason = error == EADDRINUSE      ? "the port is in use"
                             : error == EADDRNOTAVAIL ? "the address is not this machine's"
                                                      : std::strerror(error);
  return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": ", reason));
}

// -1, and errno.
int Listen(const addrinfo& where, int port) {
  const int fd = socket(where.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int on = 1, off = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // accepted sockets have it, too
  sockaddr_storage address = {};
  std::memcpy(&address, where.ai_addr, where.ai_addrlen);
  if (where.ai_family == AF_INET6) {
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    reinterpret_cast<sockaddr_in6*>(&address)->sin6_port = htons(static_cast<uint16_t>(port));
  } else {
    reinterpret_cast<sockaddr_in*>(&address)->sin_port = htons(static_cast<uint16_t>(port));
  }
  if (bind(fd, reinterpret_cast<const sockaddr*>(&address), where.ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0) {
    return fd;
  }
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

int PortOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port
                                             : reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};

absl::StatusOr<std::unique_ptr<addrinfo, FreeAddresses>> Resolve(const std::string& address, std::string host) {
  absl::string_view name = host;
  if (absl::ConsumePrefix(&name, "[")) absl::ConsumeSuffix(&name, "]");
  host = std::string(name);
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), "0", &hints, &found);
  if (error == 0) return std::unique_ptr<addrinfo, FreeAddresses>(found);
  return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": ", gai_strerror(error)));
}

// Tried in this order until one works. A wildcard is the one socket that takes both kinds of addresses, or where the
// machine has no IPv6 the old one.
std::vector<std::string> HostsOf(const std::string& host) {
  if (host == "0.0.0.0" || host == "[::]") return {"[::]", "0.0.0.0"};
  return {host};
}

// Adds to `sockets` what listens on the host's addresses. A port that is taken fails as a whole; an address of a kind
// that the machine lacks does not, while another one works.
absl::Status ListenOnHost(const std::string& address, const std::string& host, ListenSockets* sockets) {
  ASSIGN_OR_RETURN(const auto found, Resolve(address, host));
  absl::Status failure = Failure(address, EADDRNOTAVAIL);
  for (const addrinfo* where = found.get(); where != nullptr; where = where->ai_next) {
    const int fd = Listen(*where, sockets->port);
    if (fd < 0) {
      const int error = errno;
      failure = Failure(address, error);
      if (error == EADDRINUSE) return failure;
      continue;
    }
    if (sockets->port == 0) sockets->port = PortOf(fd);
    sockets->fds.push_back(fd);
  }
  return sockets->fds.empty() ? failure : absl::OkStatus();
}

}  // namespace

absl::StatusOr<ListenSockets> OpenListenSockets(const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  CHECK(colon != address.npos && absl::SimpleAtoi(address.substr(colon + 1), &port)) << address;  // IsHostAndPort
  absl::Status status;
  for (const std::string& host : HostsOf(address.substr(0, colon))) {
    ListenSockets sockets;
    sockets.port = port;
    status = ListenOnHost(address, host, &sockets);
    if (status.ok()) return sockets;
    for (const int fd : sockets.fds) close(fd);
  }
  return status;
}

}  // namespace dejavu
