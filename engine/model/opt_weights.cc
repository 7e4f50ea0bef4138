// Loading runs in two passes over one plan. The first pass names every tensor that the model needs, checks it against
// the checkpoint and gives what this rank owns of each a place in one buffer; the second reads that stripe by stripe
// into those places, converting and transposing where that is wanted. Besides the buffer, memory holds a few stripes. A
// transposed matrix in int8 is read twice: a row's factor needs the whole row, which lies across all stripes.
//
// Of own rows the files give up nothing else. Own columns of a stored row are read from the first to the last of them:
// an out-projection's are a run, but a down-projection's lie all over the row, and a page of the file holds some of
// every rank's. There each rank reads the whole matrix and keeps its share.
#include "engine/model/opt_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

constexpr int64_t kStripeBytes = int64_t{4} << 20;

// Rows or columns of a stored matrix, or elements of a stored vector, ascending.
using Runs = std::vector<Shard::Range>;

int64_t CountOf(const Runs& runs) {
  int64_t count = 0;
  for (const Shard::Range& run : runs) count += run.count;
  return count;
}

// From the first of `runs` to the last.
Shard::Range SpanOf(const Runs& runs) {
  return {runs.front().first, runs.back().first + runs.back().count - runs.front().first};
}

// Keeps `columns` of the columns of `span` in each row and closes the gaps.
template <typename T>
void KeepColumns(T* values, int64_t rows, const Runs& columns, Shard::Range span) {
  T* to = values;
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = values + r * span.count;
    for (const Shard::Range& run : columns) {
      for (int32_t c = run.first; c < run.first + run.count; ++c) *to++ = from[c - span.first];
    }
  }
}

// Infinities and NaNs have all exponent bits set in every one of the three types.
template <typename Bits>
bool AllFinite(const Bits* values, int64_t count, Bits exponent_mask) {
  Bits any = 0;
  for (int64_t i = 0; i < count; ++i) any |= static_cast<Bits>((values[i] & exponent_mask) == exponent_mask);
  return any == 0;
}

bool AllFinite(const void* values, int64_t count, DType dtype) {
  if (dtype == DType::kFloat32) return AllFinite(static_cast<const uint32_t*>(values), count, uint32_t{0x7f800000});
  const uint16_t mask = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  return AllFinite(static_cast<const uint16_t*>(values), count, mask);
}

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard, std::optional<DType> dtype)
      : checkpoint_(checkpoint), config_(config), shard_(shard), dtype_(dtype) {}

  absl::Status Plan(OptWeights* w);
  DeviceLayout& layout() { return layout_; }
  absl::Status Read(Backend& backend, const LoadProgress& progress);

 private:
  // Where the own part of one stored tensor goes: to the rows of a region from `first_row` on, or, transposed, to all
  // of it. A vector is a row, and `first_row` counts its elements.
  struct Placement {
    const StoredTensor* source;  // nullptr: fill with `constant`
    Tensor* view;
    Runs rows, columns;  // own ones, as stored
    int64_t first_row = 0;
    bool transposed = false;
    float constant = 0.0f;
    Tensor* scale = nullptr;  // [1, rows of the view], for int8

    int64_t elements() const { return CountOf(rows) * CountOf(columns); }
  };

  absl::StatusOr<const StoredTensor*> Find(const std::string& name, const std::vector<int64_t>& shape) const;
  DType TypeFor(const StoredTensor& source, const Tensor* scale) const;
  absl::Status PlanMatrix(const std::string& name, int64_t rows, int64_t cols, const Runs& own, bool transposed,
                          Tensor* view, Tensor* scale);
  absl::Status PlanVector(const std::string& name, int64_t elements, const Runs& own, Tensor* view, int64_t first);
  absl::Status PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, const Runs& own,
                          LinearWeights::Layout layout, LinearWeights* linear);
  absl::Status PlanQkv(const std::string& attention, LinearWeights* qkv);
  absl::Status PlanNorm(const std::string& name, NormWeights* norm);
  absl::Status PlanLayer(int32_t l, LayerWeights* layer);

  absl::Status ReadVector(Backend& backend, const Placement& placement, const LoadProgress& progress);
  absl::Status ReadMatrix(Backend& backend, const Placement& placement, const LoadProgress& progress);
  static Runs All(int64_t count) { return {{0, static_cast<int32_t>(count)}}; }
  Runs HeadFeatures() const { return {{shard_.heads.first * config_.head_dim, shard_.heads.count * config_.head_dim}}; }
  // Calls `use`(first row, rows) for each stripe of the own rows, whose own columns then lie in stripe_, as stored.
  template <typename Use>
  absl::Status ForStripes(const Placement& placement, const Use& use);
  absl::Status Convert(Backend& backend, const Placement& placement, int64_t first, int64_t rows);
  absl::Status ReadColumnScales(Backend& backend, const Placement& placement, const LoadProgress& progress);
  absl::Status Advance(int64_t bytes, const LoadProgress& progress);

  const Checkpoint& checkpoint_;
  const OptConfig& config_;
  const Shard& shard_;
  const std::optional<DType> dtype_;  // nothing: as stored
  std::string prefix_;
  DeviceLayout layout_;
  std::vector<Placement> placements_;
  int64_t source_bytes_ = 0;
  int64_t done_bytes_ = 0;
  std::vector<char> stripe_, converted_, transposed_;
  std::vector<float> wide_, scales_, inverses_;
};

