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
#include "kernels/backend.h"
#include "kernels/communicator.h"

namespace dejavu {

class OptModel {
 public:
  // Takes the activations for batches of the shape of `largest`. Backend, communicator and weights must outlive the
  // model.
  static absl::StatusOr<std::unique_ptr<OptModel>> Create(const OptConfig& config, const OptWeights& weights,
                                                          Backend& backend, Communicator& communicator,
                                                          const Batch& largest);

  // Runs the rows of `batch`, writes their keys and values to `kv` and fills `logits` [batch.logit_rows.size(), vocab]
  // on the host. Rows of one sequence must come in ascending position, with every earlier position already in `kv` or
  // in the batch.
  void Forward(const Batch& batch, const KvCache& kv, float* logits);

  const OptConfig& config() const { return config_; }

 private:
  OptModel(const OptConfig& config, const OptWeights& weights, Backend& backend, Communicator& communicator)
      : config_(config), weights_(weights), dev_(backend), comm_(communicator) {}

  absl::Status Allocate(const Batch& largest);
  RowTable UploadRows(const Batch& batch);
  void Embed(const Batch& batch, const RowTable& rows);
  void Layer(const LayerWeights& w, const KvLayer& kv, const RowTable& rows);
  void Head(const Batch& batch, float* logits);

  // Constant after construction.
  const OptConfig config_;
  const OptWeights& weights_;
  Backend& dev_;
  Communicator& comm_;
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

  // int32 on the device.
  Tensor tokens_, positions_, row_slots_;  // [1, rows]
  Tensor logit_rows_;                      // [1, logit rows]
  Tensor block_table_;                     // [slots, blocks per slot]
};

}  // namespace dejavu

#endif  // ENGINE_OPT_MODEL_H_
