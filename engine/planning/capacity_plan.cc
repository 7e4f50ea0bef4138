// A model is a set of tensors with shapes and no memory: what a rank holds of it is what DeviceLayout would take, what
// a step reads of it is what engine/model/weight_bytes.h counts. A step then takes
//   (weights and predictor read + keys and values of the context) / (bandwidth * share) + all-reduces * time of one
// and nothing for arithmetic, launches, sampling and prompts.
#include "engine/planning/capacity_plan.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/formats/checkpoint.h"
#include "engine/load/loaded_model.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_weights.h"
#include "engine/model/weight_bytes.h"
#include "engine/planning/memory_plan.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

constexpr double kGib = 1 << 30;
constexpr int64_t kMib = 1 << 20;

double GibOf(int64_t bytes) { return static_cast<double>(bytes) / kGib; }

// ---- Shapes

// Rank 0's part, without the ids of its neurons.
Shard FirstShard(const OptConfig& config, int ranks) {
  Shard shard = Shard::Whole(config);
  shard.ranks = ranks;
  const auto largest = [&](int32_t count) { return (count + ranks - 1) / ranks; };
  shard.heads.count = largest(config.heads);
  shard.vocab.count = largest(config.vocab);
  shard.neuron_count = largest(config.ffn);
  return shard;
}

// The tensors of rank 0's OptWeights, without memory.
class Shapes {
 public:
  Shapes(const OptConfig& config, const Shard& shard, DType dtype, DType stored) : dtype_(dtype) {
    using Layout = LinearWeights::Layout;
    const int64_t hidden = config.hidden, features = int64_t{shard.heads.count} * config.head_dim;
    const int64_t biases = config.biases ? 1 : 0;
    OptWeights& w = weights_;
    Matrix(&split_, &w.token_embedding.weight, &w.token_embedding.scale, shard.vocab.count, config.embed);
    // int8 leaves it as stored.
    replicated_.Reserve(&w.position_embedding, dtype == DType::kInt8 ? stored : dtype, kPositionOffset + config.context,
                        hidden);
    if (config.embed != config.hidden) {
      Matrix(&replicated_, &w.project_in.weight, &w.project_in.scale, hidden, config.embed);
      Matrix(&replicated_, &w.project_out.weight, &w.project_out.scale, config.embed, hidden);
    }
    w.layers.resize(config.layers);
    for (LayerWeights& layer : w.layers) {
      for (NormWeights* norm : {&layer.attention_norm, &layer.mlp_norm}) Norm(norm, hidden);
      layer.qkv.layout = layer.mlp.up.layout = Layout::kOutputRows;
      layer.out.layout = layer.mlp.down.layout = Layout::kInputRows;
      Matrix(&split_, &layer.qkv.weight, &layer.qkv.scale, 3 * features, hidden);
      Matrix(&split_, &layer.out.weight, &layer.out.scale, features, hidden);
      Matrix(&split_, &layer.mlp.up.weight, &layer.mlp.up.scale, shard.neuron_count, hidden);
      Matrix(&split_, &layer.mlp.down.weight, &layer.mlp.down.scale, shard.neuron_count, hidden);
      Vector(&split_, &layer.qkv.bias, biases * 3 * features);
      Vector(&split_, &layer.mlp.up.bias, biases * shard.neuron_count);
      Vector(&first_rank_, &layer.out.bias, biases * hidden);
      Vector(&first_rank_, &layer.mlp.down.bias, biases * hidden);
    }
    if (config.final_norm) Norm(&w.final_norm, hidden);
    w.head.weight = w.token_embedding.weight;
    w.head.scale = w.token_embedding.scale;
  }

  const OptWeights& weights() const { return weights_; }
  RankWeights bytes() const { return {split_.bytes(), replicated_.bytes(), first_rank_.bytes()}; }

 private:
  static void Vector(DeviceLayout* layout, Tensor* view, int64_t count) {
    if (count > 0) layout->Reserve(view, DType::kFloat32, 1, count);
  }
  void Matrix(DeviceLayout* layout, Tensor* weight, Tensor* scale, int64_t rows, int64_t cols) const {
    layout->Reserve(weight, dtype_, rows, cols);
    if (dtype_ == DType::kInt8) Vector(layout, scale, rows);
  }
  void Norm(NormWeights* norm, int64_t count) {
    Vector(&replicated_, &norm->weight, count);
    Vector(&replicated_, &norm->bias, count);
  }

