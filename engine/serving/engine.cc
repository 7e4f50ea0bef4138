// The step loop: take in what callers asked for, plan a batch, run it, hand out its tokens. One thread does all of it;
// callers only reach the inbox, under its mutex.
#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <exception>
#include <future>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/load/loaded_model.h"
#include "engine/model/batch.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_model.h"
#include "engine/model/predictor.h"
#include "engine/model/predictor_file.h"
#include "engine/planning/memory_plan.h"
#include "engine/ranks/model_group.h"
#include "engine/scheduling/admission.h"
#include "engine/scheduling/block_pool.h"
#include "engine/scheduling/scheduler.h"
#include "engine/serving/sampler.h"
#include "engine/serving/sparsity_control.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"
#include "kernels/draw.h"
#include "kernels/mpi/open_mpi.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

absl::StatusOr<GroupOptions> ForGroup(const EngineOptions& o, const OptConfig& config, int32_t sampled_vocab) {
  GroupOptions group;
  group.model = {o.model, o.weights, o.predictor};
  group.device = o.device;
  group.threads = o.threads;
  group.pin = o.pin_threads;
  group.ranks = o.tensor_parallel;
  group.timeout_s = o.peer_timeout_s;
  group.max_rows = o.scheduler.max_step_tokens;
  group.max_logit_rows = o.scheduler.max_batch + o.scheduler.score_rows;
  group.slots = group.max_audits = o.scheduler.max_batch;
  group.blocks_per_slot = (config.context + o.kv.block_tokens - 1) / o.kv.block_tokens;
  group.block_tokens = o.kv.block_tokens;
  group.candidates = sampled_vocab > 0 ? std::min(sampled_vocab, config.vocab) : config.vocab;
  ASSIGN_OR_RETURN(group.kv_dtype, ParseKvType(o.kv.dtype));
  group.plan_kv_blocks = [o, config](const Backend& backend, int rank, int ranks) -> absl::StatusOr<int32_t> {
    ASSIGN_OR_RETURN(const MemoryPlan plan, PlanMemory(o, config, backend, rank, ranks));
    const std::string who = ranks > 1 ? absl::StrCat("rank ", rank, " of ", ranks, ", ") : "";
    spdlog::info("{}{}: {}", who, backend.Description(), plan.ToString());
    return plan.kv_blocks;
  };
  return group;
}

// "throw@N" and "hang@N": what the engine thread does instead of its step N. For tests.
struct Fault {
  bool hang = false;
  int64_t step = 0;  // 0: none
};

absl::StatusOr<Fault> ParseFault(const std::string& text) {
  Fault fault;
  if (text.empty()) return fault;
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('@', 1));
  fault.hang = parts.first == "hang";
  if ((parts.first != "throw" && parts.first != "hang") || !absl::SimpleAtoi(parts.second, &fault.step) ||
      fault.step < 1) {
    return absl::InvalidArgumentError(absl::StrCat("fault is '", text, "'; it must be throw@STEP or hang@STEP"));
  }
  return fault;
}

class StepEngine final : public Engine {
 public:
  StepEngine(const EngineOptions& options, const OptConfig& config, int32_t candidates,
             std::unique_ptr<ModelGroup> group)
      : options_(options),
        config_(config),
        metrics_(*MetricEdgesFrom(options.metrics.edges)),
        group_(std::move(group)),
        pool_(group_->kv_blocks(), options.kv.block_tokens),
        scheduler_(pool_, options.scheduler),
        batch_(options.scheduler.max_step_tokens, options.scheduler.max_batch + options.scheduler.score_rows,
               options.scheduler.max_batch, pool_.BlocksFor(config.context)),
        sampler_(config.vocab, candidates),
        logits_(static_cast<size_t>(batch_.max_logit_rows) * config.vocab),
        shadow_batch_(options.scheduler.max_batch, options.scheduler.max_batch, options.scheduler.max_batch,
                      batch_.blocks_per_slot),
        admission_(options.admission, options.scheduler) {
    counts_.reserve(options.scheduler.max_batch);
    for (int i = 0; i < options.scheduler.max_batch; ++i)
      counts_.emplace_back(config.vocab);  // copies would lose what is reserved
    metrics_.counting = options.metrics.count;
    banned_.reserve(64);
    finished_.reserve(options.scheduler.max_batch);
  }
  ~StepEngine() override;

  // Once, in this order. Start returns when the engine thread has run its warm-up step.
  absl::Status Prepare(double load_seconds);
  void Start();

  const ModelShape& model() const override { return config_; }
  std::string backend_description() const override { return group_->Description(); }
  int64_t weight_bytes() const override { return group_->weight_bytes(); }
  const char* weight_type() const override { return Name(group_->loaded().weights.dtype()); }
  const PredictorInfo& predictor() const override { return predictor_info_; }
  const std::string& synthetic() const override { return group_->loaded().synthetic; }
  absl::Status CheckTier(Tier tier) const override;
  absl::StatusOr<uint64_t> SubmitSamples(Request request, std::vector<std::shared_ptr<TokenSink>> sinks) override;
  void Cancel(uint64_t id) override;
  void Drain(bool refuse_waiting) override;
  bool WaitIdle(SteadyTime deadline) override;
  absl::Status ReloadPredictor() override;
  const StepTrace& trace() const override { return trace_; }
  EngineStats stats() const override;
  SparsityStats sparsity_stats() const override { return sparsity_->stats(); }
  const EngineMetrics& metrics() const override { return metrics_; }
  void SetCounting(bool counting) override { metrics_.counting = counting; }
  bool failed() const override { return failed_.load(); }

 private:
  // What a step leaves beside logits. Where the device runs ahead the next one is launched before this one is awaited.
  struct Flight {
    uint64_t mark = 0;
    std::vector<int32_t> drawn;  // [max logit rows]
    StepCounts counts;
  };

  // A predictor that waits to be swapped in, and what became of it.
  struct Reload {
    PredictorData data;
    std::optional<absl::Status> result;  // guarded by mutex_
  };

