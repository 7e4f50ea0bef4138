// A call goes in steps of at most a buffer. In a step a rank writes what it has to say into one of its two buffers,
// announces the step, waits for those whose data it needs and reads their buffers in place. Two buffers make one wait
// per step enough: a rank that has announced a step has read all that it needs of the step before, so what it needed of
// the step before that may be overwritten.
#include "kernels/group/thread_group.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/doorbell.h"
#include "kernels/base/own_time.h"
#include "kernels/base/pause.h"
#include "kernels/base/processors.h"
#include "kernels/group/ordered_sum.h"

namespace dejavu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kBufferBytes = 64 << 10;
constexpr int64_t kBufferFloats = kBufferBytes / sizeof(float);
// Pauses of 10 to 40 ns, up to 2 ms in all: CPUs that share a memory differ by a quarter for a millisecond and longer,
// and a sleeper of a virtual machine takes 50 us to wake (measured: spins of 50 us made 2 ranks 4 % slower).
constexpr int kLongSpins = 50000;
constexpr int kShortSpins = 50;  // with more ranks than CPUs the one that is waited for may need this one
constexpr int kNobody = -1;
constexpr char kAllReduce[] = "AllReduce", kBroadcast[] = "Broadcast", kGather[] = "Gather";  // compared by address

// What rank `i` says. The announcement orders the rest: written before it, read after it.
struct alignas(128) Slot {
  std::atomic<int64_t> announced{0};  // steps
  std::atomic<bool> left{false};
  struct {
    const char* call = nullptr;
    int64_t bytes = 0;
  } said[2];  // by step % 2, as the buffers
  std::unique_ptr<float[]> buffers[2];
};

struct Group {
  Group(int size, const ThreadGroupOptions& options)
      : size(size),
        options(options),
        spins(size <= static_cast<int>(ProcessCpus().size()) ? kLongSpins : kShortSpins),
        slots(new Slot[size]) {
    for (int rank = 0; rank < size; ++rank) {
      for (auto& buffer : slots[rank].buffers) buffer.reset(new float[kBufferFloats]);  // first touched by its rank
    }
  }

  // Constant after construction.
  const int size;
  const ThreadGroupOptions options;
  const int spins;
  const std::unique_ptr<Slot[]> slots;

  std::atomic<int> failed_rank{kNobody};  // whose call threw first
  Doorbell bell;                          // rung when something was announced, somebody left or failed
};

class ThreadGroupCommunicator final : public Communicator {
 public:
  ThreadGroupCommunicator(std::shared_ptr<Group> group, int rank)
      : group_(std::move(group)),
        rank_(rank),
        parts_(group_->size),
        limit_s_(group_->options.timeout_s),
        broadcast_limit_s_(group_->options.broadcast_timeout_s > 0 ? group_->options.broadcast_timeout_s : limit_s_) {}

  ~ThreadGroupCommunicator() override {
    mine().left = true;
    group_->bell.Ring();
  }

  int rank() const override { return rank_; }
  int size() const override { return group_->size; }
  CommunicatorStats stats() const override { return stats_; }
  void SetLimit(double seconds) override { limit_s_ = broadcast_limit_s_ = seconds; }

  void AllReduce(Tensor x) override {
    CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
    const auto start = Clock::now();
    for (int64_t first = 0; first < x.rows * x.cols; first += kBufferFloats) {
      const int64_t count = std::min(kBufferFloats, x.rows * x.cols - first);
      Begin(kAllReduce);
      ForEachRun(x, first, count, [&](const float* run, int64_t offset, int64_t length) {
        std::memcpy(Buffer(rank_) + offset, run, length * sizeof(float));
      });
      Announce(kAllReduce, count * sizeof(float));
      for (int peer = 0; peer < group_->size; ++peer) {
        if (peer != rank_) AwaitData(kAllReduce, peer, count * sizeof(float), limit_s_);
      }
      ForEachRun(x, first, count, [&](float* run, int64_t offset, int64_t length) {
        for (int peer = 0; peer < group_->size; ++peer) parts_[peer] = peer == rank_ ? run : Buffer(peer) + offset;
        SumInOrder(parts_, length, run);
      });
    }
    stats_.all_reduces += 1;
    stats_.all_reduce_ns += (Clock::now() - start).count();
  }

