// The step loop: take in what callers asked for, plan a batch, run it, hand out its tokens.
#include <algorithm>
#include <chrono>
#include <exception>
#include <future>
#include <optional>
#include <stdexcept>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/serving/step_engine.h"
#include "engine/serving/warm_up.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

PredictorInfo InfoOf(const ModelGroup& group, int64_t bytes) {
  const LoadedModel& loaded = group.loaded();
  if (!loaded.predictor.has_value()) return {};
  return {loaded.predictor_path, std::string(Name(loaded.predictor->tap)), loaded.predictor->tiers, bytes};
}

const PredictorData* PredictorOf(const ModelGroup& group) {
  return group.loaded().predictor.has_value() ? &*group.loaded().predictor : nullptr;
}

}  // namespace

StepEngine::StepEngine(const EngineOptions& options, const OptConfig& config, int32_t candidates, const Fault& fault,
                       std::unique_ptr<ModelGroup> group)
    : options_(options),
      config_(config),
      fault_(fault),
      group_(std::move(group)),
      predictor_info_(InfoOf(*group_, group_->predictor().bytes())),
      recorder_(options.metrics),
      inbox_(options.admission, options.scheduler),
      watchdog_(options.watchdog_s, [this] { inbox_.SetFailed(); }),
      pool_(group_->kv_blocks(), options.kv.block_tokens),
      scheduler_(pool_, options.scheduler),
      sparsity_(config_, PredictorOf(*group_), group_->loaded().weights, group_->loaded().drafts.get(),
                group_->predictor(), options.shadow_fallback, recorder_.metrics()),
      flights_(*group_, config.vocab, options.scheduler.max_step_tokens,
               options.scheduler.max_batch + options.scheduler.score_rows, options.scheduler.max_batch,
               pool_.BlocksFor(config.context)),
      shadow_batch_(options.scheduler.max_batch, options.scheduler.max_batch, options.scheduler.max_batch,
                    pool_.BlocksFor(config.context)),
      hand_out_(config, candidates, options.scheduler.max_batch, recorder_),
      draws_(config, group_->ranks() > 1, hand_out_) {
  if (PredictorOf(*group_) != nullptr)
    shadow_logits_.resize(static_cast<size_t>(shadow_batch_.max_rows) * config.vocab);
  ends_.reserve(options.scheduler.max_batch);
  group_->DropPredictorData();  // the devices have it
}

StepEngine::~StepEngine() {
  inbox_.Stop();
  watchdog_.Stop();
  if (thread_.joinable()) thread_.join();
}

void StepEngine::Start() {
  std::promise<void> warm;
  const std::future<void> is_warm = warm.get_future();
  thread_ = std::thread([this, warm = std::move(warm)]() mutable {
    Prepare();
    warm.set_value();
    Run();
  });
  is_warm.wait();
  watchdog_.Start();
}

void StepEngine::Prepare() {
  const SteadyTime start = std::chrono::steady_clock::now();
  recorder_.metrics().measured_bandwidth.Set(MeasureBandwidth(*group_));
  const std::vector<Tier>& predicted = predictor_info_.tiers;
  const std::optional<Tier> draft = predicted.empty() ? std::nullopt : std::make_optional(predicted.front());
  WarmUp(*group_, config_, options_.scheduler, draft, flights_.batch(), flights_.logits(), scheduler_);
  recorder_.metrics().warm_up_seconds.Set(SecondsSince(start));
  watchdog_.Expect(scheduler_.LongestStepMs());
  recorder_.NoteCosts(scheduler_.costs());
  NoteState();
  inbox_.NoteCosts(scheduler_);
}

absl::StatusOr<uint64_t> StepEngine::SubmitSamples(Request request, std::vector<std::shared_ptr<TokenSink>> sinks) {
  const auto samples = static_cast<int>(sinks.size());
  CHECK(samples > 0) << samples << " samples";
  absl::Status valid = CheckRequest(request, config_);
  valid.Update(CheckTier(request.sparsity.tier));
  if (request.speculation.mode != SpeculationMode::kOff) valid.Update(CheckTier(request.speculation.draft_tier));
  if (!valid.ok()) return inbox_.RefuseInvalid(std::move(valid), samples);
  // All that needs no lock.
  const SteadyTime now = std::chrono::steady_clock::now();
  std::vector<BlockKey> keys;
  // What has been scored once is not kept for others: few score texts that begin alike.
  const bool cached = options_.kv.prefix_cache && request.prefix_cache && !request.score;
  if (cached || samples > 1) {
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
    request.score = false;  // one of them tells of the prompt, and leaves it to the others
  }
  return inbox_.Submit(std::move(sequences));
}

absl::Status StepEngine::ReloadPredictor() {
  const auto reload = std::make_shared<PredictorReload>();
  ASSIGN_OR_RETURN(reload->data, ReadPredictorAgain(*group_, predictor_info_, config_));
  return inbox_.Swap(reload);
}

