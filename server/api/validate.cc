#include "server/api/validate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "server/api/sparsity_messages.h"
#include "server/api/speculation_messages.h"
#include "server/rpc/error_details.h"
#include "server/security/tokens.h"

namespace dejavu {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr int64_t kLogprobEntryBytes = 12;  // one TokenLogprob or the fixed part of a token on the wire, rounded up

constexpr float kMostTime = 1e6f;  // seconds or milliseconds

struct Range {
  float low;
  float high;
  bool open_low = false;  // `low` itself is outside
};

// The value, finite and inside; -0 becomes 0, as do subnormals where 0 is allowed.
absl::StatusOr<float> CheckFloat(absl::string_view field, float value, Range range) {
  const bool inside =
      std::isfinite(value) && (range.open_low ? value > range.low : value >= range.low) && value <= range.high;
  if (!inside) {
    return InvalidField(field, absl::StrFormat("is %.9g; it must be finite and in %c%g, %g]", value,
                                               range.open_low ? '(' : '[', range.low, range.high));
  }
  if (std::abs(value) < std::numeric_limits<float>::min()) {
    return range.open_low ? std::numeric_limits<float>::min() : 0.0f;
  }
  return value;
}

absl::Status CheckAtMost(absl::string_view field, uint64_t value, uint64_t limit) {
  if (value <= limit) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", value, "; at most ", limit, " is allowed"));
}

absl::Status CheckCount(absl::string_view field, size_t count, size_t limit) {
  if (count <= limit) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", count, " entries; at most ", limit, " are allowed"));
}

absl::Status CheckTokenId(absl::string_view field, uint64_t id, const ServedModel& model) {
  if (id < static_cast<uint64_t>(model.vocab)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("is ", id, "; ids of this model are below ", model.vocab));
}

absl::StatusOr<std::vector<int32_t>> CheckTokenIds(absl::string_view field,
                                                   const google::protobuf::RepeatedField<uint32_t>& ids,
                                                   const ServedModel& model) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= static_cast<uint32_t>(model.vocab)) {
      return CheckTokenId(absl::StrCat(field, "[", i, "]"), ids[i], model);
    }
  }
  return std::vector<int32_t>(ids.begin(), ids.end());
}

absl::Status CheckTokenizer(absl::string_view what, const ServedModel& model) {
  if (model.tokenizer != nullptr) return absl::OkStatus();
  if (model.engine != nullptr && !model.engine->synthetic().empty()) {
    return MissingFeature("tokenizer", absl::StrCat(what, " needs a tokenizer; model ", Printable(model.name),
                                                    " is synthetic and takes token ids only"));
  }
  return MissingFeature("tokenizer", absl::StrCat(what, " needs a tokenizer, and the directory of model ",
                                                  Printable(model.name), " holds none: give token ids"));
}

// What no tokenisation could make short enough is refused before it costs anything.
absl::Status CheckTextCanFit(const std::string& field, absl::string_view text, const ServedModel& model) {
  const size_t most = model.tokenizer->longest_token_bytes() * static_cast<size_t>(model.context);
  if (text.size() <= most) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", text.size(), " bytes; no text of more than ", most,
                                          " bytes fits the model's context of ", model.context, " tokens"));
}

// A tokenizer may put nothing around a prompt, and may know tokens that the model does not (the log says so at start).
absl::Status CheckEncoded(const std::string& field, const std::vector<int32_t>& ids, const ServedModel& model) {
  if (ids.empty()) {
    return InvalidField(field, "is empty, and the model's tokenizer puts nothing before a prompt; give a character");
  }
  const auto unknown = std::find_if(ids.begin(), ids.end(), [&](int32_t id) { return id >= model.vocab; });
  if (unknown == ids.end()) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("holds ", Printable(std::string(model.tokenizer->Piece(*unknown))),
                                          ", which has id ", *unknown, "; ids of this model are below ", model.vocab));
}