  void Broadcast(void* data, int64_t bytes) override {
    for (int64_t first = 0; first < bytes; first += kBufferBytes) {
      char* const piece = static_cast<char*>(data) + first;
      const int64_t count = std::min(kBufferBytes, bytes - first);
      Begin(kBroadcast);
      if (rank_ == 0) std::memcpy(Buffer(0), piece, count);
      Announce(kBroadcast, count);
      if (rank_ == 0) continue;
      AwaitData(kBroadcast, 0, count, broadcast_limit_s_);
      std::memcpy(piece, Buffer(0), count);
    }
  }

  void Gather(void* all, const void* mine, int64_t bytes) override {
    for (int64_t first = 0; first < bytes; first += kBufferBytes) {
      const char* const piece = static_cast<const char*>(mine) + first;
      const int64_t count = std::min(kBufferBytes, bytes - first);
      Begin(kGather);
      if (rank_ != 0) std::memcpy(Buffer(rank_), piece, count);
      Announce(kGather, count);
      if (rank_ != 0) continue;
      char* const to = static_cast<char*>(all) + first;
      std::memcpy(to, piece, count);
      for (int peer = 1; peer < group_->size; ++peer) {
        AwaitData(kGather, peer, count, limit_s_);
        std::memcpy(to + peer * bytes, Buffer(peer), count);
      }
    }
  }

 private:
  Slot& mine() { return group_->slots[rank_]; }
  // Of this step.
  float* Buffer(int rank) { return group_->slots[rank].buffers[step_ % 2].get(); }

  // Afterwards this rank's buffer may be written.
  void Begin(const char* call) {
    if (group_->failed_rank.load(std::memory_order_relaxed) != kNobody) FailAsOthers(call);
    for (int peer = 0; peer < group_->size; ++peer) {
      if (peer != rank_) Await(call, peer, step_, limit_s_);
    }
    ++step_;
  }

  void Announce(const char* call, int64_t bytes) {
    mine().said[step_ % 2] = {call, bytes};
    mine().announced.store(step_);
    group_->bell.Ring();
  }

  // Afterwards the peer's buffer may be read.
  void AwaitData(const char* call, int peer, int64_t bytes, double limit_s) {
    Await(call, peer, step_, limit_s);
    const auto& said = group_->slots[peer].said[step_ % 2];
    CHECK(said.call == call && said.bytes == bytes)
        << call << " of " << bytes << " bytes at rank " << rank_ << " meets " << said.call << " of " << said.bytes
        << " bytes at rank " << peer;
  }

  void Await(const char* call, int peer, int64_t step, double limit_s) {
    const Slot& slot = group_->slots[peer];
    for (int i = 0; i < group_->spins; ++i) {
      if (slot.announced.load(std::memory_order_acquire) >= step) return;
      Pause();
    }
    OwnTime waited(Clock::now());
    while (true) {
      const bool left = slot.left.load(), failed = group_->failed_rank.load() != kNobody;
      if (slot.announced.load(std::memory_order_acquire) >= step) return;
      if (left) Fail(absl::StrCat(call, ": rank ", rank_, " waited for rank ", peer, ", which has left the group"));
      if (failed) FailAsOthers(call);
      const double rest_s = limit_s - waited.Count(Clock::now());
      if (rest_s <= 0) {
        Fail(absl::StrCat(call, ": rank ", rank_, " waited for rank ", peer, ", which did not come within ", limit_s,
                          " s"));
      }
      // Not sched_yield: two ranks that met on one CPU would stay there, while somebody who wakes up goes to an idle
      // one.
      const auto something_happened = [&] {
        return slot.announced.load() >= step || slot.left.load() || group_->failed_rank.load() != kNobody;
      };
      group_->bell.Sleep(something_happened, std::min(rest_s, OwnTime::kTickS));
    }
  }

  [[noreturn]] void FailAsOthers(const char* call) {
    Fail(absl::StrCat(call, ": rank ", rank_, " is in a group that failed at rank ", group_->failed_rank.load()));
  }

  [[noreturn]] void Fail(const std::string& message) {
    int nobody = kNobody;
    group_->failed_rank.compare_exchange_strong(nobody, rank_);
    group_->bell.Ring();
    throw PeerLost(message);
  }

  const std::shared_ptr<Group> group_;
  const int rank_;
  std::vector<const float*> parts_;  // [size]
  double limit_s_, broadcast_limit_s_;
  int64_t step_ = 0;  // the last one begun
  CommunicatorStats stats_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeThreadGroup(int size, const ThreadGroupOptions& options) {
  CHECK(size >= 1) << size << " ranks";
  const auto group = std::make_shared<Group>(size, options);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(std::make_unique<ThreadGroupCommunicator>(group, rank));
  return ranks;
}

}  // namespace dejavu
