// StepEngine: the Engine that serves. One thread of its own schedules, runs the steps and calls the sinks; callers
// reach the inbox, and what may be read by any thread. Only create.cc makes one.
#ifndef ENGINE_SERVING_STEP_ENGINE_H_
#define ENGINE_SERVING_STEP_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/model/batch.h"
#include "engine/model/opt_config.h"
#include "engine/ranks/model_group.h"
#include "engine/scheduling/block_pool.h"
#include "engine/scheduling/scheduler.h"
#include "engine/serving/check_request.h"
#include "engine/serving/draws.h"
#include "engine/serving/fault.h"
#include "engine/serving/flights.h"
#include "engine/serving/hand_out.h"
#include "engine/serving/inbox.h"
#include "engine/serving/recorder.h"
#include "engine/serving/sparsity_control.h"
#include "engine/serving/watchdog.h"
#include "kernels/base/clock.h"

namespace dejavu {

class StepEngine final : public Engine {
 public:
  // `options` have been checked; `candidates`: ids below may be chosen.
  StepEngine(const EngineOptions& options, const OptConfig& config, int32_t candidates, const Fault& fault,
             std::unique_ptr<ModelGroup> group);
  ~StepEngine() override;

  // Once. Returns when the engine thread has warmed up.
  void Start();

  const ModelShape& model() const override { return config_; }
  std::string backend_description() const override { return group_->Description(); }
  int64_t weight_bytes() const override { return group_->weight_bytes(); }
  int64_t draft_weight_bytes() const override { return group_->draft_weight_bytes(); }
  const char* weight_type() const override { return Name(group_->loaded().weights.dtype()); }
  const PredictorInfo& predictor() const override { return predictor_info_; }
  const std::string& synthetic() const override { return group_->loaded().synthetic; }
  absl::Status CheckTier(Tier tier) const override { return dejavu::CheckTier(tier, predictor_info_); }
  absl::StatusOr<uint64_t> SubmitSamples(Request request, std::vector<std::shared_ptr<TokenSink>> sinks) override;
  void CountRefused(Refusal reason, int samples) override { inbox_.CountRefused(reason, samples); }
  void Cancel(uint64_t id) override { inbox_.Cancel(id); }
  void Drain(bool refuse_waiting) override { inbox_.Drain(refuse_waiting); }
  bool WaitIdle(SteadyTime deadline) override { return inbox_.WaitIdle(deadline); }
  absl::Status ReloadPredictor() override;
  const StepTrace& trace() const override { return recorder_.trace(); }
  EngineStats stats() const override;
  SparsityStats sparsity_stats() const override { return sparsity_.stats(); }
  const EngineMetrics& metrics() const override { return recorder_.metrics(); }
  void SetCounting(bool counting) override { recorder_.metrics().counting = counting; }
  bool failed() const override { return inbox_.failed(); }
  void SetLoadSeconds(double seconds) { recorder_.metrics().load_seconds.Set(seconds); }

 private:
  // Engine thread, all of it.
  void Prepare();
  void Run();
  bool TakeMail();
  void Ping();
  void SwapPredictor(PredictorReload& reload);
  void EndCancelled(uint64_t id);
  void EndWaiting(const absl::Status& status);
  void EndOverdue();
  void Fail(const char* reason, const absl::Status& status);
  void Step();
  void LaunchPlanned(StepTimes* times);
  void RunAhead();
  void HandOutAll(const StepResults& results);
  void NoteAdmissions();
  void InjectFault();
  void End(const Sequence& s, Ending ending);
  void EndNoted();
  void EndAll(FinishReason reason, const absl::Status& status);
  bool idle() const { return scheduler_.running().empty() && scheduler_.waiting().empty(); }
  void NoteState() { recorder_.NoteState(scheduler_, pool_, group_->communication()); }

  // Constant after construction.
  const EngineOptions options_;
  const OptConfig config_;
  const Fault fault_;
  const std::unique_ptr<ModelGroup> group_;
  const PredictorInfo predictor_info_;

  // With locks of their own, or none.
  Recorder recorder_;
  Inbox inbox_;
  Watchdog watchdog_;
  std::atomic<uint64_t> groups_ = 0;  // of samples that share blocks with nobody else

  // Engine thread only.
  BlockPool pool_;
  Scheduler scheduler_;
  SparsityControl sparsity_;
  Flights flights_;
  Batch shadow_batch_;
  std::vector<float> shadow_logits_;  // [max batch, vocab], where there is a predictor
  HandOut hand_out_;
  Draws draws_;
  Inbox::Mail mail_;
  struct NotedEnd {
    const Sequence* sequence;
    Ending ending;
  };
  std::vector<NotedEnd> ends_;  // decided while nothing may be removed
  SteadyTime since_;            // the device has nothing else to do than the current step

  std::thread thread_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_STEP_ENGINE_H_
