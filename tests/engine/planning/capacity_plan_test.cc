// The plan of capacity agrees with arithmetic by hand, with what the engine plans to take, and with itself.
#include "engine/planning/capacity_plan.h"

#include <cmath>
#include <filesystem>
#include <string>

#include "engine/load/loaded_model.h"
#include "engine/planning/capacity_report.h"
#include "engine/planning/memory_plan.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kNames[] = {"opt-tiny", "opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b",
                                  "opt-6.7b", "opt-13b",  "opt-30b",  "opt-66b",  "opt-175b"};

EngineOptions Options(const std::string& model, const std::string& weights = "fp16") {
  EngineOptions options;
  options.model = model;
  options.weights = weights;
  return options;
}

PlanOptions Devices(int count, double memory_gib) {
  PlanOptions devices;
  devices.devices = count;
  devices.memory_gib = memory_gib;
  devices.bandwidth_gbs = 2000.0;
  devices.all_reduce_us = 10.0;
  return devices;
}

CapacityPlan Plan(const EngineOptions& options, const PlanOptions& devices) {
  const auto model = DescribeModel(options);
  EXPECT_TRUE(model.ok()) << model.status();
  const auto plan = PlanCapacity(*model, options, devices);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return *plan;
}

const TierPlan& Of(const CapacityPlan& plan, Tier tier) {
  for (const TierPlan& of : plan.tiers) {
    if (of.tier == tier) return of;
  }
  ADD_FAILURE() << "no " << Name(tier);
  return plan.tiers.front();
}

std::vector<std::string> Flags(const CapacityPlan& plan) {
  std::vector<std::string> flags;
  for (const PlanAlternative& other : plan.alternatives) flags.push_back(other.flags);
  return flags;
}

