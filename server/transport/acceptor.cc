#include "server/transport/acceptor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr int kAtOnce = 64;  // accepted before other sockets get their turn
constexpr int kAgainMs = 100;
// A connection whose other end takes nothing for so long is gone; gRPC's keepalive says the same.
constexpr unsigned kUserTimeoutMs = 20'000;

int OpenSpare() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

// Without the wait of a closed connection, which the other end could make many of.
void Reset(int fd) {
  const linger none = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
  close(fd);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Acceptor>> Acceptor::Start(const std::string& address, const std::string& port_name,
                                                          ConnectionWatch* watch, Serve serve) {
  std::unique_ptr<Acceptor> acceptor(new Acceptor(address, port_name, watch, std::move(serve)));
  ASSIGN_OR_RETURN(acceptor->sockets_, OpenListenSockets(address));
  acceptor->spare_fd_ = OpenSpare();
  acceptor->stop_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (acceptor->stop_fd_ < 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": eventfd: ", std::strerror(errno)));
  }
  acceptor->thread_ = std::thread([raw = acceptor.get()] { raw->Run(); });
  return acceptor;
}

void Acceptor::Stop() {
  if (thread_.joinable()) {
    CHECK(eventfd_write(stop_fd_, 1) == 0) << "eventfd_write";
    thread_.join();
  }
  for (const int fd : sockets_.fds) close(fd);
  sockets_.fds.clear();
  for (int* const fd : {&spare_fd_, &stop_fd_}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

double Acceptor::seconds_deaf() const {
  const SteadyTime::rep since = deaf_since_.load(std::memory_order_relaxed);
  return since == 0 ? 0.0 : SecondsSince(SteadyTime(SteadyTime::duration(since)));
}

void Acceptor::Run() {
  while (true) {
    std::vector<pollfd> fds = {{stop_fd_, POLLIN, 0}};
    for (const int fd : sockets_.fds) fds.push_back({fd, POLLIN, 0});
    const int ready = poll(fds.data(), fds.size(), sockets_.fds.empty() ? kAgainMs : -1);
    CHECK(ready >= 0 || errno == EINTR || errno == ENOMEM) << "poll: " << std::strerror(errno);
    if (fds[0].revents != 0) return;
    bool listens = !sockets_.fds.empty();
    for (size_t i = 1; i < fds.size(); ++i) {
      if (fds[i].revents != 0 && !AcceptFrom(fds[i].fd)) listens = false;
    }
    if (!listens) ListenAgain();
  }
}

bool Acceptor::AcceptFrom(int listening_fd) {
  for (int i = 0; i < kAtOnce; ++i) {
    sockaddr_storage address = {};
    socklen_t size = sizeof(address);
    const int fd = accept4(listening_fd, reinterpret_cast<sockaddr*>(&address), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      Take(fd, address);
      continue;
    }
    switch (errno) {
      case EAGAIN:
        return true;
      case EMFILE:
      case ENFILE:
        TurnAwayWithoutDescriptor(listening_fd);
        break;
      case ENOBUFS:
      case ENOMEM:
        std::this_thread::sleep_for(std::chrono::milliseconds(kAgainMs));
        return true;
      case EBADF:
      case EINVAL:
      case ENOTSOCK:
      case EOPNOTSUPP:
      case EFAULT:
        spdlog::error("the listening socket of {} has failed: {}; it is opened again", address_, std::strerror(errno));
        return false;
      default:  // what has become of a connection that was waiting
        break;
    }
  }
  return true;
}

void Acceptor::TurnAwayWithoutDescriptor(int listening_fd) {
  spdlog::warn("no file descriptor is left: connections to {} are turned away", address_);
  watch_->table()->CountTurned(Turned::kNoDescriptor);
  if (spare_fd_ >= 0) close(spare_fd_);
  const int fd = accept4(listening_fd, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd >= 0) Reset(fd);
  spare_fd_ = OpenSpare();
  // Somebody else took it: what waits has to wait.
  if (fd < 0) std::this_thread::sleep_for(std::chrono::milliseconds(kAgainMs));
}

void Acceptor::Take(int fd, const sockaddr_storage& address) {
  const int second = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (second < 0) {
    watch_->table()->CountTurned(Turned::kNoDescriptor);
    return Reset(fd);
  }
  if (!watch_->Admit(port_name_, address, second)) return Reset(fd);
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
  serve_(fd);
}

void Acceptor::ListenAgain() {
  if (deaf_since_.load() == 0) deaf_since_ = std::chrono::steady_clock::now().time_since_epoch().count();
  for (const int fd : sockets_.fds) close(fd);
  sockets_.fds.clear();
  const std::string host = address_.substr(0, address_.rfind(':'));
  absl::StatusOr<ListenSockets> sockets = OpenListenSockets(absl::StrCat(host, ":", sockets_.port));
  if (!sockets.ok()) {
    spdlog::error("{}", std::string(sockets.status().message()));
    return;
  }
  sockets_.fds = std::move(sockets->fds);
  deaf_since_ = 0;
  spdlog::info("listening on {} again", address_);
}

}  // namespace dejavu
