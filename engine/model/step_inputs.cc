// The parts lie in the order in which they change less and less seldom, so that what a step sends is one run of words
// up to its end: from the first block that has changed, if one has; from the tokens on, if the device has not drawn
// them; or what was added alone.
#include "engine/model/step_inputs.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<StepInputs>> StepInputs::Create(Backend& backend, const Batch& largest, int64_t words) {
  std::unique_ptr<StepInputs> inputs(new StepInputs(backend));
  inputs->first_token_ = WordsOf(largest.slots, largest.blocks_per_slot);
  inputs->first_added_ = inputs->first_token_ + WordsOf(1, largest.max_rows);
  const int64_t all = inputs->first_added_ + words;
  ASSIGN_OR_RETURN(inputs->memory_, backend.Allocate(all * int64_t{sizeof(int32_t)}));
  inputs->words_.resize(all);
  inputs->all_ = inputs->memory_.View(0, DType::kInt32, 1, all);
  inputs->tokens_ = inputs->all_.Cols(inputs->first_token_, largest.max_rows);
  inputs->block_table_ = inputs->memory_.View(0, DType::kInt32, largest.slots, largest.blocks_per_slot);
  return inputs;
}

void StepInputs::Begin(const Batch& batch) {
  const auto& table = batch.block_table;
  const auto changed = std::mismatch(table.begin(), table.end(), words_.begin());
  if (changed.first != table.end()) {
    CHECK(!batch.follows_draws) << "blocks have changed, and the tokens before them were not known to the host";
    first_ = changed.first - table.begin();
    std::copy(changed.first, table.end(), changed.second);
  } else {
    first_ = batch.follows_draws ? first_added_ : first_token_;
  }
  if (!batch.follows_draws) std::copy(batch.tokens.begin(), batch.tokens.end(), words_.begin() + first_token_);
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
