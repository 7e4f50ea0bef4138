// Whether and how the device chooses a step's tokens itself (Backend::Draw), so that the logits stay there. Engine
// thread.
#ifndef ENGINE_SERVING_DRAWS_H_
#define ENGINE_SERVING_DRAWS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/model/batch.h"
#include "engine/scheduling/sequence.h"

namespace dejavu {

// Whether none of the step's rows wants more than a token.
bool MayDraw(const std::vector<std::unique_ptr<Sequence>>& running);

// Fills batch.draws, for the tokens that follow the next `ahead` ones.
void PlanDraws(const std::vector<std::unique_ptr<Sequence>>& running, int32_t ahead, Batch& batch);

}  // namespace dejavu

#endif  // ENGINE_SERVING_DRAWS_H_
