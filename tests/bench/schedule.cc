#include "tests/bench/schedule.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/eval/tool.h"
#include "engine/load/synthetic.h"
#include "engine/scheduling/scheduler.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr int kStreams = 4;
constexpr auto kPromptEvery = std::chrono::milliseconds(200);

// When its tokens came. The times are read after the end.
class GapSink final : public TokenSink {
 public:
  explicit GapSink(int tokens) { times_.reserve(tokens); }
  bool OnToken(const Token&) override {
    times_.push_back(Clock::now());
    return true;
  }
  bool OnPromptToken(const Token&) override { return true; }
  void OnFinish(const Finish& finish) override {
    MutexLock lock(mutex_);
    cached_ = finish.cached_prompt_tokens;
    finished_ = true;
    changed_.NotifyAll();
  }
  void Wait() {
    MutexLock lock(mutex_);
    while (!finished_) changed_.Wait(mutex_);
  }
  const std::vector<SteadyTime>& times() const { return times_; }
  int cached() {
    MutexLock lock(mutex_);
    return cached_;
  }

 private:
  std::vector<SteadyTime> times_;
  Mutex mutex_;
  CondVar changed_;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  int cached_ ABSL_GUARDED_BY(mutex_) = 0;
};

absl::StatusOr<std::shared_ptr<GapSink>> Submit(Engine& engine, int prompt, int tokens, uint64_t seed) {
  Request request;
  std::mt19937_64 random(seed);
  for (int i = 0; i < prompt; ++i) request.prompt.push_back(static_cast<int32_t>(4 + random() % 1000));
  request.max_new_tokens = tokens;
  request.ignore_eos = true;
  auto sink = std::make_shared<GapSink>(tokens);
  RETURN_IF_ERROR(engine.Submit(std::move(request), sink).status());
  return sink;
}

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
}

// Gaps in ms between the tokens of kStreams streams, each followed by another when it ends.
absl::StatusOr<std::vector<double>> Gaps(Engine& engine, double seconds, int prompt_tokens) {
  const SteadyTime start = Clock::now();
  const auto enough = [&] { return SecondsSince(start) >= seconds; };
  const int tokens = engine.model().context - 16;
  std::vector<std::vector<double>> gaps(kStreams);
  std::vector<absl::Status> status(kStreams + 1);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] {
      for (uint64_t n = 0; !enough(); ++n) {
        const auto sink = Submit(engine, 8, tokens, n * kStreams + i);
        if (!sink.ok()) {
          status[i] = sink.status();
          return;
        }
        (*sink)->Wait();
        const auto& times = (*sink)->times();
        for (size_t k = 1; k < times.size(); ++k) {
          gaps[i].push_back(std::chrono::duration<double, std::milli>(times[k] - times[k - 1]).count());
        }
      }
    });
  }
  std::vector<std::shared_ptr<GapSink>> prompts;
  if (prompt_tokens > 0) {
    SteadyTime next = start;  // arrivals have their own clock
    for (uint64_t n = 0; !enough(); ++n) {
      const auto sink = Submit(engine, prompt_tokens, 1, 1'000'000 + n);
      if (!sink.ok()) {
        status[kStreams] = sink.status();
        break;
      }
      prompts.push_back(*sink);
      std::this_thread::sleep_until(next += kPromptEvery);
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& sink : prompts) sink->Wait();
  for (const absl::Status& s : status) RETURN_IF_ERROR(s);
  std::vector<double> all;
  for (const auto& of_stream : gaps) all.insert(all.end(), of_stream.begin(), of_stream.end());
  return all;
}