// So many of a prompt's last tokens are kept; nothing where it is to be whole. `new_tokens` may follow it.
template <typename ProtoRequest>
absl::StatusOr<std::optional<int64_t>> CheckTruncation(const ProtoRequest& request, int64_t new_tokens,
                                                       const ServedModel& model) {
  if (!request.has_truncate_prompt_tokens()) return std::nullopt;
  const int64_t most = request.truncate_prompt_tokens();
  if (most == -1) return std::max<int64_t>(1, model.context - std::max<int64_t>(0, new_tokens - 1));
  if (1 <= most && most <= model.context) return most;
  return InvalidField("truncate_prompt_tokens", absl::StrCat("is ", most, "; it must be -1, or 1 ... ", model.context));
}

// What a prompt is taken as.
struct PromptRules {
  std::string prefix;           // of its fields, in errors: "prompts[3]."
  bool parse_special = false;   // special tokens that are written out
  std::optional<int64_t> most;  // so many last tokens are kept
};

// 1 ... context ids.
template <typename Prompt>
absl::StatusOr<std::vector<int32_t>> CheckPrompt(const Prompt& prompt, const PromptRules& rules,
                                                 const ServedModel& model) {
  std::vector<int32_t> ids;
  std::string field = rules.prefix + "token_ids";
  switch (prompt.prompt_case()) {
    case Prompt::kText:
      field = rules.prefix + "text";
      RETURN_IF_ERROR(CheckTokenizer("a prompt in text", model));
      if (!rules.most.has_value()) RETURN_IF_ERROR(CheckTextCanFit(field, prompt.text(), model));
      ids = model.tokenizer->EncodePrompt(prompt.text(), rules.parse_special);
      RETURN_IF_ERROR(CheckEncoded(field, ids, model));
      break;
    case Prompt::kTokenIds: {
      if (prompt.token_ids().ids().empty()) {
        return InvalidField(field + ".ids", "is empty; a prompt needs at least one token");
      }
      ASSIGN_OR_RETURN(ids, CheckTokenIds(field + ".ids", prompt.token_ids().ids(), model));
      break;
    }
    case Prompt::PROMPT_NOT_SET:
      return InvalidField(rules.prefix.empty() ? "prompt" : rules.prefix.substr(0, rules.prefix.size() - 1),
                          "is missing; give text or token_ids");
  }
  if (rules.most.has_value() && *rules.most < static_cast<int64_t>(ids.size())) {
    ids.erase(ids.begin(), ids.end() - *rules.most);
  }
  if (ids.size() > static_cast<size_t>(model.context)) {
    return InvalidField(field, absl::StrCat("has ", ids.size(), " tokens; the model allows ", model.context));
  }
  return ids;
}

int64_t LogprobBytes(int64_t tokens, int64_t top_logprobs) { return tokens * (top_logprobs + 1) * kLogprobEntryBytes; }

// `beside`: bytes that the reply has anyway.
absl::Status CheckReplySize(absl::string_view field, int64_t tokens, int64_t top_logprobs, int64_t beside = 0) {
  const int64_t bytes = LogprobBytes(tokens, top_logprobs) + beside;
  if (bytes <= kMaxReplyBytes) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat("is ", top_logprobs, ", which with ", tokens, " tokens makes a reply of about ", bytes,
                          " bytes; at most ", kMaxReplyBytes, " can be sent"));
}

absl::Status CheckSampling(const v1::Sampling& sampling, const ServedModel& model, uint64_t drawn_seed,
                           SamplingParams* params) {
  ASSIGN_OR_RETURN(params->temperature, CheckFloat("sampling.temperature", sampling.temperature(), {0, 100}));
  // More than the vocabulary is as good as all.
  params->top_k = static_cast<int32_t>(std::min<uint32_t>(sampling.top_k(), static_cast<uint32_t>(model.vocab)));
  if (sampling.has_top_p()) {
    ASSIGN_OR_RETURN(params->top_p, CheckFloat("sampling.top_p", sampling.top_p(), {0, 1, /*open_low=*/true}));
  }
  ASSIGN_OR_RETURN(params->min_p, CheckFloat("sampling.min_p", sampling.min_p(), {0, 1}));
  params->seed = sampling.has_seed() ? sampling.seed() : drawn_seed;
  return absl::OkStatus();
}

