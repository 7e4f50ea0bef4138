// Draws: how the device chooses a step's tokens itself (Backend::Draw), so that logits stay there. Engine thread.
#ifndef ENGINE_SERVING_DRAWS_H_
#define ENGINE_SERVING_DRAWS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/model/batch.h"
#include "engine/model_shape.h"
#include "engine/scheduling/sequence.h"
#include "engine/serving/hand_out.h"

namespace dejavu {

// To `banned`, what may not be the next token after `generated` ones.
void AddBanned(const ModelShape& shape, const Request& request, int32_t generated, std::vector<int32_t>* banned);

class Draws {
 public:
  // A group of ranks draws only what temperature and logits decide. `hand_out` must outlive the object.
  Draws(const ModelShape& shape, bool group, HandOut& hand_out) : shape_(shape), group_(group), hand_out_(hand_out) {}

  // Fills the draws of the planned step; `ahead`: of that which was planned ahead. False: the device cannot draw them
  // all, and draws none.
  bool Plan(const std::vector<std::unique_ptr<Sequence>>& running, bool ahead, Batch& batch);

  // Whether the draws of the step after this one are known before this one's tokens and drafts: no penalty waits for
  // them.
  static bool MayFollow(const std::vector<std::unique_ptr<Sequence>>& running);

 private:
  void PlanRows(const Sequence& s, const StepShare& share, Batch& batch);
  void PlanRow(const Sequence& s, int32_t row, int32_t generated, bool details, Batch& batch);

  const ModelShape shape_;
  const bool group_;
  HandOut& hand_out_;
  std::vector<int32_t> banned_;  // scratch
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_DRAWS_H_
