#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

namespace dejavu {
namespace {

TEST(ThreadPool, RunsTheFunctionOnceOnEveryThread) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads, /*pin=*/false);
    std::vector<int> calls(threads);  // plain ints: the pool itself must order them for ThreadSanitizer
    for (int run = 0; run < 500; ++run) pool.Run([&](int thread) { ++calls[thread]; });
    EXPECT_EQ(calls, std::vector<int>(threads, 500)) << threads << " threads";
  }
}

TEST(ThreadPool, ShowsTheCallerWhatTheWorkersWroteAndTheReverse) {
  ThreadPool pool(4, /*pin=*/false);
  std::vector<int64_t> values(4);
  int64_t round = 0;
  for (int run = 0; run < 2000; ++run) {
    ++round;
    pool.Run([&](int thread) { values[thread] = round; });
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), int64_t{0}), 4 * round);
  }
}

TEST(ThreadPool, CoversARangeExactlyOnceInChunksThatStartAtMultiplesOfTheGrain) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads, /*pin=*/false);
    for (int64_t items : {0, 1, 7, 64, 1001}) {
      for (int64_t grain : {1, 8, 2000}) {
        std::vector<int> visits(items);
        std::atomic<int> misplaced = 0;
        pool.ParallelFor(items, grain, [&](int64_t first, int64_t last, int thread) {
          if (first % grain != 0 || thread < 0 || thread >= threads) ++misplaced;
          for (int64_t i = first; i < last; ++i) ++visits[i];
        });
        EXPECT_EQ(visits, std::vector<int>(items, 1)) << items << " items, grain " << grain;
        EXPECT_EQ(misplaced, 0);
      }
    }
  }
}

TEST(ThreadPool, StopsWhileIdleWhetherOrNotItEverRan) {
  for (int i = 0; i < 100; ++i) {
    ThreadPool pool(3, /*pin=*/false);
    if (i % 2 == 0) pool.Run([](int) {});
  }
}

TEST(ThreadPool, RunsPinnedAndMayMoveToAnotherCaller) {
  std::thread creator([] {
    auto pool = std::make_unique<ThreadPool>(2, /*pin=*/true);
    std::atomic<int> calls = 0;
    pool->Run([&](int) { ++calls; });
    std::thread other([&] { pool->Run([&](int) { ++calls; }); });
    other.join();
    EXPECT_EQ(calls, 4);
  });
  creator.join();
}

}  // namespace
}  // namespace dejavu
