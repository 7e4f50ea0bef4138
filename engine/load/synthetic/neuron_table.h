// What follows for a synthetic neuron from how often BALANCED selects it: when it is active, what its activation is
// worth, and the thresholds of the predicted tiers. Plain data; any thread.
#ifndef ENGINE_LOAD_SYNTHETIC_NEURON_TABLE_H_
#define ENGINE_LOAD_SYNTHETIC_NEURON_TABLE_H_

#include <array>
#include <cstddef>
#include <vector>

#include "engine/sparsity.h"

namespace dejavu {

inline constexpr std::array<Tier, 3> kSyntheticTiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

inline constexpr double kHotShare = 0.9;               // how often a hot neuron is selected
inline constexpr double kRarest = 3e-7;                // and the rarest
inline constexpr double kSyntheticCorrelation = 0.95;  // of true and predicted pre-activations

double NormalTail(double x);  // P(N(0, 1) > x)

// The share of the active neurons that `tier` selects, where BALANCED selects `recall` of them.
double TierRecall(Tier tier, double recall);

// In units of its pre-activation's deviation.
struct SyntheticNeuron {
  double z = 0.0;                                             // active above
  double active = 0.0;                                        // how often that is
  double mean = 0.0;                                          // of the activation
  double mean_square = 0.0;                                   // of the activation
  std::array<double, kSyntheticTiers.size()> threshold = {};  // of the prediction, by tier
  std::array<double, kSyntheticTiers.size()> missed = {};     // mean square of what is not selected
};

// Neurons by the threshold of BALANCED, tabulated. Making one takes some 10 ms.
class NeuronTable {
 public:
  explicit NeuronTable(double recall);

  // `selected` is between kRarest and kHotShare.
  SyntheticNeuron Of(double selected) const;

 private:
  static constexpr int kIntervals = 48;

  const double first_, last_;  // thresholds of BALANCED: of the most frequent, and of the rarest neuron
  std::vector<SyntheticNeuron> neurons_;
};

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_NEURON_TABLE_H_
