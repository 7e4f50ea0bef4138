// Predictor: chooses, on the device, which of its rank's heads and neurons the rows of a step compute. Loaded from
// PredictorData; one without data chooses everything, so that the model calls it unconditionally. Engine thread only.
#ifndef ENGINE_MODEL_PREDICTOR_H_
#define ENGINE_MODEL_PREDICTOR_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/batch.h"
#include "engine/model/predictor_data.h"
#include "engine/model/shard.h"
#include "engine/model/step_counts.h"
#include "engine/model/step_inputs.h"
#include "engine/model_shape.h"
#include "kernels/backend.h"

namespace dejavu {

class Predictor {
 public:
  // `data`, of the whole model, may be nullptr: everything is selected. The device gets all of stage A and of stage B
  // what belongs to the heads and neurons of `shard`, which are numbered as its weights are. `max_rows`, `max_audits`:
  // the largest step.
  static absl::StatusOr<std::unique_ptr<Predictor>> Create(const PredictorData* data, const ModelShape& shape,
                                                           const Shard& shard, Backend& backend, int32_t max_rows,
                                                           int32_t max_audits);

  // Puts `data` in the place of what was loaded, between two steps, all switched on: the same taps, and for each layer
  // no more components, operating points and selecting tiers than there is room for. FAILED_PRECONDITION for the
  // first that differs, with everything as it was.
  absl::Status Reload(const PredictorData& data, const Shard& shard);

  // Whether `tier` selects neurons (heads) in `layer`; with `on` false the layer runs EXACT for the tier (computes
  // every head) until it is switched on again. Switching takes effect with the next step. No effect where the file has
  // no operating point.
  void SwitchNeurons(int32_t layer, Tier tier, bool on) { layers_[layer].neurons.on[Index(tier)] = on; }
  void SwitchHeads(int32_t layer, Tier tier, bool on) { layers_[layer].heads.on[Index(tier)] = on; }
  bool HasNeuronPoint(int32_t layer, Tier tier) const;
  // All switches, to be set at another rank: a word for each layer.
  void GetSwitches(std::vector<int32_t>* words) const;
  void SetSwitches(const std::vector<int32_t>& words);

  // In the order in which the model calls them. BeginStep adds what each row wants to `inputs`, input_words() at most.
  // StageA: what the predictor of `layer` computes from the vector that `at` stands for, beside the product that the
  // model takes of it anyway; may be nothing. Heads and Neurons run stage B.
  void BeginStep(const Batch& batch, StepInputs& inputs);
  Ride StageA(int32_t layer, Tap at);
  bool SelectsHeads(int32_t layer) const;
  Selection Heads(int32_t layer);
  // Where PredictsEarly, any time after the QKV product; else after StageA at the MLP's norm.
  Selection Neurons(int32_t layer);
  // Whether there are neurons to be selected in this step, from what does not wait for the attention.
  bool PredictsEarly(int32_t layer) const {
    return layers_[layer].selects_neurons && layers_[layer].tap != Tap::kMlpNorm;
  }
  // Compares what the audited rows' predictions select in `layer` with the whole up-projection of x, the MLP's input.
  // After Neurons, before the next StageA.
  void Audit(int32_t layer, Tensor x, const LinearWeights& up);
  Tensor ActiveCounts(int32_t layer) const;  // for Backend::Mlp
  StepCounts MakeCounts() const;             // with room for the largest step
  // After the last layer: downloads the step's counts, unless they are not wanted, where all decode rows are DENSE.
  // When they have arrived, Complete puts each in its place and fills in what no device knows; the next step may have
  // begun by then.
  void EndStep(StepCounts* counts, bool wanted);
  void Complete(StepCounts* counts) const;

  // A number for everything that BeginStep has decided and that the ops of the step depend on, beside the values of its
  // inputs: steps of one number run the same ops.
  uint64_t step_key() const { return step_key_; }
  // Weights of this rank's predictor that the step reads.
  int64_t step_bytes() const { return step_bytes_; }

