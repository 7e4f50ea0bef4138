// MetricsText: Prometheus' text format, version 0.0.4, as prometheus-cpp's own TextSerializer writes it, of counters,
// gauges and histograms without timestamps. It is here because its streams took four fifths of a scrape's time, and a
// scrape takes that time from the CPUs that decode.
#ifndef SERVER_OBSERVE_METRICS_TEXT_H_
#define SERVER_OBSERVE_METRICS_TEXT_H_

#include <prometheus/metric_family.h>
#include <prometheus/serializer.h>

#include <ostream>
#include <string>
#include <vector>

namespace dejavu {

class MetricsText final : public prometheus::Serializer {
 public:
  std::string Serialize(const std::vector<prometheus::MetricFamily>& families) const override;
  void Serialize(std::ostream& out, const std::vector<prometheus::MetricFamily>& families) const override;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_METRICS_TEXT_H_
