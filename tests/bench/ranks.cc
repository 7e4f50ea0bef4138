// `dejavu-bench ranks`: what a decode step costs a group of ranks beside one rank on the same CPUs. The group is
// threads of this process; under mpirun its processes, which all run this with the same options, and rank 0 reports.
//
// One rank and the group hold the model at once. A repeat takes the tiers in turn, each by one rank and by the group,
// of which the other goes first in the next repeat. Between tiers the bandwidth is probed: ratios are formed within a
// repeat. Greedy tokens are drawn where the logits are, as the daemon does it.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/ranks/model_group.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/mpi/open_mpi.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/flags.h"
#include "tests/bench/probe.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr double kSecondsOfOneMeasurement = 0.5;
constexpr int kMostSteps = 128;  // where the number of steps is ours to choose
constexpr int kPrefillRows = 256;
constexpr int kBlockTokens = 16;
constexpr double kNoisyOthers = 0.05;  // of the CPUs

struct RanksOptions : ModelFlags {  // threads: all ranks of the group together
  std::string predictor;            // as ModelOptions has it
  std::string text;                 // what is decoded, teacher-forced; empty: random tokens
  int ranks = 2;                    // threads; mpirun says how many there are
  std::vector<int> batches = {1, 4, 16};
  int context = 64;
  std::vector<std::string> tiers = {"dense", "exact", "balanced"};
  int steps = 0;  // of one measurement; 0: as many as take half a second
  int repeats = 7;
  std::string json;
};

// One rank or a group.
class Decoder {
 public:
  // `window` positions of each slot.
  Decoder(std::unique_ptr<ModelGroup> group, const GroupOptions& shape, int window, const std::vector<int32_t>& tokens)
      : group_(std::move(group)),
        window_(window),
        tokens_(tokens),
        batch_(shape.max_rows, shape.max_logit_rows, shape.slots, shape.blocks_per_slot),
        counts_(group_->predictor().MakeCounts()),
        drawn_(shape.max_logit_rows) {
    std::iota(batch_.block_table.begin(), batch_.block_table.end(), 0);
  }

  // Keys and values of the positions before `context`, for every slot.
  void FillContext(int context, ProgressLine& progress) {
    const int total = batch_.slots * context;
    for (int done = 0; done < total && !Interrupted();) {
      batch_.Clear();
      for (; done < total && batch_.rows_left() > 0; ++done) {
        const int slot = done / context, position = done % context;
        batch_.AddRow(slot, position, TokenAt(slot, position), /*wants_logits=*/false);
      }
      group_->Forward(batch_, {});
      progress.Show(absl::StrCat("context, ", group_->Description()), static_cast<double>(done) / total);
    }
  }

  void Step(Tier tier, int batch, int position) {
    SparsityParams sparsity;
    sparsity.tier = tier;
    batch_.Clear();
    for (int slot = 0; slot < batch; ++slot) {
      batch_.AddDecodeRow(slot, position, TokenAt(slot, position), /*wants_logits=*/true, sparsity);
    }
    batch_.draws.assign(batch, {});  // greedy
    group_->Forward(batch_, {nullptr, drawn_.data(), &counts_});
  }

  ModelGroup& group() { return *group_; }
  double imbalance() const { return counts_.imbalance; }

 private:
  int32_t TokenAt(int slot, int position) const { return tokens_[slot * window_ + position]; }

  const std::unique_ptr<ModelGroup> group_;
  const int64_t window_;
  const std::vector<int32_t>& tokens_;  // [slots, window]
  Batch batch_;
  StepCounts counts_;
  std::vector<int32_t> drawn_;
};

struct Cost {
  double ms = 0.0;  // per step
  double all_reduce_ms = 0.0, all_reduces = 0.0;
  double imbalance = 0.0;
};

struct Measured {
  Tier tier;
  std::vector<Cost> one, group;  // by repeat
};

template <typename Value>
std::vector<double> All(const std::vector<Cost>& costs, Value&& value) {
  std::vector<double> all;
  for (const Cost& cost : costs) all.push_back(value(cost));
  return all;
}

// How busy the CPUs are with anything but this process, by the kernel's clock of some milliseconds.
class OtherProcesses {
 public:
  void Start() { start_ = {SecondsOfOthers(), std::chrono::steady_clock::now()}; }
  void Stop() {
    busy_s_ += SecondsOfOthers() - start_.first;
    all_s_ += SecondsSince(start_.second) * static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  }
  double share() const { return all_s_ > 0.0 ? std::max(0.0, busy_s_ / all_s_) : 0.0; }

