// ModelRunner: a model with its weights, predictor and one KV cache, for tools that push text through it without a
// scheduler: calibration and evaluation. One thread.
#ifndef ENGINE_RANKS_MODEL_RUNNER_H_
#define ENGINE_RANKS_MODEL_RUNNER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/load/loaded_model.h"
#include "engine/model/batch.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_model.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor.h"
#include "engine/model/predictor_data.h"
#include "engine/ranks/model_group.h"
#include "kernels/backend.h"

namespace dejavu {

class ModelRunner {
 public:
  struct Options {
    std::string model;               // as ModelOptions has it
    std::string weights = "stored";  // likewise
    std::string predictor = "none";  // likewise
    std::string device = "cpu";      // as CreateDevice has it
    int threads = 0;                 // 0: one per CPU
    bool pin = false;                // one CPU per thread
    int ranks = 1;                   // likewise, as GroupOptions has it
    int slots = 1;                   // sequences side by side
    int max_rows = 64;               // rows of a step
    int max_audits = 0;              // rows of a step whose selections are compared with everything
    int window = 256;                // positions of a sequence
    std::string kv_dtype = "fp16";   // of keys and values: fp16 or fp32
    bool draft_weights = false;      // as ModelOptions has it
    // What stands between model and device, such as a decorator that measures; empty: nothing.
    std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>)> wrap_backend;
  };
  static absl::StatusOr<std::unique_ptr<ModelRunner>> Create(const Options& options, const LoadProgress& progress);

  // What another process of mpirun does, with the same options: takes part until rank 0's runner is gone.
  static absl::Status Follow(const Options& options);

  // Replaces the predictor that was loaded, of a group of one; nullptr: none.
  absl::Status SetPredictor(const PredictorData* data);

  // Empties batch(); fill it with rows and call Run. Each slot has KV blocks for a whole window.
  Batch& StartBatch();
  // Logits of the batch's logit rows, [logit rows, vocab], valid until the next call. They mean nothing where the batch
  // draws; drawn() then has the tokens [logit rows].
  absl::Span<const float> Run();
  const std::vector<int32_t>& drawn() const { return drawn_; }
  // Runs the batch, whose rows all decode and want logits, and then `steps` - 1 times the same rows a position further,
  // as an engine does: the most likely tokens stay on the device, and where it runs ahead the next step is launched
  // before the last one is awaited. One rank.
  void Decode(int steps);

  // What the decode rows of the last Run selected.
  const StepCounts& counts() const { return counts_; }
  const std::string& weights_hash() const { return group_->loaded().weights_hash; }
  // What Options::predictor named, whatever SetPredictor has done since; nullptr: none.
  const PredictorData* predictor_data() const {
    return group_->loaded().predictor.has_value() ? &*group_->loaded().predictor : nullptr;
  }
  const std::string& predictor_path() const { return group_->loaded().predictor_path; }
  // How the weights were generated, on one line; empty for real ones.
  const std::string& synthetic() const { return group_->loaded().synthetic; }
  const OptConfig& config() const { return config_; }
  const OptWeights& weights() const { return group_->loaded().weights; }  // of rank 0, as the next three
  Backend& backend() { return group_->backend(); }
  OptModel& model() { return group_->model(); }
  Predictor& predictor() { return group_->predictor(); }
  const ModelGroup& group() const { return *group_; }
  const Options& options() const { return options_; }

 private:
  ModelRunner(Options options, const OptConfig& config) : options_(std::move(options)), config_(config) {}

  const Options options_;
  const OptConfig config_;
  std::unique_ptr<ModelGroup> group_;
  std::unique_ptr<Batch> batch_;
  StepCounts counts_, counts_ahead_;
  std::vector<float> logits_;
  std::vector<int32_t> drawn_;
};

}  // namespace dejavu

#endif  // ENGINE_RANKS_MODEL_RUNNER_H_
