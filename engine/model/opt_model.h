// OptModel: the forward pass of OPT (Zhang et al., arXiv 2205.01068) over a Backend, written once for every device,
// every selection and every number of ranks. Engine thread only.
#ifndef ENGINE_MODEL_OPT_MODEL_H_
#define ENGINE_MODEL_OPT_MODEL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/batch.h"
#include "engine/model/draft_weights.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor.h"
#include "engine/model/shard.h"
#include "engine/model/step_inputs.h"
#include "kernels/backend.h"
#include "kernels/communicator.h"

namespace dejavu {

// Calibration looks on and may interfere. The tensors are valid during the call; on the CPU backend the host can read
// and write them.
class ModelObserver {
 public:
  virtual ~ModelObserver() = default;
  // The input of a layer's attention (kAttentionNorm) or MLP (kMlpNorm) [rows, hidden]. As layer number `layers`: the
  // residual stream after the last one.
  virtual void OnInput(int32_t /*layer*/, Tap /*at*/, Tensor /*x*/) {}
  // The heads' outputs before the out-projection, [rows, heads * head_dim].
  virtual void OnContext(int32_t /*layer*/, Tensor /*context*/) {}
  // Activations [rows, ffn] and what the MLP makes of them [rows, hidden], which may be changed.
  virtual void OnMlp(int32_t /*layer*/, Tensor /*activations*/, Tensor /*y*/) {}
};

// What a step leaves on the host, in memory of the caller. Of a group of ranks the first one has the whole; the others
// need only counts, where the first one has them.
struct StepOutputs {
  float* logits = nullptr;       // [logit rows, vocab], unless the batch draws and keeps none
  int32_t* drawn = nullptr;      // [logit rows], if it draws
  StepCounts* counts = nullptr;  // from Predictor::MakeCounts: what the decode rows selected. nullptr: is not wanted
  bool counts_dense = true;      // false: nor is, of one rank, what rows found active where all of them are DENSE
  int32_t* details = nullptr;    // [logit rows, batch.detail_fields()], if it draws
};

class OptModel {
 public:
  // Takes the activations for batches of the shape of `largest`, of which ids below `candidates` may be drawn. Backend,
  // communicator, weights and predictor must outlive the model; weights and predictor are those of `shard`. `drafts`,
  // which may be null, are what steps that draft compute with.
  static absl::StatusOr<std::unique_ptr<OptModel>> Create(const OptConfig& config, const Shard& shard,
                                                          const OptWeights& weights, Backend& backend,
                                                          Communicator& communicator, Predictor& predictor,
                                                          const Batch& largest, int32_t candidates,
                                                          const DraftWeights* drafts = nullptr);

  // Runs the rows of `batch` and writes their keys and values to `kv`. Rows of one sequence must come in ascending
  // position, with every earlier position already in `kv` or in the batch. Launch returns when the device has been told
  // everything and `batch` may change; Await fills `out`, which must be what Launch was given, and so must the number
  // of logit rows of `batch`. Where the backend runs ahead, one step may be launched before the last one is awaited.
  uint64_t Launch(const Batch& batch, const KvCache& kv, const StepOutputs& out);
  void Await(uint64_t mark, const Batch& batch, const StepOutputs& out);
  void Forward(const Batch& batch, const KvCache& kv, const StepOutputs& out) {
    Await(Launch(batch, kv, out), batch, out);
  }

  // nullptr: none. Borrowed.
  void set_observer(ModelObserver* observer) { observer_ = observer; }

  const OptConfig& config() const { return config_; }

 private:
  OptModel(const OptConfig& config, const Shard& shard, const OptWeights& weights, Backend& backend,
           Communicator& communicator, Predictor& predictor, int32_t candidates, const DraftWeights* drafts)
      : config_(config),
        shard_(shard),
        candidates_(candidates),
        weights_(weights),
        drafts_(drafts),
        dev_(backend),
        comm_(communicator),
        predictor_(predictor) {}

  absl::Status Allocate(const Batch& largest);
  void GatherDrawn(const Batch& batch, int32_t* drawn);
  void GatherLogits(int64_t rows, float* logits);
  void GatherCounts(StepCounts* counts);
  RowTable Upload(const Batch& batch);
  uint64_t StepKey(const Batch& batch) const;
  void Embed(const RowTable& rows);
  void Layer(int32_t l, const KvLayer& kv, const RowTable& rows);
  void Attend(int32_t l, const KvLayer& kv, const RowTable& rows, Tensor partial, Tensor h, Selection* neurons);
  void Compute(const Ride& stage_a, Tensor x);
  Selection ProjectQkv(int32_t l, Tensor qkv, Tensor h);
  void Head(int64_t n, int64_t rows);

  // Constant after construction.
  const OptConfig config_;
  const Shard shard_;
  const int32_t candidates_;
  const OptWeights& weights_;
  const DraftWeights* const drafts_;  // nullptr: none
  Backend& dev_;
  Communicator& comm_;
  Predictor& predictor_;
  ModelObserver* observer_ = nullptr;
  Buffer floats_, ints_;

  // Activations: capacity rows; a step uses views of its first rows.
  Tensor x_;          // [rows, hidden] the residual stream
  Tensor h_;          // [rows, hidden] normed
  Tensor qkv_;        // [rows, 3 * own heads * head_dim]
  Tensor context_;    // [rows, own heads * head_dim]
  Tensor partial_;    // [rows, hidden] this rank's part of a sum
  Tensor nothing_;    // [1, hidden] zeros, a rank's part that has no head
  Tensor neurons_;    // [rows, own neurons]
  Tensor embedded_;   // [rows, embed] where embed != hidden
  Tensor last_;       // [logit rows, hidden]
  Tensor projected_;  // [logit rows, embed] where embed != hidden
  Tensor logits_;     // [logit rows, own vocabulary]
  Tensor bests_;      // [logit rows, kBestFields] of a group
  Tensor scratch_;    // [1, adjustments] of a model on one rank, as the next one
  Tensor details_;    // int32 [logit rows, kDetailFields]

  bool skip_zeros_ = false;                   // this step: no row is DENSE
  const OptWeights* step_weights_ = nullptr;  // that this step computes with

  // int32 on the device.
  Tensor drawn_;  // [1, logit rows] what a step draws, where the next one may look for its tokens
  std::unique_ptr<StepInputs> inputs_;
  Tensor tokens_;       // [1, rows] of the step
  Tensor logit_rows_;   // [1, logit rows] of the step
  Tensor draws_;        // [logit rows, kDrawFields] of the step, if it draws, as the next one
  Tensor adjustments_;  // [any, kAdjustFields]
  Tensor no_head_;      // [1, rows] zeros

  // On the host, of a group of ranks.
  std::vector<float> own_logits_, all_logits_;  // [logit rows, longest range], [ranks] of those
  std::vector<int32_t> own_results_, all_results_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_OPT_MODEL_H_
