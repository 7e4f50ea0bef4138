#include "loadtest/generator/run.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "loadtest/generator/client.h"
#include "loadtest/generator/document.h"
#include "loadtest/generator/knee.h"
#include "loadtest/generator/page.h"
#include "loadtest/generator/recorder.h"
#include "loadtest/generator/report.h"
#include "loadtest/generator/result.h"
#include "loadtest/generator/schedule.h"
#include "loadtest/generator/send.h"
#include "loadtest/generator/server_metrics.h"
#include "loadtest/generator/target.h"
#include "loadtest/generator/workload.h"

namespace dejavu {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr double kDefaultDuration_s = 30.0;
constexpr auto kSecond = std::chrono::seconds(1);
constexpr auto kToGetReady = std::chrono::milliseconds(20);  // for the pacing thread, before the first send

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// A line a second: on a terminal over the last one.
class ProgressLine {
 public:
  ProgressLine(const RunOptions& options, const std::string& what)
      : what_(what), quiet_(options.quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

  void Show(const Recorder::Progress& now, int running) {
    if (quiet_) return;
    const auto ttft_ms = now.ttft.QuantileMs(0.5);
    std::fprintf(stderr, "%s%s %4d s: %lld done, %d running, %lld failed, %lld tokens/s, p50 ttft %s%s",
                 terminal_ ? "\r" : "", what_.c_str(), ++seconds_, static_cast<long long>(now.completed), running,
                 static_cast<long long>(now.failed), static_cast<long long>(now.tokens - last_tokens_),
                 ttft_ms ? absl::StrFormat("%.1f ms", *ttft_ms).c_str() : "-", terminal_ ? "\x1b[K" : "\n");
    last_tokens_ = now.tokens;
  }
  ~ProgressLine() {
    if (!quiet_ && terminal_ && seconds_ > 0) std::fputs("\r\x1b[K", stderr);
  }

 private:
  const std::string what_;
  const bool quiet_, terminal_;
  int seconds_ = 0;
  int64_t last_tokens_ = 0;
};

// One process of requests, until the last of them has ended. Says what was sent and what had to be abandoned.
struct PhaseFacts {
  SendFacts sending;
  int64_t abandoned = 0;
};
PhaseFacts RunPhase(const RunOptions& options, const SendPlan& plan, const Workload& workload, const Target& target,
                    const std::string& what, const std::atomic<bool>& interrupted, Recorder* recorder) {
  ClientOptions client_options;
  client_options.metadata = target.metadata;
  client_options.timeout_s = options.timeout_s;
  client_options.cancel_after_tokens = options.cancel_after_tokens;
  client_options.slow_reader_ms = options.slow_reader_ms;
  Client client(target.channels, client_options, [recorder](const Outcome& outcome) { recorder->Add(outcome); });
  PhaseFacts facts;
  const SteadyTime begin = SteadyClock::now() + kToGetReady;
  recorder->Begin(begin);
  std::atomic<bool> all_sent{false};
  std::thread sender([&] {
    facts.sending = SendAll(plan, workload, begin, interrupted, &client);
    all_sent.store(true);
  });
  ProgressLine progress(options, what);
  // Looks often, so that a run ends when it has ended.
  constexpr auto kLook = std::chrono::milliseconds(20);
  SteadyTime next_line = begin + kSecond;
  std::optional<SteadyTime> give_up;
  for (;;) {
    const bool sent = all_sent.load();
    if (sent && client.WaitUntilAtMost(0, SteadyClock::now() + kLook)) break;
    if (!sent) std::this_thread::sleep_for(kLook);
    const SteadyTime now = SteadyClock::now();
    if (sent && !give_up)
      give_up = now + (interrupted.load() ? SteadyClock::duration::zero() : Lasting(options.grace_s));
    if (give_up && (now >= *give_up || interrupted.load())) {
      facts.abandoned = client.in_flight();
      client.CancelAll();
      break;
    }
    if (now >= next_line) {
      progress.Show(recorder->progress(), client.in_flight());
      next_line += kSecond;
    }
  }
  sender.join();
  client.WaitUntilAtMost(0, SteadyTime::max());
  return facts;
}

// So many seconds or requests; either 0.
void Limit(double duration_s, int64_t requests, SendPlan* plan) {
  if (plan->arrivals) {
    const double rate = plan->arrivals->rate;
    if (requests <= 0) requests = std::max<int64_t>(1, std::llround(rate * duration_s));
    plan->arrivals->count = requests;
    duration_s = static_cast<double>(requests) / rate;
  }
  plan->duration_s = duration_s;
  plan->requests = requests;
}

SendPlan PlanOf(const RunOptions& options, std::optional<double> rate) {
  SendPlan plan;
  plan.concurrency = options.concurrency;
  plan.replay = !options.replay.empty();
  plan.replay_speed = options.replay_speed;
  plan.max_in_flight = options.max_in_flight;
  if (rate) {
    plan.arrivals = ArrivalOptions{.kind = *ParseArrivalKind(options.arrivals),
                                   .rate = *rate,
                                   .burstiness = options.burstiness,
                                   .seed = options.seed};
  }
  const bool unlimited = options.duration_s <= 0.0 && options.requests <= 0 && !plan.replay;
  Limit(unlimited ? kDefaultDuration_s : options.duration_s, options.requests, &plan);
  return plan;
}

class Session {
 public:
  Session(const RunOptions& options, const Json& config, const std::atomic<bool>& interrupted)
      : options_(options), config_(config), interrupted_(interrupted) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(objectives_, ParseObjectives(options_.goodput));
    std::vector<ReplayedRequest> replay;
    if (!options_.replay.empty()) {
      ASSIGN_OR_RETURN(replay, ReadReplay(options_.replay));
    }
    std::optional<Ramp> ramp;
    if (!options_.ramp.empty()) {
      ASSIGN_OR_RETURN(ramp, ParseRamp(options_.ramp));
    }
    RETURN_IF_ERROR(CheckWritable());
    ASSIGN_OR_RETURN(target_, Connect(options_));
    ASSIGN_OR_RETURN(Prompts prompts, MakePrompts(options_, target_));
    ASSIGN_OR_RETURN(const Workload workload,
                     Workload::Create(options_, target_.model, std::move(prompts), std::move(replay)));
    for (int step = 0; step < (ramp ? ramp->steps : 1) && !interrupted_.load(); ++step) {
      RETURN_IF_ERROR(RunStep(workload, ramp, step));
      if (!results_.back()["falls_short"].empty()) break;
    }
    if (results_.empty()) return absl::CancelledError("interrupted before anything was sent");
    return Write();
  }