 private:
  static double SecondsOfOthers() {
    std::ifstream stat("/proc/stat");
    std::string name;
    double user = 0, nice = 0, system = 0, idle = 0, wait = 0, irq = 0, soft = 0, steal = 0;
    stat >> name >> user >> nice >> system >> idle >> wait >> irq >> soft >> steal;
    rusage own;
    getrusage(RUSAGE_SELF, &own);
    const auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + 1e-6 * t.tv_usec; };
    return (user + nice + system + irq + soft + steal) / static_cast<double>(sysconf(_SC_CLK_TCK)) -
           seconds(own.ru_utime) - seconds(own.ru_stime);
  }

  std::pair<double, SteadyTime> start_;
  double busy_s_ = 0.0, all_s_ = 0.0;
};

class RanksBench {
 public:
  // `piece_bytes`: the weights that a rank reads between two all-reduces of a dense step.
  RanksBench(const RanksOptions& options, int window, int64_t piece_bytes, Decoder& one, Decoder& group,
             BandwidthProbe& probe, ProgressLine& progress)
      : options_(options),
        window_(window),
        piece_bytes_(piece_bytes),
        one_(one),
        group_(group),
        probe_(probe),
        progress_(progress) {}

  std::vector<Measured> Run(const std::vector<Tier>& tiers, int batch) {
    std::vector<Measured> measured;
    for (const Tier tier : tiers) measured.push_back({tier, {}, {}});
    const int steps = Steps(batch);
    for (int repeat = -1; repeat < options_.repeats && !Interrupted(); ++repeat) {  // one to warm up
      for (Measured& m : measured) {
        Cost one, group;
        for (const bool lone : {repeat % 2 == 0, repeat % 2 != 0}) {
          if (lone && repeat >= 0) others_.Start();
          (lone ? one : group) = Decode(lone ? one_ : group_, m.tier, batch, steps);
          if (lone && repeat >= 0) others_.Stop();
        }
        const double gb_per_s = probe_.Measure();
        if (repeat < 0) continue;
        bandwidth_.push_back(gb_per_s);
        waiting_.push_back(probe_.MeasureWaiting(piece_bytes_));
        m.one.push_back(one);
        m.group.push_back(group);
      }
      progress_.Show(absl::StrCat("batch ", batch), (repeat + 2.0) / (options_.repeats + 1));
    }
    return measured;
  }

  const std::vector<double>& bandwidth() const { return bandwidth_; }
  // BandwidthProbe::MeasureWaiting
  const std::vector<double>& waiting() const { return waiting_; }
  int64_t piece_bytes() const { return piece_bytes_; }
  // While the one rank was measured, the group's other processes included.
  double others_share() const { return others_.share(); }

 private:
  int Steps(int batch) {
    if (options_.steps > 0) return options_.steps;
    const double ms = Decode(one_, Tier::kDense, batch, 1).ms;
    const int most = window_ - options_.context;
    return static_cast<int>(std::clamp(std::round(kSecondsOfOneMeasurement * 1e3 / ms), 1.0, double(most)));
  }

  Cost Decode(Decoder& decoder, Tier tier, int batch, int steps) {
    decoder.Step(tier, batch, options_.context);  // wakes the threads that sleep
    Cost cost;
    const CommunicatorStats before = decoder.group().communication();
    const SteadyTime start = std::chrono::steady_clock::now();
    for (int step = 0; step < steps; ++step) {
      decoder.Step(tier, batch, options_.context + step);
      cost.imbalance += decoder.imbalance() / steps;
    }
    cost.ms = 1e3 * SecondsSince(start) / steps;
    const CommunicatorStats after = decoder.group().communication();
    cost.all_reduce_ms = 1e-6 * static_cast<double>(after.all_reduce_ns - before.all_reduce_ns) / steps;
    cost.all_reduces = static_cast<double>(after.all_reduces - before.all_reduces) / steps;
    return cost;
  }

  const RanksOptions& options_;
  const int window_;
  const int64_t piece_bytes_;
  Decoder &one_, &group_;
  BandwidthProbe& probe_;
  ProgressLine& progress_;
  std::vector<double> bandwidth_, waiting_;
  OtherProcesses others_;
};