// opt-175b: hidden 12288, 96 layers, 96 heads of 128, 49152 neurons, 50272 tokens, context 2048. On 8 devices a rank
// has 12 heads (1536 features), 6144 neurons and 6284 tokens.
TEST(CapacityPlan, Opt175bOnEightDevicesOf80GibAgreesWithArithmeticByHand) {
  const EngineOptions options = Options("opt-175b");
  const PlanOptions devices = Devices(8, 80.0);
  const CapacityPlan plan = Plan(options, devices);
  EXPECT_TRUE(plan.fits);

  // Rows of 24,576 bytes lie a cache line further apart. Q, K and V: 4608 rows, out: 1536, both of the MLP: 6144.
  const int64_t row = 12288 * 2, layer_rows = 4608 + 1536 + 2 * 6144;
  EXPECT_EQ(layer_rows, 18432);
  EXPECT_EQ(plan.weight_bytes.split, 96 * (layer_rows * (row + 64) + 4 * (4608 + 6144)) + 6284 * (row + 64));
  // 2048 + 2 positions, and 128 bytes to a multiple of 256; two norms of a layer and the last, each a weight and a bias
  // in float32.
  EXPECT_EQ(plan.weight_bytes.replicated, 2050 * (row + 64) + 128 + (2 * 96 + 1) * 2 * 12288 * 4);
  EXPECT_EQ(plan.weight_bytes.first_rank, 96 * 2 * 12288 * 4);
  EXPECT_NEAR(static_cast<double>(plan.weight_bytes.total()), 175e9 * 2 / 8, 0.01 * 175e9 * 2 / 8);
  // Rank 384. Stage A with a factor a row; stage B, thresholds of three tiers in float16, worth in float32.
  EXPECT_EQ(plan.predictor_bytes.replicated, 96 * 384 * (12288 + 4));
  EXPECT_EQ(plan.predictor_bytes.split, 96 * 6144 * (384 + 3 * 2 + 4));
  // Steps of 256 tokens, 16 decode rows, 64 rows of scores: 4 rows of hidden, 4 of own features, 2 of own neurons.
  const int64_t activations = 4 * ((256 + 16) * (4 * 12288 + 4 * 1536 + 2 * 6144) + (16 + 64) * (6284 + 12288));
  EXPECT_EQ(plan.activation_bytes, activations);

  const int64_t token = 2 * 96 * 1536 * 2;  // K and V of a layer
  EXPECT_EQ(plan.kv_token_bytes, token);
  EXPECT_EQ(plan.kv_tokens, 16 * 2048);  // all that 16 sequences can use
  const auto budget = static_cast<int64_t>(0.9 * 80.0 * (int64_t{1} << 30));
  const int64_t rest = budget - plan.weight_bytes.total() - plan.predictor_bytes.total() - activations;
  EXPECT_EQ(plan.kv_tokens_room, rest / (16 * token) * 16);
  // Q, K, V, out and the head once more in int8, with a factor a row; rows of 12,288 bytes and a cache line.
  EXPECT_EQ(plan.draft_bytes, (int64_t{96} * (4608 + 1536) + 6284) * (12288 + 64 + 4) + 208);
  EXPECT_EQ(plan.left_bytes, rest - plan.draft_bytes - plan.kv_tokens * token);

  // Read by a step: attention with its biases, norms, the MLP and the biases that are added once; the head and the last
  // norm; a token's and a position's row. 2000 GB/s times 0.85; contexts of 512; 1 + 2 * 96 all-reduces of 10 us.
  ASSERT_EQ(plan.batches, (std::vector<int>{1, 2, 4, 8, 16}));
  EXPECT_EQ(plan.all_reduces, 193);
  const double attention = (4608 + 1536) * row + 4608 * 4, others = 4 * 12288 * 4 + 2 * 12288 * 4;
  const double head = 6284 * row + 2 * 12288 * 4;
  const auto ms = [&](double bytes, int batch) { return (bytes + batch * 512.0 * token) / (2000e6 * 0.85) + 1.93; };
  const PlannedModel model = *DescribeModel(options);
  for (size_t b = 0; b < plan.batches.size(); ++b) {
    const int batch = plan.batches[b];
    const double rows = batch * 2.0 * row;
    const double dense = 96 * (attention + others + 6144.0 * (2 * row + 4)) + head + rows;
    EXPECT_NEAR(Of(plan, Tier::kDense).step_bytes[b], dense, 1.0) << "batch " << batch;
    EXPECT_NEAR(*Of(plan, Tier::kDense).ms[b], ms(dense, batch), 1e-6) << "batch " << batch;

    double up = 0.0, down = 0.0;  // means over the layers
    for (const auto& layer : model.reads[static_cast<size_t>(Tier::kBalanced)]) {
      up += layer[b].up / 96;
      down += layer[b].down / 96;
    }
    const double predictor = 384 * (12288 + 4) + 384 * 6144 + 2 * 6144;
    const double balanced =
        96 * (attention + others + predictor + 6144.0 * (up * (row + 4) + down * row)) + head + rows;
    EXPECT_NEAR(Of(plan, Tier::kBalanced).step_bytes[b], balanced, 1.0) << "batch " << batch;
    EXPECT_NEAR(*Of(plan, Tier::kBalanced).ms[b], ms(balanced, batch), 1e-6) << "batch " << batch;
  }
  // In round figures: 43.7 GB at 1700 GB/s are 25.7 ms, and 1.9 ms of all-reduces.
  EXPECT_NEAR(*Of(plan, Tier::kDense).ms[0], 27.8, 0.1);
}

