// Every call is made of messages between two ranks that are begun and then tested until they are done: MPI's own
// collectives cannot be waited for with a limit, and the non-blocking ones take twice as long. For an AllReduce each
// rank sends its values to all others and adds what it has received in the order of ranks. Two ranks, 8 KB, p50 on two
// cores of an EPYC: 2.1 us; MPI_Allreduce 7.7 (3.2 with the module's eager limit), MPI_Iallreduce 13.3.
#include "kernels/mpi/open_mpi.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/load_module.h"
#include "kernels/base/own_time.h"
#include "kernels/base/processors.h"
#include "kernels/base/status_macros.h"
#include "kernels/group/ordered_sum.h"
#include "kernels/mpi/abi.h"

namespace dejavu {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr int64_t kPieceFloats = 64 << 10;
constexpr int64_t kPieceBytes = int64_t{1} << 30;  // MPI counts in int
constexpr double kLongestLeave_s = 10;             // whatever the limit
constexpr int kTests = 200;                        // before the clock is read
constexpr auto kSpinTime = microseconds(200);
constexpr auto kShortestSleep = microseconds(20), kLongestSleep = microseconds(1000);
constexpr int kSleepShare = 50;  // of the time waited so far: a sleep makes no wait much longer

// Messages of different calls never meet.
struct Call {
  int tag;
  const char* name;
};
constexpr Call kMpiAllReduce{1, "AllReduce"}, kMpiBroadcast{2, "Broadcast"}, kMpiGather{3, "Gather"},
    kMpiLeave{4, "leaving"};

int FromEnvironment(const char* name) {
  const char* const value = std::getenv(name);
  int result = 0;
  return value != nullptr && absl::SimpleAtoi(value, &result) ? result : 0;
}

class OpenMpiCommunicator final : public Communicator {
 public:
  OpenMpiCommunicator(const DejavuMpiModule* mpi, const MpiOptions& options, int rank, int size)
      : mpi_(mpi),
        rank_(rank),
        size_(size),
        limit_s_(options.timeout_s),
        broadcast_limit_s_(options.broadcast_timeout_s > 0 ? options.broadcast_timeout_s : options.timeout_s),
        buffers_(size),
        parts_(size) {
    for (auto& buffer : buffers_) buffer.reset(new float[kPieceFloats]);
  }

