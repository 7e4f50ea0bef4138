// What a client sends is explained by its calls: their metadata, their messages, a little for frames around them. All
// else (pings, window updates, settings, headers that never end, streams that are reset before they are calls) must be
// little. The kernel counts the bytes, also under TLS.
#include "server/transport/connection.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

namespace dejavu {
namespace {

constexpr double kBrokenBurst = 16, kBrokenPerS = 1;
constexpr double kCancelBurst = 1000, kCancelsPerS = 200;
// At once. On a busy machine some hundred calls may have come before anybody has seen one of them, so that the smaller
// excess must last a while.
constexpr int64_t kSomeExcess = 128 << 10, kMuchExcess = 256 << 10;
constexpr int kLooksAtSome = 10, kLooksAtMuch = 2;
constexpr int64_t kUnexplainedPerS = 32 << 10;  // and in the long run
constexpr int64_t kCallBytes = 1 << 10;         // frames of a call beside its metadata and message
constexpr int64_t kAwaitedBytes = 64 << 10;     // of a call whose message is under way, beside the message
constexpr int64_t kGrownBytes = 512 << 10;      // where a message is not believed, but a window may have grown

// What the socket has received, or nothing where the kernel does not say.
int64_t ReceivedBytes(int fd) {
  tcp_info info = {};
  socklen_t size = sizeof(info);
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return 0;
  if (size < offsetof(tcp_info, tcpi_bytes_received) + sizeof(info.tcpi_bytes_received)) return 0;
  return static_cast<int64_t>(info.tcpi_bytes_received);
}

}  // namespace

bool Allowance::Take(SteadyTime now, double events) {
  if (last_ != SteadyTime()) left_ = std::min(burst_, left_ + per_s_ * Seconds(last_, now));
  last_ = now;
  if (left_ < events) return false;
  left_ -= events;
  return true;
}

Peer::Peer(double new_connections_per_s, bool gateway)
    : new_connections(2 * new_connections_per_s, new_connections_per_s),
      gateway_(gateway),
      cancels_(kCancelBurst, kCancelsPerS),
      broken_messages_(kBrokenBurst, kBrokenPerS) {}

bool Peer::TakeCancel(SteadyTime now, double cancels) {
  if (gateway_) return true;
  MutexLock lock(mutex_);
  return cancels_.Take(now, cancels);
}

bool Peer::TakeBrokenMessage(SteadyTime now) {
  MutexLock lock(mutex_);
  if (broken_messages_.Take(now)) return true;
  if (!gateway_) distrusted_until_.store((now + kDistrust).time_since_epoch().count(), std::memory_order_relaxed);
  return false;
}

Connection::Connection(std::string name, std::string port, std::shared_ptr<Peer> peer, int fd, SteadyTime now)
    : name_(std::move(name)),
      port_(std::move(port)),
      peer_(std::move(peer)),
      fd_(fd),
      idle_since_(now.time_since_epoch().count()),
      looked_(now) {}

Connection::~Connection() { close(fd_); }

void Connection::BeginCall(size_t metadata_bytes) {
  open_calls_.fetch_add(1, std::memory_order_relaxed);
  awaiting_.fetch_add(1, std::memory_order_relaxed);
  peer_->calls().fetch_add(1, std::memory_order_relaxed);
  explained_.fetch_add(kCallBytes + 2 * static_cast<int64_t>(metadata_bytes), std::memory_order_relaxed);
}

void Connection::TakeMessage(size_t bytes, bool awaited) {
  // TLS and HTTP/2 put 29 and 9 bytes around every frame, which may be as small as the client likes.
  explained_.fetch_add(2 * static_cast<int64_t>(bytes), std::memory_order_release);
  if (awaited) awaiting_.fetch_sub(1, std::memory_order_release);
  had_message_.store(true, std::memory_order_relaxed);
}

void Connection::EndCall(bool had_message, int64_t message_bytes, SteadyTime now) {
  if (!had_message) {
    if (peer_->TakeBrokenMessage(now)) explained_.fetch_add(2 * message_bytes, std::memory_order_release);
    awaiting_.fetch_sub(1, std::memory_order_release);
  }
  peer_->calls().fetch_sub(1, std::memory_order_relaxed);
  idle_since_.store(now.time_since_epoch().count(), std::memory_order_relaxed);
  open_calls_.fetch_sub(1, std::memory_order_relaxed);
}

bool Connection::InputIsExplained(SteadyTime now, int64_t message_bytes) {
  // In this order: a message that is explained meanwhile is then counted as explained and as awaited, not as neither.
  const int awaited = awaiting_.load(std::memory_order_acquire);
  const int64_t explained = explained_.load(std::memory_order_acquire);
  const int64_t received = ReceivedBytes(fd_);
  const auto forgotten = static_cast<int64_t>(kUnexplainedPerS * Seconds(looked_, now));
  int64_t level = unexplained_.load(std::memory_order_relaxed) + (received - seen_bytes_) -
                  (explained - seen_explained_) - forgotten;
  level = std::max<int64_t>(level, 0);
  seen_bytes_ = received;
  seen_explained_ = explained;
  looked_ = now;
  unexplained_.store(level, std::memory_order_relaxed);
  // Once a window has grown, messages may have come before anybody has seen their calls begin.
  const bool grown = had_message_.load(std::memory_order_relaxed);
  // Among thousands of streams that are reset there is always one that is not yet.
  const int64_t under_way = peer_->distrusted(now)
                                ? (grown ? kGrownBytes : kAwaitedBytes)
                                : (grown ? 2 * message_bytes : 0) + awaited * (2 * message_bytes + kAwaitedBytes);
  const int64_t excess = level - under_way;
  looks_above_ = excess > kSomeExcess ? looks_above_ + 1 : 0;
  return looks_above_ < (excess > kMuchExcess ? kLooksAtMuch : kLooksAtSome);
}

bool Connection::Close() {
  if (closed_.exchange(true)) return false;
  shutdown(fd_, SHUT_RDWR);
  return true;
}

}  // namespace dejavu