  absl::Status CheckRequest(const Request& request) const;
  absl::StatusOr<PredictorData> ReadPredictorAgain() const;

  // Engine thread.
  void WarmUp();
  void MeasureBandwidth();
  void NoteStepMetrics(SteadyTime start, SteadyTime planned, SteadyTime shadowed, SteadyTime done);
  void NoteEnd(const Sequence& s, bool waiting);
  void WarmUpStep(int32_t decode_rows, int32_t prefill_rows, bool learn);
  void Run();
  bool TakeInbox();
  void SwapPredictor(Reload& reload);
  void TraceStep(SteadyTime start, SteadyTime planned, SteadyTime shadowed, SteadyTime done);
  void Ping();
  SteadyTime::duration PingInterval() const;
  void EndOverdue();
  void EndWaiting(const absl::Status& status);
  void Break();
  void Fail(const char* reason, const absl::Status& status);
  void Step();
  void NoteAdmissions();
  void InformAdmission() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Watch();
  StepOutputs OutputsOf(Flight& flight);
  void Launch(Flight& flight);
  void RunAhead();
  void DropAhead();
  bool MayDraw() const;
  void PlanDraws(int32_t ahead);
  void HandOut(Sequence& s);
  void HandOutScores(Sequence& s);
  void HandOutToken(Sequence& s);
  bool IsStop(const Sequence& s, int32_t id) const;
  void End(const Sequence& s, FinishReason reason, absl::Status status = absl::OkStatus());
  void EndAll(FinishReason reason, const absl::Status& status);
  void PublishStats();

  // Constant after Load.
  const EngineOptions options_;
  const OptConfig config_;
  EngineMetrics metrics_;
  const std::unique_ptr<ModelGroup> group_;
  PredictorInfo predictor_info_;
  Fault fault_;

  // Engine thread only.
  BlockPool pool_;
  Scheduler scheduler_;
  Batch batch_;
  Sampler sampler_;
  std::vector<TokenCounts> counts_;  // [slots]
  std::vector<float> logits_;        // [max logit rows, vocab]; as the next unless the device draws
  Batch shadow_batch_;
  std::vector<float> shadow_logits_;  // [max batch, vocab], where there is a predictor
  std::array<Flight, 2> flights_;
  size_t current_ = 0;    // the flight that is awaited next
  bool ahead_ = false;    // and the step after it has been launched
  SteadyTime step_done_;  // when the current step's results had come
  SteadyTime since_;      // the device has nothing else to do than the current step
  std::unique_ptr<SparsityControl> sparsity_;
  std::vector<int32_t> banned_;                     // scratch
  std::vector<std::unique_ptr<Sequence>> arrived_;  // taken out of the inbox
  std::vector<uint64_t> dismissed_;
  struct Ending {
    const Sequence* sequence;
    FinishReason reason;
    absl::Status status;
  };
  std::vector<Ending> finished_;  // decided in this step, ended after it

  // The inbox.
  mutable Mutex mutex_;
  CondVar work_;     // something for the engine thread
  CondVar idle_;     // unfinished_ became 0
  CondVar swapped_;  // reload_ was taken, or has its result
  std::shared_ptr<Reload> reload_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Sequence>> submitted_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint64_t> cancelled_ ABSL_GUARDED_BY(mutex_);
  Admission admission_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  int32_t unheard_ ABSL_GUARDED_BY(mutex_) = 0;  // accepted, OnFinish not called yet
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool refuse_waiting_ ABSL_GUARDED_BY(mutex_) = false;
  CostParameters costs_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<uint64_t> groups_ = 0;  // of samples that share blocks with nobody else
  std::atomic<bool> failed_ = false;
  std::atomic<bool> has_mail_ = false;  // the inbox has changed since the engine thread looked

  // The watchdog: how many steps have begun and ended, and since when the last one runs.
  std::atomic<int64_t> steps_begun_ = 0, steps_ended_ = 0;
  std::thread watchdog_;
  CondVar watch_;  // stopping_ became true

  // Written by the engine thread.
  StepTrace trace_;
  std::atomic<int32_t> stat_running_ = 0, stat_free_blocks_ = 0, stat_cached_blocks_ = 0;
  std::atomic<int64_t> stat_cost_steps_ = 0, stat_cached_prompt_tokens_ = 0, stat_preemptions_ = 0;
  std::atomic<int64_t> stat_oldest_arrival_ = 0;  // of those that wait, as the clock counts; 0: nobody
  Counter<int64_t> stat_all_reduces_, stat_all_reduce_ns_;
  std::atomic<int64_t> stat_steps_ = 0, stat_prompt_tokens_ = 0, stat_generated_tokens_ = 0;

  std::thread thread_;
};

StepEngine::~StepEngine() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    has_mail_ = true;
    work_.NotifyAll();
    watch_.NotifyAll();
  }
  if (watchdog_.joinable()) watchdog_.join();
  if (thread_.joinable()) thread_.join();
}

absl::Status StepEngine::Prepare(double load_seconds) {
  metrics_.load_seconds.Set(load_seconds);
  ASSIGN_OR_RETURN(fault_, ParseFault(options_.fault));
  const LoadedModel& loaded = group_->loaded();
  const PredictorData* const from = loaded.predictor.has_value() ? &*loaded.predictor : nullptr;
  if (from != nullptr) {
    predictor_info_ = {loaded.predictor_path, std::string(Name(from->tap)), from->tiers, group_->predictor().bytes()};
    shadow_logits_.resize(static_cast<size_t>(options_.scheduler.max_batch) * config_.vocab);
  }
  sparsity_ = std::make_unique<SparsityControl>(config_, from, loaded.weights, group_->predictor(),
                                                options_.shadow_fallback, metrics_);
  group_->DropPredictorData();  // the devices have it
  for (Flight& flight : flights_) {
    flight.drawn.resize(batch_.max_logit_rows);
    flight.counts = group_->predictor().MakeCounts();
  }
  return absl::OkStatus();
}

