// How a synthetic model is made.
//
// Which neurons. In layer l neuron j is selected with probability s_j at a token, tokens being independent given s_j; a
// share `hot` of the neurons has s = 0.9, the others follow a Kumaraswamy distribution (a Beta distribution whose
// quantiles are elementary). The parameters of each quarter of the depth were fitted to the densities that Polar
// Sparsity (NeurIPS 2025) ships for OPT: what its routers select at batches 1, 4, 8 and 16. Those are selections, so
// they are taken for what BALANCED selects, and the true activity p_j is lower: it follows from s_j, the recall and the
// quality of the predictor.
//
// Up-projection. After its LayerNorm the input h of the MLP has mean 0 and variance 1, and so has w.h for a row of norm
// 1: neuron j is active with probability p_j if its bias is -z_j with P(N(0, 1) > z_j) = p_j. Rows are
//   w_j = rho * v_j + sqrt(1 - rho^2) * noise,   v_j = four of `rank` random directions, mixed with int8 weights
// so that the predictor, whose stage A is those directions and whose stage B the mixing weights, sees v_j.h, which
// correlates with w_j.h by rho. Thresholds then follow from the bivariate normal distribution.
//
// The rest. Projections into the residual stream are scaled so that attention adds kAttentionStep and the MLP kMlpStep
// of its norm: consecutive layers stay alike, as in real models, and the predictor may read what attention reads. The
// down-projection's bias takes out the mean of its output, which would make all tokens alike. The final norm changes
// the sign of half of the features: without that the tied head would always predict the token that it was given. The
// last MLP is louder than all before it: else x would predict y wherever y predicts x, the head being tied.
//
// Noise rows are runs of one pool of normal variates, from an offset that is another one for each row of a matrix: a
// pool that has been scaled and rounded once is then copied at the speed of memory.
#include "engine/load/synthetic.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr char kPrefix[] = "synthetic:";
constexpr int kQuarters = 4;

// ---- Names

struct Shape {
  const char* name;
  int32_t hidden, layers, heads, ffn, vocab, context;
  int profile;
};

// Of the fit: share of hot neurons, and the two parameters of the others.
struct QuarterProfile {
  double hot, a, b;
};
struct Profile {
  const char* name;
  std::array<QuarterProfile, kQuarters> quarters;
};

// Fitted to the tables of OPT-6.7b, -30b and -66b; 13b to the means of the first two. The union of independent tokens
// is concave in the batch and some rows of the tables are not (their batch 1 was clamped): there, in the deep half of
// 30b and 66b, the fit is up to 3 points off, else less than 1.5.
constexpr Profile kProfiles[] = {
    {"6.7b",
     {{{0.0348, 0.4524, 18.5689}, {0.0163, 0.4444, 5.6582}, {0.0131, 0.4821, 2.6037}, {0.1069, 1.4860, 31.4574}}}},
    {"6.7b and 30b (mean)",
     {{{0.0258, 0.4469, 24.7081}, {0.0162, 0.4147, 6.2108}, {0.0628, 0.6379, 5.6895}, {0.0987, 1.3971, 33.1695}}}},
    {"30b",
     {{{0.0171, 0.3270, 23.3767}, {0.0118, 0.3618, 6.2342}, {0.0438, 0.5028, 4.1784}, {0.0552, 0.7844, 6.6200}}}},
    {"66b", {{{0.0078, 0.1392, 5.5872}, {0.0070, 0.2569, 4.2942}, {0.0742, 0.6393, 8.7779}, {0.0853, 0.6930, 7.2403}}}},
};

// Zhang et al., "OPT" (arXiv 2205.01068), table 1. The small ones have no published profile and take 6.7b's, 175b
// takes 66b's.
constexpr Shape kShapes[] = {
    {"opt-tiny", 256, 4, 4, 1024, 512, 512, 0},         {"opt-125m", 768, 12, 12, 3072, 50272, 2048, 0},
    {"opt-1.3b", 2048, 24, 32, 8192, 50272, 2048, 0},   {"opt-2.7b", 2560, 32, 32, 10240, 50272, 2048, 0},
    {"opt-6.7b", 4096, 32, 32, 16384, 50272, 2048, 0},  {"opt-13b", 5120, 40, 40, 20480, 50272, 2048, 1},
    {"opt-30b", 7168, 48, 56, 28672, 50272, 2048, 2},   {"opt-66b", 9216, 64, 72, 36864, 50272, 2048, 3},
    {"opt-175b", 12288, 96, 96, 49152, 50272, 2048, 3},
};

// ---- Which neurons

constexpr double kHotShare = 0.9;          // how often a hot neuron is selected
constexpr double kRarest = 3e-7;           // and the rarest
constexpr double kFirstLayerFactor = 1.6;  // layer 0 is denser than its neighbours
constexpr double kCorrelation = 0.95;      // of true and predicted pre-activations
constexpr double kTapCosine = 0.998;  // of what the predictor and the MLP read, for contexts of a few tokens or more
constexpr double kWeightCorrelation = kCorrelation / kTapCosine;

