// Writes tiny random OPT checkpoints (float32, one safetensors file), so that a test can spoil one thing at a time.
#ifndef TESTS_ENGINE_TINY_CHECKPOINT_H_
#define TESTS_ENGINE_TINY_CHECKPOINT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/scratch_directory.h"

namespace dejavu {

struct TinyCheckpoint {
  struct Values {
    std::vector<int64_t> shape;
    std::vector<float> data;
  };
  nlohmann::json config;
  std::map<std::string, Values> tensors;

  // Pre-norm, 2 layers, 2 heads, vocabulary 50, context 32; `hidden` even.
  static TinyCheckpoint Random(uint32_t seed, int hidden = 16, int ffn = 40, int layers = 2, int vocab = 50);

  // Gives it a head of its own.
  TinyCheckpoint& Untie(uint32_t seed);

  // Writes config.json and model.safetensors.
  void Write(const ScratchDirectory& directory) const;
};

}  // namespace dejavu

#endif  // TESTS_ENGINE_TINY_CHECKPOINT_H_
