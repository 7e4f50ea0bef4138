#include "server/observe/metrics.h"

#include <prometheus/metric_family.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "server/observe/gpu_counters.h"
#include "server/observe/metrics_text.h"

namespace dejavu {
namespace {

using Labels = std::vector<std::pair<std::string, std::string>>;

constexpr std::array<const char*, kStepPhases> kPhaseNames = {"prefill", "decode", "mixed"};
constexpr std::array<const char*, kStepComponents> kComponentNames = {"plan", "forward", "shadow", "handout"};
constexpr std::array<const char*, kRequestStages> kStageNames = {"queued", "prefill", "decode"};
constexpr std::array<const char*, kWeightKinds> kWeightNames = {"mlp", "attention", "predictor", "embedding", "head"};
constexpr std::array<const char*, kSlos> kSloNames = {"ttft", "itl"};
std::string PriorityName(int urgency) { return std::string(Name(static_cast<Urgency>(urgency))); }

std::string TierName(size_t tier) { return absl::AsciiStrToLower(Name(kAllTiers[tier])); }

double Seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
}

// Seconds since the epoch at which this process began.
double ProcessStart() {
  static const double start = [] {
    std::ifstream file("/proc/self/stat");
    std::string field;
    for (int i = 0; i < 22; ++i) file >> field;  // the name, the second, is dejavud's own: without spaces
    std::ifstream uptime_file("/proc/uptime");
    double uptime = 0.0;
    uptime_file >> uptime;
    const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    return now - uptime + std::strtod(field.c_str(), nullptr) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }();
  return start;
}

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t OpenFiles() {
  std::error_code error;
  int64_t count = 0;
  for (auto it = std::filesystem::directory_iterator("/proc/self/fd", error); it != std::filesystem::end(it); ++it)
    ++count;
  return count;
}

}  // namespace

// The families in the order in which they are first named.
class Metrics::Page {
 public:
  explicit Page(const std::string& model) : model_(model) {}

  void Counter(const std::string& name, const char* help, double value, const Labels& labels = {}) {
    Add(name, help, prometheus::MetricType::Counter, labels).counter.value = value;
  }
  void Gauge(const std::string& name, const char* help, double value, const Labels& labels = {}) {
    Add(name, help, prometheus::MetricType::Gauge, labels).gauge.value = value;
  }
  void Distribution(const std::string& name, const char* help, const Histogram& histogram, const Labels& labels = {}) {
    AddDistribution(name, help, histogram.snapshot(), histogram.edges(), labels);
  }
  // What nobody has observed yet says nothing: labels' combinations come with their first observation.
  void IfSeen(const std::string& name, const char* help, const Histogram& histogram, const Labels& labels) {
    const Histogram::Snapshot snapshot = histogram.snapshot();
    if (snapshot.count() > 0) AddDistribution(name, help, snapshot, histogram.edges(), labels);
  }
  void Process(const std::string& name, const char* help, double value, bool counts) {
    auto& family = families_.emplace_back();
    family.name = name;
    family.help = help;
    family.type = counts ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge;
    auto& metric = family.metric.emplace_back();
    (counts ? metric.counter.value : metric.gauge.value) = value;
  }

  std::string Text() const { return MetricsText().Serialize(families_); }

 private:
  void AddDistribution(const std::string& name, const char* help, const Histogram::Snapshot& snapshot,
                       const std::vector<double>& edges, const Labels& labels) {
    auto& to = Add(name, help, prometheus::MetricType::Histogram, labels).histogram;
    to.bucket.reserve(snapshot.counts.size());
    uint64_t count = 0;
    for (size_t i = 0; i < snapshot.counts.size(); ++i) {
      count += static_cast<uint64_t>(snapshot.counts[i]);
      const double edge = i < edges.size() ? edges[i] : std::numeric_limits<double>::infinity();
      to.bucket.push_back({count, edge});
    }
    to.sample_count = count;
    to.sample_sum = snapshot.sum;
  }

