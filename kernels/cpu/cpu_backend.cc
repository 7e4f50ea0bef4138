// The CPU backend: memory, shape checks, and how each op is cut into parts for the threads. Work goes out in chunks
// that whichever thread is free takes; what a chunk computes does not depend on where it was cut
// (kernels/cpu/kernels.h). Work too small to be worth waking threads for stays on the calling thread.
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/base/round.h"
#include "kernels/check_shapes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace dejavu {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kSmallWork =
    16 << 10;  // multiply-adds or elements, a few microseconds: about what waking threads costs
constexpr int64_t kChunksPerThread = 32;
constexpr int64_t kLeastOutputs = 24;    // of a part, or there is too little in it to fetch ahead
constexpr int64_t kSelectColumns = 512;  // at least, or the rows are read in pieces too short

// What a file of one number, or of lines such as "MemAvailable: 1 kB", says; `otherwise` where it says nothing.
int64_t NumberIn(const char* path, const std::string& key, int64_t otherwise) {
  std::ifstream file(path);
  std::string word;
  int64_t number;
  while (!key.empty() && file >> word && word != key) {
  }
  return file >> number ? number : otherwise;
}

int64_t PhysicalBytes() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

// Spreads pages over the NUMA nodes: any thread may read any part. A hint as well, and nothing on machines of one node.
void Interleave(void* data, int64_t bytes) {
  constexpr unsigned long kNodes = 8 * sizeof(unsigned long);
  unsigned long nodes = 0;
  for (unsigned long node = 0; node < kNodes; ++node) {
    if (access(absl::StrCat("/sys/devices/system/node/node", node).c_str(), F_OK) == 0) nodes |= 1ul << node;
  }
  if (std::popcount(nodes) > 1) syscall(SYS_mbind, data, bytes, MPOL_INTERLEAVE, &nodes, kNodes, 0);
}

// Zeroed memory that starts on a huge page, or nullptr.
void* MapHuge(int64_t bytes) {
  void* map = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(map);
  const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(begin));
  const int64_t before = RoundUp(address, kHugePage) - address;
  char* aligned = begin + before;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(aligned + bytes, kHugePage - before);
  madvise(aligned, bytes, MADV_HUGEPAGE);  // only a hint: kernels without huge pages refuse it
  Interleave(aligned, bytes);
  return aligned;
}

int64_t CountOf(const Selection& selection, int64_t all) {
  if (selection.all()) return all;
  CHECK(selection.indices.dtype == DType::kInt32 && selection.count.dtype == DType::kInt32);
  const int64_t count = *selection.count.row<int32_t>(0);
  CHECK(count >= 0 && count <= selection.indices.cols && count <= all)
      << count << " selected of " << all << ", list of " << selection.indices.cols;
  if (count > 0) {
    const int32_t* indices = selection.indices.row<int32_t>(0);
    CHECK(indices[0] >= 0 && indices[count - 1] < all) << "selection to " << indices[count - 1] << " of " << all;
  }
  return count;
}

const int32_t* ListOf(const Selection& selection) {
  return selection.all() ? nullptr : selection.indices.row<int32_t>(0);
}

bool Selected(const Tensor& masks, int64_t row, int64_t i) {
  return (static_cast<uint32_t>(masks.row<int32_t>(row)[i / 32]) >> (i % 32) & 1) != 0;
}

// Whether row `row` computes only what it selected itself.
bool IsStrict(const Selection& selection, int64_t row) {
  return !selection.masks.empty() && (selection.strict.empty() || selection.strict.row<int32_t>(0)[row] != 0);
}

// Those of the neurons first ... last of the list that are not zero in every row; returns how many.
int64_t ActiveNeurons(const Tensor& hidden, const int32_t* neurons, int64_t first, int64_t last, int32_t* active) {
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    const int32_t neuron = neurons != nullptr ? neurons[i] : static_cast<int32_t>(i);
    bool any = false;
    for (int64_t r = 0; r < hidden.rows && !any; ++r) any = hidden.row<float>(r)[neuron] != 0.0f;
    active[count] = neuron;
    count += any;
  }
  return count;
}

