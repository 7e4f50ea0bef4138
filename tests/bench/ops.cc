// `dejavu-bench ops`: each op of the CPU backend against what this machine can do. Repeats take the ops in turn;
// bandwidth and arithmetic peak are probed around each of them.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/thread_pool.h"
#include "nlohmann/json.hpp"
#include "tests/bench/flags.h"
#include "tests/bench/op_cases.h"
#include "tests/bench/probe.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr double kSecondsOfOneMeasurement = 0.04;
constexpr double kBarrierAllowance_s = 10e-6;  // what a gathered kernel may cost beside its share

// Seconds of a call. Goes on from call `*next`, so that the next measurement does not find its weights in a cache.
double TimeOf(const OpCase& c, Backend& dev, int64_t* next) {
  const SteadyTime start = std::chrono::steady_clock::now();
  int64_t calls = 0;
  do {
    c.run((*next)++);
    ++calls;
  } while (SecondsSince(start) < kSecondsOfOneMeasurement);
  dev.Synchronize();
  return SecondsSince(start) / static_cast<double>(calls);
}

// What all threads cost to meet, with nothing to do.
double BarrierSeconds(int threads) {
  constexpr int kRuns = 2000;
  ThreadPool pool(threads, /*pin=*/true);
  auto nothing = [](int) {};
  pool.Run(nothing);
  const SteadyTime start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRuns; ++i) pool.Run(nothing);
  return SecondsSince(start) / kRuns;
}

nlohmann::json Describe(const OpCase& c) {
  const double seconds = Median(c.seconds);
  nlohmann::json row = {{"op", c.op}, {"batch", c.batch}, {"us", 1e6 * seconds}, {"us_least", 1e6 * Least(c.seconds)}};
  if (c.bytes > 0) {
    row["bytes"] = c.bytes;
    row["gb_per_s"] = 1e-9 * c.bytes / seconds;
    row["bandwidth_share"] = Median(c.bandwidth_shares);
    row["gflop_per_s"] = 1e-9 * c.operations / seconds;
    row["peak_share"] = Median(c.peak_shares);
  }
  if (!c.proportional_costs.empty()) {
    row["density"] = c.density;
    row["cost_over_proportional"] = Median(c.proportional_costs);
  }
  if (c.context > 0) row["context"] = c.context;
  return row;
}

void Print(const nlohmann::json& row) {
  std::string setting = absl::StrCat("batch ", row["batch"].get<int>());
  if (row.contains("density")) absl::StrAppendFormat(&setting, ", %.3g %%", 100 * row["density"].get<double>());
  if (row.contains("context")) absl::StrAppendFormat(&setting, ", context %d", row["context"].get<int>());
  std::printf("%-20s %-22s %11.1f %11.1f", row["op"].get<std::string>().c_str(), setting.c_str(),
              row["us"].get<double>(), row["us_least"].get<double>());
  if (row.contains("bytes")) {
    std::printf(" %8.1f %7.1f%% %9.1f %7.1f%%", row["gb_per_s"].get<double>(),
                100 * row["bandwidth_share"].get<double>(), row["gflop_per_s"].get<double>(),
                100 * row["peak_share"].get<double>());
  }
  if (row.contains("cost_over_proportional")) std::printf(" %8.3f", row["cost_over_proportional"].get<double>());
  std::printf("\n");
}

absl::Status Check(const OpsOptions& options) {
  if (options.hidden % 64 != 0 || options.ffn % 64 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--hidden ", options.hidden, " and --ffn ", options.ffn, " must be multiples of 64"));
  }
  return CheckWritable(options.json);
}

class OpsBench {
 public:
  OpsBench(const OpsOptions& options, Backend& dev, BandwidthProbe& bandwidth, std::vector<OpCase>& cases,
           ProgressLine& progress)
      : options_(options),
        dev_(dev),
        bandwidth_(bandwidth),
        arithmetic_(options.threads),
        cases_(cases),
        progress_(progress),
        next_(cases.size()) {}

  // Fills in what the cases cost.
  void Run() {
    for (int repeat = -1; repeat < options_.repeats; ++repeat) {  // one to warm up
      const double peak = arithmetic_.Measure();
      double before = bandwidth_.Measure(), dense_s = 0.0;
      const double barrier_s = BarrierSeconds(bandwidth_.threads());
      if (repeat >= 0) {
        gflop_per_s_.push_back(peak);
        barriers_s_.push_back(barrier_s);
      }
      for (size_t i = 0; i < cases_.size(); ++i) {
        OpCase& c = cases_[i];
        const double seconds = TimeOf(c, dev_, &next_[i]);
        const double after = bandwidth_.Measure();
        if (i == 0) dense_s = seconds;
        if (Interrupted()) return;
        const double share_of_repeat = static_cast<double>(i) / static_cast<double>(cases_.size());
        progress_.Show("measuring", (repeat + 1 + share_of_repeat) / (options_.repeats + 1));
        if (repeat >= 0) {
          gb_per_s_.push_back(after);
          Note(c, seconds, 0.5 * (before + after), peak, dense_s);
        }
        before = after;
      }
    }
  }