absl::StatusOr<const StoredTensor*> Loader::Find(const std::string& name, const std::vector<int64_t>& shape) const {
  const StoredTensor* tensor = checkpoint_.Find(prefix_ + name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", prefix_, name, " is missing from the checkpoint"));
  }
  if (tensor->dtype == DType::kInt8) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file->path(), ": tensor ", tensor->name,
                                                   " is int8; weights must be float32, float16 or bfloat16"));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file->path(), ": tensor ", tensor->name, " has shape [",
                                                   absl::StrJoin(tensor->shape, ", "), "]; config.json implies [",
                                                   absl::StrJoin(shape, ", "), "]"));
  }
  return tensor;
}

// Without `scale` a matrix cannot be int8.
DType Loader::TypeFor(const StoredTensor& source, const Tensor* scale) const {
  if (!dtype_.has_value() || (*dtype_ == DType::kInt8 && scale == nullptr)) return source.dtype;
  return *dtype_;
}

// `own`: of the rows as they are laid out here.
absl::Status Loader::PlanMatrix(const std::string& name, int64_t rows, int64_t cols, const Runs& own, bool transposed,
                                Tensor* view, Tensor* scale) {
  ASSIGN_OR_RETURN(const StoredTensor* source, Find(name, {rows, cols}));
  layout_.Reserve(view, TypeFor(*source, scale), CountOf(own), transposed ? rows : cols);
  if (view->dtype == DType::kInt8) layout_.Reserve(scale, DType::kFloat32, 1, view->rows);
  if (view->rows == 0) return absl::OkStatus();
  placements_.push_back(
      {source, view, transposed ? All(rows) : own, transposed ? own : All(cols), 0, transposed, 0.0f, scale});
  return absl::OkStatus();
}

// The `own` elements, to `view` from `first` on.
absl::Status Loader::PlanVector(const std::string& name, int64_t elements, const Runs& own, Tensor* view,
                                int64_t first) {
  ASSIGN_OR_RETURN(const StoredTensor* source, Find(name, {elements}));
  if (CountOf(own) > 0) placements_.push_back({source, view, All(1), own, first});
  return absl::OkStatus();
}

// `own`: of the outputs or inputs that are rows here. Inputs are shared out, so everybody has a part of every output:
// the first rank adds the bias.
absl::Status Loader::PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, const Runs& own,
                                LinearWeights::Layout layout, LinearWeights* linear) {
  const bool transposed = layout == LinearWeights::Layout::kInputRows;
  linear->layout = layout;
  RETURN_IF_ERROR(PlanMatrix(name + ".weight", outputs, inputs, own, transposed, &linear->weight, &linear->scale));
  if (!config_.biases) return absl::OkStatus();
  const Runs biases = !transposed ? own : shard_.first() ? All(outputs) : Runs();
  layout_.Reserve(&linear->bias, DType::kFloat32, 1, CountOf(biases));
  return PlanVector(name + ".bias", outputs, biases, &linear->bias, 0);
}