absl::Status CheckPenalties(const v1::Penalties& penalties, const ServerOptions& options, const ServedModel& model,
                            SamplingParams* params) {
  if (penalties.has_repetition()) {
    ASSIGN_OR_RETURN(params->repetition_penalty,
                     CheckFloat("penalties.repetition", penalties.repetition(), {0, 100, /*open_low=*/true}));
  }
  ASSIGN_OR_RETURN(params->presence_penalty, CheckFloat("penalties.presence", penalties.presence(), {-100, 100}));
  ASSIGN_OR_RETURN(params->frequency_penalty, CheckFloat("penalties.frequency", penalties.frequency(), {-100, 100}));

  RETURN_IF_ERROR(CheckCount("penalties.logit_bias", penalties.logit_bias().size(), options.max_logit_bias));
  for (const auto& [id, bias] : penalties.logit_bias()) {
    const std::string field = absl::StrCat("penalties.logit_bias[", id, "]");
    if (id >= static_cast<uint32_t>(model.vocab)) return CheckTokenId(field, id, model);
    ASSIGN_OR_RETURN(const float checked, CheckFloat(field, bias, {-100, 100}));
    params->logit_bias.emplace_back(static_cast<int32_t>(id), checked);
  }
  std::sort(params->logit_bias.begin(), params->logit_bias.end());  // maps have no order; the engine shall see one

  std::vector<int32_t>& allowed = params->allowed_token_ids;
  ASSIGN_OR_RETURN(allowed, CheckTokenIds("penalties.allowed_token_ids", penalties.allowed_token_ids(), model));
  std::sort(allowed.begin(), allowed.end());
  allowed.erase(std::unique(allowed.begin(), allowed.end()), allowed.end());
  if (model.tokenizer == nullptr) return absl::OkStatus();
  params->unused_ids = model.tokenizer->unused_ids();
  params->unused_ids.remove_suffix(params->unused_ids.end() -
                                   std::lower_bound(params->unused_ids.begin(), params->unused_ids.end(), model.vocab));
  const auto is_token = [&](int32_t id) { return !model.tokenizer->Piece(id).empty(); };
  if (!allowed.empty() && std::none_of(allowed.begin(), allowed.end(), is_token)) {
    return InvalidField("penalties.allowed_token_ids",
                        absl::StrCat("leaves nothing to sample: its smallest id is ", allowed.front(),
                                     "; the tokenizer knows ids below ", model.tokenizer->vocab_size(),
                                     model.tokenizer->unused_ids().empty() ? "" : ", and not all of these"));
  }
  return absl::OkStatus();
}

absl::Status CheckSparsity(const v1::Sparsity& sparsity, const ServerOptions& options, const ServedModel& model,
                           SparsityParams* params) {
  params->deterministic = sparsity.deterministic();
  params->shadow_every = options.shadow_every;
  if (sparsity.has_shadow_every()) {
    const uint32_t every = sparsity.shadow_every();
    if (every != 0 && (every < static_cast<uint32_t>(options.min_shadow_every) || every > kMaxShadowEvery)) {
      return InvalidField("sparsity.shadow_every", absl::StrCat("is ", every, "; it must be 0, or ",
                                                                options.min_shadow_every, " to ", kMaxShadowEvery));
    }
    params->shadow_every = static_cast<int32_t>(every);
  }
  ASSIGN_OR_RETURN(params->tier, CheckTier(sparsity.tier(), options, model));
  return absl::OkStatus();
}

