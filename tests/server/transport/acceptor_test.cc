#include "server/transport/acceptor.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/mutex.h"

namespace dejavu {
namespace {

TransportLimits Limits() {
  TransportLimits limits;
  limits.connections = limits.connections_per_peer = 100;
  limits.calls = limits.calls_per_peer = 100;
  limits.message_bytes = 1 << 20;
  return limits;
}

template <typename Condition>
bool Eventually(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// A port whose other side, gRPC in the daemon, is a list of sockets.
class Port {
 public:
  explicit Port(const TransportLimits& limits = Limits(), std::string name = kPublicPort)
      : table(limits), watch(&table, [](SteadyTime) {}) {
    acceptor = Acceptor::Start("127.0.0.1:0", name, &watch, [this](int fd) {
                 MutexLock lock(mutex_);
                 served_.push_back(fd);
               }).value();
  }
  ~Port() {
    acceptor->Stop();
    for (const int fd : TakeServed()) Drop(fd);
    for (const int fd : clients_) close(fd);
  }

  // The client's end of a new connection, or -1.
  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(acceptor->port()));
    clients_.push_back(fd);
    return connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 ? fd : -1;
  }
  size_t served() {
    MutexLock lock(mutex_);
    return served_.size();
  }
  std::vector<int> TakeServed() {
    MutexLock lock(mutex_);
    return std::move(served_);
  }
  // As gRPC lets a socket go.
  static void Drop(int fd) {
    shutdown(fd, SHUT_RDWR);
    close(fd);
  }

  ConnectionTable table;
  ConnectionWatch watch;
  std::unique_ptr<Acceptor> acceptor;

 private:
  Mutex mutex_;
  std::vector<int> served_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> clients_;
};

// The other end has closed it, or was never there.
bool IsClosed(int fd) {
  char byte;
  return recv(fd, &byte, 1, 0) <= 0;
}

// A descriptor of this process that listens on `port`.
int ListeningDescriptor(int port) {
  DIR* const folder = opendir("/proc/self/fd");
  int found = -1;
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    int listens = 0;
    socklen_t size = sizeof(listens);
    sockaddr_in address = {};
    socklen_t address_size = sizeof(address);
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 || listens == 0) continue;
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &address_size) != 0) continue;
    if (ntohs(address.sin_port) == port) found = fd;
  }
  closedir(folder);
  return found;
}

TEST(Acceptor, HandsConnectionsOverAndSeesThemGo) {
  Port port;
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  EXPECT_EQ(port.table.connections(), 1);
  Port::Drop(port.TakeServed()[0]);
  EXPECT_TRUE(Eventually([&] { return port.table.connections() == 0; }));
}

TEST(Acceptor, AClosedConnectionLooksClosedToItsClient) {
  Port port;
  const int client = port.Connect();
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  // Whoever serves it closes its descriptor; the watch's second one must not keep the client waiting.
  Port::Drop(port.TakeServed()[0]);
  EXPECT_TRUE(IsClosed(client));
}

TEST(Acceptor, TurnsAwayWhatIsBeyondAPeersShareAndTakesItsNextWhenOneHasGone) {
  TransportLimits limits = Limits();
  limits.connections_per_peer = 2;
  Port port(limits);
  ASSERT_GE(port.Connect(), 0);
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 2; }));
  EXPECT_TRUE(IsClosed(port.Connect()));
  EXPECT_EQ(port.table.turned(Turned::kTooManyOfPeer), 1);

  const std::vector<int> served = port.TakeServed();
  Port::Drop(served[0]);
  ASSERT_TRUE(Eventually([&] { return port.table.connections() == 1; }));
  ASSERT_GE(port.Connect(), 0);
  EXPECT_TRUE(Eventually([&] { return port.served() == 1; }));
  Port::Drop(served[1]);
}

TEST(Acceptor, AnIdleConnectionMakesRoomForANewOneWhereAllPlacesAreTaken) {
  TransportLimits limits = Limits();
  limits.connections = 2;
  Port port(limits);
  const int oldest = port.Connect();
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 2; }));
  ASSERT_GE(port.Connect(), 0);
  EXPECT_TRUE(Eventually([&] { return port.served() == 3; }));
  EXPECT_TRUE(IsClosed(oldest));
  EXPECT_EQ(port.table.closed(Closed::kMadeRoom), 1);
}

