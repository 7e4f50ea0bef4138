#include "kernels/group/ordered_sum.h"

#include <cstring>

namespace dejavu {
namespace {

constexpr int64_t kBlock = 1024;  // floats; of three ranks and more, what is summed so far stays in L1

void Add(const float* a, const float* b, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
}

}  // namespace

void SumInOrder(absl::Span<const float* const> parts, int64_t count, float* sum) {
  if (parts.size() == 2) return Add(parts[0], parts[1], count, sum);
  float block[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t length = std::min(kBlock, count - first);
    std::memcpy(block, parts[0] + first, length * sizeof(float));
    for (size_t i = 1; i < parts.size(); ++i) Add(block, parts[i] + first, length, block);
    std::memcpy(sum + first, block, length * sizeof(float));
  }
}

}  // namespace dejavu
