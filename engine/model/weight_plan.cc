#include "engine/model/weight_plan.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

// Without `scale` a matrix cannot be int8.
DType WeightPlan::TypeFor(DType stored, const Tensor* scale) const {
  if (!dtype_.has_value() || (*dtype_ == DType::kInt8 && scale == nullptr)) return stored;
  return *dtype_;
}

absl::Status WeightPlan::PlanMatrix(const std::string& name, int64_t rows, int64_t cols, const Runs& own,
                                    bool transposed, Tensor* view, Tensor* scale) {
  ASSIGN_OR_RETURN(const StoredTensor* source, names_.Find(name, {rows, cols}));
  PlaceMatrix(*source, own, transposed, view, scale);
  return absl::OkStatus();
}

// `own`: of the rows as they are laid out here.
void WeightPlan::PlaceMatrix(const StoredTensor& source, const Runs& own, bool transposed, Tensor* view,
                             Tensor* scale) {
  const int64_t rows = source.shape[0], cols = source.shape[1];
  layout_.Reserve(view, TypeFor(source.dtype, scale), CountOf(own), transposed ? rows : cols);
  if (view->dtype == DType::kInt8) layout_.Reserve(scale, DType::kFloat32, 1, view->rows);
  if (view->rows == 0) return;
  placements_.push_back(
      {&source, view, transposed ? All(rows) : own, transposed ? own : All(cols), 0, transposed, 0.0f, scale});
}

// The `own` elements, to `view` from `first` on.
absl::Status WeightPlan::PlanVector(const std::string& name, int64_t elements, const Runs& own, Tensor* view,
                                    int64_t first) {
  ASSIGN_OR_RETURN(const StoredTensor* source, names_.Find(name, {elements}));
  if (CountOf(own) > 0) placements_.push_back({source, view, All(1), own, first});
  return absl::OkStatus();
}

// `own`: of the outputs or inputs that are rows here. Inputs are shared out, so everybody has a part of every output:
// the first rank adds the bias.
absl::Status WeightPlan::PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, const Runs& own,
                                    LinearWeights::Layout layout, LinearWeights* linear) {
  const bool transposed = layout == LinearWeights::Layout::kInputRows;
  linear->layout = layout;
  RETURN_IF_ERROR(PlanMatrix(name + ".weight", outputs, inputs, own, transposed, &linear->weight, &linear->scale));
  if (!config_.biases) return absl::OkStatus();
  const Runs biases = !transposed ? own : shard_.first() ? All(outputs) : Runs();
  layout_.Reserve(&linear->bias, DType::kFloat32, 1, CountOf(biases));
  return PlanVector(name + ".bias", outputs, biases, &linear->bias, 0);
}

absl::Status WeightPlan::PlanQkv(const std::string& attention, LinearWeights* qkv) {
  const int64_t hidden = config_.hidden;
  const Runs own = HeadFeatures();
  const int64_t features = CountOf(own);
  const StoredTensor* weights[3] = {};
  const char* const names[3] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) {
    ASSIGN_OR_RETURN(weights[i], names_.Find(absl::StrCat(attention, names[i], ".weight"), {hidden, hidden}));
  }
  // One matrix has one type.
  const bool alike = weights[1]->dtype == weights[0]->dtype && weights[2]->dtype == weights[0]->dtype;
  const DType stored = alike ? weights[0]->dtype : DType::kFloat32;
  layout_.Reserve(&qkv->weight, TypeFor(stored, &qkv->scale), 3 * features, hidden);
  if (qkv->weight.dtype == DType::kInt8) layout_.Reserve(&qkv->scale, DType::kFloat32, 1, 3 * features);
  if (config_.biases) layout_.Reserve(&qkv->bias, DType::kFloat32, 1, 3 * features);
  for (int i = 0; i < 3; ++i) {
    if (features > 0) {
      placements_.push_back(
          {weights[i], &qkv->weight, own, All(hidden), i * features, /*transposed=*/false, 0.0f, &qkv->scale});
    }
    if (config_.biases) {
      RETURN_IF_ERROR(PlanVector(absl::StrCat(attention, names[i], ".bias"), hidden, own, &qkv->bias, i * features));
    }
  }
  return absl::OkStatus();
}