nlohmann::json Describe(const RanksOptions& options, DType dtype, const Measured& m, int batch) {
  std::vector<double> ratios;
  for (size_t i = 0; i < m.one.size(); ++i) ratios.push_back(m.one[i].ms / m.group[i].ms);
  const std::vector<double> one_ms = All(m.one, [](const Cost& c) { return c.ms; });
  const std::vector<double> group_ms = All(m.group, [](const Cost& c) { return c.ms; });
  const double all_reduces = m.group[0].all_reduces;
  return {{"model", options.model},
          {"synthetic", IsSynthetic(options.model)},
          {"dtype", WeightsName(dtype)},
          {"batch", batch},
          {"context", options.context},
          {"tier", std::string(Name(m.tier))},
          {"one_rank_ms", Median(one_ms)},
          {"group_ms", Median(group_ms)},
          {"one_rank_ms_least", Least(one_ms)},
          {"group_ms_least", Least(group_ms)},
          {"one_rank_samples_ms", one_ms},
          {"group_samples_ms", group_ms},
          {"ratio", Median(ratios)},
          {"ratio_least", Least(ratios)},
          {"ratio_most", Most(ratios)},
          {"all_reduce_share", Median(All(m.group, [](const Cost& c) { return c.all_reduce_ms / c.ms; }))},
          {"all_reduce_share_least", Least(All(m.group, [](const Cost& c) { return c.all_reduce_ms / c.ms; }))},
          {"all_reduces_per_step", all_reduces},
          {"all_reduce_us", Median(All(m.group, [&](const Cost& c) { return 1e3 * c.all_reduce_ms / all_reduces; }))},
          {"imbalance", Median(All(m.group, [](const Cost& c) { return c.imbalance; }))}};
}

void PrintRows(const nlohmann::json& rows) {
  std::printf("%5s %7s %-9s %9s %9s %9s %9s %7s %15s %10s %7s %6s %8s %9s\n", "batch", "context", "tier", "one, ms",
              "least", "group, ms", "least", "ratio", "least to most", "allreduce", "least", "calls", "us each",
              "imbalance");
  for (const nlohmann::json& row : rows) {
    const auto number = [&](const char* key) { return row.at(key).get<double>(); };
    std::printf("%5d %7d %-9s %9.3f %9.3f %9.3f %9.3f %7.3f %7.3f %7.3f %9.2f%% %6.2f%% %6.0f %8.1f %9.3f\n",
                row.at("batch").get<int>(), row.at("context").get<int>(), row.at("tier").get<std::string>().c_str(),
                number("one_rank_ms"), number("one_rank_ms_least"), number("group_ms"), number("group_ms_least"),
                number("ratio"), number("ratio_least"), number("ratio_most"), 100 * number("all_reduce_share"),
                100 * number("all_reduce_share_least"), number("all_reduces_per_step"), number("all_reduce_us"),
                number("imbalance"));
  }
}

absl::StatusOr<std::vector<Tier>> TiersOf(const RanksOptions& options, const LoadedModel& loaded) {
  std::vector<Tier> tiers;
  for (const Tier tier : kAllTiers) {
    if (std::count(options.tiers.begin(), options.tiers.end(), std::string(Name(tier))) == 0) continue;
    RETURN_IF_ERROR(CheckServes(options.model, loaded.predictor.has_value() ? &*loaded.predictor : nullptr, tier));
    tiers.push_back(tier);
  }
  return tiers;
}

absl::StatusOr<int> WindowOf(const RanksOptions& options, const OptConfig& config) {
  const int steps = options.steps > 0 ? options.steps : std::min(kMostSteps, config.context - options.context);
  if (steps < 1 || options.context + steps > config.context) {
    return absl::InvalidArgumentError(absl::StrCat("context ", options.context, " and ", std::max(1, steps),
                                                   " steps do not fit the model's context of ", config.context));
  }
  return options.context + steps;
}

GroupOptions ShapeOf(const RanksOptions& options, int window) {
  GroupOptions group;
  group.model = {options.model, options.weights, options.predictor};
  group.device = options.device;
  group.threads = options.threads;
  group.ranks = UnderMpirun() ? 0 : options.ranks;
  group.timeout_s = 0.0;  // the others wait while one rank alone is measured
  group.slots = group.max_logit_rows = *std::max_element(options.batches.begin(), options.batches.end());
  group.max_rows = std::max(kPrefillRows, group.slots);
  group.block_tokens = kBlockTokens;
  group.blocks_per_slot = (window + kBlockTokens - 1) / kBlockTokens;
  group.plan_memory = [blocks = group.blocks_per_slot * group.slots](const Backend&, int, int) {
    return GroupOptions::Room{blocks};
  };
  return group;
}

absl::Status CheckBound() {
  if (!UnderMpirun() || !GetMpirunPlace().bound) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "mpirun gives this process some of the CPUs only, so that one rank alone could not use them all; run it with "
      "--bind-to none");
}

const char* GroupName() { return UnderMpirun() ? "Open MPI" : "threads"; }

