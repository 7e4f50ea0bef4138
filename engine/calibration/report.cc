#include "engine/calibration/report.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

nlohmann::json LayerReports(const TierEvaluation& t, const PredictorData& data) {
  nlohmann::json layers = nlohmann::json::array();
  for (size_t l = 0; l < t.layers.size(); ++l) {
    const auto& point = data.layers[l].neurons.points[static_cast<size_t>(t.tier)];
    layers.push_back({{"rank", point.has_value() ? point->rank : 0},
                      {"mlp_selected", t.layers[l].mlp_selected},
                      {"mlp_active", t.layers[l].mlp_active},
                      {"mlp_byte_share", t.layers[l].mlp_byte_share},
                      {"recall", t.layers[l].recall},
                      {"precision", t.layers[l].precision},
                      {"missed_mass", t.layers[l].missed_mass}});
  }
  return layers;
}

nlohmann::json TierReports(const Evaluation& evaluation, const PredictorData& data) {
  nlohmann::json tiers = nlohmann::json::array();
  for (const TierEvaluation& t : evaluation.tiers) {
    tiers.push_back({{"tier", std::string(Name(t.tier))},
                     {"perplexity_change", t.perplexity_change},
                     {"top1_agreement", t.top1_agreement},
                     {"kl_nats", t.kl_nats},
                     {"mlp_density", t.mean.mlp_density()},
                     {"mlp_selected", t.mean.mlp_selected},
                     {"mlp_active", t.mean.mlp_active},
                     {"head_density", t.mean.head_density},
                     {"mlp_byte_share", t.mean.mlp_byte_share},
                     {"recall", t.mean.recall},
                     {"precision", t.mean.precision},
                     {"missed_mass", t.mean.missed_mass},
                     {"byte_ceiling", t.byte_ceiling},
                     {"layers", LayerReports(t, data)}});
  }
  return tiers;
}

// `tiers`: those of the report.
void AppendLayers(const PredictorData& data, const nlohmann::json& tiers, std::string* table) {
  absl::StrAppend(table, "\nrank / neurons selected, by layer (exact: prediction does not pay there)\n");
  absl::StrAppendFormat(table, "%-6s", "layer");
  for (const nlohmann::json& tier : tiers) absl::StrAppendFormat(table, " %14s", tier.value("tier", ""));
  absl::StrAppend(table, "\n");
  for (size_t l = 0; l < data.layers.size(); ++l) {
    absl::StrAppendFormat(table, "%-6d", l);
    for (const nlohmann::json& tier : tiers) {
      const nlohmann::json& layer = tier["layers"][l];
      const int rank = layer.value("rank", 0);
      const std::string cell =
          rank == 0 ? "exact" : absl::StrFormat("%d / %4.1f%%", rank, 100.0 * layer.value("mlp_selected", 0.0));
      absl::StrAppendFormat(table, " %14s", cell);
    }
    absl::StrAppend(table, "\n");
  }
}

}  // namespace

std::string CalibrationJson(const Evaluation& evaluation, const PredictorData& data,
                            const std::vector<TierChoice>& choices, int64_t training_tokens) {
  nlohmann::json report;
  report["validation_tokens"] = evaluation.tokens;
  report["training_tokens"] = training_tokens;
  report["tiers"] = TierReports(evaluation, data);
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i].bytes_with_heads == 0.0) continue;
    report["heads"].push_back({{"tier", std::string(Name(kCalibratedTiers[i]))},
                               {"skipped", choices[i].heads},
                               {"weight_bytes_per_token", choices[i].bytes},
                               {"weight_bytes_per_token_if_skipped", choices[i].bytes_with_heads}});
  }
  return report.dump();
}

std::string CalibrationTable(const PredictorData& data) {
  const nlohmann::json report = nlohmann::json::parse(data.report_json, nullptr, /*allow_exceptions=*/false);
  std::string table = absl::StrFormat("tap %s; measured on %d tokens that were not fitted to\n\n",
                                      std::string(Name(data.tap)), report.value("validation_tokens", int64_t{0}));
  absl::StrAppendFormat(&table, "%-10s %10s %7s %9s %9s %8s %8s %8s %9s %8s\n", "tier", "perplexity", "top-1",
                        "KL nats", "MLP bytes", "up rows", "down", "recall", "precision", "heads");
  for (const nlohmann::json& tier : report["tiers"]) {
    const auto percent = [&](const char* key) { return 100.0 * tier.value(key, 0.0); };
    absl::StrAppendFormat(&table, "%-10s %+9.2f%% %6.1f%% %9.4f %8.2f%% %7.1f%% %7.1f%% %7.1f%% %8.1f%% %7.1f%%\n",
                          tier.value("tier", ""), percent("perplexity_change"), percent("top1_agreement"),
                          tier.value("kl_nats", 0.0), percent("mlp_byte_share"), percent("mlp_selected"),
                          percent("mlp_active"), percent("recall"), percent("precision"), percent("head_density"));
  }
  if (report.contains("heads")) absl::StrAppend(&table, "\n");
  for (const nlohmann::json& heads : report.value("heads", nlohmann::json::array())) {
    const double without = heads.value("weight_bytes_per_token", 1.0);
    absl::StrAppendFormat(&table, "%s: skipping heads %s (%+.1f%% of all weight bytes at the same quality)\n",
                          heads.value("tier", ""), heads.value("skipped", false) ? "pays" : "does not pay",
                          100.0 * (heads.value("weight_bytes_per_token_if_skipped", without) / without - 1.0));
  }
  AppendLayers(data, report["tiers"], &table);
  return table;
}

}  // namespace dejavu
