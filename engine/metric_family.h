// The rows of a table of metrics. A row holds the numbers and says what they are called, so that neither the page nor
// the configuration needs a list of its own. What a monitoring system adds, such as a prefix and a format, is not known
// here. A row lives as long as its table; see engine/counters.h for threads.
#ifndef ENGINE_METRIC_FAMILY_H_
#define ENGINE_METRIC_FAMILY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/counters.h"
#include "engine/sparsity.h"
#include "engine/stats.h"

namespace dejavu {

// Edges by the names of histograms, such as "inter_token_latency_seconds", where they are not the row's own.
using MetricEdges = absl::flat_hash_map<std::string, std::vector<double>>;

// A label and its values, in the order of the enumeration that they name. A series whose value is empty is counted but
// never shown.
struct MetricLabel {
  std::string name;
  std::vector<std::string> values;
};
// A family has a series for each combination of its labels' values, counted from 0; the last label changes fastest.
class MetricLabels {
 public:
  MetricLabels() = default;
  MetricLabels(MetricLabel only) : labels_{std::move(only)} {}  // NOLINT(google-explicit-constructor)
  MetricLabels(MetricLabel first, MetricLabel second) : labels_{std::move(first), std::move(second)} {}

  // Names and values, by series.
  std::vector<std::vector<std::pair<std::string, std::string>>> Combinations() const;

 private:
  std::vector<MetricLabel> labels_;
};

// For instance LabelOf<kStepPhases>("phase", "prefill", "decode", "mixed"): a value for each enumerator.
template <size_t kCount, typename... Values>
MetricLabel LabelOf(const char* name, Values... values) {
  static_assert(sizeof...(values) == kCount);
  return {name, {values...}};
}

struct EngineMetrics;

// What rows are read from: the counters themselves, and snapshots of what the engine keeps elsewhere.
struct EngineView {
  const EngineMetrics& metrics;
  EngineStats stats;
  SparsityStats sparsity;
  int64_t weight_bytes = 0, draft_weight_bytes = 0;
};

class MetricFamily;

class MetricTable {
 public:
  explicit MetricTable(MetricEdges edges) : edges_(std::move(edges)) {}
  MetricTable(const MetricTable&) = delete;
  MetricTable& operator=(const MetricTable&) = delete;

  // In the order of their declaration. Neighbouring rows may belong to one family: they have its name, and other
  // labels.
  const std::vector<const MetricFamily*>& families() const { return families_; }

 private:
  friend class MetricFamily;
  friend class HistogramFamily;

  const MetricEdges edges_;
  std::vector<const MetricFamily*> families_;
};

class MetricFamily {
 public:
  using Labels = std::vector<std::pair<std::string, std::string>>;  // names and values of one series
  // Whether a series is worth showing now.
  using Condition = bool (*)(const EngineView& view, size_t series);

  virtual ~MetricFamily() = default;
  MetricFamily(const MetricFamily&) = delete;
  MetricFamily& operator=(const MetricFamily&) = delete;

  const std::string& name() const { return name_; }  // "requests_running"
  const std::string& help() const { return help_; }
  bool counts() const;  // a counter, whose name by convention ends with _total; else a gauge or a histogram
  size_t series() const { return labels_.size(); }
  const Labels& labels(size_t series) const { return labels_[series]; }
  bool IsShown(const EngineView& view, size_t series) const;

  // A row of histograms has a histogram for each series; any other row has a value.
  virtual const Histogram* histogram(size_t /*series*/) const { return nullptr; }
  virtual double value(const EngineView& /*view*/, size_t /*series*/) const { return 0.0; }

 protected:
  MetricFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels, Condition condition);

 private:
  const std::string name_, help_;
  const std::vector<Labels> labels_;  // [series]
  const Condition condition_;         // null: always, of histograms with labels once something was observed
};

// Counters, or gauges through Set. Without labels the family has one series and can be used like a Counter.
template <typename T>
class CounterFamily final : public MetricFamily {
 public:
  CounterFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels = {},
                Condition condition = nullptr)
      : MetricFamily(table, std::move(name), std::move(help), labels, condition), counters_(series()) {}
  // More series of the family above.
  CounterFamily(MetricTable& table, const CounterFamily& above, const MetricLabels& labels)
      : CounterFamily(table, above.name(), above.help(), labels) {}

  Counter<T>& operator[](size_t series) { return counters_[series]; }
  const Counter<T>& operator[](size_t series) const { return counters_[series]; }
  void Add(T amount) { counters_.front().Add(amount); }
  void Set(T value) { counters_.front().Set(value); }
  T value() const { return counters_.front().value(); }

  double value(const EngineView& /*view*/, size_t series) const override {
    return static_cast<double>(counters_[series].value());
  }

 private:
  std::vector<Counter<T>> counters_;
};

// A series with labels is shown once something was observed: many combinations of labels never occur.
class HistogramFamily final : public MetricFamily {
 public:
  // The table's edges for this name come before `edges`.
  HistogramFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels,
                  absl::Span<const double> edges, Condition condition = nullptr);
  // More series of the family above.
  HistogramFamily(MetricTable& table, const HistogramFamily& above, const MetricLabels& labels)
      : HistogramFamily(table, above.name(), above.help(), labels, above.edges()) {}

  Histogram& operator[](size_t series) { return histograms_[series]; }
  const Histogram& operator[](size_t series) const { return histograms_[series]; }
  void Observe(double value) { histograms_.front().Observe(value); }
  const std::vector<double>& edges() const { return edges_; }

  const Histogram* histogram(size_t series) const override { return &histograms_[series]; }

 private:
  const std::vector<double> edges_;
  std::vector<Histogram> histograms_;
};

// Numbers that are kept elsewhere, asked for when the page is made.
class ReadFamily final : public MetricFamily {
 public:
  using Read = std::function<double(const EngineView& view, size_t series)>;

  ReadFamily(MetricTable& table, std::string name, std::string help, const MetricLabels& labels, Read read,
             Condition condition = nullptr)
      : MetricFamily(table, std::move(name), std::move(help), labels, condition), read_(std::move(read)) {}
  template <typename T>
  ReadFamily(MetricTable& table, std::string name, std::string help, T EngineStats::*field,
             Condition condition = nullptr)
      : ReadFamily(
            table, std::move(name), std::move(help), {},
            [field](const EngineView& view, size_t) { return static_cast<double>(view.stats.*field); }, condition) {}

  double value(const EngineView& view, size_t series) const override { return read_(view, series); }

 private:
  const Read read_;
};

}  // namespace dejavu

#endif  // ENGINE_METRIC_FAMILY_H_
