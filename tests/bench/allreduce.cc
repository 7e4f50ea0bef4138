// `dejavu-bench allreduce`: how long the ranks of a group take to add up their values. Threads of this process; under
// mpirun the processes that it started.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/communicator.h"
#include "kernels/group/thread_group.h"
#include "kernels/mpi/open_mpi.h"
#include "nlohmann/json.hpp"
#include "tests/bench/flags.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

struct AllReduceOptions {
  int ranks = 2;  // threads; mpirun says how many there are
  int repeats = 5;
  std::string json;
};

struct Figure {
  int64_t bytes;
  double p50_us, p99_us;
};

// As one rank sees it; all ranks call it. The figures are medians of the repeats.
std::vector<Figure> Measure(Communicator& group, int repeats) {
  std::vector<Figure> figures;
  for (const int64_t bytes : {int64_t{4}, int64_t{8} << 10, int64_t{64} << 10, int64_t{1} << 20}) {
    const int calls = bytes > 100000 ? 500 : 5000;
    std::vector<float> x(bytes / sizeof(float));
    const Tensor view{x.data(), DType::kFloat32, 1, static_cast<int64_t>(x.size()), static_cast<int64_t>(x.size())};
    std::vector<double> p50, p99, us(calls);
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int i = 0; i < calls / 10; ++i) group.AllReduce(view);
      for (double& one : us) {
        const SteadyTime start = std::chrono::steady_clock::now();
        group.AllReduce(view);
        one = 1e6 * SecondsSince(start);
      }
      std::sort(us.begin(), us.end());
      p50.push_back(Quantile(us, 0.50));
      p99.push_back(Quantile(us, 0.99));
    }
    figures.push_back({bytes, Median(p50), Median(p99)});
  }
  return figures;
}

absl::Status Report(const AllReduceOptions& options, const char* group, int ranks, const std::vector<Figure>& figures) {
  std::printf("AllReduce, %d ranks, %s\n%10s %10s %10s\n", ranks, group, "bytes", "p50 us", "p99 us");
  nlohmann::json rows = nlohmann::json::array();
  for (const Figure& figure : figures) {
    std::printf("%10lld %10.2f %10.2f\n", static_cast<long long>(figure.bytes), figure.p50_us, figure.p99_us);
    rows.push_back({{"bytes", figure.bytes}, {"p50_us", figure.p50_us}, {"p99_us", figure.p99_us}});
  }
  return WriteJson(options.json, {{"group", group}, {"ranks", ranks}, {"rows", rows}});
}

absl::Status Bench(const AllReduceOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  if (UnderMpirun()) {
    ASSIGN_OR_RETURN(const auto group, JoinMpiGroup());
    const std::vector<Figure> figures = Measure(*group, options.repeats);
    return group->rank() == 0 ? Report(options, "Open MPI", group->size(), figures) : absl::OkStatus();
  }
  const auto ranks = MakeThreadGroup(options.ranks);
  std::vector<std::thread> others;
  for (int i = 1; i < options.ranks; ++i) others.emplace_back([&, i] { Measure(*ranks[i], options.repeats); });
  const std::vector<Figure> figures = Measure(*ranks[0], options.repeats);
  for (std::thread& thread : others) thread.join();
  return Report(options, "threads", options.ranks, figures);
}

}  // namespace

Subcommand AddAllReduce(CLI::App& program) {
  const auto options = std::make_shared<AllReduceOptions>();
  CLI::App* const command = program.add_subcommand(
      "allreduce", "How long ranks take to add up their values: threads, or the processes of mpirun");
  AddRankCount(command, options->ranks);
  AddRepeats(command, options->repeats);
  AddJson(command, options->json);
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
