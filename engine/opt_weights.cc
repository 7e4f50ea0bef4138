// Loading runs in two passes over one plan. The first pass names every tensor that the model needs, checks it against
// the checkpoint and gives each a place in one buffer; the second reads the files stripe by stripe into those places,
// transposing where the layout wants it. Besides the buffer, memory holds two stripes.
#include "engine/opt_weights.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

constexpr int64_t kStripeBytes = int64_t{4} << 20;

float Widen(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? FloatFromBFloat16(bits) : FloatFromFloat16(bits);
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

// target [cols, rows] = source [rows, cols], in square tiles. A tile reads its rows one after the other: their distance
// is often a power of two, so that down a column every element would fall into the same set of the cache.
template <typename T>
void Transpose(const T* source, int64_t rows, int64_t cols, T* target) {
  constexpr int64_t kTile = 32;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
      for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r) {
        for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c) target[c * rows + r] = source[r * cols + c];
      }
    }
  }
}

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const OptConfig& config) : checkpoint_(checkpoint), config_(config) {}

  absl::Status Plan(OptWeights* w);
  DeviceLayout& layout() { return layout_; }
  absl::Status Read(Backend& backend, const LoadProgress& progress);

 private:
  // Where one stored tensor goes: to the rows of a region from `first_row` on, or, transposed, to all of it.
  struct Placement {
    const StoredTensor* source;  // nullptr: fill with `constant`
    Tensor* view;
    int64_t first_row;
    bool transposed;
    float constant;
  };

  absl::StatusOr<const StoredTensor*> Find(const std::string& name, const std::vector<int64_t>& shape) const;
  absl::Status PlanMatrix(const std::string& name, int64_t rows, int64_t cols, bool transposed, Tensor* view);
  absl::Status PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, LinearWeights::Layout layout,
                          LinearWeights* linear);
  absl::Status PlanQkv(const std::string& attention, LinearWeights* qkv);
  absl::Status PlanNorm(const std::string& name, NormWeights* norm);
  absl::Status PlanLayer(int32_t l, LayerWeights* layer);

  absl::Status ReadVector(Backend& backend, const Placement& placement);
  absl::Status ReadMatrix(Backend& backend, const Placement& placement, const LoadProgress& progress);
  absl::Status Advance(int64_t bytes, const LoadProgress& progress);

  const Checkpoint& checkpoint_;
  const OptConfig& config_;
  std::string prefix_;
  DeviceLayout layout_;
  std::vector<Placement> placements_;
  int64_t source_bytes_ = 0;
  int64_t done_bytes_ = 0;
  std::vector<char> stripe_, transposed_;
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

absl::Status Loader::PlanMatrix(const std::string& name, int64_t rows, int64_t cols, bool transposed, Tensor* view) {
  ASSIGN_OR_RETURN(const StoredTensor* source, Find(name, {rows, cols}));
  layout_.Reserve(view, source->dtype, transposed ? cols : rows, transposed ? rows : cols);
  placements_.push_back({source, view, 0, transposed, 0.0f});
  return absl::OkStatus();
}

absl::Status Loader::PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, LinearWeights::Layout layout,
                                LinearWeights* linear) {
  linear->layout = layout;
  RETURN_IF_ERROR(
      PlanMatrix(name + ".weight", outputs, inputs, layout == LinearWeights::Layout::kInputRows, &linear->weight));
  if (!config_.biases) return absl::OkStatus();
  ASSIGN_OR_RETURN(const StoredTensor* bias, Find(name + ".bias", {outputs}));
  layout_.Reserve(&linear->bias, DType::kFloat32, 1, outputs);
  placements_.push_back({bias, &linear->bias, 0, false, 0.0f});
  return absl::OkStatus();
}