absl::Status Loader::PlanQkv(const std::string& attention, LinearWeights* qkv) {
  const int64_t hidden = config_.hidden;
  const Runs own = HeadFeatures();
  const int64_t features = CountOf(own);
  const StoredTensor* weights[3] = {};
  const char* const names[3] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) {
    ASSIGN_OR_RETURN(weights[i], Find(absl::StrCat(attention, names[i], ".weight"), {hidden, hidden}));
    if (!dtype_.has_value() && weights[i]->dtype != weights[0]->dtype) {
      return absl::InvalidArgumentError(absl::StrCat(
          weights[i]->file->path(), ": tensor ", weights[i]->name, " is ", Name(weights[i]->dtype), " but ",
          weights[0]->name, " is ", Name(weights[0]->dtype), "; the three projections of a layer must have one type"));
    }
  }
  layout_.Reserve(&qkv->weight, TypeFor(*weights[0], &qkv->scale), 3 * features, hidden);
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

absl::Status Loader::PlanNorm(const std::string& name, NormWeights* norm) {
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

absl::Status Loader::PlanLayer(int32_t l, LayerWeights* layer) {
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

absl::Status Loader::Plan(OptWeights* w) {
  ASSIGN_OR_RETURN(prefix_, WeightPrefix(checkpoint_));
  const std::string beyond = absl::StrCat(prefix_, "layers.", config_.layers, ".fc1.weight");
  if (checkpoint_.Find(beyond) != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("the checkpoint has tensor ", beyond,
                                                   " but config.json says num_hidden_layers = ", config_.layers));
  }
  const auto whole = [&](const std::string& name, int64_t rows, int64_t cols, Tensor* view, Tensor* scale) {
    return PlanMatrix(name, rows, cols, All(rows), /*transposed=*/false, view, scale);
  };
  RETURN_IF_ERROR(PlanMatrix("embed_tokens.weight", config_.vocab, config_.embed, {shard_.vocab}, /*transposed=*/false,
                             &w->token_embedding.weight, &w->token_embedding.scale));
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
  for (const Placement& p : placements_) {
    if (p.source != nullptr) source_bytes_ += p.elements() * SizeOf(p.source->dtype);
  }
  return absl::OkStatus();
}

absl::Status Loader::Advance(int64_t bytes, const LoadProgress& progress) {
  done_bytes_ += bytes;
  if (progress && !progress(done_bytes_, source_bytes_)) return absl::CancelledError("loading was cancelled");
  return absl::OkStatus();
}

absl::Status NotFinite(const StoredTensor& tensor) {
  return absl::InvalidArgumentError(absl::StrCat(tensor.file->path(), ": tensor ", tensor.name,
                                                 " holds values that are not finite (NaN or infinity)"));
}

// Norms and biases: widened to float32.
absl::Status Loader::ReadVector(Backend& backend, const Placement& p, const LoadProgress& progress) {
  const int64_t count = CountOf(p.columns);
  const Tensor view = p.view->Cols(p.first_row, count);
  if (p.source == nullptr) {
    backend.Upload(view, std::vector<float>(count, p.constant).data());
    return absl::OkStatus();
  }
  return ForStripes(p, [&](int64_t, int64_t) {
    wide_.resize(std::max<size_t>(wide_.size(), count));
    WidenValues(stripe_.data(), p.source->dtype, count, wide_.data());
    backend.Upload(view, wide_.data());
    return Advance(count * SizeOf(p.source->dtype), progress);
  });
}

template <typename Use>
absl::Status Loader::ForStripes(const Placement& p, const Use& use) {
  const StoredTensor& source = *p.source;
  const Shard::Range span = SpanOf(p.columns);
  const int64_t rows = CountOf(p.rows), columns = CountOf(p.columns), stored_columns = source.shape.back();
  const int64_t element = SizeOf(source.dtype), row_bytes = span.count * element;
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / row_bytes, 1, rows);
  stripe_.resize(std::max<int64_t>(stripe_.size(), stripe_rows * row_bytes));
  const auto read = [&](int64_t row, int64_t n, char* target) -> absl::Status {
    if (span.count == stored_columns) return Checkpoint::Read(source, row * stored_columns, n * stored_columns, target);
    for (int64_t i = 0; i < n; ++i) {
      RETURN_IF_ERROR(
          Checkpoint::Read(source, (row + i) * stored_columns + span.first, span.count, target + i * row_bytes));
    }
    return absl::OkStatus();
  };
  auto run = p.rows.begin();
  int64_t done_of_run = 0;
  for (int64_t r = 0; r < rows; r += stripe_rows) {
    const int64_t n = std::min(stripe_rows, rows - r);
    for (int64_t filled = 0; filled < n;) {
      const int64_t some = std::min(n - filled, run->count - done_of_run);
      RETURN_IF_ERROR(read(run->first + done_of_run, some, &stripe_[filled * row_bytes]));
      filled += some;
      done_of_run += some;
      if (done_of_run == run->count) ++run, done_of_run = 0;
    }
    if (columns < span.count) {
      if (element == 4) KeepColumns(reinterpret_cast<uint32_t*>(stripe_.data()), n, p.columns, span);
      if (element == 2) KeepColumns(reinterpret_cast<uint16_t*>(stripe_.data()), n, p.columns, span);
    }
    if (!AllFinite(stripe_.data(), n * columns, source.dtype)) return NotFinite(source);
    RETURN_IF_ERROR(use(r, n));
  }
  return absl::OkStatus();
}

