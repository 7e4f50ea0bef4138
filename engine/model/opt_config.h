// OptConfig: the shape of an OPT model, from its config.json.
#ifndef ENGINE_MODEL_OPT_CONFIG_H_
#define ENGINE_MODEL_OPT_CONFIG_H_

#include <cstdint>
#include <string>

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

  // INVALID_ARGUMENT with file, field, value and what is supported for anything but an OPT decoder with ReLU.
  static absl::StatusOr<OptConfig> Load(const std::string& directory);
};

// The position embedding has two rows before position 0 (Transformers, OPTLearnedPositionalEmbedding).
inline constexpr int32_t kPositionOffset = 2;

}  // namespace dejavu

#endif  // ENGINE_MODEL_OPT_CONFIG_H_