// Zeros the activations that strict rows did not select.
void ApplyMasks(const Tensor& hidden, const Selection& neurons, int64_t first, int64_t last) {
  const int32_t* list = neurons.indices.row<int32_t>(0);
  for (int64_t r = 0; r < hidden.rows; ++r) {
    if (!IsStrict(neurons, r)) continue;
    float* h = hidden.row<float>(r);
    for (int64_t i = first; i < last; ++i) {
      if (!Selected(neurons.masks, r, list[i])) h[list[i]] = 0.0f;
    }
  }
}

int64_t NonZero(const float* h, const int32_t* neurons, int64_t first, int64_t last) {
  int64_t count = 0;
  if (neurons == nullptr) {
    for (int64_t i = first; i < last; ++i) count += h[i] != 0.0f;
  } else {
    for (int64_t i = first; i < last; ++i) count += h[neurons[i]] != 0.0f;
  }
  return count;
}

uint64_t SumWords(const char* bytes, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, sizeof word);
    sum += word;
  }
  return sum;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, const CpuBackendOptions& options)
      : pool_(threads, options.pin, options.first_cpu),
        sharers_(options.sharers),
        scratch_(static_cast<float*>(std::aligned_alloc(64, threads * cpu::kScratchBytes)), std::free) {
    CHECK(scratch_ != nullptr);
  }

  std::string Description() const override {
    return absl::StrCat("cpu, ", cpu::TargetName(), ", ", pool_.threads(),
                        pool_.threads() == 1 ? " thread" : " threads");
  }

  // Of the machine, or of the control group of a container.
  int64_t FreeBytes() const override {
    const int64_t machine = NumberIn("/proc/meminfo", "MemAvailable:", PhysicalBytes() >> 10) << 10;
    const int64_t limit = NumberIn("/sys/fs/cgroup/memory.max", "", machine);  // "max": none
    const int64_t used = NumberIn("/sys/fs/cgroup/memory.current", "", 0) -
                         NumberIn("/sys/fs/cgroup/memory.stat", "inactive_file", 0);  // the kernel gives these up
    return std::clamp<int64_t>(limit - used, 0, machine) / sharers_;
  }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override;

  void Upload(Tensor target, const void* source) override {
    const int64_t row_bytes = target.cols * SizeOf(target.dtype);
    for (int64_t r = 0; r < target.rows; ++r) {
      std::memcpy(RowOf(target, r), static_cast<const char*>(source) + r * row_bytes, row_bytes);
    }
  }

  void Download(void* target, Tensor source) override {
    const int64_t row_bytes = source.cols * SizeOf(source.dtype);
    for (int64_t r = 0; r < source.rows; ++r) {
      std::memcpy(static_cast<char*>(target) + r * row_bytes, RowOf(source, r), row_bytes);
    }
  }

  void Synchronize() override {}
  BackendStats stats() const override { return {pool_.runs(), pool_.wait_ns()}; }

  void Stamp(int event) override { stamps_[event] = std::chrono::steady_clock::now(); }
  double ElapsedMs(int from, int to) override {
    return std::chrono::duration<double, std::milli>(stamps_[to] - stamps_[from]).count();
  }

  void Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate) override;
  void LayerNorm(Tensor y, Tensor x, const NormWeights& norm) override;
  void Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
              const Ride& ride) override;
  void WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) override;
  void Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                 const Selection& heads) override;
  void Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) override;
  void Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
           Tensor active) override;
  void Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
             Tensor hidden) override;
  void Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates) override;
  void ReadAll(Tensor memory) override;
  void Add(Tensor x, Tensor y) override;
  void GatherRows(Tensor y, Tensor x, Tensor ids) override;

 private:
  static char* RowOf(const Tensor& t, int64_t r) { return static_cast<char*>(t.data) + r * t.stride * SizeOf(t.dtype); }

  // Outputs to a chunk: several chunks for each thread, but none so small that handing it out costs more than it.
  int64_t OutputGrain(int64_t outputs, int64_t work_per_output) const {
    const int64_t worth_it = DivideUp(kSmallWork, std::max<int64_t>(1, work_per_output));
    return RoundUp(std::max(worth_it, outputs / (pool_.threads() * kChunksPerThread)), kLeastOutputs);
  }

  // function(first, last) over ranges of rows of `cols` elements.
  template <typename Function>
  void ForRows(int64_t rows, int64_t cols, const Function& function) {
    pool_.ParallelFor(rows, DivideUp(kSmallWork, std::max<int64_t>(1, cols)),
                      [&](int64_t first, int64_t last, int) { function(first, last); });
  }

  const int32_t* Members(const Selection& selected, int64_t rows, int64_t group, int64_t* count);
  float* Scratch(int thread) const { return scratch_.get() + thread * (cpu::kScratchBytes / sizeof(float)); }
  cpu::Quantized Quantize(Tensor x, const float* factor, const int32_t* list, int64_t count);
  cpu::DotJob Prepare(Tensor y, Tensor x, const LinearWeights& w, const int32_t* outputs, bool relu);
  template <typename Function>
  void Dots(const cpu::DotJob& job, int64_t count, int64_t grain, const Function& function);
  void SumRows(Tensor y, Tensor x, const LinearWeights& w, const int32_t* list, int64_t count);
  void SelectRows(Tensor masks, Tensor a, const SelectorWeights& w, const int32_t* points, int64_t most_rank);
  void GroupRows(const RowTable& rows);

  ThreadPool pool_;
  const int sharers_;
  std::array<std::chrono::steady_clock::time_point, 64> stamps_;
  const std::unique_ptr<float, decltype(&std::free)> scratch_;  // [threads, kScratchBytes]

  // Scratch that grows to the largest size seen and then stays.
  std::vector<int16_t> quantized_;  // activations for int8 weights, and their factors
  std::vector<float> quantized_scale_;
  std::vector<float> side_;           // activations side by side
  std::vector<int64_t> bounds_;       // where each segment of a sum begins
  std::vector<float> sums_;           // and the segments' sums
  std::vector<float> select_sums_;    // [rows, outputs] of a selector
  std::vector<int32_t> members_;      // weight rows of the selected groups
  std::vector<int32_t> neurons_;      // neurons with an activation other than zero
  std::vector<int64_t> chunk_count_;  // how many of them each chunk of neurons found
  std::vector<int64_t> chunk_rows_;   // [chunks, rows] and how many in each counted row
  std::vector<int64_t> row_groups_;   // first row of each group that attends together, then the number of rows
};

