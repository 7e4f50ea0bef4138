#include "engine/model/predictor.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"
#include "kernels/draw.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

int64_t Padded(int64_t outputs) { return (outputs + kSelectorPadding - 1) / kSelectorPadding * kSelectorPadding; }

// Stage B and thresholds of the outputs `ids`, of `all`, as the device wants them: outputs padded, thresholds of the
// padding +infinity.
void PackSelector(const SelectorData& data, int64_t all, const std::vector<int32_t>& ids, std::vector<int8_t>* b,
                  std::vector<uint16_t>* thresholds) {
  const auto outputs = static_cast<int64_t>(ids.size()), padded = Padded(outputs);
  b->assign(data.rank * padded, 0);
  for (int64_t k = 0; k < data.rank; ++k) {
    for (int64_t j = 0; j < outputs; ++j) (*b)[k * padded + j] = data.b[k * all + ids[j]];
  }
  thresholds->clear();
  for (const auto& point : data.points) {
    if (!point.has_value()) continue;
    for (int64_t j = 0; j < padded; ++j) {
      thresholds->push_back(j < outputs ? Float16FromFloat(point->thresholds[ids[j]]) : kFloat16Infinity);
    }
  }
}

int32_t PointsOf(const SelectorData& data) {
  return static_cast<int32_t>(
      std::count_if(data.points.begin(), data.points.end(), [](const auto& point) { return point.has_value(); }));
}

template <typename... Values>
uint64_t HashOf(uint64_t seed, Values... values) {
  for (const int64_t value : {int64_t{values}...}) seed = MixBits(seed + kGoldenRatio + static_cast<uint64_t>(value));
  return seed;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Predictor>> Predictor::Create(const PredictorData* data, const ModelShape& shape,
                                                             const Shard& shard, Backend& backend, int32_t max_rows,
                                                             int32_t max_audits) {
  std::unique_ptr<Predictor> predictor(new Predictor(shape, shard, backend));
  predictor->layers_.resize(shape.layers);
  for (Layer& layer : predictor->layers_) {
    layer.heads.outputs = shard.heads.count;
    layer.neurons.outputs = shard.neuron_count;
    for (Selector* selector : {&layer.heads, &layer.neurons}) {
      selector->point_of_tier.fill(kSelectEverything);
      selector->on.fill(true);
    }
  }
  if (data != nullptr) RETURN_IF_ERROR(predictor->Load(*data, shard));
  RETURN_IF_ERROR(predictor->AllocateStep(max_rows, max_audits));
  return predictor;
}

absl::Status Predictor::Load(const PredictorData& data, const Shard& shard) {
  CHECK(data.layers.size() == layers_.size()) << data.layers.size() << " layers for " << layers_.size();
  DeviceLayout layout;
  for (size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    const LayerPredictorData& from = data.layers[l];
    layer.tap = from.tap;
    layer.heads.rank = heads_ > 0 ? from.heads.rank : 0;
    layer.neurons.rank = from.neurons.rank;
    const int32_t ranks = layer.heads.rank + layer.neurons.rank;
    if (ranks == 0) continue;
    layout.Reserve(&layer.a, DType::kInt8, ranks, shape_.hidden);
    layout.Reserve(&layer.a_scale, DType::kFloat32, 1, ranks);
    layout.Reserve(&layer.worth, DType::kFloat32, 1, neurons_);
    const auto reserve = [&](const SelectorData& selector, Selector* to) {
      to->weights.outputs = to->outputs;
      if (to->rank == 0) return;
      to->SetPoints(selector);
      if (to->point_ranks.empty()) return;
      layout.Reserve(&to->weights.b, DType::kInt8, selector.rank, Padded(to->outputs));
      layout.Reserve(&to->weights.thresholds, DType::kFloat16, PointsOf(selector), Padded(to->outputs));
      layout.Reserve(&to->weights.ranks, DType::kInt32, 1, PointsOf(selector));
    };
    reserve(from.heads, &layer.heads);
    reserve(from.neurons, &layer.neurons);
  }
  ASSIGN_OR_RETURN(storage_, layout.Allocate(dev_));
  Fill(data, shard);
  return absl::OkStatus();
}

void Predictor::Selector::SetPoints(const SelectorData& data) {
  point_of_tier.fill(kSelectEverything);
  point_ranks.clear();
  for (size_t tier = 0; tier < kAllTiers.size(); ++tier) {
    if (!data.points[tier].has_value()) continue;
    point_of_tier[tier] = static_cast<int32_t>(point_ranks.size());
    point_ranks.push_back(data.points[tier]->rank);
  }
}

absl::Status Predictor::Reload(const PredictorData& data, const Shard& shard) {
  CHECK(data.layers.size() == layers_.size()) << data.layers.size() << " layers for " << layers_.size();
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    const LayerPredictorData& from = data.layers[l];
    if (from.tap != layer.tap) {
      return absl::FailedPreconditionError(
          absl::StrCat("layer ", l, " reads ", Name(from.tap), "; the loaded one ", Name(layer.tap)));
    }
    const auto fits = [&](const char* what, const SelectorData& selector, const Selector& to) {
      if (to.outputs == 0) return absl::OkStatus();
      if (selector.rank > to.rank) {
        return absl::FailedPreconditionError(absl::StrCat("layer ", l, " has ", selector.rank, " components for ", what,
                                                          "; there is room for ", to.rank));
      }
      const int32_t points = selector.rank > 0 ? PointsOf(selector) : 0;
      if (points <= to.weights.thresholds.rows) return absl::OkStatus();
      return absl::FailedPreconditionError(absl::StrCat("layer ", l, " has ", points, " operating points for ", what,
                                                        "; there is room for ", to.weights.thresholds.rows));
    };
    RETURN_IF_ERROR(fits("neurons", from.neurons, layer.neurons));
    RETURN_IF_ERROR(fits("heads", from.heads, layer.heads));
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    const auto set = [](const SelectorData& selector, Selector* to) {
      to->on.fill(true);
      if (to->rank > 0) to->SetPoints(selector.rank > 0 ? selector : SelectorData());
    };
    set(data.layers[l].neurons, &layers_[l].neurons);
    set(data.layers[l].heads, &layers_[l].heads);
  }
  dev_.Synchronize();
  Fill(data, shard);
  return absl::OkStatus();
}

