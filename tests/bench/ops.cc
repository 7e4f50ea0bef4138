// Every op runs over so many copies of its weights (or keys and values) that none of them stays in a cache. Lists of
// neurons are cut from a permutation, so that a sparse MLP too comes back to a row only after all others. Repeats take
// the ops in turn; bandwidth and arithmetic peak are probed around each of them.
#include "tests/bench/ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/eval/tool.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/layout.h"
#include "nlohmann/json.hpp"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr double kSecondsOfOneMeasurement = 0.04;
constexpr double kBarrierAllowance_s = 10e-6;  // what a gathered kernel may cost beside its share
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

// One op in one setting: what it is called, what it moves, and a call of it.
struct Case {
  std::string op;
  int batch = 1;
  double density = 1.0;
  int context = 0;
  double bytes = 0.0;                // weights, or keys and values, that a call reads
  double operations = 0.0;           // a multiply-add is two
  std::function<void(int64_t)> run;  // the i-th call

  std::vector<double> seconds{}, bandwidth_shares{}, peak_shares{}, proportional_costs{};  // by repeat
};

class OpsBench {
 public:
  OpsBench(const OpsBenchOptions& options, Backend& dev) : options_(options), dev_(dev) {}

  absl::Status Allocate();
  std::vector<Case> Cases();

 private:
  int64_t working_set_bytes() const { return static_cast<int64_t>(options_.working_set_mib) << 20; }
  void FillWeights();
  void FillActivations();
  void FillLists();
  Case LinearCase(LinearWeights::Layout layout, int batch);
  Case MlpCase(int batch);
  Case GatheredCase(size_t density);
  Case SelectCase();
  Case AttentionCase(int context);
  Case NormCase();
  Selection List(size_t density, int64_t i) const;

  const OpsBenchOptions& options_;
  Backend& dev_;
  Buffer storage_;
  std::mt19937 random_{1};

  std::vector<MlpWeights> layers_;
  Tensor up_bias_, down_bias_, scale_;
  Tensor x_, wide_x_;        // [rows, hidden], [rows, ffn]
  Tensor y_, wide_y_;        // likewise
  Tensor scratch_, active_;  // of Mlp
  NormWeights norm_;

  std::vector<Tensor> lists_;   // by density: int32 [lists, neurons of a list]
  std::vector<Tensor> counts_;  // by density: int32 [1, 1]

  std::vector<SelectorWeights> selectors_;
  Tensor coordinates_, points_, selected_, masks_, indices_, count_;

  KvLayer kv_;
  Tensor keys_, values_, qkv_, positions_, sequences_, block_table_;
};