TEST(CapacityPlan, ReadsFollowTheDensitiesOfTheSyntheticModels) {
  for (const char* name : {"opt-tiny", "opt-6.7b"}) {
    const SyntheticModel model = *ParseSynthetic(name);
    const std::vector<int> batches = {1, 16};
    const ReadTable reads = ExpectedReads(model, batches);
    const auto at = [&](Tier tier, int32_t layer, size_t b) { return reads[static_cast<size_t>(tier)][layer][b]; };
    for (const int32_t layer : {0, 1, model.config.layers - 1}) {
      for (size_t b = 0; b < batches.size(); ++b) {
        const SyntheticDensity expected = ExpectedDensity(model, layer, batches[b]);
        EXPECT_NEAR(at(Tier::kBalanced, layer, b).up, expected.selected, 0.001) << name << " layer " << layer;
        EXPECT_NEAR(at(Tier::kExact, layer, b).down, expected.active, 0.001) << name << " layer " << layer;
        EXPECT_EQ(at(Tier::kExact, layer, b).up, 1.0);
        EXPECT_EQ(at(Tier::kDense, layer, b).down, 1.0);
        double last = 1.0;  // of falling quality
        for (const Tier tier : {Tier::kExact, Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
          EXPECT_LT(at(tier, layer, b).down, last) << name << " layer " << layer << " " << Name(tier);
          last = at(tier, layer, b).down;
        }
      }
      EXPECT_NEAR(at(Tier::kBalanced, layer, 0).down,
                  ExpectedDensity(model, layer, 1).selected * ExpectedDensity(model, layer, 1).precision, 0.001);
    }
  }
}

TEST(CapacityPlan, MoreDevicesAndMoreMemoryNeverHoldFewerKeysAndValues) {
  constexpr double kMemories[] = {24, 40, 48, 80, 141, 192};
  int fitting = 0;
  for (const char* name : kNames) {
    for (const char* weights : {"fp16", "int8"}) {
      const EngineOptions options = Options(name, weights);
      const auto model = DescribeModel(options);
      ASSERT_TRUE(model.ok()) << model.status();
      std::vector<int64_t> before(std::size(kMemories), 0), room_before = before;  // with a device less
      int64_t weights_before = INT64_MAX;
      for (int count = 1; count <= 16; ++count) {
        int64_t less = 0;  // with less memory
        for (size_t m = 0; m < std::size(kMemories); ++m) {
          const auto plan = PlanCapacity(*model, options, Devices(count, kMemories[m]));
          ASSERT_TRUE(plan.ok()) << plan.status();
          const std::string where = std::string(name) + " " + weights + " " + std::to_string(count);
          EXPECT_GE(plan->kv_tokens, before[m]) << where;
          EXPECT_GE(plan->kv_tokens_room, room_before[m]) << where;
          EXPECT_GE(plan->kv_tokens, less) << where;
          EXPECT_LE(plan->weight_bytes.total(), weights_before) << where;
          EXPECT_EQ(plan->fits, plan->kv_tokens >= plan->config.context) << where;
          EXPECT_EQ(plan->fits, plan->reason.empty()) << where;
          EXPECT_FALSE(CapacityText(*plan).empty());
          EXPECT_TRUE(nlohmann::json::accept(CapacityJson(*plan)));
          fitting += plan->fits;
          before[m] = less = plan->kv_tokens;
          room_before[m] = plan->kv_tokens_room;
          if (m + 1 == std::size(kMemories)) weights_before = plan->weight_bytes.total();
        }
      }
    }
  }
  EXPECT_GT(fitting, 1000);
}

TEST(CapacityPlan, SaysWhatWouldFitWhereItDoesNot) {
  const CapacityPlan few = Plan(Options("opt-175b"), Devices(4, 80));
  EXPECT_FALSE(few.fits);
  EXPECT_THAT(Flags(few), ElementsAre("--plan-devices 5", "--weights int8"));
  EXPECT_TRUE(Plan(Options("opt-175b"), Devices(5, 80)).fits);
  EXPECT_TRUE(Plan(Options("opt-175b", "int8"), Devices(4, 80)).fits);
  EXPECT_THAT(CapacityText(few), AllOf(HasSubstr("It does not fit"), HasSubstr("--plan-devices 5")));
  for (const TierPlan& tier : few.tiers) EXPECT_EQ(tier.ms[0], std::nullopt);

  EXPECT_THAT(Flags(Plan(Options("opt-6.7b", "fp32"), Devices(1, 24))),
              ElementsAre("--plan-devices 2", "--weights fp16", "--weights int8"));
  const CapacityPlan hopeless = Plan(Options("opt-175b"), Devices(1, 1));
  EXPECT_THAT(Flags(hopeless), ElementsAre());
  EXPECT_THAT(CapacityText(hopeless), HasSubstr("Nor does it on up to 64"));
}

TEST(CapacityPlan, ABudgetOfKeysAndValuesIsTakenAsItIs) {
  EngineOptions options = Options("opt-6.7b");  // 0.5 MiB a token, 1 GiB a sequence
  options.kv.memory_mib = 4096;
  EXPECT_EQ(Plan(options, Devices(1, 80)).kv_tokens, 4 * 2048);
  options.kv.memory_mib = 1000;
  const CapacityPlan small = Plan(options, Devices(1, 80));
  EXPECT_FALSE(small.fits);
  EXPECT_THAT(small.reason, HasSubstr("kv.memory_mib"));
  EXPECT_THAT(Flags(small), ElementsAre("--plan-devices 2", "--kv-memory-mib 1024"));
  options.kv.memory_mib = 16384;
  const CapacityPlan large = Plan(options, Devices(1, 24));
  EXPECT_FALSE(large.fits);
  options.kv.memory_mib = std::stoll(Flags(large).back().substr(std::string("--kv-memory-mib ").size()));
  EXPECT_TRUE(Plan(options, Devices(1, 24)).fits);
  options.kv.memory_mib = 2048;  // room for two sequences of 2048 or eight of 512
  const CapacityPlan two = Plan(options, Devices(1, 24));
  EXPECT_NE(Of(two, Tier::kDense).ms[3], std::nullopt);
  EXPECT_EQ(Of(two, Tier::kDense).ms[4], std::nullopt);
}

void ExpectAsTheEnginePlans(const std::string& directory) {
  const auto backend = *CreateCpuBackend({1, /*pin=*/false});
  for (const char* weights : {"stored", "int8", "fp32"}) {
    const EngineOptions options = Options(directory, weights);
    const OptConfig config = *OptConfig::Load(directory);
    for (int ranks = 1; ranks <= 4; ++ranks) {
      const CapacityPlan plan = Plan(options, Devices(ranks, 4));
      const auto engine = PlanMemory(options, config, *backend, 0, ranks);
      ASSERT_TRUE(engine.ok()) << engine.status();
      EXPECT_EQ(plan.weight_bytes.total(), engine->weight_bytes) << weights << ", " << ranks << " ranks";
      EXPECT_EQ(plan.activation_bytes, engine->activation_bytes) << weights << ", " << ranks << " ranks";
      EXPECT_EQ(plan.kv_bytes, engine->kv_bytes) << weights << ", " << ranks << " ranks";
      EXPECT_EQ(plan.draft_bytes, engine->draft_bytes) << weights << ", " << ranks << " ranks";
      // The engine goes by the size of the file, which holds names and frequencies too.
      EXPECT_LE(plan.predictor_bytes.total(), engine->predictor_bytes) << ranks << " ranks";
      EXPECT_GE(plan.predictor_bytes.total(), 0.8 * static_cast<double>(engine->predictor_bytes)) << ranks << " ranks";
    }
  }
}

// In memory that just does for the drafts' weights beside all that keys and values want, and in a MiB less.
TEST(CapacityPlan, WeightsForDraftsTakeWhatKeysAndValuesLeave) {
  EngineOptions options = Options("opt-6.7b");
  options.memory_share = 1.0;
  const CapacityPlan large = Plan(options, Devices(1, 80));
  ASSERT_GT(large.draft_bytes, 0);
  const double least_gib = 80.0 - static_cast<double>(large.left_bytes) / (1 << 30), mib = 1.0 / 1024;
  const CapacityPlan enough = Plan(options, Devices(1, least_gib + mib)),
                     less = Plan(options, Devices(1, least_gib - mib));
  EXPECT_EQ(enough.draft_bytes, large.draft_bytes);
  EXPECT_EQ(less.draft_bytes, 0);
  EXPECT_EQ(less.kv_tokens, enough.kv_tokens);

  options.draft_weights = kStoredDrafts;
  EXPECT_EQ(Plan(options, Devices(1, 80)).draft_bytes, 0);
  options.draft_weights = kInt8Drafts;
  const CapacityPlan forced = Plan(options, Devices(1, least_gib - 1.0));
  EXPECT_EQ(forced.draft_bytes, large.draft_bytes);
  EXPECT_LT(forced.kv_tokens, less.kv_tokens) << "keys and values get the rest";
  options.weights = "int8";
  EXPECT_EQ(Plan(options, Devices(1, 80)).draft_bytes, 0) << "they are int8 anyway";
}

TEST(CapacityPlan, ADirectoryAgreesWithWhatTheEnginePlans) { ExpectAsTheEnginePlans(EMBEDDED_MODEL); }

TEST(CapacityPlan, AHeadOfItsOwnIsCounted) {
  const ScratchDirectory tied, untied, differs;
  TinyCheckpoint tiny = TinyCheckpoint::Random(1, /*hidden=*/16, /*ffn=*/40, /*layers=*/2, /*vocab=*/64);
  tiny.Write(tied);
  tiny.Untie(2).Write(untied);
  TinyCheckpoint said_to_be_tied = tiny;
  said_to_be_tied.config.erase("tie_word_embeddings");
  said_to_be_tied.Write(differs);
  const auto bytes = [](const ScratchDirectory& directory) {
    return Plan(Options(directory.path(), "stored"), Devices(2, 1)).weight_bytes.split;
  };
  EXPECT_EQ(bytes(untied), bytes(tied) + int64_t{32} * 16 * 4) << "half of 64 rows of 16 floats";
  EXPECT_EQ(bytes(differs), bytes(untied));
  ExpectAsTheEnginePlans(untied.path());
}

TEST(CapacityPlan, ASyntheticModelAgreesWithWhatTheEnginePlans) {
  const auto backend = *CreateCpuBackend({1, /*pin=*/false});
  EngineOptions options = Options("synthetic:opt-125m", "stored");
  options.kv.memory_mib = 256;
  const OptConfig config = *LoadModelConfig(options.model);
  for (const int ranks : {1, 2, 5}) {
    const CapacityPlan plan = Plan(options, Devices(ranks, 4));
    const auto engine = PlanMemory(options, config, *backend, 0, ranks);
    ASSERT_TRUE(engine.ok()) << engine.status();
    // The engine leaves out padding, norms and biases.
    const auto weights = static_cast<double>(engine->weight_bytes);
    EXPECT_NEAR(static_cast<double>(plan.weight_bytes.total()), weights, 0.05 * weights) << ranks << " ranks";
    const auto predictor = static_cast<double>(engine->predictor_bytes);
    EXPECT_NEAR(static_cast<double>(plan.predictor_bytes.total()), predictor, 0.08 * predictor) << ranks << " ranks";
    EXPECT_EQ(plan.activation_bytes, engine->activation_bytes) << ranks << " ranks";
    EXPECT_EQ(plan.kv_bytes, engine->kv_bytes) << ranks << " ranks";
  }
}

TEST(CapacityPlan, ADirectoryIsReadAsFarAsItGoes) {
  const CapacityPlan plan = Plan(Options(EMBEDDED_MODEL, "stored"), Devices(1, 4));
  EXPECT_EQ(plan.weights, DType::kFloat16);
  EXPECT_FALSE(plan.synthetic);
  EXPECT_EQ(plan.tiers.size(), kAllTiers.size());
  // docs/benchmarks/tiers.md: the byte ceilings of EXACT and BALANCED on the evaluation's text are 1.30 and 1.79.
  const double dense = Of(plan, Tier::kDense).step_bytes[0];
  EXPECT_NEAR(dense / Of(plan, Tier::kExact).step_bytes[0], 1.30, 0.02);
  EXPECT_NEAR(dense / Of(plan, Tier::kBalanced).step_bytes[0], 1.79, 0.03);
  for (const TierPlan& tier : plan.tiers) {  // unions grow
    for (size_t b = 1; b < plan.batches.size(); ++b) EXPECT_GE(tier.step_bytes[b], tier.step_bytes[b - 1]);
  }

  EngineOptions without = Options(EMBEDDED_MODEL, "stored");
  without.predictor = "none";
  const CapacityPlan dense_only = Plan(without, Devices(1, 4));
  ASSERT_EQ(dense_only.tiers.size(), 1u);
  EXPECT_EQ(dense_only.predictor_bytes.total(), 0);
  EXPECT_EQ(dense_only.tiers[0].step_bytes[0], dense);

  const ScratchDirectory directory;  // nothing is downloaded yet but the configuration
  std::filesystem::copy(std::string(EMBEDDED_MODEL) + "/config.json", directory.path());
  const CapacityPlan bare = Plan(Options(directory.path(), "stored"), Devices(1, 4));
  EXPECT_EQ(bare.weights, DType::kFloat16);
  EXPECT_EQ(bare.weight_bytes.total(), plan.weight_bytes.total());
}

TEST(CapacityPlan, SomeTiersAreLeftOut) {
  const EngineOptions options = Options("synthetic:opt-1.3b", "stored");
  const auto model = DescribeModel(options, Tier::kExact, Tier::kBalanced);
  ASSERT_TRUE(model.ok());
  EXPECT_THAT(model->tiers, ElementsAre(Tier::kExact, Tier::kHigh, Tier::kBalanced));
  EXPECT_EQ(model->stored, DType::kBFloat16);
}

TEST(CapacityPlan, ModelsAndSplitsThatThereAreNotAreRefused) {
  EXPECT_EQ(DescribeModel(Options("opt-1t")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(DescribeModel(Options("/nowhere")).status().message()),
              AllOf(HasSubstr("/nowhere: there is no such directory"), HasSubstr("opt-175b")));
  EXPECT_EQ(DescribeModel(Options("synthetic:opt-1.3b?seed=x")).status().code(), absl::StatusCode::kInvalidArgument);
  const EngineOptions options = Options("opt-tiny");
  EXPECT_EQ(PlanCapacity(*DescribeModel(options), options, Devices(1000, 24)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace dejavu
