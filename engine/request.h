// What a caller asks of the engine and what it hears back. Plain data and one callback interface.
#ifndef ENGINE_REQUEST_H_
#define ENGINE_REQUEST_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/sparsity.h"
#include "engine/speculation.h"
#include "kernels/base/clock.h"

namespace dejavu {

// How the next token is chosen. Order: logit bias and allowed tokens, penalties, then greedy, or temperature, top-k,
// top-p, min-p and a draw. The draw is a pure function of (seed, index of the token, token id).
struct SamplingParams {
  float temperature = 0.0f;  // 0: greedy
  int32_t top_k = 0;         // 0: all
  float top_p = 1.0f;        // (0, 1]
  float min_p = 0.0f;        // [0, 1]: drop tokens below min_p times the probability of the best
  uint64_t seed = 0;
  float repetition_penalty = 1.0f;  // > 0, over prompt and output, as in Transformers (arXiv 1909.05858)
  float presence_penalty = 0.0f;    // over the output, subtracted once per seen token
  float frequency_penalty = 0.0f;   // over the output, subtracted per occurrence
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> allowed_token_ids;  // empty: all
  absl::Span<const int32_t> unused_ids;    // that stand for nothing and are never chosen; the caller keeps them
};

// Whom to serve first: a class goes before the ones below it, whatever the tenant.
enum class Urgency : uint8_t { kInteractive, kNormal, kBatch };
inline constexpr int kUrgencies = 3;
absl::string_view Name(Urgency urgency);  // "interactive", "normal", "batch"

struct Request {
  std::vector<int32_t> prompt;  // 1 ... context ids, each below the vocabulary; taken as they are
  SamplingParams sampling;
  SparsityParams sparsity;        // of what is generated: a prompt, scored or not, is prefill
  SpeculationParams speculation;  // without effect in a predicted tier
  int32_t max_new_tokens = 0;     // 0: the prompt alone; MaxPositions must fit the context
  int32_t min_new_tokens = 0;     // no stop token before that many; stop strings are the sink's
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  bool logprobs = false;           // fill Token::logprob and rank
  int32_t top_logprobs = 0;        // and this many alternatives
  bool score = false;              // report the log-probabilities of the prompt, before anything is generated
  int32_t score_top_logprobs = 0;  // and after each of its tokens this many alternatives
  SteadyTime deadline = SteadyTime::max();
  SteadyTime stop_at = SteadyTime::max();  // then it ends regularly, with what it has

  std::string tenant;  // who shares with whom: the server, fairly, and prefixes
  Urgency urgency = Urgency::kNormal;
  int32_t priority = 0;                // higher first, within tenant and urgency
  double inter_token_target_ms = 0.0;  // wanted between two tokens; 0: the scheduler's own
  bool prefix_cache = true;            // may use and leave blocks of its prompt
  std::string cache_salt;              // requests of different salts share no blocks
};

// Of the context that a request takes at most. The last token that it generates is never read, and takes none.
inline int64_t MaxPositions(const Request& request) {
  return static_cast<int64_t>(request.prompt.size()) + std::max(0, request.max_new_tokens - 1);
}

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0.0f;  // natural logarithm, of the model's own distribution: before bias, penalties and temperature
};

struct Token {
  int32_t id = 0;
  bool has_logprob = false;
  float logprob = 0.0f;
  int32_t rank = 0;                    // 1: the most likely one; ties count in favour of the token
  absl::Span<const TokenLogprob> top;  // most likely first; valid during the call only
  bool stop = false;                   // the end or stop token that ends the request: in the ids, not in the text
};

enum class FinishReason {
  kLength,     // max_new_tokens
  kTime,       // Request::stop_at passed
  kEos,        // one of the model's end tokens
  kStopToken,  // one of stop_token_ids
  kSink,       // the sink returned false
  kCancelled,  // Cancel()
  kDeadline,   // Request::deadline passed
  kShutdown,   // the engine was stopped before the request was done
  kError,      // see Finish::status
};

struct Finish {
  FinishReason reason = FinishReason::kError;
  absl::Status status;  // for kError: DATA_LOSS when the row's logits were not finite
  int32_t prompt_tokens = 0;
  int32_t generated_tokens = 0;
  int32_t stop_token_id = -1;        // for kEos and kStopToken
  int32_t cached_prompt_tokens = 0;  // whose keys and values were there already
  int64_t saturated_kv_values = 0;   // keys and values, of prompt and output, beyond the range of the cache's type
  SparsityReport sparsity;
  SpeculationReport speculation;
  SteadyTime queued, scheduled, first_token, finished;  // first_token is `finished` when there was none
};

// Hears one request's tokens. All calls come from the engine thread, in order, and must neither block nor take long.
class TokenSink {
 public:
  virtual ~TokenSink() = default;

  // A new token. False ends the request with FinishReason::kSink, which OnFinish then reports.
  virtual bool OnToken(const Token& token) = 0;

  // `score` only, once per prompt position, in order, before the first OnToken. The token's own log-probability given
  // what stands before it (absent for the first) and the alternatives of the distribution *after* it.
  virtual bool OnPromptToken(const Token& token) = 0;

  // The last call, exactly once, for every request that Submit accepted.
  virtual void OnFinish(const Finish& finish) = 0;
};

}  // namespace dejavu

#endif  // ENGINE_REQUEST_H_
