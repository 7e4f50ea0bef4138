#include "kernels/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/clock.h"
#include "kernels/group/thread_group.h"
#include "kernels/mpi/open_mpi.h"
#include "tests/kernels/group/group_behaviours.h"

namespace dejavu {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using Ranks = std::vector<std::unique_ptr<Communicator>>;

Ranks MakeRanks(int size, const ThreadGroupOptions& options = {}) {
  if (size > 0) return MakeThreadGroup(size, options);
  Ranks ranks;
  ranks.push_back(SingleRank());
  return ranks;
}

// body(communicator) for every rank, each in its own thread.
void OnAll(const Ranks& ranks, const std::function<void(Communicator&)>& body) {
  std::vector<std::thread> threads;
  for (const auto& rank : ranks) threads.emplace_back([&] { body(*rank); });
  for (std::thread& thread : threads) thread.join();
}

// What the call threw.
std::string Thrown(const std::function<void()>& call) {
  try {
    call();
  } catch (const PeerLost& error) {
    return error.what();
  }
  return "nothing";
}

std::string ThrownByAllReduce(Communicator& rank) {
  float x = 1;
  return Thrown([&] { rank.AllReduce({&x, DType::kFloat32, 1, 1, 1}); });
}

// 0: SingleRank(); otherwise the size of a group of threads.
class Group : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Forms, Group, ::testing::Values(0, 1, 2, 3, 4), [](const auto& info) {
  return info.param == 0 ? std::string("single") : absl::StrCat("threads", info.param);
});

TEST_P(Group, CountsItsRanks) {
  const Ranks ranks = MakeRanks(GetParam());
  for (size_t i = 0; i < ranks.size(); ++i) {
    EXPECT_EQ(ranks[i]->rank(), static_cast<int>(i));
    EXPECT_EQ(ranks[i]->size(), static_cast<int>(ranks.size()));
  }
}

TEST_P(Group, SumsInTheOrderOfRanks) {
  OnAll(MakeRanks(GetParam()), [](Communicator& rank) { EXPECT_EQ(SumsInTheOrderOfRanks(rank), ""); });
}

TEST_P(Group, BroadcastsWhatRankZeroHas) {
  OnAll(MakeRanks(GetParam()), [](Communicator& rank) { EXPECT_EQ(BroadcastsWhatRankZeroHas(rank), ""); });
}

TEST_P(Group, GathersInTheOrderOfRanks) {
  OnAll(MakeRanks(GetParam()), [](Communicator& rank) { EXPECT_EQ(GathersInTheOrderOfRanks(rank), ""); });
}

TEST_P(Group, GivesTheSameBitsForRandomCallsInEveryRun) {
  std::vector<uint64_t> bits[2];
  for (auto& run : bits) {
    const Ranks ranks = MakeRanks(GetParam());
    run.resize(ranks.size());
    OnAll(ranks, [&](Communicator& rank) { EXPECT_EQ(DoesRandomCalls(rank, 2000, 1, &run[rank.rank()]), ""); });
  }
  EXPECT_EQ(bits[0], bits[1]);
}

TEST_P(Group, CountsAllReduces) {
  if (GetParam() == 0) GTEST_SKIP() << "one rank sums nothing";
  OnAll(MakeRanks(GetParam()), [](Communicator& rank) {
    for (int i = 0; i < 3; ++i) ThrownByAllReduce(rank);
    EXPECT_EQ(rank.stats().all_reduces, 3);
    EXPECT_GT(rank.stats().all_reduce_ns, 0);
  });
}

constexpr double kLimit_s = 0.2;

class Broken : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, Broken, ::testing::Values(2, 3, 4));

TEST_P(Broken, GivesUpWithinTheLimitOnARankThatDoesNotCome) {
  const int missing = GetParam() - 1;
  const Ranks ranks = MakeRanks(GetParam(), {.timeout_s = 600});
  const SteadyTime start = std::chrono::steady_clock::now();
  OnAll(ranks, [&](Communicator& rank) {
    ThrownByAllReduce(rank);  // every thread runs
    rank.SetLimit(kLimit_s);
    if (rank.rank() == missing) return;
    // Who comes to its limit first spares the others theirs.
    EXPECT_THAT(ThrownByAllReduce(rank), AnyOf(absl::StrCat("AllReduce: rank ", rank.rank(), " waited for rank ",
                                                            missing, ", which did not come within 0.2 s"),
                                               HasSubstr("is in a group that failed at rank")));
  });
  EXPECT_GE(SecondsSince(start), kLimit_s);
  EXPECT_LT(SecondsSince(start), kLimit_s + 5);
  EXPECT_THAT(ThrownByAllReduce(*ranks[missing]), HasSubstr("failed at rank")) << "it came too late";
}

