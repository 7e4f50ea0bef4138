#include "engine/planning/calibrated_reads.h"

#include <algorithm>
#include <cmath>

namespace dejavu {
namespace {

// Probabilities of independent tokens, thinned out to quantiles.
std::vector<double> Quantiles(std::vector<float> values) {
  constexpr size_t kMost = 512;
  std::sort(values.begin(), values.end());
  const size_t count = std::min(values.size(), kMost);
  std::vector<double> quantiles;
  for (size_t i = 0; i < count; ++i) {
    quantiles.push_back(std::clamp<double>(values[(2 * i + 1) * values.size() / (2 * count)], 0.0, 1.0));
  }
  return quantiles;
}

// The factor that gives `shares`, none of which grows beyond 1, the mean `wanted`.
double FactorFor(const std::vector<double>& shares, double wanted) {
  double low = 0.0, high = 1e6;
  for (int i = 0; i < 40; ++i) {
    const double middle = std::sqrt(std::max(low, 1e-6) * high);
    double sum = 0.0;
    for (const double share : shares) sum += std::min(1.0, middle * share);
    (sum > wanted * static_cast<double>(shares.size()) ? high : low) = middle;
  }
  return high;
}

double MeanUnion(const std::vector<double>& shares, double factor, int batch) {
  double sum = 0.0;
  for (const double share : shares) sum += 1.0 - std::pow(1.0 - std::min(1.0, factor * share), batch);
  return sum / static_cast<double>(shares.size());
}

}  // namespace

ReadTable CalibratedReads(const PredictorData& predictor, const std::vector<int>& batches) {
  ReadTable reads;
  for (auto& tier : reads) tier.assign(predictor.layers.size(), std::vector<LayerReads>(batches.size()));
  for (size_t l = 0; l < predictor.layers.size(); ++l) {
    const LayerPredictorData& layer = predictor.layers[l];
    const std::vector<double> shares = Quantiles(layer.frequency);
    for (const Tier tier : kAllTiers) {
      if (tier == Tier::kDense) continue;
      const auto& point = layer.neurons.points[static_cast<size_t>(tier)];
      const double factor = point.has_value() ? FactorFor(shares, point->density) : 0.0;
      for (size_t b = 0; b < batches.size(); ++b) {
        LayerReads& of = reads[static_cast<size_t>(tier)][l][b];
        if (point.has_value()) of.up = std::max(point->density, MeanUnion(shares, factor, batches[b]));
        of.down = std::min(of.up, MeanUnion(shares, 1.0, batches[b]));
      }
    }
  }
  return reads;
}

}  // namespace dejavu
