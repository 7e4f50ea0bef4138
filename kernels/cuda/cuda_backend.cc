// Ops are launches, queued in order on the module's one stream. Some are held back (held_ops.h), because the op that
// follows can do them in its own launch. Nothing here depends on what the device has counted: grids are made for the
// most that may be selected, and blocks that find nothing to do end.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/round.h"
#include "kernels/base/status_macros.h"
#include "kernels/check_shapes.h"
#include "kernels/cuda/device_group.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/fragment_store.h"
#include "kernels/cuda/held_ops.h"
#include "kernels/cuda/kernel_params.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/products.h"
#include "kernels/cuda/prompt_attention.h"
#include "kernels/cuda/recordings.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/staging.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kAttentionRows =
    64;  // at once of what PromptAttention does not do, whose scratch grows with the rows

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<DeviceQueue> queue, std::unique_ptr<Staging> staging)
      : queue_(std::move(queue)), staging_(std::move(staging)) {}

  std::string Description() const override {
    const DejavuCudaDevice& device = queue_->device();
    return absl::StrCat("cuda, ", device.name, ", ", device.multiprocessors, " multiprocessors");
  }
  BackendStats stats() const override { return {}; }

  int64_t FreeBytes() const override { return queue_->FreeBytes(); }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return queue_->Allocate(bytes); }
  void Upload(Tensor target, const void* source) override {
    held_.Flush();
    fragments_.Wrote(target);
    queue_->NoteWritten(target.data);
    staging_->Upload(target, source);
  }
  void Download(void* target, Tensor source) override {
    held_.Flush();
    staging_->Download(target, source);
  }
  void Synchronize() override {
    held_.Flush();
    staging_->Wait();
  }
  absl::StatusOr<std::unique_ptr<Communicator>> JoinGroup(std::unique_ptr<Communicator> host) override {
    return JoinDeviceGroup(*queue_, held_, recordings_, std::move(host));
  }

  bool RunsAhead() const override { return true; }
  uint64_t Mark() override {
    held_.Flush();
    return staging_->Mark();
  }
  void Await(uint64_t mark) override { staging_->Await(mark); }
  void Run(uint64_t key, absl::FunctionRef<void()> ops) override {
    held_.Flush();
    // A replay does not come through here: what it leaves, nobody knows.
    fragments_.Forget();
    recordings_.Run(key, [&] {
      ops();
      held_.Flush();
    });
    fragments_.Forget();
  }
  void Stamp(int event) override {
    held_.Flush();
    queue_->Try(queue_->module().stamp(queue_->context(), event), "stamp");
  }
  double ElapsedMs(int from, int to) override {
    float ms = 0.0f;
    queue_->Try(queue_->module().elapsed_ms(queue_->context(), from, to, &ms), "elapsed time");
    return ms;
  }

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
  void Attend(AttentionParams p, DType dtype);

  // From first to last: what comes later uses what is before it.
  const std::unique_ptr<DeviceQueue> queue_;
  const std::unique_ptr<Staging> staging_;
  Recordings recordings_{*queue_, *staging_};
  Scratch scratch_{*queue_, *staging_, recordings_};
  HeldOps held_{*queue_};
  FragmentStore fragments_{scratch_, held_};
  Products products_{*queue_, scratch_, held_, fragments_};
  FragmentStore::Forms of_up_;  // in which the last up-projection read its rows: the next norm leaves them so
};

void CudaBackend::Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
                        Tensor drawn) {
  CheckEmbed(y, ids, table, drawn);
  held_.Flush();
  fragments_.Wrote(y);
  const EmbedParams p = {.y = MatrixFrom<float>(y),
                         .ids = VectorFrom<int32_t>(ids),
                         .drawn = VectorFrom<int32_t>(drawn),
                         .table = table.weight.data,
                         .entries = table.weight.rows,
                         .stride = table.weight.stride,
                         .offset = offset,
                         .scale = VectorFrom<float>(table.scale),
                         .features = Int(y.cols),
                         .accumulate = accumulate,
                         .type = TypeOf(table.weight.dtype)};
  queue_->Launch(kEmbed, RowGrid(y), 0, p);
}

void CudaBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  CheckLayerNorm(y, x, norm);
  fragments_.Wrote(y);
  held_.HoldNorm(y, x, norm);
}

void CudaBackend::Add(Tensor x, Tensor y) {
  CheckAdd(x, y);
  fragments_.Wrote(x);
  held_.HoldAdd(x, y);
}