TEST(Acceptor, TurnsAwayWhoConnectsTooOften) {
  TransportLimits limits = Limits();
  limits.new_connections_per_s = 1e-3;
  Port port(limits);
  // The burst is twice the rate, less than one.
  EXPECT_TRUE(IsClosed(port.Connect()));
  EXPECT_EQ(port.table.turned(Turned::kTooFast), 1);
  EXPECT_EQ(port.served(), 0u);
}

TEST(Acceptor, ServesOnAfterAllDescriptorsWereGone) {
  Port port;
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);  // opened while that is still possible
  const rlimit none = {3, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port.acceptor->port()));
  ASSERT_EQ(connect(client, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_TRUE(Eventually([&] { return port.table.turned(Turned::kNoDescriptor) > 0; }));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  // What was in the queue meanwhile is served or was turned away; a new one is served.
  ASSERT_TRUE(Eventually([&] { return port.Connect() >= 0 && port.served() >= 2; }));
  close(client);
}

TEST(Acceptor, ListensAgainWhereItsSocketHasFailed) {
  Port port;
  const int listening = ListeningDescriptor(port.acceptor->port());
  ASSERT_GE(listening, 0);
  shutdown(listening, SHUT_RDWR);  // accept4 says EINVAL from now on
  EXPECT_TRUE(Eventually([&] {
    port.Connect();
    return port.served() > 0;
  }));
  EXPECT_EQ(port.acceptor->seconds_deaf(), 0.0);
}

TEST(Acceptor, SaysThatAPortIsInUse) {
  Port port;
  const std::string address = absl::StrCat("127.0.0.1:", port.acceptor->port());
  const auto second = Acceptor::Start(address, kPublicPort, &port.watch, [](int) {});
  EXPECT_EQ(second.status().message(), absl::StrCat("cannot listen on ", address, ": the port is in use"));
}

TEST(ConnectionWatch, ClosesAConnectionWhoseBytesNoCallExplains) {
  Port port;
  const int client = port.Connect();
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  const int server = port.TakeServed()[0];
  std::vector<char> bytes(1 << 16);
  bool closed = false;
  for (int i = 0; i < 1000 && !closed; ++i) {  // at most 64 MB
    closed = send(client, bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0;
    while (recv(server, bytes.data(), bytes.size(), MSG_DONTWAIT) > 0) {
    }
    if (port.table.closed(Closed::kUnexplained) > 0) closed = true;
  }
  EXPECT_TRUE(Eventually([&] { return port.table.closed(Closed::kUnexplained) == 1; }));
  Port::Drop(server);
}

// As in a flood of streams that are reset, where one is always about to get its message.
TEST(ConnectionWatch, ACallUnderWayExplainsLittleAfterManyWithoutAMessage) {
  Port port;
  const int client = port.Connect();
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  const int server = port.TakeServed()[0];
  const std::shared_ptr<Connection> connection = port.table.All()[0];
  connection->BeginCall(100);
  const auto distrust = [&] {
    while (connection->peer().TakeBrokenMessage(std::chrono::steady_clock::now())) {
    }
  };
  distrust();
  std::vector<char> bytes(1 << 16);
  for (int i = 0; i < 16; ++i) {  // 1 MiB, less than the message may have
    if (send(client, bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) break;
    while (recv(server, bytes.data(), bytes.size(), MSG_DONTWAIT) > 0) {
    }
  }
  EXPECT_TRUE(Eventually([&] {
    distrust();  // it is not for ever
    send(client, bytes.data(), 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    return port.table.closed(Closed::kUnexplained) == 1;
  }));
  Port::Drop(server);
}

TEST(ConnectionWatch, LeavesAConnectionWhoseCallExplainsItsBytes) {
  Port port;
  const int client = port.Connect();
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  const int server = port.TakeServed()[0];
  const std::shared_ptr<Connection> connection = port.table.All()[0];
  std::vector<char> bytes(1 << 16);
  for (int call = 0; call < 20; ++call) {  // 20 MB in all, far beyond what needs no explanation
    connection->BeginCall(100);
    for (int i = 0; i < 16; ++i) {
      ASSERT_GT(send(client, bytes.data(), bytes.size(), MSG_NOSIGNAL), 0);
      size_t taken = 0;
      while (taken < bytes.size()) {
        const ssize_t count = recv(server, bytes.data(), bytes.size() - taken, 0);
        ASSERT_TRUE(count > 0 || errno == EAGAIN);
        taken += count > 0 ? static_cast<size_t>(count) : 0;
      }
    }
    connection->TakeMessage(16 * bytes.size());
    connection->EndCall(/*had_message=*/true, 1 << 20, std::chrono::steady_clock::now());
  }
  EXPECT_EQ(port.table.closed(Closed::kUnexplained), 0);
  Port::Drop(server);
}

TEST(Peer, IsBelievedThatSomeMessagesWereTooLarge) {
  Peer peer(/*new_connections_per_s=*/1, /*gateway=*/false);
  const SteadyTime now = std::chrono::steady_clock::now();
  int taken = 0;
  while (peer.TakeBrokenMessage(now) && taken < 100) ++taken;
  EXPECT_EQ(taken, 16);
}

TEST(Connection, CountsItsCallsAndItsPeers) {
  Port port;
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  const std::shared_ptr<Connection> connection = port.table.All()[0];
  connection->BeginCall(100);
  EXPECT_EQ(connection->open_calls(), 1);
  EXPECT_EQ(connection->peer().calls(), 1);
  connection->EndCall(/*had_message=*/false, 1 << 20, std::chrono::steady_clock::now());
  EXPECT_EQ(connection->open_calls(), 0);
  EXPECT_EQ(connection->peer().calls(), 0);
}

TEST(Peer, MayCancelABurstOfCallsAndSomePerSecond) {
  Peer peer(/*new_connections_per_s=*/1, /*gateway=*/false);
  Peer gateway(/*new_connections_per_s=*/1, /*gateway=*/true);
  const SteadyTime now = std::chrono::steady_clock::now();
  int taken = 0;
  while (peer.TakeCancel(now, 1) && taken < 10'000) ++taken;
  EXPECT_EQ(taken, 1000);
  for (int i = 0; i < 10'000; ++i) ASSERT_TRUE(gateway.TakeCancel(now, 1));
  EXPECT_TRUE(peer.TakeCancel(now + std::chrono::seconds(1), 1));
}

TEST(ConnectionTable, BansThePeerOfAConnectionThatItCloses) {
  Port port;
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  port.table.Close(*port.table.All()[0], Closed::kCancels);
  EXPECT_TRUE(IsClosed(port.Connect()));
  EXPECT_EQ(port.table.turned(Turned::kBanned), 1);
}

TEST(ConnectionTable, BansNoGateway) {
  TransportLimits limits = Limits();
  limits.gateways = *ParseAddressRanges("option", "127.0.0.0/8");
  limits.connections_per_peer = 1;
  Port port(limits);
  ASSERT_GE(port.Connect(), 0);
  ASSERT_TRUE(Eventually([&] { return port.served() == 1; }));
  port.table.Close(*port.table.All()[0], Closed::kCancels);
  ASSERT_GE(port.Connect(), 0);
  EXPECT_TRUE(Eventually([&] { return port.served() == 2; }));
}

TEST(Allowance, FillsUpWithTime) {
  Allowance allowance(/*burst=*/2, /*per_s=*/1);
  const SteadyTime start = std::chrono::steady_clock::now();
  EXPECT_TRUE(allowance.Take(start));
  EXPECT_TRUE(allowance.Take(start));
  EXPECT_FALSE(allowance.Take(start));
  EXPECT_TRUE(allowance.Take(start + std::chrono::seconds(1)));
  EXPECT_FALSE(allowance.Take(start + std::chrono::seconds(1)));
}

}  // namespace
}  // namespace dejavu
