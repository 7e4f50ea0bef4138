#include "tests/bench/op_cases.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>

#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kArithmeticBatch = 16;
constexpr int64_t kSelectRank = 128;
constexpr int32_t kBlockTokens = 16;
constexpr int kDensitiesPercent[] = {1, 2, 5, 10, 25, 50, 100};
constexpr int kContexts[] = {128, 256, 512, 1024, 2048};

DType TypeOf(const std::string& weights) {
  return weights == "fp32"   ? DType::kFloat32
         : weights == "fp16" ? DType::kFloat16
         : weights == "bf16" ? DType::kBFloat16
                             : DType::kInt8;
}

// Random values of about 1 / sqrt(cols), as bytes of `dtype`.
std::vector<uint8_t> RandomMatrix(DType dtype, int64_t rows, int64_t cols, std::mt19937& random) {
  const float scale = std::sqrt(3.0f / static_cast<float>(cols));
  std::vector<uint8_t> bytes(rows * cols * SizeOf(dtype));
  for (int64_t i = 0; i < rows * cols; ++i) {
    const uint32_t bits = random();
    const float value = scale * (static_cast<float>(bits) * 0x1p-31f - 1.0f);
    if (dtype == DType::kInt8) bytes[i] = static_cast<uint8_t>(bits >> 24);
    if (dtype == DType::kFloat32) std::memcpy(&bytes[4 * i], &value, 4);
    if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) {
      const uint16_t half = dtype == DType::kFloat16 ? Float16FromFloat(value)
                                                     : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

}  // namespace

int64_t OpCases::rows() const { return std::max(options_.batch, kArithmeticBatch); }

int64_t OpCases::padded() const { return (options_.ffn + kSelectorPadding - 1) / kSelectorPadding * kSelectorPadding; }

absl::Status OpCases::Allocate() {
  DeviceLayout layout;
  ReserveLayers(layout);
  ReserveLists(layout);
  ReserveSelectors(layout);
  ReserveKv(layout);
  ASSIGN_OR_RETURN(storage_, layout.Allocate(dev_));
  FillLayers();
  FillSelectors();
  FillActivations();
  FillKv();
  FillLists();
  FillSequences();
  return absl::OkStatus();
}

void OpCases::ReserveLayers(DeviceLayout& layout) {
  const DType dtype = TypeOf(options_.weights);
  const int64_t layer_bytes = 2 * int64_t{options_.hidden} * options_.ffn * SizeOf(dtype);
  layers_.resize(std::max<int64_t>(2, working_set_bytes() / layer_bytes));
  for (MlpWeights& layer : layers_) {
    layer.down.layout = LinearWeights::Layout::kInputRows;
    layout.Reserve(&layer.up.weight, dtype, options_.ffn, options_.hidden);
    layout.Reserve(&layer.down.weight, dtype, options_.ffn, options_.hidden);
  }
  layout.Reserve(&up_bias_, DType::kFloat32, 1, options_.ffn);
  layout.Reserve(&down_bias_, DType::kFloat32, 1, options_.hidden);
  layout.Reserve(&scale_, DType::kFloat32, 1, options_.ffn);
  layout.Reserve(&x_, DType::kFloat32, rows(), options_.hidden);
  layout.Reserve(&wide_x_, DType::kFloat32, rows(), options_.ffn);
  layout.Reserve(&y_, DType::kFloat32, rows(), options_.hidden);
  layout.Reserve(&wide_y_, DType::kFloat32, rows(), options_.ffn);
  layout.Reserve(&scratch_, DType::kFloat32, rows(), options_.ffn);
  layout.Reserve(&active_, DType::kInt32, 1, rows() + 1);
  layout.Reserve(&norm_.weight, DType::kFloat32, 1, options_.hidden);
  layout.Reserve(&norm_.bias, DType::kFloat32, 1, options_.hidden);
}

void OpCases::ReserveLists(DeviceLayout& layout) {
  lists_.resize(std::size(kDensitiesPercent));
  counts_.resize(lists_.size());
  for (size_t d = 0; d < lists_.size(); ++d) {
    const int64_t neurons = std::max<int64_t>(1, options_.ffn * kDensitiesPercent[d] / 100);
    layout.Reserve(&lists_[d], DType::kInt32, options_.ffn / neurons, neurons);
    layout.Reserve(&counts_[d], DType::kInt32, 1, 1);
  }
}

void OpCases::ReserveSelectors(DeviceLayout& layout) {
  selectors_.resize(std::max<int64_t>(2, working_set_bytes() / 2 / (kSelectRank * padded())));
  for (SelectorWeights& selector : selectors_) layout.Reserve(&selector.b, DType::kInt8, kSelectRank, padded());
  layout.Reserve(&selectors_[0].thresholds, DType::kFloat16, 1, padded());
  layout.Reserve(&selectors_[0].ranks, DType::kInt32, 1, 1);
  layout.Reserve(&coordinates_, DType::kFloat32, rows(), kSelectRank);
  layout.Reserve(&points_, DType::kInt32, 1, rows());
  layout.Reserve(&selected_, DType::kInt32, 1, rows());
  layout.Reserve(&masks_, DType::kInt32, rows(), padded() / 32);
  layout.Reserve(&indices_, DType::kInt32, 1, options_.ffn);
  layout.Reserve(&count_, DType::kInt32, 1, 1);
}

void OpCases::ReserveKv(DeviceLayout& layout) {
  const int64_t hidden = options_.hidden, head_dim = hidden % 128 == 0 && hidden >= 4096 ? 128 : 64;
  const int64_t longest = kContexts[std::size(kContexts) - 1], position_bytes = 2 * hidden * 4;
  const int64_t sequences = std::max<int64_t>(2 * options_.batch, working_set_bytes() / (longest * position_bytes));
  kv_.heads = static_cast<int32_t>(hidden / head_dim);
  kv_.head_dim = static_cast<int32_t>(head_dim);
  kv_.block_tokens = kBlockTokens;
  kv_.dtype = DType::kFloat16;
  kv_.blocks = static_cast<int32_t>(sequences * longest / kBlockTokens);
  layout.Reserve(&keys_, DType::kFloat16, int64_t{kv_.blocks} * kv_.heads * kBlockTokens, head_dim);
  layout.Reserve(&values_, DType::kFloat16, int64_t{kv_.blocks} * kv_.heads * kBlockTokens, head_dim);
  layout.Reserve(&qkv_, DType::kFloat32, rows(), 3 * hidden);
  layout.Reserve(&positions_, DType::kInt32, std::size(kContexts), rows());
  layout.Reserve(&sequences_, DType::kInt32, 1, kv_.blocks / (kContexts[0] / kBlockTokens));
  layout.Reserve(&block_table_, DType::kInt32, std::size(kContexts), kv_.blocks);
}

// Every activation of the MLP is positive, so that the down-projection reads what the up-projection read.
void OpCases::FillLayers() {
  const DType dtype = TypeOf(options_.weights);
  const std::vector<uint8_t> matrix = RandomMatrix(dtype, options_.ffn, options_.hidden, random_);
  const int64_t widest = std::max(options_.hidden, options_.ffn);
  const std::vector<float> bias(widest, 1000.0f), none(widest, 0.0f), scale(widest, 1e-4f);
  dev_.Upload(up_bias_, bias.data());
  dev_.Upload(down_bias_, none.data());
  dev_.Upload(scale_, scale.data());
  dev_.Upload(norm_.weight, bias.data());
  dev_.Upload(norm_.bias, none.data());
  for (MlpWeights& layer : layers_) {
    for (LinearWeights* w : {&layer.up, &layer.down}) {
      dev_.Upload(w->weight, matrix.data());
      if (dtype == DType::kInt8) w->scale = scale_;
    }
    layer.up.bias = up_bias_;
    layer.down.bias = down_bias_;
  }
}

void OpCases::FillSelectors() {
  const std::vector<uint8_t> b = RandomMatrix(DType::kInt8, kSelectRank, padded(), random_);
  // Coordinates and b are uniform: the sums' standard deviation, times 1.645, selects 5 %.
  const float threshold = 1.645f * std::sqrt(static_cast<float>(kSelectRank)) * 74.0f * 0.577f;
  const std::vector<uint16_t> thresholds(padded(), Float16FromFloat(threshold));
  const auto rank = static_cast<int32_t>(kSelectRank);
  dev_.Upload(selectors_[0].thresholds, thresholds.data());
  dev_.Upload(selectors_[0].ranks, &rank);
  for (SelectorWeights& selector : selectors_) {
    dev_.Upload(selector.b, b.data());
    selector.thresholds = selectors_[0].thresholds;
    selector.ranks = selectors_[0].ranks;
    selector.outputs = options_.ffn;
  }
}

void OpCases::FillActivations() {
  const auto fill = [&](const Tensor& t) {
    std::uniform_real_distribution<float> any(-1.0f, 1.0f);
    std::vector<float> values(t.rows * t.cols);
    for (float& v : values) v = any(random_);
    dev_.Upload(t, values.data());
  };
  for (const Tensor& t : {x_, wide_x_, coordinates_, qkv_}) fill(t);
  const std::vector<int32_t> first_point(points_.cols, 0);
  dev_.Upload(points_, first_point.data());
}

void OpCases::FillKv() {
  kv_.keys = keys_.data;
  kv_.values = values_.data;
  const Tensor keys = keys_.Rows(0, int64_t{kv_.heads} * kBlockTokens);
  std::vector<float> block(keys.rows * keys.cols);
  for (float& v : block) v = static_cast<float>(random_()) * 0x1p-32f - 0.5f;
  for (int64_t i = 0; i < kv_.blocks; ++i) {
    dev_.Upload(keys_.Rows(i * keys.rows, keys.rows), block.data());
    dev_.Upload(values_.Rows(i * keys.rows, keys.rows), block.data());
  }
}

void OpCases::FillLists() {
  std::vector<int32_t> permutation(options_.ffn);
  std::iota(permutation.begin(), permutation.end(), 0);
  for (size_t d = 0; d < lists_.size(); ++d) {
    std::shuffle(permutation.begin(), permutation.end(), random_);
    const auto neurons = static_cast<int32_t>(lists_[d].cols);
    for (int64_t i = 0; i < lists_[d].rows; ++i) {
      const auto first = permutation.begin() + i * neurons;
      std::sort(first, first + neurons);
    }
    dev_.Upload(lists_[d], permutation.data());
    dev_.Upload(counts_[d], &neurons);
  }
}

// The blocks of a sequence follow each other; a context of c tokens cuts the storage into as many sequences as fit.
void OpCases::FillSequences() {
  std::vector<int32_t> ids(std::max<int64_t>(kv_.blocks, sequences_.cols));
  std::iota(ids.begin(), ids.end(), 0);
  dev_.Upload(sequences_, ids.data());
  for (size_t c = 0; c < std::size(kContexts); ++c) {
    const std::vector<int32_t> last(positions_.cols, kContexts[c] - 1);
    dev_.Upload(positions_.Rows(c, 1), last.data());
    dev_.Upload(block_table_.Rows(c, 1), ids.data());
  }
}

Selection OpCases::List(size_t density, int64_t i) const {
  // All lists of one copy of the weights, then those of the next.
  return {lists_[density].Rows(i % lists_[density].rows, 1), counts_[density]};
}

OpCase OpCases::LinearCase(LinearWeights::Layout layout, int batch) {
  const bool up = layout == LinearWeights::Layout::kOutputRows;
  const Tensor x = (up ? x_ : wide_x_).Rows(0, batch), y = (up ? wide_y_ : y_).Rows(0, batch);
  return {up ? "linear output rows" : "linear input rows",
          batch,
          1.0,
          0,
          static_cast<double>(layers_[0].up.weight.bytes()),
          2.0 * batch * options_.hidden * options_.ffn,
          [=, this](int64_t i) {
            const MlpWeights& layer = layers_[i % layers_.size()];
            dev_.Linear(y, x, up ? layer.up : layer.down);
          }};
}

OpCase OpCases::MlpCase(int batch) {
  return {"mlp",
          batch,
          1.0,
          0,
          2.0 * static_cast<double>(layers_[0].up.weight.bytes()),
          4.0 * batch * options_.hidden * options_.ffn,
          [=, this](int64_t i) {
            dev_.Mlp(y_.Rows(0, batch), x_.Rows(0, batch), layers_[i % layers_.size()], {}, /*skip_zeros=*/false,
                     scratch_.Rows(0, batch), active_.Cols(0, batch + 1));
          }};
}

OpCase OpCases::GatheredCase(size_t density) {
  const int batch = options_.batch;
  const double share = static_cast<double>(lists_[density].cols) / options_.ffn;
  OpCase dense = MlpCase(batch);
  return {kGathered, batch, share, 0, share * dense.bytes, share * dense.operations, [=, this](int64_t i) {
            const MlpWeights& layer = layers_[i / lists_[density].rows % layers_.size()];
            dev_.Mlp(y_.Rows(0, batch), x_.Rows(0, batch), layer, List(density, i), /*skip_zeros=*/true,
                     scratch_.Rows(0, batch), active_.Cols(0, batch + 1));
          }};
}

OpCase OpCases::SelectCase() {
  const int batch = options_.batch;
  return {"select",
          batch,
          1.0,
          0,
          static_cast<double>(selectors_[0].b.bytes() + selectors_[0].thresholds.bytes()),
          2.0 * batch * kSelectRank * options_.ffn,
          [=, this](int64_t i) {
            dev_.Select({indices_, count_, masks_.Rows(0, batch)}, selected_.Cols(0, batch),
                        coordinates_.Rows(0, batch), selectors_[i % selectors_.size()], points_.Cols(0, batch));
          }};
}

OpCase OpCases::AttentionCase(int context) {
  const size_t c = std::find(std::begin(kContexts), std::end(kContexts), context) - std::begin(kContexts);
  const int batch = options_.batch;
  const int64_t blocks = context / kBlockTokens, groups = kv_.blocks / blocks / batch;
  Tensor table = block_table_.Rows(c, 1);
  table.rows = kv_.blocks / blocks;
  table.cols = table.stride = blocks;
  return {"attention",
          batch,
          1.0,
          context,
          2.0 * batch * context * options_.hidden * static_cast<double>(SizeOf(kv_.dtype)),
          4.0 * batch * context * options_.hidden,
          [=, this](int64_t i) {
            const RowTable rows{
                positions_.Rows(c, 1).Cols(0, batch), sequences_.Cols(i % groups * batch, batch), table, {}};
            dev_.Attention(y_.Rows(0, batch), qkv_.Rows(0, batch), kv_, rows, 0.1f, {});
          }};
}

OpCase OpCases::NormCase() {
  const int batch = options_.batch;
  return {"layer norm", batch, 1.0, 0, 0.0, 0.0, [=, this](int64_t) {
            dev_.LayerNorm(y_.Rows(0, batch), x_.Rows(0, batch), norm_);
          }};
}

std::vector<OpCase> OpCases::All() {
  using Layout = LinearWeights::Layout;
  std::vector<OpCase> cases = {MlpCase(options_.batch)};
  for (size_t d = 0; d < lists_.size(); ++d) cases.push_back(GatheredCase(d));
  cases.push_back(LinearCase(Layout::kOutputRows, options_.batch));
  cases.push_back(LinearCase(Layout::kInputRows, options_.batch));
  if (options_.batch != kArithmeticBatch) {
    cases.push_back(LinearCase(Layout::kOutputRows, kArithmeticBatch));
    cases.push_back(LinearCase(Layout::kInputRows, kArithmeticBatch));
    cases.push_back(MlpCase(kArithmeticBatch));
  }
  cases.push_back(SelectCase());
  for (const int context : kContexts) cases.push_back(AttentionCase(context));
  cases.push_back(NormCase());
  return cases;
}

}  // namespace dejavu