constexpr std::array<Tier, 3> kPredicted = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

double NormalDensity(double x) { return std::exp(-0.5 * x * x) * 0.3989422804014327; }
double NormalTail(double x) { return 0.5 * std::erfc(x * 0.7071067811865476); }  // P(N(0, 1) > x)

// Where a function that rises on low ... high crosses zero.
template <typename Function>
double Root(double low, double high, const Function& function) {
  for (int i = 0; i < 44; ++i) {
    const double middle = 0.5 * (low + high);
    (function(middle) > 0.0 ? high : low) = middle;
  }
  return 0.5 * (low + high);
}

double InverseTail(double share) {
  return Root(-9.0, 9.0, [=](double x) { return share - NormalTail(x); });
}

// The integral over u > z of density(u) * weight(u - z) * P(v > t | u), where u and v are normal with correlation
// kCorrelation.
template <typename Weight>
double JointTail(double z, double t, const Weight& weight) {
  constexpr int kPoints = 140;
  constexpr double kReach = 7.0;
  const double step = kReach / kPoints, spread = std::sqrt(1.0 - kCorrelation * kCorrelation);
  double sum = 0.0;
  for (int i = 0; i < kPoints; ++i) {
    const double u = z + (i + 0.5) * step;
    sum += NormalDensity(u) * weight(u - z) * NormalTail((t - kCorrelation * u) / spread);
  }
  return sum * step;
}

double Unweighted(double) { return 1.0; }

double TierRecall(Tier tier, double recall) {
  const double missed = 1.0 - recall;
  return 1.0 - missed * (tier == Tier::kHigh ? 0.4 : tier == Tier::kFast ? 2.0 : 1.0);
}

// Everything that follows from how often BALANCED selects a neuron. In units of its pre-activation's deviation.
struct Neuron {
  double z = 0.0;                                        // active above
  double active = 0.0;                                   // how often that is
  double mean = 0.0;                                     // of the activation
  double mean_square = 0.0;                              // of the activation
  std::array<double, kPredicted.size()> threshold = {};  // of the prediction, by tier
  std::array<double, kPredicted.size()> missed = {};     // mean square of what is not selected
};

Neuron Mix(const Neuron& x, const Neuron& y, double share) {
  const auto mix = [=](double a, double b) { return a + share * (b - a); };
  Neuron n;
  n.z = mix(x.z, y.z);
  n.active = NormalTail(n.z);
  n.mean = mix(x.mean, y.mean);
  n.mean_square = mix(x.mean_square, y.mean_square);
  for (size_t i = 0; i < kPredicted.size(); ++i) {
    n.threshold[i] = mix(x.threshold[i], y.threshold[i]);
    n.missed[i] = mix(x.missed[i], y.missed[i]);
  }
  return n;
}

// Neurons by the threshold of BALANCED, tabulated.
class NeuronTable {
 public:
  explicit NeuronTable(double recall) : first_(InverseTail(kHotShare)), last_(InverseTail(kRarest)) {
    const double step = (last_ - first_) / kIntervals;
    for (int i = 0; i <= kIntervals; ++i) neurons_.push_back(Make(first_ + i * step, recall));
  }

  // `selected` is between kRarest and kHotShare.
  Neuron Of(double selected) const {
    const double place = std::clamp((InverseTail(selected) - first_) / (last_ - first_) * kIntervals, 0.0,
                                    static_cast<double>(kIntervals));
    const int i = std::min(static_cast<int>(place), kIntervals - 1);
    return Mix(neurons_[i], neurons_[i + 1], place - i);
  }

 private:
  static constexpr int kIntervals = 48;

  static Neuron Make(double balanced_threshold, double recall) {
    Neuron n;
    n.z = Root(-3.0, 9.0,
               [&](double z) { return JointTail(z, balanced_threshold, Unweighted) - recall * NormalTail(z); });
    n.active = NormalTail(n.z);
    n.mean = NormalDensity(n.z) - n.z * n.active;
    n.mean_square = (1.0 + n.z * n.z) * n.active - n.z * NormalDensity(n.z);
    for (size_t i = 0; i < kPredicted.size(); ++i) {
      const double wanted = TierRecall(kPredicted[i], recall) * n.active;
      n.threshold[i] = Root(-9.0, 9.0, [&](double t) { return wanted - JointTail(n.z, t, Unweighted); });
      const double kept = JointTail(n.z, n.threshold[i], [](double x) { return x * x; });
      n.missed[i] = std::max(0.0, n.mean_square - kept);
    }
    return n;
  }

  const double first_, last_;
  std::vector<Neuron> neurons_;
};