absl::Status Loader::ReadMatrix(Backend& backend, const Placement& p, const LoadProgress& progress) {
  const StoredTensor& source = *p.source;
  const int64_t cols = CountOf(p.columns);
  const DType dtype = p.view->dtype;
  if (dtype == DType::kInt8 && p.transposed) RETURN_IF_ERROR(ReadColumnScales(backend, p, progress));
  return ForStripes(p, [&](int64_t first, int64_t rows) -> absl::Status {
    const char* values = stripe_.data();
    if (dtype != source.dtype) {
      RETURN_IF_ERROR(Convert(backend, p, first, rows));
      values = converted_.data();
    }
    if (p.transposed) {
      transposed_.resize(std::max<size_t>(transposed_.size(), rows * cols * SizeOf(dtype)));
      TransposeValues(values, SizeOf(dtype), rows, cols, transposed_.data());
      backend.Upload(p.view->Cols(first, rows), transposed_.data());
    } else {
      backend.Upload(p.view->Rows(p.first_row + first, rows), values);
    }
    return Advance(rows * cols * SizeOf(source.dtype), progress);
  });
}

// The stripe, `rows` rows from `first` on, into converted_.
absl::Status Loader::Convert(Backend& backend, const Placement& p, int64_t first, int64_t rows) {
  const int64_t cols = CountOf(p.columns), count = rows * cols;
  const DType dtype = p.view->dtype;
  wide_.resize(std::max<size_t>(wide_.size(), count));
  converted_.resize(std::max<size_t>(converted_.size(), count * SizeOf(dtype)));
  WidenValues(stripe_.data(), p.source->dtype, count, wide_.data());
  if (dtype != DType::kInt8) {
    if (NarrowValues(wide_.data(), count, dtype, converted_.data())) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(p.source->file->path(), ": tensor ", p.source->name, " holds ",
                                                   LargestMagnitude(wide_.data(), count), ", which is beyond ",
                                                   Name(dtype)));
  }
  auto* const integers = reinterpret_cast<int8_t*>(converted_.data());
  if (p.transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      QuantiseColumns(&wide_[r * cols], cols, inverses_.data(), integers + r * cols);
    }
    return absl::OkStatus();
  }
  scales_.resize(rows);
  for (int64_t r = 0; r < rows; ++r) {
    scales_[r] = Int8Scale(LargestMagnitude(&wide_[r * cols], cols));
    QuantiseRow(&wide_[r * cols], cols, Int8Inverse(scales_[r]), integers + r * cols);
  }
  backend.Upload(p.scale->Cols(p.first_row + first, rows), scales_.data());
  return absl::OkStatus();
}

// The factors of a matrix that is stored transposed, from its columns; leaves what Convert needs in inverses_.
absl::Status Loader::ReadColumnScales(Backend& backend, const Placement& p, const LoadProgress& progress) {
  const int64_t cols = CountOf(p.columns);
  scales_.assign(cols, 0.0f);
  RETURN_IF_ERROR(ForStripes(p, [&](int64_t, int64_t rows) {
    wide_.resize(std::max<size_t>(wide_.size(), rows * cols));
    WidenValues(stripe_.data(), p.source->dtype, rows * cols, wide_.data());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) scales_[c] = std::max(scales_[c], std::fabs(wide_[r * cols + c]));
    }
    return Advance(0, progress);
  }));
  inverses_.resize(cols);
  std::transform(scales_.begin(), scales_.end(), scales_.begin(), Int8Scale);
  std::transform(scales_.begin(), scales_.end(), inverses_.begin(), Int8Inverse);
  backend.Upload(*p.scale, scales_.data());
  return absl::OkStatus();
}

