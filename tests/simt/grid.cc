// A fiber is a Boost.Context fcontext on a pooled stack with a guard page. All switches go through RunBlock's loop: it
// picks a warp, then a lane of it, among those that can go on; a thread goes on until it meets others or ends. When
// none can go on and some have not ended, they wait for the launch before, or for threads that will not come, and
// Diagnose says which.
#include "grid.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace dejavu::simt {

namespace context = boost::context::detail;

// The stacks of a grid's fibers.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 << 10, kGuardBytes = 4 << 10, kStride = kBytes + kGuardBytes;

  Stacks()
      : memory_(static_cast<char*>(mmap(nullptr, kMostThreads * kStride, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    CHECK(memory_ != MAP_FAILED) << "no memory for " << kMostThreads << " stacks";
    for (uint32_t i = 0; i < kMostThreads; ++i) CHECK(mprotect(bottom(i) - kGuardBytes, kGuardBytes, PROT_NONE) == 0);
  }
  ~Stacks() { munmap(memory_, kMostThreads * kStride); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* bottom(uint32_t i) const { return memory_ + i * kStride + kGuardBytes; }

 private:
  char* const memory_;
};

namespace {

// Of this OS thread, when no grid has them.
thread_local std::vector<std::unique_ptr<Stacks>> idle_stacks;

std::unique_ptr<Stacks> TakeStacks() {
  if (idle_stacks.empty()) return std::make_unique<Stacks>();
  std::unique_ptr<Stacks> stacks = std::move(idle_stacks.back());
  idle_stacks.pop_back();
  return stacks;
}

constinit thread_local Grid* running_grid = nullptr;

// Thrown through a thread's frames once the launch has failed.
struct LaunchFailed {};

}  // namespace

Grid* Grid::running() { return running_grid; }

Grid& Running() {
  CHECK(running_grid != nullptr) << "called outside of a kernel";
  return *running_grid;
}

// While a grid's threads run, CUDA's variables are theirs.
class Grid::Turn {
 public:
  explicit Turn(Grid* grid) : outer_(std::exchange(running_grid, grid)) { Show(grid); }
  ~Turn() {
    running_grid = outer_;
    if (outer_ != nullptr) Show(outer_);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  static void Show(const Grid* grid) {
    blockIdx = grid->block_;
    blockDim = grid->launch_.block;
    gridDim = grid->launch_.grid;
  }

  Grid* const outer_;
};

Grid::Grid(const Prepared& prepared, std::span<const Memory> watched)
    : name_(prepared.name),
      launch_(prepared.launch),
      body_(prepared.body),
      watched_(watched),
      block_threads_(static_cast<uint32_t>(launch_.block.size())),
      random_(launch_.order),
      dynamic_(new char[launch_.shared_bytes]),
      blocks_(launch_.grid.size()),
      threads_(block_threads_),
      warps_((block_threads_ + kWarp - 1) / kWarp),
      warp_of_rank_(warps_.size()) {
  for (uint32_t i = 0; i < block_threads_; ++i) {
    threads_[i].index =
        Dim3(i % launch_.block.x, i / launch_.block.x % launch_.block.y, i / launch_.block.x / launch_.block.y);
  }
  std::iota(blocks_.begin(), blocks_.end(), 0);
  if (launch_.order == 0) return;
  std::shuffle(blocks_.begin(), blocks_.end(), random_);
  if (random_() % 2 == 0) {
    next_block_ = random_() % blocks_.size();
    next_steps_ = random_() % (2 * block_threads_);
  }
}

Grid::~Grid() {
  Unwind();
  if (stacks_ != nullptr) idle_stacks.push_back(std::move(stacks_));
}

void Grid::Begin() {
  const Turn turn(this);
  const uint64_t before = WatchedNow();
  StartBlock();
  RunBlock();
  if (status_.ok() && WatchedNow() != before) {
    status_ = absl::InternalError(
        absl::StrCat("kernel ", name_, ", block ", Text(block_), ": changes memory of the device before GridWait"));
  }
}

absl::Status Grid::Run() {
  const Turn turn(this);
  may_pass_ = true;
  if (has_begun_) {
    ReleaseFrom(State::kAtGrid);
  } else {
    StartBlock();
  }
  while (status_.ok()) {
    RunBlock();
    if (status_.ok() && ended_ < block_threads_) status_ = absl::InternalError(Diagnose());
    if (!status_.ok() || ++at_ == blocks_.size()) break;
    StartBlock();
  }
  return status_;
}

void Grid::StartBlock() {
  if (stacks_ == nullptr) stacks_ = TakeStacks();
  has_begun_ = true;
  const Dim3& grid = launch_.grid;
  const uint32_t block = blocks_[at_];
  blockIdx = block_ = Dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
  std::fill_n(dynamic_.get(), launch_.shared_bytes, '\xFF');
  for (StaticArray& array : static_) std::fill_n(array.memory.get(), array.bytes, '\xFF');

  std::iota(warp_of_rank_.begin(), warp_of_rank_.end(), 0);
  if (launch_.order != 0) {
    std::shuffle(warp_of_rank_.begin(), warp_of_rank_.end(), random_);
    one_warp_ahead_ = random_() % 2 == 0;
  }
  for (uint32_t rank = 0; rank < warps_.size(); ++rank) {
    const uint32_t warp = warp_of_rank_[rank], lanes = std::min(kWarp, block_threads_ - warp * kWarp);
    warps_[warp] = {.ready = kAllLanes >> (kWarp - lanes), .waiting = 0, .rank = rank};
  }
  ready_ranks_ = kAllLanes >> (32 - warps_.size());
  ended_ = at_block_ = launched_dependents_ = 0;
  holds_ = 0;
  steps_ = 0;
  for (uint32_t i = 0; i < block_threads_; ++i) {
    Thread& thread = threads_[i];
    thread.state = State::kNew;
    thread.fake_stack = nullptr;
    thread.fiber = context::make_fcontext(stacks_->bottom(i) + Stacks::kBytes, Stacks::kBytes, &Enter);
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.waited_for_grid = thread.launched_dependents = false;
  }
}

// Until no thread can go on.
void Grid::RunBlock() {
  do {
    while (status_.ok() && (ready_ranks_ != 0 || NextIsDue())) {
      if (NextIsDue()) std::exchange(next_, nullptr)->Begin();
      if (ready_ranks_ != 0) Resume(PickThread());
      ++steps_;
    }
  } while (status_.ok() && ReleaseFrom(State::kAtLaunch));
  if (!status_.ok()) Unwind();
}

bool Grid::NextIsDue() {
  if (next_ == nullptr || !lets_next_ || (at_ == 0 && launched_dependents_ < block_threads_)) return false;
  return at_ > next_block_ || (at_ == next_block_ && steps_ >= next_steps_);
}

// Of the threads of a failed launch.
void Grid::Unwind() {
  if (!has_begun_ || ended_ == block_threads_) return;
  if (status_.ok()) status_ = absl::CancelledError("a launch before it failed");
  const Turn turn(this);
  for (Thread& thread : threads_) {
    if (thread.state != State::kNew && thread.state != State::kEnded) Resume(thread);
  }
  ended_ = block_threads_;
}

// Of what must not change before GridWait; eight sums of their own, so that the compiler takes them at once.
uint64_t Grid::WatchedNow() const {
  uint64_t sums[8] = {};
  for (const Memory& memory : watched_) {
    const char* at = memory.data();
    for (size_t left = memory.size(); left != 0;) {
      uint64_t words[8] = {};
      const size_t bytes = std::min(left, sizeof(words));
      std::memcpy(words, at, bytes);
      for (int i = 0; i < 8; ++i) sums[i] = (sums[i] << 5 | sums[i] >> 59) + words[i];
      at += bytes;
      left -= bytes;
    }
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all = all * 0x9E3779B97F4A7C15 + sum;
  return all;
}

void Grid::WaitForGrid() {
  running_->waited_for_grid = true;
  if (may_pass_) return;
  running_->state = State::kAtGrid;
  Pause();
}

// A thread that comes first stays here until its block's others have come or must wait for it: so the next launch
// begins before anything that this one does afterwards.
void Grid::LaunchDependents() {
  if (std::exchange(running_->launched_dependents, true)) return;
  ++launched_dependents_;
  lets_next_ = true;
  if (next_ == nullptr || at_ != 0 || next_block_ != 0 || next_steps_ != 0) return;
  running_->state = State::kAtLaunch;
  Pause();
}

bool Grid::ReleaseFrom(State state) {
  bool any = false;
  for (Thread& thread : threads_) {
    if (thread.state != state) continue;
    Release(thread);
    any = true;
  }
  return any;
}

Thread& Grid::PickThread() {
  const uint32_t rank = one_warp_ahead_ ? std::countr_zero(ready_ranks_) : PickBit(ready_ranks_);
  const uint32_t warp = warp_of_rank_[rank];
  return threads_[warp * kWarp + PickBit(warps_[warp].ready)];
}

// The lowest in the natural order, else the first from a random one on.
uint32_t Grid::PickBit(uint32_t set) {
  if (launch_.order == 0) return std::countr_zero(set);
  const uint32_t first = random_() % 32;
  return (first + std::countr_zero(std::rotr(set, static_cast<int>(first)))) % 32;
}

void Grid::Resume(Thread& thread) {
  const uint32_t number = Number(thread);
  Warp& warp = warps_[number / kWarp];
  warp.ready &= ~(1u << number % kWarp);
  if (warp.ready == 0) ready_ranks_ &= ~(1u << warp.rank);
  thread.state = State::kReady;
  running_ = &thread;
  threadIdx = thread.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stacks_->bottom(number), Stacks::kBytes);
  thread.fiber = context::jump_fcontext(thread.fiber, this).fctx;
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
}

void Grid::Pause() {
  Thread& thread = *running_;
  __sanitizer_start_switch_fiber(&thread.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  scheduler_ = context::jump_fcontext(scheduler_, nullptr).fctx;
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
  if (!status_.ok()) throw LaunchFailed{};
}

// Never returns, so that nothing of its frame may be poisoned: the next block starts on the same stack.
__attribute__((no_sanitize("address"))) void Grid::Enter(context::transfer_t from) {
  Grid& grid = *static_cast<Grid*>(from.data);
  grid.scheduler_ = from.fctx;
  __sanitizer_finish_switch_fiber(nullptr, &grid.scheduler_stack_, &grid.scheduler_stack_bytes_);
  try {
    grid.body_();
    if (grid.launch_.overlaps && !grid.running_->waited_for_grid) {
      grid.Fail("ended without GridWait in a launch that may overlap with the one before it");
    }
  } catch (const LaunchFailed&) {
  }
  grid.running_->state = State::kEnded;
  ++grid.ended_;
  if (!grid.running_->launched_dependents) ++grid.launched_dependents_;
  __sanitizer_start_switch_fiber(nullptr, grid.scheduler_stack_, grid.scheduler_stack_bytes_);
  context::jump_fcontext(grid.scheduler_, nullptr);
  __builtin_unreachable();
}

void Grid::Release(Thread& thread) {
  Warp& warp = WarpOf(thread);
  thread.state = State::kReady;
  warp.ready |= 1u << Number(thread) % kWarp;
  ready_ranks_ |= 1u << warp.rank;
}

void Grid::Fail(const std::string& message) {
  status_ = absl::InternalError(absl::StrCat(Position(), ": ", message));
  throw LaunchFailed{};
}

}  // namespace dejavu::simt
