// Client: streams on several connections, each driven by gRPC's own threads; the thread that sends waits for nothing. A
// call reports its Outcome once, from one of those threads.
#ifndef LOADTEST_GENERATOR_CLIENT_H_
#define LOADTEST_GENERATOR_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "grpcpp/channel.h"
#include "kernels/base/mutex.h"
#include "loadtest/generator/recorder.h"
#include "loadtest/generator/workload.h"

namespace dejavu {

struct ClientOptions {
  std::vector<std::pair<std::string, std::string>> metadata;  // of every call
  double timeout_s = 0.0;                                     // deadline, from the scheduled time; 0: none
  int cancel_after_tokens = 1;                                // of kCancelled
  double slow_reader_ms = 0.0;                                // between two reads of kSlowReader
};

class Client {
 public:
  using OnEnd = std::function<void(const Outcome&)>;

  // `on_end` is called by several threads at once, and must be quick.
  Client(const std::vector<std::shared_ptr<grpc::Channel>>& channels, ClientOptions options, OnEnd on_end);
  // Waits for the calls that are under way.
  ~Client();

  // Two halves, so that what takes time can be done before the time has come. One thread at a time.
  class Call;
  struct DeleteCall {
    void operator()(Call* call) const;
  };
  using CallPtr = std::unique_ptr<Call, DeleteCall>;
  CallPtr Prepare(int64_t id, PlannedRequest request);
  // `scheduled` is when it should have been sent; latencies and the deadline count from there. Nothing: when it is
  // sent.
  void Send(CallPtr call, std::optional<SteadyTime> scheduled);

  int in_flight() ABSL_LOCKS_EXCLUDED(mutex_);
  // False where more than `most` are under way at `deadline`.
  bool WaitUntilAtMost(int most, SteadyTime deadline) ABSL_LOCKS_EXCLUDED(mutex_);
  // Those under way end with CANCELLED.
  void CancelAll() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Remove(Call* call) ABSL_LOCKS_EXCLUDED(mutex_);
  void Ended(const Outcome& outcome) ABSL_LOCKS_EXCLUDED(mutex_);

  const ClientOptions options_;
  const OnEnd on_end_;
  std::vector<std::unique_ptr<v1::GenerationService::Stub>> stubs_;
  size_t next_stub_ = 0;  // in turn
  Mutex mutex_;
  CondVar changed_;
  int in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_set<Call*> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_CLIENT_H_