// What there is room for and `data` does not fill is never read.
void Predictor::Fill(const PredictorData& data, const Shard& shard) {
  std::vector<int8_t> b;
  std::vector<uint16_t> thresholds;
  std::vector<int32_t> own_heads(heads_), own_neurons(neurons_);
  std::vector<float> worth(neurons_);
  std::iota(own_heads.begin(), own_heads.end(), shard.heads.first);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    const LayerPredictorData& from = data.layers[l];
    if (layer.a.empty() || from.heads.rank + from.neurons.rank == 0) continue;
    int64_t row = 0;
    for (int32_t j = 0; j < neurons_; ++j) {
      own_neurons[j] = shard.neuron(static_cast<int32_t>(l), j);
      worth[j] = from.worth[own_neurons[j]];
    }
    dev_.Upload(layer.worth, worth.data());
    const auto upload = [&](const SelectorData& selector, int32_t all, const std::vector<int32_t>& own,
                            const Selector& to) {
      if (to.rank == 0) return;
      const int64_t first = row;
      row += to.rank;
      if (selector.rank == 0) return;
      dev_.Upload(layer.a.Rows(first, selector.rank), selector.a.data());
      dev_.Upload(layer.a_scale.Cols(first, selector.rank), selector.a_scale.data());
      if (to.point_ranks.empty()) return;
      const auto points = static_cast<int64_t>(to.point_ranks.size());
      PackSelector(selector, all, own, &b, &thresholds);
      dev_.Upload(to.weights.b.Rows(0, selector.rank), b.data());
      dev_.Upload(to.weights.thresholds.Rows(0, points), thresholds.data());
      dev_.Upload(to.weights.ranks.Cols(0, points), to.point_ranks.data());
    };
    upload(from.heads, shape_.heads, own_heads, layer.heads);
    upload(from.neurons, shape_.ffn, own_neurons, layer.neurons);
  }
  dev_.Synchronize();
}