void StepEngine::Start() {
  std::promise<void> warm;
  const std::future<void> is_warm = warm.get_future();
  thread_ = std::thread([this, warm = std::move(warm)]() mutable {
    WarmUp();
    warm.set_value();
    Run();
  });
  is_warm.wait();
  if (options_.watchdog_s > 0.0) watchdog_ = std::thread([this] { Watch(); });
}

// Steps of the kinds that will come, so that scratch has grown, weights and threads have been touched, and their times
// are known, before the first request. Whoever takes these blocks later overwrites them.
void StepEngine::WarmUp() {
  const SteadyTime start = std::chrono::steady_clock::now();
  MeasureBandwidth();
  std::iota(batch_.block_table.begin(), batch_.block_table.begin() + batch_.blocks_per_slot, 0);
  const int32_t batch = std::min(options_.scheduler.max_batch, config_.context);
  const int32_t chunk = std::min({options_.scheduler.prefill_chunk_tokens, config_.context - 1, batch_.max_rows - 1});
  // Where prompts are cheap the largest step at once: its scratch is taken now, or never.
  WarmUpStep(0, group_->RunsAhead() ? batch_.max_rows : std::max(batch, chunk), /*learn=*/false);
  for (int i = 0; i < 3; ++i) {
    WarmUpStep(1, 0, /*learn=*/true);
    WarmUpStep(batch, 0, /*learn=*/true);
    if (chunk > 0) WarmUpStep(1, chunk, /*learn=*/true);
  }
  stat_cost_steps_ = scheduler_.costs().steps();
  metrics_.warm_up_seconds.Set(MillisecondsSince(start) / 1e3);
  PublishStats();
  MutexLock lock(mutex_);
  InformAdmission();
}

// How fast rank 0's device reads what it holds of the weights, or a part of a large model.
void StepEngine::MeasureBandwidth() {
  constexpr int64_t kMostBytes = int64_t{1} << 30;
  constexpr int kPasses = 3;
  Backend& device = group_->backend();
  const Tensor all = group_->loaded().weights.memory(), memory = all.Cols(0, std::min(all.cols, kMostBytes));
  double best_ms = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kPasses; ++i) {
    device.Stamp(0);
    device.ReadAll(memory);
    device.Stamp(1);
    best_ms = std::min(best_ms, device.ElapsedMs(0, 1));
  }
  metrics_.measured_bandwidth.Set(static_cast<double>(memory.bytes()) * group_->ranks() / (best_ms / 1e3));
}

void StepEngine::WarmUpStep(int32_t decode_rows, int32_t prefill_rows, bool learn) {
  batch_.Clear();
  SparsityParams exact;
  exact.tier = Tier::kExact;
  for (int32_t i = 0; i < decode_rows; ++i) batch_.AddDecodeRow(0, i, config_.bos_token, /*wants_logits=*/true, exact);
  for (int32_t i = 0; i < prefill_rows; ++i) {
    const bool last = i + 1 == prefill_rows;
    batch_.AddRow(0, (decode_rows == 0 ? i : i + 1) % config_.context, config_.bos_token, last);
  }
  const SteadyTime start = std::chrono::steady_clock::now();
  group_->Forward(batch_, {logits_.data()});
  const int64_t context = int64_t{decode_rows} * (decode_rows - 1) / 2;
  if (learn) scheduler_.Learn({Tier::kExact, decode_rows, prefill_rows, context}, MillisecondsSince(start));
  batch_.Clear();
}

absl::Status StepEngine::CheckRequest(const Request& r) const {
  const auto check_id = [&](const char* what, int32_t id) {
    if (0 <= id && id < config_.vocab) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(what, " has id ", id, "; ids go from 0 to ", config_.vocab - 1));
  };
  if (r.prompt.empty()) return absl::InvalidArgumentError("the prompt is empty; it needs at least one token");
  for (int32_t id : r.prompt) RETURN_IF_ERROR(check_id("the prompt", id));
  for (int32_t id : r.stop_token_ids) RETURN_IF_ERROR(check_id("stop_token_ids", id));
  for (int32_t id : r.sampling.allowed_token_ids) RETURN_IF_ERROR(check_id("allowed_token_ids", id));
  for (const auto& bias : r.sampling.logit_bias) RETURN_IF_ERROR(check_id("logit_bias", bias.first));
  if (r.max_new_tokens < (r.score ? 0 : 1)) {
    return absl::InvalidArgumentError(absl::StrCat("max_new_tokens is ", r.max_new_tokens, "; it must be at least 1"));
  }
  if (r.score && r.max_new_tokens != 0)
    return absl::InvalidArgumentError("a scored prompt generates nothing: max_new_tokens must be 0");
  if (r.top_logprobs < 0 || r.top_logprobs > config_.vocab) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_logprobs is ", r.top_logprobs, "; it must be in 0 ... ", config_.vocab));
  }
  const int64_t tokens = static_cast<int64_t>(r.prompt.size()) + r.max_new_tokens;
  if (tokens > config_.context) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", r.prompt.size(), " tokens and max_new_tokens is ",
                                                   r.max_new_tokens, "; the model allows ", config_.context,
                                                   " together"));
  }
  return absl::OkStatus();
}

absl::Status StepEngine::CheckTier(Tier tier) const {
  const std::vector<Tier>& tiers = predictor_info_.tiers;
  if (!IsPredicted(tier) || std::find(tiers.begin(), tiers.end(), tier) != tiers.end()) return absl::OkStatus();
  if (predictor_info_.path.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("tier ", Name(tier), " needs a predictor, and none is loaded (see dejavu-calibrate)"));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the predictor ", predictor_info_.path, " has no operating point for tier ", Name(tier)));
}