  int exit_code() const {
    if (interrupted_.load()) return kLoadtestInterrupted;
    // Of a ramp every step: where one is invalid, the knee may be the generator's.
    const auto valid = [](const Json& result) { return result["valid"].get<bool>(); };
    return std::all_of(results_.begin(), results_.end(), valid) ? kLoadtestOk : kLoadtestInvalid;
  }

 private:
  absl::Status RunStep(const Workload& workload, const std::optional<Ramp>& ramp, int step) {
    std::optional<double> rate;
    if (ramp) rate = ramp->rate(step);
    if (options_.rate > 0.0) rate = options_.rate;
    RunFacts facts;
    facts.plan = PlanOf(options_, rate);
    facts.ramp = ramp;
    facts.step = step;
    const std::string what = ramp ? absl::StrFormat("%.4g/s", *rate) : "run";
    RETURN_IF_ERROR(WarmUp(workload, facts.plan, step, &facts.warmup_requests));
    MetricsSnapshot before, after;
    if (!options_.metrics.empty()) {
      ASSIGN_OR_RETURN(before, ScrapeMetrics(options_.metrics));
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<Recorder> recorder, Recorder::Create(objectives_, options_.jsonl, step > 0));
    facts.plan.phase = static_cast<uint32_t>(2 * step + 1);
    const double cpu_s = CpuSeconds();
    const PhaseFacts phase = RunPhase(options_, facts.plan, workload, target_, what, interrupted_, recorder.get());
    facts.cpu_s = CpuSeconds() - cpu_s;
    facts.sending = phase.sending;
    facts.abandoned = phase.abandoned;
    facts.interrupted = interrupted_.load();
    RETURN_IF_ERROR(recorder->Finish());
    Json result = MakeResult(options_, config_, target_, facts, objectives_, *recorder);
    if (!options_.metrics.empty()) {
      ASSIGN_OR_RETURN(after, ScrapeMetrics(options_.metrics));
      result["server"].update(CompareWithServer(before, after, result));
    }
    result["falls_short"] = FallsShort(result);
    std::fputs(ConsoleReport(result).c_str(), stdout);
    std::fflush(stdout);
    results_.push_back(std::move(result));
    return absl::OkStatus();
  }