  const DType dtype_;
  DeviceLayout split_, replicated_, first_rank_;
  OptWeights weights_;
};

RankPredictor PredictorBytes(const PredictorData& predictor, const OptConfig& config, const Shard& shard) {
  RankPredictor bytes;
  for (const LayerPredictorData& layer : predictor.layers) {
    const std::pair<const SelectorData*, int64_t> selectors[] = {{&layer.heads, shard.heads.count},
                                                                 {&layer.neurons, shard.neuron_count}};
    for (const auto& [selector, outputs] : selectors) {
      if (selector->rank == 0) continue;
      const auto points = std::count_if(selector->points.begin(), selector->points.end(),
                                        [](const auto& point) { return point.has_value(); });
      bytes.replicated += selector->rank * (config.hidden + static_cast<int64_t>(sizeof(float)));
      bytes.split += outputs * (selector->rank + points * static_cast<int64_t>(sizeof(uint16_t)));
    }
    if (layer.heads.rank + layer.neurons.rank > 0) bytes.split += shard.neuron_count * int64_t{sizeof(float)};  // worth
  }
  return bytes;
}

// ---- What fits

struct Space {
  Shard shard;
  DType weights = DType::kFloat16, kv = DType::kFloat16;
  RankWeights weight_bytes;
  RankPredictor predictor_bytes;
  int64_t budget = 0, activations = 0;
  int64_t block_bytes = 0, per_sequence = 0;  // of keys and values
  int64_t blocks = 0;                         // that the daemon would take
  int64_t for_kv = 0;                         // what the rest leaves for them; may be negative

  bool fits() const { return for_kv >= blocks * block_bytes && blocks >= per_sequence; }
};

int64_t MemoryBytes(const PlanOptions& devices) { return static_cast<int64_t>(devices.memory_gib * kGib); }

absl::StatusOr<Space> Measure(const PlannedModel& model, const EngineOptions& options, const PlanOptions& devices) {
  const OptConfig& config = model.config;
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  Space space;
  ASSIGN_OR_RETURN(space.kv, ParseKvType(options.kv.dtype));
  if (devices.devices < 1 || devices.devices > std::min(config.ffn, config.vocab)) {
    return absl::InvalidArgumentError(absl::StrCat(devices.devices, " devices for ", config.ffn, " neurons and ",
                                                   config.vocab, " tokens: each needs one of both"));
  }
  space.weights = dtype.value_or(model.stored);
  space.shard = FirstShard(config, devices.devices);
  space.weight_bytes = Shapes(config, space.shard, space.weights, model.stored).bytes();
  if (model.predictor.has_value()) space.predictor_bytes = PredictorBytes(*model.predictor, config, space.shard);
  space.activations = ActivationBytes(options, config, space.shard);
  space.budget = static_cast<int64_t>(options.memory_share * static_cast<double>(MemoryBytes(devices)));
  space.for_kv = space.budget - space.weight_bytes.total() - space.predictor_bytes.total() - space.activations;

  space.block_bytes = KvCache::BlockBytes(config, options.kv.block_tokens, space.kv, space.shard.heads.count);
  space.per_sequence = (config.context + options.kv.block_tokens - 1) / options.kv.block_tokens;
  const int64_t useful = options.scheduler.max_batch * space.per_sequence;
  space.blocks =
      std::min(useful, (options.kv.memory_mib > 0 ? options.kv.memory_mib * kMib : std::max<int64_t>(space.for_kv, 0)) /
                           space.block_bytes);
  return space;
}

std::string WhyNot(const Space& space, const OptConfig& config) {
  const int64_t sequence = space.per_sequence * space.block_bytes;
  if (space.for_kv < sequence) {
    return absl::StrFormat(
        "weights, predictor and activations of a rank take %.2f GiB and keys and values of one sequence of %d tokens "
        "%.2f GiB; %.2f GiB may be taken",
        GibOf(space.budget - space.for_kv), config.context, GibOf(sequence), GibOf(space.budget));
  }
  if (space.blocks < space.per_sequence) {
    return absl::StrFormat("kv.memory_mib gives keys and values %.2f GiB; one sequence of %d tokens takes %.2f GiB",
                           GibOf(space.blocks * space.block_bytes), config.context, GibOf(sequence));
  }
  return absl::StrFormat("kv.memory_mib gives keys and values %.2f GiB; the rest leaves them %.2f GiB",
                         GibOf(space.blocks * space.block_bytes), GibOf(space.for_kv));
}

