// `dejavu-bench barriers`: what a decode step costs on processors that are not ours alone, and how long it waits where
// its threads meet. A repeat takes the settings in turn, so that each is compared with a quiet one of the same moment.
// Neighbours are processes of our own that are stopped while nobody wants them. Sharing has its fair price: a setting's
// cost is its time over the quiet time, divided by what the shares alone would make of it.
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/processors.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/flags.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr int kWindow = 256;

struct BarriersOptions : ModelFlags {
  int neighbours = -1;  // busy processes; -1: one for each processor
  int context = 64;
  double seconds = 0.4;  // of one measurement
  int repeats = 7;
  std::string json;
};

// A process that works whenever it is not paused. It is made before the program has threads, and ends with it.
class Neighbour {
 public:
  // `prepare` runs in it and returns what it then does again and again.
  explicit Neighbour(const std::function<std::function<void()>()>& prepare) : pid_(fork()) {
    CHECK(pid_ >= 0) << "fork";
    if (pid_ > 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const std::function<void()> work = prepare();
    raise(SIGSTOP);
    while (true) work();
  }
  ~Neighbour() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Neighbour(const Neighbour&) = delete;
  Neighbour& operator=(const Neighbour&) = delete;

  absl::Status AwaitReady() const {
    int status = 0;
    if (waitpid(pid_, &status, WUNTRACED) == pid_ && WIFSTOPPED(status)) return absl::OkStatus();
    return absl::UnavailableError("a neighbour has ended before it began");
  }
  void Work() const { kill(pid_, SIGCONT); }
  void Pause() const { kill(pid_, SIGSTOP); }

 private:
  const pid_t pid_;
};
using Neighbours = std::vector<std::unique_ptr<Neighbour>>;

struct Cost {
  double ms = 0.0;            // per step, as the next two
  double processor_ms = 0.0;  // of all threads
  double barriers = 0.0;
  double waiting = 0.0;  // share of the time that the calling thread waited at barriers
};

// Decodes the same position again and again: every step costs the same.
class Stepper {
 public:
  Stepper(std::unique_ptr<BenchModel> model, int context) : model_(std::move(model)), context_(context) {}

  static absl::StatusOr<std::unique_ptr<Stepper>> Create(const BarriersOptions& options, int threads) {
    ModelRunner::Options run = RunnerOptions(options);
    run.threads = threads;
    run.window = kWindow;
    run.max_rows = kWindow;
    ProgressLine progress("dejavu-bench");
    ASSIGN_OR_RETURN(auto model, BenchModel::Create(run, "", progress));
    model->FillContext(options.context, progress);
    return std::make_unique<Stepper>(std::move(model), options.context);
  }

  void Step() {
    Batch& rows = model_->runner().StartBatch();
    rows.AddDecodeRow(0, context_, model_->TokenAt(0, context_), /*wants_logits=*/true, SparsityParams());
    model_->runner().Run();
  }

  Cost Measure(double seconds) {
    for (const SteadyTime start = std::chrono::steady_clock::now(); SecondsSince(start) < 0.1 * seconds;) Step();
    const BackendStats before = backend().stats();
    const std::clock_t processor = std::clock();
    const SteadyTime start = std::chrono::steady_clock::now();
    int steps = 0;
    while (SecondsSince(start) < seconds) {
      Step();
      ++steps;
    }
    const double passed = SecondsSince(start);
    const BackendStats after = backend().stats();
    return {.ms = 1e3 * passed / steps,
            .processor_ms = 1e3 * static_cast<double>(std::clock() - processor) / CLOCKS_PER_SEC / steps,
            .barriers = static_cast<double>(after.barriers - before.barriers) / steps,
            .waiting = 1e-9 * static_cast<double>(after.barrier_ns - before.barrier_ns) / passed};
  }

  Backend& backend() { return model_->runner().backend(); }

 private:
  const std::unique_ptr<BenchModel> model_;
  const int context_;
};

struct Setting {
  std::string name;
  Stepper* ours = nullptr;
  absl::Span<const std::unique_ptr<Neighbour>> others;
  double fair = 1.0;  // times the quiet time
  std::vector<Cost> costs;