absl::StatusOr<Buffer> CpuBackend::Allocate(int64_t bytes) {
  CHECK(bytes >= 0) << bytes;
  const int64_t physical = PhysicalBytes();
  if (bytes > physical) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cpu: cannot allocate ", bytes, " bytes; this machine has ", physical));
  }
  void* data;
  Buffer::Free free;
  if (bytes >= kHugePage) {
    const int64_t mapped = RoundUp(bytes, kHugePage);
    data = MapHuge(mapped);
    free = [mapped](void* p) { munmap(p, mapped); };
  } else {
    const int64_t rounded = RoundUp(std::max<int64_t>(bytes, 1), 64);
    data = std::aligned_alloc(64, rounded);
    if (data != nullptr) std::memset(data, 0, rounded);
    free = [](void* p) { std::free(p); };
  }
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("cpu: cannot allocate ", bytes, " bytes: ", std::strerror(errno)));
  }
  return Buffer(data, bytes, std::move(free));
}

void CpuBackend::Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate) {
  CheckEmbed(y, ids, table);
  ForRows(y.rows, y.cols,
          [&](int64_t first, int64_t last) { cpu::Embed(y, ids, table, offset, accumulate, first, last); });
}

void CpuBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  CheckLayerNorm(y, x, norm);
  ForRows(y.rows, y.cols, [&](int64_t first, int64_t last) { cpu::LayerNorm(y, x, norm, first, last); });
}

