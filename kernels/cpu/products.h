// Products of the CPU backend: x as their kernels want it, and which thread does which part. Their arguments have been
// checked. One thread at a time.
#ifndef KERNELS_CPU_PRODUCTS_H_
#define KERNELS_CPU_PRODUCTS_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parts.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu::cpu {

class Products {
 public:
  explicit Products(Parts& parts) : parts_(parts) {}
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // Backend::Linear.
  void Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group, const Ride& ride);

  // The job of dot products y = w x + b, with x as its kernel wants it. It is good until the next product.
  DotJob Prepare(Tensor y, Tensor x, const LinearWeights& w, const int32_t* outputs, bool relu) {
    return Prepare(y, x, w, outputs, relu, &in_steps_);
  }
  // Its first `count` outputs, in parts of `grain`, and right after each part function(first, last).
  void Dots(const DotJob& job, int64_t count, int64_t grain,
            absl::FunctionRef<void(int64_t first, int64_t last)> function);

  // y = w x + b where an input is a row of the weight: over `count` inputs of the list, nullptr: the first ones.
  void SumRows(Tensor y, Tensor x, const LinearWeights& w, const int32_t* list, int64_t count);

  // The masks of a few rows, for Backend::Select; at most kSegmentRows.
  void SelectRows(Tensor masks, Tensor a, const SelectorWeights& w, const int32_t* points, int64_t most_rank);

 private:
  DotJob Prepare(Tensor y, Tensor x, const LinearWeights& w, const int32_t* outputs, bool relu,
                 std::vector<float>* in_steps);
  bool ByColumns(int64_t rows, int64_t columns, int64_t count, int64_t inputs) const;
  const int32_t* Members(const Selection& selected, int64_t rows, int64_t group, int64_t* count);
  Quantized QuantizeRows(Tensor x, const float* factor, const int32_t* list, int64_t count);

  Parts& parts_;

  // Scratch that grows to the largest size seen and then stays.
  std::vector<int16_t> quantized_;  // activations for int8 weights, and their factors
  std::vector<float> quantized_scale_;
  std::vector<float> in_steps_, riding_in_steps_;  // activations in steps (kernels.h)
  std::vector<int64_t> bounds_;                    // where each segment of a sum begins
  std::vector<float> sums_;                        // and the segments' sums
  std::vector<float> select_sums_;                 // [rows, outputs] of a selector
  std::vector<int32_t> members_;                   // weight rows of the selected groups
};

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_PRODUCTS_H_
