#include "engine/planning/capacity_report.h"

#include <cmath>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// What figures are given in: small models in the smaller one.
struct Unit {
  const char* name;
  double bytes;
  std::string Of(double amount) const { return absl::StrFormat("%.2f", amount / bytes); }
};
constexpr Unit kInGib = {"GiB", 1 << 30}, kInMib = {"MiB", 1 << 20};
constexpr Unit kGb = {"GB", 1e9}, kMb = {"MB", 1e6};

Unit MemoryUnit(const CapacityPlan& plan) {
  return plan.budget_bytes - plan.left_bytes < 4 * kInGib.bytes ? kInMib : kInGib;
}

std::string Row(absl::string_view what, const std::string& value, const std::string& note) {
  return absl::StrFormat("  %-27s%9s%s%s\n", what, value, note.empty() ? "" : "   ", note);
}

std::string Memory(const CapacityPlan& plan) {
  const OptConfig& config = plan.config;
  const Shard& shard = plan.shard;
  const bool several = shard.ranks > 1;
  const Unit unit = MemoryUnit(plan);
  std::string text =
      absl::StrFormat("memory of each device, %s%s\n", unit.name, several ? " (rank 0's; no other takes more)" : "");
  const auto add = [&](absl::string_view what, int64_t bytes, const std::string& note) {
    if (bytes != 0) absl::StrAppend(&text, Row(what, unit.Of(bytes), note));
  };
  if (several) {
    add("weights, divided", plan.weight_bytes.split,
        absl::StrFormat("%d of %d heads, %d of %d neurons, %d of %d tokens", shard.heads.count, config.heads,
                        shard.neuron_count, config.ffn, shard.vocab.count, config.vocab));
    add("weights, on every device", plan.weight_bytes.replicated,
        config.embed == config.hidden ? "position embedding, norms"
                                      : "position embedding, norms, project_in and project_out");
    add("weights, on rank 0 alone", plan.weight_bytes.first_rank, "biases that are added once");
    add("predictor, divided", plan.predictor_bytes.split, "stage B, thresholds");
    add("predictor, on every device", plan.predictor_bytes.replicated, "stage A");
  } else {
    add("weights", plan.weight_bytes.total(), "");
    add("predictor", plan.predictor_bytes.total(), "");
  }
  add("weights for drafts", plan.draft_bytes, "attention and head once more, in int8");
  add("activations", plan.activation_bytes, "");
  add("keys and values", plan.kv_bytes,
      absl::StrFormat("%d tokens, %d sequences of %d", plan.kv_tokens, plan.kv_tokens / config.context,
                      config.context));
  absl::StrAppend(&text,
                  Row(plan.left_bytes < 0 ? "missing" : "left", unit.Of(std::abs(plan.left_bytes)),
                      plan.kv_tokens_room > plan.kv_tokens
                          ? absl::StrFormat("%d tokens of keys and values would fit", plan.kv_tokens_room)
                          : ""),
                  Row("may be taken", unit.Of(plan.budget_bytes),
                      absl::StrFormat("memory_share %g of %s", plan.memory_share, unit.Of(plan.memory_bytes))));
  return text;
}

std::string Steps(const CapacityPlan& plan) {
  if (plan.tiers.empty()) return "";
  const auto table = [&](const std::string& title, const auto& cell) {
    std::string text = absl::StrFormat("%-34s", title);
    for (const int batch : plan.batches) absl::StrAppendFormat(&text, "%9d", batch);
    for (const TierPlan& tier : plan.tiers) {
      absl::StrAppendFormat(&text, "\n  %-32s", Name(tier.tier));
      for (size_t b = 0; b < plan.batches.size(); ++b) absl::StrAppendFormat(&text, "%9s", cell(tier, b));
    }
    return text + "\n";
  };
  const Unit unit = plan.tiers.front().step_bytes.front() < 8e9 ? kMb : kGb;
  std::string text =
      table(absl::StrFormat("weight %s per token and rank; batch", unit.name),
            [&](const TierPlan& tier, size_t b) { return unit.Of(tier.step_bytes[b] / plan.batches[b]); });
  absl::StrAppend(&text, "\n", table("ms between tokens; batch", [](const TierPlan& tier, size_t b) {
    return tier.ms[b].has_value() ? absl::StrFormat("%.2f", *tier.ms[b]) : "-";
  }));
  absl::StrAppend(
      &text, "Calculated, not measured: ", absl::StrFormat("%g GB/s x %g", plan.bandwidth_gbs, plan.bandwidth_share));
  if (plan.all_reduces > 0) {
    absl::StrAppendFormat(&text, ", %d all-reduces of %g us (%.2f ms)", plan.all_reduces, plan.all_reduce_us,
                          plan.all_reduces * plan.all_reduce_us * 1e-3);
  }
  absl::StrAppend(&text, ", contexts of ", plan.context_tokens, " tokens;\nno time for arithmetic and launches. ",
                  "Densities: ", plan.densities, ".\n");
  return text;
}

}  // namespace

