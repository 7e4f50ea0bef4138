// PredictorData: a calibrated predictor in host memory, as dejavu-calibrate makes it and the engine reads it
// (predictor_file.h). Plain data; any thread.
//
// For layer l with the tap x (float32 [hidden]) it says which neurons a tier computes:
//   a = scale * (A x)                  stage A, int8 [rank, hidden] with a factor per row
//   neuron j iff sum over k < r of a[k] * B[k][j] > threshold[j]     stage B, int8 [rank, ffn]
// with r and the thresholds of the tier's operating point (Deja Vu, arXiv 2310.17157, section 4; low-rank maps as in
// section 4.1). Heads are chosen in the same way.
#ifndef ENGINE_MODEL_PREDICTOR_DATA_H_
#define ENGINE_MODEL_PREDICTOR_DATA_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/sparsity.h"

namespace dejavu {

// Which vector of the model the predictor of a layer reads.
enum class Tap : uint8_t {
  kAttentionNorm,  // the input of the layer's attention: stage A is computed with its QKV product
  kMlpNorm,        // the input of its MLP
  kPreviousLayer,  // the input of the previous layer's MLP; layer 0 then reads its kAttentionNorm
};
absl::string_view Name(Tap tap);  // "attention-norm", "mlp-norm", "previous-layer"
std::optional<Tap> ParseTap(absl::string_view name);

// How a tier selects in one layer.
struct OperatingPoint {
  int32_t rank = 0;               // the first so many components
  std::vector<float> thresholds;  // [outputs], float16 values; -infinity: always, +infinity: never
  double missed_mass = 0.0;       // in calibration: missed mass over all mass (ShadowReport::missed_mass)
  double missed_share = 0.0;      // and the mean over tokens of each one's own share: what shadow checks are held to
  double density = 0.0;           // share of the outputs that it selected at batch 1
};

// What chooses among a layer's neurons, or among its heads.
struct SelectorData {
  int32_t rank = 0;            // 0: everything is computed
  std::vector<int8_t> a;       // [rank, hidden]
  std::vector<float> a_scale;  // [rank]
  std::vector<int8_t> b;       // [rank, outputs]
  // By tier; absent: the layer runs EXACT (neurons) or computes every head.
  std::array<std::optional<OperatingPoint>, kAllTiers.size()> points;
};

struct LayerPredictorData {
  Tap tap = Tap::kAttentionNorm;
  SelectorData neurons;
  SelectorData heads;
  std::vector<float> worth;      // [ffn] squared norm of each down row
  std::vector<float> frequency;  // [ffn] how often each neuron was not zero in calibration
};

struct PredictorData {
  std::string weights_hash;  // WeightsHash of the model that it belongs to
  Tap tap = Tap::kAttentionNorm;
  std::vector<Tier> tiers;  // the predicted tiers that it serves, by falling quality
  std::vector<LayerPredictorData> layers;
  std::string report_json;  // what calibration measured, for people and tools; an object
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_PREDICTOR_DATA_H_
