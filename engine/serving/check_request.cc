#include "engine/serving/check_request.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::Status CheckRequest(const Request& r, const ModelShape& shape) {
  const auto check_id = [&](const char* what, int32_t id) {
    if (0 <= id && id < shape.vocab) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(what, " has id ", id, "; ids go from 0 to ", shape.vocab - 1));
  };
  const auto check_top = [&](const char* what, int32_t count) {
    if (0 <= count && count <= shape.vocab) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(what, " is ", count, "; it must be in 0 ... ", shape.vocab));
  };
  if (r.prompt.empty()) return absl::InvalidArgumentError("the prompt is empty; it needs at least one token");
  for (int32_t id : r.prompt) RETURN_IF_ERROR(check_id("the prompt", id));
  for (int32_t id : r.stop_token_ids) RETURN_IF_ERROR(check_id("stop_token_ids", id));
  for (int32_t id : r.sampling.allowed_token_ids) RETURN_IF_ERROR(check_id("allowed_token_ids", id));
  for (const auto& bias : r.sampling.logit_bias) RETURN_IF_ERROR(check_id("logit_bias", bias.first));
  if (r.max_new_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_new_tokens is ", r.max_new_tokens, "; it must be at least 0"));
  }
  RETURN_IF_ERROR(check_top("top_logprobs", r.top_logprobs));
  RETURN_IF_ERROR(check_top("score_top_logprobs", r.score_top_logprobs));
  if (r.speculation.most_tokens < 1 || r.speculation.most_tokens > kMostDraftTokens) {
    return absl::InvalidArgumentError(absl::StrCat("speculation.most_tokens is ", r.speculation.most_tokens,
                                                   "; it must be in 1 ... ", kMostDraftTokens));
  }
  if (MaxPositions(r) > shape.context) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", r.prompt.size(), " tokens and max_new_tokens is ",
                                                   r.max_new_tokens, "; the model's context has ", shape.context,
                                                   ", of which the last token takes none"));
  }
  return absl::OkStatus();
}

absl::Status CheckTier(Tier tier, const PredictorInfo& predictor) {
  const std::vector<Tier>& tiers = predictor.tiers;
  if (!IsPredicted(tier) || std::find(tiers.begin(), tiers.end(), tier) != tiers.end()) return absl::OkStatus();
  if (predictor.path.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("tier ", Name(tier), " needs a predictor, and none is loaded (see dejavu-calibrate)"));
  }
  // Clients hear this: where the file lies is not their affair.
  return absl::FailedPreconditionError(
      absl::StrCat("the loaded predictor has no operating point for tier ", Name(tier)));
}

}  // namespace dejavu