  int64_t input_words() const;
  int32_t max_audits() const { return max_audits_; }
  int64_t bytes() const { return storage_.bytes(); }

 private:
  static constexpr size_t Index(Tier tier) { return static_cast<size_t>(tier); }

  // One layer's neurons or heads.
  struct Selector {
    int32_t outputs = 0;
    int32_t rank = 0;
    SelectorWeights weights;
    std::vector<int32_t> point_ranks;                     // [points]
    std::array<int32_t, kAllTiers.size()> point_of_tier;  // kSelectEverything: none
    std::array<bool, kAllTiers.size()> on;
    void SetPoints(const SelectorData& data);
    int32_t PointFor(Tier tier) const { return on[Index(tier)] ? point_of_tier[Index(tier)] : kSelectEverything; }
  };
  struct Layer {
    Tap tap = Tap::kAttentionNorm;
    Tensor a;        // int8 [heads.rank + neurons.rank, hidden]: the heads' rows, then the neurons'
    Tensor a_scale;  // float32 [1, heads.rank + neurons.rank]
    Tensor worth;    // float32 [1, neurons]
    Selector heads, neurons;
    // This step.
    int32_t rank_heads = 0;  // of stage A, how many rows of each are needed: 0: no row asks
    int32_t rank_neurons = 0;
    bool selects_neurons = false;  // some row has an operating point
    LinearWeights stage_a;         // the rows of `a` that the step needs
  };

  Predictor(const ModelShape& shape, const Shard& shard, Backend& backend)
      : shape_(shape), heads_(shard.heads.count), neurons_(shard.neuron_count), dev_(backend) {}
  absl::Status Load(const PredictorData& data, const Shard& shard);
  void Fill(const PredictorData& data, const Shard& shard);
  absl::Status AllocateStep(int32_t max_rows, int32_t max_audits);
  // Which tiers' operating points the step needs in layer `l`, and so which rows of stage A.
  void PlanLayer(const Batch& batch, size_t l);
  void AddInputs(const Batch& batch, StepInputs& inputs);
  int64_t CountWords(int64_t decode_rows, int64_t rows, int64_t audits) const;
  void PlaceCounts();
  Tensor Coordinates(const Layer& layer, bool heads, int64_t rows) const;

  // Constant after Create.
  const ModelShape shape_;
  const int32_t heads_, neurons_;  // own ones
  Backend& dev_;
  std::vector<Layer> layers_;
  Buffer storage_, scratch_floats_, scratch_ints_;
  int32_t max_rows_ = 0, max_audits_ = 0;
  bool predicts_ = false;  // some layer has components

  // This step.
  int32_t rows_ = 0, decode_rows_ = 0, audits_ = 0;
  uint64_t step_key_ = 0;
  int64_t step_bytes_ = 0;
  Tensor neuron_points_, head_points_;  // int32 [layers, rows] of its inputs, as the next two
  Tensor audit_points_;                 // int32 [layers, audits]
  Tensor strict_, audit_rows_;          // int32 [1, rows], [1, audits]
  // What it counts, packed in this order into counts_.
  Tensor active_;          // int32 [layers, decode rows + 1]
  Tensor union_selected_;  // int32 [layers, 1], as the next one
  Tensor union_heads_;
  Tensor audit_results_;           // float32 [layers, audits * kAuditFields]
  Tensor selected_, head_counts_;  // int32 [layers, rows]

  // On the device.
  Tensor coordinates_;                  // float32 [max rows, largest rank]
  Tensor audit_coordinates_, audit_x_;  // float32 [max audits, largest rank], [max audits, hidden]
  Tensor audit_hidden_;                 // float32 [max audits, neurons]
  Tensor neuron_list_, head_list_, audit_list_, audit_count_;
  Tensor neuron_masks_, head_masks_, audit_masks_;  // int32 [rows, words]
  Tensor audit_selected_;                           // int32 [1, max audits]
  Tensor counts_;                                   // int32 [1, those of the largest step]
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_PREDICTOR_H_
