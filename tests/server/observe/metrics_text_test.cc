// MetricsText against the library's own serializer: the same samples, line by line and number by number.
#include "server/observe/metrics_text.h"

#include <prometheus/text_serializer.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using testing::HasSubstr;

// A line's text before its number, and the number.
std::pair<std::string, double> Sample(const std::string& line) {
  const size_t space = line.rfind(' ');
  return {line.substr(0, space), std::strtod(line.c_str() + space + 1, nullptr)};
}

void ExpectAsTheLibrary(const std::vector<MetricFamily>& families) {
  const std::vector<std::string> ours = absl::StrSplit(MetricsText().Serialize(families), '\n');
  const std::vector<std::string> theirs = absl::StrSplit(prometheus::TextSerializer().Serialize(families), '\n');
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    if (theirs[i].empty() || theirs[i][0] == '#') {
      EXPECT_EQ(ours[i], theirs[i]);
      continue;
    }
    const auto [our_name, our_value] = Sample(ours[i]);
    const auto [their_name, their_value] = Sample(theirs[i]);
    EXPECT_EQ(our_name, their_name);
    if (std::isfinite(their_value)) {  // which the library rounds to 16 digits
      EXPECT_LE(std::abs(our_value - their_value), 1e-15 * std::abs(their_value)) << ours[i] << " and " << theirs[i];
    } else if (std::isnan(their_value)) {
      EXPECT_TRUE(std::isnan(our_value)) << ours[i];
    } else {
      EXPECT_EQ(our_value, their_value) << ours[i];
    }
  }
}

MetricFamily Family(const std::string& name, MetricType type, std::vector<ClientMetric> metrics) {
  return {name, "What it is.", type, std::move(metrics)};
}

ClientMetric Value(MetricType type, double value, std::vector<ClientMetric::Label> labels = {}) {
  ClientMetric metric;
  metric.label = std::move(labels);
  (type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  return metric;
}

TEST(MetricsTextTest, WritesNumbersOfAllSizes) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const MetricType type : {MetricType::Counter, MetricType::Gauge}) {
    std::vector<ClientMetric> metrics;
    int i = 0;
    for (const double value : {0.0, -0.5, 1.0, 0.1, 1.0 / 3.0, 1e-9, 5e-324, 123456789.0, 1790000000.123, 1e14, 1e15,
                               1e16, 9007199254740993.0, 1.7e308, -42.0, infinity, -infinity, std::nan("")}) {
      metrics.push_back(Value(type, value, {{"i", std::to_string(i++)}}));
    }
    ExpectAsTheLibrary({Family("numbers", type, metrics)});
  }
}

TEST(MetricsTextTest, WritesHistograms) {
  ClientMetric metric;
  metric.histogram.sample_count = 17;
  metric.histogram.sample_sum = 0.30000000000000004;
  metric.histogram.bucket = {{3, 0.0001}, {9, 0.25}, {16, 10}, {17, std::numeric_limits<double>::infinity()}};
  ClientMetric labelled = metric;
  labelled.label = {{"tier", "exact"}, {"priority", "normal"}};
  ExpectAsTheLibrary({Family("seconds", MetricType::Histogram, {labelled, labelled})});
  // Without labels the library does the same.
  ExpectAsTheLibrary({Family("seconds", MetricType::Histogram, {metric})});
}

TEST(MetricsTextTest, EscapesWhatLabelsAndHelpHold) {
  MetricFamily family = Family("odd", MetricType::Gauge, {Value(MetricType::Gauge, 1, {{"path", "C:\\a \"b\"\nc"}})});
  const std::string text = MetricsText().Serialize({family});
  EXPECT_THAT(text, HasSubstr("odd{path=\"C:\\\\a \\\"b\\\"\\nc\"} 1\n"));
  ExpectAsTheLibrary({family});
}

TEST(MetricsTextTest, NothingIsNothing) { EXPECT_EQ(MetricsText().Serialize({}), ""); }

}  // namespace
}  // namespace dejavu
