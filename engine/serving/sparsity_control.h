// SparsityControl: what the engine does about sparsity around a step. It picks the rows that are computed a second
// time, densely, adds up what each request and each layer read, and switches layers to EXACT where shadow checks fail.
// Engine thread only, but for stats().
#ifndef ENGINE_SERVING_SPARSITY_CONTROL_H_
#define ENGINE_SERVING_SPARSITY_CONTROL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/metrics.h"
#include "engine/model/batch.h"
#include "engine/model/draft_weights.h"
#include "engine/model/predictor.h"
#include "engine/model/weight_bytes.h"
#include "engine/scheduling/sequence.h"
#include "engine/serving/shadow_monitor.h"
#include "kernels/base/seq_lock.h"

namespace dejavu {

class SparsityControl {
 public:
  // `data` may be nullptr. With `fall_back` false, failed shadow checks change nothing. What is counted goes to
  // `metrics`, too, but with `count` false what every step would add; `weights`, and `drafts`, which may be null, say
  // how many bytes that is. All but `data` must outlive the control.
  SparsityControl(const OptConfig& config, const PredictorData* data, const OptWeights& weights,
                  const DraftWeights* drafts, Predictor& predictor, bool fall_back, EngineMetrics& metrics);

  // Marks the rows of `batch` that are to be compared in this step and puts them, DENSE, into `shadow`. The dense step
  // comes first: the keys and values that it writes are then overwritten by the real one.
  void PlanShadow(const std::vector<std::unique_ptr<Sequence>>& running, Batch& batch, Batch& shadow) const;

  // Whether PlanShadow would mark a row of the step that was planned ahead.
  bool ShadowFollows(const std::vector<std::unique_ptr<Sequence>>& running) const;

  // After the step, when it is known which rows hold; `logits` are the real ones, `shadow_logits` those of the rows of
  // `shadow`.
  void NoteStep(const std::vector<std::unique_ptr<Sequence>>& running, const Batch& batch, const StepCounts& counts,
                const float* logits, const float* shadow_logits);

  // After the predictor was reloaded with `data`: no layer has fallen back.
  void Reset(const PredictorData& data);

  SparsityReport Report(const Sequence& sequence) const;
  // Bytes of weights that the last step with decode rows read, on all ranks; 0 of other steps.
  int64_t step_bytes() const { return step_bytes_; }

  // Any thread.
  SparsityStats stats() const;

 private:
  static bool WantsShadow(const Sequence& sequence, const StepShare& share);
  void NoteRow(Sequence& sequence, int32_t row, const Batch& batch, const StepCounts& counts);
  void NoteUnion(const Batch& batch, const StepCounts& counts);
  void NoteBytes(const Batch& batch, const StepCounts& counts);
  void NoteAudit(Sequence& sequence, int32_t audit, const StepCounts& counts);
  void NoteShadow(Sequence& sequence, int32_t audit, const StepCounts& counts, const float* sparse, const float* dense);
  void Change(ShadowMonitor::Change change, Tier tier, int32_t layer);
  void Publish();

  const OptConfig& config_;
  Predictor& predictor_;
  EngineMetrics& metrics_;
  // What steps read of rank 0, and those that draft.
  struct Reads {
    LayerBytes layer;  // all layers have one shape
    int64_t head, embedding;
  };
  static Reads ReadsOf(const OptWeights& weights, const ModelShape& shape);
  const Reads reads_, draft_reads_;
  int64_t step_bytes_ = 0;
  const bool fall_back_;
  ShadowMonitor monitor_;
  // What has been counted so far, and what others read of it.
  std::vector<LayerSparsityStats> layers_;
  SparsityTotals totals_;
  std::vector<SeqLock<LayerSparsityStats>> published_layers_;
  SeqLock<SparsityTotals> published_totals_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_SPARSITY_CONTROL_H_
