#include "tests/bench/device_probe.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/params.h"

namespace dejavu {
namespace {

constexpr int kPasses = 8;
constexpr int kBlocksPerMultiprocessor = 4;  // all of them at once
constexpr int64_t kPieceBytes = 32 << 20;

// Of reading. Those by a ring have one block per multiprocessor.
struct Way {
  const char* name;
  int ring_groups;  // 0: plain loads
};
constexpr Way kWays[] = {{"plain loads", 0},
                         {"a ring of 96 KB per multiprocessor", 6},
                         {"a ring of 128 KB per multiprocessor", 8},
                         {"a ring of 192 KB per multiprocessor", 12}};

std::string CudaVersion(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

// A copy of one piece.
DejavuCudaCopy Piece(void* to, const void* from, int64_t bytes) {
  return {.to = to, .to_stride = bytes, .from = from, .from_stride = bytes, .row_bytes = bytes, .rows = 1};
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceProbe>> DeviceProbe::Create(const DejavuCudaModule* module, int device,
                                                                 int64_t bytes) {
  std::unique_ptr<DeviceProbe> probe(new DeviceProbe(module, bytes / 16 * 16));
  RETURN_IF_ERROR(probe->Open(device));
  probe->Fill();
  probe->FindWay();
  return probe;
}

DeviceProbe::~DeviceProbe() {
  if (context_ == nullptr) return;
  for (void* memory : {data_, sums_}) {
    if (memory != nullptr) module_.free(context_, memory);
  }
  module_.close(context_);
}

void DeviceProbe::Try(int result, const char* what) const {
  if (result != 0) throw std::runtime_error(absl::StrCat("cuda: ", what, ": ", module_.error()));
}

int64_t DeviceProbe::threads() const {
  return int64_t{kBlocksPerMultiprocessor} * device_.multiprocessors * cuda::kBlockThreads;
}

absl::Status DeviceProbe::Open(int device) {
  if (module_.open(device, &context_, &device_) != 0) {
    context_ = nullptr;
    return absl::UnavailableError(absl::StrCat("cuda: ", module_.error()));
  }
  for (const auto& [memory, bytes] : {std::pair(&data_, bytes_), std::pair(&sums_, threads() * 8)}) {
    if (module_.allocate(context_, bytes, memory) != 0) {
      *memory = nullptr;
      return absl::ResourceExhaustedError(absl::StrCat("no memory for the bandwidth probe: ", module_.error()));
    }
  }
  return absl::OkStatus();
}

// Words whose sum tells a missing one: Knuth's multiplicative sequence, as in BandwidthProbe.
void DeviceProbe::Fill() {
  std::vector<uint64_t> words(std::min(bytes_, kPieceBytes) / 8);
  uint64_t next = 0;
  for (int64_t at = 0; at < bytes_; at += kPieceBytes) {
    const int64_t bytes = std::min(kPieceBytes, bytes_ - at);
    for (int64_t i = 0; i < bytes / 8; ++i) words[i] = ++next * 0x9E3779B97F4A7C15u;
    of_pass_ = std::accumulate(words.begin(), words.begin() + bytes / 8, of_pass_);
    Try(module_.upload(context_, {Piece(static_cast<char*>(data_) + at, words.data(), bytes)}),
        "fill of the bandwidth probe");
  }
}

// A device whose blocks have too little shared memory for a ring does without it.
void DeviceProbe::FindWay() {
  for (int way = 0; way < static_cast<int>(std::size(kWays)); ++way) {
    const bool fits = kWays[way].ring_groups * cuda::kReadGroupBytes <= device_.shared_bytes_per_block;
    found_.push_back(fits ? Measure(way) : 0.0);
  }
  way_ = static_cast<int>(std::max_element(found_.begin(), found_.end()) - found_.begin());
}

void DeviceProbe::Pass(int way) {
  const int groups = kWays[way].ring_groups;
  const int64_t blocks = groups > 0 ? device_.multiprocessors : threads() / cuda::kBlockThreads;
  const cuda::ReadSumParams params = {data_, bytes_ / 16, static_cast<uint64_t*>(sums_), groups};
  const DejavuCudaLaunch launch = {.kernel = groups > 0 ? cuda::kReadSumRing : cuda::kReadSum,
                                   .grid = {static_cast<uint32_t>(blocks), 1, 1},
                                   .block = {cuda::kBlockThreads, 1, 1},
                                   .shared_bytes = static_cast<uint32_t>(groups * cuda::kReadGroupBytes),
                                   .overlaps = 0,
                                   .params = &params,
                                   .params_bytes = sizeof params};
  expected_ += of_pass_;
  Try(module_.launch(context_, &launch), "bandwidth probe");
}

double DeviceProbe::Measure(int way) {
  Pass(way);  // the clocks may rest
  Try(module_.stamp(context_, 0), "stamp");
  for (int i = 0; i < kPasses; ++i) Pass(way);
  Try(module_.stamp(context_, 1), "stamp");
  float ms = 0.0f;
  Try(module_.elapsed_ms(context_, 0, 1, &ms), "elapsed time");
  std::vector<uint64_t> sums(threads());
  Try(module_.download(context_, {Piece(sums.data(), sums_, threads() * 8)}), "download");
  const uint64_t sum = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
  if (sum != expected_) {
    throw std::runtime_error(
        absl::StrCat("the bandwidth probe summed ", sum, " instead of ", expected_, " by ", kWays[way].name));
  }
  return static_cast<double>(kPasses) * static_cast<double>(bytes_) / (ms * 1e6);
}

nlohmann::json DeviceProbe::Describe() const {
  nlohmann::json found;
  for (size_t way = 0; way < found_.size(); ++way) found[kWays[way].name] = found_[way];
  return {{"name", device_.name},
          {"compute_capability", absl::StrCat(device_.compute_major, ".", device_.compute_minor)},
          {"multiprocessors", device_.multiprocessors},
          {"memory_bytes", device_.memory_bytes},
          {"l2_bytes", device_.l2_bytes},
          {"driver_cuda", CudaVersion(device_.driver_version)},
          {"module_cuda", CudaVersion(device_.runtime_version)},
          {"reads_by", kWays[way_].name},
          {"first_read_gb_per_s", std::move(found)}};
}

std::string DeviceProbe::Description() const {
  return absl::StrFormat(
      "%s, compute capability %d.%d, %d multiprocessors, %.1f GB, L2 %.0f MB, driver for CUDA %s, read by %s",
      device_.name, device_.compute_major, device_.compute_minor, device_.multiprocessors,
      1e-9 * static_cast<double>(device_.memory_bytes), 1e-6 * device_.l2_bytes, CudaVersion(device_.driver_version),
      kWays[way_].name);
}

}  // namespace dejavu
