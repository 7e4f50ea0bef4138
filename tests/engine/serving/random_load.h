// Random requests that speculate, beside the same without: what both give must be equal, bit by bit.
#ifndef TESTS_ENGINE_SERVING_RANDOM_LOAD_H_
#define TESTS_ENGINE_SERVING_RANDOM_LOAD_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/engine.h"

namespace dejavu {

struct Asked {
  Request request;
  int samples = 1;
  size_t leaves_after = 0;     // so many tokens, by what the sink says; 0: it stays to its end
  size_t cancelled_after = 0;  // by a call, whenever that is heard
  int ends_after_ms = 0;       // by a deadline, or with what it has; the engine must refuse none for it
  bool deadline = false;

  // A prompt is the same in every tier.
  bool promised() const {
    return request.max_new_tokens == 0 || !IsPredicted(request.sparsity.tier) || request.sparsity.deterministic;
  }
};

class RandomLoad {
 public:
  // For a model of that size.
  struct Sizes {
    int context = 128, vocabulary = 504;
  };
  RandomLoad(uint32_t seed, const Sizes& sizes) : random_(seed), sizes_(sizes) {}

  std::vector<Asked> Draw(int requests);

 private:
  int Below(int below) { return std::uniform_int_distribution<int>(0, below - 1)(random_); }
  bool OneIn(int n) { return Below(n) == 0; }
  int AnyToken() { return 4 + Below(sizes_.vocabulary - 4); }
  Asked DrawOne();

  std::mt19937 random_;
  const Sizes sizes_;
};

// What drafts came to.
struct Drafted {
  int64_t rounds = 0, drafted = 0, accepted = 0;
};

// Expects the same of `load` with speculation as it asks for it and without. `together`: all of it is there before any
// of it runs; else it comes while the first of it runs.
Drafted ExpectSameWithSpeculation(Engine& engine, const std::vector<Asked>& load, bool together = true);

}  // namespace dejavu

#endif  // TESTS_ENGINE_SERVING_RANDOM_LOAD_H_
