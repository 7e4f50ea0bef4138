// Ops that are held back, because the one that follows can do them in its own launch: Add by LayerNorm, LayerNorm by
// Select, WriteKv by Attention. Whatever else follows comes after Flush. At most one is held back at a time.
#ifndef KERNELS_CUDA_HELD_OPS_H_
#define KERNELS_CUDA_HELD_OPS_H_

#include <optional>

#include "kernels/backend.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/kernel_params.h"
#include "kernels/cuda/params.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class HeldOps {
 public:
  explicit HeldOps(DeviceQueue& queue) : queue_(queue) {}
  HeldOps(const HeldOps&) = delete;
  HeldOps& operator=(const HeldOps&) = delete;

  struct HeldNorm {
    NormParams params;
    Tensor y, x;  // [rows, features]
  };

  // Launches what is held back.
  void Flush();

  // Each flushes first. A LayerNorm takes along the Add to its x.
  void HoldAdd(Tensor x, Tensor y);
  void HoldNorm(Tensor y, Tensor x, const NormWeights& norm);
  void HoldWriteKv(const KvRows& rows);

  // The LayerNorm that is held back, for a launch which also reads `beside`; none if it touches that. Flushes.
  std::optional<HeldNorm> TakeNorm(const Tensor& beside);

  // The LayerNorm that makes x, if that is held back. Flushes what else is.
  std::optional<NormParams> TakeNormOf(const Tensor& x);
  void Launch(const NormParams& norm);
  static int64_t SharedBytes(const NormParams& norm);  // dynamic

  // Whether the WriteKv of these rows was held back; it no longer is.
  bool TakeWriteKv(const KvRows& rows);

 private:
  struct HeldAdd {
    Tensor x, y;  // [rows, features]
  };
  DeviceQueue& queue_;
  std::optional<HeldAdd> add_;
  std::optional<HeldNorm> norm_;
  std::optional<KvRows> write_kv_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_HELD_OPS_H_
