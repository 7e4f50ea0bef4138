// Which rows lie on the device in the form in which products read them (kernels/cuda/fragments.cuh), so that what makes
// a row leaves it in that form, and what has been split once is not split again.
#ifndef KERNELS_CUDA_FRAGMENT_STORE_H_
#define KERNELS_CUDA_FRAGMENT_STORE_H_

#include "kernels/cuda/held_ops.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/scratch.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class FragmentStore {
 public:
  // For weights of which type: kF16, kBF16 or neither (kF32), and whether for int8.
  struct Forms {
    WeightType halves = kF32;
    bool integers = false;
  };
  static Forms FormsOf(DType weights);

  FragmentStore(Scratch& scratch, HeldOps& held) : scratch_(scratch), held_(held) {}
  FragmentStore(const FragmentStore&) = delete;
  FragmentStore& operator=(const FragmentStore&) = delete;

  // x [rows, inputs] in these forms; launches what is missing, the norm that makes x if it is held back. Nothing else
  // is held back then. Valid until x is written.
  RowFragments Of(const Tensor& x, Forms forms);

  // For a launch that makes x itself.
  RowFragments MadeWith(const Tensor& x, Forms forms);

  // Those of rows that lie in `y` are of no use any more.
  void Wrote(const Tensor& y);
  void Forget() { x_ = {}; }

 private:
  RowFragments Placed(Forms forms);

  Scratch& scratch_;
  HeldOps& held_;
  Tensor x_;     // whose fragments there are; empty: nobody's
  Forms forms_;  // that there are of it
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_FRAGMENT_STORE_H_
