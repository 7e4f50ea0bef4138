// WeightNames: which stored tensors are which of an OPT model's weights. Names are those of Transformers: of the whole
// model ("model.decoder.layers.0.fc1.weight"), of its decoder ("decoder. ..." in exports before 4.19), or with the base
// model's name twice, tensor by tensor as Transformers takes them. One thread.
#ifndef ENGINE_MODEL_WEIGHT_NAMES_H_
#define ENGINE_MODEL_WEIGHT_NAMES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"
#include "engine/model/opt_config.h"

namespace dejavu {

class WeightNames {
 public:
  // Both must outlive the object.
  WeightNames(const Checkpoint& checkpoint, const OptConfig& config) : checkpoint_(checkpoint), config_(config) {}

  // The tensor "layers.0.fc1.weight", say, in this shape and in float32, float16 or bfloat16. INVALID_ARGUMENT with
  // file and tensor for anything else, also where it stands under a wrapper's name.
  absl::StatusOr<const StoredTensor*> Find(const std::string& name, const std::vector<int64_t>& shape) const;

  // What tokens become vectors by, and what vectors become logits by; both [vocab, embed].
  struct Ends {
    const StoredTensor* embedding;
    const StoredTensor* head;  // nullptr: the embedding again
  };
  // As Transformers 5 ties them: where both are stored, they are one if they hold the same values, whatever
  // tie_word_embeddings says; where one of them is, it is both if that is true. Reads both where they may differ.
  absl::StatusOr<Ends> FindEnds() const;

  // Not OK where layers lie beyond those of the config.
  absl::Status CheckLayers() const;

 private:
  // One tensor's names: that which Transformers writes, and those that it reads, the first of them that is there.
  struct Names {
    std::string written;
    std::vector<std::string> read;
  };
  static Names NamesOf(const std::string& name);
  static Names NamesOfHead();
  const StoredTensor* Look(const Names& names) const;
  absl::StatusOr<const StoredTensor*> Check(const Names& names, const std::vector<int64_t>& shape) const;
  absl::Status Missing(const Names& names) const;

  const Checkpoint& checkpoint_;
  const OptConfig& config_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_NAMES_H_