// The rows of the weight that the selected groups name; nullptr for all of them.
const int32_t* CpuBackend::Members(const Selection& selected, int64_t rows, int64_t group, int64_t* count) {
  const int64_t groups = CountOf(selected, rows / group);
  const int32_t* list = ListOf(selected);
  *count = groups * group;
  if (list == nullptr || group == 1) return list;
  if (static_cast<int64_t>(members_.size()) < rows) members_.resize(rows);
  for (int64_t i = 0; i < *count; ++i) members_[i] = static_cast<int32_t>(list[i / group] * group + i % group);
  return members_.data();
}

void CpuBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                        const Ride& ride) {
  CheckLinear(y, x, w, group, ride);
  int64_t count;
  const int32_t* list = Members(selected, w.weight.rows, group, &count);
  if (w.layout == LinearWeights::Layout::kInputRows) {
    SumRows(y, x, w, list, count);
    return;
  }
  const cpu::DotJob job = Prepare(y, x, w, list, false);
  cpu::DotJob riding = {};
  int64_t total = count;
  if (ride.w != nullptr) {
    riding = (ride.w->weight.dtype == DType::kInt8) == (w.weight.dtype == DType::kInt8)
                 ? cpu::DotJob{ride.y, x, ride.w, nullptr, false, job.quantized, job.side}
                 : Prepare(ride.y, x, *ride.w, nullptr, false);
    total += ride.w->outputs();
  }
  pool_.ParallelFor(total, OutputGrain(total, w.inputs() * x.rows), [&](int64_t first, int64_t last, int thread) {
    if (first < count) cpu::DotProducts(job, first, std::min(last, count), Scratch(thread));
    if (last > count) cpu::DotProducts(riding, std::max(first, count) - count, last - count, Scratch(thread));
  });
}

// The job, with x as its kernel wants it.
cpu::DotJob CpuBackend::Prepare(Tensor y, Tensor x, const LinearWeights& w, const int32_t* outputs, bool relu) {
  cpu::DotJob job = {y, x, &w, outputs, relu, {}, nullptr};
  if (w.weight.dtype == DType::kInt8) {
    job.quantized = Quantize(x, nullptr, nullptr, x.cols);
    return job;
  }
  const int64_t floats = cpu::SideBySideFloats(x.rows, x.cols);
  if (floats == 0) return job;
  constexpr size_t kLine = 64;
  side_.resize(std::max<size_t>(side_.size(), floats + kLine / sizeof(float)));
  void* start = side_.data();
  size_t space = side_.size() * sizeof(float);
  auto* const side = static_cast<float*>(std::align(kLine, floats * sizeof(float), start, space));
  pool_.ParallelFor(DivideUp(x.cols, cpu::kSideInputs), DivideUp(kSmallWork, x.rows * cpu::kSideInputs),
                    [&](int64_t first, int64_t last, int) { cpu::SideBySide(x, first, last, side); });
  job.side = side;
  return job;
}

// x as int8 weights want it.
cpu::Quantized CpuBackend::Quantize(Tensor x, const float* factor, const int32_t* list, int64_t count) {
  const int64_t stride = RoundUp(count, cpu::kQuantizedPadding) + cpu::kQuantizedPadding;
  quantized_.resize(std::max<size_t>(quantized_.size(), x.rows * stride));
  quantized_scale_.resize(std::max<size_t>(quantized_scale_.size(), x.rows));
  ForRows(x.rows, count, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      cpu::Quantize(x.row<float>(r), factor, list, count, &quantized_[r * stride], &quantized_scale_[r]);
    }
  });
  return {quantized_.data(), stride, quantized_scale_.data()};
}