absl::StatusOr<uint64_t> StepEngine::SubmitSamples(Request request, std::vector<std::shared_ptr<TokenSink>> sinks) {
  const auto samples = static_cast<int>(sinks.size());
  CHECK(samples > 0 && (samples == 1 || !request.score)) << samples << " samples";
  absl::Status valid = CheckRequest(request);
  valid.Update(CheckTier(request.sparsity.tier));
  if (!valid.ok()) {
    MutexLock lock(mutex_);
    return admission_.Refuse(Refusal::kInvalid, std::move(valid), std::chrono::milliseconds(0), samples);
  }
  // All that needs no lock.
  const SteadyTime now = std::chrono::steady_clock::now();
  std::vector<BlockKey> keys;
  const bool cached = options_.kv.prefix_cache && request.prefix_cache;
  if (!request.score && (cached || samples > 1)) {
    keys =
        BlockKeys(request.tenant, request.cache_salt, request.prompt, options_.kv.block_tokens, cached ? 0 : ++groups_);
  }
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (std::shared_ptr<TokenSink>& sink : sinks) {
    auto sequence = std::make_unique<Sequence>(request, std::move(sink));
    sequence->keys = keys;
    sequence->arrival = sequence->finish.queued = now;
    sequences.push_back(std::move(sequence));
    ++request.sampling.seed;
  }

  constexpr std::chrono::milliseconds kElsewhere(1000);  // another server, or this one after its restart
  MutexLock lock(mutex_);
  if (failed_) {
    return admission_.Refuse(Refusal::kFailed,
                             absl::UnavailableError("the engine has failed; the server must be restarted"), kElsewhere,
                             samples);
  }
  if (draining_ || stopping_) {
    return admission_.Refuse(Refusal::kDraining,
                             absl::UnavailableError("the engine is draining; it takes no new requests"), kElsewhere,
                             samples);
  }
  Expectation expected;
  RETURN_IF_ERROR(admission_.Admit(request, now, &expected, samples));
  const uint64_t first = next_id_;
  for (std::unique_ptr<Sequence>& sequence : sequences) {
    sequence->expected = expected;
    sequence->id = next_id_++;
    submitted_.push_back(std::move(sequence));
  }
  unheard_ += samples;
  has_mail_ = true;
  work_.NotifyOne();
  return first;
}

void StepEngine::Cancel(uint64_t id) {
  MutexLock lock(mutex_);
  cancelled_.push_back(id);
  has_mail_ = true;
  work_.NotifyOne();
}

void StepEngine::Drain(bool refuse_waiting) {
  MutexLock lock(mutex_);
  draining_ = true;
  refuse_waiting_ = refuse_waiting;
  has_mail_ = true;
  work_.NotifyOne();
}

bool StepEngine::WaitIdle(SteadyTime deadline) {
  MutexLock lock(mutex_);
  while (unheard_ > 0) {
    if (!idle_.WaitUntil(mutex_, deadline)) return unheard_ == 0;
  }
  return true;
}

EngineStats StepEngine::stats() const {
  EngineStats stats;
  {
    MutexLock lock(mutex_);
    stats.waiting = static_cast<int32_t>(admission_.waiting());
    stats.waiting_tokens = admission_.waiting_prompt_tokens();
    for (int u = 0; u < kUrgencies; ++u) {
      stats.waiting_of[u] = static_cast<int32_t>(admission_.waiting(static_cast<Urgency>(u)));
    }
    stats.account = admission_.account();
    stats.costs = costs_;
  }
  stats.cost_steps = stat_cost_steps_;
  if (const int64_t oldest = stat_oldest_arrival_.load(std::memory_order_relaxed); oldest != 0) {
    stats.oldest_wait_s = MillisecondsSince(SteadyTime(SteadyTime::duration(oldest))) / 1e3;
  }
  stats.ranks = group_->ranks();
  stats.all_reduces = stat_all_reduces_.value();
  stats.all_reduce_ns = stat_all_reduce_ns_.value();
  stats.kv_blocks_cached = stat_cached_blocks_;
  stats.cached_prompt_tokens = stat_cached_prompt_tokens_;
  stats.preemptions = stat_preemptions_;
  stats.running = stat_running_;
  stats.kv_blocks_total = pool_.total();
  stats.kv_blocks_free = stat_free_blocks_;
  stats.steps = stat_steps_;
  stats.prompt_tokens = stat_prompt_tokens_;
  stats.generated_tokens = stat_generated_tokens_;
  return stats;
}

absl::StatusOr<PredictorData> StepEngine::ReadPredictorAgain() const {
  const std::string& path = predictor_info_.path;
  if (group_->ranks() > 1) {
    return absl::UnimplementedError("a model on several ranks keeps the predictor that was loaded; restart it");
  }
  if (path.empty()) {
    return absl::FailedPreconditionError("no predictor is loaded, and no memory is planned for one; restart with it");
  }
  if (path == kGeneratedPredictor) {
    return absl::FailedPreconditionError("the predictor belongs to the synthetic model; there is no file to read");
  }
  ASSIGN_OR_RETURN(PredictorData data, ReadPredictor(path, config_, group_->loaded().weights_hash));
  if (data.tiers != predictor_info_.tiers) {
    return absl::FailedPreconditionError(
        absl::StrCat("the predictor ", path, " serves other tiers than the loaded one; restart with it"));
  }
  return data;
}

absl::Status StepEngine::ReloadPredictor() {
  const auto reload = std::make_shared<Reload>();
  ASSIGN_OR_RETURN(reload->data, ReadPredictorAgain());
  // A failed engine tells nobody.
  constexpr std::chrono::milliseconds kLook(200);
  MutexLock lock(mutex_);
  while (!reload->result.has_value()) {
    if (failed_ || stopping_) return absl::UnavailableError("the engine has failed; the server must be restarted");
    if (reload_ == nullptr) {
      reload_ = reload;
      has_mail_ = true;
      work_.NotifyOne();
    }
    swapped_.WaitUntil(mutex_, std::chrono::steady_clock::now() + kLook);
  }
  return *reload->result;
}

void StepEngine::SwapPredictor(Reload& reload) {
  const absl::Status status = group_->predictor().Reload(reload.data, group_->loaded().shard);
  if (status.ok()) {
    sparsity_->Reset(reload.data);
    spdlog::info("the predictor {} was read again", predictor_info_.path);
  }
  MutexLock lock(mutex_);
  reload.result = status;
  reload_.reset();
  swapped_.NotifyAll();
}

