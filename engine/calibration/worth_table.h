// WorthTable: how sure a prediction must be for a neuron to be worth computing. Constant after construction; any
// thread.
#ifndef ENGINE_CALIBRATION_WORTH_TABLE_H_
#define ENGINE_CALIBRATION_WORTH_TABLE_H_

#include <vector>

namespace dejavu {

// The standardised prediction u above which computing a neuron is worth its cost: with z ~ N(u, 1),
//   k E[max(z, 0)^2] = k ((1 + u^2) Phi(u) + u phi(u)) = 1 + Phi(u).
class WorthTable {
 public:
  WorthTable();

  // Infinity: never worth it.
  double Threshold(double k) const;

 private:
  std::vector<double> log_ratio_;  // by u; falls with it
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_WORTH_TABLE_H_