TEST_P(Broken, GivesUpOnABroadcastAndAGather) {
  const Ranks broadcast = MakeRanks(GetParam(), {.timeout_s = kLimit_s});
  char byte = 0;
  EXPECT_THAT(Thrown([&] { broadcast[1]->Broadcast(&byte, 1); }),
              HasSubstr("Broadcast: rank 1 waited for rank 0, which did not come within 0.2 s"));
  const Ranks gather = MakeRanks(GetParam(), {.timeout_s = kLimit_s});
  std::vector<char> all(GetParam());
  EXPECT_THAT(Thrown([&] { gather[0]->Gather(all.data(), &byte, 1); }),
              HasSubstr("Gather: rank 0 waited for rank 1, which did not come within 0.2 s"));
}

TEST_P(Broken, TellsEverybodyAtOnceWhenARankLeaves) {
  Ranks ranks = MakeRanks(GetParam(), {.timeout_s = 600});
  const SteadyTime start = std::chrono::steady_clock::now();
  OnAll(ranks, [&](Communicator& rank) {
    ThrownByAllReduce(rank);
    if (rank.rank() == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the others sleep by now
      ranks[1].reset();
    } else {
      EXPECT_THAT(ThrownByAllReduce(rank), AnyOf(HasSubstr("waited for rank 1, which has left the group"),
                                                 HasSubstr("is in a group that failed at rank")));
    }
  });
  EXPECT_LT(SecondsSince(start), 60);
}

TEST_P(Broken, HearsTheLastWordsOfARankThatLeft) {
  Ranks ranks = MakeRanks(GetParam(), {.timeout_s = 600});
  int word = 7;
  ranks[0]->Broadcast(&word, sizeof(word));
  ranks[0].reset();
  for (int i = 1; i < GetParam(); ++i) {
    int heard = 0;
    ranks[i]->Broadcast(&heard, sizeof(heard));
    EXPECT_EQ(heard, 7);
  }
}

TEST_P(Broken, GivesUpWithinALimitThatIsSetLater) {
  const Ranks ranks = MakeRanks(GetParam(), {.timeout_s = std::numeric_limits<double>::infinity()});
  ranks[1]->SetLimit(kLimit_s);
  int word = 0;
  EXPECT_THAT(Thrown([&] { ranks[1]->Broadcast(&word, sizeof(word)); }), HasSubstr("did not come within 0.2 s"));
}

TEST_P(Broken, WaitsLongerForABroadcastThanForAnythingElseIfToldSo) {
  const double forever = std::numeric_limits<double>::infinity();
  OnAll(MakeRanks(GetParam(), {.timeout_s = kLimit_s, .broadcast_timeout_s = forever}), [](Communicator& rank) {
    if (rank.rank() == 0) std::this_thread::sleep_for(std::chrono::duration<double>(2 * kLimit_s));
    int word = rank.rank() == 0 ? 7 : 0;
    rank.Broadcast(&word, sizeof(word));
    EXPECT_EQ(word, 7);
  });
}

TEST(GroupDeathTest, StopsWhenRanksMakeDifferentCalls) {
  EXPECT_DEATH(OnAll(MakeRanks(2),
                     [](Communicator& rank) {
                       char all[16] = "";
                       if (rank.rank() == 0) {
                         rank.Gather(all, all, 8);
                       } else {
                         rank.Broadcast(all, 8);
                       }
                     }),
               "meets");
}

TEST(MpiGroup, IsThereOnlyUnderMpirun) {
  unsetenv("OMPI_COMM_WORLD_SIZE");
  EXPECT_FALSE(UnderMpirun());
  EXPECT_EQ(MpirunSize(), 1);
  EXPECT_TRUE(absl::IsFailedPrecondition(JoinMpiGroup().status()));
}

TEST(MpiGroup, SaysWhichModuleItDidNotFind) {
  setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
  setenv("DEJAVU_MPI_MODULE", "/nowhere/libdejavu_mpi.so", 1);
  EXPECT_TRUE(UnderMpirun());
  EXPECT_EQ(MpirunSize(), 2);
  const absl::Status status = JoinMpiGroup().status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(status.message(), AllOf(HasSubstr("no MPI module"), HasSubstr("/nowhere/libdejavu_mpi.so")));
  unsetenv("OMPI_COMM_WORLD_SIZE");
  unsetenv("DEJAVU_MPI_MODULE");
}

}  // namespace
}  // namespace dejavu