void StepEngine::Run() {
  try {
    while (TakeInbox()) {
      if (failed_) throw std::runtime_error("a step took longer than the watchdog allows");
      EndOverdue();
      DropAhead();
      if (!scheduler_.running().empty() || !scheduler_.waiting().empty()) Step();
    }
    EndAll(FinishReason::kShutdown, absl::OkStatus());
  } catch (const PeerLost& error) {
    Fail(error.what(), absl::UnavailableError("the engine has lost one of its ranks; the server must be restarted"));
  } catch (const std::exception& error) {
    Fail(error.what(), absl::InternalError("the engine failed; the server must be restarted"));
  }
}

// The last thing that the engine thread does. `status` is for those that ran.
void StepEngine::Fail(const char* reason, const absl::Status& status) {
  spdlog::critical("the engine thread failed: {}", reason);
  failed_ = true;
  steps_ended_.store(steps_begun_);
  finished_.clear();
  TakeInbox();
  EndWaiting(absl::UnavailableError("the engine failed before the request ran; the server must be restarted"));
  EndAll(FinishReason::kError, status);
}

// A step that takes longer than any step should will not come back: whoever asks learns that the engine has failed.
void StepEngine::Watch() {
  const auto limit =
      std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(options_.watchdog_s));
  SteadyTime since = std::chrono::steady_clock::now();
  int64_t seen = -1;
  MutexLock lock(mutex_);
  while (!stopping_) {
    const SteadyTime now = std::chrono::steady_clock::now();
    const int64_t begun = steps_begun_;
    if (begun != seen || steps_ended_ == begun) {
      seen = begun;
      since = now;
    }
    if (now - since >= limit) {
      spdlog::critical("step {} has not ended within {} s; the engine is given up", begun, options_.watchdog_s);
      failed_ = true;
      return;
    }
    watch_.WaitUntil(mutex_, now + limit / 8);
  }
}

// Waits while there is nothing to do. False: stop.
bool StepEngine::TakeInbox() {
  const bool busy = !scheduler_.running().empty() || !scheduler_.waiting().empty();
  if (busy && !has_mail_.load(std::memory_order_acquire)) return true;
  bool stopping, refuse_waiting, ping = false;
  std::shared_ptr<Reload> reload;
  {
    MutexLock lock(mutex_);
    const auto nothing = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return !busy && !stopping_ && !failed_ && submitted_.empty() && cancelled_.empty() && reload_ == nullptr;
    };
    while (nothing() && group_->ranks() == 1) work_.Wait(mutex_);
    if (nothing() && !work_.WaitUntil(mutex_, std::chrono::steady_clock::now() + PingInterval())) ping = nothing();
    if (!ahead_) reload = reload_;
    has_mail_.store(reload_ != reload, std::memory_order_release);
    arrived_.swap(submitted_);
    dismissed_.swap(cancelled_);
    stopping = stopping_;
    refuse_waiting = refuse_waiting_;
  }
  if (ping) Ping();
  if (reload != nullptr) SwapPredictor(*reload);
  for (auto& sequence : arrived_) scheduler_.Enqueue(std::move(sequence));
  arrived_.clear();
  for (uint64_t id : dismissed_) {
    const auto cancel_in = [&](const auto& sequences) {
      for (const auto& s : sequences) {
        if (s->id != id) continue;
        End(*s, FinishReason::kCancelled);
        return;
      }
    };
    cancel_in(scheduler_.running());
    cancel_in(scheduler_.waiting());
  }
  dismissed_.clear();
  if (refuse_waiting) EndWaiting(absl::UnavailableError("the server is draining and the request had not run yet"));
  return !stopping;
}

// Tells the other ranks that there is still somebody, and finds out whether they are. The watchdog looks on.
void StepEngine::Ping() {
  steps_begun_.fetch_add(1);
  group_->Ping();
  steps_ended_.fetch_add(1);
}

SteadyTime::duration StepEngine::PingInterval() const {
  const double seconds = options_.peer_timeout_s > 0.0 ? options_.peer_timeout_s / 4.0 : 1.0;
  return std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(seconds));
}

// What has not run yet; who was sent back to the queue has.
void StepEngine::EndWaiting(const absl::Status& status) {
  for (const auto& s : scheduler_.waiting()) {
    if (s->preemptions == 0) finished_.push_back({s.get(), FinishReason::kError, status});
  }
  for (const Ending& ending : finished_) End(*ending.sequence, ending.reason, ending.status);
  finished_.clear();
}

void StepEngine::EndOverdue() {
  const SteadyTime now = std::chrono::steady_clock::now();
  const auto note = [&](const auto& sequences) {
    for (const auto& s : sequences) {
      if (s->request.deadline <= now) {
        finished_.push_back({s.get(), FinishReason::kDeadline, absl::OkStatus()});
      } else if (s->request.stop_at <= now) {
        finished_.push_back({s.get(), FinishReason::kTime, absl::OkStatus()});
      }
    }
  };
  note(scheduler_.running());
  note(scheduler_.waiting());
  for (const Ending& ending : finished_) End(*ending.sequence, ending.reason);
  finished_.clear();
}

void StepEngine::Step() {
  const SteadyTime start = std::chrono::steady_clock::now();
  SteadyTime planned = start, shadowed = start;
  if (std::exchange(ahead_, false)) {
    current_ = 1 - current_;
    steps_begun_.fetch_add(1);
  } else {
    scheduler_.Plan(start, batch_);
    NoteAdmissions();
    if (batch_.rows() == 0) return;
    if (steps_begun_.fetch_add(1) + 1 == fault_.step) Break();
    sparsity_->PlanShadow(scheduler_.running(), batch_, shadow_batch_);
    planned = std::chrono::steady_clock::now();
    if (shadow_batch_.rows() > 0) group_->Forward(shadow_batch_, {shadow_logits_.data()});
    if (shadow_batch_.rows() == 0 && MayDraw()) PlanDraws(0);
    since_ = shadowed = std::chrono::steady_clock::now();
    if (shadow_batch_.rows() == 0) planned = shadowed;  // the parts leave nothing out
    Launch(flights_[current_]);
  }
  RunAhead();
  Flight& flight = flights_[current_];
  group_->Await(flight.mark, batch_, OutputsOf(flight));
  const SteadyTime done = step_done_ = std::chrono::steady_clock::now();
  sparsity_->NoteStep(scheduler_.running(), batch_, flight.counts, logits_.data(), shadow_logits_.data());
  stat_steps_.fetch_add(1, std::memory_order_relaxed);
  for (const auto& s : scheduler_.running()) {
    if (s->step_rows > 0) HandOut(*s);
  }
  scheduler_.NoteStep(std::chrono::duration<double, std::milli>(done - since_).count());
  NoteStepMetrics(start, planned, shadowed, done);
  TraceStep(start, planned, shadowed, done);
  since_ = done;
  steps_ended_.fetch_add(1);
  stat_cost_steps_.store(scheduler_.costs().steps(), std::memory_order_relaxed);
  for (Ending& ending : finished_) End(*ending.sequence, ending.reason, std::move(ending.status));
  finished_.clear();
}

