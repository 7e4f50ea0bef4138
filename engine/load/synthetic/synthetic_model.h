// SyntheticModel: the shape of an OPT model whose weights are generated, for measuring speed where no real weights are
// at hand. Such weights say nothing about text. What is modelled: how many neurons of each layer are active, how their
// union grows with the batch (densities.h), and a predictor that reaches a stated recall. Every figure of one must say
// that it is synthetic. Plain data; any thread.
#ifndef ENGINE_LOAD_SYNTHETIC_SYNTHETIC_MODEL_H_
#define ENGINE_LOAD_SYNTHETIC_SYNTHETIC_MODEL_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/opt_config.h"

namespace dejavu {

// "synthetic:opt-6.7b?seed=1&recall=0.95&density=1"; everything from '?' on may be absent.
struct SyntheticModel {
  std::string name;  // "opt-6.7b"
  OptConfig config;
  int profile = 0;  // row of the table of densities
  uint64_t seed = 1;
  // Of the neurons that are not zero, the share that BALANCED selects; HIGH misses 0.4 times as many, FAST twice as
  // many.
  double recall = 0.95;
  double density = 1.0;  // how many neurons are selected, in multiples of the published profile

  // One line for people: shape, seed, profile, recall and precision.
  std::string Description() const;
  // Names the weights; in place of a hash.
  std::string Fingerprint() const;
};

bool IsSynthetic(const std::string& model);

// INVALID_ARGUMENT with what there is for unknown names, options and values.
absl::StatusOr<SyntheticModel> ParseSynthetic(const std::string& model);

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_SYNTHETIC_MODEL_H_