// Few rows: threads share the inputs, so that each reads whole rows of weights. Many: they share the columns.
void CpuBackend::SumRows(Tensor y, Tensor x, const LinearWeights& w, const int32_t* list, int64_t count) {
  const int64_t inputs = w.inputs(), columns = w.outputs(), segment = cpu::SegmentInputs(inputs);
  const int64_t segments = std::max<int64_t>(1, DivideUp(inputs, segment));
  bounds_.resize(std::max<size_t>(bounds_.size(), segments + 1));
  for (int64_t s = 0; s < segments; ++s) {
    bounds_[s] =
        list != nullptr ? std::lower_bound(list, list + count, s * segment) - list : std::min(s * segment, count);
  }
  bounds_[segments] = count;
  cpu::SumJob job = {y, x, &w, list, count, segments, bounds_.data(), nullptr, 0, {}};
  if (w.weight.dtype == DType::kInt8) job.quantized = Quantize(x, w.scale.row<float>(0), list, count);
  const bool small = columns * count * x.rows < kSmallWork;
  if (small || x.rows > cpu::kSegmentRows) {
    const int64_t grain = small ? columns : RoundUp(DivideUp(columns, pool_.threads()), cpu::kColumnGrain);
    pool_.ParallelFor(columns, grain, [&](int64_t first, int64_t last, int thread) {
      cpu::SumColumns(job, first, last, Scratch(thread));
    });
    return;
  }
  // Rows of `sums` lie a line more than a power of two apart, or they would share the sets of the caches.
  job.sums_stride = RoundUp(columns, cpu::kColumnGrain) + 16;
  sums_.resize(std::max<size_t>(sums_.size(), segments * x.rows * job.sums_stride));
  job.sums = sums_.data();
  const int64_t slabs = std::clamp<int64_t>(DivideUp(2 * pool_.threads(), segments), 1, DivideUp(columns, 512));
  const int64_t slab = RoundUp(DivideUp(columns, slabs), cpu::kColumnGrain);
  pool_.ParallelFor(segments * slabs, 1, [&](int64_t first, int64_t last, int thread) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = i / slabs, c = i % slabs * slab;
      if (bounds_[s] < bounds_[s + 1] && c < columns) {
        cpu::SumSegment(job, s, c, std::min(c + slab, columns), Scratch(thread));
      }
    }
  });
  pool_.ParallelFor(
      columns, RoundUp(DivideUp(columns, pool_.threads()), cpu::kColumnGrain),
      [&](int64_t first, int64_t last, int thread) { cpu::JoinSegments(job, first, last, Scratch(thread)); });
}

// Outputs of w for x, in parts that whichever thread is free takes; and right after each part function(first, last).
template <typename Function>
void CpuBackend::Dots(const cpu::DotJob& job, int64_t count, int64_t grain, const Function& function) {
  pool_.ParallelFor(count, grain, [&](int64_t first, int64_t last, int thread) {
    cpu::DotProducts(job, first, last, Scratch(thread));
    function(first, last);
  });
}

void CpuBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  CheckWriteKv(kv, qkv, rows);
  const int64_t width = int64_t{kv.heads} * kv.head_dim;
  ForRows(qkv.rows, 2 * width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int32_t position = rows.positions.row<int32_t>(0)[r];
      const int32_t sequence = rows.sequences.row<int32_t>(0)[r];
      CHECK(position >= 0 && position / kv.block_tokens < rows.block_table.cols) << "position " << position;
      const int32_t block = rows.block_table.row<int32_t>(sequence)[position / kv.block_tokens];
      CHECK(block >= 0 && block < kv.blocks) << "block " << block << " of " << kv.blocks;
      const float* k = qkv.row<float>(r) + width;
      cpu::StoreKv(kv, block, position % kv.block_tokens, k, k + width);
    }
  });
}

