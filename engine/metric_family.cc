#include "engine/metric_family.h"

#include <algorithm>

#include "absl/strings/match.h"

namespace dejavu {
namespace {

std::vector<double> EdgesOf(const std::string& name, absl::Span<const double> own, const MetricEdges& others) {
  const auto found = others.find(name);
  return found == others.end() ? std::vector<double>(own.begin(), own.end()) : found->second;
}

}  // namespace

std::vector<MetricFamily::Labels> MetricLabels::Combinations() const {
  std::vector<MetricFamily::Labels> series(1);
  for (const MetricLabel& label : labels_) {
    std::vector<MetricFamily::Labels> longer;
    for (const MetricFamily::Labels& before : series) {
      for (const std::string& value : label.values) {
        longer.push_back(before);
        longer.back().emplace_back(label.name, value);
      }
    }
    series = std::move(longer);
  }
  return series;
}

MetricFamily::MetricFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels,
                           Condition condition)
    : name_(std::move(name)), help_(std::move(help)), labels_(labels.Combinations()), condition_(condition) {
  table.families_.push_back(this);
}

bool MetricFamily::counts() const { return absl::EndsWith(name_, "_total"); }

bool MetricFamily::IsShown(const EngineView& view, size_t series) const {
  const Labels& labels = labels_[series];
  if (std::any_of(labels.begin(), labels.end(), [](const auto& label) { return label.second.empty(); })) return false;
  if (condition_ != nullptr) return condition_(view, series);
  const Histogram* const histogram = this->histogram(series);
  return histogram == nullptr || labels.empty() || histogram->observed();
}

HistogramFamily::HistogramFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels,
                                 absl::Span<const double> edges, Condition condition)
    : MetricFamily(table, std::move(name), std::move(help), labels, condition),
      edges_(EdgesOf(this->name(), edges, table.edges_)),
      histograms_(series(), Histogram(&edges_)) {}

}  // namespace dejavu
