// EngineMetrics: what the engine counts for its operators. Each metric is one row, in the order of the page. A new
// metric takes two edits: its row here, and the line that counts it. The names are here rather than in the server
// because a second list there would have to follow this one. The engine counts by field and never looks at a name; the
// server shows every row of the table and knows none of them (server/observe/metrics.h). The engine thread writes; any
// thread reads.
#ifndef ENGINE_METRICS_H_
#define ENGINE_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "engine/metric_family.h"
#include "engine/request.h"
#include "engine/sparsity.h"

namespace dejavu {

inline constexpr int kTiers = static_cast<int>(kAllTiers.size());
inline constexpr int kLayerGroups = 4;  // quarters of the layers
inline constexpr std::array<int, 5> kBatchSizes = {1, 2, 4, 8, 16};

// Series of the rows below, whose labels name them in the same order.
enum StepPhase { kPrefillStep, kDecodeStep, kMixedStep, kStepPhases };
enum StepComponent { kPlanPart, kForwardPart, kShadowPart, kHandOutPart, kStepComponents };
enum RequestStage { kQueuedStage, kPrefillStage, kDecodeStage, kRequestStages };
enum WeightKind { kMlpWeights, kAttentionWeights, kPredictorWeights, kEmbeddingWeights, kHeadWeights, kWeightKinds };
enum Slo { kTtftSlo, kItlSlo, kSlos };
enum BlockState { kUsedBlocks, kFreeBlocks, kCachedBlocks, kBlockStates };

// Labels whose values have their names elsewhere.
MetricLabel TierLabel();
MetricLabel PredictedTierLabel();  // as TierLabel, but those that predict nothing are not shown
MetricLabel PriorityLabel();       // the urgencies
MetricLabels RequestLabels();      // tier and priority
MetricLabel ReasonLabel();         // the refusals
MetricLabel LayerGroupLabel();
MetricLabel BatchLabel();        // kBatchSizes
MetricLabel DraftSourceLabel();  // the predicted tiers, and lookup

// Edges of histograms, unless the configuration has others.
namespace metric_edges {
inline constexpr double kFirstToken[] = {.001, .0025, .005, .01, .02, .04, .06, .08, .1, .15, .2,
                                         .25,  .5,    .75,  1,   2.5, 5,   7.5, 10,  20, 40,  80};
inline constexpr double kInterToken[] = {.0005, .001, .002, .003, .004, .005, .0075, .01, .015, .02, .025,
                                         .03,   .04,  .05,  .075, .1,   .15,  .25,   .5,  1,    2.5};
inline constexpr double kRequest[] = {.001, .0025, .005, .01, .02, .04, .06, .08, .1, .15, .2,  .25,
                                      .5,   .75,   1,    2.5, 5,   7.5, 10,  20,  40, 80,  160, 640};
inline constexpr double kShort[] = {.00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .005,
                                    .01,    .025,    .05,    .1,    .25,    .5,    1,    2.5,   5};
inline constexpr double kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
inline constexpr double kTokens[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
inline constexpr double kDensity[] = {.02, .05, .1, .15, .2, .25, .3, .4, .5, .6, .7, .8, .9, 1};
inline constexpr double kInflation[] = {1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 16};
inline constexpr double kQuality[] = {.5, .7, .8, .9, .95, .97, .98, .99, .995, .999, 1};
inline constexpr double kMissed[] = {.0001, .0003, .001, .003, .01, .02, .03, .05, .1, .2, .5, 1};
inline constexpr double kNats[] = {.0001, .0003, .001, .003, .01, .03, .1, .3, 1, 3};
inline constexpr double kImbalance[] = {1, 1.01, 1.02, 1.03, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3, 1.5, 2};
}  // namespace metric_edges

struct EngineMetrics final : MetricTable {
  explicit EngineMetrics(MetricEdges edges) : MetricTable(std::move(edges)) {}

  std::atomic<bool> counting{true};  // false: nothing below moves, so that one can see what counting costs

  // The series of a row with the labels tier and priority.
  static size_t SeriesOf(Tier tier, Urgency urgency) {
    return static_cast<size_t>(tier) * kUrgencies + static_cast<size_t>(urgency);
  }

