// Counter and Histogram: one thread writes them, without locks, allocation or waiting; any thread reads them. A reader
// may see one of two related numbers before the other.
#ifndef ENGINE_COUNTERS_H_
#define ENGINE_COUNTERS_H_

#include <atomic>
#include <cstdint>
#include <vector>

namespace dejavu {

// A sum, or the latest value.
template <typename T>
class Counter {
 public:
  Counter() = default;
  Counter(const Counter& other) : value_(other.value()) {}  // so that vectors can be made of them
  void Add(T amount) { value_.store(value_.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed); }
  void Set(T value) { value_.store(value, std::memory_order_relaxed); }
  T value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<T> value_{};
};

class Histogram {
 public:
  // Upper edges, ascending; values beyond the last are counted, too. They must outlive the object.
  explicit Histogram(const std::vector<double>* edges) : edges_(edges), counts_(edges->size() + 1) {}

  void Observe(double value, int64_t times = 1);

  struct Snapshot {
    std::vector<int64_t> counts;  // [edges + 1], each bucket by itself
    double sum = 0.0;
    int64_t count() const;
  };
  Snapshot snapshot() const;
  bool observed() const;  // anything yet
  const std::vector<double>& edges() const { return *edges_; }

 private:
  const std::vector<double>* const edges_;
  std::vector<Counter<int64_t>> counts_;
  Counter<double> sum_;
};

}  // namespace dejavu

#endif  // ENGINE_COUNTERS_H_
