// What this process may use of the machine's processors: its affinity mask, which a cpuset narrows, and the CPU quota
// of its cgroup or of one above it, of either version. Any thread.
#ifndef KERNELS_BASE_PROCESSORS_H_
#define KERNELS_BASE_PROCESSORS_H_

#include <limits>
#include <string>
#include <vector>

namespace dejavu {

// Of processor time: so many processors at once, on average.
struct CpuQuota {
  double cpus = std::numeric_limits<double>::infinity();
  std::string file;                   // what says so; empty where nothing limits
  std::vector<std::string> problems;  // files that say something else than the kernel writes
};

// The least quota of the process's cgroups and all above them that can be seen. `root` stands before /proc and /sys,
// and is empty but for tests. What is missing limits nothing.
CpuQuota ReadCpuQuota(const std::string& root = "");

// The CPUs that this process could use when it was first asked, ascending. Threads that are pinned later change
// nothing.
const std::vector<int>& ProcessCpus();

struct Processors {
  int online = 1;   // of the machine
  int allowed = 1;  // of those, to this process
  CpuQuota quota;
};
Processors FindProcessors();  // of this process; its quota as it is now

// How many threads are worth running, and what decided that, for people.
struct Threads {
  int count = 1;
  std::string because;  // short: "all processors"
};

// One for each of `own_cpus`, or fewer where a quota that `sharers` divide among them gives each less: a rest of at
// least kWorthAThread of a CPU makes one more. At least one.
inline constexpr double kWorthAThread = 0.5;
Threads WorthRunning(const Processors& processors, int own_cpus, int sharers = 1);

Threads DefaultThreads();  // of this process, if all processors are its own

}  // namespace dejavu

#endif  // KERNELS_BASE_PROCESSORS_H_