void CudaBackend::GatherRows(Tensor y, Tensor x, Tensor ids) {
  CheckGatherRows(y, x, ids);
  held_.Flush();
  fragments_.Wrote(y);
  const GatherRowsParams p = {.y = MatrixFrom<float>(y),
                              .x = MatrixFrom<const float>(x),
                              .ids = VectorFrom<int32_t>(ids),
                              .features = Int(x.cols)};
  queue_->Launch(kGatherRows, RowGrid(y), 0, p);
}

void CudaBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                         const Ride& ride) {
  CheckLinear(y, x, w, group, ride);
  fragments_.Wrote(y);
  if (ride.w != nullptr) fragments_.Wrote(ride.y);
  if (Products::TakesGemm(x, w, selected)) {
    held_.Flush();
    products_.Gemm({.y = y, .x = x, .w = w});
    if (ride.w != nullptr) products_.Multiply({.y = ride.y, .x = x, .w = *ride.w});
    return;
  }
  if (w.layout == LinearWeights::Layout::kInputRows) {
    held_.Flush();
    products_.Sum(y, x, w, selected, group, /*skip_zeros=*/false, {});
    return;
  }
  // What rides along shares a launch if it is int8, as predictors are.
  const bool shares = ride.w != nullptr && ride.w->weight.dtype == DType::kInt8;
  products_.Multiply({.y = y,
                      .x = x,
                      .w = w,
                      .selected = SelectionFrom(selected, /*masks=*/false),
                      .group = group,
                      .ride = shares ? ride : Ride()});
  if (ride.w != nullptr && !shares) products_.Multiply({.y = ride.y, .x = x, .w = *ride.w});
}

void CudaBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  CheckWriteKv(kv, qkv, rows);
  held_.HoldWriteKv({kv, qkv, rows});
}

void CudaBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                            const Selection& heads) {
  CheckAttention(context, qkv, kv, rows, heads);
  fragments_.Wrote(context);
  const KvRows attending = {kv, qkv, rows};
  const bool few = rows.rows() <= kDecodeRows, writes = few && held_.TakeWriteKv(attending);
  held_.Flush();
  if (TakesPromptAttention(queue_->device(), attending)) {
    return LaunchPromptAttention(*queue_, attending, context, scale, heads);
  }
  for (int64_t row = 0; row < rows.rows(); row += kAttentionRows) {
    const int64_t n = std::min(kAttentionRows, rows.rows() - row);
    AttentionParams p = AttentionFrom(attending, row);
    p.context = MatrixFrom<float>(context);
    p.context.data += row * p.context.stride;
    p.rows = Int(n);
    p.write = writes;
    p.scale = scale;
    p.selected = SelectionFrom(heads, /*masks=*/true, row);
    p.splits = Int(DivideUp(rows.block_table.cols * kv.block_tokens, kDecodePositions));
    p.early = queue_->IsOld(kv.keys) && (heads.all() || queue_->IsOld(p.selected.list));
    Attend(p, kv.dtype);
    if (writes) queue_->NoteWritten(kv.keys);
  }
}

// Blocks that share a row all find a place at once, where rows are few.
void CudaBackend::Attend(AttentionParams p, DType dtype) {
  constexpr int64_t kBlocks = 3;  // of a multiprocessor
  const int64_t n = p.rows, heads = p.heads, head_dim = p.head_dim, splits = p.splits;
  const int64_t blocks = std::min(splits, DivideUp(kBlocks * queue_->device().multiprocessors, n * heads));
  const int64_t slot_bytes =
      std::min<int64_t>(RoundUp(head_dim * SizeOf(dtype), kVectorBytes) * kDecodeWarpPositions, kMostDecodeSlotBytes);
  p.tickets = scratch_.Tickets(n * heads);
  p.partial = scratch_.Partial<float>(n * heads * splits * (head_dim + 2));
  queue_->Launch(dtype == DType::kFloat16 ? kAttentionF16 : kAttentionF32, {heads, n, blocks},
                 kWarps * kDecodeSlots * slot_bytes, p);
}

