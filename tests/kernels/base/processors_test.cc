#include "kernels/base/processors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <string>

#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr double kNone = std::numeric_limits<double>::infinity();
constexpr char kV2[] = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw\n";
constexpr char kV1[] =
    "31 30 0:27 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory\n"
    "33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 30 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n";

// The files under /proc and /sys that a process would see.
class Machine {
 public:
  Machine& Has(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_.Path(path.substr(1))).parent_path());
    root_.Write(path.substr(1), text);
    return *this;
  }
  Machine& Mounts(const std::string& lines) { return Has("/proc/self/mountinfo", lines); }
  Machine& In(const std::string& cgroups) { return Has("/proc/self/cgroup", cgroups); }
  CpuQuota Quota() const { return ReadCpuQuota(root_.path()); }

 private:
  ScratchDirectory root_;
};

TEST(CpuQuota, OfVersion2IsInCpuMax) {
  Machine machine;
  machine.Mounts(kV2).In("0::/pods/one\n").Has("/sys/fs/cgroup/pods/one/cpu.max", "50000 100000\n");
  EXPECT_EQ(machine.Quota().cpus, 0.5);
  EXPECT_THAT(machine.Quota().file, EndsWith("/sys/fs/cgroup/pods/one/cpu.max"));
  EXPECT_THAT(machine.Quota().problems, IsEmpty());
}

TEST(CpuQuota, OfVersion1IsQuotaOverPeriod) {
  Machine machine;
  machine.Mounts(kV1)
      .In("12:memory:/elsewhere\n4:cpu,cpuacct:/docker/ab\n3:cpuset:/cpus\n0::/\n")
      .Has("/sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us", "30000\n")
      .Has("/sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us", "20000\n")
      .Has("/sys/fs/cgroup/cpuset/cpus/cpu.cfs_quota_us", "1\n")  // cpuset is not cpu
      .Has("/sys/fs/cgroup/memory/elsewhere/cpu.cfs_quota_us", "1\n");
  EXPECT_EQ(machine.Quota().cpus, 1.5);
  EXPECT_THAT(machine.Quota().file, EndsWith("/cpu,cpuacct/docker/ab/cpu.cfs_quota_us"));
}