// How often BALANCED selects each neuron of a layer, the most frequent first: the quantiles of the layer's
// distribution, so that its density holds exactly.
std::vector<double> SelectionShares(const SyntheticModel& model, int32_t layer) {
  const int32_t layers = model.config.layers, quarter = layer * kQuarters / layers;
  const QuarterProfile& profile = kProfiles[model.profile].quarters[quarter];
  int32_t in_first_quarter = 0;
  while (in_first_quarter < layers && in_first_quarter * kQuarters / layers == 0) ++in_first_quarter;
  double factor = model.density;
  if (quarter == 0 && in_first_quarter > 1) {
    factor *= layer == 0 ? kFirstLayerFactor : (in_first_quarter - kFirstLayerFactor) / (in_first_quarter - 1);
  }
  const int32_t ffn = model.config.ffn;
  const auto hot = static_cast<int32_t>(std::lround(std::min(1.0, factor * profile.hot) * ffn));
  std::vector<double> shares(ffn, kHotShare);
  for (int32_t j = hot; j < ffn; ++j) {
    const double rank = 1.0 - (j - hot + 0.5) / (ffn - hot);
    const double share = std::pow(1.0 - std::pow(1.0 - rank, 1.0 / profile.b), 1.0 / profile.a);
    shares[j] = std::clamp(factor * share, kRarest, kHotShare);
  }
  return shares;
}

double Union(double share, int32_t batch) { return 1.0 - std::pow(1.0 - share, batch); }

// ---- Noise

uint64_t Scramble(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

enum class Part : uint64_t { kPool, kTokens, kPositions, kQkv, kOut, kUp, kDown, kDirections, kMixing, kOrder, kSigns };

uint64_t Key(uint64_t seed, Part part, int32_t layer = 0) {
  return Scramble(Scramble(Scramble(seed) + static_cast<uint64_t>(part)) + static_cast<uint64_t>(layer));
}

class NoisePool {
 public:
  NoisePool(uint64_t seed, int64_t longest_row) : values_(kSize + longest_row), squares_(values_.size() + 1) {
    const uint64_t key = Key(seed, Part::kPool);
    const auto uniform = [=](int64_t i) { return (static_cast<double>(Scramble(key + i) >> 11) + 0.5) * 0x1p-53; };
    double sum = 0.0, square = 0.0;
    for (int64_t i = 0; i < kSize; i += 2) {  // Box and Muller
      const double radius = std::sqrt(-2.0 * std::log(uniform(i))), angle = 6.283185307179586 * uniform(i + 1);
      values_[i] = static_cast<float>(radius * std::cos(angle));
      values_[i + 1] = static_cast<float>(radius * std::sin(angle));
    }
    for (int64_t i = 0; i < kSize; ++i) sum += values_[i], square += static_cast<double>(values_[i]) * values_[i];
    const double mean = sum / kSize, deviation = std::sqrt(square / kSize - mean * mean);
    for (int64_t i = 0; i < kSize; ++i) values_[i] = static_cast<float>((values_[i] - mean) / deviation);
    std::copy_n(values_.begin(), longest_row, values_.begin() + kSize);
    for (size_t i = 0; i < values_.size(); ++i) {
      squares_[i + 1] = squares_[i] + static_cast<double>(values_[i]) * values_[i];
    }
    largest_ = LargestMagnitude(values_.data(), kSize);
  }

  // Where row `row` of the matrix of `key` starts: another place for each of kSize rows.
  static int64_t Offset(uint64_t key, int64_t row) {
    uint64_t x = static_cast<uint64_t>(row);
    x = ((x + key) * 0x2545Fu) & (kSize - 1);
    x ^= x >> 9;
    x = ((x + (key >> 32)) * 0x1B873u) & (kSize - 1);
    x ^= x >> 9;
    return static_cast<int64_t>(x);
  }
  const float* Row(uint64_t key, int64_t row) const { return &values_[Offset(key, row)]; }
  double SquareOfRow(uint64_t key, int64_t row, int64_t count) const {
    const int64_t offset = Offset(key, row);
    return squares_[offset + count] - squares_[offset];
  }
  const std::vector<float>& values() const { return values_; }
  float largest() const { return largest_; }

 private:
  static constexpr int64_t kSize = int64_t{1} << 18;
  std::vector<float> values_;    // [kSize + longest row], the end repeats the start
  std::vector<double> squares_;  // sums of the squares of the first so many
  float largest_ = 0.0f;
};

float SumOfSquares(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += values[i + k] * values[i + k];
  }
  float sum = 0.0f;
  for (; i < count; ++i) sum += values[i] * values[i];
  for (const float part : sums) sum += part;
  return sum;
}

// ---- Generating

constexpr int64_t kStripeBytes = int64_t{4} << 20;
constexpr double kPositionDeviation = 0.15;  // of the tokens' embeddings
constexpr double kAttentionStep = 0.07;
constexpr double kMlpStep = 0.17;
constexpr double kLastMlpStep = 3.0;
constexpr double kLogitDeviation = 2.5;
constexpr int kDirectionsOfNeuron = 4;
constexpr float kDirectionScale = 20.0f;  // int8 values of a normal variate; beyond 6.3 deviations they would not fit