// Microseconds of planning a step of `rows` rows that decode, and of what follows it.
double BookkeepingUs(int rows) {
  constexpr int kSteps = 400, kBlockTokens = 16, kContext = 512;
  BlockPool pool(rows * kContext / kBlockTokens, kBlockTokens);
  SchedulerOptions options;
  options.max_batch = rows;
  Scheduler scheduler(pool, options);
  Batch batch(256, rows + options.score_rows, rows, kContext / kBlockTokens);
  for (int i = 0; i < rows; ++i) {
    Request request;
    request.prompt.assign(8, 7);
    request.max_new_tokens = kContext - 16;
    scheduler.Enqueue(std::make_unique<Sequence>(std::move(request), nullptr));
  }
  const auto step = [&] {
    scheduler.Plan(Clock::now(), batch);
    for (const auto& s : scheduler.running()) {
      if (s->step_logits > 0) s->tokens.push_back(7);
    }
    scheduler.NoteStep(1.0);
  };
  step();
  const SteadyTime start = Clock::now();
  for (int i = 0; i < kSteps; ++i) step();
  return 1e6 * SecondsSince(start) / kSteps;
}

absl::StatusOr<std::unique_ptr<Engine>> Create(const ScheduleBenchOptions& options, bool chunked) {
  EngineOptions engine;
  engine.model = options.model;
  engine.weights = options.weights;
  engine.device = options.device;
  engine.threads = options.threads;
  engine.predictor = "none";
  if (!chunked) {
    engine.scheduler.max_step_tokens = engine.scheduler.prefill_chunk_tokens = std::max(512, options.prompt_tokens);
    engine.scheduler.prefill_share = 1e6;
  }
  return Engine::Create(engine, 0, nullptr);
}

absl::Status Bench(const ScheduleBenchOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  nlohmann::json json = {{"model", options.model}, {"synthetic", IsSynthetic(options.model)}};
  std::vector<double> us;
  for (int i = 0; i < options.repeats; ++i) us.push_back(BookkeepingUs(16));
  json["bookkeeping_us"] = Median(us);
  std::printf("Planning and bookkeeping of a step of 16 rows: %.2f us\n\n", Median(us));

  std::printf("Gaps between tokens of %d streams, ms; a prompt of %d tokens every %d ms\n%-28s %10s %10s %10s %10s\n",
              kStreams, options.prompt_tokens, static_cast<int>(kPromptEvery.count()), "", "p50", "p99", "most",
              "gaps");
  std::vector<double> ttft_first, ttft_again;
  for (const bool chunked : {true, false}) {
    const auto engine = Create(options, chunked);
    if (!engine.ok()) return engine.status();
    if (options.prompt_tokens + 1 > (*engine)->model().context) {
      return absl::InvalidArgumentError("--prompt-tokens is beyond the model's context");
    }
    for (const int prompt : {0, options.prompt_tokens}) {
      if (!chunked && prompt == 0) continue;
      ASSIGN_OR_RETURN(const std::vector<double> gaps, Gaps(**engine, options.seconds, prompt));
      const char* const name = prompt == 0 ? "no prompts" : chunked ? "prompts" : "prompts, chunking off";
      std::printf("%-28s %10.3f %10.3f %10.3f %10zu\n", name, Quantile(gaps, 0.5), Quantile(gaps, 0.99), Most(gaps),
                  gaps.size());
      json["gaps"][name] = {{"p50_ms", Quantile(gaps, 0.5)}, {"p99_ms", Quantile(gaps, 0.99)}, {"most_ms", Most(gaps)}};
    }
    if (!chunked) break;
    for (int i = 0; i < options.repeats; ++i) {
      for (std::vector<double>* to : {&ttft_first, &ttft_again}) {
        const SteadyTime start = Clock::now();
        ASSIGN_OR_RETURN(const auto sink, Submit(**engine, options.prompt_tokens, 1, 2'000'000 + i));
        sink->Wait();
        to->push_back(std::chrono::duration<double, std::milli>(sink->times().front() - start).count());
      }
    }
  }
  json["ttft_ms"] = {{"first", Median(ttft_first)}, {"again", Median(ttft_again)}};
  std::printf("\nTime to first token of %d tokens: %.2f ms; with the prefix known %.2f ms, %.1f times sooner\n",
              options.prompt_tokens, Median(ttft_first), Median(ttft_again), Median(ttft_first) / Median(ttft_again));
  if (options.json.empty()) return absl::OkStatus();
  return WriteText(options.json, json.dump(1) + "\n");
}

}  // namespace

int RunScheduleBench(const ScheduleBenchOptions& options) { return ExitCode(Bench(options)); }

}  // namespace dejavu