absl::Status Loader::PlanQkv(const std::string& attention, LinearWeights* qkv) {
  const int64_t hidden = config_.hidden;
  const StoredTensor* weights[3] = {};
  const StoredTensor* biases[3] = {};
  const char* const names[3] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) {
    ASSIGN_OR_RETURN(weights[i], Find(absl::StrCat(attention, names[i], ".weight"), {hidden, hidden}));
    if (weights[i]->dtype != weights[0]->dtype) {
      return absl::InvalidArgumentError(absl::StrCat(
          weights[i]->file->path(), ": tensor ", weights[i]->name, " is ", Name(weights[i]->dtype), " but ",
          weights[0]->name, " is ", Name(weights[0]->dtype), "; the three projections of a layer must have one type"));
    }
    if (config_.biases) {
      ASSIGN_OR_RETURN(biases[i], Find(absl::StrCat(attention, names[i], ".bias"), {hidden}));
    }
  }
  layout_.Reserve(&qkv->weight, weights[0]->dtype, 3 * hidden, hidden);
  if (config_.biases) layout_.Reserve(&qkv->bias, DType::kFloat32, 1, 3 * hidden);
  for (int i = 0; i < 3; ++i) {
    placements_.push_back({weights[i], &qkv->weight, i * hidden, false, 0.0f});
    if (config_.biases) placements_.push_back({biases[i], &qkv->bias, i * hidden, false, 0.0f});
  }
  return absl::OkStatus();
}

absl::Status Loader::PlanNorm(const std::string& name, NormWeights* norm) {
  const StoredTensor *weight = nullptr, *bias = nullptr;
  if (config_.affine_norms) {
    ASSIGN_OR_RETURN(weight, Find(name + ".weight", {config_.hidden}));
    ASSIGN_OR_RETURN(bias, Find(name + ".bias", {config_.hidden}));
  }
  layout_.Reserve(&norm->weight, DType::kFloat32, 1, config_.hidden);
  layout_.Reserve(&norm->bias, DType::kFloat32, 1, config_.hidden);
  placements_.push_back({weight, &norm->weight, 0, false, 1.0f});
  placements_.push_back({bias, &norm->bias, 0, false, 0.0f});
  return absl::OkStatus();
}

absl::Status Loader::PlanLayer(int32_t l, LayerWeights* layer) {
  using Layout = LinearWeights::Layout;
  const std::string at = absl::StrCat("layers.", l, ".");
  RETURN_IF_ERROR(PlanNorm(at + "self_attn_layer_norm", &layer->attention_norm));
  RETURN_IF_ERROR(PlanQkv(at + "self_attn.", &layer->qkv));
  RETURN_IF_ERROR(
      PlanLinear(at + "self_attn.out_proj", config_.hidden, config_.hidden, Layout::kInputRows, &layer->out));
  RETURN_IF_ERROR(PlanNorm(at + "final_layer_norm", &layer->mlp_norm));
  RETURN_IF_ERROR(PlanLinear(at + "fc1", config_.ffn, config_.hidden, Layout::kOutputRows, &layer->mlp.up));
  return PlanLinear(at + "fc2", config_.hidden, config_.ffn, Layout::kInputRows, &layer->mlp.down);
}