int32_t PredictorRank(int32_t hidden) { return hidden <= 4096 ? 128 : (hidden / 32 + 63) / 64 * 64; }

// Calls use(first, last) for parts of 0 ... count on all CPUs.
template <typename Use>
void InParallel(int64_t count, const Use& use) {
  const int64_t threads = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, std::max<int64_t>(count, 1));
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) {
    others.emplace_back([&, t] { use(count * t / threads, count * (t + 1) / threads); });
  }
  use(0, count / threads);
  for (std::thread& other : others) other.join();
}

// Frequent and rare neurons lie in random order.
std::vector<Neuron> NeuronsOf(const SyntheticModel& model, const NeuronTable& table, int32_t layer) {
  const std::vector<double> shares = SelectionShares(model, layer);
  std::vector<int32_t> order(shares.size());
  std::iota(order.begin(), order.end(), 0);
  const uint64_t key = Key(model.seed, Part::kOrder, layer);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[Scramble(key + i) % (i + 1)]);
  std::vector<Neuron> neurons(shares.size());
  InParallel(static_cast<int64_t>(shares.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) neurons[order[i]] = table.Of(shares[i]);
  });
  return neurons;
}

class Generator {
 public:
  Generator(const SyntheticModel& model, const Shard& shard, Backend& backend, const LoadProgress& progress,
            int64_t total_bytes)
      : model_(model),
        config_(model.config),
        shard_(shard),
        backend_(backend),
        progress_(progress),
        total_bytes_(total_bytes),
        pool_(model.seed, model.config.hidden),
        table_(model.recall) {}

  absl::Status Embeddings(const OptWeights& w);
  absl::Status Layer(int32_t l, const LayerWeights& layer, LayerPredictorData* predictor);
  void Head(const OptWeights& w);

 private:
  // Makes a row of `cols` values as they are stored, and its factor where it is int8. `row` is its number in the whole
  // model, on which alone it depends.
  using MakeRow = std::function<void(int64_t row, char* values, float* scale)>;
  // The number in the whole model of an own row.
  using RowId = std::function<int64_t(int64_t own_row)>;
  static RowId From(int64_t first) {
    return [first](int64_t row) { return first + row; };
  }
  RowId NeuronIds(int32_t l) const {
    return [this, l](int64_t row) { return shard_.neuron(l, static_cast<int32_t>(row)); };
  }

  uint64_t KeyOf(Part part, int32_t layer = 0) const { return Key(model_.seed, part, layer); }
  absl::Status Rows(const Tensor& weight, const Tensor& scale, const RowId& id, const MakeRow& make);
  absl::Status Noise(const Tensor& weight, const Tensor& scale, const RowId& id, uint64_t key, double deviation);
  absl::Status Up(int32_t l, const LinearWeights& up, const std::vector<Neuron>& neurons,
                  LayerPredictorData* predictor);
  absl::Status Down(int32_t l, const LinearWeights& down, const std::vector<Neuron>& neurons,
                    LayerPredictorData* predictor);
  void Fill(const Tensor& vector, float value) {
    if (!vector.empty()) backend_.Upload(vector, std::vector<float>(vector.cols, value).data());
  }
  void FillNorm(const NormWeights& norm) {
    Fill(norm.weight, 1.0f);
    Fill(norm.bias, 0.0f);
  }

  const SyntheticModel& model_;
  const OptConfig& config_;
  const Shard& shard_;
  Backend& backend_;
  const LoadProgress& progress_;
  const int64_t total_bytes_;
  const NoisePool pool_;
  const NeuronTable table_;
  int64_t done_bytes_ = 0;
  double residual_ = 1.0;  // deviation of the residual stream, as it grows from layer to layer
  struct Stripe {
    std::vector<char> values;   // [rows, cols] as stored
    std::vector<float> scales;  // [rows], for int8
  };
  std::array<Stripe, 2> stripes_;
  std::vector<char> packed_;  // the pool, scaled and rounded
};

// The next stripe is made while this one is uploaded: the first touch of new memory costs as much as making it.
absl::Status Generator::Rows(const Tensor& weight, const Tensor& scale, const RowId& id, const MakeRow& make) {
  if (weight.empty()) return absl::OkStatus();
  const int64_t row_bytes = weight.cols * SizeOf(weight.dtype);
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / row_bytes, 1, weight.rows);
  const auto make_stripe = [&](int64_t start, Stripe* stripe) {
    const int64_t n = std::min(stripe_rows, weight.rows - start);
    stripe->values.resize(std::max<size_t>(stripe->values.size(), n * row_bytes));
    stripe->scales.resize(std::max<size_t>(stripe->scales.size(), n));
    InParallel(n, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) make(id(start + i), &stripe->values[i * row_bytes], &stripe->scales[i]);
    });
  };
  make_stripe(0, &stripes_[0]);
  for (int64_t r = 0; r < weight.rows; r += stripe_rows) {
    std::swap(stripes_[0], stripes_[1]);
    std::thread next;
    if (r + stripe_rows < weight.rows) next = std::thread([&, r] { make_stripe(r + stripe_rows, &stripes_[0]); });
    const int64_t n = std::min(stripe_rows, weight.rows - r);
    backend_.Upload(weight.Rows(r, n), stripes_[1].values.data());
    if (!scale.empty()) backend_.Upload(scale.Cols(r, n), stripes_[1].scales.data());
    if (next.joinable()) next.join();
    done_bytes_ += n * row_bytes;
    if (progress_ && !progress_(done_bytes_, total_bytes_)) return absl::CancelledError("loading was cancelled");
  }
  return absl::OkStatus();
}

