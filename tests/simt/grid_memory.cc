// A grid's shared memory, and asynchronous copies into it.
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_format.h"
#include "grid.h"

namespace dejavu::simt {
namespace {

constexpr int kAtTheWait = std::numeric_limits<int>::max();

void Read(AsyncCopy& copy) {
  if (copy.from != nullptr) std::memcpy(copy.bytes, std::exchange(copy.from, nullptr), sizeof(copy.bytes));
}

}  // namespace

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
  if (global != nullptr && __asan_region_is_poisoned(const_cast<void*>(global), 16) != nullptr) {
    Fail("CopyAsync16 reads beyond its memory");
  }
  std::memset(shared, 0xFF, 16);
  AsyncCopy& copy = running_->copies.emplace_back(AsyncCopy{shared, global, running_->copy_groups, kAtTheWait, {}});
  if (launch_.order != 0) copy.read_at = copy.group + static_cast<int>(random_() % 4);
  if (global == nullptr || copy.read_at == copy.group) Read(copy);
}

void Grid::CommitCopies() {
  ++running_->copy_groups;
  for (AsyncCopy& copy : running_->copies) {
    if (copy.read_at <= running_->copy_groups) Read(copy);
  }
}

void Grid::FinishCopies(int groups_under_way) {
  std::vector<AsyncCopy>& copies = running_->copies;
  const int finished = running_->copy_groups - groups_under_way;
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const AsyncCopy& c) { return c.group >= finished; });
  std::for_each(copies.begin(), end, [](AsyncCopy& copy) {
    Read(copy);
    std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
  });
  copies.erase(copies.begin(), end);
}

}  // namespace dejavu::simt
