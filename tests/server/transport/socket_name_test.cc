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

TEST(AddressName, IsTheSameWithoutAPort) {
  EXPECT_EQ(AddressName("10.1.2.3"), "ipv4:10.1.2.3");
  EXPECT_EQ(AddressName("2001:DB8:0::7"), "ipv6:%5B2001:db8::7%5D");
  EXPECT_EQ(AddressName("::ffff:10.1.2.3"), "ipv4:10.1.2.3");
}

TEST(AddressName, IsEmptyForWhatIsNoAddress) {
  for (const std::string& text :
       {std::string(), std::string("unknown"), std::string("10.1.2.3:80"), std::string("10.1.2"),
        std::string("10.1.2.256"), std::string("[::1]"), std::string("fe80::1%eth0"), std::string(" 10.1.2.3"),
        std::string("10.1.2.3\n"), std::string("10.1.2.3\0", 9), std::string("::ffff:10.1.2.3/96"),
        std::string(5000, '1')}) {
    EXPECT_EQ(AddressName(text), "") << text;
  }
}

TEST(PeerName, PutsTheAddressesOfOneSiteTogether) {
  EXPECT_EQ(PeerName(V4("10.1.2.3", 1)), PeerName(V4("10.1.2.3", 2)));
  EXPECT_NE(PeerName(V4("10.1.2.3", 1)), PeerName(V4("10.1.2.4", 1)));
  EXPECT_EQ(PeerName(V6("2001:db8:0:1::7", 1)), PeerName(V6("2001:db8:0:1:ffff::8", 1)));
  EXPECT_NE(PeerName(V6("2001:db8:0:1::7", 1)), PeerName(V6("2001:db8:0:2::7", 1)));
  EXPECT_EQ(PeerName(V6("::ffff:10.1.2.3", 1)), PeerName(V4("10.1.2.3", 2)));
}

TEST(AddressRange, HoldsWhatBeginsAlike) {
  const auto ranges = ParseAddressRanges("transport.gateways", "127.0.0.1, 10.0.0.0/9,fd00::/8").value();
  EXPECT_TRUE(IsIn(V4("127.0.0.1", 1), ranges));
  EXPECT_FALSE(IsIn(V4("127.0.0.2", 1), ranges));
  EXPECT_TRUE(IsIn(V4("10.127.3.4", 1), ranges));
  EXPECT_FALSE(IsIn(V4("10.128.3.4", 1), ranges));
  EXPECT_TRUE(IsIn(V6("::ffff:10.1.2.3", 1), ranges));
  EXPECT_TRUE(IsIn(V6("fd12::1", 1), ranges));
  EXPECT_FALSE(IsIn(V6("fe80::1", 1), ranges));
  EXPECT_TRUE(IsIn(V4("8.8.8.8", 1), ParseAddressRanges("transport.gateways", "0.0.0.0/0").value()));
  EXPECT_TRUE(ParseAddressRanges("transport.gateways", "")->empty());
}

TEST(AddressRange, RefusesWhatIsNoAddress) {
  for (const char* const wrong : {"localhost", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/", "10.0.0.0/-1", "/8"}) {
    EXPECT_FALSE(ParseAddressRanges("transport.gateways", wrong).ok()) << wrong;
  }
}

}  // namespace
}  // namespace dejavu