absl::Status Generator::Noise(const Tensor& weight, const Tensor& scale, const RowId& id, uint64_t key,
                              double deviation) {
  const auto count = static_cast<int64_t>(pool_.values().size());
  const int64_t element = SizeOf(weight.dtype);
  packed_.resize(count * sizeof(float));
  std::vector<float> scaled(pool_.values());
  for (float& value : scaled) value *= static_cast<float>(deviation);
  const float factor = Int8Scale(pool_.largest() * static_cast<float>(deviation));
  if (weight.dtype == DType::kInt8) {
    QuantiseRow(scaled.data(), count, Int8Inverse(factor), reinterpret_cast<int8_t*>(packed_.data()));
  } else {
    CHECK(NarrowValues(scaled.data(), count, weight.dtype, packed_.data())) << deviation;
  }
  return Rows(weight, scale, id, [&](int64_t row, char* values, float* row_scale) {
    std::memcpy(values, &packed_[NoisePool::Offset(key, row) * element], weight.cols * element);
    *row_scale = factor;
  });
}

absl::Status Generator::Embeddings(const OptWeights& w) {
  RETURN_IF_ERROR(
      Noise(w.token_embedding.weight, w.token_embedding.scale, From(shard_.vocab.first), KeyOf(Part::kTokens), 1.0));
  return Noise(w.position_embedding, {}, From(0), KeyOf(Part::kPositions), kPositionDeviation);
}

absl::Status Generator::Layer(int32_t l, const LayerWeights& layer, LayerPredictorData* predictor) {
  const double row_deviation = 1.0 / std::sqrt(static_cast<double>(config_.hidden));
  FillNorm(layer.attention_norm);
  FillNorm(layer.mlp_norm);
  const int64_t first_feature = int64_t{shard_.heads.first} * config_.head_dim;
  const int64_t features = int64_t{shard_.heads.count} * config_.head_dim, hidden = config_.hidden;
  const auto of_qkv = [=](int64_t row) { return row / features * hidden + first_feature + row % features; };
  RETURN_IF_ERROR(Noise(layer.qkv.weight, layer.qkv.scale, of_qkv, KeyOf(Part::kQkv, l), row_deviation));
  RETURN_IF_ERROR(Noise(layer.out.weight, layer.out.scale, From(first_feature), KeyOf(Part::kOut, l),
                        kAttentionStep * residual_ * row_deviation));
  Fill(layer.qkv.bias, 0.0f);
  Fill(layer.out.bias, 0.0f);

  const std::vector<Neuron> neurons = NeuronsOf(model_, table_, l);
  RETURN_IF_ERROR(Up(l, layer.mlp.up, neurons, predictor));
  RETURN_IF_ERROR(Down(l, layer.mlp.down, neurons, predictor));
  residual_ *= std::sqrt(1.0 + kAttentionStep * kAttentionStep + kMlpStep * kMlpStep);
  return absl::OkStatus();
}

