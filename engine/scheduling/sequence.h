// Sequence: one request on its way through the engine. Engine thread only, once it has been submitted.
#ifndef ENGINE_SCHEDULING_SEQUENCE_H_
#define ENGINE_SCHEDULING_SEQUENCE_H_

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/request.h"
#include "engine/scheduling/admission.h"
#include "engine/scheduling/block_pool.h"

namespace dejavu {

// What the decode rows of a request added up to, over all layers.
struct SparsitySums {
  int64_t tokens = 0, selected = 0, active = 0, heads = 0;
  int64_t union_rows = 0;  // weight rows, up and down, that the steps read
  int64_t fallback_layers = 0;
  int64_t shadow_tokens = 0, shadow_agreements = 0;
  double shadow_kl_nats = 0.0;
  double shadow_selected = 0.0, shadow_active = 0.0, shadow_hits = 0.0, shadow_mass = 0.0, shadow_missed_mass = 0.0;
};

// What has been guessed of a sequence's next tokens, and how it went before (engine/scheduling/rounds.h).
struct DraftRound {
  int32_t wanted = 0;  // drafts; 0: no round is open
  DraftSource source = DraftSource::kTier;
  std::vector<int32_t> drafts;
  // Of the check: drafts that were what it drew, and whether one was not.
  int32_t accepted = 0;
  bool missed = false;

  bool open() const { return wanted > 0; }
  bool drafting() const { return static_cast<int32_t>(drafts.size()) < wanted; }
  void Close() {
    wanted = accepted = 0;
    missed = false;
    drafts.clear();
  }
};

// How often drafts were right lately; of one that was wrong those after it do not count.
struct DraftOdds {
  double right = 0.0, wrong = 0.0;
  void Add(const DraftRound& round, double memory) {
    const double fade = std::pow(memory, round.accepted + (round.missed ? 1 : 0));
    right = right * fade + round.accepted;
    wrong = wrong * fade + (round.missed ? 1 : 0);
  }
};

// What a sequence has in a step.
struct StepShare {
  int32_t step_rows = 0;  // rows that the batch holds for it, from first_row on
  int32_t first_row = 0;
  int32_t step_logits = 0;  // of those, how many want logits: the last ones
  int32_t first_logit = 0;  // their first row among the batch's logits
  int32_t step_after = 0;   // output, and drafts, that stand before what that one draws
  enum class Use : uint8_t {
    kText,   // its tokens, computed for good
    kDraft,  // one row of the draft tier, for the next draft
    kCheck,  // its last token, then its drafts: what they leave counts as far as they turn out to be right
  } step_use = Use::kText;
  int32_t kept_rows = 0;  // of step_rows, those that are computed for good
};

struct Sequence : StepShare {
  Sequence(Request request, std::shared_ptr<TokenSink> sink)
      : request(std::move(request)), sink(std::move(sink)), tokens(this->request.prompt) {
    tokens.reserve(static_cast<size_t>(max_tokens()));
    if (speculates()) round.drafts.reserve(kMostDraftTokens);
    prefill_tokens = prompt_tokens();
  }

  // Constant after construction.
  const Request request;
  const std::shared_ptr<TokenSink> sink;

  uint64_t id = 0;              // set once, before anybody else knows the sequence
  std::vector<int32_t> tokens;  // prompt, then output
  int32_t computed = 0;         // tokens whose keys and values are in the cache
  int32_t prefill_tokens = 0;   // tokens that it had when it was admitted: computed in chunks, as a prompt is

  // The scheduler's.
  SteadyTime arrival;
  uint64_t turn = 0;  // order of arrival
  int32_t tenant = -1;
  int32_t slot = -1;            // line of the block table; -1 while waiting
  std::vector<int32_t> blocks;  // of its tokens so far, or of max_positions()
  std::vector<BlockKey> keys;   // of the full blocks of the prompt; empty: they are not shared
  int32_t kept_blocks = 0;      // blocks that others may find by their key
  uint64_t admission = 0;       // order of admission
  int32_t preemptions = 0;

  StepShare ahead;  // in the step after this one, where that is planned

  // `score`: what the distribution at the last computed position says of the next prompt token.
  float next_logprob = 0.0f;
  int32_t next_rank = 0;

  DraftRound round;
  std::array<DraftOdds, kDraftSources> odds;

  Expectation expected;  // Admission's
  SparsitySums sparsity;
  SteadyTime last_token;
  int64_t last_token_step = 0;
  Finish finish;

  int32_t prompt_tokens() const { return static_cast<int32_t>(request.prompt.size()); }
  int32_t generated_tokens() const { return static_cast<int32_t>(tokens.size()) - prompt_tokens(); }
  bool decodes() const { return computed >= prefill_tokens; }
  // Whether the rows of its next step are of a prompt whose log-probabilities are wanted. It is computed once: Grows.
  bool scores() const { return request.score && computed < prompt_tokens(); }
  bool speculates() const {
    return request.speculation.mode != SpeculationMode::kOff && !IsPredicted(request.sparsity.tier);
  }
  // Whether the last of a step's rows brings a token, or a draft.
  bool draws(const StepShare& share) const {
    const bool last = decodes() || computed + share.step_rows >= static_cast<int32_t>(tokens.size());
    return request.max_new_tokens > 0 && last;
  }
  // The next token, drawn behind row `kept_rows` of a check, or the last of the step. Whether the row after that holds
  // for it: the token is what was drafted.
  bool Take(int32_t token) {
    tokens.push_back(token);
    if (step_use != Use::kCheck) return false;
    const auto i = static_cast<size_t>(kept_rows++);
    if (i == round.drafts.size()) return false;
    round.missed = round.drafts[i] != token;
    round.accepted += !round.missed;
    return !round.missed;
  }
  int32_t uncomputed() const { return static_cast<int32_t>(tokens.size()) - computed; }
  int64_t max_tokens() const { return int64_t{prompt_tokens()} + request.max_new_tokens; }
  // That have keys and values: the last token is drawn and never read.
  int64_t max_positions() const { return MaxPositions(request); }
  // Why it has to end now, whatever it has generated; nothing while it may go on.
  std::optional<FinishReason> Overdue(SteadyTime now) const {
    if (request.deadline <= now) return FinishReason::kDeadline;
    if (request.stop_at <= now) return FinishReason::kTime;
    return std::nullopt;
  }
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_SEQUENCE_H_