// Neighbouring rows of one sequence, at most kAttentionRows, are a group.
void CpuBackend::GroupRows(const RowTable& rows) {
  const int32_t* sequences = rows.sequences.row<int32_t>(0);
  row_groups_.clear();
  for (int64_t r = 0; r < rows.rows(); ++r) {
    if (r == 0 || sequences[r] != sequences[r - 1] || r - row_groups_.back() == cpu::kAttentionRows) {
      row_groups_.push_back(r);
    }
  }
  row_groups_.push_back(rows.rows());
}

// The context of rows that did not select the head is zero, because the out-projection reads it for the others.
void AttendSelected(const cpu::AttentionJob& job, int64_t first, int64_t last, int64_t head, int64_t next_head,
                    const Selection& heads) {
  const auto takes_part = [&](int64_t r) { return !IsStrict(heads, r) || Selected(heads.masks, r, head); };
  bool any = heads.masks.empty();
  for (int64_t r = first; r < last && !any; ++r) any = takes_part(r);
  if (any) cpu::Attend(job, first, last, head, next_head);
  if (heads.masks.empty()) return;
  for (int64_t r = first; r < last; ++r) {
    if (!takes_part(r)) std::fill_n(job.context.row<float>(r) + head * job.kv.head_dim, job.kv.head_dim, 0.0f);
  }
}

void CpuBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                           const Selection& heads) {
  CheckAttention(context, qkv, kv, rows, heads);
  const int64_t head_count = CountOf(heads, kv.heads);
  const int32_t* list = ListOf(heads);
  GroupRows(rows);
  const cpu::AttentionJob job = {context, qkv, kv, rows, scale};
  const int64_t groups = static_cast<int64_t>(row_groups_.size()) - 1;
  const int64_t items = groups * head_count;
  int64_t work = 0;
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const int64_t position = rows.positions.row<int32_t>(0)[r];
    CHECK(position >= 0 && position / kv.block_tokens < rows.block_table.cols) << "position " << position;
    work += 2 * (position + 1) * head_count * kv.head_dim;
  }
  const int64_t grain = std::max<int64_t>(1, items / (pool_.threads() * 8));
  // Later rows see more positions, so they go first.
  pool_.ParallelFor(items, work < kSmallWork ? items : grain, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t group = groups - 1 - i / head_count, place = i % head_count;
      const auto head = [&](int64_t at) { return list != nullptr ? list[at] : at; };
      const bool same = i + 1 < last && place + 1 < head_count;
      AttendSelected(job, row_groups_[group], row_groups_[group + 1], head(place), same ? head(place + 1) : -1, heads);
    }
  });
}

// The masks of a few rows. The second stage is a sum of rows: a coordinate is an input, an output a column.
void CpuBackend::SelectRows(Tensor masks, Tensor a, const SelectorWeights& w, const int32_t* points,
                            int64_t most_rank) {
  const int64_t rows = a.rows, padded = w.b.cols,
                stride = RoundUp(most_rank, cpu::kQuantizedPadding) + cpu::kQuantizedPadding;
  quantized_.resize(std::max<size_t>(quantized_.size(), rows * stride));
  quantized_scale_.resize(std::max<size_t>(quantized_scale_.size(), rows));
  for (int64_t r = 0; r < rows; ++r) {
    // Beyond the rank of its operating point a row has zeros.
    const int64_t rank = points[r] == kSelectEverything ? 0 : w.ranks.row<int32_t>(0)[points[r]];
    std::fill_n(&quantized_[r * stride], stride, int16_t{0});
    cpu::Quantize(a.row<float>(r), nullptr, nullptr, rank, &quantized_[r * stride], &quantized_scale_[r]);
  }
  const int64_t segments = std::max<int64_t>(1, DivideUp(most_rank, cpu::kQuantizedBlock));
  bounds_.resize(std::max<size_t>(bounds_.size(), segments + 1));
  for (int64_t s = 0; s <= segments; ++s) bounds_[s] = std::min(s * cpu::kQuantizedBlock, most_rank);
  const int64_t sums_stride = padded + 16;
  sums_.resize(std::max<size_t>(sums_.size(), segments * rows * sums_stride));
  select_sums_.resize(std::max<size_t>(select_sums_.size(), rows * padded));

  LinearWeights stage;
  stage.layout = LinearWeights::Layout::kInputRows;
  stage.weight = w.b;
  const Tensor y = {select_sums_.data(), DType::kFloat32, rows, padded, padded};
  const cpu::SumJob sums = {
      y,        a.Cols(0, most_rank), &stage,       nullptr,     most_rank,
      segments, bounds_.data(),       sums_.data(), sums_stride, {quantized_.data(), stride, quantized_scale_.data()}};
  const cpu::SelectJob job = {sums, w, points, masks};
  const bool small = rows * most_rank * padded < kSmallWork;
  const int64_t grain =
      small ? padded
            : std::max<int64_t>(kSelectColumns, RoundUp(DivideUp(padded, 4 * pool_.threads()), kSelectorPadding));
  pool_.ParallelFor(padded, grain, [&](int64_t first, int64_t last, int thread) {
    cpu::SelectColumns(job, first, last, Scratch(thread));
  });
}