absl::Status Generator::Up(int32_t l, const LinearWeights& up, const std::vector<Neuron>& neurons,
                           LayerPredictorData* predictor) {
  const int64_t hidden = config_.hidden, ffn = config_.ffn, rank = PredictorRank(config_.hidden);
  SelectorData& selector = predictor->neurons;
  predictor->tap = Tap::kAttentionNorm;
  selector.rank = static_cast<int32_t>(rank);
  selector.a.resize(rank * hidden);
  selector.a_scale.resize(rank);
  selector.b.assign(rank * ffn, 0);

  std::vector<float> directions(rank * hidden);  // of norm 1, exactly what stage A holds
  const uint64_t direction_key = KeyOf(Part::kDirections, l);
  for (int64_t k = 0; k < rank; ++k) {
    float* const direction = &directions[k * hidden];
    QuantiseRow(pool_.Row(direction_key, k), hidden, kDirectionScale, &selector.a[k * hidden]);
    for (int64_t c = 0; c < hidden; ++c) direction[c] = selector.a[k * hidden + c];
    selector.a_scale[k] = 1.0f / std::sqrt(SumOfSquares(direction, hidden));
    for (int64_t c = 0; c < hidden; ++c) direction[c] *= selector.a_scale[k];
  }

  std::array<OperatingPoint*, kPredicted.size()> points;
  for (size_t i = 0; i < kPredicted.size(); ++i) {
    points[i] = &selector.points[static_cast<size_t>(kPredicted[i])].emplace();
    points[i]->rank = selector.rank;
    points[i]->thresholds.assign(ffn, 0.0f);
  }
  const uint64_t noise_key = KeyOf(Part::kUp, l), mixing_key = KeyOf(Part::kMixing, l);
  const double correlation = kWeightCorrelation, rest = std::sqrt(1.0 - correlation * correlation);
  const int64_t group = rank / kDirectionsOfNeuron;
  RETURN_IF_ERROR(Rows(up.weight, up.scale, NeuronIds(l), [&](int64_t j, char* values, float* scale) {
    thread_local std::vector<float> row;
    row.resize(hidden);
    // One direction of each group, so that they differ; weights from -127 to -64 and from 64 to 127.
    const float* from[kDirectionsOfNeuron];
    float mixing[kDirectionsOfNeuron];
    for (int i = 0; i < kDirectionsOfNeuron; ++i) {
      const uint64_t random = Scramble(mixing_key + static_cast<uint64_t>(j * kDirectionsOfNeuron + i));
      const int64_t k = i * group + static_cast<int64_t>((random >> 8) % static_cast<uint64_t>(group));
      const int32_t weight = 64 + static_cast<int32_t>(random >> 32 & 63);
      const int32_t integer = (random & 1) != 0 ? weight : -weight;
      selector.b[k * ffn + j] = static_cast<int8_t>(integer);
      from[i] = &directions[k * hidden];
      mixing[i] = static_cast<float>(integer);
    }
    for (int64_t c = 0; c < hidden; ++c) {
      row[c] = mixing[0] * from[0][c] + mixing[1] * from[1][c] + mixing[2] * from[2][c] + mixing[3] * from[3][c];
    }
    const double norm = std::sqrt(SumOfSquares(row.data(), hidden));
    const auto of_row = static_cast<float>(correlation / norm);
    const auto of_noise = static_cast<float>(rest / std::sqrt(pool_.SquareOfRow(noise_key, j, hidden)));
    const float* const noise = pool_.Row(noise_key, j);
    for (int64_t c = 0; c < hidden; ++c) row[c] = of_row * row[c] + of_noise * noise[c];
    const float to_one = 1.0f / std::sqrt(SumOfSquares(row.data(), hidden));
    for (int64_t c = 0; c < hidden; ++c) row[c] *= to_one;
    if (up.weight.dtype == DType::kInt8) {
      *scale = Int8Scale(LargestMagnitude(row.data(), hidden));
      QuantiseRow(row.data(), hidden, Int8Inverse(*scale), reinterpret_cast<int8_t*>(values));
    } else {
      CHECK(NarrowValues(row.data(), hidden, up.weight.dtype, values)) << "row " << j;
    }
    for (size_t i = 0; i < kPredicted.size(); ++i) {
      points[i]->thresholds[j] = static_cast<float>(norm * neurons[j].threshold[i]);
    }
  }));

  std::vector<float> bias(shard_.neuron_count);
  for (int32_t i = 0; i < shard_.neuron_count; ++i) bias[i] = static_cast<float>(-neurons[shard_.neuron(l, i)].z);
  double mean_square = 0.0;
  for (const Neuron& neuron : neurons) mean_square += neuron.mean_square;
  backend_.Upload(up.bias, bias.data());
  for (size_t i = 0; i < kPredicted.size(); ++i) {
    double selected = 0.0, missed = 0.0;
    for (const Neuron& neuron : neurons) {
      selected += NormalTail(neuron.threshold[i]);
      missed += neuron.missed[i];
    }
    points[i]->density = selected / static_cast<double>(ffn);
    points[i]->missed_mass = points[i]->missed_share = std::clamp(missed / mean_square, 0.0, 1.0);
  }
  return absl::OkStatus();
}

absl::Status Generator::Down(int32_t l, const LinearWeights& down, const std::vector<Neuron>& neurons,
                             LayerPredictorData* predictor) {
  const int64_t hidden = config_.hidden, ffn = config_.ffn;
  double variance = 0.0;
  for (const Neuron& neuron : neurons) variance += neuron.mean_square - neuron.mean * neuron.mean;
  const double step = l == config_.layers - 1 ? kLastMlpStep : kMlpStep;
  const double deviation = step * residual_ / std::sqrt(variance);
  const uint64_t key = KeyOf(Part::kDown, l);
  RETURN_IF_ERROR(Noise(down.weight, down.scale, NeuronIds(l), key, deviation));
  predictor->worth.assign(ffn, 0.0f);
  for (int32_t i = 0; i < shard_.neuron_count; ++i) {
    const int32_t j = shard_.neuron(l, i);
    predictor->worth[j] = static_cast<float>(deviation * deviation * pool_.SquareOfRow(key, j, hidden));
  }
  if (down.bias.empty()) return absl::OkStatus();
  // Minus the mean of the output; by columns, so that the order of the sum does not depend on the threads.
  std::vector<float> bias(hidden, 0.0f);
  InParallel(hidden, [&](int64_t first, int64_t last) {
    for (int64_t j = 0; j < ffn; ++j) {
      const float* const row = pool_.Row(key, j);
      const auto mean = static_cast<float>(-deviation * neurons[j].mean);
      for (int64_t c = first; c < last; ++c) bias[c] += mean * row[c];
    }
  });
  backend_.Upload(down.bias, bias.data());
  return absl::OkStatus();
}