std::vector<PlanAlternative> FindAlternatives(const PlannedModel& model, const EngineOptions& options,
                                              const PlanOptions& devices, const Space& space) {
  std::vector<PlanAlternative> found;
  const auto fits = [&](const EngineOptions& other, int count) {
    PlanOptions same = devices;
    same.devices = count;
    const absl::StatusOr<Space> measured = Measure(model, other, same);
    return measured.ok() && measured->fits();
  };
  for (int count = devices.devices + 1; count <= kMaxPlanDevices; ++count) {
    if (!fits(options, count)) continue;
    found.push_back({absl::StrCat("--plan-devices ", count), absl::StrCat(count, " devices of this memory")});
    break;
  }
  for (const auto& [name, dtype] : {std::pair("fp16", DType::kFloat16), std::pair("int8", DType::kInt8)}) {
    EngineOptions other = options;
    other.weights = name;
    if (SizeOf(dtype) >= SizeOf(space.weights) || !fits(other, devices.devices)) continue;
    found.push_back({absl::StrCat("--weights ", name), absl::StrCat("weights in ", Name(dtype))});
  }
  if (space.kv == DType::kFloat32) {
    EngineOptions other = options;
    other.kv.dtype = "fp16";
    if (fits(other, devices.devices)) found.push_back({"--kv-dtype fp16", "keys and values in float16"});
  }
  if (options.kv.memory_mib > 0) {
    EngineOptions other = options;
    const int64_t least = (space.per_sequence * space.block_bytes + kMib - 1) / kMib;
    other.kv.memory_mib = std::max(least, std::min(options.kv.memory_mib, space.for_kv / kMib));
    if (fits(other, devices.devices)) {
      found.push_back(
          {absl::StrCat("--kv-memory-mib ", other.kv.memory_mib),
           absl::StrCat("keys and values in ", other.kv.memory_mib, " MiB (", least, " hold one sequence)")});
    }
  }
  return found;
}

// ---- What a step reads

double StepBytes(const PlannedModel& model, const OptWeights& weights, const Shard& shard, Tier tier, size_t b) {
  const OptConfig& config = model.config;
  double bytes = static_cast<double>(BytesAfterLayers(weights) + model.batches[b] * EmbeddingBytes(weights));
  const LayerBytes layer(weights.layers.front(), config);  // all have the same shapes
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerReads& reads = model.reads[static_cast<size_t>(tier)][l][b];
    bytes += static_cast<double>(layer.rest + layer.down_bias + shard.heads.count * layer.head);
    bytes += shard.neuron_count *
             (reads.up * static_cast<double>(layer.up_row) + reads.down * static_cast<double>(layer.down_row));
    if (!model.predictor.has_value()) continue;
    const LayerPredictorData& predictor = model.predictor->layers[l];
    bytes += static_cast<double>(NeuronPredictorBytes(predictor.neurons, tier, config.hidden, shard.neuron_count) +
                                 HeadPredictorBytes(predictor.heads, tier, config.hidden, shard.heads.count));
  }
  return bytes;
}

// ---- Models

OptConfig ShapeOf350m() {
  OptConfig config;
  config.hidden = 1024;
  config.layers = 24;
  config.heads = 16;
  config.head_dim = 64;
  config.ffn = 4096;
  config.vocab = 50272;
  config.context = 2048;
  config.embed = 512;
  config.pre_norm = config.final_norm = false;
  return config;
}

// Not among the synthetic models, which have no projections; like the other small ones it takes 6.7b's densities.
constexpr char kName350m[] = "opt-350m";

absl::StatusOr<SyntheticModel> NamedModel(const std::string& name) {
  absl::StatusOr<SyntheticModel> model = ParseSynthetic(name == kName350m ? "opt-125m" : name);
  if (!model.ok() && !IsSynthetic(name)) {
    return absl::NotFoundError(
        absl::StrCat(name, ": there is no such directory, nor a model of this name: ", model.status().message()));
  }
  if (!model.ok() || name != kName350m) return model;
  model->name = name;
  model->config = ShapeOf350m();
  return model;
}

