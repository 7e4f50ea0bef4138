// Batch: one step of the engine as flat arrays on the host. Filled by the scheduler, read by the model; its capacity is
// taken once. Engine thread only.
#ifndef ENGINE_MODEL_BATCH_H_
#define ENGINE_MODEL_BATCH_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "engine/sparsity.h"
#include "kernels/backend.h"
#include "kernels/base/check.h"

namespace dejavu {

struct Batch {
  Batch(int32_t max_rows, int32_t max_logit_rows, int32_t slots, int32_t blocks_per_slot)
      : max_rows(max_rows), max_logit_rows(max_logit_rows), slots(slots), blocks_per_slot(blocks_per_slot) {
    tokens.reserve(max_rows);
    positions.reserve(max_rows);
    row_slots.reserve(max_rows);
    tiers.reserve(max_rows);
    strict.reserve(max_rows);
    audit_rows.reserve(max_rows);
    logit_rows.reserve(max_logit_rows);
    draws.reserve(max_logit_rows);
    block_table.resize(static_cast<size_t>(slots) * blocks_per_slot, 0);
  }

  const int32_t max_rows;
  const int32_t max_logit_rows;
  const int32_t slots;            // sequences that may run at once
  const int32_t blocks_per_slot;  // KV blocks of a full context

  // [rows] DrawnId(r): the one that row r of the logits of the step before has drawn. The device has it, not the host.
  std::vector<int32_t> tokens;
  std::vector<int32_t> positions;   // [rows]
  std::vector<int32_t> row_slots;   // [rows] which line of the block table
  std::vector<Tier> tiers;          // [rows]
  std::vector<uint8_t> strict;      // [rows] 1: computes its own selection only, whatever the other rows select
  std::vector<int32_t> audit_rows;  // decode rows whose selections are compared with everything, ascending
  int32_t decode_rows = 0;          // the first so many rows may select; the others are prefill and compute everything
  std::vector<int32_t> logit_rows;  // [logit rows] rows whose next-token logits are wanted, ascending
  // [logit rows] how the device chooses their next tokens (Backend::Draw). Empty: it does not, and the host gets the
  // logits. A group of ranks draws what needs neither adjustments nor details.
  std::vector<std::array<int32_t, kDrawFields>> draws;
  static constexpr int32_t kMostAdjustments = 1 << 15;
  std::vector<std::array<int32_t, kAdjustFields>> adjustments;  // of all draws
  bool keeps_logits = false;         // the host gets the logits of a step that draws, too; not of a group
  bool drafts = false;               // all rows are drafts, for which DraftWeights do where there are any
  std::vector<int32_t> block_table;  // [slots, blocks_per_slot]

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  int32_t rows_left() const { return max_rows - rows(); }
  int32_t logit_rows_left() const { return max_logit_rows - static_cast<int32_t>(logit_rows.size()); }

  // Empties the rows; the block table stays.
  void Clear() {
    tokens.clear();
    positions.clear();
    row_slots.clear();
    tiers.clear();
    strict.clear();
    audit_rows.clear();
    decode_rows = 0;
    logit_rows.clear();
    draws.clear();
    adjustments.clear();
    keeps_logits = false;
    drafts = false;
  }

  // How many of kDetailFields the host gets of each draw; 0: no row asks for any.
  int32_t detail_fields() const {
    int32_t fields = 0;
    for (const auto& draw : draws) {
      if ((draw[kDrawWants] & kDrawLogprobs) != 0) fields = std::max(fields, kDetailTop + 2 * draw[kDrawTop]);
    }
    return fields;
  }

  // A row of a prompt.
  void AddRow(int32_t slot, int32_t position, int32_t token, bool wants_logits, Tier tier = Tier::kExact) {
    CHECK(rows_left() > 0 && (!wants_logits || logit_rows_left() > 0)) << rows() << " rows";
    if (wants_logits) logit_rows.push_back(rows());
    tokens.push_back(token);
    positions.push_back(position);
    row_slots.push_back(slot);
    tiers.push_back(tier);
    strict.push_back(0);
  }

  // A row that decodes; these come first.
  void AddDecodeRow(int32_t slot, int32_t position, int32_t token, bool wants_logits, const SparsityParams& sparsity) {
    CHECK(decode_rows == rows()) << "row " << rows() << " decodes after a row of a prompt";
    AddRow(slot, position, token, wants_logits, sparsity.tier);
    strict.back() = sparsity.deterministic ? 1 : 0;
    ++decode_rows;
  }
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_BATCH_H_
