// `dejavu-bench schedule`: what the scheduler costs and what it keeps. Its own time for a step, the gaps between tokens
// while long prompts arrive, and what a known prefix saves.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/eval/tool.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/scheduling/scheduler.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/flags.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"
#include "tests/engine/serving/finish_sink.h"

namespace dejavu {
namespace {

constexpr int kStreams = 4;
constexpr auto kPromptEvery = std::chrono::milliseconds(200);

struct ScheduleOptions : ModelFlags {
  int repeats = 5;
  int prompt_tokens = 450;
  double seconds = 5.0;  // of each measurement of gaps
  std::string json;
};

// When its tokens came. The times are read after the end.
class GapSink final : public FinishSink {
 public:
  explicit GapSink(int tokens) { times_.reserve(tokens); }
  bool OnToken(const Token&) override {
    times_.push_back(std::chrono::steady_clock::now());
    return true;
  }
  const std::vector<SteadyTime>& times() const { return times_; }

 private:
  std::vector<SteadyTime> times_;
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

double NearestRank(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
}

// Streams one after the other until `enough`, and the gaps in ms between the tokens of each into `gaps`.
absl::Status Stream(Engine& engine, int number, const std::function<bool()>& enough, std::vector<double>* gaps) {
  const int tokens = engine.model().context - 16;
  for (uint64_t n = 0; !enough(); ++n) {
    ASSIGN_OR_RETURN(const auto sink, Submit(engine, 8, tokens, n * kStreams + number));
    sink->WaitForFinish();
    const std::vector<SteadyTime>& times = sink->times();
    for (size_t k = 1; k < times.size(); ++k) gaps->push_back(Milliseconds(times[k - 1], times[k]));
  }
  return absl::OkStatus();
}

// Prompts of that length, which arrive by a clock of their own until `enough`; then waits for their ends.
absl::Status SendPrompts(Engine& engine, int prompt_tokens, const std::function<bool()>& enough) {
  std::vector<std::shared_ptr<GapSink>> prompts;
  absl::Status status;
  SteadyTime next = std::chrono::steady_clock::now();
  for (uint64_t n = 0; status.ok() && !enough(); ++n) {
    const auto sink = Submit(engine, prompt_tokens, 1, 1'000'000 + n);
    status = sink.status();
    if (!status.ok()) break;
    prompts.push_back(*sink);
    std::this_thread::sleep_until(next += kPromptEvery);
  }
  for (const auto& sink : prompts) sink->WaitForFinish();
  return status;
}

// Gaps in ms between the tokens of kStreams streams, each followed by another when it ends.
absl::StatusOr<std::vector<double>> Gaps(Engine& engine, double seconds, int prompt_tokens) {
  const SteadyTime start = std::chrono::steady_clock::now();
  const auto enough = [&] { return SecondsSince(start) >= seconds; };
  std::vector<std::vector<double>> gaps(kStreams);
  std::vector<absl::Status> status(kStreams + 1);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] { status[i] = Stream(engine, i, enough, &gaps[i]); });
  }
  if (prompt_tokens > 0) status[kStreams] = SendPrompts(engine, prompt_tokens, enough);
  for (std::thread& thread : threads) thread.join();
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
    scheduler.Plan(std::chrono::steady_clock::now(), batch);
    for (const auto& s : scheduler.running()) {
      if (s->step_logits > 0) s->tokens.push_back(7);
    }
    scheduler.NoteStep(1.0);
  };
  step();
  const SteadyTime start = std::chrono::steady_clock::now();
  for (int i = 0; i < kSteps; ++i) step();
  return 1e6 * SecondsSince(start) / kSteps;
}

absl::StatusOr<std::unique_ptr<Engine>> Create(const ScheduleOptions& options, bool chunked) {
  EngineOptions engine = EngineOptionsOf(options);
  engine.predictor = "none";
  if (!chunked) {
    engine.scheduler.max_step_tokens = engine.scheduler.prefill_chunk_tokens = std::max(512, options.prompt_tokens);
    engine.scheduler.prefill_share = 1e6;
  }
  return Engine::Create(engine, 0, nullptr);
}

