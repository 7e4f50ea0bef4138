#include "server/observe/metrics.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/observe/gpu_counters.h"
#include "server/observe/process_facts.h"

namespace dejavu {
namespace {

void AddModel(const Engine& engine, MetricsPage& page) {
  const PredictorInfo& predictor = engine.predictor();
  page.Gauge("model_info", "1; the labels say what is served.", 1,
             {{"dtype", std::string(engine.weight_type())},
              {"layers", std::to_string(engine.model().layers)},
              {"ranks", std::to_string(engine.stats().ranks)},
              {"device", engine.backend_description()},
              {"predictor", predictor.path.empty() ? "none" : predictor.tap},
              {"synthetic", engine.synthetic().empty() ? "false" : "true"}});
}

void AddLayers(const std::vector<LayerSparsityStats>& layers, int32_t neurons, MetricsPage& page) {
  const auto share = [](double part, double whole) { return whole > 0.0 ? part / whole : 0.0; };
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSparsityStats& layer = layers[l];
    const MetricsPage::Labels labels = {{"layer", std::to_string(l)}};
    page.Gauge("layer_density_ratio", "Share of the layer's neurons that predicted rows selected, since the start.",
               share(static_cast<double>(layer.selected), static_cast<double>(layer.rows) * neurons), labels);
    page.Gauge("layer_recall_ratio", "Share of the layer's active neurons that were selected, since the start.",
               share(static_cast<double>(layer.shadow_hits), static_cast<double>(layer.shadow_active)), labels);
  }
}

void AddGpus(MetricsPage& page) {
  for (const GpuCounters& gpu : ReadGpuCounters()) {
    const MetricsPage::Labels labels = {{"gpu", std::to_string(gpu.index)}};
    page.Gauge("gpu_memory_used_bytes", "Memory of the GPU in use, by anybody.", gpu.memory_used_bytes, labels);
    page.Gauge("gpu_utilization_ratio", "Share of the time in which the GPU ran something, lately.", gpu.utilization,
               labels);
    page.Gauge("gpu_power_watts", "Power that the GPU draws.", gpu.power_watts, labels);
    page.Counter("gpu_energy_joules_total", "Energy that the GPU has used since its driver was loaded.",
                 gpu.energy_joules, labels);
    page.Counter("gpu_ecc_errors_total", "Memory errors of the GPU that could not be corrected.", gpu.ecc_errors,
                 labels);
  }
}

void AddProcess(MetricsPage& page) {
  const ProcessFacts facts = ReadProcessFacts();
  page.ProcessCounter("process_cpu_seconds_total", "Processor time of this process, user and system.",
                      facts.cpu_seconds);
  page.ProcessGauge("process_resident_memory_bytes", "Memory of this process that is in RAM.",
                    static_cast<double>(facts.resident_bytes));
  page.ProcessGauge("process_open_fds", "Files and sockets that this process has open.",
                    static_cast<double>(facts.open_files));
  page.ProcessGauge("process_start_time_seconds", "When this process began, in seconds since the epoch.",
                    facts.start_unix_seconds);
}

}  // namespace

Metrics::Metrics(std::string model_name, const std::string& edges, bool per_layer, int tenants,
                 const Lifecycle* lifecycle)
    : model_name_(std::move(model_name)),
      per_layer_(per_layer),
      lifecycle_(lifecycle),
      call_metrics_(*MetricEdgesFrom(edges)),
      tenant_metrics_(tenants) {}

void Metrics::AddCounter(const std::string& name, const std::string& help, std::function<int64_t()> value,
                         MetricsPage::Labels labels) {
  borrowed_.push_back({name, help, std::move(labels), std::move(value), /*counts=*/true});
}

void Metrics::AddGauge(const std::string& name, const std::string& help, std::function<int64_t()> value) {
  borrowed_.push_back({name, help, {}, std::move(value), /*counts=*/false});
}

