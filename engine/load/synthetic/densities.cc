#include "engine/load/synthetic/densities.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

constexpr double kFirstLayerFactor = 1.6;  // layer 0 is denser than its neighbours

// Of the fit: share of hot neurons, and the two parameters of the others.
struct QuarterProfile {
  double hot, a, b;
};
struct DensityProfile {
  const char* name;
  std::array<QuarterProfile, kDensityQuarters> quarters;
};

// Fitted to the tables of OPT-6.7b, -30b and -66b; 13b to the means of the first two. The union of independent tokens
// is concave in the batch and some rows of the tables are not (their batch 1 was clamped): there, in the deep half of
// 30b and 66b, the fit is up to 3 points off, else less than 1.5.
constexpr DensityProfile kProfiles[] = {
    {"6.7b",
     {{{0.0348, 0.4524, 18.5689}, {0.0163, 0.4444, 5.6582}, {0.0131, 0.4821, 2.6037}, {0.1069, 1.4860, 31.4574}}}},
    {"6.7b and 30b (mean)",
     {{{0.0258, 0.4469, 24.7081}, {0.0162, 0.4147, 6.2108}, {0.0628, 0.6379, 5.6895}, {0.0987, 1.3971, 33.1695}}}},
    {"30b",
     {{{0.0171, 0.3270, 23.3767}, {0.0118, 0.3618, 6.2342}, {0.0438, 0.5028, 4.1784}, {0.0552, 0.7844, 6.6200}}}},
    {"66b", {{{0.0078, 0.1392, 5.5872}, {0.0070, 0.2569, 4.2942}, {0.0742, 0.6393, 8.7779}, {0.0853, 0.6930, 7.2403}}}},
};

// Of `batch` independent tokens, each with probability `share`, at least one.
double Union(double share, int32_t batch) { return 1.0 - std::pow(1.0 - share, batch); }

// Adds what one neuron, `weight` of its layer, makes every step of a tier read: `reads` by tier, then batch.
void AddReads(const SyntheticNeuron& neuron, double weight, double recall, absl::Span<const int> batches, int32_t layer,
              ReadTable* reads) {
  for (size_t b = 0; b < batches.size(); ++b) {
    const double some_active = Union(neuron.active, batches[b]);
    (*reads)[static_cast<size_t>(Tier::kExact)][layer][b].down += weight * some_active;
    for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
      const double selected = NormalTail(neuron.threshold[i]);
      const double hit = TierRecall(kSyntheticTiers[i], recall) * neuron.active;
      const double some_selected = Union(selected, batches[b]);
      // Selected by some token and active for some, not always the same one.
      const double both = some_selected + some_active - Union(selected + neuron.active - hit, batches[b]);
      LayerReads& of_tier = (*reads)[static_cast<size_t>(kSyntheticTiers[i])][layer][b];
      of_tier.up += weight * some_selected;
      of_tier.down += weight * both;
    }
  }
}

}  // namespace

// The quantiles of the layer's distribution, so that its density holds exactly.
std::vector<double> SelectionShares(const SyntheticModel& model, int32_t layer) {
  const int32_t layers = model.config.layers, quarter = layer * kDensityQuarters / layers;
  const QuarterProfile& profile = kProfiles[model.profile].quarters[quarter];
  int32_t in_first_quarter = 0;
  while (in_first_quarter < layers && in_first_quarter * kDensityQuarters / layers == 0) ++in_first_quarter;
  double factor = model.density;
  if (quarter == 0 && in_first_quarter > 1) {
    factor *= layer == 0 ? kFirstLayerFactor : (in_first_quarter - kFirstLayerFactor) / (in_first_quarter - 1);
  }
  const int32_t ffn = model.config.ffn;
  const auto hot = static_cast<int32_t>(std::lround(std::min(1.0, factor * profile.hot) * ffn));
  std::vector<double> shares(ffn, kHotShare);
  for (int32_t j = hot; j < ffn; ++j) {
    const double rank = 1.0 - (j - hot + 0.5) / (ffn - hot);
    const double share = std::pow(1.0 - std::pow(1.0 - rank, 1.0 / profile.b), 1.0 / profile.a);
    shares[j] = std::clamp(factor * share, kRarest, kHotShare);
  }
  return shares;
}

SyntheticDensity ExpectedDensity(const SyntheticModel& model, const NeuronTable& table, int32_t layer, int32_t batch) {
  SyntheticDensity sum;
  double selected = 0.0, hits = 0.0;
  const std::vector<double> shares = SelectionShares(model, layer);
  for (const double share : shares) {
    const double active = table.Of(share).active;
    sum.selected += Union(share, batch);
    sum.active += Union(active, batch);
    selected += share;
    hits += model.recall * active;
  }
  const auto neurons = static_cast<double>(shares.size());
  return {sum.selected / neurons, sum.active / neurons, hits / selected};
}

SyntheticDensity ExpectedDensity(const SyntheticModel& model, int32_t layer, int32_t batch) {
  return ExpectedDensity(model, NeuronTable(model.recall), layer, batch);
}

ReadTable ExpectedReads(const SyntheticModel& model, absl::Span<const int> batches) {
  constexpr int32_t kQuantiles = 512;
  const NeuronTable table(model.recall);
  SyntheticModel coarse = model;
  coarse.config.ffn = std::min(model.config.ffn, kQuantiles);
  const int32_t layers = model.config.layers;
  ReadTable reads;
  for (auto& tier : reads) tier.assign(layers, std::vector<LayerReads>(batches.size()));
  for (int32_t l = 0; l < layers; ++l) {
    if (l > 1 && l * kDensityQuarters / layers == (l - 1) * kDensityQuarters / layers) {  // alike, but for layer 0
      for (auto& tier : reads) tier[l] = tier[l - 1];
      continue;
    }
    for (const Tier tier : {Tier::kExact, Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
      for (LayerReads& layer : reads[static_cast<size_t>(tier)][l]) layer = {tier == Tier::kExact ? 1.0 : 0.0, 0.0};
    }
    const std::vector<double> shares = SelectionShares(coarse, l);
    const double weight = 1.0 / static_cast<double>(shares.size());
    for (const double share : shares) AddReads(table.Of(share), weight, model.recall, batches, l, &reads);
  }
  return reads;
}

std::string DensitySource(const SyntheticModel& model) { return absl::StrCat("OPT-", kProfiles[model.profile].name); }

}  // namespace dejavu