absl::Status Predictor::AllocateStep(int32_t max_rows, int32_t max_audits) {
  max_rows_ = max_rows;
  max_audits_ = max_audits;
  int64_t rank = 0;
  for (const Layer& layer : layers_) rank = std::max<int64_t>(rank, layer.heads.rank + layer.neurons.rank);
  predicts_ = rank > 0;
  const int64_t audits = predicts_ ? max_audits : 0, rows = predicts_ ? max_rows : 0;
  const int64_t neuron_words = Padded(neurons_) / 32, head_words = Padded(heads_) / 32;
  DeviceLayout floats, ints;
  floats.Reserve(&coordinates_, DType::kFloat32, rows, rank);
  floats.Reserve(&audit_coordinates_, DType::kFloat32, audits, rank);
  floats.Reserve(&audit_x_, DType::kFloat32, audits, shape_.hidden);
  floats.Reserve(&audit_hidden_, DType::kFloat32, audits, neurons_);
  ints.Reserve(&neuron_list_, DType::kInt32, 1, predicts_ ? neurons_ : 0);
  ints.Reserve(&head_list_, DType::kInt32, 1, predicts_ ? heads_ : 0);
  ints.Reserve(&audit_list_, DType::kInt32, 1, predicts_ ? neurons_ : 0);
  ints.Reserve(&audit_count_, DType::kInt32, 1, 1);
  ints.Reserve(&neuron_masks_, DType::kInt32, rows, neuron_words);
  ints.Reserve(&head_masks_, DType::kInt32, rows, head_words);
  ints.Reserve(&audit_masks_, DType::kInt32, audits, neuron_words);
  ints.Reserve(&audit_selected_, DType::kInt32, 1, audits);
  ints.Reserve(&counts_, DType::kInt32, 1, CountWords(max_rows, max_rows, max_audits));
  ASSIGN_OR_RETURN(scratch_floats_, floats.Allocate(dev_));
  ASSIGN_OR_RETURN(scratch_ints_, ints.Allocate(dev_));
  return absl::OkStatus();
}

bool Predictor::HasNeuronPoint(int32_t layer, Tier tier) const {
  return layers_[layer].neurons.point_of_tier[Index(tier)] != kSelectEverything;
}

void Predictor::GetSwitches(std::vector<int32_t>* words) const {
  for (size_t l = 0; l < layers_.size(); ++l) {
    int32_t word = 0;
    for (size_t tier = 0; tier < kAllTiers.size(); ++tier) {
      word |= (layers_[l].neurons.on[tier] << (2 * tier)) | (layers_[l].heads.on[tier] << (2 * tier + 1));
    }
    (*words)[l] = word;
  }
}

void Predictor::SetSwitches(const std::vector<int32_t>& words) {
  CHECK(words.size() == layers_.size()) << words.size() << " words for " << layers_.size() << " layers";
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (size_t tier = 0; tier < kAllTiers.size(); ++tier) {
      layers_[l].neurons.on[tier] = (words[l] >> (2 * tier) & 1) != 0;
      layers_[l].heads.on[tier] = (words[l] >> (2 * tier + 1) & 1) != 0;
    }
  }
}

int64_t Predictor::input_words() const {
  if (!predicts_) return 0;
  return 2 * StepInputs::WordsOf(shape_.layers, max_rows_) + StepInputs::WordsOf(shape_.layers, max_audits_) +
         StepInputs::WordsOf(1, max_rows_) + StepInputs::WordsOf(1, max_audits_);
}

// How many words of counts a step brings; without a predictor there are none but those of the MLP itself.
int64_t Predictor::CountWords(int64_t decode_rows, int64_t rows, int64_t audits) const {
  const int64_t selected = !predicts_ ? 0 : 2 + audits * kAuditFields + 2 * rows;
  return shape_.layers * (decode_rows + 1 + selected);
}

void Predictor::PlaceCounts() {
  int64_t word = 0;
  const auto place = [&](DType dtype, int64_t cols) {
    const Tensor at = counts_.Cols(word, shape_.layers * cols);
    word += at.cols;
    return Tensor{at.data, dtype, shape_.layers, cols, cols};
  };
  active_ = place(DType::kInt32, decode_rows_ + 1);
  if (!predicts_) return;
  union_selected_ = place(DType::kInt32, 1);
  union_heads_ = place(DType::kInt32, 1);
  audit_results_ = place(DType::kFloat32, audits_ * kAuditFields);
  selected_ = place(DType::kInt32, rows_);
  head_counts_ = place(DType::kInt32, rows_);
}

void Predictor::BeginStep(const Batch& batch, StepInputs& inputs) {
  rows_ = batch.rows();
  decode_rows_ = batch.decode_rows;
  audits_ = static_cast<int32_t>(batch.audit_rows.size());
  CHECK(rows_ <= max_rows_ && audits_ <= max_audits_) << rows_ << " rows, " << audits_ << " audits";
  bool any = false;
  step_bytes_ = 0;
  step_key_ = HashOf(0, rows_, decode_rows_, audits_);
  for (size_t l = 0; l < layers_.size(); ++l) {
    PlanLayer(batch, l);
    any = any || layers_[l].rank_heads > 0 || layers_[l].rank_neurons > 0;
  }
  if (any) AddInputs(batch, inputs);
  PlaceCounts();
}