  // Requests and tokens.
  ReadFamily requests_rejected{*this, "requests_rejected_total",
                               "Requests that were refused before they waited, by reason.", ReasonLabel(),
                               [](const EngineView& e, size_t reason) { return e.stats.account.refused[reason]; }};
  ReadFamily requests_running{*this, "requests_running", "Requests in the running batch.", &EngineStats::running};
  ReadFamily requests_waiting{*this, "requests_waiting", "Requests in the queue.", PriorityLabel(),
                              [](const EngineView& e, size_t urgency) { return e.stats.waiting_of[urgency]; }};
  ReadFamily queue_tokens{*this, "queue_tokens", "Prompt tokens in the queue.", &EngineStats::waiting_tokens};
  ReadFamily queue_oldest_age{*this, "queue_oldest_age_seconds",
                              "How long the request has waited that has waited longest.", &EngineStats::oldest_wait_s};
  ReadFamily prompt_tokens{*this, "prompt_tokens_total", "Prompt tokens computed.", &EngineStats::prompt_tokens};
  ReadFamily generated_tokens{*this, "generated_tokens_total", "Tokens generated.", &EngineStats::generated_tokens};
  CounterFamily<int64_t> prefix_query_tokens{*this, "prefix_cache_query_tokens_total",
                                             "Prompt tokens of requests that looked into the prefix cache."};
  ReadFamily prefix_hit_tokens{*this, "prefix_cache_hit_tokens_total",
                               "Prompt tokens whose keys and values were in the prefix cache.",
                               &EngineStats::cached_prompt_tokens};

  // Steps.
  HistogramFamily step_duration{*this, "step_duration_seconds",
                                "Time of an engine step, from planning to the last token handed out.",
                                LabelOf<kStepPhases>("phase", "prefill", "decode", "mixed"), metric_edges::kInterToken};
  HistogramFamily step_component{*this, "step_component_seconds", "What a step's time went into.",
                                 LabelOf<kStepComponents>("component", "plan", "forward", "shadow", "handout"),
                                 metric_edges::kShort};
  HistogramFamily batch_size{*this, "batch_size", "Sequences that decoded, or drafted, in a step.", MetricLabels(),
                             metric_edges::kRows};
  HistogramFamily step_tokens{*this, "step_tokens", "Tokens computed in a step, of prompts and outputs together.",
                              MetricLabels(), metric_edges::kTokens};

  // Keys and values.
  ReadFamily kv_blocks{*this, "kv_blocks", "Blocks of keys and values: in use, free, or free and holding a prefix.",
                       LabelOf<kBlockStates>("state", "used", "free", "cached"), KvBlocks};
  ReadFamily kv_utilization{*this, "kv_utilization_ratio", "Share of the blocks of keys and values that is in use.",
                            MetricLabels(), KvUtilization};
  CounterFamily<int64_t> kv_saturated_values{
      *this, "kv_saturated_values_total",
      "Keys and values beyond the range of the cache's type, stored as its largest number."};
  ReadFamily preemptions{*this, "preemptions_total", "Times that a running request was sent back to the queue.",
                         &EngineStats::preemptions};

  // How requests and the start went.
  CounterFamily<int64_t> cancelled{*this, "cancelled_total", "Requests that were cancelled, by how far they were.",
                                   LabelOf<kRequestStages>("stage", "queued", "prefill", "decode")};
  CounterFamily<int64_t> deadline_exceeded{*this, "deadline_exceeded_total",
                                           "Requests whose deadline passed, by how far they were.",
                                           LabelOf<kRequestStages>("stage", "queued", "prefill", "decode")};
  CounterFamily<double> load_seconds{*this, "model_load_seconds", "How long the start took.",
                                     LabelOf<1>("stage", "load")};
  CounterFamily<double> warm_up_seconds{*this, load_seconds, LabelOf<1>("stage", "warmup")};
  ReadFamily weight_bytes{*this, "weight_bytes", "Memory of the weights, on all ranks.", MetricLabels(),
                          [](const EngineView& e, size_t) { return e.weight_bytes; }};
  ReadFamily draft_weight_bytes{*this, "draft_weight_bytes", "Memory of weights for drafts alone, on all ranks.",
                                MetricLabels(), [](const EngineView& e, size_t) { return e.draft_weight_bytes; }};
  CounterFamily<int64_t> slo_attained{*this, "slo_attained_total",
                                      "Requests within their target, where one is configured.",
                                      LabelOf<kSlos>("slo", "ttft", "itl"), HasTarget};
  CounterFamily<int64_t> slo_missed{*this, "slo_missed_total", "Requests beyond their target, where one is configured.",
                                    LabelOf<kSlos>("slo", "ttft", "itl"), HasTarget};

