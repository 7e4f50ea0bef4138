// MetricsText: writes counters, gauges and histograms in Prometheus' text format, version 0.0.4, as prometheus-cpp's
// TextSerializer does. That one writes through streams, which took four fifths of a scrape's time, and a scrape takes
// its time from the CPUs that decode.
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
