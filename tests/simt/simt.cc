// A fiber is a Boost.Context fcontext on a pooled stack with a guard page. All switches go through RunBlock's loop: it
// picks a warp, then a lane of it, among those that can go on; a thread goes on until it meets others or ends. When
// none can go on and some have not ended, they wait for threads that will not come, and Diagnose says which.
#include "simt.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <boost/context/detail/fcontext.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {
namespace {

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

// Of this OS thread; a grid that runs while another one waits for it is one deeper.
Stacks& PooledStacks(size_t depth) {
  static thread_local std::vector<std::unique_ptr<Stacks>> pool;
  if (depth == pool.size()) pool.push_back(std::make_unique<Stacks>());
  return *pool[depth];
}

enum class State { kNew, kReady, kAtBlock, kAtWarp, kAtGrid, kEnded };

// Thrown through a thread's frames once the launch has failed.
struct LaunchFailed {};

struct AsyncCopy {
  void* to;
  const void* from;
  int group;
};

struct Thread {
  Dim3 index;
  State state;
  context::fcontext_t fiber;
  void* fake_stack;  // AddressSanitizer's, while the fiber is not running

  // Where it waits: kAtBlock, kAtWarp.
  const char* what;
  Where where;
  uint32_t mask;
  void* operand;

  std::vector<AsyncCopy> copies;
  int copy_groups;  // committed

  bool waited_for_grid;
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

std::string Text(const Dim3& at) { return absl::StrFormat("(%d, %d, %d)", at.x, at.y, at.z); }

std::string Text(const Where& where) {
  const std::string file = where.file;
  return absl::StrCat(file.substr(file.rfind('/') + 1), ":", where.line);
}

class Grid;
constinit thread_local Grid* running_grid = nullptr;

class Grid {
 public:
  Grid(const char* name, const Launch& launch, const std::function<void()>& body);

  absl::Status Run();

  // Called by fibers, of the running thread.
  [[noreturn]] void Fail(const std::string& message);
  int MeetBlock(const char* what, bool predicate, Where where);
  void MeetWarp(const char* what, uint32_t mask, void* operand, Exchange exchange, Where where);
  void* StaticShared(const void* site, size_t bytes);
  void* DynamicShared() { return dynamic_.get(); }
  void CopyAsync(void* shared, const void* global);
  void CommitCopies() { ++running_->copy_groups; }
  void FinishCopies(int groups_under_way);
  void WaitForGrid();

  bool is_waiting() const { return is_waiting_; }
  uint32_t lane() const { return Number(*running_) % kWarp; }
  std::string Position() const;

 private:
  uint32_t Number(const Thread& thread) const { return static_cast<uint32_t>(&thread - threads_.data()); }
  Warp& WarpOf(const Thread& thread) { return warps_[Number(thread) / kWarp]; }

  void RunBlock();
  bool RunBefore();
  Thread& PickThread();
  uint32_t PickBit(uint32_t set);
  void Resume(Thread& thread);
  void Pause();
  static void Enter(context::transfer_t from);
  void Release(Thread& thread);
  bool Meets(const Thread& thread, const Thread& other) const;
  std::string Waiting(const Thread& thread) const;
  std::string Diagnose() const;
  bool InShared(const void* p, size_t bytes) const;

  // Constant after construction, but for launch_.before, which is run once.
  const char* const name_;
  Launch launch_;
  const std::function<void()>& body_;
  const uint32_t block_threads_;
  Grid* const outer_;  // waits in its GridWait for this one to end
  const size_t depth_;
  Stacks& stacks_;

  std::mt19937_64 random_;
  std::vector<StaticArray> static_;
  std::unique_ptr<char[]> dynamic_;
  absl::Status status_;
  bool is_waiting_ = false;  // for launch_.before

  // Of the running block.
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<uint32_t> warp_of_rank_;
  uint32_t ready_ranks_ = 0;
  bool one_warp_ahead_ = true;  // or any warp at each step
  Thread* running_ = nullptr;
  uint32_t ended_ = 0, at_block_ = 0;
  int holds_ = 0, held_ = 0;  // predicates of the barrier under way, and of the one before