  // Ranks.
  HistogramFamily imbalance{*this,
                            "rank_imbalance_ratio",
                            "Per step: active neurons of the slowest rank over the mean of all ranks.",
                            MetricLabels(),
                            metric_edges::kImbalance,
                            HasImbalance};
  ReadFamily all_reduces{*this, "all_reduces_total", "Sums over the ranks.", &EngineStats::all_reduces, HasRanks};
  ReadFamily all_reduce_seconds{*this,
                                "all_reduce_seconds_total",
                                "Time that rank 0 spent in sums over the ranks, waiting included.",
                                MetricLabels(),
                                [](const EngineView& e, size_t) { return e.stats.all_reduce_ns / 1e9; },
                                HasRanks};

  // Speculation.
  ReadFamily speculation_rounds{*this, "speculation_rounds_total", "Drafts of a request that were checked.",
                                MetricLabels(), [](const EngineView& e, size_t) { return e.stats.speculation.rounds; }};
  ReadFamily speculation_tokens{*this, "speculation_tokens_total",
                                "Tokens that those checks gave: drafts that were right, and the token after them.",
                                MetricLabels(), [](const EngineView& e, size_t) { return e.stats.speculation.tokens; }};
  ReadFamily speculation_drafted{*this, "speculation_draft_tokens_total", "Drafts that were checked, by their source.",
                                 DraftSourceLabel(),
                                 [](const EngineView& e, size_t source) { return DraftsOf(e, source).drafted; }};
  ReadFamily speculation_accepted{*this, "speculation_accepted_tokens_total", "Of those, how many were right.",
                                  DraftSourceLabel(),
                                  [](const EngineView& e, size_t source) { return DraftsOf(e, source).accepted; }};
  ReadFamily speculation_seconds{*this, "speculation_seconds_total", "Time of the steps that drafted or checked.",
                                 MetricLabels(),
                                 [](const EngineView& e, size_t) { return e.stats.speculation.spent_ms / 1e3; }};
  ReadFamily speculation_plain_seconds{*this, "speculation_plain_seconds_total",
                                       "What the same tokens would have taken without, by the costs of such steps.",
                                       MetricLabels(),
                                       [](const EngineView& e, size_t) { return e.stats.speculation.plain_ms / 1e3; }};

  // Times of requests: [SeriesOf(tier, urgency)].
  HistogramFamily time_to_first_token{*this, "time_to_first_token_seconds", "From arrival to the first token.",
                                      RequestLabels(), metric_edges::kFirstToken};
  HistogramFamily inter_token{*this, "inter_token_latency_seconds",
                              "Between two deliveries of one request: its tokens, or what a check gives together.",
                              RequestLabels(), metric_edges::kInterToken};
  HistogramFamily time_per_output_token{*this, "time_per_output_token_seconds",
                                        "Per request: mean time of its tokens after the first.", RequestLabels(),
                                        metric_edges::kInterToken};
  HistogramFamily duration{*this, "request_duration_seconds",
                           "From arrival to the end, of requests that ran and did not fail.", RequestLabels(),
                           metric_edges::kRequest};
  HistogramFamily queue{*this, "queue_time_seconds", "From arrival to the first step, likewise.", RequestLabels(),
                        metric_edges::kRequest};
  HistogramFamily prefill{*this, "prefill_time_seconds", "From admission to the first token.", RequestLabels(),
                          metric_edges::kRequest};
  HistogramFamily decode{*this, "decode_time_seconds", "From the first token to the end.", RequestLabels(),
                         metric_edges::kRequest};

