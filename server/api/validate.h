// Validation: every field of a request is held against its range before the engine sees anything. Pure functions; any
// thread. Errors name the field, the value and the limit (InvalidField), or are NOT_FOUND for another model's name and
// FAILED_PRECONDITION for text where no tokenizer is loaded and for tiers that the loaded predictor cannot serve.
#ifndef SERVER_API_VALIDATE_H_
#define SERVER_API_VALIDATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "dejavu/v1/generation.pb.h"
#include "engine/request.h"
#include "server/api/served_model.h"
#include "server/options.h"

namespace dejavu {

// Replies beyond it are refused: gRPC clients read 4 MiB by default.
inline constexpr int64_t kMaxReplyBytes = 3'500'000;

// Of one Score.
inline constexpr int kMaxScorePrompts = 64;

// A request for the engine, and what the server keeps to itself. The deadline is left to the caller.
struct CheckedGenerate {
  Request request;
  std::vector<std::string> stop_strings;
  std::vector<int32_t> special_stops;  // [stop_strings]: the special token that it is, or -1
  bool include_stop_string = false;
  int samples = 1;
  bool echo = false;  // of the prompt
};

// `drawn_seed` is taken when the request has none. `streaming`: the output may have any size in all.
absl::StatusOr<CheckedGenerate> CheckGenerate(const v1::GenerateRequest& request, const ServerOptions& options,
                                              const ServedModel& model, uint64_t drawn_seed, bool streaming);

// Of `prompts` in their order, else of the one prompt.
absl::StatusOr<std::vector<Request>> CheckScore(const v1::ScoreRequest& request, const ServerOptions& options,
                                                const ServedModel& model);

absl::StatusOr<std::vector<int32_t>> CheckTokenize(const v1::TokenizeRequest& request, const ServedModel& model);
absl::StatusOr<std::string> CheckDetokenize(const v1::DetokenizeRequest& request, const ServedModel& model);

// What the metadata `x-tenant` says, nothing if empty: at most 64 of [A-Za-z0-9._-].
absl::StatusOr<std::string> CheckTenant(const std::string& tenant);

// The tier that a request which wants `wanted` gets; of TIER_UNSPECIFIED the default of `options`.
absl::StatusOr<Tier> CheckTier(v1::Tier wanted, const ServerOptions& options, const ServedModel& model);

absl::Status CheckModelName(const std::string& name, const ServedModel& model);
// At most 128 of [A-Za-z0-9._:-]; empty is fine.
absl::Status CheckRequestId(const std::string& request_id);

}  // namespace dejavu

#endif  // SERVER_API_VALIDATE_H_
