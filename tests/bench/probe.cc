#include "tests/bench/probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/processors.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/probe.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Words = hn::ScalableTag<uint64_t>;

// One cache line of each of kStreams equally long parts per turn. Every part has accumulators of its own.
template <int kStreams>
uint64_t SumStreams(const uint8_t* data, int64_t bytes, int64_t prefetch_bytes) {
  constexpr Words d;
  constexpr int64_t kLine = 64;
  constexpr int64_t kVector = static_cast<int64_t>(hn::MaxLanes(Words())) * 8;
  constexpr int kVectors = static_cast<int>(kLine / kVector);
  using V = hn::Vec<Words>;
  const int64_t part = bytes / kStreams;
  V sum[kStreams][kVectors];
  for (auto& stream : sum) {
    for (V& v : stream) v = hn::Zero(d);
  }
  for (int64_t i = 0; i < part; i += kLine) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* line = data + s * part + i;
      if (prefetch_bytes != 0) hwy::Prefetch(line + prefetch_bytes);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[s][v] = hn::Add(sum[s][v], hn::LoadU(d, reinterpret_cast<const uint64_t*>(line + v * kVector)));
      }
    }
  }
  V total = hn::Zero(d);
  for (const auto& stream : sum) {
    for (const V& v : stream) total = hn::Add(total, v);
  }
  return hn::GetLane(hn::SumOfLanes(d, total));
}

uint64_t Sum(const uint8_t* data, int64_t bytes, int streams, int64_t prefetch_bytes) {
  switch (streams) {
    case 1:
      return SumStreams<1>(data, bytes, prefetch_bytes);
    case 2:
      return SumStreams<2>(data, bytes, prefetch_bytes);
    default:
      return SumStreams<4>(data, bytes, prefetch_bytes);
  }
}

// x = x * 1 + 1, `turns` times in each of kChains chains: with both operands unknown to the compiler the result counts
// the multiply-adds that ran. Returns the floating-point operations, or -1 where the count is wrong.
double CountMultiplyAdds(int64_t turns, float one) {
  constexpr hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int kChains = 12;  // latency of an FMA times FMAs per cycle: 8 to 10
  const V factor = hn::Set(d, one), increment = hn::Set(d, one);
  V x[kChains];
  for (V& v : x) v = hn::Zero(d);
  for (int64_t i = 0; i < turns; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = hn::MulAdd(x[c], factor, increment);
  }
  for (const V& v : x) {
    if (!hn::AllTrue(d, hn::Eq(v, hn::Set(d, static_cast<float>(turns))))) return -1.0;
  }
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(turns);
}

}  // namespace dejavu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu {

HWY_EXPORT(Sum);
HWY_EXPORT(CountMultiplyAdds);

namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kChunk = kHugePage;

int CpusOr(int threads) { return threads > 0 ? threads : static_cast<int>(ProcessCpus().size()); }

}  // namespace

absl::StatusOr<std::unique_ptr<BandwidthProbe>> BandwidthProbe::Create(int threads, int64_t bytes) {
  std::unique_ptr<BandwidthProbe> probe(new BandwidthProbe(threads, bytes));
  // One chunk more than is read, so that it can start on a huge page.
  void* map = mmap(nullptr, probe->bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for the ", bytes, " bytes of the bandwidth probe"));
  }
  madvise(map, probe->bytes_ + kHugePage, MADV_HUGEPAGE);
  probe->data_ = static_cast<uint8_t*>(map);
  probe->Fill();
  double best = 0.0;
  for (const int streams : {1, 2, 4}) {
    for (const int64_t prefetch_bytes : {0, 512, 1024, 2048}) {
      const Way way{streams, prefetch_bytes};
      const double rate = probe->MeasureWay(way, 0.03);
      if (rate > best) probe->way_ = way;
      best = std::max(best, rate);
    }
  }
  return probe;
}

BandwidthProbe::BandwidthProbe(int threads, int64_t bytes)
    : pool_(CpusOr(threads), /*pin=*/true),
      chunks_per_slice_(std::max<int64_t>(1, bytes / kChunk / pool_.threads())),
      bytes_(chunks_per_slice_ * kChunk * pool_.threads()),
      slices_(pool_.threads()) {}

BandwidthProbe::~BandwidthProbe() {
  if (data_ != nullptr) munmap(data_, bytes_ + kHugePage);
}

