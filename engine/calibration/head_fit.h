// HeadFit: fits what chooses among the heads of one layer. One component per head, from the covariance of the white tap
// with the head's mass. A head costs the rows of Q and of the out-projection that it has. One thread.
#ifndef ENGINE_CALIBRATION_HEAD_FIT_H_
#define ENGINE_CALIBRATION_HEAD_FIT_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/calibration/host_matrix.h"
#include "engine/calibration/layer_fit.h"
#include "engine/calibration/selector_trainer.h"
#include "kernels/backend.h"

namespace dejavu {

class HeadFit {
 public:
  // `x` and `validation_x` [samples, hidden]: white taps of the sample's training and validation rows.
  HeadFit(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options,
          const HostMatrix& x, const HostMatrix& validation_x);

  // In terms of the white tap; a point has rank 0 where computing every head is no worse. Empty: so have all.
  FloatSelector Run(const std::function<bool(double)>& keep_going) const;

 private:
  FloatSelector FromCovariance() const;
  // One for each tier, with biases from how often each head is worth computing.
  void AddPoints(FloatSelector* selector) const;
  float Gain(int64_t sample, int64_t head, double mu) const {
    return static_cast<float>(mu) * weight_ * sample_.head_mass[sample * heads_ + head];
  }
  double Objective(const FloatSelector& selector, const FloatSelector::Point& point) const;

  Backend& dev_;
  const LayerProblem& problem_;
  const LayerSample& sample_;
  const FitOptions& options_;
  const HostMatrix& x_;
  const HostMatrix& validation_x_;
  const int64_t hidden_, neurons_, heads_;
  const float cost_;    // of computing a head, in weight rows
  const float weight_;  // what a Fisher mass of a missed head costs, in the same currency at mu = 1
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_HEAD_FIT_H_
