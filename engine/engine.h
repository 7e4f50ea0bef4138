// Engine: one model, served. Requests go in from any thread; a single engine thread schedules, runs the steps and calls
// the sinks. Requests join and leave the batch between steps (continuous batching).
#ifndef ENGINE_ENGINE_H_
#define ENGINE_ENGINE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/load_progress.h"
#include "engine/metrics.h"
#include "engine/model_shape.h"
#include "engine/options.h"
#include "engine/refusal.h"
#include "engine/request.h"
#include "engine/sparsity.h"
#include "engine/stats.h"
#include "engine/step_trace.h"

namespace dejavu {

class Engine {
 public:
  // Loads the model, takes all memory, runs a warm-up step and starts the engine thread. `sampled_vocab` is how many
  // ids the tokenizer knows (0: no tokenizer); logits beyond it are never sampled.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options, int32_t sampled_vocab,
                                                        const LoadProgress& progress);
  // Stops at the next step; what still runs finishes with kShutdown.
  virtual ~Engine() = default;

  virtual const ModelShape& model() const = 0;
  virtual std::string backend_description() const = 0;
  virtual int64_t weight_bytes() const = 0;
  virtual int64_t draft_weight_bytes() const = 0;  // beside those; 0: drafts compute with the model's
  virtual const char* weight_type() const = 0;     // of the matrices, such as "float16"
  virtual const PredictorInfo& predictor() const = 0;
  // How the weights were generated, on one line; empty for real ones.
  virtual const std::string& synthetic() const = 0;

  // OK for a tier that can be served here: DENSE and EXACT always, the others where the loaded predictor has an
  // operating point for them. Else FAILED_PRECONDITION with the reason, from Submit too.
  virtual absl::Status CheckTier(Tier tier) const = 0;

  // On success the sink will hear OnFinish; returns the engine's id. Refusals are those of engine/refusal.h:
  // INVALID_ARGUMENT for a request that can never run, RESOURCE_EXHAUSTED when a queue is full, DEADLINE_EXCEEDED when
  // the deadline cannot be met, UNAVAILABLE after Drain.
  absl::StatusOr<uint64_t> Submit(Request request, std::shared_ptr<TokenSink> sink) {
    return SubmitSamples(std::move(request), {std::move(sink)});
  }
  // So many samples of one prompt, all or none: sample i draws with the request's seed + i and has the id that is
  // returned + i. They share the blocks of the prompt, which the first of them computes. Of a scored prompt the first
  // alone tells.
  virtual absl::StatusOr<uint64_t> SubmitSamples(Request request, std::vector<std::shared_ptr<TokenSink>> sinks) = 0;

  // A request that was refused in front of the engine counts as one of its own refusals.
  virtual void CountRefused(Refusal reason, int samples) = 0;

  // Ends a request at the next step, wherever it is; unknown and finished ids are ignored.
  virtual void Cancel(uint64_t id) = 0;

  // Refuses new requests from now on; what runs goes on. What waits goes on too, or ends with UNAVAILABLE. WaitIdle
  // returns true once nothing is left, false when `deadline` passed first.
  virtual void Drain(bool refuse_waiting) = 0;
  virtual bool WaitIdle(SteadyTime deadline) = 0;

  // Reads the predictor's file again and puts it in the place of the loaded one between two steps, without taking
  // memory; returns when that is done. FAILED_PRECONDITION where there is no such file, or what it holds does not fit
  // where the old one is (Predictor::Reload) or serves other tiers; UNIMPLEMENTED for several ranks; UNAVAILABLE where
  // the engine has failed. Then the old one stays.
  virtual absl::Status ReloadPredictor() = 0;

  // Of the last steps.
  virtual const StepTrace& trace() const = 0;

  virtual EngineStats stats() const = 0;
  virtual SparsityStats sparsity_stats() const = 0;
  virtual const EngineMetrics& metrics() const = 0;
  // EngineMetrics::counting, from now on.
  virtual void SetCounting(bool counting) = 0;

  // True once the engine thread has died of an error of its own, or hangs in a step. New requests are refused with
  // UNAVAILABLE; only a restart helps. After an error every request has finished with kError; one that hangs tells
  // nobody anything, and the object cannot be destroyed.
  virtual bool failed() const = 0;
};

// What a process of mpirun that is not rank 0 does: takes part in the steps of the engine there until it is stopped.
// ABORTED with the reason where the group has failed after it was loaded: then nothing of it can be waited for, and
// _exit is the end. `sampled_vocab` as above; the same in all processes.
bool FollowsAnEngine(const EngineOptions& options);
absl::Status FollowEngine(const EngineOptions& options, int32_t sampled_vocab, absl::FunctionRef<void()> on_loaded);

}  // namespace dejavu

#endif  // ENGINE_ENGINE_H_
