#include "server/observe/metrics_text.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "fmt/compile.h"
#include "fmt/format.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr size_t kBytesPerLine = 128;

const char* TypeName(prometheus::MetricType type) {
  switch (type) {
    case prometheus::MetricType::Counter:
      return "counter";
    case prometheus::MetricType::Gauge:
      return "gauge";
    case prometheus::MetricType::Histogram:
      return "histogram";
    default:
      CHECK(false) << "a metric of type " << static_cast<int>(type);
  }
  return "";
}

void AppendEscaped(absl::string_view text, bool quotes, std::string* out) {
  for (const char c : text) {
    if (c == '\\') {
      out->append("\\\\");
    } else if (c == '\n') {
      out->append("\\n");
    } else if (c == '"' && quotes) {
      out->append("\\\"");
    } else {
      out->push_back(c);
    }
  }
}

// The shortest text that reads as the same number.
void AppendNumber(double value, std::string* out) {
  if (std::isnan(value)) {
    out->append("NaN");
  } else if (std::isinf(value)) {
    out->append(value > 0 ? "+Inf" : "-Inf");
  } else {
    char text[32];
    const bool whole = value == std::floor(value) && std::abs(value) < 1e15;
    char* const end = whole ? fmt::format_to(text, FMT_COMPILE("{}"), static_cast<int64_t>(value))
                            : fmt::format_to(text, FMT_COMPILE("{}"), value);
    out->append(text, end - text);
  }
}

// a="b",c="d" without braces.
std::string LabelsOf(const prometheus::ClientMetric& metric) {
  std::string labels;
  for (const auto& label : metric.label) {
    absl::StrAppend(&labels, labels.empty() ? "" : ",", label.name, "=\"");
    AppendEscaped(label.value, /*quotes=*/true, &labels);
    labels.push_back('"');
  }
  return labels;
}

void AppendSample(absl::string_view name, absl::string_view suffix, absl::string_view labels, double value,
                  std::string* out) {
  if (labels.empty()) {
    absl::StrAppend(out, name, suffix, " ");
  } else {
    absl::StrAppend(out, name, suffix, "{", labels, "} ");
  }
  AppendNumber(value, out);
  out->push_back('\n');
}

// The upper bounds of a family's buckets as text, made once: its histograms have the same.
class Bounds {
 public:
  absl::string_view Text(size_t bucket, double bound) {
    if (bucket == texts_.size()) texts_.push_back({std::nan(""), ""});
    auto& [known, text] = texts_[bucket];
    if (known != bound) {
      known = bound;
      text.clear();
      AppendNumber(bound, &text);
    }
    return text;
  }

 private:
  std::vector<std::pair<double, std::string>> texts_;
};

void AppendHistogram(absl::string_view name, absl::string_view labels,
                     const prometheus::ClientMetric::Histogram& histogram, Bounds& bounds, std::string* out) {
  AppendSample(name, "_count", labels, static_cast<double>(histogram.sample_count), out);
  AppendSample(name, "_sum", labels, histogram.sample_sum, out);
  const std::string start = absl::StrCat(name, "_bucket{", labels, labels.empty() ? "" : ",", "le=\"");
  for (size_t i = 0; i < histogram.bucket.size(); ++i) {
    const auto& bucket = histogram.bucket[i];
    const fmt::format_int count(bucket.cumulative_count);
    absl::StrAppend(out, start, bounds.Text(i, bucket.upper_bound), "\"} ",
                    absl::string_view(count.data(), count.size()), "\n");
  }
}

}  // namespace

std::string MetricsText::Serialize(const std::vector<prometheus::MetricFamily>& families) const {
  size_t lines = 0;
  for (const auto& family : families) {
    lines += 2;
    for (const auto& metric : family.metric) lines += 3 + metric.histogram.bucket.size();
  }
  std::string out;
  out.reserve(lines * kBytesPerLine);
  for (const auto& family : families) {
    absl::StrAppend(&out, "# HELP ", family.name, " ");
    AppendEscaped(family.help, /*quotes=*/false, &out);
    absl::StrAppend(&out, "\n# TYPE ", family.name, " ", TypeName(family.type), "\n");
    Bounds bounds;
    for (const auto& metric : family.metric) {
      const std::string labels = LabelsOf(metric);
      switch (family.type) {
        case prometheus::MetricType::Counter:
          AppendSample(family.name, "", labels, metric.counter.value, &out);
          break;
        case prometheus::MetricType::Gauge:
          AppendSample(family.name, "", labels, metric.gauge.value, &out);
          break;
        default:
          AppendHistogram(family.name, labels, metric.histogram, bounds, &out);
      }
    }
  }
  return out;
}

void MetricsText::Serialize(std::ostream& out, const std::vector<prometheus::MetricFamily>& families) const {
  out << Serialize(families);
}

}  // namespace dejavu
