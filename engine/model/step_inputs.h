// StepInputs: what a step tells the device, gathered on the host and sent in one copy: the block table, and what the
// model and its predictor add. Engine thread only.
#ifndef ENGINE_MODEL_STEP_INPUTS_H_
#define ENGINE_MODEL_STEP_INPUTS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/batch.h"
#include "kernels/backend.h"

namespace dejavu {

class StepInputs {
 public:
  // For batches of the shape of `largest` and arrays that the others add, of `words` together.
  static absl::StatusOr<std::unique_ptr<StepInputs>> Create(Backend& backend, const Batch& largest, int64_t words);

  // What Add needs of `words` for an array of that size.
  static constexpr int64_t WordsOf(int64_t rows, int64_t cols) {
    return (rows * cols + kAlignment - 1) / kAlignment * kAlignment;
  }

  // The next step and its block table. Then Add, and Send at last.
  void Begin(const Batch& batch);

  // Packed, to be filled until Send. Steps that add the same sizes in the same order find them at the same places.
  struct Array {
    int32_t* values;   // [rows * cols]
    Tensor on_device;  // int32 [rows, cols]
  };
  Array Add(int64_t rows, int64_t cols);
  Tensor Add(const std::vector<int32_t>& values);  // [1, values]

  void Send();

  // On the device, int32 [slots, blocks per slot].
  Tensor block_table() const { return block_table_; }

 private:
  static constexpr int64_t kAlignment = 16;  // words

  explicit StepInputs(Backend& backend) : dev_(backend) {}

  // Constant after Create.
  Backend& dev_;
  Buffer memory_;
  Tensor all_;          // int32 [1, words]: the block table, then what is added
  Tensor block_table_;  // of it
  int64_t first_added_ = 0;

  std::vector<int32_t> words_;     // what is on the device, or will be
  int64_t first_ = 0, added_ = 0;  // of this step: the first word that is sent, the end of the last
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_STEP_INPUTS_H_