absl::Status OpsBench::Allocate() {
  const DType dtype = TypeOf(options_.weights);
  const int64_t hidden = options_.hidden, ffn = options_.ffn, rows = std::max(options_.batch, kArithmeticBatch);
  const int64_t padded = (ffn + kSelectorPadding - 1) / kSelectorPadding * kSelectorPadding;
  layers_.resize(std::max<int64_t>(2, working_set_bytes() / (2 * hidden * ffn * SizeOf(dtype))));
  selectors_.resize(std::max<int64_t>(2, working_set_bytes() / 2 / (kSelectRank * padded)));
  DeviceLayout layout;
  for (MlpWeights& layer : layers_) {
    layer.down.layout = LinearWeights::Layout::kInputRows;
    layout.Reserve(&layer.up.weight, dtype, ffn, hidden);
    layout.Reserve(&layer.down.weight, dtype, ffn, hidden);
  }
  layout.Reserve(&up_bias_, DType::kFloat32, 1, ffn);
  layout.Reserve(&down_bias_, DType::kFloat32, 1, hidden);
  layout.Reserve(&scale_, DType::kFloat32, 1, ffn);
  layout.Reserve(&x_, DType::kFloat32, rows, hidden);
  layout.Reserve(&wide_x_, DType::kFloat32, rows, ffn);
  layout.Reserve(&y_, DType::kFloat32, rows, hidden);
  layout.Reserve(&wide_y_, DType::kFloat32, rows, ffn);
  layout.Reserve(&scratch_, DType::kFloat32, rows, ffn);
  layout.Reserve(&active_, DType::kInt32, 1, rows + 1);
  layout.Reserve(&norm_.weight, DType::kFloat32, 1, hidden);
  layout.Reserve(&norm_.bias, DType::kFloat32, 1, hidden);

  lists_.resize(std::size(kDensitiesPercent));
  counts_.resize(lists_.size());
  for (size_t d = 0; d < lists_.size(); ++d) {
    const int64_t neurons = std::max<int64_t>(1, ffn * kDensitiesPercent[d] / 100);
    layout.Reserve(&lists_[d], DType::kInt32, ffn / neurons, neurons);
    layout.Reserve(&counts_[d], DType::kInt32, 1, 1);
  }

  for (SelectorWeights& selector : selectors_) layout.Reserve(&selector.b, DType::kInt8, kSelectRank, padded);
  layout.Reserve(&selectors_[0].thresholds, DType::kFloat16, 1, padded);
  layout.Reserve(&selectors_[0].ranks, DType::kInt32, 1, 1);
  layout.Reserve(&coordinates_, DType::kFloat32, rows, kSelectRank);
  layout.Reserve(&points_, DType::kInt32, 1, rows);
  layout.Reserve(&selected_, DType::kInt32, 1, rows);
  layout.Reserve(&masks_, DType::kInt32, rows, padded / 32);
  layout.Reserve(&indices_, DType::kInt32, 1, ffn);
  layout.Reserve(&count_, DType::kInt32, 1, 1);

  const int64_t head_dim = hidden % 128 == 0 && hidden >= 4096 ? 128 : 64;
  const int64_t longest = kContexts[std::size(kContexts) - 1], position_bytes = 2 * hidden * 4;
  const int64_t sequences = std::max<int64_t>(2 * options_.batch, working_set_bytes() / (longest * position_bytes));
  kv_.heads = static_cast<int32_t>(hidden / head_dim);
  kv_.head_dim = static_cast<int32_t>(head_dim);
  kv_.block_tokens = kBlockTokens;
  kv_.dtype = DType::kFloat16;
  kv_.blocks = static_cast<int32_t>(sequences * longest / kBlockTokens);
  layout.Reserve(&keys_, DType::kFloat16, int64_t{kv_.blocks} * kv_.heads * kBlockTokens, head_dim);
  layout.Reserve(&values_, DType::kFloat16, int64_t{kv_.blocks} * kv_.heads * kBlockTokens, head_dim);
  layout.Reserve(&qkv_, DType::kFloat32, rows, 3 * hidden);
  layout.Reserve(&positions_, DType::kInt32, std::size(kContexts), rows);
  layout.Reserve(&sequences_, DType::kInt32, 1, kv_.blocks / (kContexts[0] / kBlockTokens));
  layout.Reserve(&block_table_, DType::kInt32, std::size(kContexts), kv_.blocks);
  ASSIGN_OR_RETURN(storage_, layout.Allocate(dev_));
  FillWeights();
  FillActivations();
  FillLists();
  return absl::OkStatus();
}

