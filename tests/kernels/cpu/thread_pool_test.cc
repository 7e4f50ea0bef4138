#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <future>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

constexpr std::chrono::minutes kPatience(2);

// A thread that its handler holds has no processor, as far as its pool can tell.
std::atomic<int> held_threads{0};
std::atomic<bool> hold{false};

void Hold(int) {
  ++held_threads;
  while (hold) usleep(1000);
  --held_threads;
}

// Holds those threads where they are, until it is gone.
class Held {
 public:
  explicit Held(const std::vector<pthread_t>& threads) {
    hold = true;
    struct sigaction action = {};
    action.sa_handler = Hold;
    sigaction(SIGUSR1, &action, nullptr);
    for (const pthread_t thread : threads) pthread_kill(thread, SIGUSR1);
    while (held_threads < static_cast<int>(threads.size())) usleep(1000);
  }
  ~Held() {
    hold = false;
    while (held_threads > 0) usleep(1000);
  }
};

std::vector<pthread_t> ThreadsOf(ThreadPool& pool) {
  std::vector<pthread_t> threads(pool.threads());
  pool.Run([&](int thread) { threads[thread] = pthread_self(); });
  return threads;
}

// 'S' for one that sleeps.
char StateOf(pid_t thread) {
  std::ifstream file(absl::StrCat("/proc/self/task/", thread, "/stat"));
  std::string text;
  std::getline(file, text);
  return text[text.rfind(')') + 2];
}

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

TEST(ThreadPool, DoesARangeWithoutTheThreadsThatHaveNoProcessor) {
  for (int threads : {2, 3, 5}) {
    ThreadPool pool(threads, /*pin=*/false);
    std::vector<pthread_t> workers = ThreadsOf(pool);
    workers.erase(workers.begin());
    std::vector<int> visits(1000);
    const auto visit = [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; ++i) ++visits[i];
    };
    std::future<void> done;
    {
      const Held held(workers);
      done = std::async(std::launch::async, [&] { pool.ParallelFor(1000, 1, visit); });
      EXPECT_EQ(done.wait_for(kPatience), std::future_status::ready) << threads << " threads";
    }
    done.wait();
    EXPECT_EQ(visits, std::vector<int>(1000, 1));
    pool.ParallelFor(1000, 1, visit);  // they are back
    EXPECT_EQ(visits, std::vector<int>(1000, 2));
  }
}

TEST(ThreadPool, SleepsWhileItWaitsForAChunkOfAThreadThatHasNoProcessor) {
  ThreadPool pool(2, /*pin=*/false);
  std::atomic<bool> go_on = false;
  std::atomic<int> inside = 0;
  std::atomic<pid_t> caller = 0;
  auto done = std::async(std::launch::async, [&] {
    pool.Run([&](int thread) {
      if (thread == 0) caller = gettid();
      if (thread == 1) {
        ++inside;
        while (!go_on) usleep(1000);
      }
    });
  });
  const auto until = std::chrono::steady_clock::now() + kPatience;
  bool slept = false;
  while (!slept && std::chrono::steady_clock::now() < until) {
    usleep(1000);
    slept = caller != 0 && inside == 1 && StateOf(caller) == 'S';
  }
  EXPECT_TRUE(slept);
  go_on = true;
  done.wait();
}

TEST(ThreadPool, RunsOnEveryThreadAlsoOnThoseThatComeLate) {
  ThreadPool pool(3, /*pin=*/false);
  std::vector<pthread_t> workers = ThreadsOf(pool);
  std::vector<int> calls(3);
  std::future<void> done;
  {
    const Held held({workers[2]});
    done = std::async(std::launch::async, [&] { pool.Run([&](int thread) { ++calls[thread]; }); });
  }
  ASSERT_EQ(done.wait_for(kPatience), std::future_status::ready);
  EXPECT_EQ(calls, std::vector<int>(3, 1));
}

TEST(ThreadPool, MixesRangesAndRunsOfEveryThread) {
  ThreadPool pool(4, /*pin=*/false);
  std::vector<int> visits(64), calls(4);
  for (int i = 0; i < 3000; ++i) {
    pool.ParallelFor(64, 8, [&](int64_t first, int64_t last, int) {
      for (int64_t k = first; k < last; ++k) ++visits[k];
    });
    if (i % 3 == 0) pool.Run([&](int thread) { ++calls[thread]; });
  }
  EXPECT_EQ(visits, std::vector<int>(64, 3000));
  EXPECT_EQ(calls, std::vector<int>(4, 1000));
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