// The step that has been launched ahead, where nobody is left who wants it.
void StepEngine::DropAhead() {
  if (!ahead_ || !scheduler_.running().empty()) return;
  ahead_ = false;
  Flight& flight = flights_[1 - current_];
  group_->Await(flight.mark, batch_, OutputsOf(flight));
}

void StepEngine::NoteStepMetrics(SteadyTime start, SteadyTime planned, SteadyTime shadowed, SteadyTime done) {
  if (!metrics_.counting.load(std::memory_order_relaxed)) return;
  const StepShape& shape = scheduler_.shape();
  const StepPhase phase = shape.prefill_rows == 0 ? kDecodeStep : shape.decode_rows == 0 ? kPrefillStep : kMixedStep;
  const SteadyTime end = std::chrono::steady_clock::now();
  metrics_.step_duration[phase].Observe(Seconds(start, end));
  metrics_.step_component[kPlanPart].Observe(Seconds(start, planned));
  if (shadow_batch_.rows() > 0) metrics_.step_component[kShadowPart].Observe(Seconds(planned, shadowed));
  metrics_.step_component[kForwardPart].Observe(Seconds(shadowed, done));
  metrics_.step_component[kHandOutPart].Observe(Seconds(done, end));
  if (shape.decode_rows > 0) metrics_.batch_size.Observe(shape.decode_rows);
  metrics_.step_tokens.Observe(batch_.rows());
  if (phase != kDecodeStep || shadow_batch_.rows() > 0) return;
  constexpr double kNew = 0.1;
  const double now = static_cast<double>(sparsity_->step_bytes()) / Seconds(since_, done);
  const double before = metrics_.bandwidth.value();
  metrics_.bandwidth.Set(before == 0.0 ? now : before + kNew * (now - before));
}

// `s` has left, with its Finish filled in.
void StepEngine::NoteEnd(const Sequence& s, bool waiting) {
  const Finish& f = s.finish;
  const int32_t tokens = f.generated_tokens;
  const RequestStage stage = waiting && tokens == 0 ? kQueuedStage : tokens == 0 ? kPrefillStage : kDecodeStage;
  if (f.reason == FinishReason::kCancelled) metrics_.cancelled[stage].Add(1);
  if (f.reason == FinishReason::kDeadline) metrics_.deadline_exceeded[stage].Add(1);
  metrics_.prefix_query_tokens.Add(s.keys.empty() || stage == kQueuedStage ? 0 : f.prompt_tokens);
  if (f.reason == FinishReason::kError || f.reason == FinishReason::kShutdown || stage == kQueuedStage) return;
  EngineMetrics::Latencies& latencies = metrics_.latencies_of(s.request.sparsity.tier, s.request.urgency);
  latencies.duration.Observe(Seconds(f.queued, f.finished));
  latencies.queue.Observe(Seconds(f.queued, f.scheduled));
  if (tokens == 0) return;
  latencies.prefill.Observe(Seconds(f.scheduled, f.first_token));
  latencies.decode.Observe(Seconds(f.first_token, f.finished));
  const double per_token_s = tokens > 1 ? Seconds(f.first_token, s.last_token) / (tokens - 1) : 0.0;
  if (tokens > 1) latencies.time_per_output_token.Observe(per_token_s);
  if (f.sparsity.decode_tokens > 0) {
    metrics_.request_mlp_density.Observe(f.sparsity.mlp_density);
    metrics_.request_head_density.Observe(f.sparsity.head_density);
  }
  const auto note_slo = [&](Slo slo, double target_ms, double seconds) {
    if (target_ms > 0.0) (seconds * 1e3 <= target_ms ? metrics_.slo_attained : metrics_.slo_missed)[slo].Add(1);
  };
  note_slo(kTtftSlo, options_.metrics.slo_ttft_ms, Seconds(f.queued, f.first_token));
  if (tokens > 1) note_slo(kItlSlo, options_.metrics.slo_itl_ms, per_token_s);
}

StepOutputs StepEngine::OutputsOf(Flight& flight) { return {logits_.data(), flight.drawn.data(), &flight.counts}; }

void StepEngine::Launch(Flight& flight) { flight.mark = group_->Launch(batch_, OutputsOf(flight)); }

// The step after the current one, if it can be had without knowing what the current one draws. Whoever ends by that is
// computed once more for nothing.
void StepEngine::RunAhead() {
  if (!group_->RunsAhead() || batch_.draws.empty() || has_mail_.load(std::memory_order_acquire)) return;
  if (steps_begun_ + 1 == fault_.step || sparsity_->ShadowFollows(scheduler_.running())) return;
  if (!scheduler_.PlanAhead(batch_)) return;
  PlanDraws(1);
  Launch(flights_[1 - current_]);
  ahead_ = true;
}