  absl::Status WarmUp(const Workload& workload, SendPlan plan, int step, int64_t* requests) {
    if (options_.warmup_s <= 0.0 && options_.warmup_requests <= 0) return absl::OkStatus();
    Limit(options_.warmup_s, options_.warmup_requests, &plan);
    plan.phase = static_cast<uint32_t>(2 * step);
    ASSIGN_OR_RETURN(const std::unique_ptr<Recorder> recorder, Recorder::Create(objectives_, "", false));
    *requests = RunPhase(options_, plan, workload, target_, "warm-up", interrupted_, recorder.get()).sending.sent;
    return absl::OkStatus();
  }

  // Before anything is measured.
  absl::Status CheckWritable() const {
    for (const std::string& path : {options_.json, options_.jsonl, options_.html}) {
      if (path.empty()) continue;
      std::FILE* const file = std::fopen(path.c_str(), "a");
      if (file == nullptr) return absl::UnknownError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
      std::fclose(file);
    }
    return absl::OkStatus();
  }

  absl::Status Write() const {
    if (!options_.json.empty()) {
      const Json document = options_.ramp.empty() ? results_.front() : Json(results_);
      RETURN_IF_ERROR(WriteFile(options_.json, document.dump(1) + "\n"));
    }
    if (options_.html.empty()) return absl::OkStatus();
    return WriteFile(options_.html, HtmlPage(results_));
  }

  const RunOptions& options_;
  const Json& config_;
  const std::atomic<bool>& interrupted_;
  Objectives objectives_;
  Target target_;
  std::vector<Json> results_;
};

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return kLoadtestUsage;
    case absl::StatusCode::kCancelled:
      return kLoadtestInterrupted;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return kLoadtestUnavailable;
    default:
      return kLoadtestFailed;
  }
}

}  // namespace

absl::Status WriteFile(const std::string& path, const std::string& text) {
  std::FILE* const file = std::fopen(path.c_str(), "w");
  const bool written = file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
  if (file != nullptr && std::fclose(file) == 0 && written) return absl::OkStatus();
  return absl::UnknownError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
}

absl::Status CheckOptions(const RunOptions& options) {
  const int ways = (options.rate > 0.0) + !options.ramp.empty() + (options.concurrency > 0) + !options.replay.empty();
  if (ways != 1) {
    return absl::InvalidArgumentError("exactly one of --rate, --ramp, --concurrency and --replay must be given");
  }
  if (options.duration_s > 0.0 && options.requests > 0) {
    return absl::InvalidArgumentError("--duration and --requests exclude each other");
  }
  if (options.burstiness != 1.0 && options.arrivals != "gamma") {
    return absl::InvalidArgumentError("--burstiness belongs to --arrivals gamma");
  }
  return absl::OkStatus();
}

int Run(const RunOptions& options, const Json& config, const std::atomic<bool>& interrupted) {
  absl::Status status = CheckOptions(options);
  Session session(options, config, interrupted);
  if (status.ok()) status = session.Run();
  if (status.ok()) return session.exit_code();
  std::fprintf(stderr, "dejavu-loadtest: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

}  // namespace dejavu
