#include "engine/metrics.h"

#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::MatchesRegex;
using testing::Pair;

EngineView ViewOf(const EngineMetrics& metrics) { return {metrics, {}, {}, 0}; }

TEST(EngineMetrics, SaysOfEveryRowWhatItIs) {
  const EngineMetrics metrics(MetricEdges{});
  std::set<std::string> seen;
  std::string last;
  for (const MetricFamily* family : metrics.families()) {
    EXPECT_THAT(family->name(), MatchesRegex("[a-z][a-z0-9_]*")) << "without the prefix";
    EXPECT_THAT(family->help(), MatchesRegex("[A-Z].*\\.")) << family->name();
    EXPECT_GT(family->series(), 0u) << family->name();
    EXPECT_TRUE(family->name() == last || seen.insert(family->name()).second)
        << family->name() << ": the parts of a family are not side by side";
    last = family->name();
  }
  EXPECT_GT(seen.size(), 40u);
}

TEST(EngineMetrics, CountsASeriesForEachCombinationOfLabels) {
  EngineMetrics metrics(MetricEdges{});
  ASSERT_EQ(metrics.duration.series(), size_t{kTiers} * kUrgencies);
  const size_t series = EngineMetrics::SeriesOf(Tier::kHigh, Urgency::kBatch);
  EXPECT_THAT(metrics.duration.labels(series), ElementsAre(Pair("tier", "high"), Pair("priority", "batch")));
  EXPECT_THAT(metrics.union_mlp_density.labels(3), ElementsAre(Pair("scope", "union"), Pair("layer_group", "3")));
  EXPECT_THAT(metrics.union_mlp_density.name(), metrics.request_mlp_density.name());
  EXPECT_THAT(metrics.step_component.labels(kHandOutPart), ElementsAre(Pair("component", "handout")));
  EXPECT_EQ(metrics.batch_size.series(), 1u);
}

TEST(EngineMetrics, ShowsWhatThereIsToSay) {
  EngineMetrics metrics(MetricEdges{});
  EngineView view = ViewOf(metrics);
  EXPECT_TRUE(metrics.batch_size.IsShown(view, 0)) << "without labels: always";
  EXPECT_FALSE(metrics.queue.IsShown(view, 4));
  metrics.queue[4].Observe(0.5);
  EXPECT_TRUE(metrics.queue.IsShown(view, 4)) << "with labels: once something was observed";
  EXPECT_FALSE(metrics.queue.IsShown(view, 5));
  EXPECT_FALSE(metrics.shadow_tokens.IsShown(view, static_cast<size_t>(Tier::kExact))) << "predicts nothing";
  EXPECT_TRUE(metrics.shadow_tokens.IsShown(view, static_cast<size_t>(Tier::kFast)));
  EXPECT_FALSE(metrics.slo_missed.IsShown(view, kItlSlo));
  metrics.slo_attained[kItlSlo].Add(1);
  EXPECT_TRUE(metrics.slo_missed.IsShown(view, kItlSlo)) << "both or neither";
  EXPECT_FALSE(metrics.all_reduces.IsShown(view, 0));
  view.stats.ranks = 2;
  EXPECT_TRUE(metrics.all_reduces.IsShown(view, 0));
}

TEST(EngineMetrics, ReadsWhatIsKeptElsewhere) {
  const EngineMetrics metrics(MetricEdges{});
  EngineView view = ViewOf(metrics);
  view.stats.running = 3;
  view.stats.kv_blocks_total = 10;
  view.stats.kv_blocks_free = 6;
  view.stats.kv_blocks_cached = 1;
  view.sparsity.layers.resize(2);
  view.sparsity.layers[0].fallbacks = 2;
  view.sparsity.layers[1].fallbacks = 3;
  view.sparsity.exact_now = {{Tier::kFast, 0}, {Tier::kFast, 1}, {Tier::kHigh, 0}};
  EXPECT_EQ(metrics.requests_running.value(view, 0), 3.0);
  EXPECT_EQ(metrics.kv_blocks.value(view, kUsedBlocks), 4.0);
  EXPECT_EQ(metrics.kv_blocks.value(view, kFreeBlocks), 5.0);
  EXPECT_EQ(metrics.kv_blocks.value(view, kCachedBlocks), 1.0);
  EXPECT_EQ(metrics.kv_utilization.value(view, 0), 0.4);
  EXPECT_EQ(metrics.dense_fallbacks.value(view, 0), 5.0);
  EXPECT_EQ(metrics.fallback_layers.value(view, static_cast<size_t>(Tier::kFast)), 2.0);
}

TEST(MetricEdgesFrom, TakesTheNamesOfAllHistogramsAndNoOthers) {
  EXPECT_TRUE(MetricEdgesFrom("client_stall_seconds=1").ok()) << "the server's";
  const EngineMetrics metrics(MetricEdges{});
  for (const MetricFamily* family : metrics.families()) {
    EXPECT_EQ(MetricEdgesFrom(family->name() + "=1,2").ok(), family->histogram(0) != nullptr) << family->name();
  }
}

TEST(MetricEdgesFrom, ReplacesTheEdgesOfOneFamily) {
  const auto edges = MetricEdgesFrom("batch_size=1,16; mlp_density_ratio=0.5");
  ASSERT_TRUE(edges.ok()) << edges.status();
  const EngineMetrics metrics(*edges), plain(MetricEdges{});
  EXPECT_THAT(metrics.batch_size.edges(), ElementsAre(1, 16));
  EXPECT_THAT(metrics.request_mlp_density.edges(), ElementsAre(0.5));
  EXPECT_THAT(metrics.union_mlp_density[2].edges(), ElementsAre(0.5)) << "all parts of the family";
  EXPECT_EQ(metrics.step_tokens.edges(), plain.step_tokens.edges());
}

TEST(MetricEdgesFrom, RefusesWhatDoesNotAscend) {
  for (const char* text : {"batch_size=", "batch_size=2,1", "batch_size=1,1", "batch_size=inf", "batch_size=x"}) {
    EXPECT_THAT(MetricEdgesFrom(text).status().message(), HasSubstr("edges are numbers that ascend")) << text;
  }
  EXPECT_THAT(MetricEdgesFrom("no_such=1").status().message(), HasSubstr("metrics.edges names 'no_such'"));
}

}  // namespace
}  // namespace dejavu
