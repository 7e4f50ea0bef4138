// /proc/self/cgroup names the process's cgroup in each hierarchy, /proc/self/mountinfo which part of a hierarchy can be
// seen where. Where the two do not fit, as in many containers, the cgroup is what is mounted. From the cgroup up to the
// mount each directory may hold a quota.
#include "kernels/base/processors.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr int64_t kDefaultPeriodUs = 100000;

// A hierarchy that may limit CPUs, as it is mounted.
struct Mount {
  bool v2 = false;
  std::string place;  // where
  std::string shown;  // which part of the hierarchy
};

std::vector<std::string> LinesOf(const std::string& path) {
  std::vector<std::string> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

bool NamesCpu(absl::string_view list) {
  const std::vector<absl::string_view> names = absl::StrSplit(list, ',');
  return std::find(names.begin(), names.end(), "cpu") != names.end();
}

// The kernel writes a blank of a path as \040.
std::string Unescaped(absl::string_view text) {
  std::string result;
  return absl::CUnescape(text, &result) ? result : std::string(text);
}

// "36 35 0:30 /part /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw".
std::vector<Mount> MountsIn(const std::string& root) {
  std::vector<Mount> mounts;
  for (const std::string& line : LinesOf(root + "/proc/self/mountinfo")) {
    const std::vector<absl::string_view> halves = absl::StrSplit(line, absl::MaxSplits(" - ", 1));
    if (halves.size() != 2) continue;
    const std::vector<absl::string_view> place = absl::StrSplit(halves[0], ' '), kind = absl::StrSplit(halves[1], ' ');
    if (place.size() < 5 || kind.size() < 3) continue;
    const bool v2 = kind[0] == "cgroup2";
    if (v2 || (kind[0] == "cgroup" && NamesCpu(kind[2])))
      mounts.push_back({v2, Unescaped(place[4]), Unescaped(place[3])});
  }
  return mounts;
}

// "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1.
std::string CgroupIn(const std::string& root, bool v2) {
  for (const std::string& line : LinesOf(root + "/proc/self/cgroup")) {
    const std::vector<std::string> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() == 3 && (v2 ? fields[0] == "0" && fields[1].empty() : NamesCpu(fields[1]))) return fields[2];
  }
  return "/";
}

// Below the mount's place: "" or "/a/b". A cgroup outside of what is shown is the mount itself to us.
std::string BelowMount(const Mount& mount, const std::string& cgroup) {
  const std::string shown(absl::StripSuffix(mount.shown, "/"));
  if (!absl::StartsWith(cgroup + "/", shown + "/") || absl::StrContains(cgroup + "/", "/../")) return "";
  return std::string(absl::StripSuffix(cgroup.substr(shown.size()), "/"));
}

std::vector<std::string> WordsOf(const std::string& path) {
  const std::vector<std::string> lines = LinesOf(path);
  return lines.empty() ? lines : absl::StrSplit(lines[0], ' ', absl::SkipWhitespace());
}

// Of one directory, which need not hold any.
void ReadQuota(const std::string& folder, bool v2, CpuQuota& least) {
  const std::string path = folder + (v2 ? "/cpu.max" : "/cpu.cfs_quota_us");
  std::vector<std::string> words = WordsOf(path);  // quota and period
  if (words.empty()) return;
  if (!v2) {
    const std::vector<std::string> period = WordsOf(folder + "/cpu.cfs_period_us");
    words.insert(words.end(), period.begin(), period.end());
  }
  if (words[0] == (v2 ? "max" : "-1")) return;
  int64_t quota_us = 0, period_us = kDefaultPeriodUs;
  const bool numbers = words.size() <= 2 && absl::SimpleAtoi(words[0], &quota_us) &&
                       (words.size() < 2 || absl::SimpleAtoi(words[1], &period_us));
  if (!numbers || quota_us <= 0 || period_us <= 0) {
    least.problems.push_back(absl::StrCat(path, ": \"", absl::CHexEscape(absl::StrJoin(words, " ").substr(0, 80)),
                                          "\" is no quota and period in microseconds"));
    return;
  }
  const double cpus = static_cast<double>(quota_us) / static_cast<double>(period_us);
  if (cpus >= least.cpus) return;
  least.cpus = cpus;
  least.file = path;
}

std::vector<int> AffinityCpus() {
  for (int size = CPU_SETSIZE;; size *= 2) {  // the kernel may know of more than a cpu_set_t holds
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(size), [](cpu_set_t* s) { CPU_FREE(s); });
    const size_t bytes = CPU_ALLOC_SIZE(size);
    if (sched_getaffinity(0, bytes, set.get()) != 0) {
      CHECK(errno == EINVAL && size < (1 << 20)) << "sched_getaffinity";
      continue;
    }
    std::vector<int> cpus;
    for (int cpu = 0; cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.get())) cpus.push_back(cpu);
    }
    return cpus;
  }
}

}  // namespace

CpuQuota ReadCpuQuota(const std::string& root) {
  CpuQuota least;
  for (const Mount& mount : MountsIn(root)) {
    const std::string top = root + mount.place;
    std::string folder = top + BelowMount(mount, CgroupIn(root, mount.v2));
    for (; folder.size() > top.size(); folder.erase(folder.rfind('/'))) ReadQuota(folder, mount.v2, least);
    ReadQuota(top, mount.v2, least);
  }
  return least;
}

const std::vector<int>& ProcessCpus() {
  static const std::vector<int> cpus = AffinityCpus();
  return cpus;
}

Processors FindProcessors() {
  const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return {online, static_cast<int>(ProcessCpus().size()), ReadCpuQuota()};
}

Threads WorthRunning(const Processors& processors, int own_cpus, int sharers) {
  const double most = processors.quota.cpus / sharers + 1.0 - kWorthAThread;
  if (most < own_cpus) {
    return {std::max(1, static_cast<int>(most)), absl::StrCat("CPU quota ", processors.quota.cpus)};
  }
  if (own_cpus < processors.allowed) return {own_cpus, absl::StrCat("a rank's part of ", processors.allowed)};
  if (own_cpus < processors.online) return {own_cpus, absl::StrCat("affinity, ", processors.online, " processors")};
  return {own_cpus, "all processors"};
}

Threads DefaultThreads() {
  const Processors processors = FindProcessors();
  return WorthRunning(processors, processors.allowed);
}

}  // namespace dejavu