  // Of the OS thread.
  context::fcontext_t scheduler_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

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

int Grid::MeetBlock(const char* what, bool predicate, Where where) {
  Thread& mine = *running_;
  mine.state = State::kAtBlock;
  mine.what = what;
  mine.where = where;
  holds_ += predicate;
  if (++at_block_ == block_threads_) {
    for (const Thread& thread : threads_) {
      if (!Meets(mine, thread)) Fail(absl::StrCat("divergent barrier: ", Diagnose()));
    }
    for (Thread& thread : threads_) Release(thread);
    at_block_ = 0;
    held_ = std::exchange(holds_, 0);
  }
  Pause();
  return held_;
}

void Grid::MeetWarp(const char* what, uint32_t mask, void* operand, Exchange exchange, Where where) {
  Thread& mine = *running_;
  if ((mask >> lane() & 1) == 0) {
    Fail(absl::StrFormat("%s at %s: mask %08x leaves out the calling lane %d", what, Text(where), mask, lane()));
  }
  mine.state = State::kAtWarp;
  mine.what = what;
  mine.where = where;
  mine.mask = mask;
  mine.operand = operand;
  Warp& warp = WarpOf(mine);
  warp.waiting |= 1u << lane();
  Thread* const lanes = &mine - lane();
  bool complete = (mask & ~warp.waiting) == 0;
  void* operands[kWarp];
  for (uint32_t left = mask; complete && left != 0; left &= left - 1) {
    const Thread& other = lanes[std::countr_zero(left)];
    complete = Meets(mine, other);
    operands[std::countr_zero(left)] = other.operand;
  }
  if (complete) {
    exchange(mask, operands);
    warp.waiting &= ~mask;
    for (uint32_t left = mask; left != 0; left &= left - 1) Release(lanes[std::countr_zero(left)]);
  }
  Pause();
}

bool Grid::Meets(const Thread& thread, const Thread& other) const {
  return thread.state == other.state && thread.where == other.where && thread.what == other.what &&
         (thread.state == State::kAtBlock || thread.mask == other.mask);
}

std::string Grid::Position() const {
  return absl::StrCat("kernel ", name_, ", block ", Text(blockIdx), ", thread ", Text(threadIdx));
}

std::string Grid::Waiting(const Thread& thread) const {
  switch (thread.state) {
    case State::kEnded:
      return "has ended";
    case State::kNew:
    case State::kReady:
      return "is running";
    case State::kAtGrid:
      return "waits in GridWait";
    case State::kAtBlock:
      return absl::StrCat("waits in ", thread.what, " at ", Text(thread.where));
    case State::kAtWarp:
      return absl::StrFormat("waits in %s at %s with mask %08x", thread.what, Text(thread.where), thread.mask);
  }
  return "";
}

// The first thread that waits for one that will not come, and what that one does.
std::string Grid::Diagnose() const {
  for (uint32_t i = 0; i < block_threads_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == State::kEnded) continue;
    const bool block = thread.state == State::kAtBlock;
    const uint32_t first = block ? 0 : i - i % kWarp, end = block ? block_threads_ : first + kWarp;
    for (uint32_t j = first; j < end; ++j) {
      if (!block && (thread.mask >> (j - first) & 1) == 0) continue;
      if (j < block_threads_ && Meets(thread, threads_[j])) continue;
      const std::string other = j < block_threads_
                                    ? absl::StrCat("thread ", Text(threads_[j].index), " ", Waiting(threads_[j]))
                                    : absl::StrCat("the block has no lane ", j - first, " in this warp");
      return absl::StrCat("kernel ", name_, ", block ", Text(blockIdx), ", thread ", Text(thread.index), " ",
                          Waiting(thread), ", but ", other);
    }
  }
  return "deadlock";
}

void* Grid::StaticShared(const void* site, size_t bytes) {
  size_t total = bytes;
  for (const StaticArray& array : static_) {
    if (array.site == site) return array.memory.get();
    total += array.bytes;
  }
  if (total > kMostStaticShared) {
    Fail(absl::StrFormat("%d bytes of static shared memory; a block has %d", total, kMostStaticShared));
  }
  StaticArray& array = static_.emplace_back(StaticArray{site, bytes, std::unique_ptr<char[]>(new char[bytes])});
  std::fill_n(array.memory.get(), bytes, '\xFF');
  return array.memory.get();
}

bool Grid::InShared(const void* p, size_t bytes) const {
  const auto within = [&](const char* memory, size_t size) {
    const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(memory);
    return at >= begin && at + bytes <= begin + size;
  };
  return within(dynamic_.get(), launch_.shared_bytes) ||
         std::any_of(static_.begin(), static_.end(),
                     [&](const StaticArray& array) { return within(array.memory.get(), array.bytes); });
}

void Grid::CopyAsync(void* shared, const void* global) {
  if (!InShared(shared, 16)) Fail("CopyAsync16 writes beyond shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) Fail("CopyAsync16: the target is not aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) Fail("CopyAsync16: the source is not aligned to 16 bytes");
  std::memset(shared, 0xFF, 16);
  running_->copies.push_back({shared, global, running_->copy_groups});
}

void Grid::FinishCopies(int groups_under_way) {
  std::vector<AsyncCopy>& copies = running_->copies;
  const int finished = running_->copy_groups - groups_under_way;
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const AsyncCopy& c) { return c.group >= finished; });
  std::for_each(copies.begin(), end, [](const AsyncCopy& copy) { std::memcpy(copy.to, copy.from, 16); });
  copies.erase(copies.begin(), end);
}

// So that AddressSanitizer's and UBSan's reports name the thread, too.
void PrintPosition() {
  if (running_grid != nullptr) std::fprintf(stderr, "in %s\n", running_grid->Position().c_str());
}

