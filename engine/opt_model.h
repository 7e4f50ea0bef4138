// OptModel: the forward pass of OPT (Zhang et al., arXiv 2205.01068) over a Backend, written once for every device,
// every selection and every number of ranks. Engine thread only.
#ifndef ENGINE_OPT_MODEL_H_
#define ENGINE_OPT_MODEL_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/opt_config.h"
#include "engine/opt_weights.h"
#include "engine/predictor.h"
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

class OptModel {
 public:
  // Takes the activations for batches of the shape of `largest`. Backend, communicator, weights and
  // predictor must outlive the model.
  static absl::StatusOr<std::unique_ptr<OptModel>> Create(const OptConfig& config, const OptWeights& weights,
                                                          Backend& backend, Communicator& communicator,
                                                          Predictor& predictor, const Batch& largest);

  // Runs the rows of `batch`, writes their keys and values to `kv` and fills `logits` [batch.logit_rows.size(), vocab]
  // on the host, or with batch.draws only `drawn` [batch.logit_rows.size()], ids below `candidates`. Rows of one
  // sequence must come in ascending position, with every earlier position already in `kv` or in the batch. `counts`,
  // from Predictor::MakeCounts, receives what the decode rows selected.
  void Forward(const Batch& batch, const KvCache& kv, float* logits, StepCounts* counts = nullptr,
               int32_t* drawn = nullptr, int32_t candidates = 0);

  // nullptr: none. Borrowed.
  void set_observer(ModelObserver* observer) { observer_ = observer; }

  const OptConfig& config() const { return config_; }

 private:
  OptModel(const OptConfig& config, const OptWeights& weights, Backend& backend, Communicator& communicator,
           Predictor& predictor)
      : config_(config), weights_(weights), dev_(backend), comm_(communicator), predictor_(predictor) {}

  absl::Status Allocate(const Batch& largest);
  RowTable Upload(const Batch& batch);
  uint64_t StepKey(const Batch& batch) const;
  void Embed(const RowTable& rows);
  void Layer(int32_t l, const KvLayer& kv, const RowTable& rows);
  Selection ProjectQkv(int32_t l, Tensor qkv, Tensor h);
  Selection SelectNeurons(int32_t l, Tensor h);
  void Head(int64_t n, int64_t rows);

  // Constant after construction.
  const OptConfig config_;
  const OptWeights& weights_;
  Backend& dev_;
  Communicator& comm_;
  Predictor& predictor_;
  ModelObserver* observer_ = nullptr;
  Buffer floats_, ints_;

  // Activations: capacity rows; a step uses views of its first rows.
  Tensor x_;          // [rows, hidden] the residual stream
  Tensor h_;          // [rows, hidden] normed
  Tensor qkv_;        // [rows, 3 * hidden]
  Tensor context_;    // [rows, hidden]
  Tensor partial_;    // [rows, hidden] this rank's part of a sum
  Tensor neurons_;    // [rows, ffn]
  Tensor embedded_;   // [rows, embed] where embed != hidden
  Tensor last_;       // [logit rows, hidden]
  Tensor projected_;  // [logit rows, embed] where embed != hidden
  Tensor logits_;     // [logit rows, vocab]

  bool skip_zeros_ = false;  // this step: no row is DENSE

  // int32 on the device.
  Tensor tokens_, positions_, row_slots_;  // [1, rows]
  Tensor logit_rows_;                      // [1, logit rows]
  Tensor draws_, drawn_;                   // [logit rows, kDrawFields], [1, logit rows]
  Tensor block_table_;                     // [slots, blocks per slot]
};

}  // namespace dejavu

#endif  // ENGINE_OPT_MODEL_H_
