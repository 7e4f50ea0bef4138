#include "simt.h"

#include <sanitizer/common_interface_defs.h>

#include <cstdio>
#include <deque>

#include "absl/strings/str_cat.h"
#include "grid.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {
namespace {

// So that AddressSanitizer's and UBSan's reports name the thread, too.
void PrintPosition() {
  if (Grid::running() != nullptr) std::fprintf(stderr, "in %s\n", Grid::running()->Position().c_str());
}

absl::Status Check(const Prepared& prepared) {
  const Launch& launch = prepared.launch;
  const auto refuse = [&](const auto&... message) {
    return absl::InvalidArgumentError(absl::StrCat("kernel ", prepared.name, ": ", message...));
  };
  const uint32_t most_threads = prepared.most_threads;
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

absl::Status Run(std::span<const Prepared> launches, std::span<const Memory> watched) {
  CHECK(Grid::running() == nullptr) << "a kernel launches " << launches.front().name;
  [[maybe_unused]] static const bool once = (__sanitizer_set_death_callback(PrintPosition), true);
  for (const Prepared& launch : launches) RETURN_IF_ERROR(Check(launch));
  std::deque<Grid> grids;
  for (const Prepared& launch : launches) {
    Grid* const before = grids.empty() ? nullptr : &grids.back();
    Grid& grid = grids.emplace_back(launch, watched);
    if (before != nullptr && launch.launch.overlaps) before->set_next(&grid);
  }
  for (Grid& grid : grids) RETURN_IF_ERROR(grid.Run());
  return absl::OkStatus();
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

void CopyAsync16(void* shared, const void* global, bool copies) {
  simt::Running().CopyAsync(shared, copies ? global : nullptr);
}
void CopyAsyncCommit() { simt::Running().CommitCopies(); }
void FinishCopies(int groups_under_way) { simt::Running().FinishCopies(groups_under_way); }
void GridWait() { simt::Running().WaitForGrid(); }
void GridLaunchDependents() { simt::Running().LaunchDependents(); }

}  // namespace dejavu::cuda