TEST(CpuQuota, IsTheLeastOfTheCgroupAndAllAboveIt) {
  Machine v2;
  v2.Mounts(kV2)
      .In("0::/slice/pod/container\n")
      .Has("/sys/fs/cgroup/slice/cpu.max", "300000 100000\n")
      .Has("/sys/fs/cgroup/slice/pod/cpu.max", "150000 100000\n")
      .Has("/sys/fs/cgroup/slice/pod/container/cpu.max", "max 100000\n")
      .Has("/sys/fs/cgroup/slice/pod/other/cpu.max", "1000 100000\n");
  EXPECT_EQ(v2.Quota().cpus, 1.5);
  v2.Has("/sys/fs/cgroup/slice/cpu.max", "120000 100000\n");
  EXPECT_EQ(v2.Quota().cpus, 1.2);
  EXPECT_THAT(v2.Quota().file, EndsWith("/sys/fs/cgroup/slice/cpu.max"));

  Machine v1;
  v1.Mounts(kV1)
      .In("4:cpu,cpuacct:/a/b\n")
      .Has("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
      .Has("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "200000\n")  // no file of its period: 100 ms
      .Has("/sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(v1.Quota().cpus, 2.0);
}

TEST(CpuQuota, OfBothVersionsAtOnceIsTheLess) {
  Machine machine;
  machine.Mounts(std::string(kV1) + "29 30 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n")
      .In("4:cpu,cpuacct:/a\n0::/b\n")
      .Has("/sys/fs/cgroup/unified/b/cpu.max", "70000 100000\n")
      .Has("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "80000\n");
  EXPECT_EQ(machine.Quota().cpus, 0.7);
}

TEST(CpuQuota, OfAContainerIsWhatIsMountedInIt) {
  // The host's path, of which the mount shows the last part.
  Machine bound;
  bound.Mounts("33 30 0:29 /docker/ab /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n")
      .In("4:cpu:/docker/ab\n")
      .Has("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n");
  EXPECT_EQ(bound.Quota().cpus, 0.5);
  bound.In("4:cpu:/docker/ab/inner\n").Has("/sys/fs/cgroup/cpu/inner/cpu.cfs_quota_us", "25000\n");
  EXPECT_EQ(bound.Quota().cpus, 0.25);

  // The host's path, of which the mount shows nothing.
  Machine hidden;
  hidden.Mounts(kV2).In("0::/kubepods/burstable/pod1/c1\n").Has("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(hidden.Quota().cpus, 0.5);

  // A cgroup beside what is mounted: a folder of the same name there is somebody else's.
  Machine beside;
  beside.Mounts("30 23 0:26 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
      .In("0::/docker/abc\n")
      .Has("/sys/fs/cgroup/docker/abc/cpu.max", "1000 100000\n")
      .Has("/sys/fs/cgroup/c/cpu.max", "1000 100000\n")
      .Has("/sys/fs/cgroupc/cpu.max", "1000 100000\n")
      .Has("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(beside.Quota().cpus, 0.5);

  // A cgroup outside of the namespace never leads out of the mount.
  Machine outside;
  outside.Mounts(kV2)
      .In("0::/../../other\n")
      .Has("/sys/other/cpu.max", "1000 100000\n")
      .Has("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(outside.Quota().cpus, 0.5);
}

TEST(CpuQuota, PathsMayHoldColonsAndBlanks) {
  Machine machine;
  machine.Mounts("30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n")
      .In("0::/a:b/c d\n")
      .Has("/my groups/a:b/c d/cpu.max", "50000 100000\n");
  EXPECT_EQ(machine.Quota().cpus, 0.5);
}

TEST(CpuQuota, WhatIsMissingLimitsNothing) {
  EXPECT_EQ(Machine().Quota().cpus, kNone);
  Machine no_mount;
  no_mount.In("0::/a\n").Has("/sys/fs/cgroup/a/cpu.max", "50000 100000\n");
  EXPECT_EQ(no_mount.Quota().cpus, kNone);
  Machine no_files;
  no_files.Mounts(kV2).In("0::/a\n");
  EXPECT_EQ(no_files.Quota().cpus, kNone);
  EXPECT_EQ(no_files.Quota().file, "");
  Machine no_cgroup;  // what is mounted still limits
  no_cgroup.Mounts(kV2).Has("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(no_cgroup.Quota().cpus, 0.5);
  Machine garbage;
  garbage.Mounts("\n - \n1 2 3\n30 23 0:26 / /x rw - \n" + std::string(1, '\0') + "\n").In(":::\n0\n::\n\n");
  EXPECT_EQ(garbage.Quota().cpus, kNone);
}

TEST(CpuQuota, OtherTextThanTheKernelsIsNamedAndLimitsNothing) {
  for (const char* text : {"garbage", "-5 100000", "0 100000", "50000 0", "50000 -1", "50000 100000 3", "0.5",
                           "maximum", "99999999999999999999 100000", "\x01\x02"}) {
    Machine machine;
    machine.Mounts(kV2)
        .In("0::/a\n")
        .Has("/sys/fs/cgroup/a/cpu.max", std::string(text) + "\n")
        .Has("/sys/fs/cgroup/cpu.max", "150000 100000\n");
    EXPECT_EQ(machine.Quota().cpus, 1.5) << text;
    EXPECT_THAT(machine.Quota().problems, ElementsAre(HasSubstr("/sys/fs/cgroup/a/cpu.max"))) << text;
  }
  Machine empty;
  empty.Mounts(kV2).In("0::/a\n").Has("/sys/fs/cgroup/a/cpu.max", "");
  EXPECT_EQ(empty.Quota().cpus, kNone);
  Machine no_period;
  no_period.Mounts(kV2).In("0::/a\n").Has("/sys/fs/cgroup/a/cpu.max", "50000\n");
  EXPECT_EQ(no_period.Quota().cpus, 0.5);
}

Processors With(int online, int allowed, double quota) {
  return {online, allowed, {quota, "/sys/fs/cgroup/cpu.max", {}}};
}

TEST(WorthRunning, IsAThreadPerProcessorOfTheMask) {
  EXPECT_EQ(WorthRunning(With(8, 8, kNone), 8).count, 8);
  EXPECT_EQ(WorthRunning(With(8, 8, kNone), 8).because, "all processors");
  EXPECT_EQ(WorthRunning(With(8, 2, kNone), 2).count, 2);
  EXPECT_THAT(WorthRunning(With(8, 2, kNone), 2).because, AllOf(HasSubstr("affinity"), HasSubstr("8 processors")));
}

TEST(WorthRunning, IsNoMoreThanAQuotaPays) {
  for (const auto& [cpus, threads] : {std::pair(0.01, 1),
                                      {0.5, 1},
                                      {1.0, 1},
                                      {1.4, 1},
                                      {1.5, 2},
                                      {2.0, 2},
                                      {2.4, 2},
                                      {3.75, 4},
                                      {7.4, 7},
                                      {7.5, 8},
                                      {8.0, 8},
                                      {100.0, 8}}) {
    EXPECT_EQ(WorthRunning(With(8, 8, cpus), 8).count, threads) << cpus;
  }
  EXPECT_THAT(WorthRunning(With(8, 8, 1.5), 8).because, HasSubstr("quota 1.5"));
  EXPECT_THAT(WorthRunning(With(8, 2, 2.0), 2).because, HasSubstr("affinity"));  // the quota alone would give as many
  EXPECT_EQ(WorthRunning(With(8, 1, 2.0), 1).count, 1);
}

TEST(WorthRunning, DividesAQuotaAmongSharers) {
  EXPECT_EQ(WorthRunning(With(8, 8, 4.0), 8, 2).count, 2);
  EXPECT_EQ(WorthRunning(With(8, 8, 1.0), 2, 4).count, 1);
  EXPECT_EQ(WorthRunning(With(8, 2, 16.0), 2, 4).count, 2);
  EXPECT_THAT(WorthRunning(With(8, 8, kNone), 4).because, HasSubstr("rank's part of 8"));
}

TEST(DefaultThreads, AreAtLeastOneAndAtMostTheProcessors) {
  const Threads threads = DefaultThreads();
  EXPECT_GE(threads.count, 1);
  EXPECT_LE(threads.count, static_cast<int>(ProcessCpus().size()));
  EXPECT_FALSE(threads.because.empty());
}

}  // namespace
}  // namespace dejavu
