// HandOut: from a step's results to the tokens that its sequences get. It chooses tokens where the device has not,
// tells the sinks, and says whose text ends. Engine thread.
#ifndef ENGINE_SERVING_HAND_OUT_H_
#define ENGINE_SERVING_HAND_OUT_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "engine/model_shape.h"
#include "engine/request.h"
#include "engine/scheduling/sequence.h"
#include "engine/serving/recorder.h"
#include "engine/serving/sampler.h"
#include "kernels/base/clock.h"

namespace dejavu {

// Why a sequence ends.
struct Ending {
  FinishReason reason = FinishReason::kError;
  absl::Status status;  // for kError
};

struct StepResults {
  const float* logits = nullptr;     // [logit rows, vocab] where it has not, or keeps them
  const int32_t* drawn = nullptr;    // [logit rows] where the device has chosen the tokens; else nullptr
  const int32_t* details = nullptr;  // [logit rows, detail_fields] of those
  int32_t detail_fields = 0;
  int64_t step = 0;  // its number
  SteadyTime done;   // when they had come
};

class HandOut {
 public:
  // `candidates`: ids below may be chosen. `slots`: sequences that run at once. `recorder` must outlive the object.
  HandOut(const ModelShape& shape, int32_t candidates, int32_t slots, Recorder& recorder);

  // `s` has got its slot.
  void Begin(const Sequence& s);

  // The tokens that `s` has so far.
  TokenCounts& counts(const Sequence& s) { return counts_[s.slot]; }

  // Gives `s` what its rows of the step have brought, of a check the tokens that hold, or keeps the next draft;
  // nothing, or why it ends by that.
  std::optional<Ending> Give(Sequence& s, const StepResults& results);

 private:
  std::optional<Ending> GiveScores(Sequence& s, const StepResults& results);
  std::optional<Ending> GiveTokens(Sequence& s, const StepResults& results);
  std::optional<Ending> GiveToken(Sequence& s, int32_t row, bool first, const StepResults& results, bool* more);
  void KeepDraft(Sequence& s, const StepResults& results);
  Sampler::Choice Choose(const Sequence& s, int32_t row, int32_t generated, bool logprobs, const StepResults& results);
  absl::Span<const TokenLogprob> Top(const Sequence& s, int32_t row, const StepResults& results);
  std::optional<FinishReason> StopAt(const Request& request, int32_t id) const;

  const ModelShape shape_;
  Recorder& recorder_;
  Sampler sampler_;
  std::vector<TokenCounts> counts_;  // [slots]
  std::vector<int32_t> banned_;      // scratch, as the next one
  std::vector<TokenLogprob> top_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_HAND_OUT_H_