// What the request does not say is the server's default. A default tier that is not there drafts nothing.
absl::Status CheckSpeculation(const v1::Speculation& asked, const ServerOptions& options, const ServedModel& model,
                              SpeculationParams* params) {
  const SpeculationParams defaults = DefaultSpeculation(options, model.engine);
  *params = defaults;
  if (asked.mode() != v1::SPECULATION_MODE_UNSPECIFIED) {
    const std::optional<SpeculationMode> mode = FromMessage(asked.mode());
    if (!mode.has_value()) {
      return InvalidField("speculation.mode", absl::StrCat("is ", static_cast<int>(asked.mode()), "; it must be 0 to ",
                                                           static_cast<int>(v1::SpeculationMode_MAX)));
    }
    if (*mode == SpeculationMode::kAlways && !options.speculation_allow_always) {
      return InvalidField("speculation.mode", "is ALWAYS; this server allows OFF and AUTO");
    }
    params->mode = *mode;
  }
  if (asked.draft_tier() != v1::TIER_UNSPECIFIED) {
    const std::optional<Tier> tier = FromMessage(asked.draft_tier());
    if (!tier.has_value() || !IsPredicted(*tier)) {
      return InvalidField("speculation.draft_tier", absl::StrCat("is ", static_cast<int>(asked.draft_tier()),
                                                                 "; it must be HIGH (3), BALANCED (4) or FAST (5)"));
    }
    const absl::Status servable = model.engine->CheckTier(*tier);
    if (!servable.ok()) return MissingFeature("predictor", servable.message());
    params->draft_tier = *tier;
  }
  if (asked.has_lookup()) params->lookup = asked.lookup();
  if (asked.has_most_tokens()) {
    if (asked.most_tokens() < 1 || asked.most_tokens() > static_cast<uint32_t>(kMostDraftTokens)) {
      return InvalidField("speculation.most_tokens",
                          absl::StrCat("is ", asked.most_tokens(), "; it must be in 1 ... ", kMostDraftTokens));
    }
    params->most_tokens = static_cast<int32_t>(asked.most_tokens());
  }
  return absl::OkStatus();
}

absl::Status CheckStopStrings(const v1::Stopping& stopping, const ServerOptions& options, const ServedModel& model) {
  if (stopping.stop_strings().empty()) return absl::OkStatus();
  RETURN_IF_ERROR(CheckTokenizer("stopping.stop_strings", model));
  RETURN_IF_ERROR(CheckCount("stopping.stop_strings", stopping.stop_strings_size(), options.max_stop_strings));
  for (int i = 0; i < stopping.stop_strings_size(); ++i) {
    const std::string& stop = stopping.stop_strings(i);
    const std::string field = absl::StrCat("stopping.stop_strings[", i, "]");
    if (stop.empty()) return InvalidField(field, "is empty; it would stop everything at once");
    if (stop.size() > static_cast<size_t>(options.max_stop_string_bytes)) {
      return InvalidField(
          field, absl::StrCat("has ", stop.size(), " bytes; at most ", options.max_stop_string_bytes, " are allowed"));
    }
  }
  return absl::OkStatus();
}

// Needs request->prompt.
absl::Status CheckScheduling(const v1::Scheduling& scheduling, Request* request) {
  constexpr int32_t kMostPriority = 100;
  constexpr size_t kMostSaltBytes = 128;
  switch (scheduling.urgency()) {
    case v1::URGENCY_UNSPECIFIED:
    case v1::URGENCY_NORMAL:
      request->urgency = Urgency::kNormal;
      break;
    case v1::URGENCY_INTERACTIVE:
      request->urgency = Urgency::kInteractive;
      break;
    case v1::URGENCY_BATCH:
      request->urgency = Urgency::kBatch;
      break;
    default:
      return InvalidField("scheduling.urgency", absl::StrCat("is ", static_cast<int>(scheduling.urgency()),
                                                             "; it must be INTERACTIVE (1), NORMAL (2) or BATCH (3)"));
  }
  if (scheduling.priority() < -kMostPriority || scheduling.priority() > kMostPriority) {
    return InvalidField("scheduling.priority", absl::StrCat("is ", scheduling.priority(), "; it must be in -",
                                                            kMostPriority, " ... ", kMostPriority));
  }
  request->priority = scheduling.priority();
  if (scheduling.has_inter_token_target_ms()) {
    ASSIGN_OR_RETURN(request->inter_token_target_ms,
                     CheckFloat("scheduling.inter_token_target_ms", scheduling.inter_token_target_ms(),
                                {0, kMostTime, /*open_low=*/true}));
  }
  if (scheduling.has_prefix_cache()) request->prefix_cache = scheduling.prefix_cache();
  if (scheduling.cache_salt().size() > kMostSaltBytes) {
    return InvalidField("scheduling.cache_salt",
                        absl::StrCat("has ", scheduling.cache_salt().size(), " bytes; the limit is ", kMostSaltBytes));
  }
  request->cache_salt = scheduling.cache_salt();
  return absl::OkStatus();
}