absl::Status WeightPlan::PlanNorm(const std::string& name, NormWeights* norm) {
  const Runs all = All(config_.hidden);
  layout_.Reserve(&norm->weight, DType::kFloat32, 1, config_.hidden);
  layout_.Reserve(&norm->bias, DType::kFloat32, 1, config_.hidden);
  if (config_.affine_norms) {
    RETURN_IF_ERROR(PlanVector(name + ".weight", config_.hidden, all, &norm->weight, 0));
    return PlanVector(name + ".bias", config_.hidden, all, &norm->bias, 0);
  }
  placements_.push_back({nullptr, &norm->weight, All(1), all, 0, false, 1.0f});
  placements_.push_back({nullptr, &norm->bias, All(1), all});
  return absl::OkStatus();
}

absl::Status WeightPlan::PlanLayer(int32_t l, LayerWeights* layer) {
  using Layout = LinearWeights::Layout;
  const std::string at = absl::StrCat("layers.", l, ".");
  RETURN_IF_ERROR(PlanNorm(at + "self_attn_layer_norm", &layer->attention_norm));
  RETURN_IF_ERROR(PlanQkv(at + "self_attn.", &layer->qkv));
  RETURN_IF_ERROR(PlanLinear(at + "self_attn.out_proj", config_.hidden, config_.hidden, HeadFeatures(),
                             Layout::kInputRows, &layer->out));
  RETURN_IF_ERROR(PlanNorm(at + "final_layer_norm", &layer->mlp_norm));
  const Runs neurons = shard_.NeuronRuns(l);
  RETURN_IF_ERROR(PlanLinear(at + "fc1", config_.ffn, config_.hidden, neurons, Layout::kOutputRows, &layer->mlp.up));
  return PlanLinear(at + "fc2", config_.hidden, config_.ffn, neurons, Layout::kInputRows, &layer->mlp.down);
}

absl::Status WeightPlan::Make(OptWeights* w) {
  ASSIGN_OR_RETURN(const WeightNames::Ends ends, names_.FindEnds());
  RETURN_IF_ERROR(names_.CheckLayers());
  const auto whole = [&](const std::string& name, int64_t rows, int64_t cols, Tensor* view, Tensor* scale) {
    return PlanMatrix(name, rows, cols, All(rows), /*transposed=*/false, view, scale);
  };
  PlaceMatrix(*ends.embedding, {shard_.vocab}, /*transposed=*/false, &w->token_embedding.weight,
              &w->token_embedding.scale);
  if (ends.head != nullptr) {
    PlaceMatrix(*ends.head, {shard_.vocab}, /*transposed=*/false, &w->head.weight, &w->head.scale);
  }
  RETURN_IF_ERROR(whole("embed_positions.weight", config_.context + kPositionOffset, config_.hidden,
                        &w->position_embedding, nullptr));
  if (config_.embed != config_.hidden) {
    RETURN_IF_ERROR(
        whole("project_in.weight", config_.hidden, config_.embed, &w->project_in.weight, &w->project_in.scale));
    RETURN_IF_ERROR(
        whole("project_out.weight", config_.embed, config_.hidden, &w->project_out.weight, &w->project_out.scale));
  }
  w->layers.resize(config_.layers);
  for (int32_t l = 0; l < config_.layers; ++l) RETURN_IF_ERROR(PlanLayer(l, &w->layers[l]));
  if (config_.final_norm) RETURN_IF_ERROR(PlanNorm("final_layer_norm", &w->final_norm));
  for (const WeightPlacement& p : placements_) {
    if (p.source != nullptr) source_bytes_ += p.elements() * SizeOf(p.source->dtype);
  }
  return absl::OkStatus();
}

}  // namespace dejavu
