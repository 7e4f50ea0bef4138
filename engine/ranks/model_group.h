// ModelGroup: a model on the ranks that hold it, as rank 0 has it: one rank, threads of this process, or the processes
// that mpirun started. Every rank has a device, its shard of the weights, its predictor, its heads' keys and values and
// an OptModel. Rank 0 says what the next step is; the others follow. One thread at a time.
//
// A peer that is lost makes Launch, Await, Forward and Ping throw (kernels/communicator.h).
#ifndef ENGINE_RANKS_MODEL_GROUP_H_
#define ENGINE_RANKS_MODEL_GROUP_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/load/loaded_model.h"
#include "engine/model/batch.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_model.h"
#include "engine/model/predictor.h"
#include "engine/ranks/step_message.h"
#include "kernels/backend.h"
#include "kernels/communicator.h"

namespace dejavu {

struct GroupOptions {
  ModelOptions model;           // rank, ranks and draft_weights are the group's
  std::string device = "auto";  // as CreateDevice has it; each rank has a GPU of its own, and an equal part of the CPUs
  int threads = 0;              // of the CPU, all ranks of this process together; 0: one per CPU
  bool pin = true;
  // 0: the processes that mpirun started, or one. 1: this process alone. Else threads of this process, or under mpirun
  // its processes, if they are so many.
  int ranks = 0;
  double timeout_s = 3.0;  // how long a rank waits for another once all are loaded; 0: for ever

  // The shape of the largest step, and of the cache.
  int32_t max_rows = 0, max_logit_rows = 0, slots = 0, blocks_per_slot = 0;
  int32_t max_audits = 0;
  int32_t block_tokens = 16;
  DType kv_dtype = DType::kFloat16;
  int32_t candidates = 0;  // ids below may be drawn; 0: all
  // What a rank has room for, in front of its device; the least of all ranks is taken.
  struct Room {
    int32_t kv_blocks = 0;
    bool draft_weights = false;
  };
  std::function<absl::StatusOr<Room>(const Backend&, int rank, int ranks)> plan_memory;
  // What stands between rank 0's model and device, such as a decorator that measures; empty: nothing.
  std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>)> wrap_backend;
};

// What that comes to. INVALID_ARGUMENT where mpirun disagrees.
absl::StatusOr<int> GroupSize(int ranks);

class ModelGroup {
 public:
  // Of rank 0. Fails on every rank where it fails on one, with that one's reason.
  static absl::StatusOr<std::unique_ptr<ModelGroup>> Create(const GroupOptions& options, const OptConfig& config,
                                                            const LoadProgress& progress);
  ~ModelGroup();
  ModelGroup(const ModelGroup&) = delete;
  ModelGroup& operator=(const ModelGroup&) = delete;

  // Of the other processes of mpirun: takes part until rank 0 stops the group. ABORTED with the reason where the group
  // has failed after it was loaded: the process should then end at once, by _exit.
  static absl::Status Follow(const GroupOptions& options, const OptConfig& config, absl::FunctionRef<void()> on_loaded);

  // As OptModel has them, on all ranks. RunsAhead: whether a step may be launched before the last one is awaited.
  uint64_t Launch(const Batch& batch, const StepOutputs& out);
  void Await(uint64_t mark, const Batch& batch, const StepOutputs& out);
  void Forward(const Batch& batch, const StepOutputs& out) { Await(Launch(batch, out), batch, out); }
  bool RunsAhead() const;

  // Throws unless every rank is there; to be called at least every timeout_s / 2 while there are no steps.
  void Ping();

  // Replaces the predictor of a group of one; nullptr: none.
  absl::Status SetPredictor(const PredictorData* data);

  // The predictor's data on the host; the devices keep what they have.
  void DropPredictorData();

  std::string Description() const;
  int ranks() const;
  int32_t kv_blocks() const { return kv_blocks_; }
  CommunicatorStats communication() const;
  // Of all ranks.
  int64_t weight_bytes() const { return weight_bytes_; }
  int64_t draft_weight_bytes() const { return draft_weight_bytes_; }

  // Of rank 0.
  Backend& backend();
  Predictor& predictor();
  OptModel& model();
  const LoadedModel& loaded() const;

 private:
  class Rank;
  class Threads;

  explicit ModelGroup(const GroupOptions& options);

  template <typename Call>
  auto Guard(const Call& call);

  const GroupOptions options_;
  std::unique_ptr<Threads> threads_;  // the other ranks of this process; ends after rank 0
  std::unique_ptr<Rank> rank_;
  int32_t kv_blocks_ = 0;
  int64_t weight_bytes_ = 0, draft_weight_bytes_ = 0;
  bool failed_ = false;  // a call threw: nobody is there to be stopped
};

}  // namespace dejavu

#endif  // ENGINE_RANKS_MODEL_GROUP_H_