  const std::vector<double>& gb_per_s() const { return gb_per_s_; }
  const std::vector<double>& gflop_per_s() const { return gflop_per_s_; }
  const std::vector<double>& barriers_s() const { return barriers_s_; }

 private:
  static void Note(OpCase& c, double seconds, double gb_per_s, double gflop_per_s, double dense_s) {
    c.seconds.push_back(seconds);
    c.bandwidth_shares.push_back(1e-9 * c.bytes / seconds / gb_per_s);
    c.peak_shares.push_back(1e-9 * c.operations / seconds / gflop_per_s);
    if (c.op == OpCases::kGathered) {
      c.proportional_costs.push_back((seconds - kBarrierAllowance_s) / (c.density * dense_s));
    }
  }

  const OpsOptions& options_;
  Backend& dev_;
  BandwidthProbe& bandwidth_;
  ArithmeticProbe arithmetic_;
  std::vector<OpCase>& cases_;
  ProgressLine& progress_;
  std::vector<int64_t> next_;  // call of each case
  std::vector<double> gb_per_s_, gflop_per_s_, barriers_s_;
};

absl::Status Report(const OpsOptions& options, const Backend& dev, const std::vector<OpCase>& cases,
                    const OpsBench& bench) {
  std::printf("Layer of %d, %d neurons, %s weights, %s, %d repeats\n\n", options.hidden, options.ffn,
              options.weights.c_str(), dev.Description().c_str(), options.repeats);
  std::printf("%-20s %-22s %11s %11s %8s %8s %9s %8s %8s\n", "op", "", "us", "least", "GB/s", "/ bandw", "GFLOP/s",
              "/ peak", "/ share");
  nlohmann::json rows = nlohmann::json::array();
  for (const OpCase& c : cases) {
    rows.push_back(Describe(c));
    Print(rows.back());
  }
  const std::vector<double>& peaks = bench.gflop_per_s();
  std::printf("\n/ share: time less 10 us, over density times the dense MLP's time.\n");
  std::printf("Peak of float32 multiply-adds: %.1f GFLOP/s (%.1f to %.1f). A barrier: %.2f us.\n", Median(peaks),
              Least(peaks), Most(peaks), 1e6 * Median(bench.barriers_s()));
  PrintBandwidth(bench.gb_per_s());
  nlohmann::json json = BandwidthJson(bench.gb_per_s());
  json["peak_gflop_per_s"] = Median(peaks);
  json["barrier_us"] = 1e6 * Median(bench.barriers_s());
  json["backend"] = dev.Description();
  json["hidden"] = options.hidden;
  json["ffn"] = options.ffn;
  json["dtype"] = options.weights;
  json["rows"] = std::move(rows);
  return WriteJson(options.json, json);
}

absl::Status Bench(const OpsOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(Check(options));
  ASSIGN_OR_RETURN(const auto dev, CreateCpuBackend({options.threads, /*pin=*/true}));
  OpCases ops(options, *dev);
  ProgressLine progress("dejavu-bench");
  progress.Show("filling", 0.0);
  RETURN_IF_ERROR(ops.Allocate());
  ASSIGN_OR_RETURN(const auto bandwidth, BandwidthProbe::Create(options.threads));
  std::vector<OpCase> cases = ops.All();
  OpsBench bench(options, *dev, *bandwidth, cases, progress);
  bench.Run();
  if (Interrupted()) return absl::CancelledError("interrupted");
  return Report(options, *dev, cases, bench);
}

}  // namespace

Subcommand AddOps(CLI::App& program) {
  const auto options = std::make_shared<OpsOptions>();
  CLI::App* const command =
      AddMeasuring(program, "ops", "Each op of the CPU backend against bandwidth and arithmetic peak", *options);
  command->add_option("--hidden", options->hidden, "Width of the layer")
      ->check(CLI::Range(64, 1 << 16))
      ->capture_default_str();
  command->add_option("--ffn", options->ffn, "Neurons of the layer")
      ->check(CLI::Range(64, 1 << 18))
      ->capture_default_str();
  AddType(command, options->weights, "Type of the weights", kTypes);
  command->add_option("--batch", options->batch, "Rows")->check(CLI::Range(1, 256))->capture_default_str();
  command->add_option("--working-set-mib", options->working_set_mib, "Weights that an op goes through")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
