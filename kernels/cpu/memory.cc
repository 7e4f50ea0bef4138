#include "kernels/cpu/memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/round.h"

namespace dejavu::cpu {
namespace {

constexpr int64_t kHugePage = 2 << 20;

// What a file of one number, or of lines such as "MemAvailable: 1 kB", says; `otherwise` where it says nothing.
int64_t NumberIn(const char* path, const std::string& key, int64_t otherwise) {
  std::ifstream file(path);
  std::string word;
  int64_t number;
  while (!key.empty() && file >> word && word != key) {
  }
  return file >> number ? number : otherwise;
}

int64_t PhysicalBytes() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

// Spreads pages over the NUMA nodes: any thread may read any part. A hint as well, and nothing on machines of one node.
void Interleave(void* data, int64_t bytes) {
  constexpr unsigned long kNodes = 8 * sizeof(unsigned long);
  unsigned long nodes = 0;
  for (unsigned long node = 0; node < kNodes; ++node) {
    if (access(absl::StrCat("/sys/devices/system/node/node", node).c_str(), F_OK) == 0) nodes |= 1ul << node;
  }
  if (std::popcount(nodes) > 1) syscall(SYS_mbind, data, bytes, MPOL_INTERLEAVE, &nodes, kNodes, 0);
}

// Zeroed memory that starts on a huge page, or nullptr.
void* MapHuge(int64_t bytes) {
  void* map = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(map);
  const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(begin));
  const int64_t before = RoundUp(address, kHugePage) - address;
  char* aligned = begin + before;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(aligned + bytes, kHugePage - before);
  madvise(aligned, bytes, MADV_HUGEPAGE);  // only a hint: kernels without huge pages refuse it
  Interleave(aligned, bytes);
  return aligned;
}

}  // namespace

int64_t FreeBytes(int sharers) {
  const int64_t machine = NumberIn("/proc/meminfo", "MemAvailable:", PhysicalBytes() >> 10) << 10;
  const int64_t limit = NumberIn("/sys/fs/cgroup/memory.max", "", machine);  // "max": none
  const int64_t used = NumberIn("/sys/fs/cgroup/memory.current", "", 0) -
                       NumberIn("/sys/fs/cgroup/memory.stat", "inactive_file", 0) -  // the kernel gives these up,
                       NumberIn("/sys/fs/cgroup/memory.stat", "active_file", 0);     // and weights that lie in them
  const std::optional<AddressSpace> space = LimitedAddressSpace();
  const int64_t most = space.has_value() ? std::min(machine, std::max<int64_t>(0, space->left_bytes())) : machine;
  return std::clamp<int64_t>(limit - used, 0, most) / sharers;
}

absl::StatusOr<Buffer> Allocate(int64_t bytes) {
  CHECK(bytes >= 0) << bytes;
  const int64_t physical = PhysicalBytes();
  if (bytes > physical) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cpu: cannot allocate ", bytes, " bytes; this machine has ", physical));
  }
  void* data;
  Buffer::Free free;
  if (bytes >= kHugePage) {
    const int64_t mapped = RoundUp(bytes, kHugePage);
    data = MapHuge(mapped);
    free = [mapped](void* p) { munmap(p, mapped); };
  } else {
    const int64_t rounded = RoundUp(std::max<int64_t>(bytes, 1), 64);
    data = std::aligned_alloc(64, rounded);
    if (data != nullptr) std::memset(data, 0, rounded);
    free = [](void* p) { std::free(p); };
  }
  if (data == nullptr) {
    const std::string reason = std::strerror(errno), space = DescribeAddressSpace();
    return absl::ResourceExhaustedError(
        absl::StrCat("cpu: cannot allocate ", bytes, " bytes: ", reason, space.empty() ? "" : "; ", space));
  }
  return Buffer(data, bytes, std::move(free));
}

}  // namespace dejavu::cpu
