// Workload: what request number i is. The same seed and number give the same request, whatever order they are made in.
// Immutable; any thread.
#ifndef LOADTEST_GENERATOR_WORKLOAD_H_
#define LOADTEST_GENERATOR_WORKLOAD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "dejavu/v1/generation.pb.h"
#include "loadtest/generator/distribution.h"
#include "loadtest/generator/options.h"
#include "loadtest/generator/prompts.h"
#include "loadtest/generator/replay.h"

namespace dejavu {

// What a request does besides being answered. Only normal ones count in latencies and goodput.
enum class RequestKind : uint8_t { kNormal, kCancelled, kSlowReader, kBad };
const char* Name(RequestKind kind);

struct PlannedRequest {
  v1::GenerateRequest message;
  std::string tenant;
  RequestKind kind = RequestKind::kNormal;
};

class Workload {
 public:
  // INVALID_ARGUMENT names the flag. `model` gives vocabulary and context.
  static absl::StatusOr<Workload> Create(const RunOptions& options, const v1::GetModelInfoResponse& model,
                                         Prompts prompts, std::vector<ReplayedRequest> replay);

  // Requests of different phases (warm-up, steps of a ramp) have different prompts. With a replay `index` is below its
  // length.
  PlannedRequest Make(uint32_t phase, int64_t index) const;
  const std::vector<ReplayedRequest>& replay() const { return replay_; }

 private:
  Workload(Prompts prompts, LengthDistribution prompt_tokens, LengthDistribution output_tokens)
      : prompts_(std::move(prompts)), prompt_tokens_(prompt_tokens), output_tokens_(output_tokens) {}

  RequestKind DrawKind(std::mt19937_64* random) const;
  void Spoil(std::mt19937_64* random, v1::GenerateRequest* message) const;

  Prompts prompts_;
  LengthDistribution prompt_tokens_, output_tokens_;
  std::vector<ReplayedRequest> replay_;
  std::optional<Mix> tiers_, urgencies_, priorities_, tenants_;
  std::string model_;
  uint64_t seed_ = 0;
  uint32_t vocabulary_ = 0;
  int32_t context_ = 0;
  bool ignore_eos_ = true, prefix_cache_ = false;
  double temperature_ = 0.0;
  double cancel_share_ = 0.0, slow_reader_share_ = 0.0, bad_share_ = 0.0;
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_WORKLOAD_H_
