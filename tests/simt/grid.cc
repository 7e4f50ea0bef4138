// A fiber is a Boost.Context fcontext on a pooled stack with a guard page. All switches go through RunBlock's loop: it
// picks a warp, then a lane of it, among those that can go on; a thread goes on until it meets others or ends. When
// none can go on and some have not ended, they wait for threads that will not come, and Diagnose says which.
#include "grid.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
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

// Of this OS thread; a grid that runs while another one waits for it is one deeper.
Stacks& PooledStacks(size_t depth) {
  static thread_local std::vector<std::unique_ptr<Stacks>> pool;
  if (depth == pool.size()) pool.push_back(std::make_unique<Stacks>());
  return *pool[depth];
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

Grid::Grid(const char* name, const Launch& launch, const std::function<void()>& body)
    : name_(name),
      launch_(launch),
      body_(body),
      block_threads_(static_cast<uint32_t>(launch.block.size())),
      outer_(running_grid),
      depth_(outer_ == nullptr ? 0 : outer_->depth_ + 1),
      stacks_(PooledStacks(depth_)),
      random_(launch.order),
      dynamic_(new char[launch.shared_bytes]),
      threads_(block_threads_),
      warps_((block_threads_ + kWarp - 1) / kWarp),
      warp_of_rank_(warps_.size()) {
  for (uint32_t i = 0; i < block_threads_; ++i) {
    threads_[i].index =
        Dim3(i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y);
  }
}

absl::Status Grid::Run() {
  running_grid = this;
  blockDim = launch_.block;
  gridDim = launch_.grid;
  std::vector<uint32_t> blocks(launch_.grid.size());
  std::iota(blocks.begin(), blocks.end(), 0);
  if (launch_.order != 0) std::shuffle(blocks.begin(), blocks.end(), random_);
  for (const uint32_t block : blocks) {
    blockIdx = Dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    RunBlock();
    if (!status_.ok()) break;
  }
  running_grid = outer_;
  return status_;
}

void Grid::RunBlock() {
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
  ended_ = at_block_ = 0;
  holds_ = 0;
  for (uint32_t i = 0; i < block_threads_; ++i) {
    Thread& thread = threads_[i];
    thread.state = State::kNew;
    thread.fake_stack = nullptr;
    thread.fiber = context::make_fcontext(stacks_.bottom(i) + Stacks::kBytes, Stacks::kBytes, &Enter);
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.waited_for_grid = false;
  }

  do {
    while (ready_ranks_ != 0 && status_.ok()) Resume(PickThread());
  } while (status_.ok() && RunBefore());
  if (status_.ok() && ended_ < block_threads_) status_ = absl::InternalError(Diagnose());
  if (status_.ok()) return;
  for (Thread& thread : threads_) {
    if (thread.state != State::kNew && thread.state != State::kEnded) Resume(thread);  // to unwind its stack
  }
}

void Grid::WaitForGrid() {
  running_->waited_for_grid = true;
  if (launch_.before == nullptr) return;
  running_->state = State::kAtGrid;
  Pause();
}

// When no thread can go on without the launch before, runs it. Returns false when that was done earlier.
bool Grid::RunBefore() {
  if (launch_.before == nullptr) return false;
  const Dim3 block_index = blockIdx;
  is_waiting_ = true;
  status_ = std::exchange(launch_.before, nullptr)();
  is_waiting_ = false;
  blockIdx = block_index;
  blockDim = launch_.block;
  gridDim = launch_.grid;
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtGrid) Release(thread);
  }
  return true;
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
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stacks_.bottom(number), Stacks::kBytes);
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
