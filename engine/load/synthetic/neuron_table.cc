// The true pre-activation u of a neuron and its prediction v are normal with correlation kSyntheticCorrelation. The
// neuron is active where u > z and selected where v > t: integrals of the bivariate normal distribution give z from the
// recall, and t for every tier.
#include "engine/load/synthetic/neuron_table.h"

#include <algorithm>
#include <cmath>

namespace dejavu {
namespace {

double NormalDensity(double x) { return std::exp(-0.5 * x * x) * 0.3989422804014327; }

// Where a function that rises on low ... high crosses zero.
template <typename Function>
double Root(double low, double high, const Function& function) {
  for (int i = 0; i < 44; ++i) {
    const double middle = 0.5 * (low + high);
    (function(middle) > 0.0 ? high : low) = middle;
  }
  return 0.5 * (low + high);
}

double InverseTail(double share) {
  return Root(-9.0, 9.0, [=](double x) { return share - NormalTail(x); });
}

// The integral over u > z of density(u) * weight(u - z) * P(v > t | u).
template <typename Weight>
double JointTail(double z, double t, const Weight& weight) {
  constexpr int kPoints = 140;
  constexpr double kReach = 7.0;
  const double step = kReach / kPoints, spread = std::sqrt(1.0 - kSyntheticCorrelation * kSyntheticCorrelation);
  double sum = 0.0;
  for (int i = 0; i < kPoints; ++i) {
    const double u = z + (i + 0.5) * step;
    sum += NormalDensity(u) * weight(u - z) * NormalTail((t - kSyntheticCorrelation * u) / spread);
  }
  return sum * step;
}

double Unweighted(double) { return 1.0; }

SyntheticNeuron MakeNeuron(double balanced_threshold, double recall) {
  SyntheticNeuron n;
  n.z =
      Root(-3.0, 9.0, [&](double z) { return JointTail(z, balanced_threshold, Unweighted) - recall * NormalTail(z); });
  n.active = NormalTail(n.z);
  n.mean = NormalDensity(n.z) - n.z * n.active;
  n.mean_square = (1.0 + n.z * n.z) * n.active - n.z * NormalDensity(n.z);
  for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
    const double wanted = TierRecall(kSyntheticTiers[i], recall) * n.active;
    n.threshold[i] = Root(-9.0, 9.0, [&](double t) { return wanted - JointTail(n.z, t, Unweighted); });
    const double kept = JointTail(n.z, n.threshold[i], [](double x) { return x * x; });
    n.missed[i] = std::max(0.0, n.mean_square - kept);
  }
  return n;
}

// Between x and y.
SyntheticNeuron Mix(const SyntheticNeuron& x, const SyntheticNeuron& y, double share) {
  const auto mix = [=](double a, double b) { return a + share * (b - a); };
  SyntheticNeuron n;
  n.z = mix(x.z, y.z);
  n.active = NormalTail(n.z);
  n.mean = mix(x.mean, y.mean);
  n.mean_square = mix(x.mean_square, y.mean_square);
  for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
    n.threshold[i] = mix(x.threshold[i], y.threshold[i]);
    n.missed[i] = mix(x.missed[i], y.missed[i]);
  }
  return n;
}

}  // namespace

double NormalTail(double x) { return 0.5 * std::erfc(x * 0.7071067811865476); }

double TierRecall(Tier tier, double recall) {
  const double missed = 1.0 - recall;
  return 1.0 - missed * (tier == Tier::kHigh ? 0.4 : tier == Tier::kFast ? 2.0 : 1.0);
}

NeuronTable::NeuronTable(double recall) : first_(InverseTail(kHotShare)), last_(InverseTail(kRarest)) {
  const double step = (last_ - first_) / kIntervals;
  for (int i = 0; i <= kIntervals; ++i) neurons_.push_back(MakeNeuron(first_ + i * step, recall));
}

SyntheticNeuron NeuronTable::Of(double selected) const {
  const double place = std::clamp((InverseTail(selected) - first_) / (last_ - first_) * kIntervals, 0.0,
                                  static_cast<double>(kIntervals));
  const int i = std::min(static_cast<int>(place), kIntervals - 1);
  return Mix(neurons_[i], neurons_[i + 1], place - i);
}

}  // namespace dejavu