// Probabilities of independent tokens, thinned out to quantiles.
std::vector<double> Quantiles(std::vector<float> values) {
  constexpr size_t kMost = 512;
  std::sort(values.begin(), values.end());
  const size_t count = std::min(values.size(), kMost);
  std::vector<double> quantiles;
  for (size_t i = 0; i < count; ++i) {
    quantiles.push_back(std::clamp<double>(values[(2 * i + 1) * values.size() / (2 * count)], 0.0, 1.0));
  }
  return quantiles;
}

// The factor that gives `shares`, none of which grows beyond 1, the mean `wanted`.
double FactorFor(const std::vector<double>& shares, double wanted) {
  double low = 0.0, high = 1e6;
  for (int i = 0; i < 40; ++i) {
    const double middle = std::sqrt(std::max(low, 1e-6) * high);
    double sum = 0.0;
    for (const double share : shares) sum += std::min(1.0, middle * share);
    (sum > wanted * static_cast<double>(shares.size()) ? high : low) = middle;
  }
  return high;
}

double MeanUnion(const std::vector<double>& shares, double factor, int batch) {
  double sum = 0.0;
  for (const double share : shares) sum += 1.0 - std::pow(1.0 - std::min(1.0, factor * share), batch);
  return sum / static_cast<double>(shares.size());
}

// Of a calibrated predictor: how often each neuron was active, and how many a tier selected, on the calibration's text.
// Which neurons a tier selects how often it does not say: they are taken to be proportional to how often they are
// active.
ReadTable ReadsOf(const PredictorData& predictor, const std::vector<int>& batches) {
  ReadTable reads;
  for (auto& tier : reads) tier.assign(predictor.layers.size(), std::vector<LayerReads>(batches.size()));
  for (size_t l = 0; l < predictor.layers.size(); ++l) {
    const LayerPredictorData& layer = predictor.layers[l];
    const std::vector<double> shares = Quantiles(layer.frequency);
    for (const Tier tier : kAllTiers) {
      if (tier == Tier::kDense) continue;
      const auto& point = layer.neurons.points[static_cast<size_t>(tier)];
      const double factor = point.has_value() ? FactorFor(shares, point->density) : 0.0;
      for (size_t b = 0; b < batches.size(); ++b) {
        LayerReads& of = reads[static_cast<size_t>(tier)][l][b];
        if (point.has_value()) of.up = std::max(point->density, MeanUnion(shares, factor, batches[b]));
        of.down = std::min(of.up, MeanUnion(shares, 1.0, batches[b]));
      }
    }
  }
  return reads;
}

// Empty: none.
std::string PredictorBeside(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/predictor.safetensors");
  return access(path.c_str(), F_OK) == 0 ? path : "";
}

absl::StatusOr<DType> StoredType(const std::string& directory) {
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
  if (absl::IsNotFound(checkpoint.status())) return DType::kFloat16;
  if (!checkpoint.ok()) return checkpoint.status();
  ASSIGN_OR_RETURN(const std::string prefix, WeightPrefix(*checkpoint));
  return checkpoint->Find(prefix + "embed_tokens.weight")->dtype;
}

absl::Status TakeFromFile(const std::string& path, PlannedModel* model) {
  ASSIGN_OR_RETURN(model->predictor, ReadPredictorOutline(path, model->config));
  model->densities = absl::StrCat("counted by the calibration of ", path, "; unions of independent tokens");
  model->reads = ReadsOf(*model->predictor, model->batches);
  return absl::OkStatus();
}

void TakePublished(const SyntheticModel& named, bool predicts, PlannedModel* model) {
  if (predicts) model->predictor = PredictorOutline(named);
  model->densities =
      absl::StrCat("published for ", DensitySource(named), " (Polar Sparsity), as in the synthetic models");
  model->reads = ExpectedReads(named, model->batches);
}

void TakeDense(PlannedModel* model) {
  model->densities = "unknown without a predictor: DENSE alone";
  for (auto& tier : model->reads) tier.assign(model->config.layers, std::vector<LayerReads>(model->batches.size()));
}

}  // namespace

