// Whole units of whole numbers.
#ifndef KERNELS_BASE_ROUND_H_
#define KERNELS_BASE_ROUND_H_

#include <cstdint>

namespace dejavu {

constexpr int64_t DivideUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
constexpr int64_t RoundUp(int64_t n, int64_t unit) { return DivideUp(n, unit) * unit; }

}  // namespace dejavu

#endif  // KERNELS_BASE_ROUND_H_
