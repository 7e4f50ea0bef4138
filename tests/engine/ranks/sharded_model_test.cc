// What a rank has of a model, held against the whole model: weights, keys and values.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine/formats/checkpoint.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/generator.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_weights.h"
#include "engine/model/shard.h"
#include "engine/model/weights_file.h"
#include "engine/planning/memory_plan.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/cpu.h"
#include "tests/engine/golden.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/tiny_checkpoint.h"

namespace dejavu {
namespace {

using Ids = std::vector<int64_t>;

Ids Count(int64_t first, int64_t count) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

// `own` holds the rows `ids` of `whole`, bit by bit.
void ExpectRows(const Tensor& own, const Tensor& whole, const Ids& ids, const std::string& name) {
  ASSERT_EQ(own.dtype, whole.dtype) << name;
  ASSERT_EQ(own.rows, static_cast<int64_t>(ids.size())) << name;
  EXPECT_EQ(own.empty(), ids.empty()) << name;
  if (own.empty()) return;
  ASSERT_EQ(own.cols, whole.cols) << name;
  const int64_t bytes = own.cols * SizeOf(own.dtype);
  for (int64_t r = 0; r < own.rows; ++r) {
    const char* const mine = static_cast<const char*>(own.data) + r * own.stride * SizeOf(own.dtype);
    const char* const theirs = static_cast<const char*>(whole.data) + ids[r] * whole.stride * SizeOf(own.dtype);
    ASSERT_EQ(std::memcmp(mine, theirs, bytes), 0) << name << " row " << r;
  }
}

// The same of elements of a float32 vector; nothing of nothing.
void ExpectElements(const Tensor& own, const Tensor& whole, const Ids& ids, const std::string& name) {
  if (whole.empty() || ids.empty()) {
    EXPECT_TRUE(own.empty()) << name;
    return;
  }
  ASSERT_EQ(own.cols, static_cast<int64_t>(ids.size())) << name;
  for (int64_t i = 0; i < own.cols; ++i) {
    ASSERT_EQ(own.row<float>(0)[i], whole.row<float>(0)[ids[i]]) << name << " element " << i;
  }
}

void ExpectNorm(const NormWeights& own, const NormWeights& whole, const std::string& name) {
  ExpectElements(own.weight, whole.weight, Count(0, whole.weight.cols), name + " weight");
  ExpectElements(own.bias, whole.bias, Count(0, whole.bias.cols), name + " bias");
}

void ExpectLinear(const LinearWeights& own, const LinearWeights& whole, const Ids& rows, const Ids& biases,
                  const std::string& name) {
  EXPECT_EQ(own.layout, whole.layout) << name;
  ExpectRows(own.weight, whole.weight, rows, name);
  ExpectElements(own.scale, whole.scale, rows, name + " scale");
  ExpectElements(own.bias, whole.bias, biases, name + " bias");
}

void ExpectShare(const OptConfig& config, const Shard& shard, const OptWeights& own, const OptWeights& whole) {
  const Ids tokens = Count(shard.vocab.first, shard.vocab.count);
  ExpectRows(own.token_embedding.weight, whole.token_embedding.weight, tokens, "token embedding");
  ExpectElements(own.token_embedding.scale, whole.token_embedding.scale, tokens, "token embedding scale");
  EXPECT_EQ(own.has_own_head(), whole.has_own_head());
  EXPECT_EQ(own.head.scale.data == own.token_embedding.scale.data, !own.has_own_head() || own.head.scale.empty());
  ExpectLinear(own.head, whole.head, tokens, {}, "head");
  ExpectRows(own.position_embedding, whole.position_embedding, Count(0, whole.position_embedding.rows), "positions");
  for (const auto& [mine, theirs, name] : {std::tuple(&own.project_in, &whole.project_in, "in"),
                                           std::tuple(&own.project_out, &whole.project_out, "out")}) {
    ExpectLinear(*mine, *theirs, Count(0, theirs->weight.rows), {}, std::string("project_") + name);
  }
  ExpectNorm(own.final_norm, whole.final_norm, "final norm");
  const int64_t hidden = config.hidden, features = int64_t{shard.heads.count} * config.head_dim;
  const Ids of_heads = Count(int64_t{shard.heads.first} * config.head_dim, features);
  const Ids sums = shard.first() ? Count(0, hidden) : Ids();  // of a bias that is added once
  Ids of_qkv;
  for (int64_t part = 0; part < 3; ++part) {
    for (const int64_t id : of_heads) of_qkv.push_back(part * hidden + id);
  }
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerWeights &mine = own.layers[l], &theirs = whole.layers[l];
    const std::string at = "layer " + std::to_string(l) + ' ';
    Ids neurons;
    for (int32_t i = 0; i < shard.neuron_count; ++i) neurons.push_back(shard.neuron(l, i));
    ExpectNorm(mine.attention_norm, theirs.attention_norm, at + "attention norm");
    ExpectNorm(mine.mlp_norm, theirs.mlp_norm, at + "MLP norm");
    ExpectLinear(mine.qkv, theirs.qkv, of_qkv, of_qkv, at + "qkv");
    ExpectLinear(mine.out, theirs.out, of_heads, sums, at + "out");
    ExpectLinear(mine.mlp.up, theirs.mlp.up, neurons, neurons, at + "up");
    ExpectLinear(mine.mlp.down, theirs.mlp.down, neurons, sums, at + "down");
  }
}

int64_t BytesOf(const LinearWeights& w) { return w.weight.bytes() + w.scale.bytes() + w.bias.bytes(); }

// Of what is divided among the ranks, without the biases that the first one has.
int64_t SplitBytes(const OptWeights& w) {
  int64_t bytes = w.token_embedding.weight.bytes() + w.token_embedding.scale.bytes();
  if (w.has_own_head()) bytes += BytesOf(w.head);
  for (const LayerWeights& layer : w.layers) {
    bytes += BytesOf(layer.qkv) + BytesOf(layer.out) + BytesOf(layer.mlp.up) + BytesOf(layer.mlp.down) -
             layer.out.bias.bytes() - layer.mlp.down.bias.bytes();
  }
  return bytes;
}

void ExpectRanksTogetherHaveTheWholeModel(const std::string& path) {
  const OptConfig config = *OptConfig::Load(path);
  const Checkpoint checkpoint = *Checkpoint::Open(path);
  const PredictorData frequencies = RandomFrequencies(config, 3);
  bool some_without_heads = false;
  for (const std::optional<DType> dtype :
       {std::optional<DType>(), std::optional(DType::kBFloat16), std::optional(DType::kInt8)}) {
    OptWeights whole = *OptWeights::Load(checkpoint, config, Shard::Whole(config), Cpu(), nullptr, dtype);
    const ScratchDirectory converted;
    ASSERT_TRUE(WeightsFile::Write(whole, config, "hash", converted.Path(WeightsFile::kName), nullptr).ok());
    const std::optional<WeightsFile> file = *WeightsFile::Open(converted.path(), config);
    for (int ranks = 1; ranks <= 5; ++ranks) {
      int64_t split = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        SCOPED_TRACE(testing::Message() << (dtype.has_value() ? Name(*dtype) : "stored") << ", rank " << rank << " of "
                                        << ranks);
        const Shard shard = *MakeShard(config, &frequencies, rank, ranks);
        const OptWeights own = *OptWeights::Load(checkpoint, config, shard, Cpu(), nullptr, dtype);
        ExpectShare(config, shard, own, whole);
        EXPECT_EQ(OptWeights::Measure(checkpoint, config, shard, dtype).value(), own.bytes());
        const OptWeights again = *file->Load(shard, Cpu(), nullptr, dtype);
        ExpectShare(config, shard, again, whole);
        EXPECT_EQ(file->Measure(shard, dtype).value(), again.bytes());
        EXPECT_EQ(again.bytes(), own.bytes());
        some_without_heads |= shard.heads.count == 0;
        split += SplitBytes(own);
      }
      EXPECT_EQ(split, SplitBytes(whole)) << ranks << " ranks";
    }
  }
  EXPECT_EQ(some_without_heads, config.heads < 5);
}

