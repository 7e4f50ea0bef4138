#include "engine/metrics.h"

#include <algorithm>
#include <cmath>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/refusal.h"

namespace dejavu {
namespace {

absl::flat_hash_set<std::string> HistogramNames() {
  const EngineMetrics engine(MetricEdges{});
  const CallMetrics calls(MetricEdges{});
  absl::flat_hash_set<std::string> names;
  for (const MetricTable* table : {static_cast<const MetricTable*>(&engine), static_cast<const MetricTable*>(&calls)}) {
    for (const MetricFamily* family : table->families()) {
      if (family->histogram(0) != nullptr) names.insert(family->name());
    }
  }
  return names;
}

}  // namespace

MetricLabel TierLabel() {
  MetricLabel label{"tier", {}};
  for (const Tier tier : kAllTiers) label.values.push_back(absl::AsciiStrToLower(Name(tier)));
  return label;
}

MetricLabel PredictedTierLabel() {
  MetricLabel label = TierLabel();
  for (const Tier tier : kAllTiers) {
    if (!IsPredicted(tier)) label.values[static_cast<size_t>(tier)].clear();
  }
  return label;
}

MetricLabel PriorityLabel() {
  MetricLabel label{"priority", {}};
  for (int u = 0; u < kUrgencies; ++u) label.values.emplace_back(Name(static_cast<Urgency>(u)));
  return label;
}

MetricLabels RequestLabels() { return {TierLabel(), PriorityLabel()}; }

MetricLabel ReasonLabel() {
  MetricLabel label{"reason", {}};
  for (int r = 0; r < kRefusals; ++r) label.values.push_back(absl::AsciiStrToLower(Name(static_cast<Refusal>(r))));
  return label;
}

MetricLabel LayerGroupLabel() {
  MetricLabel label{"layer_group", {}};
  for (int group = 0; group < kLayerGroups; ++group) label.values.push_back(absl::StrCat(group));
  return label;
}

MetricLabel BatchLabel() {
  MetricLabel label{"batch", {}};
  for (const int size : kBatchSizes) label.values.push_back(absl::StrCat(size));
  return label;
}

MetricLabel DraftSourceLabel() {
  MetricLabel label{"source", PredictedTierLabel().values};
  label.values.emplace_back(Name(DraftSource::kLookup));
  return label;
}

double EngineMetrics::KvBlocks(const EngineView& view, size_t state) {
  const EngineStats& stats = view.stats;
  switch (static_cast<BlockState>(state)) {
    case kUsedBlocks:
      return stats.kv_blocks_total - stats.kv_blocks_free;
    case kFreeBlocks:
      return stats.kv_blocks_free - stats.kv_blocks_cached;
    default:
      return stats.kv_blocks_cached;
  }
}

double EngineMetrics::KvUtilization(const EngineView& view, size_t) {
  const int32_t all = view.stats.kv_blocks_total;
  return all > 0 ? KvBlocks(view, kUsedBlocks) / all : 0.0;
}

double EngineMetrics::FallbackLayers(const EngineView& view, size_t tier) {
  const auto& fallen = view.sparsity.exact_now;
  return static_cast<double>(
      std::count_if(fallen.begin(), fallen.end(), [&](const auto& f) { return static_cast<size_t>(f.tier) == tier; }));
}

const DraftCounts& EngineMetrics::DraftsOf(const EngineView& view, size_t source) {
  const SpeculationTotals& totals = view.stats.speculation;
  return source < totals.of_tier.size() ? totals.of_tier[source] : totals.lookup;
}

int64_t EngineMetrics::SumOf(const EngineView& view, int64_t LayerSparsityStats::*counter) {
  int64_t sum = 0;
  for (const LayerSparsityStats& layer : view.sparsity.layers) sum += layer.*counter;
  return sum;
}

// What nobody set a target for is neither kept nor missed.
bool EngineMetrics::HasTarget(const EngineView& view, size_t slo) {
  return view.metrics.slo_attained[slo].value() + view.metrics.slo_missed[slo].value() > 0;
}

absl::StatusOr<MetricEdges> MetricEdgesFrom(const std::string& text) {
  MetricEdges edges;
  const absl::flat_hash_set<std::string> known = HistogramNames();
  for (const absl::string_view entry : absl::StrSplit(text, ';', absl::SkipWhitespace())) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    const std::string name(absl::StripAsciiWhitespace(parts.first));
    if (!known.contains(name)) {
      return absl::InvalidArgumentError(absl::StrCat("metrics.edges names '", name,
                                                     "', which is no histogram; it must be "
                                                     "FAMILY=EDGE,EDGE;... with families such as "
                                                     "inter_token_latency_seconds"));
    }
    std::vector<double> own;
    for (const absl::string_view edge : absl::StrSplit(parts.second, ',')) {
      double value = 0.0;
      if (!absl::SimpleAtod(edge, &value) || !std::isfinite(value) || (!own.empty() && value <= own.back())) {
        return absl::InvalidArgumentError(
            absl::StrCat("metrics.edges of ", name, " has '", edge, "'; edges are numbers that ascend"));
      }
      own.push_back(value);
    }
    edges[name] = std::move(own);
  }
  return edges;
}

}  // namespace dejavu
