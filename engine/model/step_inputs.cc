// What a step sends is one run of words up to its end: from the first block that has changed, if one has, or what was
// added alone.
#include "engine/model/step_inputs.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<StepInputs>> StepInputs::Create(Backend& backend, const Batch& largest, int64_t words) {
  std::unique_ptr<StepInputs> inputs(new StepInputs(backend));
  inputs->first_added_ = WordsOf(largest.slots, largest.blocks_per_slot);
  const int64_t all = inputs->first_added_ + words;
  ASSIGN_OR_RETURN(inputs->memory_, backend.Allocate(all * int64_t{sizeof(int32_t)}));
  inputs->words_.resize(all);
  inputs->all_ = inputs->memory_.View(0, DType::kInt32, 1, all);
  inputs->block_table_ = inputs->memory_.View(0, DType::kInt32, largest.slots, largest.blocks_per_slot);
  return inputs;
}

void StepInputs::Begin(const Batch& batch) {
  const auto& table = batch.block_table;
  const auto changed = std::mismatch(table.begin(), table.end(), words_.begin());
  first_ = changed.first == table.end() ? first_added_ : changed.first - table.begin();
  std::copy(changed.first, table.end(), changed.second);
  added_ = first_added_;
}

StepInputs::Array StepInputs::Add(int64_t rows, int64_t cols) {
  const Tensor place = all_.Cols(added_, rows * cols);
  const Array array = {words_.data() + added_, {place.data, DType::kInt32, rows, cols, cols}};
  added_ += WordsOf(rows, cols);
  CHECK(added_ <= all_.cols) << rows << " x " << cols << " words more than there is room for";
  return array;
}

Tensor StepInputs::Add(const std::vector<int32_t>& values) {
  const Array array = Add(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), array.values);
  return array.on_device;
}

void StepInputs::Send() { dev_.Upload(all_.Cols(first_, added_ - first_), &words_[first_]); }

}  // namespace dejavu
