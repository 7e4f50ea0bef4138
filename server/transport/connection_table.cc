#include "server/transport/connection_table.h"

#include <unistd.h>

#include <chrono>
#include <tuple>
#include <utility>

#include "server/transport/socket_name.h"

namespace dejavu {
namespace {

constexpr std::chrono::seconds kPeerMemory(60);
// Of a peer while memory is short: who has done nothing gets in.
constexpr int kConnectionsInNeed = 4;

}  // namespace

std::shared_ptr<Peer> ConnectionTable::PeerOf(const sockaddr_storage& address, SteadyTime now) {
  std::shared_ptr<Peer>& peer = peers_[PeerName(address)];
  if (peer == nullptr) peer = std::make_shared<Peer>(limits_.new_connections_per_s, IsIn(address, limits_.gateways));
  peer->last_seen = now;
  return peer;
}

std::shared_ptr<Connection> ConnectionTable::Turn(Turned reason, int fd) {
  CountTurned(reason);
  close(fd);
  return nullptr;
}

std::shared_ptr<Connection> ConnectionTable::Admit(const std::string& port, const sockaddr_storage& address, int fd) {
  const SteadyTime now = std::chrono::steady_clock::now();
  std::shared_ptr<Connection> replaced;  // its descriptor is closed after the lock
  MutexLock lock(mutex_);
  const std::shared_ptr<Peer> peer = PeerOf(address, now);
  if (port == kPublicPort) {
    if (memory_short() && peer->connections >= kConnectionsInNeed) return Turn(Turned::kMemory, fd);
    if (peer->banned(now)) return Turn(Turned::kBanned, fd);
    const bool limited = !peer->gateway();
    if (limited && limits_.new_connections_per_s > 0 && !peer->new_connections.Take(now)) {
      return Turn(Turned::kTooFast, fd);
    }
    if (limited && peer->connections >= limits_.connections_per_peer) return Turn(Turned::kTooManyOfPeer, fd);
    if (by_port_[port] >= limits_.connections && !MakeRoom(port, limits_.connections))
      return Turn(Turned::kTooMany, fd);
  } else if (by_port_[port] >= kReservedConnections && !MakeRoom(port, kReservedConnections)) {
    return Turn(Turned::kTooMany, fd);
  }
  auto connection = std::make_shared<Connection>(SocketName(address), port, peer, fd, now);
  std::shared_ptr<Connection>& place = connections_[connection->name()];
  if (place != nullptr) {  // the same address again before anybody has seen that the first one went
    --place->peer().connections;
    --by_port_[place->port()];
    replaced = std::move(place);
  }
  place = connection;
  ++peer->connections;
  ++by_port_[port];
  return connection;
}

// One that is closed keeps its place until the watch sees it gone: a few more than the limit may be there for a moment.
bool ConnectionTable::MakeRoom(const std::string& port, int places) {
  Connection* worst = nullptr;
  int open = 0;
  const auto badness = [](const Connection& c) {
    return std::make_tuple(c.peer().connections, -c.idle_since().time_since_epoch());
  };
  for (const auto& [name, connection] : connections_) {
    if (connection->port() != port || connection->closed()) continue;
    ++open;
    if (connection->open_calls() > 0) continue;
    if (worst == nullptr || badness(*connection) > badness(*worst)) worst = connection.get();
  }
  if (open < places) return true;
  if (worst == nullptr || !worst->Close()) return false;
  Count(closed_[static_cast<size_t>(Closed::kMadeRoom)]);
  return true;
}

void ConnectionTable::Remove(const std::shared_ptr<Connection>& connection) {
  MutexLock lock(mutex_);
  const auto found = connections_.find(connection->name());
  if (found == connections_.end() || found->second != connection) return;
  --connection->peer().connections;
  --by_port_[connection->port()];
  connections_.erase(found);
}

std::shared_ptr<Connection> ConnectionTable::Find(absl::string_view name) const {
  MutexLock lock(mutex_);
  const auto found = connections_.find(name);
  return found == connections_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Connection>> ConnectionTable::All() const {
  MutexLock lock(mutex_);
  std::vector<std::shared_ptr<Connection>> all;
  all.reserve(connections_.size());
  for (const auto& [name, connection] : connections_) all.push_back(connection);
  return all;
}

void ConnectionTable::Close(Connection& connection, Closed reason) {
  if (!connection.Close()) return;
  Count(closed_[static_cast<size_t>(reason)]);
  if (reason == Closed::kMadeRoom || connection.peer().gateway()) return;
  connection.peer().Ban(std::chrono::steady_clock::now());
  MutexLock lock(mutex_);
  for (const auto& [name, other] : connections_) {
    if (&other->peer() != &connection.peer() || other->port() != connection.port()) continue;
    if (other->Close()) Count(closed_[static_cast<size_t>(reason)]);
  }
}

void ConnectionTable::ForgetPeers(SteadyTime now) {
  MutexLock lock(mutex_);
  absl::erase_if(peers_, [&](const auto& entry) {
    return entry.second->connections == 0 && now - entry.second->last_seen > kPeerMemory;
  });
}

int64_t ConnectionTable::connections() const {
  MutexLock lock(mutex_);
  return static_cast<int64_t>(connections_.size());
}

}  // namespace dejavu
