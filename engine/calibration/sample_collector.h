// SampleCollector: watches the model and keeps, of the layers of one group, what LayerSample wants. One thread.
#ifndef ENGINE_CALIBRATION_SAMPLE_COLLECTOR_H_
#define ENGINE_CALIBRATION_SAMPLE_COLLECTOR_H_

#include <cstdint>
#include <vector>

#include "engine/calibration/fisher.h"
#include "engine/calibration/host_matrix.h"
#include "engine/calibration/layer_fit.h"
#include "engine/model/opt_model.h"
#include "engine/model/predictor_data.h"
#include "kernels/backend.h"

namespace dejavu {

// The tap of a layer where predictors read `tap`: nothing comes before layer 0.
inline Tap TapOfLayer(Tap tap, int32_t layer) {
  return layer == 0 && tap == Tap::kPreviousLayer ? Tap::kAttentionNorm : tap;
}

class SampleCollector final : public ModelObserver {
 public:
  // `samples`, and `metrics` unless it is empty (heads are left alone), belong to `layers`. All outlive it.
  SampleCollector(Backend& backend, Tap tap, const std::vector<int32_t>& layers, std::vector<LayerSample>* samples,
                  const std::vector<HeadMetric>* metrics)
      : dev_(backend), tap_(tap), layers_(layers), samples_(*samples), metrics_(*metrics) {}

  // From now on the text is validation's, to which nothing is fitted, or again training's.
  void set_validation(bool validation) { validation_ = validation; }

  void OnInput(int32_t layer, Tap at, Tensor x) override;
  void OnContext(int32_t layer, Tensor context) override;

 private:
  LayerSample* SampleOf(int32_t layer);
  void KeepTap(int32_t layer, const Tensor& x);
  void KeepInput(int32_t layer, const Tensor& x);

  Backend& dev_;
  const Tap tap_;
  const std::vector<int32_t>& layers_;
  std::vector<LayerSample>& samples_;
  const std::vector<HeadMetric>& metrics_;
  bool validation_ = false;
  HostMatrix tap_now_[2];  // [rows, hidden] by the layer's parity
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_SAMPLE_COLLECTOR_H_
