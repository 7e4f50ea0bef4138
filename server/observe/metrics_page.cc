#include "server/observe/metrics_page.h"

#include <limits>

#include "server/observe/metrics_text.h"

namespace dejavu {

using prometheus::MetricType;

void MetricsPage::Add(const MetricFamily& family, const EngineView& view) {
  for (size_t i = 0; i < family.series(); ++i) {
    if (!family.IsShown(view, i)) continue;
    if (const Histogram* const histogram = family.histogram(i)) {
      Distribution(family.name(), family.help(), *histogram, family.labels(i));
    } else if (family.counts()) {
      Counter(family.name(), family.help(), family.value(view, i), family.labels(i));
    } else {
      Gauge(family.name(), family.help(), family.value(view, i), family.labels(i));
    }
  }
}

void MetricsPage::Counter(const std::string& name, const std::string& help, double value, const Labels& labels) {
  Series(name, help, MetricType::Counter, labels).counter.value = value;
}

void MetricsPage::Gauge(const std::string& name, const std::string& help, double value, const Labels& labels) {
  Series(name, help, MetricType::Gauge, labels).gauge.value = value;
}

void MetricsPage::Distribution(const std::string& name, const std::string& help, const Histogram& histogram,
                               const Labels& labels) {
  const Histogram::Snapshot snapshot = histogram.snapshot();
  auto& to = Series(name, help, MetricType::Histogram, labels).histogram;
  to.bucket.reserve(snapshot.counts.size());
  uint64_t count = 0;
  for (size_t i = 0; i < snapshot.counts.size(); ++i) {
    count += static_cast<uint64_t>(snapshot.counts[i]);
    const auto& edges = histogram.edges();
    to.bucket.push_back({count, i < edges.size() ? edges[i] : std::numeric_limits<double>::infinity()});
  }
  to.sample_count = count;
  to.sample_sum = snapshot.sum;
}

void MetricsPage::ProcessCounter(const std::string& name, const std::string& help, double value) {
  Family(name, help, MetricType::Counter).metric.emplace_back().counter.value = value;
}

void MetricsPage::ProcessGauge(const std::string& name, const std::string& help, double value) {
  Family(name, help, MetricType::Gauge).metric.emplace_back().gauge.value = value;
}

void MetricsPage::ForeignGauge(const std::string& name, const std::string& help, double value, const Labels& labels) {
  ForeignSeries(name, help, MetricType::Gauge, labels).gauge.value = value;
}

void MetricsPage::ForeignCounter(const std::string& name, const std::string& help, double value) {
  ForeignSeries(name, help, MetricType::Counter, {}).counter.value = value;
}

prometheus::ClientMetric& MetricsPage::ForeignSeries(const std::string& name, const std::string& help, MetricType type,
                                                     const Labels& labels) {
  auto& series = Family(name, help, type).metric.emplace_back();
  series.label.push_back({"model_name", model_});
  for (const auto& [label, value] : labels) series.label.push_back({label, value});
  return series;
}

std::string MetricsPage::Text() const { return MetricsText().Serialize(families_); }

prometheus::MetricFamily& MetricsPage::Family(const std::string& full_name, const std::string& help, MetricType type) {
  const auto known = places_.emplace(full_name, families_.size());
  if (known.second) families_.push_back({full_name, help, type, {}});
  return families_[known.first->second];
}

prometheus::ClientMetric& MetricsPage::Series(const std::string& name, const std::string& help, MetricType type,
                                              const Labels& labels) {
  auto& series = Family("dejavu_" + name, help, type).metric.emplace_back();
  series.label.push_back({"model", model_});
  for (const auto& [label, value] : labels) series.label.push_back({label, value});
  return series;
}

}  // namespace dejavu
