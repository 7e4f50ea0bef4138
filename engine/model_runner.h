// ModelRunner: a model with its weights, predictor and one KV cache, for tools that push text through it without a
// scheduler: calibration and evaluation. One thread.
#ifndef ENGINE_MODEL_RUNNER_H_
#define ENGINE_MODEL_RUNNER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/opt_config.h"
#include "engine/opt_model.h"
#include "engine/opt_weights.h"
#include "engine/predictor.h"
#include "engine/predictor_file.h"
#include "kernels/backend.h"
#include "kernels/communicator.h"

namespace dejavu {

class ModelRunner {
 public:
  struct Options {
    std::string model;   // directory in Hugging Face layout
    int threads = 0;     // 0: one per CPU
    int slots = 1;       // sequences side by side
    int max_rows = 64;   // rows of a step
    int max_audits = 0;  // rows of a step whose selections are compared with everything
    int window = 256;    // positions of a sequence
  };
  static absl::StatusOr<std::unique_ptr<ModelRunner>> Create(const Options& options, const LoadProgress& progress);

  // Replaces the predictor; nullptr: none.
  absl::Status SetPredictor(const PredictorData* data);

  // Empties batch(); fill it with rows and call Run. Each slot has KV blocks for a whole window.
  Batch& StartBatch();
  // Logits of the batch's logit rows, [logit rows, vocab], valid until the next call.
  absl::Span<const float> Run();

  // What the decode rows of the last Run selected.
  const StepCounts& counts() const { return counts_; }
  const std::string& weights_hash() const { return weights_hash_; }
  const OptConfig& config() const { return config_; }
  const OptWeights& weights() const { return weights_; }
  Backend& backend() { return *backend_; }
  OptModel& model() { return *model_; }
  Predictor& predictor() { return *predictor_; }
  const Options& options() const { return options_; }

 private:
  ModelRunner(Options options, const OptConfig& config) : options_(std::move(options)), config_(config) {}

  const Options options_;
  const OptConfig config_;
  std::string weights_hash_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> communicator_ = SingleRank();
  OptWeights weights_;
  KvCache kv_;
  std::unique_ptr<Batch> batch_;
  std::unique_ptr<Predictor> predictor_;
  std::unique_ptr<OptModel> model_;
  StepCounts counts_;
  std::vector<float> logits_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_RUNNER_H_