// Every activation of the MLP is positive, so that the down-projection reads what the up-projection read.
void OpsBench::FillWeights() {
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
  const int64_t padded = selectors_[0].b.cols;
  const std::vector<uint8_t> b = RandomMatrix(DType::kInt8, kSelectRank, padded, random_);
  // Coordinates and b are uniform: the sums' standard deviation, times 1.645, selects 5 %.
  const float threshold = 1.645f * std::sqrt(static_cast<float>(kSelectRank)) * 74.0f * 0.577f;
  const std::vector<uint16_t> thresholds(padded, Float16FromFloat(threshold));
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

void OpsBench::FillActivations() {
  const auto fill = [&](const Tensor& t) {
    std::uniform_real_distribution<float> any(-1.0f, 1.0f);
    std::vector<float> values(t.rows * t.cols);
    for (float& v : values) v = any(random_);
    dev_.Upload(t, values.data());
  };
  for (const Tensor& t : {x_, wide_x_, coordinates_, qkv_}) fill(t);
  const std::vector<int32_t> first_point(points_.cols, 0);
  dev_.Upload(points_, first_point.data());
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

void OpsBench::FillLists() {
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
  // The blocks of a sequence follow each other; a context of c tokens cuts the storage into as many sequences as fit.
  std::vector<int32_t> ids(std::max<int64_t>(kv_.blocks, sequences_.cols));
  std::iota(ids.begin(), ids.end(), 0);
  dev_.Upload(sequences_, ids.data());
  for (size_t c = 0; c < std::size(kContexts); ++c) {
    const std::vector<int32_t> last(positions_.cols, kContexts[c] - 1);
    dev_.Upload(positions_.Rows(c, 1), last.data());
    dev_.Upload(block_table_.Rows(c, 1), ids.data());
  }
}

Selection OpsBench::List(size_t density, int64_t i) const {
  // All lists of one copy of the weights, then those of the next.
  return {lists_[density].Rows(i % lists_[density].rows, 1), counts_[density]};
}

Case OpsBench::LinearCase(LinearWeights::Layout layout, int batch) {
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

Case OpsBench::MlpCase(int batch) {
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

Case OpsBench::GatheredCase(size_t density) {
  const int batch = options_.batch;
  const double share = static_cast<double>(lists_[density].cols) / options_.ffn;
  Case dense = MlpCase(batch);
  return {"gathered mlp", batch, share, 0, share * dense.bytes, share * dense.operations, [=, this](int64_t i) {
            const MlpWeights& layer = layers_[i / lists_[density].rows % layers_.size()];
            dev_.Mlp(y_.Rows(0, batch), x_.Rows(0, batch), layer, List(density, i), /*skip_zeros=*/true,
                     scratch_.Rows(0, batch), active_.Cols(0, batch + 1));
          }};
}

Case OpsBench::SelectCase() {
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

Case OpsBench::AttentionCase(int context) {
  const size_t c = std::find(std::begin(kContexts), std::end(kContexts), context) - std::begin(kContexts);
  const int batch = options_.batch;
  const int64_t blocks = context / kBlockTokens, groups = kv_.blocks / blocks / batch;
  Tensor table = block_table_.Rows(c, 1);
  table.rows = kv_.blocks / blocks;
  table.cols = table.stride = blocks;
  return {
      "attention",
      batch,
      1.0,
      context,
      8.0 * batch * context * options_.hidden,
      4.0 * batch * context * options_.hidden,
      [=, this](int64_t i) {
        const RowTable rows{positions_.Rows(c, 1).Cols(0, batch), sequences_.Cols(i % groups * batch, batch), table};
        dev_.Attention(y_.Rows(0, batch), qkv_.Rows(0, batch), kv_, rows, 0.1f, {});
      }};
}

Case OpsBench::NormCase() {
  const int batch = options_.batch;
  return {"layer norm", batch, 1.0, 0, 0.0, 0.0, [=, this](int64_t) {
            dev_.LayerNorm(y_.Rows(0, batch), x_.Rows(0, batch), norm_);
          }};
}

std::vector<Case> OpsBench::Cases() {
  using Layout = LinearWeights::Layout;
  std::vector<Case> cases = {MlpCase(options_.batch)};  // the dense one, first: gathered ones are held against it
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

// Seconds of a call. Goes on from call `*next`, so that the next measurement does not find its weights in a cache.
double TimeOf(const Case& c, Backend& dev, int64_t* next) {
  const Clock::time_point start = Clock::now();
  int64_t calls = 0;
  do {
    c.run((*next)++);
    ++calls;
  } while (SecondsSince(start) < kSecondsOfOneMeasurement);
  dev.Synchronize();
  return SecondsSince(start) / static_cast<double>(calls);
}

// What all threads cost to meet, with nothing to do.
double BarrierSeconds(int threads) {
  constexpr int kRuns = 2000;
  ThreadPool pool(threads, /*pin=*/true);
  auto nothing = [](int) {};
  pool.Run(nothing);
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kRuns; ++i) pool.Run(nothing);
  return SecondsSince(start) / kRuns;
}

nlohmann::json Describe(const Case& c) {
  const double seconds = Median(c.seconds);
  nlohmann::json row = {{"op", c.op}, {"batch", c.batch}, {"us", 1e6 * seconds}, {"us_least", 1e6 * Least(c.seconds)}};
  if (c.bytes > 0) {
    row["bytes"] = c.bytes;
    row["gb_per_s"] = 1e-9 * c.bytes / seconds;
    row["bandwidth_share"] = Median(c.bandwidth_shares);
    row["gflop_per_s"] = 1e-9 * c.operations / seconds;
    row["peak_share"] = Median(c.peak_shares);
  }
  if (!c.proportional_costs.empty()) {
    row["density"] = c.density;
    row["cost_over_proportional"] = Median(c.proportional_costs);
  }
  if (c.context > 0) row["context"] = c.context;
  return row;
}

void Print(const nlohmann::json& row) {
  std::string setting = absl::StrCat("batch ", row["batch"].get<int>());
  if (row.contains("density")) absl::StrAppendFormat(&setting, ", %.3g %%", 100 * row["density"].get<double>());
  if (row.contains("context")) absl::StrAppendFormat(&setting, ", context %d", row["context"].get<int>());
  std::printf("%-20s %-22s %11.1f %11.1f", row["op"].get<std::string>().c_str(), setting.c_str(),
              row["us"].get<double>(), row["us_least"].get<double>());
  if (row.contains("bytes")) {
    std::printf(" %8.1f %7.1f%% %9.1f %7.1f%%", row["gb_per_s"].get<double>(),
                100 * row["bandwidth_share"].get<double>(), row["gflop_per_s"].get<double>(),
                100 * row["peak_share"].get<double>());
  }
  if (row.contains("cost_over_proportional")) std::printf(" %8.3f", row["cost_over_proportional"].get<double>());
  std::printf("\n");
}

absl::Status Check(const OpsBenchOptions& options) {
  if (options.hidden % 64 != 0 || options.ffn % 64 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--hidden ", options.hidden, " and --ffn ", options.ffn, " must be multiples of 64"));
  }
  return CheckWritable(options.json);
}

absl::Status Bench(const OpsBenchOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(Check(options));
  ASSIGN_OR_RETURN(const auto dev, CreateCpuBackend({options.threads, /*pin=*/true}));
  OpsBench bench(options, *dev);
  ProgressLine progress("dejavu-bench");
  progress.Show("filling", 0.0);
  RETURN_IF_ERROR(bench.Allocate());
  ASSIGN_OR_RETURN(const auto bandwidth, BandwidthProbe::Create(options.threads));
  ArithmeticProbe arithmetic(options.threads);
  std::vector<Case> cases = bench.Cases();
  std::vector<int64_t> next(cases.size(), 0);
  std::vector<double> gb_per_s, gflop_per_s, barriers_s;
  for (int repeat = -1; repeat < options.repeats; ++repeat) {  // one to warm up
    const double peak = arithmetic.Measure();
    double before = bandwidth->Measure(), dense_s = 0.0;
    const double barrier_s = BarrierSeconds(bandwidth->threads());
    if (repeat >= 0) {
      gflop_per_s.push_back(peak);
      barriers_s.push_back(barrier_s);
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      Case& c = cases[i];
      const double seconds = TimeOf(c, *dev, &next[i]);
      const double after = bandwidth->Measure();
      if (i == 0) dense_s = seconds;
      if (Interrupted()) return absl::CancelledError("interrupted");
      progress.Show("measuring",
                    (repeat + 1 + static_cast<double>(i) / static_cast<double>(cases.size())) / (options.repeats + 1));
      if (repeat >= 0) {
        c.seconds.push_back(seconds);
        c.bandwidth_shares.push_back(1e-9 * c.bytes / seconds / (0.5 * (before + after)));
        c.peak_shares.push_back(1e-9 * c.operations / seconds / peak);
        if (c.op == "gathered mlp") {
          c.proportional_costs.push_back((seconds - kBarrierAllowance_s) / (c.density * dense_s));
        }
        gb_per_s.push_back(after);
      }
      before = after;
    }
  }

  std::printf("Layer of %d, %d neurons, %s weights, %s, %d repeats\n\n", options.hidden, options.ffn,
              options.weights.c_str(), dev->Description().c_str(), options.repeats);
  std::printf("%-20s %-22s %11s %11s %8s %8s %9s %8s %8s\n", "op", "", "us", "least", "GB/s", "/ bandw", "GFLOP/s",
              "/ peak", "/ share");
  nlohmann::json rows = nlohmann::json::array();
  for (const Case& c : cases) {
    rows.push_back(Describe(c));
    Print(rows.back());
  }
  std::printf("\n/ share: time less 10 us, over density times the dense MLP's time.\n");
  std::printf("Peak of float32 multiply-adds: %.1f GFLOP/s (%.1f to %.1f). A barrier: %.2f us.\n", Median(gflop_per_s),
              Least(gflop_per_s), Most(gflop_per_s), 1e6 * Median(barriers_s));
  PrintBandwidth(gb_per_s);
  if (options.json.empty()) return absl::OkStatus();
  const nlohmann::json json = {{"bandwidth_gb_per_s", Median(gb_per_s)},
                               {"bandwidth_spread", Spread(gb_per_s)},
                               {"noisy", Spread(gb_per_s) > kNoisySpread},
                               {"peak_gflop_per_s", Median(gflop_per_s)},
                               {"barrier_us", 1e6 * Median(barriers_s)},
                               {"backend", dev->Description()},
                               {"hidden", options.hidden},
                               {"ffn", options.ffn},
                               {"dtype", options.weights},
                               {"rows", std::move(rows)}};
  return WriteText(options.json, json.dump(1) + "\n");
}

}  // namespace

int RunOpsBench(const OpsBenchOptions& options) { return ExitCode(Bench(options)); }

}  // namespace dejavu