void CpuBackend::Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) {
  CheckSelect(selection, counts, a, w, points);
  const int64_t rows = a.rows, words = w.b.cols / 32;
  int64_t most_rank = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t point = points.row<int32_t>(0)[r];
    CHECK(point >= kSelectEverything && point < w.ranks.cols) << "operating point " << point << " of " << w.ranks.cols;
    if (point == kSelectEverything) continue;
    const int64_t rank = w.ranks.row<int32_t>(0)[point];
    CHECK(rank >= 0 && rank <= a.cols) << "rank " << rank << ", coordinates " << a.cols;
    most_rank = std::max(most_rank, rank);
  }
  for (int64_t r = 0; r < rows; r += cpu::kSegmentRows) {
    SelectRows(selection.masks.Rows(r, std::min(cpu::kSegmentRows, rows - r)),
               a.Rows(r, std::min(cpu::kSegmentRows, rows - r)), w, points.row<int32_t>(0) + r, most_rank);
  }

  std::fill_n(counts.row<int32_t>(0), rows, 0);
  int32_t* list = selection.indices.row<int32_t>(0);
  int32_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t any = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const auto bits = static_cast<uint32_t>(selection.masks.row<int32_t>(r)[word]);
      counts.row<int32_t>(0)[r] += std::popcount(bits);
      any |= bits;
    }
    for (; any != 0; any &= any - 1) list[count++] = static_cast<int32_t>(word * 32 + std::countr_zero(any));
  }
  *selection.count.row<int32_t>(0) = count;
}

// Activations stay at their neuron's column of `hidden`. The second product runs over the neurons that some row
// activates: the others add nothing.
void CpuBackend::Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
                     Tensor active) {
  CheckMlp(y, x, w, neurons, hidden, active);
  const int64_t counted = active.empty() ? 0 : active.cols - 1;
  const int64_t count = CountOf(neurons, w.up.outputs());
  const int32_t* list = ListOf(neurons);
  const int64_t grain = OutputGrain(count, w.up.inputs() * x.rows);
  if (static_cast<int64_t>(neurons_.size()) < count) neurons_.resize(w.up.outputs());
  const int64_t chunks = DivideUp(count, grain);
  chunk_count_.assign(chunks, 0);
  chunk_rows_.assign(chunks * counted, 0);

  const cpu::DotJob up = Prepare(hidden, x, w.up, list, true);
  Dots(up, count, grain, [&](int64_t first, int64_t last) {
    if (!neurons.masks.empty()) ApplyMasks(hidden, neurons, first, last);
    for (int64_t r = 0; r < counted; ++r) {
      chunk_rows_[first / grain * counted + r] = NonZero(hidden.row<float>(r), list, first, last);
    }
    if (skip_zeros || !active.empty()) {
      chunk_count_[first / grain] = ActiveNeurons(hidden, list, first, last, &neurons_[first]);
    }
  });
  int64_t not_zero = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    std::copy_n(&neurons_[i * grain], chunk_count_[i], &neurons_[not_zero]);
    not_zero += chunk_count_[i];
  }
  if (!active.empty()) {
    int32_t* counts = active.row<int32_t>(0);
    std::fill_n(counts, counted, 0);
    for (int64_t i = 0; i < chunks * counted; ++i) counts[i % counted] += static_cast<int32_t>(chunk_rows_[i]);
    counts[counted] = static_cast<int32_t>(not_zero);
  }
  if (skip_zeros) {
    SumRows(y, hidden, w.down, neurons_.data(), not_zero);
  } else {
    SumRows(y, hidden, w.down, list, count);
  }
}