class ShardedLoad : public testing::TestWithParam<std::string> {};

TEST_P(ShardedLoad, RanksTogetherHaveTheWholeModelBitByBit) {
  ExpectRanksTogetherHaveTheWholeModel(CheckpointPath(GetParam()));
}

TEST(ShardedHead, IsDividedAsTheEmbeddingIs) {
  const ScratchDirectory directory;
  TinyCheckpoint::Random(1).Untie(2).Write(directory);
  ExpectRanksTogetherHaveTheWholeModel(directory.path());
}

INSTANTIATE_TEST_SUITE_P(EveryForm, ShardedLoad, testing::ValuesIn(GoldenCheckpoints()));

// Bytes that this process has asked the system to read; nothing where it does not say.
std::optional<int64_t> BytesRead() {
  std::ifstream io("/proc/self/io");
  std::string key;
  int64_t value;
  while (io >> key >> value) {
    if (key == "rchar:") return value;
  }
  return std::nullopt;
}

// Of four ranks each has a quarter of what is divided, to the byte, and reads that, but for whole down-projections.
TEST(ShardedModel, ARankHoldsAndReadsItsShare) {
  constexpr int64_t kHidden = 160, kFfn = 640, kLayers = 2, kVocab = 400, kRanks = 4, kFloat = 4;
  TinyCheckpoint tiny = TinyCheckpoint::Random(5, kHidden, kFfn, kLayers, kVocab);
  tiny.config["num_attention_heads"] = 4;
  const ScratchDirectory directory;
  tiny.Write(directory);
  const OptConfig config = *OptConfig::Load(directory.path());
  const Checkpoint checkpoint = *Checkpoint::Open(directory.path());
  const PredictorData frequencies = RandomFrequencies(config, 4);

  const int64_t matrices = kVocab * kHidden + kLayers * (4 * kHidden * kHidden + 2 * kHidden * kFfn);
  const int64_t divided = (matrices + kLayers * (3 * kHidden + kFfn)) * kFloat;  // with biases of rows
  const int64_t norms = (2 * kLayers + 1) * 2 * kHidden * kFloat, positions = 34 * kHidden * kFloat;
  const int64_t of_the_first = kLayers * 2 * kHidden * kFloat;
  for (int rank = 0; rank < kRanks; ++rank) {
    SCOPED_TRACE(testing::Message() << "rank " << rank);
    const Shard shard = *MakeShard(config, &frequencies, rank, kRanks);
    int64_t told = 0, total = 0;
    const auto progress = [&](int64_t done, int64_t all) {
      told = done;
      total = all;
      return true;
    };
    const std::optional<int64_t> before = BytesRead();
    const OptWeights own = *OptWeights::Load(checkpoint, config, shard, Cpu(), progress);
    const std::optional<int64_t> after = BytesRead();
    EXPECT_EQ(SplitBytes(own), divided / kRanks);
    const int64_t share = divided / kRanks + norms + positions + (rank == 0 ? of_the_first : 0);
    EXPECT_EQ(total, share);
    EXPECT_EQ(told, total);
    if (!before.has_value() || !after.has_value()) continue;
    const int64_t others_down = kLayers * kFfn * kHidden * kFloat * (kRanks - 1) / kRanks;
    const int64_t others_biases = kLayers * kFfn * kFloat, own_reading = 4096;  // of /proc itself
    EXPECT_GE(*after - *before, share + others_down * 9 / 10);
    EXPECT_LE(*after - *before, share + others_down + others_biases + own_reading);
  }
}