  prometheus::ClientMetric& Add(const std::string& name, const char* help, prometheus::MetricType type,
                                const Labels& labels) {
    const std::string full = "dejavu_" + name;
    const auto known = places_.emplace(full, families_.size());
    if (known.second) {
      families_.emplace_back();
      families_.back().name = full;
      families_.back().help = help;
      families_.back().type = type;
    }
    auto& metric = families_[known.first->second].metric.emplace_back();
    metric.label.push_back({"model", model_});
    for (const auto& [label, value] : labels) metric.label.push_back({label, value});
    return metric;
  }

  const std::string& model_;
  std::vector<prometheus::MetricFamily> families_;
  std::map<std::string, size_t> places_;
};

Metrics::Metrics(std::string model_name, const std::string& edges, bool per_layer, const Lifecycle* lifecycle)
    : model_name_(std::move(model_name)),
      edges_(*MetricEdgesFrom(edges)),
      per_layer_(per_layer),
      lifecycle_(lifecycle),
      stalls_(&edges_.at("client_stall_seconds")) {}

void Metrics::AddCounter(const std::string& name, const std::string& help, std::function<int64_t()> value) {
  borrowed_[name] = {help, std::move(value), /*counts=*/true};
}

void Metrics::AddGauge(const std::string& name, const std::string& help, std::function<int64_t()> value) {
  borrowed_[name] = {help, std::move(value), /*counts=*/false};
}

void Metrics::OnRequestEnd(const RequestRecord& record) {
  MutexLock lock(mutex_);
  ++calls_[{record.method, std::string(CodeName(record.code)), record.finish_reason}];
  if (record.client_stall_seconds > 0.0) stalls_.Observe(record.client_stall_seconds);
}

std::string Metrics::Text() const {
  Page page(model_name_);
  AddState(page);
  AddCalls(page);
  for (const auto& [name, borrowed] : borrowed_) {
    const auto value = static_cast<double>(borrowed.value());
    if (borrowed.counts) {
      page.Counter(name, borrowed.help.c_str(), value);
    } else {
      page.Gauge(name, borrowed.help.c_str(), value);
    }
  }
  if (const Engine* const engine = this->engine(); engine != nullptr) {
    AddEngine(*engine, page);
    AddLatencies(engine->metrics(), page);
    AddSparsity(*engine, page);
  }
  for (const GpuCounters& gpu : ReadGpuCounters()) {
    const Labels labels = {{"gpu", std::to_string(gpu.index)}};
    page.Gauge("gpu_memory_used_bytes", "Memory of the GPU in use, by anybody.", gpu.memory_used_bytes, labels);
    page.Gauge("gpu_utilization_ratio", "Share of the time in which the GPU ran something, lately.", gpu.utilization,
               labels);
    page.Gauge("gpu_power_watts", "Power that the GPU draws.", gpu.power_watts, labels);
    page.Counter("gpu_energy_joules_total", "Energy that the GPU has used since its driver was loaded.",
                 gpu.energy_joules, labels);
    page.Counter("gpu_ecc_errors_total", "Memory errors of the GPU that could not be corrected.", gpu.ecc_errors,
                 labels);
  }
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  page.Process("process_cpu_seconds_total", "Processor time of this process, user and system.",
               Seconds(usage.ru_utime) + Seconds(usage.ru_stime), true);
  page.Process("process_resident_memory_bytes", "Memory of this process that is in RAM.",
               static_cast<double>(ResidentBytes()), false);
  page.Process("process_open_fds", "Files and sockets that this process has open.", static_cast<double>(OpenFiles()),
               false);
  page.Process("process_start_time_seconds", "When this process began, in seconds since the epoch.", ProcessStart(),
               false);
  return page.Text();
}

void Metrics::AddState(Page& page) const {
  page.Gauge("build_info", "1; the labels say what was built.", 1,
             {{"version", DEJAVU_VERSION}, {"compiler", absl::StrCat("gcc ", __VERSION__)}});
  const v1::ServerState now = StateOf(lifecycle_->phase());
  for (const v1::ServerState state : kServerStates) {
    page.Gauge("engine_state", "1 for the state that the daemon is in, 0 for the others.", state == now ? 1 : 0,
               {{"state", Name(state)}});
  }
}

