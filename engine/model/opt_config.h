// OptConfig: the shape of an OPT model, from its config.json and generation_config.json. Plain data; any thread.
//
// OPT is the one family of models. What knows it is named after it (OptConfig, OptWeights, OptModel), beside the loader
// of its files (weight_plan.h, weights_hash.h), the synthetic models (engine/load/synthetic) and calibration, which
// takes the MLP for ReLU between two projections. Everything else takes ModelShape: the KV cache, shards, predictors,
// memory planning, scheduling, serving, the server. A second family would need these three classes for itself, a
// choice by model_type in LoadModelConfig and LoadModel (engine/load/loaded_model.h), a common face for OptModel where
// ModelGroup holds it (engine/ranks/model_group.h), and its name beside kModelFamily (engine/model_shape.h).
#ifndef ENGINE_MODEL_OPT_CONFIG_H_
#define ENGINE_MODEL_OPT_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_shape.h"

namespace dejavu {

// The shape's fields are hidden_size, num_hidden_layers, num_attention_heads, ffn_dim, vocab_size and
// max_position_embeddings.
struct OptConfig : ModelShape {
  int32_t embed = 0;         // word_embed_proj_dim; other than hidden: project_in and project_out (OPT-350m)
  bool pre_norm = true;      // do_layer_norm_before; false: OPT-350m
  bool final_norm = true;    // pre_norm and not _remove_final_layer_norm
  bool biases = true;        // enable_bias
  bool affine_norms = true;  // layer_norm_elementwise_affine
  bool tied = true;          // tie_word_embeddings; what the weights hold decides (engine/model/weight_names.h)
  // Of generation_config.json, what has no effect here: how tokens are chosen is for requests to say.
  std::vector<std::string> unused_settings;

  // From config.json, and generation_config.json for the end tokens if there is one, as generate() of Transformers
  // takes them. INVALID_ARGUMENT with file, field, value and what is supported for anything but an OPT decoder with
  // ReLU.
  static absl::StatusOr<OptConfig> Load(const std::string& directory);
};

// The position embedding has two rows before position 0 (Transformers, OPTLearnedPositionalEmbedding).
inline constexpr int32_t kPositionOffset = 2;

}  // namespace dejavu

#endif  // ENGINE_MODEL_OPT_CONFIG_H_
