// Connection: one server, as seen by a command that makes blocking calls from the main thread. Ctrl-C cancels the call
// that is under way; a second one ends the process.
#ifndef LOADTEST_CLI_CONNECTION_H_
#define LOADTEST_CLI_CONNECTION_H_

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "dejavu/v1/admin.grpc.pb.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"
#include "kernels/base/mutex.h"
#include "loadtest/client/channel.h"

namespace dejavu {

struct ConnectionOptions {
  std::string server = "127.0.0.1:50051";
  std::string admin_server = "127.0.0.1:50052";
  double timeout_s = 0;  // for a command, waiting included; 0: none
  double wait_s = 10;    // how long to wait for a server that is still loading
  ChannelOptions channel;
};

// Takes SIGINT away from the process while it lives, in every thread that is started later: make it first.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool raised() const { return raised_.load(); }
  // The call to cancel; nullptr when none is under way.
  void Guard(grpc::ClientContext* context);
  // False when interrupted before the time was over.
  bool Sleep(std::chrono::milliseconds time);

 private:
  void Listen();

  std::atomic<bool> raised_{false};
  std::atomic<bool> done_{false};
  Mutex mutex_;
  CondVar changed_;
  grpc::ClientContext* guarded_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::thread listener_;
};

struct Attempt {
  grpc::ClientContext context;
  bool answered = false;  // part of the answer is out: too late to begin again
};

class Connection {
 public:
  // INVALID_ARGUMENT for files that cannot be used.
  static absl::StatusOr<std::unique_ptr<Connection>> Open(const ConnectionOptions& options);

  v1::GenerationService::Stub& generation() { return *generation_; }
  grpc::health::v1::Health::Stub& health() { return *health_; }
  v1::AdminService::Stub& admin() { return *admin_; }
  bool interrupted() const { return interrupt_.raised(); }

  // Makes the call, again and again while the server is starting, for at most wait_s.
  grpc::Status Call(const std::function<grpc::Status(Attempt*)>& call);
  // Makes the call once.
  grpc::Status CallOnce(const std::function<grpc::Status(Attempt*)>& call);

 private:
  using Clock = std::chrono::steady_clock;

  explicit Connection(const ConnectionOptions& options) : options_(options) {}

  grpc::Status Try(const std::function<grpc::Status(Attempt*)>& call, bool* answered);
  std::optional<v1::ServerState> State();  // none: no answer
  bool IsLoading();
  bool MayStillServe(Clock::duration waited);

  const ConnectionOptions options_;
  const Clock::time_point start_ = Clock::now();
  Interrupt interrupt_;
  std::unique_ptr<v1::GenerationService::Stub> generation_;
  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace dejavu

#endif  // LOADTEST_CLI_CONNECTION_H_
