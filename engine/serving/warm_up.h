// What an engine does before its first request: steps of the kinds that will come, so that scratch has grown, weights
// and threads have been touched, and the costs are known. Engine thread.
#ifndef ENGINE_SERVING_WARM_UP_H_
#define ENGINE_SERVING_WARM_UP_H_

#include <optional>

#include "engine/model/batch.h"
#include "engine/model_shape.h"
#include "engine/options.h"
#include "engine/ranks/model_group.h"
#include "engine/scheduling/scheduler.h"

namespace dejavu {

// `scheduler` learns the costs, of steps that draft too where there is a tier that does; `logits`
// [batch.max_logit_rows, vocab] is scratch. The KV blocks that the steps write to are overwritten by those who take
// them later.
void WarmUp(ModelGroup& group, const ModelShape& shape, const SchedulerOptions& options, std::optional<Tier> draft,
            Batch& batch, float* logits, Scheduler& scheduler);

// How fast the ranks' devices together read what they hold of the weights, or a part of a large model: rank 0's speed,
// times the ranks. Bytes per second.
double MeasureBandwidth(ModelGroup& group);

}  // namespace dejavu

#endif  // ENGINE_SERVING_WARM_UP_H_
