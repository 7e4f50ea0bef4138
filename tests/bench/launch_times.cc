// A kind alone is all of its launches in a step one after the other, of every layer, so that weights come from memory
// and not from the cache. In the chain it takes what the step takes less without it.
#include "tests/bench/launch_times.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/bench/launch_kinds.h"

namespace dejavu {
namespace {

constexpr double kMsOfOneMeasurement = 20.0;
constexpr double kMostPasses = 200;
constexpr int kFrom = 62, kTo = 63;  // time stamps

void Try(const DejavuCudaModule& module, int result, const char* what) {
  if (result != 0) throw std::runtime_error(absl::StrCat("cuda: ", what, ": ", module.error()));
}

}  // namespace

Playback::Playback(const LaunchTrace& trace, const std::vector<TracedLaunch>& step, std::vector<size_t> places)
    : module_(trace.traced()), context_(trace.context()), step_(step), places_(std::move(places)) {
  Try(module_, module_.begin_capture(context_), "begin of a graph");
  SubmitAll();
  Try(module_, module_.end_capture(context_, &graph_), "end of a graph");
}

Playback::~Playback() {
  if (graph_ != nullptr) module_.free_graph(context_, graph_);
}

void Playback::SubmitAll() {
  for (const size_t place : places_) Try(module_, Submit(module_, context_, step_[place]), "launch");
}

void Playback::Pass() {
  if (graph_ == nullptr) return SubmitAll();
  Try(module_, module_.replay(context_, graph_), "graph");
}

double Playback::Us() {
  if (passes_ == 0) {
    Pass();  // the first one also takes the graph to the device
    passes_ = static_cast<int>(std::clamp(std::ceil(kMsOfOneMeasurement / Ms(1)), 1.0, kMostPasses));
  }
  return 1e3 * Ms(passes_) / passes_;
}

double Playback::Ms(int passes) {
  Try(module_, module_.stamp(context_, kFrom), "stamp");
  for (int i = 0; i < passes; ++i) Pass();
  Try(module_, module_.stamp(context_, kTo), "stamp");
  float ms = 0.0f;
  Try(module_, module_.elapsed_ms(context_, kFrom, kTo, &ms), "elapsed time");
  return ms;
}

int32_t DeviceState::Read(const int32_t* from) const {
  int32_t value = 0;
  const DejavuCudaCopy copy = {.to = &value,
                               .to_stride = sizeof value,
                               .from = from,
                               .from_stride = sizeof value,
                               .row_bytes = sizeof value,
                               .rows = 1};
  Try(trace_.traced(), trace_.traced().download(trace_.context(), {copy}), "download");
  return value;
}

int32_t DeviceState::Selected(const void*, const int32_t* count) { return Read(count); }

int32_t DeviceState::Active(const void*, const int32_t* count) {
  active_[count] = Read(count);
  const auto before = counted_before_.find(count);
  return active_[count] - (before == counted_before_.end() ? 0 : before->second);
}

int32_t DeviceState::Position(const int32_t* position) { return Read(position); }

int32_t DeviceState::LargestRank(const cuda::SelectParams& select) {
  int32_t largest = 0;
  for (int32_t row = 0; row < select.rows; ++row) {
    const int32_t point = Read(select.points + row);
    if (point >= 0) largest = std::max(largest, Read(select.ranks + point));
  }
  return largest;
}

LaunchTimes::LaunchTimes(const LaunchTrace& trace, std::vector<TracedLaunch> step)
    : trace_(trace), step_(std::move(step)) {
  for (TracedLaunch& traced : step_) {
    if (traced.launch.kernel != cuda::kDraw) continue;
    cuda::DrawParams p;
    std::memcpy(&p, traced.params.data(), sizeof p);
    if (drawn_ == nullptr) {
      const int64_t bytes = traced.launch.grid[0] * int64_t{sizeof(int32_t)};
      Try(trace_.traced(), trace_.traced().allocate(trace_.context(), bytes, &drawn_), "memory for tokens");
    }
    p.tokens = static_cast<int32_t*>(drawn_);
    std::memcpy(traced.params.data(), &p, sizeof p);
  }
  Playback(trace_, step_, All()).Pass();
}

LaunchTimes::~LaunchTimes() {
  if (drawn_ != nullptr) trace_.traced().free(trace_.context(), drawn_);
}

std::vector<size_t> LaunchTimes::All() const {
  std::vector<size_t> all(step_.size());
  std::iota(all.begin(), all.end(), size_t{0});
  return all;
}

double LaunchTimes::AloneBytes(const std::vector<size_t>& places) {
  DeviceState state(trace_);
  ReadsOf(step_, places, state);
  state.CountFromHere();
  Playback(trace_, step_, places).Pass();
  return static_cast<double>(ReadsOf(step_, places, state).bytes()) / static_cast<double>(places.size());
}

LaunchTimes::Found LaunchTimes::Measure(const std::vector<size_t>& places, int repeats) {
  const std::vector<size_t> all = All();
  std::vector<size_t> others;
  std::set_difference(all.begin(), all.end(), places.begin(), places.end(), std::back_inserter(others));
  Playback step(trace_, step_, all), alone(trace_, step_, places), rest(trace_, step_, others);
  const auto launches = static_cast<double>(places.size());
  Found found;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    found.step_us.push_back(step.Us());
    found.chain_us.push_back((found.step_us.back() - rest.Us()) / launches);
    found.alone_us.push_back(alone.Us() / launches);
  }
  step.Pass();  // everything is as the step leaves it
  found.alone_bytes = AloneBytes(places);
  return found;
}

}  // namespace dejavu