void Metrics::OnRequestEnd(const RequestRecord& record) {
  MutexLock lock(mutex_);
  ++calls_[{record.method, std::string(CodeName(record.code)), record.finish_reason, ApiOf(record.service)}];
  tenant_metrics_.Count(record);
  if (record.client_stall_seconds > 0.0) call_metrics_.client_stall.Observe(record.client_stall_seconds);
}

std::string Metrics::Text() const {
  MetricsPage page(model_name_);
  AddState(page);
  AddCalls(page);
  AddBorrowed(page);
  if (const Engine* const engine = this->engine(); engine != nullptr) AddEngine(*engine, page);
  AddGpus(page);
  AddProcess(page);
  return page.Text();
}

void Metrics::AddState(MetricsPage& page) const {
  page.Gauge("build_info", "1; the labels say what was built.", 1,
             {{"version", DEJAVU_VERSION}, {"compiler", absl::StrCat("gcc ", __VERSION__)}});
  const v1::ServerState now = StateOf(lifecycle_->phase());
  for (const v1::ServerState state : kServerStates) {
    page.Gauge("engine_state", "1 for the state that the daemon is in, 0 for the others.", state == now ? 1 : 0,
               {{"state", Name(state)}});
  }
}

void Metrics::AddCalls(MetricsPage& page) const {
  MutexLock lock(mutex_);
  for (const auto& [names, count] : calls_) {
    const auto& [method, code, finish_reason, api] = names;
    page.Counter("requests_total", "Calls that have ended, by method, gRPC code, what ended the generation and API.",
                 static_cast<double>(count),
                 {{"method", method}, {"code", code}, {"finish_reason", finish_reason}, {"api", std::string(api)}});
  }
  const HistogramFamily& stalls = call_metrics_.client_stall;
  page.Distribution(stalls.name(), stalls.help(), stalls[0]);
  tenant_metrics_.AddTo(page);
}

void Metrics::AddBorrowed(MetricsPage& page) const {
  for (const Borrowed& borrowed : borrowed_) {
    const auto value = static_cast<double>(borrowed.value());
    if (borrowed.counts) {
      page.Counter(borrowed.name, borrowed.help, value, borrowed.labels);
    } else {
      page.Gauge(borrowed.name, borrowed.help, value);
    }
  }
}

void Metrics::AddEngine(const Engine& engine, MetricsPage& page) const {
  AddModel(engine, page);
  const EngineView view{engine.metrics(), engine.stats(), engine.sparsity_stats(), engine.weight_bytes(),
                        engine.draft_weight_bytes()};
  for (const MetricFamily* family : view.metrics.families()) page.Add(*family, view);
  if (per_layer_) AddLayers(view.sparsity.layers, engine.model().ffn, page);
  AddForEndpointPickers(view, page);
}

// What Gateway API's inference extension reads of a model server, by the names that its pickers look for unless they
// are told others: vLLM's (proposal 003, model server protocol).
void Metrics::AddForEndpointPickers(const EngineView& view, MetricsPage& page) const {
  const EngineStats& stats = view.stats;
  const double blocks = std::max(1, stats.kv_blocks_total);
  page.ForeignGauge("vllm:num_requests_running", "As dejavu_requests_running.", stats.running);
  page.ForeignGauge("vllm:num_requests_waiting", "As dejavu_requests_waiting, of all priorities.", stats.waiting);
  page.ForeignGauge("vllm:kv_cache_usage_perc", "As dejavu_kv_utilization_ratio.",
                    (stats.kv_blocks_total - stats.kv_blocks_free) / blocks);
  page.ForeignGauge(
      "vllm:cache_config_info", "1; the labels say how keys and values are kept.", 1,
      {{"block_size", std::to_string(block_tokens_)}, {"num_gpu_blocks", std::to_string(stats.kv_blocks_total)}});
  page.ForeignCounter("vllm:prefix_cache_queries_total", "As dejavu_prefix_cache_query_tokens_total.",
                      static_cast<double>(view.metrics.prefix_query_tokens.value()));
  page.ForeignCounter("vllm:prefix_cache_hits_total", "As dejavu_prefix_cache_hit_tokens_total.",
                      static_cast<double>(stats.cached_prompt_tokens));
}

}  // namespace dejavu