std::string CapacityText(const CapacityPlan& plan) {
  std::string text = absl::StrFormat("%s, %s weights, %s keys and values, on %d x %s\n\n", plan.model,
                                     Name(plan.weights), Name(plan.kv), plan.shard.ranks,
                                     plan.device.empty() ? kInGib.Of(plan.memory_bytes) + " GiB" : plan.device);
  absl::StrAppend(&text, Memory(plan), "\n");
  if (plan.fits) {
    absl::StrAppend(&text, Steps(plan), "\nIt fits.\n");
    return text;
  }
  absl::StrAppend(&text, "It does not fit: ", plan.reason, ".\n");
  absl::StrAppend(&text, plan.alternatives.empty()
                             ? absl::StrCat("Nor does it on up to ", kMaxPlanDevices, " of them, or in int8.\n")
                             : "What would fit:\n");
  for (const PlanAlternative& other : plan.alternatives) {
    absl::StrAppendFormat(&text, "  %-27s %s\n", other.flags, other.text);
  }
  return text;
}

std::string CapacityJson(const CapacityPlan& plan) {
  const OptConfig& config = plan.config;
  Json json = {{"model", plan.model},   {"weights", Name(plan.weights)}, {"kv_dtype", Name(plan.kv)},
               {"device", plan.device}, {"devices", plan.shard.ranks},   {"fits", plan.fits}};
  json["rank"] = {{"heads", plan.shard.heads.count},  {"neurons", plan.shard.neuron_count},
                  {"tokens", plan.shard.vocab.count}, {"of_heads", config.heads},
                  {"of_neurons", config.ffn},         {"of_tokens", config.vocab}};
  json["memory_bytes"] = {{"device", plan.memory_bytes},
                          {"may_be_taken", plan.budget_bytes},
                          {"weights", plan.weight_bytes.total()},
                          {"weights_divided", plan.weight_bytes.split},
                          {"weights_replicated", plan.weight_bytes.replicated},
                          {"weights_rank_0", plan.weight_bytes.first_rank},
                          {"predictor", plan.predictor_bytes.total()},
                          {"draft_weights", plan.draft_bytes},
                          {"predictor_divided", plan.predictor_bytes.split},
                          {"predictor_replicated", plan.predictor_bytes.replicated},
                          {"activations", plan.activation_bytes},
                          {"keys_and_values", plan.kv_bytes},
                          {"left", plan.left_bytes}};
  json["kv"] = {{"token_bytes", plan.kv_token_bytes},
                {"tokens", plan.kv_tokens},
                {"full_context_sequences", plan.kv_tokens / config.context},
                {"tokens_room", plan.kv_tokens_room},
                {"context", config.context}};
  json["assumed"] = {{"bandwidth_gb_per_s", plan.bandwidth_gbs},
                     {"bandwidth_share", plan.bandwidth_share},
                     {"all_reduce_us", plan.all_reduce_us},
                     {"all_reduces_per_step", plan.all_reduces},
                     {"context_tokens", plan.context_tokens},
                     {"densities", plan.densities},
                     {"synthetic", plan.synthetic}};
  json["tiers"] = Json::array();
  for (const TierPlan& tier : plan.tiers) {
    Json batches = Json::array();
    for (size_t b = 0; b < plan.batches.size(); ++b) {
      batches.push_back({{"batch", plan.batches[b]},
                         {"weight_bytes_per_step", std::llround(tier.step_bytes[b])},
                         {"weight_bytes_per_token", std::llround(tier.step_bytes[b] / plan.batches[b])},
                         {"inter_token_ms", tier.ms[b].has_value() ? Json(*tier.ms[b]) : Json(nullptr)}});
    }
    json["tiers"].push_back({{"tier", std::string(Name(tier.tier))}, {"batches", std::move(batches)}});
  }
  json["reason"] = plan.fits ? Json(nullptr) : Json(plan.reason);
  json["would_fit"] = Json::array();
  for (const PlanAlternative& other : plan.alternatives) {
    json["would_fit"].push_back({{"flags", other.flags}, {"text", other.text}});
  }
  return json.dump(2) + "\n";
}

}  // namespace dejavu