void StepEngine::TraceStep(SteadyTime start, SteadyTime planned, SteadyTime shadowed, SteadyTime done) {
  const auto ms = [](SteadyTime from, SteadyTime to) {
    return std::chrono::duration<float, std::milli>(to - from).count();
  };
  const SteadyTime end = std::chrono::steady_clock::now();
  StepRecord record;
  record.step = steps_begun_;
  record.start = start;
  record.total_ms = ms(start, end);
  record.plan_ms = ms(start, planned);
  record.shadow_ms = shadow_batch_.rows() > 0 ? ms(planned, shadowed) : 0.0f;
  record.forward_ms = ms(shadowed, done);
  record.handout_ms = ms(done, end);
  record.decode_rows = scheduler_.shape().decode_rows;
  record.prefill_rows = scheduler_.shape().prefill_rows;
  record.shadow_rows = shadow_batch_.rows();
  record.weight_bytes = sparsity_->step_bytes();
  trace_.NoteStep(record);
}

void StepEngine::Break() {
  spdlog::warn("fault {} is injected", options_.fault);
  MutexLock lock(mutex_);
  while (fault_.hang && !stopping_) work_.Wait(mutex_);
  throw std::runtime_error("injected fault");
}

void StepEngine::NoteAdmissions() {
  if (scheduler_.admitted().empty() && scheduler_.preempted().empty()) return;
  const SteadyTime now = std::chrono::steady_clock::now();
  for (Sequence* s : scheduler_.admitted()) {
    if (s->slot < 0) continue;  // sent back within the same plan
    if (s->finish.scheduled == SteadyTime()) {
      s->finish.scheduled = now;
      stat_cached_prompt_tokens_.fetch_add(s->computed, std::memory_order_relaxed);
    }
    TokenCounts& counts = counts_[s->slot];
    counts.Clear();
    for (int32_t i = 0; i < s->prefill_tokens; ++i) {
      i < s->prompt_tokens() ? counts.AddPrompt(s->tokens[i]) : counts.AddOutput(s->tokens[i]);
    }
  }
  stat_preemptions_.fetch_add(static_cast<int64_t>(scheduler_.preempted().size()), std::memory_order_relaxed);
  PublishStats();
  MutexLock lock(mutex_);
  for (const Sequence* s : scheduler_.admitted()) admission_.Scheduled(s->request);
  for (const Sequence* s : scheduler_.preempted()) admission_.Requeued(s->request);
  InformAdmission();
}

void StepEngine::InformAdmission() {
  scheduler_.Inform(admission_);
  costs_ = scheduler_.costs().parameters();
}

// Where nothing in the step wants more than a token, the device chooses all of them and the logits stay there.
bool StepEngine::MayDraw() const {
  const auto wants_logits = [](const auto& s) {
    const Request& r = s->request;
    return s->step_logits > 0 &&
           (r.score || r.logprobs || !Sampler::IsPlain(r.sampling) || s->generated_tokens() < r.min_new_tokens);
  };
  return std::none_of(scheduler_.running().begin(), scheduler_.running().end(), wants_logits);
}

// For the tokens that follow the next `ahead` ones.
void StepEngine::PlanDraws(int32_t ahead) {
  batch_.draws.resize(batch_.logit_rows.size());
  for (const auto& s : scheduler_.running()) {
    if (s->step_logits == 0) continue;
    const SamplingParams& p = s->request.sampling;
    const uint64_t key = DrawKey(p.seed, static_cast<uint64_t>(s->generated_tokens() + ahead));
    auto& draw = batch_.draws[s->first_logit];
    draw[kDrawTemperature] = std::bit_cast<int32_t>(p.temperature);
    draw[kDrawKeyLow] = static_cast<int32_t>(static_cast<uint32_t>(key));
    draw[kDrawKeyHigh] = static_cast<int32_t>(static_cast<uint32_t>(key >> 32));
  }
}

void StepEngine::HandOut(Sequence& s) {
  const int32_t prompt_rows = std::min(s.step_rows, std::max(0, s.prompt_tokens() - s.computed));
  stat_prompt_tokens_.fetch_add(prompt_rows, std::memory_order_relaxed);
  if (s.request.score) {
    HandOutScores(s);
  } else if (s.step_logits > 0) {
    HandOutToken(s);
  }
}

void StepEngine::HandOutScores(Sequence& s) {
  for (int32_t i = 0; i < s.step_rows; ++i) {
    const float* logits = &logits_[static_cast<size_t>(s.first_logit + i) * config_.vocab];
    const int32_t position = s.computed + i;
    if (!AllFinite(logits, config_.vocab)) {
      finished_.push_back(
          {&s, FinishReason::kError,
           absl::DataLossError(absl::StrCat("the logits after prompt token ", position, " are not finite"))});
      return;
    }
    Token token;
    token.id = s.tokens[position];
    token.has_logprob = position > 0;
    token.logprob = s.next_logprob;
    token.rank = s.next_rank;
    token.top = sampler_.Top(logits, s.request.top_logprobs);
    if (!s.sink->OnPromptToken(token)) {
      finished_.push_back({&s, FinishReason::kSink, absl::OkStatus()});
      return;
    }
    if (position + 1 == s.prompt_tokens()) {
      finished_.push_back({&s, FinishReason::kLength, absl::OkStatus()});
      return;
    }
    const Sampler::Choice next = sampler_.Describe(logits, s.tokens[position + 1]);
    s.next_logprob = next.logprob;
    s.next_rank = next.rank;
  }
}

