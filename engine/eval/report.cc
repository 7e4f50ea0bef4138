#include "engine/eval/report.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

// NaN is written as null.
void AddFigures(const ReadFigures& figures, Json* json) {
  (*json)["mlp_density"] = figures.mlp_density();
  (*json)["mlp_selected"] = figures.mlp_selected;
  (*json)["mlp_active"] = figures.mlp_active;
  (*json)["mlp_own_selected"] = figures.mlp_own_selected;
  (*json)["head_density"] = figures.head_density;
  (*json)["recall"] = figures.recall;
  (*json)["precision"] = figures.precision;
  (*json)["missed_mass"] = figures.missed_mass;
  (*json)["missed_share"] = figures.missed_share;
  (*json)["mlp_byte_share"] = figures.mlp_byte_share;
}

Json TierJson(const TierEvaluation& e) {
  Json json = {{"tier", std::string(Name(e.tier))},
               {"perplexity", e.perplexity},
               {"perplexity_change", e.perplexity_change},
               {"top1_agreement", e.top1_agreement},
               {"kl_nats", e.kl_nats}};
  AddFigures(e.mean, &json);
  json["weight_bytes_per_token"] = e.weight_bytes_per_token;
  json["byte_ceiling"] = e.byte_ceiling;
  json["layers"] = Json::array();
  for (const ReadFigures& layer : e.layers) {
    Json entry = {{"layer", json["layers"].size()}};
    AddFigures(layer, &entry);
    json["layers"].push_back(std::move(entry));
  }
  return json;
}

std::string Percent(double share, int digits) {
  return std::isfinite(share) ? absl::StrFormat("%.*f %%", digits, 100.0 * share) : "-";
}

}  // namespace

std::string EvaluationJson(const Evaluation& evaluation) {
  Json json = {
      {"weight_dtype", Name(evaluation.weight_dtype)}, {"tokens", evaluation.tokens}, {"tiers", Json::array()}};
  for (const TierEvaluation& e : evaluation.tiers) json["tiers"].push_back(TierJson(e));
  return json.dump(2) + "\n";
}

std::string EvaluationTable(const Evaluation& evaluation) {
  constexpr char kLine[] = "%-9s %11s %10s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s %11s %8s\n";
  std::string table =
      absl::StrFormat(kLine, "tier", "perplexity", "change", "top-1", "KL nats", "up rows", "down rows", "MLP", "heads",
                      "recall", "precision", "missed", "MLP bytes", "bytes/token", "ceiling");
  for (const TierEvaluation& e : evaluation.tiers) {
    const ReadFigures& f = e.mean;
    absl::StrAppend(
        &table,
        absl::StrFormat(kLine, Name(e.tier), absl::StrFormat("%.4f", e.perplexity),
                        absl::StrFormat("%+.3f %%", 100.0 * e.perplexity_change), Percent(e.top1_agreement, 2),
                        absl::StrFormat("%.5f", e.kl_nats), Percent(f.mlp_selected, 2), Percent(f.mlp_active, 2),
                        Percent(f.mlp_density(), 2), Percent(f.head_density, 1), Percent(f.recall, 2),
                        Percent(f.precision, 2), Percent(f.missed_mass, 3), Percent(f.mlp_byte_share, 2),
                        absl::StrFormat("%.0f", e.weight_bytes_per_token), absl::StrFormat("%.2fx", e.byte_ceiling)));
  }
  return table;
}

}  // namespace dejavu