// An audited row's own prediction is computed even where it is switched off, so that a layer can be seen to recover.
void Predictor::AddInputs(const Batch& batch, StepInputs& inputs) {
  const StepInputs::Array neurons = inputs.Add(shape_.layers, rows_), heads = inputs.Add(shape_.layers, rows_);
  const StepInputs::Array audits = inputs.Add(shape_.layers, audits_), strict = inputs.Add(1, rows_);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    for (int32_t r = 0; r < rows_; ++r) {
      const bool decodes = r < decode_rows_;
      neurons.values[l * rows_ + r] = decodes ? layer.neurons.PointFor(batch.tiers[r]) : kSelectEverything;
      heads.values[l * rows_ + r] = decodes ? layer.heads.PointFor(batch.tiers[r]) : kSelectEverything;
    }
    for (int32_t i = 0; i < audits_; ++i) {
      audits.values[l * audits_ + i] = layer.neurons.point_of_tier[Index(batch.tiers[batch.audit_rows[i]])];
    }
  }
  for (int32_t r = 0; r < rows_; ++r) strict.values[r] = r < decode_rows_ && batch.strict[r] ? 1 : 0;
  neuron_points_ = neurons.on_device;
  head_points_ = heads.on_device;
  audit_points_ = audits.on_device;
  strict_ = strict.on_device;
  audit_rows_ = inputs.Add(batch.audit_rows);
}

// Rows of prefill compute everything.
void Predictor::PlanLayer(const Batch& batch, size_t l) {
  Layer& layer = layers_[l];
  layer.rank_heads = layer.rank_neurons = 0;
  layer.selects_neurons = false;
  if (layer.a.empty()) return;
  for (int32_t r = 0; r < decode_rows_; ++r) {
    const int32_t point = layer.neurons.PointFor(batch.tiers[r]);
    if (point != kSelectEverything) {
      layer.selects_neurons = true;
      layer.rank_neurons = std::max(layer.rank_neurons, layer.neurons.point_ranks[point]);
    }
    if (layer.heads.PointFor(batch.tiers[r]) != kSelectEverything) layer.rank_heads = layer.heads.rank;
  }
  for (const int32_t row : batch.audit_rows) {
    const int32_t point = layer.neurons.point_of_tier[Index(batch.tiers[row])];
    if (point != kSelectEverything) {
      layer.rank_neurons = std::max(layer.rank_neurons, layer.neurons.point_ranks[point]);
    }
  }
  step_key_ = HashOf(step_key_, layer.rank_heads, layer.rank_neurons, layer.selects_neurons);
  // Stage A's rows are the heads', then the neurons': what is needed is one run of rows.
  const int32_t first = layer.rank_heads > 0 ? 0 : layer.heads.rank;
  const int32_t count = layer.rank_neurons > 0 ? layer.heads.rank + layer.rank_neurons - first : layer.rank_heads;
  layer.stage_a.weight = layer.a.Rows(first, count);
  layer.stage_a.scale = layer.a_scale.Cols(first, count);
  step_bytes_ += layer.stage_a.weight.bytes() + layer.rank_neurons * layer.neurons.weights.b.cols +
                 layer.rank_heads * layer.heads.weights.b.cols;
}

// The heads' or the neurons' columns of what stage A has computed.
Tensor Predictor::Coordinates(const Layer& layer, bool heads, int64_t rows) const {
  const int64_t first = heads || layer.rank_heads == 0 ? 0 : layer.heads.rank;
  return coordinates_.Rows(0, rows).Cols(first, heads ? layer.rank_heads : layer.rank_neurons);
}

Ride Predictor::StageA(int32_t layer, Tap at) {
  if (at == Tap::kPreviousLayer) ++layer;
  if (layer >= shape_.layers) return {};
  const Layer& l = layers_[layer];
  if (l.tap != at || (l.rank_heads == 0 && l.rank_neurons == 0)) return {};
  return {coordinates_.Rows(0, rows_).Cols(0, l.stage_a.weight.rows), &l.stage_a};
}

bool Predictor::SelectsHeads(int32_t layer) const { return layers_[layer].rank_heads > 0; }

Selection Predictor::Heads(int32_t layer) {
  const Layer& l = layers_[layer];
  if (l.rank_heads == 0) return {};
  const Selection heads = {head_list_, union_heads_.Rows(layer, 1), head_masks_.Rows(0, rows_), {}};
  dev_.Select(heads, head_counts_.Rows(layer, 1), Coordinates(l, /*heads=*/true, rows_), l.heads.weights,
              head_points_.Rows(layer, 1));
  return heads;
}

