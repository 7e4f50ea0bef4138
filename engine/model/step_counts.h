// StepCounts: what a step computed under a predictor, for statistics and for checks of the predictor. Plain data.
#ifndef ENGINE_MODEL_STEP_COUNTS_H_
#define ENGINE_MODEL_STEP_COUNTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace dejavu {

// What the decode rows of a step, its first ones, computed of the rank's own heads and neurons, on the host. Filled by
// OptModel::Forward.
struct StepCounts {
  int32_t decode_rows = 0, audit_rows = 0;
  bool skipped_zeros = true;
  int32_t ranks = 1;
  double imbalance = 1.0;  // of a group of ranks: the largest count of active neurons over the mean, layers added up
  std::vector<int32_t> selected;        // [layers, decode rows] neurons that a row selected
  std::vector<int32_t> active;          // [layers, decode rows + 1] and not zero; in the last column: in any row
  std::vector<int32_t> heads;           // [layers, decode rows]
  std::vector<int32_t> union_selected;  // [layers] neurons that some row selected
  std::vector<int32_t> union_heads;     // [layers]
  std::vector<float> audits;            // [layers, audit rows, kAuditFields]; of layers with a predictor only
  std::vector<uint8_t> chose_neurons, chose_heads;  // [layers] 0: nothing was selected, which means everything
  std::vector<int32_t> saturated;  // [rows, of prompts too] keys and values of all layers beyond the cache's range
  // As they come from the device in one copy: the first `words` of `packed`, with counts of that many rows each. 0:
  // none come, for all rows were DENSE.
  std::vector<int32_t> packed;
  int64_t words = 0;
  int32_t packed_rows = 0;

  int32_t selected_of(int32_t layer, int32_t row) const {
    return selected[static_cast<size_t>(layer) * decode_rows + row];
  }
  int32_t active_of(int32_t layer, int32_t row) const {
    return active[static_cast<size_t>(layer) * (decode_rows + 1) + row];
  }
  int32_t heads_of(int32_t layer, int32_t row) const { return heads[static_cast<size_t>(layer) * decode_rows + row]; }
  // Down rows that the step read: a DENSE row makes it all that were selected.
  int32_t union_down_of(int32_t layer) const {
    return skipped_zeros ? active_of(layer, decode_rows) : union_selected[layer];
  }
  const float* audit_of(int32_t layer, int32_t audit) const {
    return &audits[(static_cast<size_t>(layer) * audit_rows + audit) * kAuditFields];
  }
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_STEP_COUNTS_H_
