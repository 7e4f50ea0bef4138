// Metrics: what the daemon says of itself in Prometheus' terms, as docs/operations/metrics.md lists it. Nothing is kept
// here but what calls end with; the rest is a snapshot of the engine's counters, named when somebody asks. Any thread.
#ifndef SERVER_OBSERVE_METRICS_H_
#define SERVER_OBSERVE_METRICS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "engine/engine.h"
#include "engine/metrics.h"
#include "kernels/base/mutex.h"
#include "server/rpc/lifecycle.h"
#include "server/rpc/request_record.h"

namespace dejavu {

class Metrics final : public RequestObserver {
 public:
  // `edges` as EngineOptions::metric_edges, known to be valid; `lifecycle` must outlive the object.
  Metrics(std::string model_name, const std::string& edges, bool per_layer, const Lifecycle* lifecycle);

  // From now on the engine is asked, too. It must outlive everybody who asks.
  void SetEngine(const Engine* engine) { engine_.store(engine, std::memory_order_release); }

  // Numbers that others keep, asked for their value. Before anybody asks for the text.
  void AddCounter(const std::string& name, const std::string& help, std::function<int64_t()> value);
  void AddGauge(const std::string& name, const std::string& help, std::function<int64_t()> value);

  void OnRequestEnd(const RequestRecord& record) override;

  // Prometheus' text format, version 0.0.4.
  std::string Text() const;

  const Engine* engine() const { return engine_.load(std::memory_order_acquire); }

 private:
  class Page;

  void AddCalls(Page& page) const;
  void AddState(Page& page) const;
  void AddEngine(const Engine& engine, Page& page) const;
  void AddLatencies(const EngineMetrics& metrics, Page& page) const;
  void AddSparsity(const Engine& engine, Page& page) const;

  const std::string model_name_;
  const MetricEdges edges_;
  const bool per_layer_;
  const Lifecycle* const lifecycle_;
  std::atomic<const Engine*> engine_ = nullptr;
  struct Borrowed {
    std::string help;
    std::function<int64_t()> value;
    bool counts;
  };
  std::map<std::string, Borrowed> borrowed_;  // constant once shared

  mutable Mutex mutex_;
  std::map<std::tuple<std::string, std::string, std::string>, int64_t> calls_ ABSL_GUARDED_BY(mutex_);
  Histogram stalls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_METRICS_H_