EngineStats StepEngine::stats() const {
  EngineStats stats;
  inbox_.FillStats(&stats);
  recorder_.FillStats(&stats);
  stats.ranks = group_->ranks();
  return stats;
}

void StepEngine::Run() {
  try {
    while (TakeMail()) {
      if (failed()) throw std::runtime_error("a step took longer than the watchdog allows");
      EndOverdue();
      if (flights_.ahead() && scheduler_.running().empty()) flights_.DropAhead();  // nobody is left who wants it
      if (!idle()) Step();
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
  inbox_.SetFailed();
  watchdog_.EndAll();
  ends_.clear();
  TakeMail();
  EndWaiting(absl::UnavailableError("the engine failed before the request ran; the server must be restarted"));
  EndAll(FinishReason::kError, status);
}

// Waits while there is nothing to do. False: stop.
bool StepEngine::TakeMail() {
  const bool busy = !idle();
  if (busy && !inbox_.has_mail()) return true;
  std::optional<SteadyTime::duration> patience;  // until the other ranks want to hear something
  if (group_->ranks() > 1) {
    const double seconds = options_.peer_timeout_s > 0.0 ? options_.peer_timeout_s / 4.0 : 1.0;
    patience = Lasting(seconds);
  }
  inbox_.Take(busy, /*may_reload=*/!flights_.ahead(), patience, &mail_);
  if (mail_.nothing) Ping();
  if (const auto reload = std::exchange(mail_.reload, nullptr)) SwapPredictor(*reload);
  for (auto& sequence : mail_.arrived) scheduler_.Enqueue(std::move(sequence));
  mail_.arrived.clear();
  for (const uint64_t id : mail_.cancelled) EndCancelled(id);
  mail_.cancelled.clear();
  if (mail_.refuse_waiting) {
    EndWaiting(absl::UnavailableError("the server is draining and the request had not run yet"));
  }
  return !mail_.stopping;
}

// Tells the other ranks that this one is there, and finds out whether they are. The watchdog looks on.
void StepEngine::Ping() {
  watchdog_.BeginStep();
  group_->Ping();
  watchdog_.EndStep();
}

void StepEngine::SwapPredictor(PredictorReload& reload) {
  const absl::Status status = group_->predictor().Reload(reload.data, group_->loaded().shard);
  if (status.ok()) {
    sparsity_.Reset(reload.data);
    spdlog::info("the predictor {} was read again", predictor_info_.path);
  }
  inbox_.Reloaded(reload, status);
}

void StepEngine::Step() {
  StepTimes times;
  times.start = times.planned = times.shadowed = std::chrono::steady_clock::now();
  if (flights_.TakeAhead()) {
    scheduler_.TakeAhead();
    watchdog_.BeginStep();
  } else {
    scheduler_.Plan(times.start, flights_.batch());
    NoteAdmissions();
    if (flights_.batch().rows() == 0) return;
    if (watchdog_.BeginStep() == fault_.step) InjectFault();
    LaunchPlanned(&times);
  }
  RunAhead();
  flights_.Await();
  if (fault_.kind == Fault::Kind::kSlow) absl::SleepFor(absl::Milliseconds(fault_.delay_ms));
  times.done = std::chrono::steady_clock::now();
  times.since = std::exchange(since_, times.done);

  recorder_.CountStep();
  const int64_t step = watchdog_.steps_begun();
  const Batch& batch = flights_.batch();
  HandOutAll({flights_.logits(), batch.draws.empty() ? nullptr : flights_.drawn(), flights_.details(),
              batch.detail_fields(), step, times.done});
  // Of a check only what holds is noted of its sequence.
  sparsity_.NoteStep(scheduler_.running(), batch, flights_.counts(), flights_.logits(), shadow_logits_.data());
  recorder_.NoteSaturated(scheduler_.NoteSaturated(flights_.counts().saturated));
  scheduler_.NoteStep(Milliseconds(times.since, times.done));
  watchdog_.Expect(scheduler_.LongestStepMs());
  recorder_.NoteStep(times, {step, scheduler_.shape(), batch.rows(), shadow_batch_.rows(), sparsity_.step_bytes()});
  watchdog_.EndStep();
  recorder_.NoteCosts(scheduler_.costs());
  recorder_.NoteSpeculation(scheduler_.speculation());
  EndNoted();
}

// Runs the shadow of the planned step first, where it has one: the step then overwrites its keys and values.
void StepEngine::LaunchPlanned(StepTimes* times) {
  Batch& batch = flights_.batch();
  sparsity_.PlanShadow(scheduler_.running(), batch, shadow_batch_);
  const bool shadow = shadow_batch_.rows() > 0;
  times->planned = std::chrono::steady_clock::now();
  if (shadow) group_->Forward(shadow_batch_, {shadow_logits_.data()});
  // The shadow is held against the logits, which a group that draws has not.
  if (!shadow || group_->ranks() == 1) draws_.Plan(scheduler_.running(), /*ahead=*/false, batch);
  if (shadow && !batch.draws.empty()) batch.keeps_logits = true;
  since_ = times->shadowed = std::chrono::steady_clock::now();
  if (!shadow) times->planned = times->shadowed;  // the parts leave nothing out
  flights_.Launch();
}

// Launches the step after the current one, if it can be had without knowing what the current one draws. A sequence that
// ends by that is computed once more for nothing.
void StepEngine::RunAhead() {
  const Batch& batch = flights_.batch();
  if (!group_->RunsAhead() || batch.draws.empty() || batch.keeps_logits || inbox_.has_mail()) return;
  if (watchdog_.steps_begun() + 1 == fault_.step || !Draws::MayFollow(scheduler_.running())) return;
  Batch& ahead = flights_.batch_ahead();
  if (!scheduler_.PlanAhead(batch, ahead) || sparsity_.ShadowFollows(scheduler_.running())) return;
  if (!draws_.Plan(scheduler_.running(), /*ahead=*/true, ahead) || ahead.keeps_logits) return;
  flights_.LaunchAhead();
}

void StepEngine::HandOutAll(const StepResults& results) {
  for (const auto& s : scheduler_.running()) {
    if (s->step_rows == 0) continue;
    if (std::optional<Ending> ending = hand_out_.Give(*s, results)) ends_.push_back({s.get(), *std::move(ending)});
  }
}

void StepEngine::InjectFault() {
  spdlog::warn("fault {} is injected", options_.fault);
  if (fault_.kind == Fault::Kind::kHang) inbox_.WaitUntilStopped();
  throw std::runtime_error("injected fault");
}

void StepEngine::NoteAdmissions() {
  if (scheduler_.admitted().empty() && scheduler_.preempted().empty()) return;
  const SteadyTime now = std::chrono::steady_clock::now();
  for (Sequence* s : scheduler_.admitted()) {
    if (s->slot < 0) continue;  // sent back within the same plan
    if (s->finish.scheduled == SteadyTime()) {
      s->finish.scheduled = now;
      recorder_.NoteAdmission(*s);
    }
    hand_out_.Begin(*s);
  }
  recorder_.NotePreemptions(static_cast<int64_t>(scheduler_.preempted().size()));
  NoteState();
  inbox_.NotePlan(scheduler_);
}

void StepEngine::EndCancelled(uint64_t id) {
  for (const auto* sequences : {&scheduler_.running(), &scheduler_.waiting()}) {
    const auto found = std::find_if(sequences->begin(), sequences->end(), [&](const auto& s) { return s->id == id; });
    if (found == sequences->end()) continue;
    // gRPC may see a deadline pass before the next step does, and cancels then.
    const bool late = (*found)->request.deadline <= std::chrono::steady_clock::now();
    End(**found, {late ? FinishReason::kDeadline : FinishReason::kCancelled, absl::OkStatus()});
    return;
  }
}

// What has not run yet; a sequence that was sent back to the queue has.
void StepEngine::EndWaiting(const absl::Status& status) {
  for (const auto& s : scheduler_.waiting()) {
    if (s->preemptions == 0) ends_.push_back({s.get(), {FinishReason::kError, status}});
  }
  EndNoted();
}

void StepEngine::EndOverdue() {
  scheduler_.ForEachOverdue(std::chrono::steady_clock::now(), [&](const Sequence& s, FinishReason reason) {
    ends_.push_back({&s, {reason, absl::OkStatus()}});
  });
  EndNoted();
}

void StepEngine::EndNoted() {
  for (NotedEnd& end : ends_) End(*end.sequence, std::move(end.ending));
  ends_.clear();
}

void StepEngine::EndAll(FinishReason reason, const absl::Status& status) {
  while (!scheduler_.running().empty()) End(*scheduler_.running().front(), {reason, status});
  while (!scheduler_.waiting().empty()) End(*scheduler_.waiting().front(), {reason, status});
}

// Frees everything first, so that the memory is free when the sink hears of the end.
void StepEngine::End(const Sequence& sequence, Ending ending) {
  const bool waiting = sequence.slot < 0;
  const std::unique_ptr<Sequence> s = scheduler_.Remove(sequence);
  NoteState();
  Finish& finish = s->finish;
  finish.reason = ending.reason;
  finish.status = std::move(ending.status);
  finish.prompt_tokens = s->prompt_tokens();
  finish.generated_tokens = s->generated_tokens();
  finish.sparsity = sparsity_.Report(*s);
  finish.finished = std::chrono::steady_clock::now();
  if (finish.first_token == SteadyTime()) finish.first_token = finish.finished;
  if (finish.scheduled == SteadyTime()) finish.scheduled = finish.finished;
  recorder_.NoteEnd(*s, waiting);
  inbox_.NoteEnd(*s, waiting, scheduler_);
  s->sink->OnFinish(finish);
  inbox_.NoteHeard();
}

}  // namespace dejavu
