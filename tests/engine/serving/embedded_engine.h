// The engine with the embedded model, and prompts from a book that it has not seen.
#ifndef TESTS_ENGINE_SERVING_EMBEDDED_ENGINE_H_
#define TESTS_ENGINE_SERVING_EMBEDDED_ENGINE_H_

#include <cstdint>
#include <latch>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "tests/engine/serving/collecting_sink.h"

namespace dejavu {

// On the CPU, two threads. `options.model` empty: the embedded model.
std::unique_ptr<Engine> MakeEngine(EngineOptions options = {});

// Shadow checks report and change nothing.
EngineOptions WithoutFallback();
EngineOptions WithPredictor(const std::string& path);

inline constexpr Tier kPredictedTiers[] = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

// 100 pieces of tests/testdata/text/prompts.txt, 10 to about 100 tokens each, with the leading </s>.
const std::vector<std::vector<int32_t>>& TextPrompts();

// Greedy, without an end token.
Request SparseRequest(std::vector<int32_t> prompt, int max_new_tokens, const SparsityParams& sparsity);

// Until it is let go, another request, which counts nowhere, holds the engine in its only token: what is submitted
// meanwhile is all there at once.
class HeldEngine {
 public:
  explicit HeldEngine(Engine& engine);
  void LetGo();  // once

 private:
  std::latch all_there_{1};
  const std::shared_ptr<CollectingSink> gate_;
};

struct Heard {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  Finish finish;
};
Heard Listen(CollectingSink& sink);  // waits for the end
Heard Generate(Engine& engine, Request request);
// Submitted together, in order.
std::vector<Heard> GenerateTogether(Engine& engine, const std::vector<Request>& requests);
// The same ids, and the same bits of each log-probability.
void ExpectSameBits(const Heard& a, const Heard& b);

// All that one sample has heard.
struct Got {
  std::vector<CollectingSink::HeardToken> tokens;
  Finish finish;
};
// Of each request those of its samples, which are CollectingSinks; waits for their ends.
std::vector<std::vector<Got>> WaitForAll(const std::vector<std::vector<std::shared_ptr<TokenSink>>>& sinks);
// In every field, and in every bit of its log-probabilities.
void ExpectSameToken(const CollectingSink::HeardToken& got, const CollectingSink::HeardToken& want);

}  // namespace dejavu

#endif  // TESTS_ENGINE_SERVING_EMBEDDED_ENGINE_H_
