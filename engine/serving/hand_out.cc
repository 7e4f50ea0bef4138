#include "engine/serving/hand_out.h"

#include <algorithm>
#include <bit>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/serving/draws.h"
#include "kernels/draw.h"

namespace dejavu {

HandOut::HandOut(const ModelShape& shape, int32_t candidates, int32_t slots, Recorder& recorder)
    : shape_(shape), recorder_(recorder), sampler_(shape.vocab, candidates) {
  counts_.reserve(slots);
  for (int32_t i = 0; i < slots; ++i) counts_.emplace_back(shape.vocab);  // copies would lose what is reserved
  banned_.reserve(kMostEndTokens + 64);
}

void HandOut::Begin(const Sequence& s) {
  TokenCounts& counts = counts_[s.slot];
  counts.Clear();
  for (int32_t i = 0; i < s.prefill_tokens; ++i) {
    i < s.prompt_tokens() ? counts.AddPrompt(s.tokens[i]) : counts.AddOutput(s.tokens[i]);
  }
}

std::optional<Ending> HandOut::Give(Sequence& s, const StepResults& results) {
  recorder_.NotePromptTokens(std::min(s.step_rows, std::max(0, s.prompt_tokens() - s.computed)));
  if (s.step_logits == 0) return std::nullopt;
  if (s.step_use == Sequence::Use::kDraft) {
    KeepDraft(s, results);
    return std::nullopt;
  }
  if (s.scores()) {
    if (std::optional<Ending> ending = GiveScores(s, results)) return ending;
  }
  if (s.draws(s)) return GiveTokens(s, results);
  if (s.computed + s.step_rows < s.prompt_tokens()) return std::nullopt;
  return Ending{FinishReason::kLength, absl::OkStatus()};
}

std::optional<Ending> HandOut::GiveScores(Sequence& s, const StepResults& results) {
  for (int32_t i = 0; i < s.step_rows; ++i) {
    const float* logits = results.logits + static_cast<size_t>(s.first_logit + i) * shape_.vocab;
    const int32_t position = s.computed + i;
    if (!AllFinite(logits, shape_.vocab)) {
      return Ending{FinishReason::kError,
                    absl::DataLossError(absl::StrCat("the logits after prompt token ", position, " are not finite"))};
    }
    Token token;
    token.id = s.tokens[position];
    token.has_logprob = position > 0;
    token.logprob = s.next_logprob;
    token.rank = s.next_rank;
    token.top = sampler_.Top(logits, s.request.score_top_logprobs);
    if (!s.sink->OnPromptToken(token)) return Ending{FinishReason::kSink, absl::OkStatus()};
    if (position + 1 == s.prompt_tokens()) break;
    const Sampler::Choice next = sampler_.Describe(logits, s.tokens[position + 1]);
    s.next_logprob = next.logprob;
    s.next_rank = next.rank;
  }
  return std::nullopt;
}

// From that row of logits, behind so many generated tokens.
Sampler::Choice HandOut::Choose(const Sequence& s, int32_t row, int32_t generated, bool logprobs,
                                const StepResults& results) {
  const Request& r = s.request;
  if (results.drawn != nullptr) {
    const int32_t id = results.drawn[row];
    if (!logprobs) return {id};
    const int32_t* details = results.details + int64_t{row} * results.detail_fields;
    return {id, std::bit_cast<float>(details[kDetailLogprob]), details[kDetailRank]};
  }
  banned_.clear();
  AddBanned(shape_, r, generated, &banned_);
  const float* logits = results.logits + static_cast<size_t>(row) * shape_.vocab;
  return sampler_.Sample(logits, r.sampling, counts_[s.slot], banned_, static_cast<uint64_t>(generated), logprobs);
}

absl::Span<const TokenLogprob> HandOut::Top(const Sequence& s, int32_t row, const StepResults& results) {
  const int32_t count = s.request.top_logprobs;
  if (results.drawn == nullptr || count > kMostTop) {
    return sampler_.Top(results.logits + static_cast<size_t>(row) * shape_.vocab, count);
  }
  const int32_t* of_token = results.details + int64_t{row} * results.detail_fields + kDetailTop;
  top_.clear();
  for (int32_t i = 0; i < std::min(count, shape_.vocab); ++i) {
    top_.push_back({of_token[2 * i], std::bit_cast<float>(of_token[2 * i + 1])});
  }
  return top_;
}

// What cannot be drawn, or ends the text, is not drafted on: the check sees what becomes of it. What has been drafted
// on it ahead is dropped.
void HandOut::KeepDraft(Sequence& s, const StepResults& results) {
  DraftRound& round = s.round;
  if (!round.drafting()) return;
  const auto drafted = static_cast<int32_t>(round.drafts.size());
  WithOutput counts(counts_[s.slot]);
  counts.Grow(round.drafts);
  const int32_t id = Choose(s, s.first_logit, s.generated_tokens() + drafted, /*logprobs=*/false, results).id;
  if (id >= 0) round.drafts.push_back(id);
  if (id < 0 || StopAt(s.request, id).has_value()) round.wanted = static_cast<int32_t>(round.drafts.size());
}

// One token, behind rows that may have told of the prompt; or those of a check as far as each is what was drafted.
std::optional<Ending> HandOut::GiveTokens(Sequence& s, const StepResults& results) {
  bool more = true;
  const int32_t first = s.step_use == Sequence::Use::kCheck ? 0 : s.step_logits - 1;
  for (int32_t i = first; more && i < s.step_logits; ++i) {
    if (std::optional<Ending> ending = GiveToken(s, s.first_logit + i, i == first, results, &more)) return ending;
  }
  return std::nullopt;
}

// `more`: whether the next row holds, too.
std::optional<Ending> HandOut::GiveToken(Sequence& s, int32_t row, bool first, const StepResults& results, bool* more) {
  const Request& r = s.request;
  const Sampler::Choice choice = Choose(s, row, s.generated_tokens(), r.logprobs, results);
  if (choice.id < 0) {
    const std::string at = absl::StrCat(" after ", s.generated_tokens(), " new tokens");
    return Ending{FinishReason::kError,
                  choice.id == kNotFinite
                      ? absl::DataLossError("the logits are not finite" + at)
                      : absl::InvalidArgumentError(
                            "logit_bias, allowed_token_ids and min_new_tokens leave no token to sample" + at)};
  }
  const std::optional<FinishReason> stop = StopAt(r, choice.id);
  Token token;
  token.id = choice.id;
  token.has_logprob = r.logprobs;
  token.logprob = choice.logprob;
  token.rank = choice.rank;
  token.top = Top(s, row, results);
  token.stop = stop.has_value();
  recorder_.NoteToken(s, results.done, results.step, first);
  if (s.generated_tokens() == 0) s.finish.first_token = results.done;
  s.last_token = results.done;
  s.last_token_step = results.step;
  *more = s.Take(choice.id);
  counts_[s.slot].AddOutput(choice.id);

  if (!s.sink->OnToken(token)) return Ending{FinishReason::kSink, absl::OkStatus()};
  if (stop.has_value()) {
    s.finish.stop_token_id = choice.id;
    return Ending{*stop, absl::OkStatus()};
  }
  if (s.generated_tokens() == r.max_new_tokens) return Ending{FinishReason::kLength, absl::OkStatus()};
  return std::nullopt;
}

// The end of the text, if `id` is one for that request.
std::optional<FinishReason> HandOut::StopAt(const Request& r, int32_t id) const {
  const auto has = [&](const std::vector<int32_t>& ids) { return std::find(ids.begin(), ids.end(), id) != ids.end(); };
  if (!r.ignore_eos && has(shape_.eos_tokens)) return FinishReason::kEos;
  if (has(r.stop_token_ids)) return FinishReason::kStopToken;
  return std::nullopt;
}

}  // namespace dejavu