absl::Status Check(const char* name, uint32_t most_threads, const Launch& launch) {
  const auto refuse = [&](const auto&... message) {
    return absl::InvalidArgumentError(absl::StrCat("kernel ", name, ": ", message...));
  };
  if (launch.block.size() == 0 || launch.block.size() > most_threads || most_threads > kMostThreads) {
    return refuse("a block of ", Text(launch.block), " threads; the kernel allows ", most_threads);
  }
  if (launch.grid.size() == 0 || launch.grid.x > 0x7FFFFFFF || launch.grid.y > 65535 || launch.grid.z > 65535) {
    return refuse("a grid of ", Text(launch.grid), " blocks; CUDA allows (2147483647, 65535, 65535), and none empty");
  }
  if (launch.shared_bytes > kMostShared) {
    return refuse(launch.shared_bytes, " bytes of dynamic shared memory; a block has ", kMostShared);
  }
  return absl::OkStatus();
}

}  // namespace

// UBSan calls this by its name, after each report.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report() { PrintPosition(); }

absl::Status Run(const char* name, uint32_t most_threads, const Launch& launch, const std::function<void()>& body) {
  CHECK(running_grid == nullptr || running_grid->is_waiting()) << "a kernel launches " << name;
  [[maybe_unused]] static const bool once = (__sanitizer_set_death_callback(PrintPosition), true);
  RETURN_IF_ERROR(Check(name, most_threads, launch));
  return Grid(name, launch, body).Run();
}

void Fail(const std::string& message) { Running().Fail(message); }
int MeetBlock(const char* what, bool predicate, Where where) { return Running().MeetBlock(what, predicate, where); }
void MeetWarp(const char* what, uint32_t mask, void* operand, Exchange exchange, Where where) {
  Running().MeetWarp(what, mask, operand, exchange, where);
}
uint32_t Lane() { return Running().lane(); }
void* StaticShared(const void* site, size_t bytes) { return Running().StaticShared(site, bytes); }
void* DynamicShared() { return Running().DynamicShared(); }

uint32_t Vote(const char* what, uint32_t mask, bool predicate, Where where) {
  struct Operand {
    bool predicate;
    uint32_t votes;
  } operand{predicate, 0};
  MeetWarp(
      what, mask, &operand,
      [](uint32_t mask, void* const* operands) {
        uint32_t votes = 0;
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          if (mask >> lane & 1) votes |= uint32_t{static_cast<Operand*>(operands[lane])->predicate} << lane;
        }
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          if (mask >> lane & 1) static_cast<Operand*>(operands[lane])->votes = votes;
        }
      },
      where);
  return operand.votes;
}

}  // namespace dejavu::simt

namespace dejavu::cuda {
namespace {

using simt::kWarp;

struct Half {
  static constexpr int kPerRegister = 2;
  static float Element(uint32_t bits) { return FloatFromFloat16(static_cast<uint16_t>(bits)); }
};
struct BFloat16 {
  static constexpr int kPerRegister = 2;
  static float Element(uint32_t bits) { return FloatFromBFloat16(static_cast<uint16_t>(bits)); }
};
struct Int8 {
  static constexpr int kPerRegister = 4;
  static int32_t Element(uint32_t bits) { return static_cast<int8_t>(bits); }
};

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "... m16n8k32". With E elements in a register, lane l holds of
//   A [16, 8 E], register r: row l/4 + 8 (r%2),  columns E (l%4) + 4 E (r/2) + 0 ... E-1
//   B [8 E, 8],  register r: column l/4,         rows    E (l%4) + 4 E r     + 0 ... E-1
//   D [16, 8],   element i:  row l/4 + 8 (i/2),  column  2 (l%4) + i%2
template <typename Type, typename Sum>
void Mma(const char* what, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  struct Operand {
    Sum* d;
    const uint32_t *a, *b;
  } operand{d, a, b};
  simt::MeetWarp(
      what, simt::kAllLanes, &operand,
      [](uint32_t, void* const* operands) {
        constexpr int E = Type::kPerRegister, K = 8 * E, kBits = 32 / E;
        Sum left[16][K], right[K][8];
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          const auto& of = *static_cast<Operand*>(operands[lane]);
          for (int e = 0; e < E; ++e) {
            const int k = E * (lane % 4) + e;
            for (int r = 0; r < 4; ++r)
              left[lane / 4 + 8 * (r % 2)][k + 4 * E * (r / 2)] = Type::Element(of.a[r] >> (kBits * e));
            for (int r = 0; r < 2; ++r) right[k + 4 * E * r][lane / 4] = Type::Element(of.b[r] >> (kBits * e));
          }
        }
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          Sum* const sums = static_cast<Operand*>(operands[lane])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            Sum sum = sums[i];
            for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
            sums[i] = sum;
          }
        }
      },
      where);
}

}  // namespace

uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<Half>("MmaF16", d, a, b, where);
}
void MmaBF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<BFloat16>("MmaBF16", d, a, b, where);
}
void MmaS8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<Int8>("MmaS8", d, a, b, where);
}

void CopyAsync16(void* shared, const void* global) { simt::Running().CopyAsync(shared, global); }
void CopyAsyncCommit() { simt::Running().CommitCopies(); }
void FinishCopies(int groups_under_way) { simt::Running().FinishCopies(groups_under_way); }
void GridWait() { simt::Running().WaitForGrid(); }

}  // namespace dejavu::cuda
