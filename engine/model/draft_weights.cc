#include "engine/model/draft_weights.h"

#include <algorithm>
#include <vector>

#include "engine/model/weight_convert.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

void Reserve(DeviceLayout* layout, int64_t rows, int64_t cols, LinearWeights* linear) {
  layout->Reserve(&linear->weight, DType::kInt8, rows, cols);
  layout->Reserve(&linear->scale, DType::kFloat32, 1, cols > 0 ? rows : 0);
}

// Stripe by stripe over the host.
void Quantise(Backend& backend, const Tensor& from, LinearWeights* to) {
  if (from.rows == 0) return;
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / (from.cols * SizeOf(from.dtype)), 1, from.rows);
  std::vector<char> stripe(stripe_rows * from.cols * SizeOf(from.dtype));
  std::vector<float> wide(stripe_rows * from.cols), scales(from.rows);
  std::vector<int8_t> narrow(wide.size());
  for (int64_t first = 0; first < from.rows; first += stripe_rows) {
    const int64_t rows = std::min(stripe_rows, from.rows - first);
    backend.Download(stripe.data(), from.Rows(first, rows));
    backend.Synchronize();
    WidenValues(stripe.data(), from.dtype, rows * from.cols, wide.data());
    for (int64_t r = 0; r < rows; ++r) {
      const float* const row = wide.data() + r * from.cols;
      const float scale = scales[first + r] = Int8Scale(LargestMagnitude(row, from.cols));
      QuantiseRow(row, from.cols, Int8Inverse(scale), narrow.data() + r * from.cols);
    }
    backend.Upload(to->weight.Rows(first, rows), narrow.data());
  }
  backend.Upload(to->scale, scales.data());
  backend.Synchronize();
}

}  // namespace

absl::StatusOr<std::unique_ptr<DraftWeights>> DraftWeights::Create(const OptWeights& weights, Backend& backend,
                                                                   const LoadProgress& progress) {
  CHECK(weights.dtype() != DType::kInt8) << "no drafts are cheaper than int8";
  std::unique_ptr<DraftWeights> draft(new DraftWeights);
  OptWeights& w = draft->weights_;
  w.token_embedding = weights.token_embedding;
  w.position_embedding = weights.position_embedding;
  w.project_in = weights.project_in;
  w.project_out = weights.project_out;
  w.layers = weights.layers;
  w.final_norm = weights.final_norm;
  w.head = weights.head;
  DeviceLayout layout;
  for (LayerWeights& layer : w.layers) {
    for (LinearWeights* linear : {&layer.qkv, &layer.out}) {
      Reserve(&layout, linear->weight.rows, linear->weight.cols, linear);
    }
  }
  Reserve(&layout, w.head.weight.rows, w.head.weight.cols, &w.head);
  ASSIGN_OR_RETURN(draft->storage_, layout.Allocate(backend));
  int64_t done = 0;
  const auto quantise = [&](const LinearWeights& from, LinearWeights* to) -> absl::Status {
    Quantise(backend, from.weight, to);
    done += to->weight.bytes() + to->scale.bytes();
    if (progress && !progress(done, draft->bytes())) return absl::CancelledError("loading was cancelled");
    return absl::OkStatus();
  };
  for (size_t l = 0; l < w.layers.size(); ++l) {
    RETURN_IF_ERROR(quantise(weights.layers[l].qkv, &w.layers[l].qkv));
    RETURN_IF_ERROR(quantise(weights.layers[l].out, &w.layers[l].out));
  }
  RETURN_IF_ERROR(quantise(weights.head, &w.head));
  return draft;
}

int64_t DraftWeights::Measure(const OptConfig& config, const Shard& shard) {
  DeviceLayout layout;
  const int64_t features = int64_t{shard.heads.count} * config.head_dim;
  std::vector<LinearWeights> linears(2 * config.layers + 1);
  for (int32_t l = 0; l < config.layers; ++l) {
    Reserve(&layout, 3 * features, config.hidden, &linears[2 * l]);
    Reserve(&layout, features, config.hidden, &linears[2 * l + 1]);
  }
  Reserve(&layout, shard.vocab.count, config.embed, &linears.back());
  return layout.bytes();
}

}  // namespace dejavu
