// MetricsPage: collects the answer to one scrape. Families appear in the order in which they are first added. Each name
// gets the prefix `dejavu_` and each series the label `model`. One thread.
#ifndef SERVER_OBSERVE_METRICS_PAGE_H_
#define SERVER_OBSERVE_METRICS_PAGE_H_

#include <prometheus/metric_family.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/metric_family.h"

namespace dejavu {

class MetricsPage {
 public:
  using Labels = MetricFamily::Labels;

  // `model` must outlive the object.
  explicit MetricsPage(const std::string& model) : model_(model) {}

  // Those series of a row that it shows now.
  void Add(const MetricFamily& family, const EngineView& view);

  void Counter(const std::string& name, const std::string& help, double value, const Labels& labels = {});
  void Gauge(const std::string& name, const std::string& help, double value, const Labels& labels = {});
  void Distribution(const std::string& name, const std::string& help, const Histogram& histogram,
                    const Labels& labels = {});
  // With a name that all kinds of processes share, without prefix and model.
  void ProcessCounter(const std::string& name, const std::string& help, double value);
  void ProcessGauge(const std::string& name, const std::string& help, double value);

  // With the whole name that another system gave it, and the label `model_name` in place of `model`, as that has.
  void ForeignGauge(const std::string& name, const std::string& help, double value, const Labels& labels = {});
  void ForeignCounter(const std::string& name, const std::string& help, double value);

  std::string Text() const;

 private:
  prometheus::MetricFamily& Family(const std::string& full_name, const std::string& help, prometheus::MetricType type);
  prometheus::ClientMetric& ForeignSeries(const std::string& name, const std::string& help, prometheus::MetricType type,
                                          const Labels& labels);
  prometheus::ClientMetric& Series(const std::string& name, const std::string& help, prometheus::MetricType type,
                                   const Labels& labels);

  const std::string& model_;
  std::vector<prometheus::MetricFamily> families_;
  std::map<std::string, size_t> places_;  // of families, by name
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_METRICS_PAGE_H_