void Print(const RanksOptions& options, Decoder& one, Decoder& group, const RanksBench& bench,
           const nlohmann::json& rows) {
  const LoadedModel& loaded = one.group().loaded();
  std::printf("%s, %s weights, %d repeats, %s\none rank: %s\ngroup: %s (%s)\n\n", options.model.c_str(),
              WeightsName(loaded.weights.dtype()), options.repeats,
              options.text.empty() ? "random tokens" : options.text.c_str(), one.group().Description().c_str(),
              group.group().Description().c_str(), GroupName());
  if (!loaded.synthetic.empty()) std::printf("SYNTHETIC: %s\n\n", loaded.synthetic.c_str());
  PrintRows(rows);
  std::printf("\nOther processes took %.1f %% of the CPUs while one rank alone was measured%s\n",
              100 * bench.others_share(), bench.others_share() > kNoisyOthers ? ". NOISY" : "");
  std::printf(
      "CPUs that each read %.1f MB and then meet, as ranks do between all-reduces, waited %.1f %% of the time (%.1f to "
      "%.1f): what a fixed division of the work costs here\n",
      1e-6 * static_cast<double>(bench.piece_bytes()), 100 * Median(bench.waiting()), 100 * Least(bench.waiting()),
      100 * Most(bench.waiting()));
  PrintBandwidth(bench.bandwidth());
}

nlohmann::json Json(const RanksOptions& options, Decoder& group, const RanksBench& bench, nlohmann::json rows) {
  nlohmann::json json = BandwidthJson(bench.bandwidth());
  json["noisy"] = json["noisy"].get<bool>() || bench.others_share() > kNoisyOthers;
  json["waiting_piece_bytes"] = bench.piece_bytes();
  json["waiting_share"] = Median(bench.waiting());
  json["others_cpu_share"] = bench.others_share();
  json["group"] = GroupName();
  json["ranks"] = group.group().ranks();
  json["backend"] = group.group().Description();
  json["repeats"] = options.repeats;
  json["rows"] = std::move(rows);
  return json;
}

absl::Status Bench(const RanksOptions& options) {
  RETURN_IF_ERROR(CheckBound());
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const int window, WindowOf(options, config));
  const GroupOptions shape = ShapeOf(options, window);
  if (MpirunRank() > 0) return ModelGroup::Follow(shape, config, [] {});

  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                   BenchTokens(options.model, options.text, int64_t{window} * shape.slots));
  ProgressLine progress("dejavu-bench");
  const auto load = [&](int ranks, const char* part) {
    GroupOptions options_of = shape;
    options_of.ranks = ranks;
    return ModelGroup::Create(options_of, config, ShowProgress(progress, part));
  };
  ASSIGN_OR_RETURN(auto group_model, load(shape.ranks, "loading the group"));
  Decoder group(std::move(group_model), shape, window, tokens);
  ASSIGN_OR_RETURN(const std::vector<Tier> tiers, TiersOf(options, group.group().loaded()));
  ASSIGN_OR_RETURN(auto one_model, load(1, "loading one rank"));
  Decoder one(std::move(one_model), shape, window, tokens);
  ASSIGN_OR_RETURN(const auto probe, BandwidthProbe::Create(options.threads));
  one.FillContext(options.context, progress);
  group.FillContext(options.context, progress);

  const OptWeights& weights = one.group().loaded().weights;
  const int64_t piece_bytes = weights.bytes() / (2 * config.layers * group.group().ranks());
  RanksBench bench(options, window, piece_bytes, one, group, *probe, progress);
  nlohmann::json rows = nlohmann::json::array();
  for (const int batch : options.batches) {
    const std::vector<Measured> measured = bench.Run(tiers, batch);
    if (Interrupted()) return absl::CancelledError("interrupted");
    for (const Measured& m : measured) rows.push_back(Describe(options, weights.dtype(), m, batch));
  }
  Print(options, one, group, bench, rows);
  return WriteJson(options.json, Json(options, group, bench, std::move(rows)));
}

int Run(const RanksOptions& options) {
  const int code = ExitCode(Bench(options));
  // A group that has failed cannot end MPI.
  if (MpirunRank() > 0 && code != 0) _exit(code);
  return code;
}

}  // namespace

Subcommand AddRanks(CLI::App& program) {
  const auto options = std::make_shared<RanksOptions>();
  CLI::App* const command =
      AddMeasuring(program, "ranks",
                   "A group of ranks beside one rank on the same CPUs: threads, or the processes of mpirun, which then "
                   "needs --bind-to none so that one rank alone can use all CPUs",
                   *options);
  AddModel(command, *options);
  AddRankCount(command, options->ranks);
  command->add_option("--text", options->text, "Text that is decoded; without: random tokens");
  AddPredictor(command, options->predictor);
  AddBatches(command, options->batches)->capture_default_str();
  command->add_option("--context", options->context, "Tokens before the first decoded one")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  AddTiers(command, options->tiers, "Such as exact,balanced")->capture_default_str();
  AddSteps(command, options->steps);
  return {command, [options] { return Run(*options); }};
}

}  // namespace dejavu