void Generator::Head(const OptWeights& w) {
  FillNorm(w.final_norm);
  const auto gain = static_cast<float>(kLogitDeviation / std::sqrt(static_cast<double>(config_.hidden)));
  std::vector<float> signs(config_.hidden);
  const uint64_t key = KeyOf(Part::kSigns);
  for (size_t c = 0; c < signs.size(); ++c) signs[c] = (Scramble(key + c) & 1) != 0 ? gain : -gain;
  backend_.Upload(w.final_norm.weight, signs.data());
}

}  // namespace

bool IsSynthetic(const std::string& model) { return absl::StartsWith(model, kPrefix); }

absl::StatusOr<SyntheticModel> ParseSynthetic(const std::string& model) {
  const std::string text = model.substr(IsSynthetic(model) ? sizeof kPrefix - 1 : 0);
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('?', 1));
  const auto* const shape =
      std::find_if(std::begin(kShapes), std::end(kShapes), [&](const Shape& s) { return s.name == parts.first; });
  if (shape == std::end(kShapes)) {
    const auto append = [](std::string* out, const Shape& s) { absl::StrAppend(out, kPrefix, s.name); };
    return absl::InvalidArgumentError(absl::StrCat("there is no synthetic model '", parts.first, "'; there are ",
                                                   absl::StrJoin(kShapes, ", ", append)));
  }
  SyntheticModel result;
  result.name = shape->name;
  result.profile = shape->profile;
  OptConfig& config = result.config;
  config.hidden = config.embed = shape->hidden;
  config.layers = shape->layers;
  config.heads = shape->heads;
  config.head_dim = shape->hidden / shape->heads;
  config.ffn = shape->ffn;
  config.vocab = shape->vocab;
  config.context = shape->context;
  for (const auto option : absl::StrSplit(parts.second, '&', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> entry = absl::StrSplit(option, absl::MaxSplits('=', 1));
    const auto between = [&](double* value, double least, double most) {
      double parsed = 0.0;
      if (!absl::SimpleAtod(entry.second, &parsed) || !(parsed >= least && parsed <= most)) return false;
      *value = parsed;
      return true;
    };
    const bool good = entry.first == "seed"      ? absl::SimpleAtoi(entry.second, &result.seed)
                      : entry.first == "recall"  ? between(&result.recall, 0.5, 0.99)
                      : entry.first == "density" ? between(&result.density, 0.1, 5.0)
                                                 : false;
    if (!good) {
      return absl::InvalidArgumentError(absl::StrCat(model, ": option '", option,
                                                     "' must be seed=NUMBER, recall=0.5 ... 0.99 (of BALANCED) or "
                                                     "density=0.1 ... 5 (multiple of the published densities)"));
    }
  }
  return result;
}

namespace {

SyntheticDensity Expected(const SyntheticModel& model, const NeuronTable& table, int32_t layer, int32_t batch) {
  SyntheticDensity sum;
  double selected = 0.0, hits = 0.0;
  const std::vector<double> shares = SelectionShares(model, layer);
  for (const double share : shares) {
    const double active = table.Of(share).active;
    sum.selected += Union(share, batch);
    sum.active += Union(active, batch);
    selected += share;
    hits += model.recall * active;
  }
  const auto neurons = static_cast<double>(shares.size());
  return {sum.selected / neurons, sum.active / neurons, hits / selected};
}

}  // namespace

SyntheticDensity ExpectedDensity(const SyntheticModel& model, int32_t layer, int32_t batch) {
  return Expected(model, NeuronTable(model.recall), layer, batch);
}

