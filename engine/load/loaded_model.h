// LoadModel: a model by its name, weights and predictor together, or a rank's part of both, for everything that runs
// one. One thread per call.
#ifndef ENGINE_LOAD_LOADED_MODEL_H_
#define ENGINE_LOAD_LOADED_MODEL_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/draft_weights.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor_data.h"
#include "engine/model/shard.h"
#include "kernels/backend.h"

namespace dejavu {

struct ModelOptions {
  std::string model;  // directory in Hugging Face layout or of dejavu-convert, or a name such as "synthetic:opt-6.7b"
  // Type of the matrices in memory: stored, fp32, fp16, bf16 or int8. A synthetic model is stored in bf16.
  std::string weights = "stored";
  // File; empty: predictor.safetensors in the model's directory, if there, or a synthetic model's own; "none": none.
  std::string predictor;
  int rank = 0, ranks = 1;  // which part is loaded; see MakeShard
  bool map_weights = true;  // a file of dejavu-convert is mapped where it can be, not copied
  // DraftWeights for what a predictor drafts, where the weights are not int8 anyway.
  bool draft_weights = false;
};

inline constexpr char kGeneratedPredictor[] = "generated";

struct LoadedModel {
  Shard shard;
  OptWeights weights;                    // the shard's
  std::unique_ptr<DraftWeights> drafts;  // likewise; nullptr: none
  // Of the whole model, as every rank reads it; of a synthetic model's own, stage B, thresholds and worth of neurons
  // that the shard does not own are zero.
  std::optional<PredictorData> predictor;
  std::string predictor_path;  // empty: none; kGeneratedPredictor for a synthetic model's own
  std::string weights_hash;    // of the weights as stored
  std::string synthetic;       // empty for real weights, else how they were generated, on one line
};

// The predictor's file; empty: none. For a synthetic model this is not its own.
std::string PredictorPath(const ModelOptions& options);

// The model's shape, without loading it.
absl::StatusOr<OptConfig> LoadModelConfig(const std::string& model);

// Bytes in memory of the part that is loaded, from the files' headers; a predictor that cannot be read counts as none.
// `drafts`: of DraftWeights, whether they are wanted or not; 0 where there would be none.
struct ModelBytes {
  int64_t weights = 0, drafts = 0, predictor = 0;
};
absl::StatusOr<ModelBytes> MeasureModel(const ModelOptions& options, const OptConfig& config);

// `config` is what LoadModelConfig gave.
absl::StatusOr<LoadedModel> LoadModel(const ModelOptions& options, const OptConfig& config, Backend& backend,
                                      const LoadProgress& progress);

// The type that ModelOptions::weights names, nothing for "stored"; INVALID_ARGUMENT for others.
absl::StatusOr<std::optional<DType>> ParseWeights(const std::string& name);

}  // namespace dejavu

#endif  // ENGINE_LOAD_LOADED_MODEL_H_