absl::Status Loader::Plan(OptWeights* w) {
  ASSIGN_OR_RETURN(prefix_, WeightPrefix(checkpoint_));
  const std::string beyond = absl::StrCat(prefix_, "layers.", config_.layers, ".fc1.weight");
  if (checkpoint_.Find(beyond) != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("the checkpoint has tensor ", beyond,
                                                   " but config.json says num_hidden_layers = ", config_.layers));
  }
  RETURN_IF_ERROR(PlanMatrix("embed_tokens.weight", config_.vocab, config_.embed, false, &w->token_embedding.weight));
  RETURN_IF_ERROR(PlanMatrix("embed_positions.weight", config_.context + kPositionOffset, config_.hidden, false,
                             &w->position_embedding));
  if (config_.embed != config_.hidden) {
    RETURN_IF_ERROR(PlanMatrix("project_in.weight", config_.hidden, config_.embed, false, &w->project_in.weight));
    RETURN_IF_ERROR(PlanMatrix("project_out.weight", config_.embed, config_.hidden, false, &w->project_out.weight));
  }
  w->layers.resize(config_.layers);
  for (int32_t l = 0; l < config_.layers; ++l) RETURN_IF_ERROR(PlanLayer(l, &w->layers[l]));
  if (config_.final_norm) RETURN_IF_ERROR(PlanNorm("final_layer_norm", &w->final_norm));
  for (const Placement& p : placements_) {
    if (p.source != nullptr) source_bytes_ += p.source->elements * SizeOf(p.source->dtype);
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

// Norms and biases: widened to float32. `first_row` counts elements here.
absl::Status Loader::ReadVector(Backend& backend, const Placement& p) {
  const int64_t count = p.source != nullptr ? p.source->elements : p.view->cols;
  std::vector<float> values(count, p.constant);
  if (p.source != nullptr) {
    std::vector<char> stored(count * SizeOf(p.source->dtype));
    RETURN_IF_ERROR(Checkpoint::Read(*p.source, 0, count, stored.data()));
    if (!AllFinite(stored.data(), count, p.source->dtype)) return NotFinite(*p.source);
    if (p.source->dtype == DType::kFloat32) {
      std::memcpy(values.data(), stored.data(), stored.size());
    } else {
      const auto* bits = reinterpret_cast<const uint16_t*>(stored.data());
      for (int64_t i = 0; i < count; ++i) values[i] = Widen(bits[i], p.source->dtype);
    }
  }
  backend.Upload(p.view->Cols(p.first_row, count), values.data());
  return absl::OkStatus();
}

absl::Status Loader::ReadMatrix(Backend& backend, const Placement& p, const LoadProgress& progress) {
  const int64_t rows = p.source->shape[0], cols = p.source->shape[1], element = SizeOf(p.source->dtype);
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / (cols * element), 1, rows);
  stripe_.resize(std::max<int64_t>(stripe_.size(), stripe_rows * cols * element));
  if (p.transposed) transposed_.resize(stripe_.size());
  for (int64_t r = 0; r < rows; r += stripe_rows) {
    const int64_t n = std::min(stripe_rows, rows - r);
    RETURN_IF_ERROR(Checkpoint::Read(*p.source, r * cols, n * cols, stripe_.data()));
    if (!AllFinite(stripe_.data(), n * cols, p.source->dtype)) return NotFinite(*p.source);
    if (!p.transposed) {
      backend.Upload(p.view->Rows(p.first_row + r, n), stripe_.data());
    } else {
      if (element == 4) {
        Transpose(reinterpret_cast<uint32_t*>(stripe_.data()), n, cols,
                  reinterpret_cast<uint32_t*>(transposed_.data()));
      } else {
        Transpose(reinterpret_cast<uint16_t*>(stripe_.data()), n, cols,
                  reinterpret_cast<uint16_t*>(transposed_.data()));
      }
      backend.Upload(p.view->Cols(r, n), transposed_.data());
    }
    RETURN_IF_ERROR(Advance(n * cols * element, progress));
  }
  return absl::OkStatus();
}

absl::Status Loader::Read(Backend& backend, const LoadProgress& progress) {
  for (const Placement& p : placements_) {
    if (p.source != nullptr && p.source->shape.size() == 2) {
      RETURN_IF_ERROR(ReadMatrix(backend, p, progress));
    } else {
      RETURN_IF_ERROR(ReadVector(backend, p));
      if (p.source != nullptr) RETURN_IF_ERROR(Advance(p.source->elements * SizeOf(p.source->dtype), progress));
    }
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

absl::StatusOr<OptWeights> OptWeights::Load(const Checkpoint& checkpoint, const OptConfig& config, Backend& backend,
                                            const LoadProgress& progress) {
  OptWeights weights;
  Loader loader(checkpoint, config);
  RETURN_IF_ERROR(loader.Plan(&weights));
  ASSIGN_OR_RETURN(weights.storage_, loader.layout().Allocate(backend));
  RETURN_IF_ERROR(loader.Read(backend, progress));
  weights.head.weight = weights.token_embedding.weight;
  weights.head.scale = weights.token_embedding.scale;
  return weights;
}

}  // namespace dejavu
