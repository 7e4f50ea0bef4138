// The behaviours of a group over Open MPI; a rank of `mpirun -n N mpi_group_test CASE`. Exit 0: as it should be; 3: a
// call threw what it should; 1: anything else.
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/mpi/open_mpi.h"
#include "tests/kernels/group/group_behaviours.h"

namespace dejavu {
namespace {

constexpr double kLimit_s = 0.5;

int Say(int code, const std::string& what) {
  if (!what.empty()) std::fprintf(stderr, "%s\n", what.c_str());
  return code;
}

std::string Behaviours(Communicator& group) {
  for (const auto behaviour : {SumsInTheOrderOfRanks, BroadcastsWhatRankZeroHas, GathersInTheOrderOfRanks}) {
    if (std::string wrong = behaviour(group); !wrong.empty()) return wrong;
  }
  for (const uint64_t seed : {1, 2}) {
    uint64_t bits[2] = {};
    for (uint64_t& run : bits) {
      if (std::string wrong = DoesRandomCalls(group, 2000, seed, &run); !wrong.empty()) return wrong;
    }
    if (bits[0] != bits[1]) return "two runs gave different bits";
  }
  // Not the thread that joined.
  std::string wrong;
  std::thread([&] { wrong = DoesRandomCalls(group, 100, 3); }).join();
  return wrong;
}

// Followers wait 2 s for a broadcast.
std::string Idles(Communicator& group) {
  int word = 7;
  group.Broadcast(&word, sizeof(word));
  const auto processor_s = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  };
  const double before = processor_s();
  const SteadyTime start = std::chrono::steady_clock::now();
  if (group.rank() == 0) std::this_thread::sleep_for(std::chrono::seconds(2));
  group.Broadcast(&word, sizeof(word));
  const double share = (processor_s() - before) / SecondsSince(start);
  std::fprintf(stderr, "rank %d: %.1f %% of a CPU while idle\n", group.rank(), 100 * share);
  return share < 0.25 ? "" : "an idle follower is busy";
}

// The last rank is lost in the middle of work; the others must notice.
int Loses(Communicator& group, const std::string& how) {
  const std::string wrong = DoesRandomCalls(group, 50, 1);
  if (!wrong.empty()) return Say(1, wrong);
  if (group.rank() == group.size() - 1) {
    if (how == "stops") kill(getpid(), SIGSTOP);
    if (how == "killed") kill(getpid(), SIGKILL);
    _exit(0);
  }
  const SteadyTime start = std::chrono::steady_clock::now();
  try {
    std::vector<float> x(2048);
    while (true) group.AllReduce({x.data(), DType::kFloat32, 1, 2048, 2048});
  } catch (const std::runtime_error& error) {
    char text[300];
    const bool in_time = SecondsSince(start) < kLimit_s + 0.3;
    std::snprintf(text, sizeof(text), "rank %d gave up %s: %s", group.rank(), in_time ? "in time" : "LATE",
                  error.what());
    return Say(3, text);
  }
}

int Main(const std::string& what) {
  auto joined = JoinMpiGroup({.timeout_s = what == "behaves" ? 60 : kLimit_s, .broadcast_timeout_s = 60});
  if (!joined.ok()) return Say(1, joined.status().ToString());
  Communicator& group = **joined;
  if (group.size() != MpirunSize()) return Say(1, "not as many ranks as mpirun started");
  if (what == "behaves") {
    const std::string wrong = Behaviours(group);
    return Say(wrong.empty() ? 0 : 1, wrong);
  }
  if (what == "idles") {
    const std::string wrong = Idles(group);
    return Say(wrong.empty() ? 0 : 1, wrong);
  }
  const int code = Loses(group, what);
  joined->reset();  // must not hang either
  _exit(code);
}

}  // namespace
}  // namespace dejavu

int main(int argc, char** argv) { return dejavu::Main(argc > 1 ? argv[1] : "behaves"); }