  // Sparsity: of requests as a whole, of steps by quarter of the layers.
  HistogramFamily request_mlp_density{
      *this, "mlp_density_ratio",
      "Share of the MLP's rows that was read: a request's own, or a step's union by layer group.",
      MetricLabels(LabelOf<1>("scope", "request"), LabelOf<1>("layer_group", "all")), metric_edges::kDensity};
  HistogramFamily union_mlp_density{*this, request_mlp_density,
                                    MetricLabels(LabelOf<1>("scope", "union"), LayerGroupLabel())};
  HistogramFamily request_head_density{
      *this, "attention_head_density_ratio", "Share of the attention heads that was computed, likewise.",
      MetricLabels(LabelOf<1>("scope", "request"), LabelOf<1>("layer_group", "all")), metric_edges::kDensity};
  HistogramFamily union_head_density{*this, request_head_density,
                                     MetricLabels(LabelOf<1>("scope", "union"), LayerGroupLabel())};
  HistogramFamily recall{*this, "predictor_recall_ratio",
                         "Shadow checks: share of the active neurons that were selected.", LayerGroupLabel(),
                         metric_edges::kQuality};
  HistogramFamily precision{*this, "predictor_precision_ratio",
                            "Shadow checks: share of the selected neurons that were active.", LayerGroupLabel(),
                            metric_edges::kQuality};
  HistogramFamily missed_mass{*this, "predictor_missed_mass_ratio",
                              "Shadow checks: share of the squared output that was left out.", LayerGroupLabel(),
                              metric_edges::kMissed};
  HistogramFamily union_inflation{*this, "union_inflation_ratio",
                                  "Neurons that a step selected over the mean of its rows.", BatchLabel(),
                                  metric_edges::kInflation};

  // Shadow checks by tier, and what they lead to.
  CounterFamily<int64_t> shadow_tokens{*this, "shadow_tokens_total",
                                       "Tokens that were computed a second time, densely.", PredictedTierLabel()};
  CounterFamily<int64_t> shadow_disagreements{*this, "shadow_top1_disagree_total",
                                              "Of those, how many had another most likely successor.",
                                              PredictedTierLabel()};
  HistogramFamily shadow_kl{*this, "shadow_kl_nats",
                            "Of those, the divergence of the sparse distribution from the dense one.",
                            PredictedTierLabel(), metric_edges::kNats};
  ReadFamily fallback_layers{*this, "fallback_layers", "Layers that run EXACT because their shadow checks fail.",
                             PredictedTierLabel(), FallbackLayers};
  ReadFamily dense_fallbacks{*this, "dense_fallback_total", "Times that a layer went over to EXACT.",
                             LabelOf<1>("reason", "drift"),
                             [](const EngineView& e, size_t) { return SumOf(e, &LayerSparsityStats::fallbacks); }};
  ReadFamily fallback_recoveries{*this, "fallback_recoveries_total", "Times that such a layer was predicted again.",
                                 MetricLabels(),
                                 [](const EngineView& e, size_t) { return SumOf(e, &LayerSparsityStats::recoveries); }};

  // Weights that steps read. Bandwidths in bytes per second: of late decode steps, and of the memory, at start.
  CounterFamily<int64_t> weight_bytes_read{
      *this, "weight_bytes_read_total", "Bytes of weights that steps have read, as the selections imply.",
      LabelOf<kWeightKinds>("kind", "mlp", "attention", "predictor", "embedding", "head")};
  CounterFamily<int64_t> weight_bytes_saved{*this, "weight_bytes_saved_total",
                                            "Bytes of weights that dense steps would have read besides."};
  CounterFamily<double> bandwidth{*this, "effective_bandwidth_bytes_per_second",
                                  "Bytes of weights per second of late decode steps."};
  CounterFamily<double> measured_bandwidth{*this, "measured_bandwidth_bytes_per_second",
                                           "What the device reached at start reading the weights' memory."};

 private:
  static double KvBlocks(const EngineView& view, size_t state);
  static double KvUtilization(const EngineView& view, size_t);
  static double FallbackLayers(const EngineView& view, size_t tier);
  static const DraftCounts& DraftsOf(const EngineView& view, size_t source);
  static int64_t SumOf(const EngineView& view, int64_t LayerSparsityStats::*counter);
  static bool HasImbalance(const EngineView& view, size_t) { return view.metrics.imbalance[0].observed(); }
  static bool HasTarget(const EngineView& view, size_t slo);
  static bool HasRanks(const EngineView& view, size_t) { return view.stats.ranks > 1; }
};

// What the server counts in a histogram. It is here because its edges are configured with the others.
struct CallMetrics final : MetricTable {
  explicit CallMetrics(MetricEdges edges) : MetricTable(std::move(edges)) {}

  HistogramFamily client_stall{*this, "client_stall_seconds",
                               "Time per call in which tokens were ready and waited for the client to read.",
                               MetricLabels(), metric_edges::kShort};
};

// What `text` says: "FAMILY=EDGE,EDGE,...;FAMILY=...", with names of the histograms above. INVALID_ARGUMENT for a
// family that there is not, and for edges that do not ascend.
absl::StatusOr<MetricEdges> MetricEdgesFrom(const std::string& text);

}  // namespace dejavu

#endif  // ENGINE_METRICS_H_
