// OptWeights: an OPT model's parameters on one device, or what a rank of several owns of them, laid out so that a
// neuron and a head are contiguous memory. One copy, in the type that the checkpoint stores or in one that it is
// converted to; norms and biases are widened to float32. Immutable after Load.
#ifndef ENGINE_MODEL_OPT_WEIGHTS_H_
#define ENGINE_MODEL_OPT_WEIGHTS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"
#include "engine/load_progress.h"
#include "engine/model/opt_config.h"
#include "engine/model/shard.h"
#include "kernels/backend.h"

namespace dejavu {

// Heads, neurons and tokens are the shard's own, in ascending order. What is added to a sum over the ranks, the biases
// of `out` and `mlp.down`, is the first rank's and empty elsewhere. Norms, position embedding and project_in and -out
// are everybody's.
struct LayerWeights {
  NormWeights attention_norm;
  // kOutputRows [3 * heads * head_dim, hidden]: Q of all heads, then K, then V; empty without heads. K's biases are
  // zero.
  LinearWeights qkv;
  LinearWeights out;  // kInputRows [heads * head_dim, hidden]: a head is a run of head_dim rows; likewise
  NormWeights mlp_norm;
  MlpWeights mlp;  // both [neurons, hidden]
};

class OptWeights {
 public:
  // Checks that every tensor is there in its shape before anything large is allocated, then reads what `shard` owns
  // once, in stripes, and refuses values that are not finite. Errors name file and tensor. With `dtype` every matrix is
  // converted to it, to the nearest; int8 is symmetric with a factor for each row as it is laid out here, and leaves
  // the position embedding as stored.
  static absl::StatusOr<OptWeights> Load(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                         Backend& backend, const LoadProgress& progress,
                                         std::optional<DType> dtype = std::nullopt);

  // The bytes that Load would take of the device.
  static absl::StatusOr<int64_t> Measure(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                         std::optional<DType> dtype);

  // The same tensors, all zero, to be filled (engine/load/synthetic). Only for tied models without project_in.
  static absl::StatusOr<OptWeights> Allocate(const OptConfig& config, const Shard& shard, DType dtype,
                                             Backend& backend);

  EmbeddingWeights token_embedding;  // [tokens, embed]
  Tensor position_embedding;         // [kPositionOffset + context, hidden]
  LinearWeights project_in;          // kOutputRows [hidden, embed]; empty where embed == hidden
  LinearWeights project_out;         // kOutputRows [embed, hidden]; likewise
  std::vector<LayerWeights> layers;
  NormWeights final_norm;  // empty without config.final_norm
  LinearWeights head;      // kOutputRows [tokens, embed]: the token embedding again, or one of its own

  bool has_own_head() const { return head.weight.data != token_embedding.weight.data; }

  int64_t bytes() const { return storage_.bytes(); }
  // All of them, as bytes.
  Tensor memory() const { return storage_.View(0, DType::kInt8, 1, storage_.bytes()); }
  DType dtype() const { return token_embedding.weight.dtype; }

 private:
  friend class WeightsFile;  // which fills them in another way
  void TieHead();
  void DropKeyBiases(Backend& backend) const;

  Buffer storage_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_OPT_WEIGHTS_H_
