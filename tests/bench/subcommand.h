// The subcommands of dejavu-bench, one question each. A new one is a file of its own, a line in each of the two lists
// here, and its line in tests/CMakeLists.txt.
#ifndef TESTS_BENCH_SUBCOMMAND_H_
#define TESTS_BENCH_SUBCOMMAND_H_

#include <functional>

namespace CLI {
class App;
}

namespace dejavu {

struct Subcommand {
  const CLI::App* flags;
  std::function<int()> run;  // once the flags are parsed; returns the exit code
};

// Adds a subcommand with its flags to the program.
using AddSubcommand = Subcommand(CLI::App& program);
AddSubcommand AddBandwidth;
AddSubcommand AddOps;
AddSubcommand AddPrefill;
AddSubcommand AddDecode;
AddSubcommand AddLaunches;
AddSubcommand AddServe;
AddSubcommand AddSchedule;
AddSubcommand AddAllReduce;
AddSubcommand AddRanks;
AddSubcommand AddImbalance;
AddSubcommand AddCheckpoint;
AddSubcommand AddBarriers;

// In the order of --help.
inline constexpr AddSubcommand* kSubcommands[] = {AddBandwidth, AddOps,      AddPrefill,   AddDecode,
                                                  AddBarriers,  AddLaunches, AddServe,     AddSchedule,
                                                  AddAllReduce, AddRanks,    AddImbalance, AddCheckpoint};

}  // namespace dejavu

#endif  // TESTS_BENCH_SUBCOMMAND_H_