  Cost Measure(double seconds) const {
    for (const auto& other : others) other->Work();
    const Cost cost = ours->Measure(seconds);
    for (const auto& other : others) other->Pause();
    return cost;
  }
};

// What so many threads get of the processors beside so many others, in processors.
double Share(int threads, int others, int processors) {
  return std::min<double>({double(threads), double(processors), double(processors) * threads / (threads + others)});
}

nlohmann::json Describe(const Setting& quiet, const Setting& s) {
  const auto all = [&](double Cost::*field) {
    std::vector<double> values;
    for (const Cost& cost : s.costs) values.push_back(cost.*field);
    return values;
  };
  std::vector<double> over_fair;
  for (size_t i = 0; i < s.costs.size(); ++i) over_fair.push_back(s.costs[i].ms / quiet.costs[i].ms / s.fair);
  return {{"setting", s.name},
          {"ms_per_step", Median(all(&Cost::ms))},
          {"processor_ms_per_step", Median(all(&Cost::processor_ms))},
          {"barriers_per_step", Median(all(&Cost::barriers))},
          {"waiting_share", Median(all(&Cost::waiting))},
          {"fair", s.fair},
          {"over_fair", Median(over_fair)},
          {"over_fair_least", Least(over_fair)},
          {"over_fair_most", Most(over_fair)}};
}

void Print(const nlohmann::json& rows) {
  std::printf("%-26s %9s %9s %9s %8s %6s %10s %8s %8s\n", "", "ms/step", "CPU ms", "barriers", "waiting", "fair",
              "over fair", "least", "most");
  for (const nlohmann::json& row : rows) {
    const auto number = [&](const char* key) { return row.at(key).get<double>(); };
    std::printf("%-26s %9.3f %9.3f %9.0f %7.1f%% %6.2f %10.3f %8.3f %8.3f\n",
                row.at("setting").get<std::string>().c_str(), number("ms_per_step"), number("processor_ms_per_step"),
                number("barriers_per_step"), 100 * number("waiting_share"), number("fair"), number("over_fair"),
                number("over_fair_least"), number("over_fair_most"));
  }
}

Neighbours BusyNeighbours(int count) {
  Neighbours busy;
  for (int i = 0; i < count; ++i) {
    busy.push_back(std::make_unique<Neighbour>([i] {
      const std::vector<int>& cpus = ProcessCpus();
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[i % cpus.size()], &set);
      sched_setaffinity(0, sizeof(set), &set);
      return [] {
        for (volatile int i = 0; i < 1000000;) i = i + 1;
      };
    }));
  }
  return busy;
}

// The same steps in a process of its own.
std::unique_ptr<Neighbour> Twin(const BarriersOptions& options, int threads) {
  return std::make_unique<Neighbour>([&] {
    auto stepper = Stepper::Create(options, threads);
    if (!stepper.ok()) _exit(ExitCode(stepper.status()));
    return [s = std::shared_ptr<Stepper>(*std::move(stepper))] { s->Step(); };
  });
}

absl::Status Bench(const BarriersOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  const auto processors = static_cast<int>(ProcessCpus().size());
  const int threads = options.threads > 0 ? options.threads : DefaultThreads().count;
  const Neighbours busy = BusyNeighbours(options.neighbours < 0 ? processors : options.neighbours);
  Neighbours twin;
  twin.push_back(Twin(options, threads));
  for (const auto& neighbour : busy) RETURN_IF_ERROR(neighbour->AwaitReady());
  RETURN_IF_ERROR(twin[0]->AwaitReady());
  ASSIGN_OR_RETURN(const auto ours, Stepper::Create(options, threads));
  ASSIGN_OR_RETURN(const auto more, Stepper::Create(options, processors + 1));

  const auto busy_count = static_cast<int>(busy.size());
  const double alone = Share(threads, 0, processors);
  std::vector<Setting> settings = {
      {"alone", ours.get(), {}, 1.0, {}},
      {absl::StrCat(busy_count, busy_count == 1 ? " busy neighbour" : " busy neighbours"),
       ours.get(),
       busy,
       alone / Share(threads, busy_count, processors),
       {}},
      {absl::StrCat(processors + 1, " threads"), more.get(), {}, alone / Share(processors + 1, 0, processors), {}},
      {"two processes of this", ours.get(), twin, alone / Share(threads, threads, processors), {}}};
  ProgressLine progress("dejavu-bench");
  for (int repeat = 0; repeat < options.repeats; ++repeat) {
    for (Setting& setting : settings) {
      if (Interrupted()) return absl::CancelledError("interrupted");
      setting.costs.push_back(setting.Measure(options.seconds));
    }
    progress.Show("", (repeat + 1.0) / options.repeats);
  }

  std::printf("%s, %d processors, %s, %d repeats\n\n", options.model.c_str(), processors,
              ours->backend().Description().c_str(), options.repeats);
  nlohmann::json rows = nlohmann::json::array();
  for (const Setting& setting : settings) rows.push_back(Describe(settings[0], setting));
  Print(rows);
  return WriteJson(options.json,
                   {{"model", options.model}, {"processors", processors}, {"threads", threads}, {"rows", rows}});
}

}  // namespace

Subcommand AddBarriers(CLI::App& program) {
  const auto options = std::make_shared<BarriersOptions>();
  CLI::App* const command =
      AddMeasuring(program, "barriers",
                   "What a decode step costs on processors that are not ours alone, and waits at barriers", *options);
  AddModelName(command, options->model, "synthetic:opt-1.3b");
  AddType(command, options->weights, "Type of the matrices in memory", kTypesInMemory);
  command->add_option("--neighbours", options->neighbours, "Busy processes; -1: one for each processor")
      ->check(CLI::Range(-1, 1024))
      ->capture_default_str();
  command->add_option("--context", options->context, "Tokens before the one that is decoded")
      ->check(CLI::Range(0, kWindow - 1))
      ->capture_default_str();
  command->add_option("--seconds", options->seconds, "Of one measurement")
      ->check(CLI::Range(0.01, 60.0))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
