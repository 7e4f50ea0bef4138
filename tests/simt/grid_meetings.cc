// Where the threads of a grid meet, and what is said of those that cannot.
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "grid.h"

namespace dejavu::simt {
namespace {

std::string Text(const Where& where) {
  const std::string file = where.file;
  return absl::StrCat(file.substr(file.rfind('/') + 1), ":", where.line);
}

}  // namespace

std::string Text(const Dim3& at) { return absl::StrFormat("(%d, %d, %d)", at.x, at.y, at.z); }

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
    case State::kAtLaunch:
      return "is in GridLaunchDependents";
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

}  // namespace dejavu::simt