void CudaBackend::Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) {
  CheckSelect(selection, counts, a, w, points);
  CHECK(w.b.stride % 4 == 0 && reinterpret_cast<uintptr_t>(w.b.data) % 4 == 0) << "b of Select is not aligned";
  NormSelectParams p = {};
  int64_t norm_bytes = 0;
  if (const std::optional<HeldNorm> norm = held_.TakeNorm(/*beside=*/a)) {
    p.norm = norm->params;
    p.norm.fragments = fragments_.MadeWith(norm->y, of_up_);
    norm_bytes = HeldOps::SharedBytes(p.norm);
  }
  const bool single = a.rows == 1;
  const int64_t rows_of_block = single ? 1 : 8, groups = DivideUp(a.rows, rows_of_block);
  p.select = {.a = MatrixFrom<const float>(a),
              .b = MatrixFrom<const int8_t>(w.b),
              .thresholds = MatrixFrom<const uint16_t>(w.thresholds),
              .ranks = VectorFrom<int32_t>(w.ranks),
              .points = VectorFrom<int32_t>(points),
              .masks = MatrixFrom<int32_t>(selection.masks),
              .list = VectorFrom<int32_t>(selection.indices),
              .list_count = VectorFrom<int32_t>(selection.count),
              .counts = VectorFrom<int32_t>(counts),
              .rows = Int(a.rows),
              .outputs = Int(w.outputs),
              .words = Int(w.b.cols / 32),
              .ticket = scratch_.Tickets(1)};
  const int64_t sums_bytes = kWarps * rows_of_block * kSelectColumns * int64_t{sizeof(int32_t)};
  queue_->Launch(single ? kNormSelect1 : kNormSelect8, {p.norm.rows + groups * DivideUp(w.b.cols, kSelectColumns)},
                 std::max(sums_bytes, norm_bytes), p);
  queue_->NoteWritten(selection.indices.data);
}

void CudaBackend::Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
                      Tensor active) {
  CheckMlp(y, x, w, neurons, hidden, active);
  fragments_.Wrote(y);
  fragments_.Wrote(hidden);
  if (Products::TakesGemm(x, w.up, neurons) && Products::TakesGemm(x, w.down, neurons)) {
    held_.Flush();
    products_.Gemm({.y = hidden, .x = x, .w = w.up, .relu = true, .cleared = active});
    products_.Gemm({.y = y, .x = hidden, .w = w.down, .active = active});
    return;
  }
  of_up_ = FragmentStore::FormsOf(w.up.weight.dtype);
  products_.Multiply({.y = hidden,
                      .x = x,
                      .w = w.up,
                      .selected = SelectionFrom(neurons, /*masks=*/true),
                      .relu = true,
                      .cleared = active});
  products_.Sum(y, hidden, w.down, neurons, 1, skip_zeros, active);
}

void CudaBackend::Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                        Tensor hidden) {
  CheckAudit(result, x, up, worth, neurons, hidden);
  fragments_.Wrote(hidden);
  if (Products::TakesGemm(x, up, {})) {
    held_.Flush();
    products_.Gemm({.y = hidden, .x = x, .w = up, .relu = true});
  } else {
    products_.Multiply({.y = hidden, .x = x, .w = up, .relu = true});
  }
  const AuditParams p = {.result = MatrixFrom<float>(result),
                         .hidden = MatrixFrom<const float>(hidden),
                         .worth = VectorFrom<float>(worth),
                         .masks = MatrixFrom<const int32_t>(neurons.masks),
                         .neurons = Int(up.outputs())};
  queue_->Launch(kAudit, {x.rows}, 0, p);
}

void CudaBackend::Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates,
                       const DrawDetails& details) {
  CheckDraw(tokens, bests, logits, draws, candidates, details);
  held_.Flush();
  const DrawParams p = {.tokens = VectorFrom<int32_t>(tokens),
                        .bests = MatrixFrom<float>(bests),
                        .logits = MatrixFrom<float>(logits),
                        .draws = MatrixFrom<const int32_t>(draws),
                        .adjustments = VectorFrom<int32_t>(details.adjustments),
                        .scratch = VectorFrom<float>(details.scratch),
                        .details = MatrixFrom<int32_t>(details.results),
                        .count = Int(logits.cols),
                        .first = Int(candidates.first),
                        .candidates = Int(std::clamp<int64_t>(candidates.end - candidates.first, 0, logits.cols))};
  queue_->Launch(kDraw, {logits.rows}, 0, p);
}

void CudaBackend::ReadAll(Tensor memory) {
  CHECK(memory.rows == 1) << memory.rows << " rows";
  held_.Flush();
  constexpr int64_t kBlocks = 4;  // per multiprocessor, all of them at once
  const int64_t blocks = kBlocks * queue_->device().multiprocessors;
  const ReadSumParams p = {.data = memory.data,
                           .vectors = memory.bytes() / kVectorBytes,
                           .sums = scratch_.Partial<uint64_t>(blocks * kBlockThreads),
                           .ring_groups = 0};
  queue_->Launch(kReadSum, {blocks}, 0, p);
}

}  // namespace
}  // namespace dejavu::cuda

namespace dejavu {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const DejavuCudaModule* module, int device) {
  ASSIGN_OR_RETURN(std::unique_ptr<cuda::DeviceQueue> queue, cuda::DeviceQueue::Open(module, device));
  ASSIGN_OR_RETURN(std::unique_ptr<cuda::Staging> staging, cuda::Staging::Create(*queue));
  return std::make_unique<cuda::CudaBackend>(std::move(queue), std::move(staging));
}

}  // namespace dejavu