absl::Status CheckOutput(const v1::Output& output, const ServerOptions& options, CheckedGenerate* checked) {
  Request& request = checked->request;
  RETURN_IF_ERROR(CheckAtMost("output.top_logprobs", output.top_logprobs(), options.max_top_logprobs));
  RETURN_IF_ERROR(CheckAtMost("output.prompt_top_logprobs", output.prompt_top_logprobs(), options.max_top_logprobs));
  request.top_logprobs = static_cast<int32_t>(output.top_logprobs());
  request.logprobs = output.logprobs() || request.top_logprobs > 0;
  request.score_top_logprobs = static_cast<int32_t>(output.prompt_top_logprobs());
  request.score = output.prompt_logprobs() || request.score_top_logprobs > 0;
  checked->echo = output.echo();
  return absl::OkStatus();
}

// A stream's prompt may be told at once, its output is not.
absl::Status CheckLogprobs(const CheckedGenerate& checked, bool streaming) {
  const Request& request = checked.request;
  int64_t bytes = 0;
  if (request.logprobs && !streaming) {
    const int64_t tokens = int64_t{checked.samples} * request.max_new_tokens;
    RETURN_IF_ERROR(CheckReplySize("output.top_logprobs", tokens, request.top_logprobs));
    bytes = LogprobBytes(tokens, request.top_logprobs);
  }
  if (!request.score) return absl::OkStatus();
  return CheckReplySize("output.prompt_top_logprobs", static_cast<int64_t>(request.prompt.size()),
                        request.score_top_logprobs, bytes);
}

absl::Status CheckStopping(const v1::Stopping& stopping, const ServerOptions& options, const ServedModel& model,
                           CheckedGenerate* checked) {
  Request& request = checked->request;
  if (stopping.has_max_time_s()) {
    ASSIGN_OR_RETURN(const float seconds,
                     CheckFloat("stopping.max_time_s", stopping.max_time_s(), {0, kMostTime, /*open_low=*/true}));
    request.stop_at = std::chrono::steady_clock::now() + Lasting(seconds);
  }
  const int64_t prompt_tokens = static_cast<int64_t>(request.prompt.size());
  const int64_t room = model.context - prompt_tokens + 1;  // the last token is never read
  int64_t max_new_tokens = std::min<int64_t>(options.default_max_new_tokens, room);
  if (stopping.has_max_new_tokens()) {
    max_new_tokens = stopping.max_new_tokens();
    if (max_new_tokens == 0 && !checked->echo && !request.score) {
      return InvalidField("stopping.max_new_tokens",
                          "is 0; at least 1 is needed where neither the prompt's echo nor its log-probabilities are "
                          "asked for");
    }
    if (max_new_tokens == 0 && checked->samples > 1) {
      return InvalidField("sampling.samples",
                          absl::StrCat("is ", checked->samples, "; a prompt without an output has one"));
    }
    if (max_new_tokens > room) {
      return InvalidField("stopping.max_new_tokens",
                          absl::StrCat("is ", max_new_tokens, " after a prompt of ", prompt_tokens,
                                       " tokens; the model's context of ", model.context, " leaves ", room));
    }
  }
  if (stopping.min_new_tokens() > max_new_tokens) {
    return InvalidField("stopping.min_new_tokens",
                        absl::StrCat("is ", stopping.min_new_tokens(), "; max_new_tokens is ", max_new_tokens));
  }
  request.max_new_tokens = static_cast<int32_t>(max_new_tokens);
  request.min_new_tokens = static_cast<int32_t>(stopping.min_new_tokens());
  request.ignore_eos = stopping.ignore_eos();

  RETURN_IF_ERROR(CheckCount("stopping.stop_token_ids", stopping.stop_token_ids_size(), options.max_stop_token_ids));
  ASSIGN_OR_RETURN(request.stop_token_ids, CheckTokenIds("stopping.stop_token_ids", stopping.stop_token_ids(), model));
  RETURN_IF_ERROR(CheckStopStrings(stopping, options, model));
  for (const std::string& stop : stopping.stop_strings()) {
    checked->stop_strings.push_back(stop);
    // The output's text has no special tokens, so that this one could not be found there.
    const int32_t id = model.tokenizer->SpecialId(stop);
    checked->special_stops.push_back(id < model.vocab ? id : -1);
    if (checked->special_stops.back() >= 0) request.stop_token_ids.push_back(id);
  }
  checked->include_stop_string = stopping.include_stop_string();
  return absl::OkStatus();
}

}  // namespace