TEST(ShardedModel, ATensorThatIsMissingIsNamedByEveryRank) {
  const TinyCheckpoint whole = TinyCheckpoint::Random(3);
  for (const char* name :
       {"layers.1.self_attn.v_proj.bias", "layers.0.self_attn.out_proj.weight", "layers.1.fc2.bias"}) {
    TinyCheckpoint tiny = whole;
    tiny.tensors.erase(std::string("model.decoder.") + name);
    const ScratchDirectory directory;
    tiny.Write(directory);
    const OptConfig config = *OptConfig::Load(directory.path());
    const Checkpoint checkpoint = *Checkpoint::Open(directory.path());
    for (int rank = 0; rank < 3; ++rank) {  // the last without heads
      const auto weights = OptWeights::Load(checkpoint, config, *MakeShard(config, nullptr, rank, 3), Cpu(), nullptr);
      EXPECT_THAT(std::string(weights.status().message()), testing::HasSubstr(name));
    }
  }
}

// ---- Synthetic models

TEST(ShardedSynthetic, RanksGenerateRowsOfTheWholeModel) {
  const SyntheticModel model = *ParseSynthetic("synthetic:opt-tiny?seed=7");
  const OptConfig& config = model.config;
  for (const DType dtype : {DType::kBFloat16, DType::kInt8}) {
    PredictorData predictor = StartPredictor(model);
    const PredictorData start = predictor;
    const OptWeights whole = *GenerateModel(model, Shard::Whole(config), dtype, Cpu(), nullptr, &predictor);
    for (const int ranks : {2, 5}) {
      for (int rank = 0; rank < ranks; ++rank) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << ", rank " << rank << " of " << ranks);
        const Shard shard = *MakeShard(config, &start, rank, ranks);
        PredictorData own_predictor = start;
        int64_t told = 0, total = 0;
        const OptWeights own = *GenerateModel(
            model, shard, dtype, Cpu(),
            [&](int64_t done, int64_t all) {
              told = done;
              total = all;
              return true;
            },
            &own_predictor);
        ExpectShare(config, shard, own, whole);
        EXPECT_LE(told, total);
        for (int32_t l = 0; l < config.layers; ++l) {
          const LayerPredictorData &mine = own_predictor.layers[l], &theirs = predictor.layers[l];
          EXPECT_EQ(mine.neurons.a, theirs.neurons.a);
          EXPECT_EQ(mine.neurons.a_scale, theirs.neurons.a_scale);
          EXPECT_EQ(mine.frequency, theirs.frequency);
          for (int32_t i = 0; i < shard.neuron_count; ++i) {
            const int32_t j = shard.neuron(l, i);
            EXPECT_EQ(mine.worth[j], theirs.worth[j]);
            for (int32_t k = 0; k < mine.neurons.rank; ++k) {
              ASSERT_EQ(mine.neurons.b[k * config.ffn + j], theirs.neurons.b[k * config.ffn + j]);
            }
            for (const Tier tier : predictor.tiers) {
              const OperatingPoint &own_point = *mine.neurons.points[static_cast<size_t>(tier)],
                                   &point = *theirs.neurons.points[static_cast<size_t>(tier)];
              EXPECT_EQ(own_point.thresholds[j], point.thresholds[j]);
              EXPECT_EQ(own_point.density, point.density);
              EXPECT_EQ(own_point.missed_share, point.missed_share);
            }
          }
        }
      }
    }
  }
}

