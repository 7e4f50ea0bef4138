// Products of rows of x with a weight: which kernels do them, over which grids. From many rows on they are a library's,
// for float16 and bfloat16. What is held back is launched before.
#ifndef KERNELS_CUDA_PRODUCTS_H_
#define KERNELS_CUDA_PRODUCTS_H_

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/fragment_store.h"
#include "kernels/cuda/held_ops.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/scratch.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class Products {
 public:
  Products(DeviceQueue& queue, Scratch& scratch, HeldOps& held, FragmentStore& fragments)
      : queue_(queue), scratch_(scratch), held_(held), fragments_(fragments) {}
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // Whether a product of these rows is the library's.
  static bool TakesGemm(const Tensor& x, const LinearWeights& w, const Selection& selected);
  // y = w x + b by the library.
  struct GemmJob {
    Tensor y;  // [rows, outputs]
    Tensor x;  // [rows, inputs]
    const LinearWeights& w;
    bool relu = false;
    Tensor cleared = {};  // int32 [1, any], zeroed for the launches that follow
    Tensor active = {};   // int32 [1, n + 1], += how many inputs are not zero in each of the first n rows, and in any
  };
  void Gemm(const GemmJob& job);

  // y = w x + b where an output is a row of the weight.
  struct Job {
    Tensor y;  // [rows, outputs]
    Tensor x;  // [rows, inputs]
    const LinearWeights& w;
    SelectionParams selected = {};  // of outputs
    int64_t group = 1;              // outputs that a selected one stands for
    Ride ride = {};                 // int8
    bool relu = false;
    Tensor cleared = {};  // int32 [1, any], zeroed for the launches that follow
  };
  void Multiply(const Job& job);

  // y = w x + b where an input is a row of the weight: over the selected groups of inputs. `active` as in Backend::Mlp.
  // The last of it is held back.
  void Sum(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group, bool skip_zeros,
           Tensor active);

 private:
  SplitParams SplitInput(const GemmJob& job, int64_t stride);
  static OutputRows RowsOf(const LinearWeights& w, const Tensor& y, const RowFragments& x);

  DeviceQueue& queue_;
  Scratch& scratch_;
  HeldOps& held_;
  FragmentStore& fragments_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PRODUCTS_H_
