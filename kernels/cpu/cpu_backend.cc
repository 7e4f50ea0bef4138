// The CPU backend: memory, shape checks, and how each op is cut into parts for the threads. Work goes out in chunks
// that whichever thread is free takes; what a chunk computes does not depend on where it was cut
// (kernels/cpu/kernels.h). Work too small to be worth waking threads for stays on the calling thread.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace dejavu {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kSmallWork =
    16 << 10;                         // multiply-adds or elements, a few microseconds: about what waking threads costs
constexpr int64_t kColumnGrain = 64;  // columns of one part: whole tiles for every target
constexpr int64_t kChunksPerThread = 8;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return DivideUp(a, b) * b; }

void CheckShape(const char* what, const Tensor& t, DType dtype, int64_t rows, int64_t cols) {
  CHECK(t.dtype == dtype && t.rows == rows && t.cols == cols)
      << what << " is " << Name(t.dtype) << " [" << t.rows << ", " << t.cols << "], not " << Name(dtype) << " [" << rows
      << ", " << cols << "]";
}

void CheckLinear(const Tensor& y, const Tensor& x, const LinearWeights& w) {
  CheckShape("x of Linear", x, DType::kFloat32, y.rows, w.inputs());
  CheckShape("y of Linear", y, DType::kFloat32, x.rows, w.outputs());
  if (!w.bias.empty()) CheckShape("bias of Linear", w.bias, DType::kFloat32, 1, w.outputs());
}

void CheckRows(const RowTable& rows) {
  CheckShape("positions", rows.positions, DType::kInt32, 1, rows.rows());
  CheckShape("sequences", rows.sequences, DType::kInt32, 1, rows.rows());
}

int64_t PhysicalBytes() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

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

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, bool pin)
      : pool_(threads, pin),
        sum_scratch_(static_cast<float*>(std::aligned_alloc(64, threads * cpu::kSumScratchBytes)), std::free) {
    CHECK(sum_scratch_ != nullptr);
  }

  std::string Description() const override {
    return absl::StrCat("cpu, ", cpu::TargetName(), ", ", pool_.threads(),
                        pool_.threads() == 1 ? " thread" : " threads");
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

  void Embed(Tensor y, Tensor ids, Tensor table, int64_t offset, bool accumulate) override;
  void LayerNorm(Tensor y, Tensor x, const NormWeights& norm) override;
  void Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& inputs, int64_t group) override;
  void WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) override;
  void Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                 const Selection& heads) override;
  void Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, Tensor hidden) override;
  void Add(Tensor x, Tensor y) override;
  void GatherRows(Tensor y, Tensor x, Tensor ids) override;

 private:
  static char* RowOf(const Tensor& t, int64_t r) { return static_cast<char*>(t.data) + r * t.stride * SizeOf(t.dtype); }

  // Outputs to a chunk: several chunks for each thread, but none so small that handing it out costs more than it.
  int64_t OutputGrain(int64_t outputs, int64_t work_per_output) const {
    const int64_t worth_it = DivideUp(kSmallWork, std::max<int64_t>(1, work_per_output));
    return RoundUp(std::max(worth_it, outputs / (pool_.threads() * kChunksPerThread)), 4);
  }

  // function(first, last) over ranges of rows of `cols` elements.
  template <typename Function>
  void ForRows(int64_t rows, int64_t cols, const Function& function) {
    pool_.ParallelFor(rows, DivideUp(kSmallWork, std::max<int64_t>(1, cols)),
                      [&](int64_t first, int64_t last, int) { function(first, last); });
  }

  void SumRows(const cpu::SumJob& job);
  void GroupRows(const RowTable& rows);

  ThreadPool pool_;
  const std::unique_ptr<float, decltype(&std::free)> sum_scratch_;  // [threads, kSumScratchBytes]

  // Scratch that grows to the largest size seen and then stays.
  std::vector<int32_t> inputs_;       // inputs of the selected groups
  std::vector<int32_t> neurons_;      // neurons with an activation other than zero
  std::vector<int64_t> chunk_count_;  // how many of them each chunk of neurons found
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

void CpuBackend::Embed(Tensor y, Tensor ids, Tensor table, int64_t offset, bool accumulate) {
  CheckShape("ids of Embed", ids, DType::kInt32, 1, y.rows);
  CheckShape("y of Embed", y, DType::kFloat32, ids.cols, table.cols);
  ForRows(y.rows, y.cols,
          [&](int64_t first, int64_t last) { cpu::Embed(y, ids, table, offset, accumulate, first, last); });
}

void CpuBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  CheckShape("y of LayerNorm", y, DType::kFloat32, x.rows, x.cols);
  CheckShape("x of LayerNorm", x, DType::kFloat32, y.rows, y.cols);
  CheckShape("weight of LayerNorm", norm.weight, DType::kFloat32, 1, x.cols);
  CheckShape("bias of LayerNorm", norm.bias, DType::kFloat32, 1, x.cols);
  ForRows(y.rows, y.cols, [&](int64_t first, int64_t last) { cpu::LayerNorm(y, x, norm, first, last); });
}

void CpuBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& inputs, int64_t group) {
  CheckLinear(y, x, w);
  if (w.layout == LinearWeights::Layout::kOutputRows) {
    CHECK(inputs.all()) << "inputs can be selected only where an input is a row";
    const cpu::DotJob job = {y, x, &w, nullptr, false};
    pool_.ParallelFor(w.outputs(), OutputGrain(w.outputs(), w.inputs() * x.rows),
                      [&](int64_t first, int64_t last, int) { cpu::DotProducts(job, first, last); });
    return;
  }
  CHECK(group > 0 && w.inputs() % group == 0) << w.inputs() << " inputs in groups of " << group;
  const int64_t groups = CountOf(inputs, w.inputs() / group);
  const int32_t* list = ListOf(inputs);
  if (list != nullptr && group > 1) {
    if (static_cast<int64_t>(inputs_.size()) < w.inputs()) inputs_.resize(w.inputs());
    for (int64_t i = 0; i < groups * group; ++i) inputs_[i] = static_cast<int32_t>(list[i / group] * group + i % group);
    list = inputs_.data();
  }
  SumRows({y, x, &w, list, groups * group});
}

void CpuBackend::SumRows(const cpu::SumJob& job) {
  const int64_t columns = job.y.cols;
  const bool small = columns * job.count * job.x.rows < kSmallWork;
  const int64_t grain = small ? columns : RoundUp(DivideUp(columns, pool_.threads()), kColumnGrain);
  pool_.ParallelFor(columns, grain, [&](int64_t first, int64_t last, int thread) {
    cpu::SumRows(job, first, last, sum_scratch_.get() + thread * (cpu::kSumScratchBytes / sizeof(float)));
  });
}

void CpuBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  CheckRows(rows);
  const int64_t width = int64_t{kv.heads} * kv.head_dim;
  CheckShape("qkv", qkv, DType::kFloat32, rows.rows(), 3 * width);
  ForRows(qkv.rows, 2 * width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int32_t position = rows.positions.row<int32_t>(0)[r];
      const int32_t sequence = rows.sequences.row<int32_t>(0)[r];
      CHECK(position >= 0 && position / kv.block_tokens < rows.block_table.cols) << "position " << position;
      const int32_t block = rows.block_table.row<int32_t>(sequence)[position / kv.block_tokens];
      CHECK(block >= 0 && block < kv.blocks) << "block " << block << " of " << kv.blocks;
      const float* k = qkv.row<float>(r) + width;
      for (int64_t head = 0; head < kv.heads; ++head) {
        const int64_t place = (block * int64_t{kv.heads} + head) * kv.block_tokens + position % kv.block_tokens;
        const int64_t bytes = kv.head_dim * sizeof(float);
        std::memcpy(static_cast<float*>(kv.keys) + place * kv.head_dim, k + head * kv.head_dim, bytes);
        std::memcpy(static_cast<float*>(kv.values) + place * kv.head_dim, k + width + head * kv.head_dim, bytes);
      }
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

void CpuBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                           const Selection& heads) {
  CheckRows(rows);
  const int64_t width = int64_t{kv.heads} * kv.head_dim;
  CheckShape("context", context, DType::kFloat32, rows.rows(), width);
  CheckShape("qkv", qkv, DType::kFloat32, rows.rows(), 3 * width);
  CHECK(int64_t{kv.blocks} * kv.heads * kv.block_tokens <= INT32_MAX) << kv.blocks << " blocks of " << kv.block_tokens;
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
  // Later rows see more positions, so they go first.
  pool_.ParallelFor(items, work < kSmallWork ? items : 1, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t group = groups - 1 - i / head_count;
      const int64_t head = list != nullptr ? list[i % head_count] : i % head_count;
      cpu::Attend(job, row_groups_[group], row_groups_[group + 1], head);
    }
  });
}

// Activations stay at their neuron's column of `hidden`. The second product runs over the neurons that some row
// activates: the others add nothing.
void CpuBackend::Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, Tensor hidden) {
  CHECK(w.up.layout == LinearWeights::Layout::kOutputRows && w.down.layout == LinearWeights::Layout::kInputRows);
  CheckLinear(hidden, x, w.up);
  CheckLinear(y, hidden, w.down);
  const int64_t count = CountOf(neurons, w.up.outputs());
  const int32_t* list = ListOf(neurons);
  const int64_t grain = OutputGrain(count, w.up.inputs() * x.rows);
  if (static_cast<int64_t>(neurons_.size()) < count) neurons_.resize(w.up.outputs());
  chunk_count_.assign(DivideUp(count, grain), 0);

  const cpu::DotJob up = {hidden, x, &w.up, list, true};
  pool_.ParallelFor(count, grain, [&](int64_t first, int64_t last, int) {
    cpu::DotProducts(up, first, last);
    chunk_count_[first / grain] = ActiveNeurons(hidden, list, first, last, &neurons_[first]);
  });
  int64_t active = 0;
  for (int64_t i = 0; i * grain < count; ++i) {
    std::copy_n(&neurons_[i * grain], chunk_count_[i], &neurons_[active]);
    active += chunk_count_[i];
  }
  SumRows({y, hidden, &w.down, neurons_.data(), active});
}

void CpuBackend::Add(Tensor x, Tensor y) {
  CheckShape("y of Add", y, DType::kFloat32, x.rows, x.cols);
  CheckShape("x of Add", x, DType::kFloat32, y.rows, y.cols);
  ForRows(x.rows, x.cols, [&](int64_t first, int64_t last) { cpu::Add(x, y, first, last); });
}

void CpuBackend::GatherRows(Tensor y, Tensor x, Tensor ids) {
  CheckShape("ids of GatherRows", ids, DType::kInt32, 1, y.rows);
  CheckShape("y of GatherRows", y, DType::kFloat32, ids.cols, x.cols);
  CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
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
  const int threads = options.threads > 0 ? options.threads : static_cast<int>(ThreadPool::Cpus().size());
  return std::make_unique<CpuBackend>(threads, options.pin);
}

}  // namespace dejavu