  ~OpenMpiCommunicator() override {
    if (failed_) {
      Abandon();
      return;
    }
    try {
      // Nobody ends MPI unless everybody does.
      char nothing = 0;
      for (int peer = 0; peer < size_; ++peer) {
        if (peer == rank_) continue;
        Receive(buffers_[peer].get(), 1, peer, kMpiLeave);
        Send(&nothing, 1, peer, kMpiLeave);
      }
      Await(kMpiLeave, std::min(limit_s_, kLongestLeave_s), /*long_wait=*/true);
      if (mpi_->leave() != 0) std::fprintf(stderr, "%s\n", mpi_->error());
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "MPI is not ended: %s\n", error.what());
      Abandon();
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  CommunicatorStats stats() const override { return stats_; }
  void SetLimit(double seconds) override { limit_s_ = broadcast_limit_s_ = seconds; }

  void AllReduce(Tensor x) override {
    CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
    const auto start = Clock::now();
    const bool contiguous = x.stride == x.cols || x.rows == 1;
    for (int64_t first = 0; first < x.rows * x.cols; first += kPieceFloats) {
      const int64_t count = std::min(kPieceFloats, x.rows * x.cols - first);
      const float* own = x.row<float>(0) + first;
      if (!contiguous) {
        own = buffers_[rank_].get();
        ForEachRun(x, first, count, [&](const float* run, int64_t offset, int64_t length) {
          std::memcpy(buffers_[rank_].get() + offset, run, length * sizeof(float));
        });
      }
      for (int peer = 0; peer < size_; ++peer) {
        if (peer != rank_) Receive(buffers_[peer].get(), count * sizeof(float), peer, kMpiAllReduce);
      }
      for (int peer = 0; peer < size_; ++peer) {
        if (peer != rank_) Send(own, count * sizeof(float), peer, kMpiAllReduce);
      }
      Await(kMpiAllReduce, limit_s_, /*long_wait=*/false);
      ForEachRun(x, first, count, [&](float* run, int64_t offset, int64_t length) {
        for (int peer = 0; peer < size_; ++peer) parts_[peer] = peer == rank_ ? run : buffers_[peer].get() + offset;
        SumInOrder(parts_, length, run);
      });
    }
    stats_.all_reduces += 1;
    stats_.all_reduce_ns += (Clock::now() - start).count();
  }

  void Broadcast(void* data, int64_t bytes) override {
    for (int64_t first = 0; first < bytes; first += kPieceBytes) {
      char* const piece = static_cast<char*>(data) + first;
      const int64_t count = std::min(kPieceBytes, bytes - first);
      if (rank_ != 0) {
        Receive(piece, count, 0, kMpiBroadcast);
        Await(kMpiBroadcast, broadcast_limit_s_,
              /*long_wait=*/true);
        continue;
      }
      for (int peer = 1; peer < size_; ++peer) Send(piece, count, peer, kMpiBroadcast);
      Await(kMpiBroadcast, limit_s_, /*long_wait=*/false);
    }
  }

  void Gather(void* all, const void* mine, int64_t bytes) override {
    for (int64_t first = 0; first < bytes; first += kPieceBytes) {
      const char* const piece = static_cast<const char*>(mine) + first;
      const int64_t count = std::min(kPieceBytes, bytes - first);
      if (rank_ != 0) {
        Send(piece, count, 0, kMpiGather);
      } else {
        char* const to = static_cast<char*>(all) + first;
        for (int peer = 1; peer < size_; ++peer) Receive(to + peer * bytes, count, peer, kMpiGather);
        std::memcpy(to, piece, count);
      }
      Await(kMpiGather, limit_s_, /*long_wait=*/false);
    }
  }

 private:
  void Send(const void* data, int64_t bytes, int peer, const Call& call) {
    if (failed_) Fail(call, "in a group that has failed");
    if (mpi_->send(data, bytes, peer, call.tag) != 0) Fail(call, mpi_->error());
  }
  void Receive(void* data, int64_t bytes, int peer, const Call& call) {
    if (failed_) Fail(call, "in a group that has failed");
    if (mpi_->receive(data, bytes, peer, call.tag) != 0) Fail(call, mpi_->error());
  }

  // Until all messages are done. After a while the processor goes to others, in a long wait for longer.
  void Await(const Call& call, double limit_s, bool long_wait) {
    int32_t peer = 0;
    for (int i = 0; i < kTests; ++i) {
      if (mpi_->test(&peer) != 0) Fail(call, mpi_->error());
      if (peer < 0) return;
    }
    const auto start = Clock::now();
    OwnTime own(start);
    while (true) {
      if (mpi_->test(&peer) != 0) Fail(call, mpi_->error());
      if (peer < 0) return;
      const auto now = Clock::now();
      const auto waited = now - start;
      if (own.Count(now) > limit_s) {
        Fail(call, absl::StrCat("waited for rank ", peer, ", which did not come within ", limit_s, " s"));
      }
      if (waited < kSpinTime) continue;
      if (!long_wait) {
        sched_yield();
        continue;
      }
      std::this_thread::sleep_for(std::clamp<Clock::duration>(waited / kSleepShare, kShortestSleep, kLongestSleep));
    }
  }

  [[noreturn]] void Fail(const Call& call, const std::string& what) {
    failed_ = true;
    throw PeerLost(absl::StrCat(call.name, ": rank ", rank_, " ", what));
  }

  // Messages under way may still write into the buffers.
  void Abandon() {
    for (auto& buffer : buffers_) (void)buffer.release();
  }

  const DejavuMpiModule* const mpi_;
  const int rank_, size_;
  double limit_s_, broadcast_limit_s_;
  std::vector<std::unique_ptr<float[]>> buffers_;  // [size][kPieceFloats]: what comes from a rank; own: x in one piece
  std::vector<const float*> parts_;                // [size]
  bool failed_ = false;                            // a call threw
  CommunicatorStats stats_;
};

}  // namespace

bool UnderMpirun() { return FromEnvironment("OMPI_COMM_WORLD_SIZE") > 0; }
int MpirunSize() { return std::max(1, FromEnvironment("OMPI_COMM_WORLD_SIZE")); }
int MpirunRank() { return FromEnvironment("OMPI_COMM_WORLD_RANK"); }

MpirunPlace GetMpirunPlace() {
  MpirunPlace place;
  place.rank = FromEnvironment("OMPI_COMM_WORLD_LOCAL_RANK");
  place.size = std::max(1, FromEnvironment("OMPI_COMM_WORLD_LOCAL_SIZE"));
  const Processors processors = FindProcessors();
  place.bound = processors.allowed < processors.online;
  return place;
}

absl::StatusOr<std::unique_ptr<Communicator>> JoinMpiGroup(const MpiOptions& options) {
  // Without mpirun MPI would start a daemon of its own, and stop the process where it cannot.
  if (!UnderMpirun()) return absl::FailedPreconditionError("this process was not started by Open MPI's mpirun");
  ASSIGN_OR_RETURN(const DejavuMpiModule* const mpi,
                   LoadModuleAs<DejavuMpiModule>({.what = "MPI",
                                                  .variable = "DEJAVU_MPI_MODULE",
                                                  .file = "libdejavu_mpi.so",
                                                  .entry = DEJAVU_MPI_ENTRY,
                                                  .version = DEJAVU_MPI_ABI_VERSION}));
  int32_t rank = 0, size = 0;
  if (mpi->join(2 * MpirunSize(), &rank, &size) != 0) return absl::UnavailableError(mpi->error());
  return std::make_unique<OpenMpiCommunicator>(mpi, options, rank, size);
}

}  // namespace dejavu
