// WriteCheckpoint: a synthetic model as a directory in Hugging Face layout, so that other systems can load it too.
#ifndef ENGINE_LOAD_CHECKPOINT_WRITER_H_
#define ENGINE_LOAD_CHECKPOINT_WRITER_H_

#include <string>

#include "absl/status/status.h"
#include "engine/model/opt_weights.h"

namespace dejavu {

// Writes config.json, model.safetensors (matrices as `weights`: fp32, fp16, bf16 or stored, which is bf16; vectors in
// float32) and predictor.safetensors into `directory`, which is made if need be. Loaded from there the model computes
// what LoadModel(`synthetic_name`) computes, bit by bit. Takes the memory of the model; each file is written beside its
// name first and then renamed.
absl::Status WriteCheckpoint(const std::string& synthetic_name, const std::string& weights,
                             const std::string& directory, const LoadProgress& progress);

}  // namespace dejavu

#endif  // ENGINE_LOAD_CHECKPOINT_WRITER_H_