// Words that no constant folds and whose sum tells a missing chunk: Knuth's multiplicative sequence.
void BandwidthProbe::Fill() {
  const int64_t slice_words = chunks_per_slice_ * kChunk / 8;
  auto* words = const_cast<uint64_t*>(reinterpret_cast<const uint64_t*>(data()));
  pool_.Run([&](int thread) {
    uint64_t sum = 0;
    for (int64_t i = thread * slice_words; i < (thread + 1) * slice_words; ++i) {
      words[i] = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u;
      sum += words[i];
    }
    slices_[thread].sum = sum;
  });
  for (const Slice& slice : slices_) expected_ += slice.sum;
}

double BandwidthProbe::Measure(double seconds) { return MeasureWay(way_, seconds); }

double BandwidthProbe::MeasureWay(const Way& way, double seconds) {
  Pass(way);  // wakes the threads
  const SteadyTime start = std::chrono::steady_clock::now();
  int64_t passes = 0;
  do {
    Pass(way);
    ++passes;
  } while (SecondsSince(start) < seconds);
  return static_cast<double>(passes * bytes_) / SecondsSince(start) * 1e-9;
}

void BandwidthProbe::Pass(const Way& way) {
  for (Slice& slice : slices_) slice.next.store(0, std::memory_order_relaxed);
  const auto sum_function = HWY_DYNAMIC_DISPATCH(Sum);
  pool_.Run([&](int thread) {
    uint64_t sum = 0;
    for (int i = 0; i < threads(); ++i) {
      const int s = (thread + i) % threads();
      for (int64_t c; (c = slices_[s].next.fetch_add(1, std::memory_order_relaxed)) < chunks_per_slice_;) {
        sum += sum_function(data() + (s * chunks_per_slice_ + c) * kChunk, kChunk, way.streams, way.prefetch_bytes);
      }
    }
    slices_[thread].sum = sum;
  });
  uint64_t sum = 0;
  for (const Slice& slice : slices_) sum += slice.sum;
  CHECK(sum == expected_) << "the bandwidth probe summed " << sum << " instead of " << expected_;
}

double BandwidthProbe::MeasureWaiting(int64_t bytes, double seconds) {
  const int64_t chunks = std::clamp<int64_t>(bytes / kChunk, 1, chunks_per_slice_);
  const auto sum_function = HWY_DYNAMIC_DISPATCH(Sum);
  Pass(way_);  // wakes the threads
  double busy_s = 0.0, all_s = 0.0;
  for (int64_t first = 0; all_s < seconds; first = (first + chunks) % (chunks_per_slice_ - chunks + 1)) {
    const SteadyTime start = std::chrono::steady_clock::now();
    pool_.Run([&](int thread) {
      const uint8_t* const own = data() + (thread * chunks_per_slice_ + first) * kChunk;
      slices_[thread].sum = sum_function(own, chunks * kChunk, way_.streams, way_.prefetch_bytes);
      slices_[thread].busy_s = SecondsSince(start);
    });
    all_s += SecondsSince(start);
    for (const Slice& slice : slices_) busy_s += slice.busy_s / threads();
  }
  return 1.0 - busy_s / all_s;
}

const uint8_t* BandwidthProbe::data() const {
  return reinterpret_cast<const uint8_t*>((reinterpret_cast<uintptr_t>(data_) + kHugePage - 1) & -kHugePage);
}

std::string BandwidthProbe::Description() const {
  return absl::StrCat(way_.streams, way_.streams == 1 ? " stream" : " streams",
                      way_.prefetch_bytes == 0 ? ", no software prefetch"
                                               : absl::StrCat(", prefetch ", way_.prefetch_bytes, " bytes ahead"));
}

ArithmeticProbe::ArithmeticProbe(int threads) : pool_(CpusOr(threads), /*pin=*/true) {}

double ArithmeticProbe::Measure() {
  constexpr int64_t kTurns = 8000000;  // below 2^24: float32 counts that far
  volatile float unknown = 1.0f;
  const float one = unknown;
  const auto count = HWY_DYNAMIC_DISPATCH(CountMultiplyAdds);
  std::vector<double> operations(pool_.threads());
  const SteadyTime start = std::chrono::steady_clock::now();
  pool_.Run([&](int thread) { operations[thread] = count(kTurns, one); });
  const double seconds = SecondsSince(start);
  double total = 0.0;
  for (const double n : operations) {
    CHECK(n > 0.0) << "the arithmetic probe counted wrong";
    total += n;
  }
  return total / seconds * 1e-9;
}

}  // namespace dejavu
#endif  // HWY_ONCE
