#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "kernels/base/processors.h"
#include "kernels/base/round.h"
#include "kernels/check_shapes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/parts.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/selected.h"
#include "kernels/cpu/target.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/host_draw.h"

namespace dejavu {
namespace {

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
    if (!cpu::IsStrict(neurons, r)) continue;
    float* h = hidden.row<float>(r);
    for (int64_t i = first; i < last; ++i) {
      if (!cpu::Selected(neurons.masks, r, list[i])) h[list[i]] = 0.0f;
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
  CpuBackend(const Threads& threads, const CpuBackendOptions& options)
      : parts_(threads.count, options.pin, options.first_cpu),
        threads_because_(threads.because.empty() ? "" : absl::StrCat(" (", threads.because, ")")),
        sharers_(options.sharers) {}

  std::string Description() const override {
    return absl::StrCat("cpu, ", cpu::TargetName(), ", ", parts_.threads(),
                        parts_.threads() == 1 ? " thread" : " threads", threads_because_);
  }

  int64_t FreeBytes() const override { return cpu::FreeBytes(sharers_); }
  bool ReadsHostMemory() const override { return true; }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return cpu::Allocate(bytes); }

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
  BackendStats stats() const override { return {parts_.pool().runs(), parts_.pool().wait_ns()}; }

  void Stamp(int event) override { stamps_[event] = std::chrono::steady_clock::now(); }
  double ElapsedMs(int from, int to) override { return Milliseconds(stamps_[from], stamps_[to]); }

  void Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
             Tensor drawn) override;
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
  void Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
            const DrawDetails& details) override;
  void ReadAll(Tensor memory) override;
  void Add(Tensor x, Tensor y) override;
  void GatherRows(Tensor y, Tensor x, Tensor ids) override;

 private:
  static char* RowOf(const Tensor& t, int64_t r) { return static_cast<char*>(t.data) + r * t.stride * SizeOf(t.dtype); }
  void GroupRows(const RowTable& rows);

  cpu::Parts parts_;
  cpu::Products products_{parts_};
  const std::string threads_because_;
  const int sharers_;
  std::array<SteadyTime, 64> stamps_;

  // Scratch that grows to the largest size seen and then stays.
  std::vector<int32_t> neurons_;      // neurons with an activation other than zero
  std::vector<int64_t> chunk_count_;  // how many of them each chunk of neurons found
  std::vector<int64_t> chunk_rows_;   // [chunks, rows] and how many in each counted row
  HostDraw host_draw_;
  std::vector<int64_t> row_groups_;  // first row of each group that attends together, then the number of rows
};

void CpuBackend::Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
                       Tensor drawn) {
  CheckEmbed(y, ids, table, drawn);
  parts_.ForRows(y.rows, y.cols, [&](int64_t first, int64_t last) {
    cpu::Embed(y, ids, drawn, table, offset, accumulate, first, last);
  });
}

void CpuBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  CheckLayerNorm(y, x, norm);
  parts_.ForRows(y.rows, y.cols, [&](int64_t first, int64_t last) { cpu::LayerNorm(y, x, norm, first, last); });
}

void CpuBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                        const Ride& ride) {
  CheckLinear(y, x, w, group, ride);
  products_.Linear(y, x, w, selected, group, ride);
}

void CpuBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  CheckWriteKv(kv, qkv, rows);
  const int64_t width = int64_t{kv.heads} * kv.head_dim;
  parts_.ForRows(qkv.rows, 2 * width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int32_t position = rows.positions.row<int32_t>(0)[r];
      const int32_t sequence = rows.sequences.row<int32_t>(0)[r];
      CHECK(position >= 0 && position / kv.block_tokens < rows.block_table.cols) << "position " << position;
      const int32_t block = rows.block_table.row<int32_t>(sequence)[position / kv.block_tokens];
      CHECK(block >= 0 && block < kv.blocks) << "block " << block << " of " << kv.blocks;
      const float* k = qkv.row<float>(r) + width;
      const int64_t beyond = cpu::StoreKv(kv, block, position % kv.block_tokens, k, k + width);
      if (!rows.saturated.empty()) rows.saturated.row<int32_t>(0)[r] += static_cast<int32_t>(beyond);
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

// Heads of the list (nullptr: themselves) at `first_head` ... `last_head`. The context of rows that did not select a
// head is zero, because the out-projection reads it for the others.
void AttendSelected(const cpu::AttentionJob& job, int64_t first, int64_t last, const int32_t* list, int64_t first_head,
                    int64_t last_head, const Selection& selection) {
  const auto takes_part = [&](int64_t r, int64_t head) {
    return !cpu::IsStrict(selection, r) || cpu::Selected(selection.masks, r, head);
  };
  for (int64_t h = first_head; h < last_head; h += cpu::kAttentionHeads) {
    int32_t heads[cpu::kAttentionHeads];
    int64_t count = 0;
    for (int64_t i = h; i < std::min(h + cpu::kAttentionHeads, last_head); ++i) {
      const int32_t head = list != nullptr ? list[i] : static_cast<int32_t>(i);
      bool any = selection.masks.empty();
      for (int64_t r = first; r < last && !any; ++r) any = takes_part(r, head);
      if (any) heads[count++] = head;
    }
    if (count > 0) cpu::Attend(job, first, last, heads, count);
  }
  if (selection.masks.empty()) return;
  for (int64_t i = first_head; i < last_head; ++i) {
    const int64_t head = list != nullptr ? list[i] : i;
    for (int64_t r = first; r < last; ++r) {
      if (!takes_part(r, head)) {
        std::fill_n(job.context.row<float>(r) + head * job.kv.head_dim, job.kv.head_dim, 0.0f);
      }
    }
  }
}

void CpuBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                           const Selection& heads) {
  CheckAttention(context, qkv, kv, rows, heads);
  const int64_t head_count = cpu::CountOf(heads, kv.heads);
  const int32_t* list = cpu::ListOf(heads);
  GroupRows(rows);
  const cpu::AttentionJob job = {.context = context, .qkv = qkv, .kv = kv, .rows = rows, .scale = scale};
  const int64_t groups = static_cast<int64_t>(row_groups_.size()) - 1;
  const int64_t items = groups * head_count;
  int64_t work = 0;
  for (int64_t r = 0; r < rows.rows(); ++r) {
    const int64_t position = rows.positions.row<int32_t>(0)[r];
    CHECK(position >= 0 && position / kv.block_tokens < rows.block_table.cols) << "position " << position;
    work += 2 * (position + 1) * head_count * kv.head_dim;
  }
  // Parts of few heads read memory in pieces too short.
  constexpr int64_t kGoodHeads = 16;
  const int64_t threads = parts_.threads();
  const int64_t grain = std::max({int64_t{1}, items / (threads * 8), std::min(kGoodHeads, items / threads)});
  // Later rows see more positions, so they go first.
  parts_.For(items, work < cpu::kSmallWork ? items : grain, [&](int64_t first, int64_t last, int) {
    while (first < last) {
      const int64_t group = groups - 1 - first / head_count, place = first % head_count;
      const int64_t count = std::min(last - first, head_count - place);
      AttendSelected(job, row_groups_[group], row_groups_[group + 1], list, place, place + count, heads);
      first += count;
    }
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
    products_.SelectRows(selection.masks.Rows(r, std::min(cpu::kSegmentRows, rows - r)),
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
  const int64_t count = cpu::CountOf(neurons, w.up.outputs());
  const int32_t* list = cpu::ListOf(neurons);
  const int64_t grain = parts_.OutputGrain(count, w.up.inputs() * x.rows);
  if (static_cast<int64_t>(neurons_.size()) < count) neurons_.resize(w.up.outputs());
  const int64_t chunks = DivideUp(count, grain);
  chunk_count_.assign(chunks, 0);
  chunk_rows_.assign(chunks * counted, 0);

  cpu::DotJob up = products_.Prepare(hidden, x, w.up, list, true);
  up.selected = &neurons;
  products_.Dots(up, count, grain, [&](int64_t first, int64_t last) {
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
    products_.SumRows(y, hidden, w.down, neurons_.data(), not_zero);
  } else {
    products_.SumRows(y, hidden, w.down, list, count);
  }
}

void CpuBackend::Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                       Tensor hidden) {
  CheckAudit(result, x, up, worth, neurons, hidden);
  const cpu::DotJob job = products_.Prepare(hidden, x, up, nullptr, true);
  products_.Dots(job, up.outputs(), parts_.OutputGrain(up.outputs(), up.inputs() * x.rows), [](int64_t, int64_t) {});
  for (int64_t i = 0; i < x.rows; ++i) {
    const float* h = hidden.row<float>(i);
    double mass = 0.0, missed = 0.0;
    int64_t selected = 0, active = 0, hits = 0;
    for (int64_t j = 0; j < up.outputs(); ++j) {
      const bool chosen = neurons.masks.empty() || cpu::Selected(neurons.masks, i, j);
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

void CpuBackend::Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
                      const DrawDetails& details) {
  CheckDraw(tokens, bests, logits, draws, candidates, details);
  const auto more = [&](int64_t r) { return (draws.row<int32_t>(r)[kDrawWants] & kDrawMore) != 0; };
  parts_.ForRows(logits.rows, logits.cols, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (more(r)) continue;
      tokens.row<int32_t>(0)[r] = cpu::Draw(logits.row<float>(r), logits.cols, candidates, draws.row<int32_t>(r),
                                            bests.empty() ? nullptr : bests.row<float>(r));
    }
  });
  for (int64_t r = 0; r < logits.rows; ++r) {
    if (!more(r)) continue;
    CHECK(!details.results.empty()) << "row " << r << " wants more than a draw";
    tokens.row<int32_t>(0)[r] = host_draw_.Choose({.logits = logits.row<float>(r),
                                                   .count = logits.cols,
                                                   .candidates = std::min(candidates.end, logits.cols),
                                                   .draw = draws.row<int32_t>(r),
                                                   .adjustments = details.adjustments.row<int32_t>(0),
                                                   .details = details.results.row<int32_t>(r)});
  }
}

void CpuBackend::ReadAll(Tensor memory) {
  CHECK(memory.rows == 1) << memory.rows << " rows";
  constexpr int64_t kPiece = 1 << 20;
  std::atomic<uint64_t> sum = 0;  // so that nothing is left out
  parts_.For(memory.bytes(), kPiece, [&](int64_t first, int64_t last, int) {
    sum.fetch_add(SumWords(static_cast<const char*>(memory.data) + first, last - first), std::memory_order_relaxed);
  });
  if (sum == 1) Synchronize();
}

void CpuBackend::Add(Tensor x, Tensor y) {
  CheckAdd(x, y);
  parts_.ForRows(x.rows, x.cols, [&](int64_t first, int64_t last) { cpu::Add(x, y, first, last); });
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
        absl::StrCat("threads is ", options.threads, "; it must be 0 (as many as are worth it) or more"));
  }
  const Threads threads = options.threads > 0 ? Threads{options.threads, options.threads_because} : DefaultThreads();
  return std::make_unique<CpuBackend>(threads, options);
}

}  // namespace dejavu