// Never another tier than the one that was asked for.
absl::StatusOr<Tier> CheckTier(v1::Tier wanted, const ServerOptions& options, const ServedModel& model) {
  const std::optional<Tier> known = FromMessage(wanted);
  if (!known.has_value() && wanted != v1::TIER_UNSPECIFIED) {
    return InvalidField("sparsity.tier", absl::StrCat("is ", static_cast<int>(wanted), "; it must be 0 to ",
                                                      static_cast<int>(v1::Tier_MAX)));
  }
  const Tier tier = known.value_or(options.default_tier);
  if (!IsAllowed(tier, options)) {
    return InvalidField("sparsity.tier", absl::StrCat("is ", Name(tier), "; this server allows ",
                                                      Name(options.highest_tier), " to ", Name(options.lowest_tier)));
  }
  const absl::Status servable = model.engine->CheckTier(tier);
  if (!servable.ok()) return MissingFeature("predictor", servable.message());
  return tier;
}

absl::Status CheckModelName(const std::string& name, const ServedModel& model) {
  if (name.empty() || name == model.name) return absl::OkStatus();
  return WithErrorInfo(absl::NotFoundError(absl::StrCat("model ", Printable(name), " is not served here; ",
                                                        Printable(model.name), " is")),
                       "MODEL_NOT_FOUND", {{"served_model", model.name}});
}

