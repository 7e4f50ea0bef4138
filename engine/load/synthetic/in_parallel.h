// InParallel: a loop over the CPUs that are worth it, for generating weights before any thread pool of the engine runs.
#ifndef ENGINE_LOAD_SYNTHETIC_IN_PARALLEL_H_
#define ENGINE_LOAD_SYNTHETIC_IN_PARALLEL_H_

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/base/processors.h"

namespace dejavu {

// Calls use(first, last) for parts of 0 ... count on DefaultThreads().
template <typename Use>
void InParallel(int64_t count, const Use& use) {
  static const int64_t worth_it = DefaultThreads().count;  // which reads files
  const int64_t threads = std::clamp<int64_t>(worth_it, 1, std::max<int64_t>(count, 1));
  std::vector<std::jthread> others;  // joined where one of them cannot be started, too
  for (int64_t t = 1; t < threads; ++t) {
    others.emplace_back([&, t] { use(count * t / threads, count * (t + 1) / threads); });
  }
  use(0, count / threads);
}

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_IN_PARALLEL_H_
