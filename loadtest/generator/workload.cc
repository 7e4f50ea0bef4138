#include "loadtest/generator/workload.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "loadtest/client/names.h"

namespace dejavu {
namespace {

absl::Status At(const char* flag, const absl::Status& status) {
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", status.message()));
}

// `known` says whether a name of the mix means something.
template <typename Known>
absl::Status ParseMix(const char* flag, const std::string& text, const Known& known, std::optional<Mix>* mix) {
  if (text.empty()) return absl::OkStatus();
  auto parsed = Mix::Parse(text);
  if (!parsed.ok()) return At(flag, parsed.status());
  for (const auto& [name, share] : parsed->shares()) {
    if (!known(name)) return absl::InvalidArgumentError(absl::StrCat(flag, ": no such value: '", name, "'"));
  }
  *mix = *std::move(parsed);
  return absl::OkStatus();
}

// SplitMix64's last step: neighbouring numbers give unrelated ones.
uint64_t Scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

const char* Name(RequestKind kind) {
  switch (kind) {
    case RequestKind::kNormal:
      return "normal";
    case RequestKind::kCancelled:
      return "cancelled";
    case RequestKind::kSlowReader:
      return "slow_reader";
    case RequestKind::kBad:
      return "bad";
  }
  return "normal";
}

absl::StatusOr<Workload> Workload::Create(const RunOptions& options, const v1::GetModelInfoResponse& model,
                                          Prompts prompts, std::vector<ReplayedRequest> replay) {
  auto prompt_tokens = LengthDistribution::Parse(options.prompt_tokens);
  if (!prompt_tokens.ok()) return At("--prompt-tokens", prompt_tokens.status());
  auto output_tokens = LengthDistribution::Parse(options.output_tokens);
  if (!output_tokens.ok()) return At("--output-tokens", output_tokens.status());
  Workload w(std::move(prompts), *prompt_tokens, *output_tokens);
  w.context_ = static_cast<int32_t>(model.context_tokens());
  if (replay.empty() && prompt_tokens->most() + output_tokens->most() > w.context_) {
    return absl::InvalidArgumentError(absl::StrCat("--prompt-tokens of up to ", prompt_tokens->most(),
                                                   " and --output-tokens of up to ", output_tokens->most(),
                                                   " are more than the model's context of ", w.context_));
  }
  for (size_t i = 0; i < replay.size(); ++i) {
    if (replay[i].prompt_tokens + replay[i].max_new_tokens > w.context_) {
      return absl::InvalidArgumentError(absl::StrCat("--replay: request ", i + 1, " has ", replay[i].prompt_tokens,
                                                     " + ", replay[i].max_new_tokens,
                                                     " tokens; the model's context is ", w.context_));
    }
  }
  RETURN_IF_ERROR(ParseMix("--tier", options.tier, TierOf, &w.tiers_));
  RETURN_IF_ERROR(ParseMix("--urgency", options.urgency, UrgencyOf, &w.urgencies_));
  RETURN_IF_ERROR(ParseMix(
      "--tenant", options.tenant, [](const std::string&) { return true; }, &w.tenants_));
  const auto is_priority = [](const std::string& name) {
    int value = 0;
    return absl::SimpleAtoi(name, &value) && value >= -100 && value <= 100;
  };
  RETURN_IF_ERROR(ParseMix("--priority", options.priority, is_priority, &w.priorities_));
  if (options.cancel_share + options.slow_reader_share + options.bad_share > 1.0) {
    return absl::InvalidArgumentError("--cancel-share, --slow-reader-share and --bad-share are more than 1 together");
  }
  w.replay_ = std::move(replay);
  w.model_ = options.model;
  w.seed_ = options.seed;
  w.vocabulary_ = model.vocabulary_size();
  w.ignore_eos_ = !options.natural_eos;
  w.prefix_cache_ = options.prefix_cache;
  w.temperature_ = options.temperature;
  w.cancel_share_ = options.cancel_share;
  w.slow_reader_share_ = options.slow_reader_share;
  w.bad_share_ = options.bad_share;
  return w;
}

RequestKind Workload::DrawKind(std::mt19937_64* random) const {
  double at = std::uniform_real_distribution<double>(0.0, 1.0)(*random);
  if ((at -= cancel_share_) < 0.0) return RequestKind::kCancelled;
  if ((at -= slow_reader_share_) < 0.0) return RequestKind::kSlowReader;
  if ((at -= bad_share_) < 0.0) return RequestKind::kBad;
  return RequestKind::kNormal;
}

// In one of the ways in which a client may be wrong; each must be INVALID_ARGUMENT.
void Workload::Spoil(std::mt19937_64* random, v1::GenerateRequest* message) const {
  switch (std::uniform_int_distribution<int>(0, 3)(*random)) {
    case 0:
      message->mutable_token_ids()->add_ids(vocabulary_);
      break;
    case 1:
      message->mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(context_));
      break;
    case 2:
      message->mutable_sampling()->set_temperature(-1.0f);
      break;
    default:
      message->mutable_token_ids()->clear_ids();
      break;
  }
}

PlannedRequest Workload::Make(uint32_t phase, int64_t index) const {
  const uint64_t number = (static_cast<uint64_t>(phase) << 40) + static_cast<uint64_t>(index);
  std::mt19937_64 random(Scrambled(seed_ + Scrambled(number + 0x9E3779B97F4A7C15u)));
  PlannedRequest planned;
  v1::GenerateRequest& message = planned.message;
  planned.kind = DrawKind(&random);
  message.set_model(model_);
  int32_t prompt_tokens = prompt_tokens_.Draw(&random), output_tokens = output_tokens_.Draw(&random);
  const std::string tier = tiers_ ? tiers_->Draw(&random) : "", urgency = urgencies_ ? urgencies_->Draw(&random) : "";
  if (tenants_) planned.tenant = tenants_->Draw(&random);
  if (priorities_) {
    int priority = 0;
    (void)absl::SimpleAtoi(priorities_->Draw(&random), &priority);  // checked by Create
    message.mutable_scheduling()->set_priority(priority);
  }
  std::optional<v1::Tier> chosen_tier = TierOf(tier);
  std::optional<v1::Urgency> chosen_urgency = UrgencyOf(urgency);
  uint64_t seed = random();
  if (!replay_.empty()) {
    const ReplayedRequest& replayed = replay_[index];
    prompt_tokens = replayed.prompt_tokens;
    output_tokens = replayed.max_new_tokens;
    seed = replayed.seed.value_or(seed);
    if (!replayed.tier.empty()) chosen_tier = TierOf(replayed.tier);
    if (!replayed.urgency.empty()) chosen_urgency = UrgencyOf(replayed.urgency);
    if (!replayed.tenant.empty()) planned.tenant = replayed.tenant;
  }
  prompts_.Fill(prompt_tokens, &random, &message);
  message.mutable_sampling()->set_temperature(static_cast<float>(temperature_));
  message.mutable_sampling()->set_seed(seed);
  message.mutable_stopping()->set_max_new_tokens(static_cast<uint32_t>(output_tokens));
  message.mutable_stopping()->set_ignore_eos(ignore_eos_);
  if (chosen_tier) message.mutable_sparsity()->set_tier(*chosen_tier);
  if (chosen_urgency) message.mutable_scheduling()->set_urgency(*chosen_urgency);
  if (!prefix_cache_) message.mutable_scheduling()->set_prefix_cache(false);
  if (planned.kind == RequestKind::kBad) Spoil(&random, &message);
  return planned;
}

}  // namespace dejavu