absl::Status CheckRequestId(const std::string& request_id) {
  if (request_id.size() > kMaxRequestIdBytes) {
    return InvalidField(
        "request_id", absl::StrCat("has ", request_id.size(), " bytes; at most ", kMaxRequestIdBytes, " are allowed"));
  }
  const auto allowed = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == ':' || c == '-';
  };
  if (!std::all_of(request_id.begin(), request_id.end(), allowed)) {
    return InvalidField("request_id",
                        absl::StrCat("is ", Printable(request_id), "; only A-Z a-z 0-9 . _ : - are allowed"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> CheckTenant(const std::string& tenant) {
  if (IsTenantName(tenant)) return tenant;
  return InvalidField("x-tenant", absl::StrCat("is ", Printable(tenant), "; it must be at most ", kMaxTenantBytes,
                                               " of A-Z, a-z, 0-9, '.', '_' and '-'"));
}

absl::StatusOr<CheckedGenerate> CheckGenerate(const v1::GenerateRequest& request, const ServerOptions& options,
                                              const ServedModel& model, uint64_t drawn_seed, bool streaming) {
  CheckedGenerate checked;
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  RETURN_IF_ERROR(CheckModelName(request.model(), model));
  RETURN_IF_ERROR(CheckSampling(request.sampling(), model, drawn_seed, &checked.request.sampling));
  RETURN_IF_ERROR(CheckAtMost("sampling.samples", request.sampling().samples(), options.max_samples));
  checked.samples = std::max(1, static_cast<int>(request.sampling().samples()));
  if (checked.samples > 1 && checked.request.sampling.temperature == 0.0f) {
    return InvalidField(
        "sampling.samples",
        absl::StrCat("is ", checked.samples, "; more than 1 needs a temperature above 0, or all are alike"));
  }
  RETURN_IF_ERROR(CheckPenalties(request.penalties(), options, model, &checked.request.sampling));
  RETURN_IF_ERROR(CheckOutput(request.output(), options, &checked));
  RETURN_IF_ERROR(CheckSparsity(request.sparsity(), options, model, &checked.request.sparsity));
  RETURN_IF_ERROR(CheckSpeculation(request.speculation(), options, model, &checked.request.speculation));
  RETURN_IF_ERROR(CheckScheduling(request.scheduling(), &checked.request));
  // Last, as tokenising costs most.
  const int64_t new_tokens = request.stopping().has_max_new_tokens()
                                 ? int64_t{request.stopping().max_new_tokens()}
                                 : std::min(options.default_max_new_tokens, model.context / 2);
  PromptRules rules{"", request.parse_special_tokens(), std::nullopt};
  ASSIGN_OR_RETURN(rules.most, CheckTruncation(request, new_tokens, model));
  ASSIGN_OR_RETURN(checked.request.prompt, CheckPrompt(request, rules, model));
  RETURN_IF_ERROR(CheckStopping(request.stopping(), options, model, &checked));
  RETURN_IF_ERROR(CheckLogprobs(checked, streaming));
  return checked;
}

absl::StatusOr<std::vector<Request>> CheckScore(const v1::ScoreRequest& request, const ServerOptions& options,
                                                const ServedModel& model) {
  Request common;
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  RETURN_IF_ERROR(CheckModelName(request.model(), model));
  RETURN_IF_ERROR(CheckAtMost("top_logprobs", request.top_logprobs(), options.max_top_logprobs));
  RETURN_IF_ERROR(CheckScheduling(request.scheduling(), &common));
  common.score = true;
  common.score_top_logprobs = static_cast<int32_t>(request.top_logprobs());
  PromptRules rules{"", request.parse_special_tokens(), std::nullopt};
  ASSIGN_OR_RETURN(rules.most, CheckTruncation(request, 0, model));
  RETURN_IF_ERROR(CheckCount("prompts", request.prompts_size(), kMaxScorePrompts));
  std::vector<Request> checked(std::max(1, request.prompts_size()), common);
  if (request.prompts().empty()) {
    ASSIGN_OR_RETURN(checked[0].prompt, CheckPrompt(request, rules, model));
  } else if (request.prompt_case() != v1::ScoreRequest::PROMPT_NOT_SET) {
    return InvalidField("prompts", "is given beside text or token_ids");
  }
  for (int i = 0; i < request.prompts_size(); ++i) {
    rules.prefix = absl::StrCat("prompts[", i, "].");
    ASSIGN_OR_RETURN(checked[i].prompt, CheckPrompt(request.prompts(i), rules, model));
  }
  int64_t tokens = 0;
  for (const Request& one : checked) tokens += static_cast<int64_t>(one.prompt.size());
  RETURN_IF_ERROR(CheckReplySize("top_logprobs", tokens, common.score_top_logprobs));
  return checked;
}

absl::StatusOr<std::vector<int32_t>> CheckTokenize(const v1::TokenizeRequest& request, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(request.model(), model));
  RETURN_IF_ERROR(CheckTokenizer("Tokenize", model));
  return model.tokenizer->EncodePrompt(request.text(), request.parse_special_tokens());
}

absl::StatusOr<std::string> CheckDetokenize(const v1::DetokenizeRequest& request, const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(request.model(), model));
  RETURN_IF_ERROR(CheckTokenizer("Detokenize", model));
  ASSIGN_OR_RETURN(const std::vector<int32_t> ids, CheckTokenIds("token_ids", request.token_ids(), model));
  return model.tokenizer->Decode(ids, request.has_skip_special_tokens() ? request.skip_special_tokens() : true);
}

}  // namespace dejavu
