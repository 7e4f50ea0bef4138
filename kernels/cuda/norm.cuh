// What stands between two products: a row of the residual stream is added up, normalised, and left in the form in which
// the next product reads it (fragments.cuh). A block does a row. A thread has four elements that follow each other of
// every 1,024; sums have a fixed order: a thread's own elements first to last, then the lanes, then the warps.
#ifndef KERNELS_CUDA_NORM_CUH_
#define KERNELS_CUDA_NORM_CUH_

#include "kernels/cuda/fragments.cuh"

namespace dejavu::cuda {

constexpr int kNormVector = 4;  // elements that a thread reads at once
constexpr int kNormStride = kNormVector * kBlockThreads;

DJ_DEVICE int BlockMost(int value, int* shared) {
  for (int step = 16; step > 0; step /= 2) value = Max(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();
  if (Lane() == 0) shared[Warp()] = value;
  __syncthreads();
  int most = shared[0];
  for (int w = 1; w < kWarps; ++w) most = Max(most, shared[w]);
  return most;
}

// kAhead: weight and bias are asked for before GridWait and lie in shared memory then.
template <bool kAhead>
class NormBlock {
 public:
  // `shared`: [features], rounded up to vectors, or three of those with kAhead.
  DJ_DEVICE NormBlock(const NormParams& p, float* shared)
      : p_(p), x_(shared), weight_(x_ + RoundedFeatures()), bias_(weight_ + RoundedFeatures()) {}

  // Before GridWait. A thread copies what it reads itself.
  DJ_DEVICE void Begin() {
    static_assert(kAhead);
    for (int i = Thread() * kNormVector; p_.weight != nullptr && i < p_.features; i += kNormStride) {
      const int left = p_.features - i;
      if (p_.vectors && left >= kNormVector) {
        CopyAsync16(weight_ + i, p_.weight + i);
        CopyAsync16(bias_ + i, p_.bias + i);
      } else {
        for (int e = 0; e < Min(left, kNormVector); ++e) {
          weight_[i + e] = LoadConstant(p_.weight + i + e);
          bias_[i + e] = LoadConstant(p_.bias + i + e);
        }
      }
    }
    CopyAsyncCommit();
  }

  DJ_DEVICE void Run(int row) {
    DJ_SHARED(float, sums, kWarps);
    DJ_SHARED(int, mosts, kWarps);
    const float sum = AddUp(row);
    if (p_.weight != nullptr) Normalise(sum, sums);
    int most = 0;
    ForEach([&](int i) { most = Max(most, Magnitude(x_[i])); });
    if (p_.y.data != nullptr) {
      float* y = Row(p_.y, row);
      ForEach([&](int i) { y[i] = x_[i]; });
    }
    if (p_.fragments.integers.pieces != nullptr) most = BlockMost(most, mosts);
    __syncthreads();
    StoreAllFragments(p_.fragments, row, p_.rows, x_, p_.features, most);
  }

 private:
  static constexpr int kAtOnce = kAhead ? 8 : 4;  // vectors of a thread that are asked for before the first is used

  DJ_DEVICE int RoundedFeatures() const { return DivideUp(p_.features, kNormVector) * kNormVector; }

  // This thread's elements, in order.
  template <typename F>
  DJ_DEVICE void ForEach(const F& f) const {
    for (int i = Thread() * kNormVector; i < p_.features; i += kNormStride) {
#pragma unroll
      for (int e = 0; e < kNormVector; ++e) {
        if (i + e < p_.features) f(i + e);
      }
    }
  }

  // What is added to the row: `add`, or what the segments' sums make, in JoinedSum's order.
  DJ_DEVICE void LoadAdd(int row, int i, int left, float (&to)[kNormVector]) const {
    const SegmentSums& s = p_.sums;
    if (s.segments == 0) return LoadFour(Row(p_.add, row) + i, left, p_.vectors, to);
#pragma unroll
    for (int e = 0; e < kNormVector; ++e) to[e] = 0.0f;
    if (left == 0) return;
    const float* partial = Row(s.partial, row) + i;  // whole vectors
    const int64_t stride = s.rows * s.partial.stride;
#pragma unroll 8
    for (int segment = 0; segment < s.segments; ++segment) {
      float sum[kNormVector];
      LoadFour(partial + segment * stride, kNormVector, true, sum);
#pragma unroll
      for (int e = 0; e < kNormVector; ++e) to[e] += sum[e];
    }
    if (s.bias == nullptr) return;
    float bias[kNormVector];
    LoadFour(s.bias + i, left, p_.vectors, bias);
#pragma unroll
    for (int e = 0; e < kNormVector; ++e) to[e] += bias[e];
  }

  // x_ = the row, to which `add` is added first; returns the sum of this thread's elements.
  DJ_DEVICE float AddUp(int row) {
    float* residual = Row(p_.x, row);
    const bool adds = p_.add.data != nullptr;
    float sum = 0.0f;
    for (int first = Thread() * kNormVector; first < p_.features; first += kAtOnce * kNormStride) {
      float x[kAtOnce][kNormVector], y[kAtOnce][kNormVector];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {  // all loads before the first store, which might be to the same memory
        const int i = first + j * kNormStride, left = Max(p_.features - i, 0);
        LoadFour(residual + i, left, p_.vectors, x[j]);
        if (adds) LoadAdd(row, i, left, y[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int e = 0; e < kNormVector; ++e) {
          const int i = first + j * kNormStride + e;
          if (i >= p_.features) continue;
          const float value = adds ? x[j][e] + y[j][e] : x[j][e];
          if (adds) residual[i] = value;
          if (p_.sums.segments > 0) Row(p_.add, row)[i] = y[j][e];
          x_[i] = value;
          sum += value;
        }
      }
    }
    return sum;
  }

  // Mean and variance in two passes, as PyTorch does.
  DJ_DEVICE void Normalise(float sum, float* sums) const {
    const float features = static_cast<float>(p_.features), mean = BlockSum(sum, sums) / features;
    float squares = 0.0f;
    ForEach([&](int i) {
      const float d = x_[i] - mean;
      squares = fmaf(d, d, squares);
    });
    const float scale = 1.0f / sqrtf(BlockSum(squares, sums) / features + p_.epsilon);
    if constexpr (kAhead) {
      CopyAsyncWait<0>();
      ForEach([&](int i) { x_[i] = fmaf((x_[i] - mean) * scale, weight_[i], bias_[i]); });
    } else {
      ScaleBy(mean, scale);
    }
  }

  // With weight and bias from where they lie.
  DJ_DEVICE void ScaleBy(float mean, float scale) const {
    for (int first = Thread() * kNormVector; first < p_.features; first += kAtOnce * kNormStride) {
      float weight[kAtOnce][kNormVector], bias[kAtOnce][kNormVector];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kNormStride, left = Max(p_.features - i, 0);
        LoadFour(p_.weight + i, left, p_.vectors, weight[j]);
        LoadFour(p_.bias + i, left, p_.vectors, bias[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int e = 0; e < kNormVector; ++e) {
          const int i = first + j * kNormStride + e;
          if (i < p_.features) x_[i] = fmaf((x_[i] - mean) * scale, weight[j][e], bias[j][e]);
        }
      }
    }
  }

  const NormParams& p_;
  float* const x_;
  float* const weight_;
  float* const bias_;
};

DJ_KERNEL(Norm, NormParams, kBlockThreads) {
  DJ_DYNAMIC_SHARED(float, shared);
  NormBlock<true> block(p, shared);
  block.Begin();
  GridWait();
  GridLaunchDependents();
  block.Run(static_cast<int>(blockIdx.x));
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_NORM_CUH_