Selection Predictor::Neurons(int32_t layer) {
  const Layer& l = layers_[layer];
  if (!l.selects_neurons) return {};
  const Selection neurons = {neuron_list_, union_selected_.Rows(layer, 1), neuron_masks_.Rows(0, rows_), strict_};
  dev_.Select(neurons, selected_.Rows(layer, 1), Coordinates(l, /*heads=*/false, rows_), l.neurons.weights,
              neuron_points_.Rows(layer, 1));
  return neurons;
}

void Predictor::Audit(int32_t layer, Tensor x, const LinearWeights& up) {
  const Layer& l = layers_[layer];
  if (audits_ == 0 || l.rank_neurons == 0) return;
  const Tensor ids = audit_rows_, a = audit_coordinates_.Rows(0, audits_).Cols(0, l.rank_neurons);
  const Tensor rows = audit_x_.Rows(0, audits_);
  dev_.GatherRows(a, Coordinates(l, /*heads=*/false, rows_), ids);
  dev_.GatherRows(rows, x, ids);
  const Selection predicted = {audit_list_, audit_count_, audit_masks_.Rows(0, audits_), {}};
  dev_.Select(predicted, audit_selected_.Cols(0, audits_), a, l.neurons.weights, audit_points_.Rows(layer, 1));
  const Tensor results = {audit_results_.Rows(layer, 1).data, DType::kFloat32, audits_, kAuditFields, kAuditFields};
  dev_.Audit(results, rows, up, l.worth, predicted, audit_hidden_.Rows(0, audits_));
}

Tensor Predictor::ActiveCounts(int32_t layer) const { return decode_rows_ > 0 ? active_.Rows(layer, 1) : Tensor{}; }

StepCounts Predictor::MakeCounts() const {
  const size_t layers = shape_.layers, rows = max_rows_;
  StepCounts counts;
  counts.selected.resize(layers * rows);
  counts.active.resize(layers * (rows + 1));
  counts.heads.resize(layers * rows);
  counts.union_selected.resize(layers);
  counts.union_heads.resize(layers);
  counts.audits.resize(layers * max_audits_ * kAuditFields);
  counts.chose_neurons.resize(layers);
  counts.chose_heads.resize(layers);
  counts.saturated.resize(rows);
  counts.packed.resize(counts_.cols);
  return counts;
}

void Predictor::EndStep(StepCounts* counts, bool wanted) {
  counts->decode_rows = decode_rows_;
  counts->audit_rows = audits_;
  for (int32_t l = 0; l < shape_.layers; ++l) {
    counts->chose_neurons[l] = layers_[l].selects_neurons;
    counts->chose_heads[l] = layers_[l].rank_heads > 0;
  }
  counts->packed_rows = rows_;
  counts->words = decode_rows_ > 0 && wanted ? CountWords(decode_rows_, rows_, audits_) : 0;
  if (counts->words > 0) dev_.Download(counts->packed.data(), counts_.Cols(0, counts->words));
}

void Predictor::Complete(StepCounts* counts) const {
  const int64_t layers = shape_.layers, rows = counts->decode_rows;
  const int32_t* from = counts->packed.data();
  // The first `cols` of each layer's `stride` words.
  const auto unpack = [&](void* to, int64_t cols, int64_t stride) {
    for (int64_t l = 0; l < layers; ++l, from += stride) {
      std::memcpy(static_cast<int32_t*>(to) + l * cols, from, cols * sizeof(int32_t));
    }
  };
  if (counts->words == 0) {
    std::fill_n(counts->active.begin(), layers * (rows + 1), neurons_);
  } else {
    unpack(counts->active.data(), rows + 1, rows + 1);
  }
  if (counts->words > 0 && predicts_) {
    unpack(counts->union_selected.data(), 1, 1);
    unpack(counts->union_heads.data(), 1, 1);
    const int64_t fields = int64_t{counts->audit_rows} * kAuditFields;
    unpack(counts->audits.data(), fields, fields);
    unpack(counts->selected.data(), rows, counts->packed_rows);
    unpack(counts->heads.data(), rows, counts->packed_rows);
  }
  for (int64_t l = 0; l < layers; ++l) {
    if (!counts->chose_neurons[l]) {
      std::fill_n(counts->selected.begin() + l * rows, rows, neurons_);
      counts->union_selected[l] = neurons_;
    }
    if (!counts->chose_heads[l]) {
      std::fill_n(counts->heads.begin() + l * rows, rows, heads_);
      counts->union_heads[l] = heads_;
    }
  }
}

}  // namespace dejavu
