// Ops that are held back, because the one that follows can do them in its own launch: the end of a Sum by the LayerNorm
// that its result goes to, Add by LayerNorm, LayerNorm by the product that reads it or by Select, WriteKv by Attention.
// Whatever else follows comes after Flush.
#ifndef KERNELS_CUDA_HELD_OPS_H_
#define KERNELS_CUDA_HELD_OPS_H_

#include <cstdint>
#include <optional>

#include "kernels/backend.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/kernel_params.h"
#include "kernels/cuda/params.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

// Of few rows the whole launch is held back: its last block may do the norm. Of more rows (no tickets) it has been
// launched, and what is held back is the joining of its segments.
struct HeldSum {
  Kernel kernel;
  DeviceQueue::Grid grid;
  int64_t shared_bytes;
  SumParams params;
  Tensor y;  // [rows, outputs]

  bool launched() const { return params.tickets == nullptr; }
};

struct HeldNorm {
  NormParams params;
  Tensor y, x;                 // [rows, features]
  std::optional<HeldSum> sum;  // that makes params.add
};

class HeldOps {
 public:
  explicit HeldOps(DeviceQueue& queue) : queue_(queue) {}
  HeldOps(const HeldOps&) = delete;
  HeldOps& operator=(const HeldOps&) = delete;

  // Launches what is held back.
  void Flush();

  // Each flushes first, but for what it takes along: Add the Sum that makes its y, LayerNorm the Add to its x.
  void HoldSum(HeldSum sum);
  void HoldAdd(Tensor x, Tensor y);
  void HoldNorm(Tensor y, Tensor x, const NormWeights& norm);
  void HoldWriteKv(const KvRows& rows);

  // The LayerNorm that is held back, for a launch which also reads `beside`; none if it touches that. Flushes what else
  // is held back.
  std::optional<HeldNorm> TakeNorm(const Tensor& beside);
  // The LayerNorm that makes x, if that is held back, to be launched. Flushes what else is.
  std::optional<HeldNorm> TakeNormOf(const Tensor& x);
  void Launch(const HeldNorm& norm);
  static int64_t SharedBytes(const NormParams& norm);  // dynamic

  // Whether the WriteKv of these rows was held back; it no longer is.
  bool TakeWriteKv(const KvRows& rows);

 private:
  struct HeldAdd {
    Tensor x, y;  // [rows, features]
  };

  void Launch(const HeldSum& sum);
  std::optional<HeldNorm> TakeNorm();

  DeviceQueue& queue_;
  std::optional<HeldSum> sum_;
  std::optional<HeldAdd> add_;  // with sum_: of what that makes
  std::optional<HeldNorm> norm_;
  std::optional<KvRows> write_kv_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_HELD_OPS_H_