absl::StatusOr<PlannedModel> DescribeModel(const EngineOptions& options, Tier highest, Tier lowest) {
  PlannedModel model;
  for (int batch = 1; batch <= options.scheduler.max_batch; batch *= 2) model.batches.push_back(batch);
  std::string predictor = options.predictor == "none" ? "" : options.predictor;
  if (!IsSynthetic(options.model) && access(options.model.c_str(), F_OK) == 0) {
    model.name = options.model;
    ASSIGN_OR_RETURN(model.config, OptConfig::Load(options.model));
    ASSIGN_OR_RETURN(model.stored, StoredType(options.model));
    if (options.predictor.empty()) predictor = PredictorBeside(options.model);
    if (predictor.empty()) {
      TakeDense(&model);
    } else {
      RETURN_IF_ERROR(TakeFromFile(predictor, &model));
    }
  } else {
    ASSIGN_OR_RETURN(const SyntheticModel named, NamedModel(options.model));
    model.name = named.name;
    model.config = named.config;
    model.stored = IsSynthetic(options.model) ? DType::kBFloat16 : DType::kFloat16;
    if (predictor.empty()) {
      TakePublished(named, options.predictor != "none", &model);
    } else {
      RETURN_IF_ERROR(TakeFromFile(predictor, &model));
    }
    model.synthetic = predictor.empty();
  }
  model.tiers = {Tier::kDense};
  if (model.synthetic || model.predictor.has_value()) model.tiers.push_back(Tier::kExact);
  if (model.predictor.has_value()) {
    model.tiers.insert(model.tiers.end(), model.predictor->tiers.begin(), model.predictor->tiers.end());
  }
  const auto unwanted = [&](Tier tier) { return tier < highest || tier > lowest; };
  model.tiers.erase(std::remove_if(model.tiers.begin(), model.tiers.end(), unwanted), model.tiers.end());
  return model;
}

absl::StatusOr<CapacityPlan> PlanCapacity(const PlannedModel& model, const EngineOptions& options,
                                          const PlanOptions& devices) {
  const OptConfig& config = model.config;
  ASSIGN_OR_RETURN(const Space space, Measure(model, options, devices));
  CapacityPlan plan;
  plan.model = model.name;
  plan.densities = model.densities;
  plan.synthetic = model.synthetic;
  plan.device = devices.device;
  plan.config = config;
  plan.weights = space.weights;
  plan.kv = space.kv;
  plan.shard = space.shard;
  plan.memory_bytes = MemoryBytes(devices);
  plan.memory_share = options.memory_share;
  plan.bandwidth_gbs = devices.bandwidth_gbs;
  plan.bandwidth_share = devices.bandwidth_share;
  plan.all_reduce_us = devices.all_reduce_us;
  plan.all_reduces = devices.devices > 1 ? 1 + 2 * config.layers : 0;  // the embedding; attention and MLP of each layer
  plan.context_tokens = std::min(devices.context_tokens, config.context);

  plan.budget_bytes = space.budget;
  plan.weight_bytes = space.weight_bytes;
  plan.predictor_bytes = space.predictor_bytes;
  plan.activation_bytes = space.activations;
  plan.kv_bytes = space.blocks * space.block_bytes;
  plan.kv_token_bytes = space.block_bytes / options.kv.block_tokens;
  plan.left_bytes = space.for_kv - plan.kv_bytes;
  plan.kv_tokens = space.blocks * options.kv.block_tokens;
  plan.kv_tokens_room = std::max<int64_t>(space.for_kv, 0) / space.block_bytes * options.kv.block_tokens;
  plan.largest_batch = options.scheduler.max_batch;

  const Shapes shapes(config, space.shard, space.weights, model.stored);
  const int64_t context_blocks = (plan.context_tokens + options.kv.block_tokens - 1) / options.kv.block_tokens;
  plan.batches = model.batches;
  for (const Tier tier : model.tiers) {
    TierPlan& of = plan.tiers.emplace_back();
    of.tier = tier;
    for (size_t b = 0; b < plan.batches.size(); ++b) {
      of.step_bytes.push_back(StepBytes(model, shapes.weights(), space.shard, tier, b));
      const double context_bytes =
          static_cast<double>(plan.batches[b] * plan.kv_token_bytes) * static_cast<double>(plan.context_tokens);
      const double ms = (of.step_bytes.back() + context_bytes) / (plan.bandwidth_gbs * plan.bandwidth_share * 1e6) +
                        plan.all_reduces * plan.all_reduce_us * 1e-3;
      const bool room = space.fits() && plan.batches[b] * context_blocks <= space.blocks;
      of.ms.push_back(room ? std::optional(ms) : std::nullopt);
    }
  }
  plan.fits = space.fits();
  if (!plan.fits) {
    plan.reason = WhyNot(space, config);
    plan.alternatives = FindAlternatives(model, options, devices, space);
  }
  return plan;
}

}  // namespace dejavu
