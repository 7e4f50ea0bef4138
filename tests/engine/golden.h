// Golden vectors computed by Hugging Face Transformers in float32 from the stored weights
// (tests/testdata/opt/*/golden.safetensors).
#ifndef TESTS_ENGINE_GOLDEN_H_
#define TESTS_ENGINE_GOLDEN_H_

#include <cstdint>
#include <string>
#include <vector>

namespace dejavu {

struct Golden {
  std::vector<int32_t> prompt;  // [T]
  std::vector<float> logits;    // [T, vocab]
  std::vector<int32_t> greedy;  // [N] what greedy decoding appends
  std::vector<float> margin;    // [N] gap between the best and the second logit at each step
};

// The names of the checkpoints under tests/testdata/opt.
std::vector<std::string> GoldenCheckpoints();
std::string CheckpointPath(const std::string& name);
std::vector<Golden> LoadGoldens(const std::string& name);

}  // namespace dejavu

#endif  // TESTS_ENGINE_GOLDEN_H_