void Metrics::AddCalls(Page& page) const {
  MutexLock lock(mutex_);
  for (const auto& [names, count] : calls_) {
    const auto& [method, code, finish_reason] = names;
    page.Counter("requests_total", "Calls that have ended, by method, gRPC code and what ended the generation.",
                 static_cast<double>(count), {{"method", method}, {"code", code}, {"finish_reason", finish_reason}});
  }
  page.Distribution("client_stall_seconds",
                    "Time per call in which tokens were ready and waited for the client to read.", stalls_);
}

void Metrics::AddEngine(const Engine& engine, Page& page) const {
  const EngineMetrics& m = engine.metrics();
  const EngineStats stats = engine.stats();
  const PredictorInfo& predictor = engine.predictor();
  page.Gauge("model_info", "1; the labels say what is served.", 1,
             {{"dtype", std::string(engine.weight_type())},
              {"layers", std::to_string(engine.model().layers)},
              {"ranks", std::to_string(stats.ranks)},
              {"device", engine.backend_description()},
              {"predictor", predictor.path.empty() ? "none" : predictor.tap},
              {"synthetic", engine.synthetic().empty() ? "false" : "true"}});
  for (int i = 0; i < kRefusals; ++i) {
    page.Counter("requests_rejected_total", "Requests that were refused at the door, by reason.",
                 static_cast<double>(stats.account.refused[i]),
                 {{"reason", absl::AsciiStrToLower(Name(static_cast<Refusal>(i)))}});
  }
  page.Gauge("requests_running", "Requests in the running batch.", stats.running);
  for (int u = 0; u < kUrgencies; ++u) {
    page.Gauge("requests_waiting", "Requests in the queue.", stats.waiting_of[u], {{"priority", PriorityName(u)}});
  }
  page.Gauge("queue_tokens", "Prompt tokens in the queue.", static_cast<double>(stats.waiting_tokens));
  page.Gauge("queue_oldest_age_seconds", "How long the request has waited that has waited longest.",
             stats.oldest_wait_s);
  page.Counter("prompt_tokens_total", "Prompt tokens computed.", static_cast<double>(stats.prompt_tokens));
  page.Counter("generated_tokens_total", "Tokens generated.", static_cast<double>(stats.generated_tokens));
  page.Counter("prefix_cache_query_tokens_total", "Prompt tokens of requests that looked into the prefix cache.",
               static_cast<double>(m.prefix_query_tokens.value()));
  page.Counter("prefix_cache_hit_tokens_total", "Prompt tokens whose keys and values were in the prefix cache.",
               static_cast<double>(stats.cached_prompt_tokens));
  for (int i = 0; i < kStepPhases; ++i) {
    page.IfSeen("step_duration_seconds", "Time of an engine step, from planning to the last token handed out.",
                m.step_duration[i], {{"phase", kPhaseNames[i]}});
  }
  for (int i = 0; i < kStepComponents; ++i) {
    page.IfSeen("step_component_seconds", "What a step's time went into.", m.step_component[i],
                {{"component", kComponentNames[i]}});
  }
  page.Distribution("batch_size", "Sequences that decoded in a step.", m.batch_size);
  page.Distribution("step_tokens", "Tokens computed in a step, of prompts and outputs together.", m.step_tokens);
  const int32_t used = stats.kv_blocks_total - stats.kv_blocks_free;
  const char* const blocks = "Blocks of keys and values: in use, free, or free and holding a prefix.";
  page.Gauge("kv_blocks", blocks, used, {{"state", "used"}});
  page.Gauge("kv_blocks", blocks, stats.kv_blocks_free - stats.kv_blocks_cached, {{"state", "free"}});
  page.Gauge("kv_blocks", blocks, stats.kv_blocks_cached, {{"state", "cached"}});
  page.Gauge("kv_utilization_ratio", "Share of the blocks of keys and values that is in use.",
             stats.kv_blocks_total > 0 ? static_cast<double>(used) / stats.kv_blocks_total : 0.0);
  page.Counter("preemptions_total", "Times that a running request was sent back to the queue.",
               static_cast<double>(stats.preemptions));
  for (int i = 0; i < kRequestStages; ++i) {
    page.Counter("cancelled_total", "Requests that their client gave up, by how far they were.",
                 static_cast<double>(m.cancelled[i].value()), {{"stage", kStageNames[i]}});
    page.Counter("deadline_exceeded_total", "Requests whose deadline passed, by how far they were.",
                 static_cast<double>(m.deadline_exceeded[i].value()), {{"stage", kStageNames[i]}});
  }
  page.Gauge("model_load_seconds", "How long the start took.", m.load_seconds.value(), {{"stage", "load"}});
  page.Gauge("model_load_seconds", "How long the start took.", m.warm_up_seconds.value(), {{"stage", "warmup"}});
  page.Gauge("weight_bytes", "Memory of the weights, on all ranks.", static_cast<double>(engine.weight_bytes()));
  for (int i = 0; i < kSlos; ++i) {
    if (m.slo_attained[i].value() + m.slo_missed[i].value() == 0) continue;
    page.Counter("slo_attained_total", "Requests within their target, where one is configured.",
                 static_cast<double>(m.slo_attained[i].value()), {{"slo", kSloNames[i]}});
    page.Counter("slo_missed_total", "Requests beyond their target, where one is configured.",
                 static_cast<double>(m.slo_missed[i].value()), {{"slo", kSloNames[i]}});
  }
  if (stats.ranks == 1) return;
  page.IfSeen("rank_imbalance_ratio", "Per step: active neurons of the slowest rank over the mean of all ranks.",
              m.imbalance, {});
  page.Counter("all_reduces_total", "Sums over the ranks.", static_cast<double>(stats.all_reduces));
  page.Counter("all_reduce_seconds_total", "Time that rank 0 spent in sums over the ranks, waiting included.",
               static_cast<double>(stats.all_reduce_ns) / 1e9);
}