TEST(ShardedSynthetic, LoadsARankWithNeuronsDealtByFrequency) {
  const std::string name = "synthetic:opt-tiny";
  const OptConfig config = *LoadModelConfig(name);
  double expected[2] = {};
  for (int rank = 0; rank < 2; ++rank) {
    const auto loaded = LoadModel({name, "stored", "", rank, 2}, config, Cpu(), nullptr);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(loaded->shard.rank, rank);
    EXPECT_EQ(loaded->shard.ranks, 2);
    EXPECT_EQ(loaded->weights.layers[0].mlp.up.weight.rows, config.ffn / 2);
    for (int32_t i = 0; i < loaded->shard.neuron_count; ++i) {
      expected[rank] += loaded->predictor->layers[1].frequency[loaded->shard.neuron(1, i)];
    }
  }
  EXPECT_NEAR(expected[0], expected[1], 1.0) << "dealing leaves at most one neuron's difference";
}

// ---- A model in a directory

TEST(ShardedModel, TheEmbeddedModelIsDealtByItsPredictor) {
  const std::string path = EMBEDDED_MODEL;
  const OptConfig config = *LoadModelConfig(path);
  std::vector<double> expected(3, 0.0);
  for (int rank = 0; rank < 3; ++rank) {
    const auto loaded = LoadModel({path, "stored", "", rank, 3}, config, Cpu(), nullptr);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    ASSERT_TRUE(loaded->predictor.has_value());
    EXPECT_EQ(MeasureModel({path, "stored", "", rank, 3}, config)->weights, loaded->weights.bytes());
    for (int32_t i = 0; i < loaded->shard.neuron_count; ++i) {
      expected[rank] += loaded->predictor->layers[0].frequency[loaded->shard.neuron(0, i)];
    }
  }
  for (const double e : expected) EXPECT_NEAR(e, expected[0], 0.01 * expected[0]);
}

// ---- Keys and values, and the plan of memory

TEST(ShardedModel, KeysAndValuesAreThoseOfTheOwnHeads) {
  const OptConfig config = ParseSynthetic("synthetic:opt-tiny")->config;
  int64_t together = 0;
  for (int rank = 0; rank < 5; ++rank) {  // of four heads
    const Shard shard = *MakeShard(config, nullptr, rank, 5);
    together += KvCache::BlockBytes(config, 16, DType::kFloat16, shard.heads.count);
    const auto cache = KvCache::Create(Cpu(), config, 10, 16, DType::kFloat16, shard.heads.count);
    ASSERT_TRUE(cache.ok()) << cache.status();
    EXPECT_EQ(cache->layer(config.layers - 1).heads, shard.heads.count);
    EXPECT_EQ(cache->layer(config.layers - 1).blocks, 10);
  }
  EXPECT_EQ(together, KvCache::BlockBytes(config, 16, DType::kFloat16, config.heads));
  EXPECT_EQ(together, int64_t{2} * config.layers * config.hidden * 16 * 2);
}

TEST(ShardedModel, AMemoryPlanIsOneRanks) {
  EngineOptions options;
  options.model = "synthetic:opt-tiny";
  options.memory_share = 0.5;
  const OptConfig config = *LoadModelConfig(options.model);
  const MemoryPlan whole = *PlanMemory(options, config, Cpu());
  int64_t weights = 0, keys = 0;
  for (int rank = 0; rank < 5; ++rank) {
    const auto plan = PlanMemory(options, config, Cpu(), rank, 5);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->kv_blocks, whole.kv_blocks) << "all that is useful";
    EXPECT_LT(plan->activation_bytes, whole.activation_bytes);
    EXPECT_LT(plan->predictor_bytes, whole.predictor_bytes);
    weights += plan->weight_bytes;
    keys += plan->kv_bytes;
  }
  const int64_t positions = int64_t{config.context} * config.hidden * 2;
  EXPECT_EQ(weights, whole.weight_bytes + 4 * positions);
  EXPECT_EQ(keys, whole.kv_bytes);
}

}  // namespace
}  // namespace dejavu
