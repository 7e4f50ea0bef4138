// Connection: one connection that a port has accepted and gRPC serves, as the daemon sees it from beside gRPC: whose it
// is, how many calls are open on it, how many bytes of replies its other end has not taken, how many bytes it has sent
// that no call explains. It can be closed from here. Any thread.
#ifndef SERVER_TRANSPORT_CONNECTION_H_
#define SERVER_TRANSPORT_CONNECTION_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"

namespace dejavu {

// Lets `burst` events pass at once and `per_s` in the long run. One thread at a time.
class Allowance {
 public:
  Allowance(double burst, double per_s) : burst_(burst), per_s_(per_s), left_(burst) {}
  bool Take(SteadyTime now, double events = 1.0);

 private:
  const double burst_, per_s_;
  double left_;
  SteadyTime last_;
};

// All connections from one address together. Any thread; what is marked so belongs to the table.
class Peer {
 public:
  // `gateway`: others stand behind it, so that what one of them does must not be held against all.
  Peer(double new_connections_per_s, bool gateway);

  bool gateway() const { return gateway_; }
  std::atomic<int>& calls() { return calls_; }
  int calls() const { return calls_.load(std::memory_order_relaxed); }

  // A call that its client has cancelled, or as a tenth of one, a call whose deadline has passed. False: more than
  // anybody needs.
  bool TakeCancel(SteadyTime now, double cancels);

  // A call whose message was begun and never became whole, or was too large. False: there were too many
  // to believe that, and for a while nobody believes that messages of this peer are under way.
  bool TakeBrokenMessage(SteadyTime now);
  bool distrusted(SteadyTime now) const {
    return now.time_since_epoch().count() < distrusted_until_.load(std::memory_order_relaxed);
  }

  // It has done what nobody should: for a while no connection of it is taken.
  void Ban(SteadyTime now) { banned_until_.store((now + kBan).time_since_epoch().count(), std::memory_order_relaxed); }
  bool banned(SteadyTime now) const {
    return now.time_since_epoch().count() < banned_until_.load(std::memory_order_relaxed);
  }

  // The table's, under its mutex.
  int connections = 0;
  Allowance new_connections;
  SteadyTime last_seen;

 private:
  static constexpr std::chrono::seconds kBan{10}, kDistrust{2};

  const bool gateway_;
  std::atomic<int> calls_{0};
  std::atomic<SteadyTime::rep> banned_until_{0}, distrusted_until_{0};

  Mutex mutex_;
  Allowance cancels_ ABSL_GUARDED_BY(mutex_), broken_messages_ ABSL_GUARDED_BY(mutex_);
};

class Connection {
 public:
  // `name` as gRPC's context.peer() has it. `fd` is a second descriptor of the socket that gRPC got: it keeps nothing
  // open, since gRPC shuts the socket down before it closes its own, and it is closed with this object.
  Connection(std::string name, std::string port, std::shared_ptr<Peer> peer, int fd, SteadyTime now);
  ~Connection();

  const std::string& name() const { return name_; }
  const std::string& port() const { return port_; }  // "public", "admin", "health"
  Peer& peer() const { return *peer_; }
  int fd() const { return fd_; }

  // A call with so many bytes of metadata has begun, its message has come, it is over. Of a stream of requests only the
  // first one was awaited.
  void BeginCall(size_t metadata_bytes);
  void TakeMessage(size_t bytes, bool awaited = true);
  // Without a message the bytes of one that was too large are explained, if the peer does not do that often.
  void EndCall(bool had_message, int64_t message_bytes, SteadyTime now);
  int open_calls() const { return open_calls_.load(std::memory_order_relaxed); }
  SteadyTime idle_since() const {
    return SteadyTime(SteadyTime::duration(idle_since_.load(std::memory_order_relaxed)));
  }

  // Of replies that gRPC has and the other end has no room for.
  std::atomic<int64_t>& unread_bytes() { return unread_bytes_; }

  // How many of the bytes that have come no call explains, added up and forgotten slowly. False: at this look and at
  // some before they were more than a client has reason for, whose messages have at most `message_bytes`. On a busy
  // machine calls may be seen long after their bytes have come. Only one thread looks.
  bool InputIsExplained(SteadyTime now, int64_t message_bytes);
  bool suspicious() const { return looks_above_ > 0; }  // they were at the last look
  int64_t unexplained_bytes() const { return unexplained_.load(std::memory_order_relaxed); }

  // gRPC finds the socket shut down, and ends what runs on it. True: it was not closed before.
  bool Close();
  bool closed() const { return closed_.load(std::memory_order_relaxed); }

 private:
  const std::string name_, port_;
  const std::shared_ptr<Peer> peer_;
  const int fd_;

  std::atomic<int> open_calls_{0}, awaiting_{0};  // the latter: calls whose message has not come
  std::atomic<bool> had_message_{false};
  std::atomic<int64_t> unread_bytes_{0};
  std::atomic<int64_t> explained_{0};
  std::atomic<int64_t> unexplained_{0};
  std::atomic<SteadyTime::rep> idle_since_;
  std::atomic<bool> closed_{false};

  // InputIsExplained's.
  int64_t seen_bytes_ = 0, seen_explained_ = 0;
  int looks_above_ = 0;  // in a row
  SteadyTime looked_;
};

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_CONNECTION_H_