absl::Status Loader::Read(Backend& backend, const LoadProgress& progress) {
  for (const Placement& p : placements_) {
    const bool matrix = p.source != nullptr && p.source->shape.size() == 2;
    RETURN_IF_ERROR(matrix ? ReadMatrix(backend, p, progress) : ReadVector(backend, p, progress));
  }
  backend.Synchronize();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> WeightPrefix(const Checkpoint& checkpoint) {
  for (const char* prefix : {"model.decoder.", "decoder.", ""}) {
    if (checkpoint.Find(absl::StrCat(prefix, "embed_tokens.weight")) != nullptr) return prefix;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the checkpoint has ", checkpoint.tensors().size(),
                   " tensors, none of them model.decoder.embed_tokens.weight, decoder.embed_tokens.weight or "
                   "embed_tokens.weight: not an OPT model"));
}

absl::StatusOr<OptWeights> OptWeights::Allocate(const OptConfig& config, const Shard& shard, DType dtype,
                                                Backend& backend) {
  CHECK(config.embed == config.hidden && config.final_norm && config.biases) << "not a plain OPT";
  using Layout = LinearWeights::Layout;
  OptWeights w;
  DeviceLayout layout;
  const auto vector = [&](Tensor* view, int64_t count) { layout.Reserve(view, DType::kFloat32, 1, count); };
  const auto matrix = [&](Tensor* weight, Tensor* scale, int64_t rows, int64_t cols) {
    layout.Reserve(weight, dtype, rows, cols);
    if (dtype == DType::kInt8) vector(scale, rows);
  };
  const auto norm = [&](NormWeights* n) {
    vector(&n->weight, config.hidden);
    vector(&n->bias, config.hidden);
  };
  const auto linear = [&](LinearWeights* to, Layout in, int64_t rows) {
    to->layout = in;
    matrix(&to->weight, &to->scale, rows, config.hidden);
    vector(&to->bias, in == Layout::kOutputRows ? rows : shard.first() ? config.hidden : 0);
  };
  const int64_t features = int64_t{shard.heads.count} * config.head_dim;
  matrix(&w.token_embedding.weight, &w.token_embedding.scale, shard.vocab.count, config.embed);
  layout.Reserve(&w.position_embedding, dtype == DType::kInt8 ? DType::kBFloat16 : dtype,
                 config.context + kPositionOffset, config.hidden);
  w.layers.resize(config.layers);
  for (LayerWeights& layer : w.layers) {
    norm(&layer.attention_norm);
    linear(&layer.qkv, Layout::kOutputRows, 3 * features);
    linear(&layer.out, Layout::kInputRows, features);
    norm(&layer.mlp_norm);
    linear(&layer.mlp.up, Layout::kOutputRows, shard.neuron_count);
    linear(&layer.mlp.down, Layout::kInputRows, shard.neuron_count);
  }
  norm(&w.final_norm);
  ASSIGN_OR_RETURN(w.storage_, layout.Allocate(backend));
  w.head.weight = w.token_embedding.weight;
  w.head.scale = w.token_embedding.scale;
  return w;
}

absl::StatusOr<int64_t> OptWeights::Measure(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                            std::optional<DType> dtype) {
  OptWeights weights;
  Loader loader(checkpoint, config, shard, dtype);
  RETURN_IF_ERROR(loader.Plan(&weights));
  return loader.layout().bytes();
}

absl::StatusOr<OptWeights> OptWeights::Load(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                            Backend& backend, const LoadProgress& progress,
                                            std::optional<DType> dtype) {
  OptWeights weights;
  Loader loader(checkpoint, config, shard, dtype);
  RETURN_IF_ERROR(loader.Plan(&weights));
  ASSIGN_OR_RETURN(weights.storage_, loader.layout().Allocate(backend));
  RETURN_IF_ERROR(loader.Read(backend, progress));
  weights.head.weight = weights.token_embedding.weight;
  weights.head.scale = weights.token_embedding.scale;
  return weights;
}

}  // namespace dejavu
