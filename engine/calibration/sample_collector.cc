#include "engine/calibration/sample_collector.h"

#include <algorithm>

namespace dejavu {
namespace {

HostMatrix CopyOf(const Tensor& x) {
  HostMatrix m(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row<float>(r), x.cols, m.row(r));
  return m;
}

}  // namespace

void SampleCollector::OnInput(int32_t layer, Tap at, Tensor x) {
  if (TapOfLayer(tap_, layer) == at) KeepTap(layer, x);
  if (tap_ == Tap::kPreviousLayer && at == Tap::kMlpNorm) KeepTap(layer + 1, x);
  if (at == Tap::kMlpNorm) KeepInput(layer, x);
}

void SampleCollector::OnContext(int32_t layer, Tensor context) {
  LayerSample* const sample = SampleOf(layer);
  if (sample == nullptr || metrics_.empty()) return;
  const HeadMetric& metric = metrics_[static_cast<size_t>(sample - samples_.data())];
  std::vector<float>& masses = validation_ ? sample->validation_head_mass : sample->head_mass;
  for (int64_t r = 0; r < context.rows; ++r) {
    for (int32_t h = 0; h < metric.heads(); ++h) {
      masses.push_back(static_cast<float>(metric.Mass(h, context.row<float>(r))));
    }
  }
}

LayerSample* SampleCollector::SampleOf(int32_t layer) {
  const auto found = std::find(layers_.begin(), layers_.end(), layer);
  return found == layers_.end() ? nullptr : &samples_[found - layers_.begin()];
}

void SampleCollector::KeepTap(int32_t layer, const Tensor& x) {
  LayerSample* const sample = SampleOf(layer);
  if (sample == nullptr) return;
  HalfRows& rows = validation_ ? sample->validation_taps : sample->taps;
  for (int64_t r = 0; r < x.rows; ++r) rows.Append(x.row<float>(r));
  // The look-ahead tap is seen one layer early: it waits here for its own layer's input.
  if (!validation_) tap_now_[layer % 2] = CopyOf(x);
}

void SampleCollector::KeepInput(int32_t layer, const Tensor& x) {
  LayerSample* const sample = SampleOf(layer);
  if (sample == nullptr) return;
  HalfRows& rows = validation_ ? sample->validation_inputs : sample->inputs;
  for (int64_t r = 0; r < x.rows; ++r) rows.Append(x.row<float>(r));
  if (validation_) return;
  const HostMatrix& tap = tap_now_[layer % 2];
  const HostMatrix turned = Transposed(tap);
  HostMatrix product(tap.cols, tap.cols);
  const auto add = [&](const Tensor& with, HostMatrix* sum) {
    Multiply(dev_, turned.tensor(), with, product.tensor());
    for (size_t i = 0; i < product.values.size(); ++i) sum->values[i] += product.values[i];
  };
  add(tap.tensor(), &sample->tap_tap);
  add(x, &sample->tap_input);
  for (int64_t r = 0; r < tap.rows; ++r) {
    for (int64_t c = 0; c < tap.cols; ++c) sample->tap_sum[c] += tap.row(r)[c];
  }
  sample->tokens += tap.rows;
}

}  // namespace dejavu