absl::Status MeasureGaps(const ScheduleOptions& options, Engine& engine, const char* name, int prompt_tokens,
                         nlohmann::json* json) {
  ASSIGN_OR_RETURN(const std::vector<double> gaps, Gaps(engine, options.seconds, prompt_tokens));
  const double p50 = NearestRank(gaps, 0.5), p99 = NearestRank(gaps, 0.99);
  std::printf("%-28s %10.3f %10.3f %10.3f %10zu\n", name, p50, p99, Most(gaps), gaps.size());
  (*json)["gaps"][name] = {{"p50_ms", p50}, {"p99_ms", p99}, {"most_ms", Most(gaps)}};
  return absl::OkStatus();
}

// Of prompts that are new, and of the same once more.
absl::Status MeasureFirstTokens(const ScheduleOptions& options, Engine& engine, nlohmann::json* json) {
  std::vector<double> first, again;
  for (int i = 0; i < options.repeats; ++i) {
    for (std::vector<double>* to : {&first, &again}) {
      const SteadyTime start = std::chrono::steady_clock::now();
      ASSIGN_OR_RETURN(const auto sink, Submit(engine, options.prompt_tokens, 1, 2'000'000 + i));
      sink->WaitForFinish();
      to->push_back(Milliseconds(start, sink->times().front()));
    }
  }
  (*json)["ttft_ms"] = {{"first", Median(first)}, {"again", Median(again)}};
  return absl::OkStatus();
}

absl::Status Bench(const ScheduleOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  nlohmann::json json = {{"model", options.model}, {"synthetic", IsSynthetic(options.model)}};
  std::vector<double> us;
  for (int i = 0; i < options.repeats; ++i) us.push_back(BookkeepingUs(16));
  json["bookkeeping_us"] = Median(us);
  std::printf("Planning and bookkeeping of a step of 16 rows: %.2f us\n\n", Median(us));

  std::printf("Gaps between tokens of %d streams, ms; a prompt of %d tokens every %d ms\n%-28s %10s %10s %10s %10s\n",
              kStreams, options.prompt_tokens, static_cast<int>(kPromptEvery.count()), "", "p50", "p99", "most",
              "gaps");
  {
    ASSIGN_OR_RETURN(const auto engine, Create(options, /*chunked=*/true));
    if (options.prompt_tokens + 1 > engine->model().context) {
      return absl::InvalidArgumentError("--prompt-tokens is beyond the model's context");
    }
    RETURN_IF_ERROR(MeasureGaps(options, *engine, "no prompts", 0, &json));
    RETURN_IF_ERROR(MeasureGaps(options, *engine, "prompts", options.prompt_tokens, &json));
    RETURN_IF_ERROR(MeasureFirstTokens(options, *engine, &json));
  }
  ASSIGN_OR_RETURN(const auto engine, Create(options, /*chunked=*/false));
  RETURN_IF_ERROR(MeasureGaps(options, *engine, "prompts, chunking off", options.prompt_tokens, &json));
  const double first_ms = json["ttft_ms"]["first"].get<double>(), again_ms = json["ttft_ms"]["again"].get<double>();
  std::printf("\nTime to first token of %d tokens: %.2f ms; with the prefix known %.2f ms, %.1f times sooner\n",
              options.prompt_tokens, first_ms, again_ms, first_ms / again_ms);
  return WriteJson(options.json, json);
}

}  // namespace

Subcommand AddSchedule(CLI::App& program) {
  const auto options = std::make_shared<ScheduleOptions>();
  CLI::App* const command = AddMeasuring(program, "schedule",
                                         "What scheduling costs a step, what prompts do to the gaps between others' "
                                         "tokens, what a known prefix saves",
                                         *options);
  AddModel(command, *options);
  command->add_option("--prompt-tokens", options->prompt_tokens, "Of the prompts that arrive")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--seconds", options->seconds, "Of each measurement of gaps")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
