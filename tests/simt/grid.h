// A launch while it runs (simt.h): its blocks one after another, the threads of a block as fibers that switch only
// where threads meet. Within the emulator alone; on one OS thread.
//
// Launches that overlap: while a grid runs, the next one may begin, which runs its first block until all threads of it
// wait in GridWait. It may once every thread has called GridLaunchDependents or ended. Where the first block's have,
// the other blocks are taken to have, too: nothing that they do before may be seen by others. With a kernel that calls
// it before GridWait, the one after the next may so begin while the first one runs.
#ifndef TESTS_SIMT_GRID_H_
#define TESTS_SIMT_GRID_H_

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "simt.h"

namespace dejavu::simt {

enum class State { kNew, kReady, kAtBlock, kAtWarp, kAtGrid, kAtLaunch, kEnded };

struct AsyncCopy {
  void* to;
  const void* from;  // nullptr: was read
  int group;
  int read_at;  // so many groups of the thread at the latest
  char bytes[16];
};

struct Thread {
  Dim3 index;
  State state;
  boost::context::detail::fcontext_t fiber;
  void* fake_stack;  // AddressSanitizer's, while the fiber is not running

  // Where it waits: kAtBlock, kAtWarp.
  const char* what;
  Where where;
  uint32_t mask;
  void* operand;

  std::vector<AsyncCopy> copies;
  int copy_groups;  // committed

  bool waited_for_grid, launched_dependents;
};

struct Warp {
  uint32_t ready, waiting;  // lanes
  uint32_t rank;            // the lowest goes first
};

struct StaticArray {
  const void* site;
  size_t bytes;
  std::unique_ptr<char[]> memory;
};

class Stacks;

std::string Text(const Dim3& at);

class Grid {
 public:
  // That of this OS thread, or nullptr.
  static Grid* running();

  // What is borrowed must outlive the grid.
  Grid(const Prepared& prepared, std::span<const Memory> watched);
  ~Grid();
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  // That may overlap with this one.
  void set_next(Grid* next) { next_ = next; }

  // All of it, or what is left once it has begun. The launches before it have ended.
  absl::Status Run();

  // Called by fibers, of the running thread.
  [[noreturn]] void Fail(const std::string& message);
  int MeetBlock(const char* what, bool predicate, Where where);
  void MeetWarp(const char* what, uint32_t mask, void* operand, Exchange exchange, Where where);
  void* StaticShared(const void* site, size_t bytes);
  void* DynamicShared() { return dynamic_.get(); }
  void CopyAsync(void* shared, const void* global);
  void CommitCopies();
  void FinishCopies(int groups_under_way);
  void WaitForGrid();
  void LaunchDependents();

  uint32_t lane() const { return Number(*running_) % kWarp; }
  std::string Position() const;

 private:
  uint32_t Number(const Thread& thread) const { return static_cast<uint32_t>(&thread - threads_.data()); }
  Warp& WarpOf(const Thread& thread) { return warps_[Number(thread) / kWarp]; }

  class Turn;

  void Begin();
  void StartBlock();
  void RunBlock();
  bool NextIsDue();
  bool ReleaseFrom(State state);
  void Unwind();
  uint64_t WatchedNow() const;
  Thread& PickThread();
  uint32_t PickBit(uint32_t set);
  void Resume(Thread& thread);
  void Pause();
  static void Enter(boost::context::detail::transfer_t from);
  void Release(Thread& thread);
  bool Meets(const Thread& thread, const Thread& other) const;
  std::string Waiting(const Thread& thread) const;
  std::string Diagnose() const;
  bool InShared(const void* p, size_t bytes) const;

  // Constant after construction.
  const char* const name_;
  const Launch& launch_;
  const std::function<void()>& body_;
  const std::span<const Memory> watched_;
  const uint32_t block_threads_;

  std::mt19937_64 random_;
  std::unique_ptr<Stacks> stacks_;
  std::vector<StaticArray> static_;
  std::unique_ptr<char[]> dynamic_;
  absl::Status status_;
  bool has_begun_ = false, may_pass_ = false;  // GridWait
  std::vector<uint32_t> blocks_;               // in the order in which they run
  size_t at_ = 0;                              // the running block in it

  // The grid that may begin beside this one, until it has; and when: so many steps after the beginning of a block.
  Grid* next_ = nullptr;
  bool lets_next_ = false;  // the first block has called GridLaunchDependents, in some thread at least
  size_t next_block_ = 0;
  uint64_t next_steps_ = 0;

  // Of the running block.
  Dim3 block_;
  uint64_t steps_ = 0;
  uint32_t launched_dependents_ = 0;  // or ended without
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<uint32_t> warp_of_rank_;
  uint32_t ready_ranks_ = 0;
  bool one_warp_ahead_ = true;  // or any warp at each step
  Thread* running_ = nullptr;
  uint32_t ended_ = 0, at_block_ = 0;
  int holds_ = 0, held_ = 0;  // predicates of the barrier under way, and of the one before

  // Of the OS thread.
  boost::context::detail::fcontext_t scheduler_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// Of the kernel that calls.
Grid& Running();

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_GRID_H_
