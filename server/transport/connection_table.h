// ConnectionTable: the connections of all ports, and who may have another one. It counts what was refused and closed,
// for the metrics. Any thread.
#ifndef SERVER_TRANSPORT_CONNECTION_TABLE_H_
#define SERVER_TRANSPORT_CONNECTION_TABLE_H_

#include <sys/socket.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "server/transport/connection.h"
#include "server/transport/limits.h"

namespace dejavu {

// Why a connection was not taken, or was closed from here.
enum class Turned { kTooMany, kTooManyOfPeer, kTooFast, kBanned, kNoDescriptor, kMemory };
inline constexpr std::array kTurnedNames = {"connections", "peer_connections", "peer_rate",
                                            "banned",      "descriptors",      "memory"};
enum class Closed { kUnexplained, kCancels, kMemory, kMadeRoom };
inline constexpr std::array kClosedNames = {"unexplained_bytes", "cancels", "memory", "made_room"};

class ConnectionTable {
 public:
  explicit ConnectionTable(const TransportLimits& limits) : limits_(limits) {}

  const TransportLimits& limits() const { return limits_; }

  // One that `port` has accepted, with a second descriptor of it, which the table keeps or closes. Null: it is refused,
  // and counted. Where all places are taken, an idle connection of whoever has most of them makes room.
  std::shared_ptr<Connection> Admit(const std::string& port, const sockaddr_storage& address, int fd);
  void Remove(const std::shared_ptr<Connection>& connection);

  // By gRPC's name of it. Null: it has just gone.
  std::shared_ptr<Connection> Find(absl::string_view name) const;
  std::vector<std::shared_ptr<Connection>> All() const;

  // Unless it only makes room, all connections of its peer are closed, and it is banned for a while; but not where
  // others stand behind the peer.
  void Close(Connection& connection, Closed reason);
  void CountTurned(Turned reason) { Count(turned_[static_cast<size_t>(reason)]); }

  // While memory is short no connection is taken from those who have some.
  void set_memory_short(bool value) { memory_short_.store(value, std::memory_order_relaxed); }
  bool memory_short() const { return memory_short_.load(std::memory_order_relaxed); }

  // Forgets addresses that have left long ago.
  void ForgetPeers(SteadyTime now);

  std::atomic<int>& open_calls() { return open_calls_; }
  std::atomic<int>& lost_calls() { return lost_calls_; }  // whose connection had gone before they were seen
  std::atomic<int64_t>& unread_bytes() { return unread_bytes_; }

  int64_t connections() const;
  int64_t turned(Turned reason) const { return turned_[static_cast<size_t>(reason)].load(std::memory_order_relaxed); }
  int64_t closed(Closed reason) const { return closed_[static_cast<size_t>(reason)].load(std::memory_order_relaxed); }

 private:
  static void Count(std::atomic<int64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }
  std::shared_ptr<Peer> PeerOf(const sockaddr_storage& address, SteadyTime now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool MakeRoom(const std::string& port, int places) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::shared_ptr<Connection> Turn(Turned reason, int fd);

  const TransportLimits limits_;
  std::atomic<bool> memory_short_{false};
  std::atomic<int> open_calls_{0}, lost_calls_{0};
  std::atomic<int64_t> unread_bytes_{0};
  std::array<std::atomic<int64_t>, kTurnedNames.size()> turned_{};
  std::array<std::atomic<int64_t>, kClosedNames.size()> closed_{};

  mutable Mutex mutex_;
  absl::flat_hash_map<std::string, std::shared_ptr<Connection>> connections_ ABSL_GUARDED_BY(mutex_);  // by name
  absl::flat_hash_map<std::string, std::shared_ptr<Peer>> peers_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, int> by_port_ ABSL_GUARDED_BY(mutex_);
};

inline constexpr char kPublicPort[] = "public";
inline constexpr char kAdminPort[] = "admin";
inline constexpr char kHealthPort[] = "health";
inline constexpr char kMetricsPort[] = "metrics";

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_CONNECTION_TABLE_H_
