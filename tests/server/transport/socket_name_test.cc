#include "server/transport/socket_name.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cstring>

#include "gtest/gtest.h"

namespace dejavu {
namespace {

sockaddr_storage V4(const char* host, uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  EXPECT_EQ(inet_pton(AF_INET, host, &address.sin_addr), 1);
  sockaddr_storage storage = {};
  std::memcpy(&storage, &address, sizeof(address));
  return storage;
}

sockaddr_storage V6(const char* host, uint16_t port) {
  sockaddr_in6 address = {};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(port);
  EXPECT_EQ(inet_pton(AF_INET6, host, &address.sin6_addr), 1);
  sockaddr_storage storage = {};
  std::memcpy(&storage, &address, sizeof(address));
  return storage;
}

TEST(SocketName, IsWhatGrpcCallsAPeer) {
  EXPECT_EQ(SocketName(V4("10.1.2.3", 4711)), "ipv4:10.1.2.3:4711");
  EXPECT_EQ(SocketName(V6("2001:db8::7", 80)), "ipv6:%5B2001:db8::7%5D:80");
  EXPECT_EQ(SocketName(V6("::ffff:10.1.2.3", 4711)), "ipv4:10.1.2.3:4711");
}

TEST(PeerName, PutsTheAddressesOfOneSiteTogether) {
  EXPECT_EQ(PeerName(V4("10.1.2.3", 1)), PeerName(V4("10.1.2.3", 2)));
  EXPECT_NE(PeerName(V4("10.1.2.3", 1)), PeerName(V4("10.1.2.4", 1)));
  EXPECT_EQ(PeerName(V6("2001:db8:0:1::7", 1)), PeerName(V6("2001:db8:0:1:ffff::8", 1)));
  EXPECT_NE(PeerName(V6("2001:db8:0:1::7", 1)), PeerName(V6("2001:db8:0:2::7", 1)));
  EXPECT_EQ(PeerName(V6("::ffff:10.1.2.3", 1)), PeerName(V4("10.1.2.3", 2)));
}

}  // namespace
}  // namespace dejavu