void CpuBackend::Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                       Tensor hidden) {
  CheckAudit(result, x, up, worth, neurons, hidden);
  const cpu::DotJob job = Prepare(hidden, x, up, nullptr, true);
  Dots(job, up.outputs(), OutputGrain(up.outputs(), up.inputs() * x.rows), [](int64_t, int64_t) {});
  for (int64_t i = 0; i < x.rows; ++i) {
    const float* h = hidden.row<float>(i);
    double mass = 0.0, missed = 0.0;
    int64_t selected = 0, active = 0, hits = 0;
    for (int64_t j = 0; j < up.outputs(); ++j) {
      const bool chosen = neurons.masks.empty() || Selected(neurons.masks, i, j);
      selected += chosen;
      if (h[j] == 0.0f) continue;
      const double m = double{h[j]} * h[j] * worth.row<float>(0)[j];
      ++active;
      mass += m;
      if (chosen) {
        ++hits;
      } else {
        missed += m;
      }
    }
    float* fields = result.row<float>(i);
    fields[kAuditSelected] = static_cast<float>(selected);
    fields[kAuditActive] = static_cast<float>(active);
    fields[kAuditHits] = static_cast<float>(hits);
    fields[kAuditMass] = static_cast<float>(mass);
    fields[kAuditMissedMass] = static_cast<float>(missed);
  }
}

void CpuBackend::Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates) {
  CheckDraw(tokens, bests, logits, draws, candidates);
  ForRows(logits.rows, logits.cols, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      tokens.row<int32_t>(0)[r] = cpu::Draw(logits.row<float>(r), logits.cols, candidates, draws.row<int32_t>(r),
                                            bests.empty() ? nullptr : bests.row<float>(r));
    }
  });
}

void CpuBackend::ReadAll(Tensor memory) {
  CHECK(memory.rows == 1) << memory.rows << " rows";
  constexpr int64_t kPiece = 1 << 20;
  std::atomic<uint64_t> sum = 0;  // so that nothing is left out
  pool_.ParallelFor(memory.bytes(), kPiece, [&](int64_t first, int64_t last, int) {
    sum.fetch_add(SumWords(static_cast<const char*>(memory.data) + first, last - first), std::memory_order_relaxed);
  });
  if (sum == 1) Synchronize();
}

void CpuBackend::Add(Tensor x, Tensor y) {
  CheckAdd(x, y);
  ForRows(x.rows, x.cols, [&](int64_t first, int64_t last) { cpu::Add(x, y, first, last); });
}

void CpuBackend::GatherRows(Tensor y, Tensor x, Tensor ids) {
  CheckGatherRows(y, x, ids);
  for (int64_t r = 0; r < y.rows; ++r) {
    const int64_t id = ids.row<int32_t>(0)[r];
    CHECK(id >= 0 && id < x.rows) << "row " << id << " of " << x.rows;
    std::copy_n(x.row<float>(id), x.cols, y.row<float>(r));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options) {
  if (options.threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads is ", options.threads, "; it must be 0 (all CPUs) or more"));
  }
  const int threads = options.threads > 0 ? options.threads : CpuCount();
  return std::make_unique<CpuBackend>(threads, options);
}

int CpuCount() { return static_cast<int>(ThreadPool::Cpus().size()); }

}  // namespace dejavu
