// Metrics: the page that Prometheus scrapes; docs/operations/metrics.md lists what is on it. The engine's metrics are
// the rows of engine/metrics.h, read at each scrape. The server's own are named in metrics.cc, or by the caller of
// AddCounter and AddGauge. Any thread.
#ifndef SERVER_OBSERVE_METRICS_H_
#define SERVER_OBSERVE_METRICS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "engine/engine.h"
#include "engine/metrics.h"
#include "kernels/base/mutex.h"
#include "server/observe/metrics_page.h"
#include "server/observe/tenant_metrics.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/request_record.h"

namespace dejavu {

class Metrics final : public RequestObserver {
 public:
  // `edges` as MetricsOptions::edges, known to be valid; `tenants`: how many have series of their own, 0 for nothing by
  // tenant; `lifecycle` must outlive the object.
  Metrics(std::string model_name, const std::string& edges, bool per_layer, int tenants, const Lifecycle* lifecycle);

  // From now on the page includes the engine, which must outlive all calls of Text. `block_tokens`: kv.block_tokens.
  void SetEngine(const Engine* engine, int32_t block_tokens) {
    block_tokens_ = block_tokens;
    engine_.store(engine, std::memory_order_release);
  }

  // Adds a number that the caller keeps; `value` is called at each scrape. Before the first call of Text.
  void AddCounter(const std::string& name, const std::string& help, std::function<int64_t()> value,
                  MetricsPage::Labels labels = {});
  void AddGauge(const std::string& name, const std::string& help, std::function<int64_t()> value);

  void OnRequestEnd(const RequestRecord& record) override;

  // Prometheus' text format, version 0.0.4.
  std::string Text() const;

  const Engine* engine() const { return engine_.load(std::memory_order_acquire); }

 private:
  void AddState(MetricsPage& page) const;
  void AddCalls(MetricsPage& page) const;
  void AddBorrowed(MetricsPage& page) const;
  void AddEngine(const Engine& engine, MetricsPage& page) const;
  void AddForEndpointPickers(const EngineView& view, MetricsPage& page) const;

  const std::string model_name_;
  const bool per_layer_;
  const Lifecycle* const lifecycle_;
  int32_t block_tokens_ = 0;  // constant once engine_ is set
  std::atomic<const Engine*> engine_ = nullptr;

  struct Borrowed {
    std::string name, help;
    MetricsPage::Labels labels;
    std::function<int64_t()> value;
    bool counts;
  };
  std::vector<Borrowed> borrowed_;  // constant once shared; those of a name side by side

  mutable Mutex mutex_;
  // How many have ended, by method, code, finish reason and API.
  std::map<std::tuple<std::string, std::string, std::string, absl::string_view>, int64_t> calls_
      ABSL_GUARDED_BY(mutex_);
  CallMetrics call_metrics_ ABSL_GUARDED_BY(mutex_);
  TenantMetrics tenant_metrics_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_METRICS_H_
