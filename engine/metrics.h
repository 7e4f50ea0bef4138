// EngineMetrics: what the engine counts for those who watch it. The engine thread writes plain counters without locks,
// allocation or names; whoever is asked for them takes a snapshot and gives them names (server/observe/metrics.h).
// Every counter has one writer; a snapshot may fall between two of them.
#ifndef ENGINE_METRICS_H_
#define ENGINE_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/request.h"
#include "engine/sparsity.h"

namespace dejavu {

// A counter with one writer, read by others.
template <typename T>
class Counter {
 public:
  Counter() = default;
  Counter(const Counter& other) : value_(other.value()) {}  // so that vectors can be made of them
  void Add(T amount) { value_.store(value_.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed); }
  void Set(T value) { value_.store(value, std::memory_order_relaxed); }
  T value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<T> value_{};
};

class Histogram {
 public:
  // Upper edges, ascending; values beyond the last are counted, too.
  explicit Histogram(const std::vector<double>* edges) : edges_(edges), counts_(edges->size() + 1) {}

  void Observe(double value, int64_t times = 1);

  struct Snapshot {
    std::vector<int64_t> counts;  // [edges + 1], each bucket by itself
    double sum = 0.0;
    int64_t count() const;
    // By interpolation within its bucket; NaN of nothing.
    double Quantile(double q, const std::vector<double>& edges) const;
  };
  Snapshot snapshot() const;
  const std::vector<double>& edges() const { return *edges_; }

 private:
  const std::vector<double>* const edges_;
  std::vector<Counter<int64_t>> counts_;
  Counter<double> sum_;
};

// Edges by the families' names without prefix, such as "inter_token_latency_seconds".
using MetricEdges = absl::flat_hash_map<std::string, std::vector<double>>;

// The defaults, and over them what `text` says: "FAMILY=EDGE,EDGE,...;FAMILY=...". INVALID_ARGUMENT for a family that
// there is not, and for edges that do not ascend.
absl::StatusOr<MetricEdges> MetricEdgesFrom(const std::string& text);

inline constexpr int kTiers = static_cast<int>(kAllTiers.size());
inline constexpr int kLayerGroups = 4;  // quarters of the layers
inline constexpr std::array<int, 5> kBatchSizes = {1, 2, 4, 8, 16};

enum StepPhase { kPrefillStep, kDecodeStep, kMixedStep, kStepPhases };
enum StepComponent { kPlanPart, kForwardPart, kShadowPart, kHandOutPart, kStepComponents };
enum RequestStage { kQueuedStage, kPrefillStage, kDecodeStage, kRequestStages };
enum WeightKind { kMlpWeights, kAttentionWeights, kPredictorWeights, kEmbeddingWeights, kHeadWeights, kWeightKinds };
enum Slo { kTtftSlo, kItlSlo, kSlos };

struct EngineMetrics {
  explicit EngineMetrics(MetricEdges edges);

  const MetricEdges edges;
  std::atomic<bool> counting{true};  // false: nothing below moves, so that one can see what counting costs

  // Of requests, by tier and urgency. Seconds.
  struct Latencies {
    explicit Latencies(const MetricEdges& edges);
    Histogram time_to_first_token, inter_token, time_per_output_token, duration, queue, prefill, decode;
  };
  std::vector<Latencies> latencies;  // [kTiers * kUrgencies]
  Latencies& latencies_of(Tier tier, Urgency urgency) {
    return latencies[static_cast<size_t>(tier) * kUrgencies + static_cast<size_t>(urgency)];
  }

  std::vector<Histogram> step_duration;   // [kStepPhases] seconds
  std::vector<Histogram> step_component;  // [kStepComponents] seconds
  Histogram batch_size, step_tokens;
  std::array<Counter<int64_t>, kRequestStages> cancelled, deadline_exceeded;
  std::array<Counter<int64_t>, kSlos> slo_attained, slo_missed;
  Counter<int64_t> prefix_query_tokens;
  Counter<double> load_seconds, warm_up_seconds;

  // Sparsity. Shares of neurons and of heads.
  Histogram request_mlp_density, request_head_density;
  std::vector<Histogram> union_mlp_density, union_head_density;  // [kLayerGroups]
  std::vector<Histogram> union_inflation;                        // [kBatchSizes]
  std::vector<Histogram> recall, precision, missed_mass;         // [kLayerGroups]
  std::array<Counter<int64_t>, kTiers> shadow_tokens, shadow_disagreements;
  std::vector<Histogram> shadow_kl;  // [kTiers] nats
  Histogram imbalance;               // of ranks
  std::array<Counter<int64_t>, kWeightKinds> weight_bytes_read;
  Counter<int64_t> weight_bytes_saved;
  Counter<double> bandwidth;           // bytes per second, of late
  Counter<double> measured_bandwidth;  // of the device's memory, at start
};

}  // namespace dejavu

#endif  // ENGINE_METRICS_H_
