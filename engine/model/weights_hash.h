// WeightsHash: tells models apart by their weights, so that a predictor is used with those that it was made for. Any
// thread.
#ifndef ENGINE_MODEL_WEIGHTS_HASH_H_
#define ENGINE_MODEL_WEIGHTS_HASH_H_

#include <string>

#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"
#include "engine/model/opt_config.h"

namespace dejavu {

// Identifies a model by the names, shapes and some fixed rows of its matrices, as float32 values: the same for
// safetensors and .bin files and for float16 values stored as float32, without reading everything.
absl::StatusOr<std::string> WeightsHash(const Checkpoint& checkpoint, const OptConfig& config);

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHTS_HASH_H_