ReadTable ExpectedReads(const SyntheticModel& model, absl::Span<const int> batches) {
  constexpr int32_t kQuantiles = 512;
  const NeuronTable table(model.recall);
  SyntheticModel coarse = model;
  coarse.config.ffn = std::min(model.config.ffn, kQuantiles);
  const int32_t layers = model.config.layers;
  ReadTable reads;
  for (auto& tier : reads) tier.assign(layers, std::vector<LayerReads>(batches.size()));
  for (int32_t l = 0; l < layers; ++l) {
    if (l > 1 && l * kQuarters / layers == (l - 1) * kQuarters / layers) {  // alike, but for layer 0
      for (auto& tier : reads) tier[l] = tier[l - 1];
      continue;
    }
    const std::vector<double> shares = SelectionShares(coarse, l);
    for (const Tier tier : {Tier::kExact, Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
      for (LayerReads& layer : reads[static_cast<size_t>(tier)][l]) layer = {tier == Tier::kExact ? 1.0 : 0.0, 0.0};
    }
    for (const double share : shares) {
      const Neuron neuron = table.Of(share);
      const double weight = 1.0 / static_cast<double>(shares.size());
      for (size_t b = 0; b < batches.size(); ++b) {
        const double some_active = Union(neuron.active, batches[b]);
        reads[static_cast<size_t>(Tier::kExact)][l][b].down += weight * some_active;
        for (size_t i = 0; i < kPredicted.size(); ++i) {
          const double selected = NormalTail(neuron.threshold[i]);
          const double hit = TierRecall(kPredicted[i], model.recall) * neuron.active;
          const double some_selected = Union(selected, batches[b]);
          // Selected by some token and active for some, not always the same one.
          const double both = some_selected + some_active - Union(selected + neuron.active - hit, batches[b]);
          LayerReads& layer = reads[static_cast<size_t>(kPredicted[i])][l][b];
          layer.up += weight * some_selected;
          layer.down += weight * both;
        }
      }
    }
  }
  return reads;
}

std::string DensitySource(const SyntheticModel& model) { return absl::StrCat("OPT-", kProfiles[model.profile].name); }

PredictorData PredictorOutline(const SyntheticModel& model) {
  PredictorData outline;
  outline.tiers.assign(kPredicted.begin(), kPredicted.end());
  outline.layers.resize(model.config.layers);
  for (LayerPredictorData& layer : outline.layers) {
    layer.neurons.rank = PredictorRank(model.config.hidden);
    for (const Tier tier : kPredicted) {
      layer.neurons.points[static_cast<size_t>(tier)].emplace().rank = layer.neurons.rank;
    }
  }
  return outline;
}

SyntheticBytes BytesOf(const OptConfig& config, const Shard& shard, DType dtype) {
  const int64_t hidden = config.hidden, neurons = shard.neuron_count;
  const int64_t layer = 4 * hidden * shard.heads.count * config.head_dim + 2 * hidden * neurons;
  const int64_t embeddings = (int64_t{shard.vocab.count} + config.context) * hidden;
  return {(config.layers * layer + embeddings) * SizeOf(dtype),
          config.layers * PredictorRank(config.hidden) * (hidden + neurons)};
}

std::string SyntheticModel::Description() const {
  const NeuronTable table(recall);
  double selected = 0.0, active = 0.0, hits = 0.0;
  for (int q = 0; q < kQuarters; ++q) {  // one layer stands for its quarter, the last: layer 0 is denser
    const SyntheticDensity layer = Expected(*this, table, (q + 1) * config.layers / kQuarters - 1, 1);
    selected += layer.selected / kQuarters;
    active += layer.active / kQuarters;
    hits += layer.selected * layer.precision / kQuarters;
  }
  return absl::StrFormat(
      "random weights in the shape of %s, seed %d, MLP densities after Polar Sparsity's OPT-%s times %g: about %.1f %% "
      "active, %.1f %% selected by BALANCED at recall %.2f and precision %.2f",
      name, seed, kProfiles[profile].name, density, 100.0 * active, 100.0 * selected, recall, hits / selected);
}

std::string SyntheticModel::Fingerprint() const {
  return absl::StrFormat("synthetic:%s?seed=%d&recall=%g&density=%g", name, seed, recall, density);
}

PredictorData StartPredictor(const SyntheticModel& model) {
  const NeuronTable table(model.recall);
  PredictorData predictor;
  predictor.weights_hash = model.Fingerprint();
  predictor.tiers.assign(kPredicted.begin(), kPredicted.end());
  predictor.report_json = R"({"synthetic": true})";
  for (int32_t l = 0; l < model.config.layers; ++l) {
    std::vector<float>& frequency = predictor.layers.emplace_back().frequency;
    for (const Neuron& neuron : NeuronsOf(model, table, l)) frequency.push_back(static_cast<float>(neuron.active));
  }
  return predictor;
}

absl::StatusOr<OptWeights> GenerateModel(const SyntheticModel& model, const Shard& shard, DType dtype, Backend& backend,
                                         const LoadProgress& progress, PredictorData* predictor) {
  ASSIGN_OR_RETURN(OptWeights weights, OptWeights::Allocate(model.config, shard, dtype, backend));
  Generator generator(model, shard, backend, progress, weights.bytes());
  RETURN_IF_ERROR(generator.Embeddings(weights));
  for (int32_t l = 0; l < model.config.layers; ++l) {
    LayerPredictorData unwanted;
    RETURN_IF_ERROR(generator.Layer(l, weights.layers[l], predictor != nullptr ? &predictor->layers[l] : &unwanted));
  }
  generator.Head(weights);
  backend.Synchronize();
  return weights;
}

}  // namespace dejavu