void Metrics::AddLatencies(const EngineMetrics& metrics, Page& page) const {
  const auto add = [&](const char* name, const char* help, Histogram EngineMetrics::Latencies::*member) {
    for (size_t i = 0; i < metrics.latencies.size(); ++i) {
      page.IfSeen(name, help, metrics.latencies[i].*member,
                  {{"tier", TierName(i / kUrgencies)}, {"priority", PriorityName(i % kUrgencies)}});
    }
  };
  using L = EngineMetrics::Latencies;
  add("time_to_first_token_seconds", "From arrival to the first token.", &L::time_to_first_token);
  add("inter_token_latency_seconds", "Between two tokens of one request.", &L::inter_token);
  add("time_per_output_token_seconds", "Per request: mean time of its tokens after the first.",
      &L::time_per_output_token);
  add("request_duration_seconds", "From arrival to the end.", &L::duration);
  add("queue_time_seconds", "From arrival to admission.", &L::queue);
  add("prefill_time_seconds", "From admission to the first token.", &L::prefill);
  add("decode_time_seconds", "From the first token to the end.", &L::decode);
}

void Metrics::AddSparsity(const Engine& engine, Page& page) const {
  const EngineMetrics& m = engine.metrics();
  const SparsityStats stats = engine.sparsity_stats();
  const char* const mlp = "Share of the MLP's rows that was read: a request's own, or a step's union by layer group.";
  const char* const heads = "Share of the attention heads that was computed, likewise.";
  page.IfSeen("mlp_density_ratio", mlp, m.request_mlp_density, {{"scope", "request"}, {"layer_group", "all"}});
  page.IfSeen("attention_head_density_ratio", heads, m.request_head_density,
              {{"scope", "request"}, {"layer_group", "all"}});
  for (int g = 0; g < kLayerGroups; ++g) {
    const Labels of_union = {{"scope", "union"}, {"layer_group", std::to_string(g)}};
    page.IfSeen("mlp_density_ratio", mlp, m.union_mlp_density[g], of_union);
    page.IfSeen("attention_head_density_ratio", heads, m.union_head_density[g], of_union);
    const Labels group = {{"layer_group", std::to_string(g)}};
    page.IfSeen("predictor_recall_ratio", "Shadow checks: share of the active neurons that were selected.", m.recall[g],
                group);
    page.IfSeen("predictor_precision_ratio", "Shadow checks: share of the selected neurons that were active.",
                m.precision[g], group);
    page.IfSeen("predictor_missed_mass_ratio", "Shadow checks: share of the squared output that was left out.",
                m.missed_mass[g], group);
  }
  for (size_t i = 0; i < kBatchSizes.size(); ++i) {
    page.IfSeen("union_inflation_ratio", "Neurons that a step selected over the mean of its rows.",
                m.union_inflation[i], {{"batch", std::to_string(kBatchSizes[i])}});
  }
  std::array<int, kTiers> fallen_back = {};
  for (const SparsityStats::Fallback& f : stats.exact_now) ++fallen_back[static_cast<size_t>(f.tier)];
  for (size_t tier = 0; tier < kAllTiers.size(); ++tier) {
    if (!IsPredicted(kAllTiers[tier])) continue;
    const Labels labels = {{"tier", TierName(tier)}};
    page.Counter("shadow_tokens_total", "Tokens that were computed a second time, densely.",
                 static_cast<double>(m.shadow_tokens[tier].value()), labels);
    page.Counter("shadow_top1_disagree_total", "Of those, how many had another most likely successor.",
                 static_cast<double>(m.shadow_disagreements[tier].value()), labels);
    page.IfSeen("shadow_kl_nats", "Of those, the divergence of the sparse distribution from the dense one.",
                m.shadow_kl[tier], labels);
    page.Gauge("fallback_layers", "Layers that run EXACT because their shadow checks fail.", fallen_back[tier], labels);
  }
  int64_t fallbacks = 0, recoveries = 0;
  for (const LayerSparsityStats& layer : stats.layers) {
    fallbacks += layer.fallbacks;
    recoveries += layer.recoveries;
  }
  page.Counter("dense_fallback_total", "Times that a layer went over to EXACT.", static_cast<double>(fallbacks),
               {{"reason", "drift"}});
  page.Counter("fallback_recoveries_total", "Times that such a layer was predicted again.",
               static_cast<double>(recoveries));
  for (int i = 0; i < kWeightKinds; ++i) {
    page.Counter("weight_bytes_read_total", "Bytes of weights that steps have read, as the selections imply.",
                 static_cast<double>(m.weight_bytes_read[i].value()), {{"kind", kWeightNames[i]}});
  }
  page.Counter("weight_bytes_saved_total", "Bytes of weights that dense steps would have read besides.",
               static_cast<double>(m.weight_bytes_saved.value()));
  page.Gauge("effective_bandwidth_bytes_per_second", "Bytes of weights per second of late decode steps.",
             m.bandwidth.value());
  page.Gauge("measured_bandwidth_bytes_per_second", "What the device reached at start reading the weights' memory.",
             m.measured_bandwidth.value());
  if (!per_layer_) return;
  for (size_t l = 0; l < stats.layers.size(); ++l) {
    const LayerSparsityStats& layer = stats.layers[l];
    const Labels labels = {{"layer", std::to_string(l)}};
    const auto share = [](double part, double whole) { return whole > 0.0 ? part / whole : 0.0; };
    const double neurons = static_cast<double>(layer.rows) * engine.model().ffn;
    page.Gauge("layer_density_ratio", "Share of the layer's neurons that predicted rows selected, since the start.",
               share(static_cast<double>(layer.selected), neurons), labels);
    page.Gauge("layer_recall_ratio", "Share of the layer's active neurons that were selected, since the start.",
               share(static_cast<double>(layer.shadow_hits), static_cast<double>(layer.shadow_active)), labels);
  }
}

}  // namespace dejavu
