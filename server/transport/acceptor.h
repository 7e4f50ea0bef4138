// Acceptor: accepts the connections of one port in a thread of its own and hands them to gRPC. gRPC 1.51's own listener
// stops for good when the process runs out of descriptors (CVE-2023-4785), knows no limits, and says nothing of either.
// This one goes on: where there is no descriptor left it turns the connection away, and a listening socket that fails
// is opened again. Start and Stop are one thread's.
#ifndef SERVER_TRANSPORT_ACCEPTOR_H_
#define SERVER_TRANSPORT_ACCEPTOR_H_

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "kernels/base/clock.h"
#include "server/transport/connection_watch.h"
#include "server/transport/listen_socket.h"

namespace dejavu {

class Acceptor {
 public:
  // Gets each connection's descriptor, which is then its own.
  using Serve = std::function<void(int fd)>;

  // `port_name`: kPublicPort or its like. The watch must outlive the object. UNAVAILABLE where the address cannot be
  // had.
  static absl::StatusOr<std::unique_ptr<Acceptor>> Start(const std::string& address, const std::string& port_name,
                                                         ConnectionWatch* watch, Serve serve);
  ~Acceptor() { Stop(); }
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // Closes the listening sockets. What was accepted goes on.
  void Stop();

  int port() const { return sockets_.port; }

  // The listening socket has failed and cannot be opened again, for that long. Any thread.
  double seconds_deaf() const;

 private:
  Acceptor(std::string address, std::string port_name, ConnectionWatch* watch, Serve serve)
      : address_(std::move(address)), port_name_(std::move(port_name)), watch_(watch), serve_(std::move(serve)) {}

  void Run();
  // False: the listening socket has failed.
  bool AcceptFrom(int listening_fd);
  void TurnAwayWithoutDescriptor(int listening_fd);
  void Take(int fd, const sockaddr_storage& address);
  void ListenAgain();

  const std::string address_, port_name_;
  ConnectionWatch* const watch_;
  const Serve serve_;
  ListenSockets sockets_;                       // the port is constant after Start; the rest is the thread's
  int spare_fd_ = -1;                           // given up for a moment where there is no other descriptor
  int stop_fd_ = -1;                            // an eventfd
  std::atomic<SteadyTime::rep> deaf_since_{0};  // 0: it listens
  std::thread thread_;
};

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_ACCEPTOR_H_
