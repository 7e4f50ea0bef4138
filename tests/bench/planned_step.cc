#include "tests/bench/planned_step.h"

#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/generator.h"
#include "kernels/base/round.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/bench/pretended_device.h"

namespace dejavu {
namespace {

constexpr int32_t kBlockTokens = 16;

// Ranks and operating points are the generator's; numbers do not matter.
PredictorData EmptyPredictor(const SyntheticModel& model) {
  PredictorData data = PredictorOutline(model);
  const int64_t hidden = model.config.hidden, ffn = model.config.ffn;
  for (LayerPredictorData& layer : data.layers) {
    SelectorData& neurons = layer.neurons;
    neurons.a.resize(neurons.rank * hidden);
    neurons.a_scale.resize(neurons.rank);
    neurons.b.resize(neurons.rank * ffn);
    for (auto& point : neurons.points) {
      if (point.has_value()) point->thresholds.resize(ffn);
    }
    layer.worth.resize(ffn);
    layer.frequency.resize(ffn);
  }
  return data;
}

class ExpectedState final : public cuda::LaunchState {
 public:
  ExpectedState(const WeightUses& uses, std::vector<LayerReads> reads, double ffn, int32_t position, int32_t rank)
      : uses_(uses), reads_(std::move(reads)), ffn_(ffn), position_(position), rank_(rank) {}

  int32_t Selected(const void* weight, const int32_t*) override { return Round(Of(weight).up); }
  int32_t Active(const void* weight, const int32_t*) override { return Round(Of(weight).down); }
  int32_t Position(const int32_t*) override { return position_; }
  int32_t LargestRank(const cuda::SelectParams&) override { return rank_; }

 private:
  const LayerReads& Of(const void* weight) const { return reads_[uses_.at(weight).layer]; }
  int32_t Round(double share) const { return static_cast<int32_t>(std::lround(share * ffn_)); }

  const WeightUses& uses_;
  const std::vector<LayerReads> reads_;  // by layer
  const double ffn_;
  const int32_t position_, rank_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PlannedStep>> PlannedStep::Create(const std::string& model, const std::string& dtype,
                                                                 int slots, int context) {
  if (!IsSynthetic(model)) {
    return absl::InvalidArgumentError(absl::StrCat(model, ": only synthetic models can be calculated"));
  }
  ASSIGN_OR_RETURN(const std::optional<DType> type, ParseWeights(dtype));
  ASSIGN_OR_RETURN(const SyntheticModel synthetic, ParseSynthetic(model));
  std::unique_ptr<PlannedStep> planned(new PlannedStep(synthetic, context));
  RETURN_IF_ERROR(planned->Make(type.value_or(DType::kBFloat16), slots));
  return planned;
}

absl::Status PlannedStep::Make(DType dtype, int slots) {
  const OptConfig& config = model_.config;
  const auto blocks = static_cast<int32_t>(DivideUp(context_ + 1, kBlockTokens));
  trace_ = std::make_unique<LaunchTrace>(PretendedModule());
  ASSIGN_OR_RETURN(backend_, MakeCudaBackend(trace_->module(), 0));
  alone_ = SingleRank();
  ASSIGN_OR_RETURN(weights_, OptWeights::Allocate(config, shard_, dtype, *backend_));
  ASSIGN_OR_RETURN(kv_,
                   KvCache::Create(*backend_, config, slots * blocks, kBlockTokens, DType::kFloat16, config.heads));
  const PredictorData data = EmptyPredictor(model_);
  rank_ = data.layers[0].neurons.rank;
  ASSIGN_OR_RETURN(predictor_, Predictor::Create(&data, config, shard_, *backend_, slots, /*max_audits=*/0));
  batch_ = std::make_unique<Batch>(slots, slots, slots, blocks);
  std::iota(batch_->block_table.begin(), batch_->block_table.end(), 0);
  ASSIGN_OR_RETURN(opt_,
                   OptModel::Create(config, shard_, weights_, *backend_, *alone_, *predictor_, *batch_, config.vocab));
  return absl::OkStatus();
}

std::vector<LaunchKind> PlannedStep::Kinds(Tier tier, int batch) {
  SparsityParams sparsity;
  sparsity.tier = tier;
  batch_->Clear();
  for (int slot = 0; slot < batch; ++slot) batch_->AddDecodeRow(slot, context_, 0, /*wants_logits=*/true, sparsity);
  batch_->draws.assign(batch, {});  // what is most likely
  std::vector<int32_t> drawn(batch);
  const auto step =
      trace_->Of([&] { opt_->Forward(*batch_, kv_, {.logits = nullptr, .drawn = drawn.data(), .counts = nullptr}); });
  const ReadTable table = ExpectedReads(model_, {batch});
  std::vector<LayerReads> reads;
  for (const auto& layer : table[static_cast<size_t>(tier)]) reads.push_back(layer[0]);
  const WeightUses uses = UsesOf(weights_);
  ExpectedState state(uses, std::move(reads), model_.config.ffn, context_, rank_);
  return KindsOf(step, uses, state);
}

}  // namespace dejavu
