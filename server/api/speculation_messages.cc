#include "server/api/speculation_messages.h"

#include "server/api/sparsity_messages.h"

namespace dejavu {
namespace {

v1::SpeculationMode ToMessage(SpeculationMode mode) {
  switch (mode) {
    case SpeculationMode::kOff:
      return v1::SPECULATION_MODE_OFF;
    case SpeculationMode::kAuto:
      return v1::SPECULATION_MODE_AUTO;
    case SpeculationMode::kAlways:
      return v1::SPECULATION_MODE_ALWAYS;
  }
  return v1::SPECULATION_MODE_UNSPECIFIED;
}

void FillDrafts(const DraftCounts& counts, v1::SpeculationReport::Drafts* message) {
  message->set_drafted(static_cast<uint64_t>(counts.drafted));
  message->set_accepted(static_cast<uint64_t>(counts.accepted));
}

void AddSource(v1::Tier tier, const DraftCounts& counts, v1::SpeculationInfo* message) {
  if (counts.drafted == 0) return;
  v1::SpeculationInfo::Source* const source = message->add_sources();
  source->set_tier(tier);
  source->set_drafted(static_cast<uint64_t>(counts.drafted));
  source->set_accepted(static_cast<uint64_t>(counts.accepted));
}

}  // namespace

std::optional<SpeculationMode> FromMessage(v1::SpeculationMode message) {
  for (const auto mode : {SpeculationMode::kOff, SpeculationMode::kAuto, SpeculationMode::kAlways}) {
    if (ToMessage(mode) == message) return mode;
  }
  return std::nullopt;
}

SpeculationParams DefaultSpeculation(const ServerOptions& options, const Engine* engine) {
  SpeculationParams params;
  params.mode = ParseSpeculationMode(options.speculation_mode).value_or(SpeculationMode::kOff);
  params.draft_tier = ParseTier(options.speculation_draft_tier).value_or(Tier::kDense);
  if (engine != nullptr && !engine->CheckTier(params.draft_tier).ok()) params.draft_tier = Tier::kDense;
  params.lookup = options.speculation_lookup;
  params.most_tokens = options.speculation_most_tokens;
  return params;
}

void FillReport(const SpeculationReport& report, v1::SpeculationReport* message) {
  message->set_rounds(static_cast<uint64_t>(report.rounds));
  message->set_tokens(static_cast<uint64_t>(report.tokens));
  if (IsPredicted(report.draft_tier)) message->set_draft_tier(ToMessage(report.draft_tier));
  FillDrafts(report.of_source[static_cast<size_t>(DraftSource::kTier)], message->mutable_tier());
  FillDrafts(report.of_source[static_cast<size_t>(DraftSource::kLookup)], message->mutable_lookup());
}

void FillInfo(const ServerOptions& options, const Engine* engine, v1::SpeculationInfo* message) {
  const SpeculationParams defaults = DefaultSpeculation(options, engine);
  message->set_default_mode(ToMessage(defaults.mode));
  if (defaults.tier_drafts()) message->set_draft_tier(ToMessage(defaults.draft_tier));
  message->set_lookup(defaults.lookup);
  message->set_most_tokens(static_cast<uint32_t>(defaults.most_tokens));
  message->set_always_allowed(options.speculation_allow_always);
  if (engine == nullptr) return;
  const SpeculationTotals totals = engine->stats().speculation;
  for (const Tier tier : kAllTiers) AddSource(ToMessage(tier), totals.of_tier[static_cast<size_t>(tier)], message);
  AddSource(v1::TIER_UNSPECIFIED, totals.lookup, message);
  message->set_rounds(static_cast<uint64_t>(totals.rounds));
  message->set_tokens(static_cast<uint64_t>(totals.tokens));
  message->set_seconds(totals.spent_ms / 1e3);
  message->set_plain_seconds(totals.plain_ms / 1e3);
}

}  // namespace dejavu