void StepEngine::HandOutToken(Sequence& s) {
  const Request& r = s.request;
  const float* const logits = &logits_[static_cast<size_t>(s.first_logit) * config_.vocab];
  banned_.clear();
  if (s.generated_tokens() < r.min_new_tokens) {
    if (!r.ignore_eos) banned_.push_back(config_.eos_token);
    banned_.insert(banned_.end(), r.stop_token_ids.begin(), r.stop_token_ids.end());
  }
  TokenCounts& counts = counts_[s.slot];
  const Sampler::Choice choice = !batch_.draws.empty()
                                     ? Sampler::Choice{flights_[current_].drawn[s.first_logit]}
                                     : sampler_.Sample(logits, r.sampling, counts, banned_,
                                                       static_cast<uint64_t>(s.generated_tokens()), r.logprobs);
  if (choice.id < 0) {
    const std::string at = absl::StrCat(" after ", s.generated_tokens(), " new tokens");
    finished_.push_back({&s, FinishReason::kError,
                         choice.id == Sampler::kNotFinite
                             ? absl::DataLossError("the logits are not finite" + at)
                             : absl::InvalidArgumentError(
                                   "logit_bias, allowed_token_ids and min_new_tokens leave no token to sample" + at)});
    return;
  }
  Token token;
  token.id = choice.id;
  token.has_logprob = r.logprobs;
  token.logprob = choice.logprob;
  token.rank = choice.rank;
  if (r.top_logprobs > 0) token.top = sampler_.Top(logits, r.top_logprobs);
  token.stop = IsStop(s, choice.id);
  if (s.generated_tokens() == 0) s.finish.first_token = step_done_;
  if (metrics_.counting.load(std::memory_order_relaxed)) {
    EngineMetrics::Latencies& latencies = metrics_.latencies_of(r.sparsity.tier, r.urgency);
    s.generated_tokens() == 0 ? latencies.time_to_first_token.Observe(Seconds(s.finish.queued, step_done_))
                              : latencies.inter_token.Observe(Seconds(s.last_token, step_done_));
  }
  if (s.generated_tokens() > 0) {
    trace_.NoteToken(s.id, step_done_, s.last_token, static_cast<int32_t>(steps_begun_ - s.last_token_step),
                     s.generated_tokens());
  }
  s.last_token = step_done_;
  s.last_token_step = steps_begun_;
  s.tokens.push_back(choice.id);
  counts.AddOutput(choice.id);
  stat_generated_tokens_.fetch_add(1, std::memory_order_relaxed);

  if (!s.sink->OnToken(token)) {
    finished_.push_back({&s, FinishReason::kSink, absl::OkStatus()});
  } else if (token.stop) {
    s.finish.stop_token_id = choice.id;
    const bool eos = choice.id == config_.eos_token && !r.ignore_eos;
    finished_.push_back({&s, eos ? FinishReason::kEos : FinishReason::kStopToken, absl::OkStatus()});
  } else if (s.generated_tokens() == r.max_new_tokens) {
    finished_.push_back({&s, FinishReason::kLength, absl::OkStatus()});
  }
}

bool StepEngine::IsStop(const Sequence& s, int32_t id) const {
  const auto& stops = s.request.stop_token_ids;
  return (id == config_.eos_token && !s.request.ignore_eos) || std::find(stops.begin(), stops.end(), id) != stops.end();
}

// Frees everything first, so that whoever hears of the end finds the memory free.
void StepEngine::End(const Sequence& sequence, FinishReason reason, absl::Status status) {
  const bool waiting = sequence.slot < 0;
  const std::unique_ptr<Sequence> s = scheduler_.Remove(sequence);
  PublishStats();
  Finish& finish = s->finish;
  finish.reason = reason;
  finish.status = std::move(status);
  finish.prompt_tokens = s->prompt_tokens();
  finish.generated_tokens = s->generated_tokens();
  finish.sparsity = sparsity_->Report(*s);
  finish.finished = std::chrono::steady_clock::now();
  if (finish.first_token == SteadyTime()) finish.first_token = finish.finished;
  if (finish.scheduled == SteadyTime()) finish.scheduled = finish.finished;
  NoteEnd(*s, waiting);
  {
    MutexLock lock(mutex_);
    admission_.Ended(s->request, reason, waiting);
    // Who left by itself says nothing about how long it would have taken; a deadline says that it took too long.
    if (reason != FinishReason::kCancelled && reason != FinishReason::kError && reason != FinishReason::kShutdown) {
      const double ms = std::chrono::duration<double, std::milli>(finish.finished - s->arrival).count();
      admission_.NoteOutcome(s->expected, ms, finish.generated_tokens);
    }
    InformAdmission();
  }
  s->sink->OnFinish(finish);
  MutexLock lock(mutex_);
  if (--unheard_ == 0) idle_.NotifyAll();
}

void StepEngine::EndAll(FinishReason reason, const absl::Status& status) {
  while (!scheduler_.running().empty()) End(*scheduler_.running().front(), reason, status);
  while (!scheduler_.waiting().empty()) End(*scheduler_.waiting().front(), reason, status);
}

void StepEngine::PublishStats() {
  stat_running_.store(static_cast<int32_t>(scheduler_.running().size()), std::memory_order_relaxed);
  stat_free_blocks_.store(pool_.free(), std::memory_order_relaxed);
  stat_cached_blocks_.store(pool_.cached(), std::memory_order_relaxed);
  const auto& waiting = scheduler_.waiting();
  const auto oldest = std::min_element(waiting.begin(), waiting.end(),
                                       [](const auto& a, const auto& b) { return a->arrival < b->arrival; });
  stat_oldest_arrival_.store(oldest == waiting.end() ? 0 : (*oldest)->arrival.time_since_epoch().count(),
                             std::memory_order_relaxed);
  const CommunicatorStats communication = group_->communication();
  stat_all_reduces_.Set(communication.all_reduces);
  stat_all_reduce_ns_.Set(communication.all_reduce_ns);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, int32_t sampled_vocab,
                                                       const LoadProgress& progress) {
  const SteadyTime start = std::chrono::steady_clock::now();
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const GroupOptions group_options, ForGroup(options, config, sampled_vocab));
  ASSIGN_OR_RETURN(std::unique_ptr<ModelGroup> group, ModelGroup::Create(group_options, config, progress));
  auto engine = std::make_unique<StepEngine>(options, config, group_options.candidates, std::move(group));
  RETURN_IF_ERROR(engine->Prepare(MillisecondsSince(start) / 1e3));
  engine->Start();
  return engine;
}

bool FollowsAnEngine(const EngineOptions& options) {
  return UnderMpirun() && options.tensor_parallel != 1 && MpirunRank() > 0;
}

absl::Status FollowEngine(const EngineOptions& options, int32_t sampled_vocab, absl::FunctionRef<void()> on_loaded) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const GroupOptions group_options, ForGroup(options, config, sampled_vocab));
  return ModelGroup::Follow(group_options, config, on_loaded);
}

}  // namespace dejavu
