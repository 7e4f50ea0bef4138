#include "loadtest/cli/connection.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "loadtest/cli/output.h"

namespace dejavu {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(100);
// A daemon that was started a moment ago does not listen yet. After that, no daemon is there.
constexpr auto kStateTimeout = std::chrono::seconds(1);  // the channel would try for longer
constexpr auto kUnreachableGrace = std::chrono::seconds(2);

sigset_t InterruptSet() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

Interrupt::Interrupt() {
  const sigset_t set = InterruptSet();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  listener_ = std::thread([this] { Listen(); });
}

Interrupt::~Interrupt() {
  done_.store(true);
  pthread_kill(listener_.native_handle(), SIGINT);
  listener_.join();
}

void Interrupt::Listen() {
  const sigset_t set = InterruptSet();
  int signal = 0;
  while (sigwait(&set, &signal) == 0 && !done_.load()) {
    if (raised_.exchange(true)) _exit(kExitInterrupted);
    const MutexLock lock(mutex_);
    if (guarded_ != nullptr) guarded_->TryCancel();
    changed_.NotifyAll();
  }
}

void Interrupt::Guard(grpc::ClientContext* context) {
  const MutexLock lock(mutex_);
  guarded_ = context;
  if (context != nullptr && raised()) context->TryCancel();
}

bool Interrupt::Sleep(std::chrono::milliseconds time) {
  const auto until = std::chrono::steady_clock::now() + time;
  const MutexLock lock(mutex_);
  while (!raised() && changed_.WaitUntil(mutex_, until)) {
  }
  return !raised();
}

absl::StatusOr<std::unique_ptr<Connection>> Connection::Open(const ConnectionOptions& options) {
  ChannelOptions channel_options = options.channel;
  channel_options.follow_health = false;
  // Its threads are to be started where SIGINT is taken away already.
  std::unique_ptr<Connection> connection(new Connection(options));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, MakeChannel(options.server, channel_options));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> admin_channel,
                   MakeChannel(options.admin_server, channel_options));
  connection->generation_ = v1::GenerationService::NewStub(channel);
  connection->health_ = grpc::health::v1::Health::NewStub(channel);
  connection->admin_ = v1::AdminService::NewStub(admin_channel);
  return connection;
}

grpc::Status Connection::Try(const std::function<grpc::Status(Attempt*)>& call, bool* answered) {
  Attempt attempt;
  if (options_.timeout_s > 0) {
    const auto left = Lasting(options_.timeout_s) - (Clock::now() - start_);
    attempt.context.set_deadline(std::chrono::system_clock::now() +
                                 std::chrono::duration_cast<std::chrono::system_clock::duration>(left));
  }
  interrupt_.Guard(&attempt.context);
  grpc::Status status = call(&attempt);
  interrupt_.Guard(nullptr);
  *answered = attempt.answered;
  return status;
}

grpc::Status Connection::CallOnce(const std::function<grpc::Status(Attempt*)>& call) {
  bool answered = false;
  return Try(call, &answered);
}

grpc::Status Connection::Call(const std::function<grpc::Status(Attempt*)>& call) {
  // A call that meets a loading server is retried by the channel when that one advises, which is seconds too late.
  while (IsLoading() && Clock::now() - start_ < Lasting(options_.wait_s) && interrupt_.Sleep(kPoll)) continue;
  for (;;) {
    bool answered = false;
    grpc::Status status = Try(call, &answered);
    const auto waited = Clock::now() - start_;
    const bool final = status.error_code() != grpc::StatusCode::UNAVAILABLE || answered || interrupted() ||
                       waited > Lasting(options_.wait_s);
    if (final || !MayStillServe(waited) || !interrupt_.Sleep(kPoll)) return status;
  }
}

std::optional<v1::ServerState> Connection::State() {
  v1::GetServerInfoResponse info;
  const grpc::Status status = CallOnce([&](Attempt* attempt) {
    attempt->context.set_deadline(
        std::min(attempt->context.deadline(), std::chrono::system_clock::now() + kStateTimeout));
    return generation_->GetServerInfo(&attempt->context, v1::GetServerInfoRequest(), &info);
  });
  if (!status.ok()) return std::nullopt;
  return info.state();
}

bool Connection::IsLoading() {
  const std::optional<v1::ServerState> state = State();
  return state == v1::SERVER_STATE_LOADING || state == v1::SERVER_STATE_WARMING;
}

// Draining and failed servers answer UNAVAILABLE too; waiting is for those that are loading.
bool Connection::MayStillServe(Clock::duration waited) {
  const std::optional<v1::ServerState> state = State();
  if (!state.has_value()) return waited < kUnreachableGrace;
  return state == v1::SERVER_STATE_LOADING || state == v1::SERVER_STATE_WARMING || state == v1::SERVER_STATE_SERVING;
}

}  // namespace dejavu
