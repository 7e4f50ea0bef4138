// Ops are launches, queued in order on the module's one stream. Three ops are held back, because the one that follows
// can do them in its own launch: Add by LayerNorm, LayerNorm by Select, WriteKv by Attention. Whatever else follows
// comes after them. Nothing here depends on what the device has counted: grids are made for the most that may be
// selected, and blocks that find nothing to do end.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/round.h"
#include "kernels/base/status_macros.h"
#include "kernels/check_shapes.h"
#include "kernels/cuda/params.h"

namespace dejavu {
namespace {

using cuda::MatrixOf;

constexpr int64_t kStagingBytes = 4 << 20;  // of each of the two parts of pinned memory
constexpr int64_t kSmallUpload = 64 << 10;  // bytes: returns without waiting for the device
constexpr int64_t kFusedRows = 16;    // of a step; from more on keys and values are written by a launch of their own
constexpr int64_t kRowsAtOnce = 64;   // of launches whose scratch grows with the rows
constexpr int64_t kSumSegments = 16;  // at most, so many blocks share the inputs
constexpr int64_t kLinearStaticBytes = 21 << 10;  // shared memory that Linear takes beside x; and 1 KB is the device's
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kGemmRows = 33;  // from so many rows on a product is the library's
constexpr size_t kMostRecordings = 128;
constexpr uint64_t kMarks = 2;
constexpr int kFirstMarkEvent = 64;  // of the module's; those before it are Stamp's
constexpr double kJoinLimitS = 120;  // for NCCL to find all ranks, which are known to be there
constexpr int64_t kMostGap = 32;     // floats between rows that lie in memory of their own (kernels/layout.h)

int32_t Int(int64_t value) {
  CHECK(value >= INT32_MIN && value <= INT32_MAX) << value;
  return static_cast<int32_t>(value);
}

template <typename T>
MatrixOf<T> MatrixFrom(const Tensor& t) {
  return {static_cast<T*>(t.data), t.stride};
}
template <typename T>
T* VectorFrom(const Tensor& t) {
  return static_cast<T*>(t.data);
}

cuda::WeightType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return cuda::kF32;
    case DType::kFloat16:
      return cuda::kF16;
    case DType::kBFloat16:
      return cuda::kBF16;
    default:
      CHECK(dtype == DType::kInt8) << "weights of type " << Name(dtype);
      return cuda::kI8;
  }
}

// Whether 16 bytes can be read at once from every row on.
bool HasVectors(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % kVectorBytes == 0 && t.stride * SizeOf(t.dtype) % kVectorBytes == 0;
}

bool SameView(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride;
}
bool Overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.data) + ((t.rows - 1) * t.stride + t.cols) * SizeOf(t.dtype);
  };
  return a.data < end(b) && b.data < end(a);
}

// With the masks from row `first_row` on, if they are wanted.
cuda::SelectionParams SelectionFrom(const Selection& selection, bool masks, int64_t first_row = 0) {
  cuda::SelectionParams p = {};
  if (selection.all()) return p;
  p.list = VectorFrom<int32_t>(selection.indices);
  p.count = VectorFrom<int32_t>(selection.count);
  if (!masks || selection.masks.empty()) return p;
  p.masks = MatrixFrom<const int32_t>(selection.masks);
  p.masks.data += first_row * p.masks.stride;
  if (!selection.strict.empty()) p.strict = VectorFrom<int32_t>(selection.strict) + first_row;
  return p;
}

// The module's context. Buffers hold it, so that it closes after the last of them.
struct Context {
  const DejavuCudaModule* module = nullptr;
  DejavuCudaContext* context = nullptr;
  DejavuCudaDevice device = {};
  int64_t taken_bytes = 0;  // of what was free at first

  ~Context() {
    if (context != nullptr) module->close(context);
  }
};

// What the ranks tell each other while they become a group, and rank 0's answer to all.
struct JoinWord {
  int32_t failed = 0;
  char id[DEJAVU_CUDA_GROUP_ID_BYTES] = {};  // rank 0's
  char message[380] = {};
};

// OK on every rank, with rank 0's id, or on none, with the reason of the first that failed.
absl::Status Agree(Communicator& host, const absl::Status& mine, char* id) {
  JoinWord word;
  word.failed = mine.ok() ? 0 : 1;
  std::memcpy(word.id, id, sizeof word.id);
  std::snprintf(word.message, sizeof word.message, "%s", std::string(mine.message()).c_str());
  std::vector<JoinWord> all(host.rank() == 0 ? host.size() : 0);
  host.Gather(all.data(), &word, sizeof word);
  const auto failed = std::find_if(all.begin(), all.end(), [](const JoinWord& of_rank) { return of_rank.failed != 0; });
  if (failed != all.end()) {
    word.failed = 1;
    std::snprintf(word.message, sizeof word.message, "rank %d: %.360s", static_cast<int>(failed - all.begin()),
                  failed->message);
  }
  host.Broadcast(&word, sizeof word);
  std::memcpy(id, word.id, sizeof word.id);
  if (word.failed == 0) return absl::OkStatus();
  word.message[sizeof word.message - 1] = '\0';
  return mine.ok() ? absl::UnavailableError(word.message) : mine;
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(std::shared_ptr<Context> context)
      : context_(std::move(context)), module_(*context_->module), device_(context_->device) {}
  ~CudaBackend() override {
    ForgetGraphs();
    if (staging_ != nullptr) module_.free_pinned(context_->context, staging_);
  }

  absl::Status Prepare();

  std::string Description() const override {
    return absl::StrCat("cuda, ", device_.name, ", ", device_.multiprocessors, " multiprocessors");
  }
  BackendStats stats() const override { return {}; }

  int64_t FreeBytes() const override { return device_.memory_free_bytes - context_->taken_bytes; }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override;
  void Upload(Tensor target, const void* source) override;
  void Download(void* target, Tensor source) override;
  void Synchronize() override;
  absl::StatusOr<std::unique_ptr<Communicator>> JoinGroup(std::unique_ptr<Communicator> host) override;
  bool RunsAhead() const override { return true; }
  uint64_t Mark() override;
  void Await(uint64_t mark) override;
  void Run(uint64_t key, absl::FunctionRef<void()> ops) override;
  void Stamp(int event) override;
  double ElapsedMs(int from, int to) override;

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
  class DeviceGroup;
  struct Grid {
    int64_t x = 1, y = 1, z = 1;
  };

  void Try(int result, const char* what);
  template <typename Params>
  void Launch(cuda::Kernel kernel, Grid grid, int64_t shared_bytes, const Params& params);

  // Launches what is held back.
  void Flush();

  void AllReduce(Tensor x);
  void AllReduceBeside(Tensor x, absl::FunctionRef<void()> work);
  bool QueueAllReduce(Tensor x, bool aside);
  void LeaveGroup();

  float* Partial(int64_t floats);
  uint32_t* Tickets(int64_t count);
  void Grow(Buffer& buffer, int64_t bytes);
  void ForgetGraphs();
  void Wait();
  void Fill(int64_t count);
  static constexpr int MarkEvent(uint64_t mark) { return kFirstMarkEvent + static_cast<int>(mark % kMarks); }
  char* Stage(int64_t bytes);

  struct Products {
    Tensor y, x;
    const LinearWeights& w;
    cuda::SelectionParams selected = {};
    int64_t group = 1;
    Ride ride = {};
    bool relu = false;
    Tensor cleared = {};
  };
  void Multiply(const Products& job);
  static bool TakesGemm(const Tensor& x, const LinearWeights& w, const Selection& selected) {
    const DType dtype = w.weight.dtype;
    return x.rows >= kGemmRows && selected.all() && (dtype == DType::kFloat16 || dtype == DType::kBFloat16);
  }
  void Gemm(Tensor y, Tensor x, const LinearWeights& w, bool relu = false, Tensor cleared = {});
  cuda::OutputRows RowsOf(const LinearWeights& w, const Tensor& y, int64_t rows) const;
  void Sum(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group, bool skip_zeros,
           Tensor active);
  struct Keys {
    KvLayer kv;
    Tensor qkv;
    RowTable rows;
  };
  static cuda::AttentionParams ParamsOf(const Keys& keys, int64_t first_row);
  Grid RowGrid(const Tensor& y) const { return {DivideUp(y.cols, cuda::kBlockThreads), y.rows}; }

  // Constant after construction, but for what a group takes of the device's memory.
  const std::shared_ptr<Context> context_;
  const DejavuCudaModule& module_;
  const DejavuCudaDevice& device_;
  char* staging_ = nullptr;  // pinned, two parts of kStagingBytes

  std::string failure_;     // the first one; the device does nothing more after it
  bool peer_lost_ = false;  // that is what failed

  // Held back, at most one of them.
  struct HeldAdd {
    Tensor x, y;
  };
  struct HeldNorm {
    cuda::NormParams params;
    Tensor y, x;
  };
  std::optional<HeldAdd> add_;
  std::optional<HeldNorm> norm_;
  std::optional<Keys> keys_;

  struct Fetched {
    void* target;
    const void* place;
    int64_t bytes;
  };
  std::deque<Fetched> fetched_;  // downloads under way, in order
  int64_t filled_ = 0;           // those that have arrived
  uint64_t marks_ = 0;
  std::array<int64_t, kMarks> fetched_at_ = {};  // by mark, modulo kMarks: downloads before it, since the beginning
  int64_t staged_ = 0;                           // bytes of the staging memory that copies under way use
  Buffer partial_;                               // partial sums of a launch
  Buffer tickets_;                               // zero between launches
  Buffer halves_;                                // x of a product that the library does
  CommunicatorStats group_stats_;                // what was replayed included
  bool follows_all_reduce_ = false;              // the next launch
  bool capturing_ = false;
  struct Recording {
    bool seen = false;     // run once: scratch has the size that it needs
    bool refused = false;  // the device has no memory for the graph
    DejavuCudaGraph* graph = nullptr;
    int64_t all_reduces = 0;
  };
  std::unordered_map<uint64_t, Recording> recordings_;
};

// Its all-reduces are queued on the device, where they cost the host nothing that could be measured; the rest is the
// host's. NCCL gives all ranks the same bits, in every run the same. With three ranks and more a row's last bits may
// depend on how many rows are added up with it: its place in the array decides in which order the ranks come.
class CudaBackend::DeviceGroup final : public Communicator {
 public:
  DeviceGroup(CudaBackend& backend, std::unique_ptr<Communicator> host) : backend_(backend), host_(std::move(host)) {}
  ~DeviceGroup() override { backend_.LeaveGroup(); }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  void AllReduce(Tensor x) override { backend_.AllReduce(x); }
  void AllReduceBeside(Tensor x, absl::FunctionRef<void()> work) override { backend_.AllReduceBeside(x, work); }
  void Broadcast(void* data, int64_t bytes) override { host_->Broadcast(data, bytes); }
  void Gather(void* all, const void* mine, int64_t bytes) override { host_->Gather(all, mine, bytes); }
  void SetLimit(double seconds) override {
    host_->SetLimit(seconds);
    backend_.Try(backend_.module_.limit_group(backend_.context_->context, seconds), "limit of the group");
  }
  CommunicatorStats stats() const override { return backend_.group_stats_; }

 private:
  CudaBackend& backend_;
  const std::unique_ptr<Communicator> host_;
};

absl::StatusOr<std::unique_ptr<Communicator>> CudaBackend::JoinGroup(std::unique_ptr<Communicator> host) {
  if (host->size() == 1) return host;
  const auto status_of = [&](int result) {
    return result == 0 ? absl::OkStatus() : absl::UnavailableError(absl::StrCat("cuda: ", module_.error()));
  };
  char id[DEJAVU_CUDA_GROUP_ID_BYTES] = {};
  RETURN_IF_ERROR(Agree(*host, status_of(module_.group_id(host->rank() == 0 ? id : nullptr)), id));
  int64_t free_bytes = 0;
  const absl::Status joined =
      status_of(module_.join_group(context_->context, id, host->rank(), host->size(), kJoinLimitS, &free_bytes));
  auto group = std::make_unique<DeviceGroup>(*this, std::move(host));
  RETURN_IF_ERROR(Agree(*group, joined, id));
  context_->device.memory_free_bytes = free_bytes + context_->taken_bytes;
  return group;
}

void CudaBackend::LeaveGroup() {
  ForgetGraphs();
  module_.leave_group(context_->context);
}

// What lies between the rows of x is added up with them: nobody reads it, and one span is faster than many.
bool CudaBackend::QueueAllReduce(Tensor x, bool aside) {
  CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
  CHECK(x.rows <= 1 || x.stride - x.cols <= kMostGap) << "AllReduce of columns of something wider";
  Flush();
  if (x.rows == 0 || x.cols == 0) return false;
  const int64_t count = (x.rows - 1) * x.stride + x.cols;
  Try(module_.all_reduce(context_->context, VectorFrom<float>(x), count, aside), "all-reduce");
  follows_all_reduce_ = true;
  ++group_stats_.all_reduces;
  return true;
}

void CudaBackend::AllReduce(Tensor x) { QueueAllReduce(x, /*aside=*/false); }

void CudaBackend::AllReduceBeside(Tensor x, absl::FunctionRef<void()> work) {
  if (!QueueAllReduce(x, /*aside=*/true)) return work();
  work();
  Flush();
  Try(module_.join_all_reduce(context_->context), "all-reduce");
  follows_all_reduce_ = true;
}

absl::Status CudaBackend::Prepare() {
  void* memory = nullptr;
  if (module_.allocate_pinned(context_->context, 2 * kStagingBytes, &memory) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cuda: ", module_.error()));
  }
  staging_ = static_cast<char*>(memory);
  return absl::OkStatus();
}

// Failures of the device have no status to be returned in; the caller of an op, the engine, ends by them.
void CudaBackend::Try(int result, const char* what) {
  if (failure_.empty() && result != 0) {
    failure_ = absl::StrCat("cuda: ", what, ": ", module_.error());
    peer_lost_ = result == DEJAVU_CUDA_PEER_LOST;
  }
  if (peer_lost_) throw PeerLost(failure_);
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

template <typename Params>
void CudaBackend::Launch(cuda::Kernel kernel, Grid grid, int64_t shared_bytes, const Params& params) {
  static constexpr const char* kNames[] = {
#define DEJAVU_CUDA_KERNEL_NAME(name, params) #name,
      DEJAVU_CUDA_KERNELS(DEJAVU_CUDA_KERNEL_NAME)
#undef DEJAVU_CUDA_KERNEL_NAME
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CHECK(shared_bytes <= device_.shared_bytes_per_block)
      << kNames[kernel] << " wants " << shared_bytes << " bytes of shared memory";
  DejavuCudaLaunch launch = {};
  launch.kernel = kernel;
  launch.grid[0] = static_cast<uint32_t>(grid.x);
  launch.grid[1] = static_cast<uint32_t>(grid.y);
  launch.grid[2] = static_cast<uint32_t>(grid.z);
  launch.block[0] = cuda::kBlockThreads;
  launch.block[1] = launch.block[2] = 1;
  launch.shared_bytes = static_cast<uint32_t>(shared_bytes);
  // NCCL does not say whether another launch may begin beside its own; one after a fork or a join has two before it.
  launch.overlaps = device_.compute_major >= 9 && !std::exchange(follows_all_reduce_, false);
  launch.params = &params;
  launch.params_bytes = sizeof params;
  Try(module_.launch(context_->context, &launch), kNames[kernel]);
}

absl::StatusOr<Buffer> CudaBackend::Allocate(int64_t bytes) {
  CHECK(bytes >= 0) << bytes;
  void* data = nullptr;
  if (module_.allocate(context_->context, std::max<int64_t>(bytes, 1), &data) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cuda: cannot allocate ", bytes, " bytes on ", device_.name, ": ", module_.error()));
  }
  context_->taken_bytes += bytes;
  return Buffer(data, bytes, [context = context_, bytes](void* p) {
    context->module->free(context->context, p);
    context->taken_bytes -= bytes;
  });
}

// Waits for the device: what was downloaded is there, and staging memory is free again.
void CudaBackend::Wait() {
  Try(module_.synchronize(context_->context), "synchronize");
  Fill(filled_ + static_cast<int64_t>(fetched_.size()));
  staged_ = 0;
}

// The first `count` downloads since the beginning have arrived.
void CudaBackend::Fill(int64_t count) {
  for (; filled_ < count; ++filled_) {
    const Fetched& fetched = fetched_.front();
    std::memcpy(fetched.target, fetched.place, fetched.bytes);
    fetched_.pop_front();
  }
}

uint64_t CudaBackend::Mark() {
  Flush();
  ++marks_;
  fetched_at_[marks_ % kMarks] = filled_ + static_cast<int64_t>(fetched_.size());
  Try(module_.stamp(context_->context, MarkEvent(marks_)), "mark");
  return marks_;
}

void CudaBackend::Await(uint64_t mark) {
  CHECK(mark <= marks_ && mark + kMarks > marks_) << "mark " << mark << " of " << marks_;
  Try(module_.wait(context_->context, MarkEvent(mark)), "wait");
  Fill(fetched_at_[mark % kMarks]);
}

// Staging memory until the next Wait.
char* CudaBackend::Stage(int64_t bytes) {
  if (staged_ + bytes > 2 * kStagingBytes) Wait();
  char* place = staging_ + staged_;
  staged_ += RoundUp(bytes, kVectorBytes);
  return place;
}

void CudaBackend::Synchronize() {
  Flush();
  Wait();
}

void CudaBackend::Stamp(int event) {
  Flush();
  Try(module_.stamp(context_->context, event), "stamp");
}

double CudaBackend::ElapsedMs(int from, int to) {
  float ms = 0.0f;
  Try(module_.elapsed_ms(context_->context, from, to, &ms), "elapsed time");
  return ms;
}

// Small arrays follow each other in pinned memory until the device has been waited for. Large ones go piece by piece
// through the two parts of it in turn: one is filled while the other is read.
void CudaBackend::Upload(Tensor target, const void* source) {
  CHECK(!capturing_) << "upload while ops are recorded";
  Flush();
  const int64_t row_bytes = target.cols * SizeOf(target.dtype), stride_bytes = target.stride * SizeOf(target.dtype);
  const auto send = [&](char* to, const char* from, int64_t bytes, int64_t rows) {
    Try(module_.upload(context_->context, to, stride_bytes, from, bytes, bytes, rows), "upload");
  };
  char* to = static_cast<char*>(target.data);
  const char* from = static_cast<const char*>(source);
  if (target.rows == 0 || row_bytes == 0) return;
  if (target.rows * row_bytes <= kSmallUpload) {
    char* place = Stage(target.rows * row_bytes);
    std::memcpy(place, from, target.rows * row_bytes);
    send(to, place, row_bytes, target.rows);
    return;
  }
  Wait();
  const int64_t whole_rows = kStagingBytes / row_bytes;
  const int64_t piece_rows = std::max<int64_t>(1, whole_rows), piece_bytes = std::min(row_bytes, kStagingBytes);
  int part = 0;
  for (int64_t r = 0; r < target.rows; r += piece_rows) {
    const int64_t rows = std::min(piece_rows, target.rows - r);
    for (int64_t at = 0; at < row_bytes; at += piece_bytes, part = 1 - part) {
      const int64_t bytes = std::min(piece_bytes, row_bytes - at);
      char* place = staging_ + part * kStagingBytes;
      std::memcpy(place, from + r * row_bytes + at, rows * bytes);
      Wait();  // for the piece before this one
      send(to + r * stride_bytes + at, place, bytes, rows);
    }
  }
  staged_ = 2 * kStagingBytes;
}

void CudaBackend::Download(void* target, Tensor source) {
  CHECK(!capturing_) << "download while ops are recorded";
  Flush();
  const int64_t row_bytes = source.cols * SizeOf(source.dtype);
  if (source.rows == 0 || row_bytes == 0) return;
  const int64_t stride_bytes = source.stride * SizeOf(source.dtype);
  const int64_t bytes = source.rows * row_bytes;
  const bool stages = bytes <= kStagingBytes;
  void* place = stages ? Stage(bytes) : target;
  Try((stages ? module_.fetch : module_.download)(context_->context, place, row_bytes, source.data, stride_bytes,
                                                  row_bytes, source.rows),
      "download");
  if (stages) fetched_.push_back({target, place, bytes});
}

// The first time the ops run as they are, and scratch grows to what they need; the second time they are recorded.
void CudaBackend::Run(uint64_t key, absl::FunctionRef<void()> ops) {
  CHECK(!capturing_) << "a recording within a recording";
  Flush();
  if (key == kOnce) {
    ops();
    Flush();
    return;
  }
  if (recordings_.size() == kMostRecordings && recordings_.find(key) == recordings_.end()) {
    Wait();
    ForgetGraphs();  // shapes of steps that have not come for long; the others are recorded again
    recordings_.clear();
  }
  Recording& recording = recordings_[key];
  if (!recording.seen) {
    recording.seen = true;
    ops();
    Flush();
    return;
  }
  if (recording.graph == nullptr && !recording.refused) {
    Try(module_.begin_capture(context_->context), "begin of a graph");
    capturing_ = true;
    const int64_t all_reduces = group_stats_.all_reduces;
    ops();
    Flush();
    recording.all_reduces = group_stats_.all_reduces - all_reduces;
    group_stats_.all_reduces = all_reduces;
    capturing_ = false;
    Try(module_.end_capture(context_->context, &recording.graph), "end of a graph");
    recording.refused = recording.graph == nullptr;
  }
  if (recording.refused) {
    ops();
    Flush();
    return;
  }
  Try(module_.replay(context_->context, recording.graph), "graph");
  group_stats_.all_reduces += recording.all_reduces;
}

void CudaBackend::ForgetGraphs() {
  for (auto& [key, recording] : recordings_) {
    if (recording.graph != nullptr) module_.free_graph(context_->context, std::exchange(recording.graph, nullptr));
  }
}

// Recorded launches know the old memory, so they are recorded anew.
void CudaBackend::Grow(Buffer& buffer, int64_t bytes) {
  if (buffer.bytes() >= bytes) return;
  CHECK(!capturing_) << "scratch grows to " << bytes << " bytes while ops are recorded";
  Wait();
  ForgetGraphs();
  buffer = Buffer();
  auto grown = Allocate(bytes);
  if (!grown.ok()) throw std::runtime_error(std::string(grown.status().message()));
  buffer = *std::move(grown);
}

float* CudaBackend::Partial(int64_t floats) {
  Grow(partial_, floats * int64_t{sizeof(float)});
  return static_cast<float*>(partial_.data());
}

uint32_t* CudaBackend::Tickets(int64_t count) {
  Grow(tickets_, count * int64_t{sizeof(uint32_t)});
  return static_cast<uint32_t*>(tickets_.data());
}

void CudaBackend::Flush() {
  if (const auto add = std::exchange(add_, std::nullopt)) {
    const cuda::AddParams p = {MatrixFrom<float>(add->x), MatrixFrom<const float>(add->y), Int(add->x.cols)};
    Launch(cuda::kAdd, RowGrid(add->x), 0, p);
  }
  if (const auto norm = std::exchange(norm_, std::nullopt)) {
    Launch(cuda::kNorm, {norm->params.rows}, norm->params.features * int64_t{sizeof(float)}, norm->params);
  }
  if (const auto keys = std::exchange(keys_, std::nullopt)) {
    Launch(keys->kv.dtype == DType::kFloat16 ? cuda::kWriteKvF16 : cuda::kWriteKvF32,
           {1, keys->kv.heads, keys->rows.rows()}, 0, ParamsOf(*keys, 0));
  }
}

void CudaBackend::Embed(Tensor y, Tensor ids, const EmbeddingWeights& table, int64_t offset, bool accumulate) {
  CheckEmbed(y, ids, table);
  Flush();
  const cuda::EmbedParams p = {MatrixFrom<float>(y),
                               VectorFrom<int32_t>(ids),
                               table.weight.data,
                               table.weight.rows,
                               table.weight.stride,
                               offset,
                               VectorFrom<float>(table.scale),
                               Int(y.cols),
                               accumulate,
                               TypeOf(table.weight.dtype)};
  Launch(cuda::kEmbed, RowGrid(y), 0, p);
}

void CudaBackend::Draw(Tensor tokens, Tensor bests, Tensor logits, Tensor draws, Candidates candidates) {
  CheckDraw(tokens, bests, logits, draws, candidates);
  Flush();
  const cuda::DrawParams p = {VectorFrom<int32_t>(tokens),
                              MatrixFrom<float>(bests),
                              MatrixFrom<const float>(logits),
                              MatrixFrom<const int32_t>(draws),
                              Int(logits.cols),
                              Int(candidates.first),
                              Int(std::clamp<int64_t>(candidates.end - candidates.first, 0, logits.cols))};
  Launch(cuda::kDraw, {logits.rows}, 0, p);
}

void CudaBackend::ReadAll(Tensor memory) {
  CHECK(memory.rows == 1) << memory.rows << " rows";
  Flush();
  constexpr int64_t kBlocks = 4;  // per multiprocessor, all of them at once
  const int64_t blocks = kBlocks * device_.multiprocessors;
  Grow(partial_, blocks * cuda::kBlockThreads * int64_t{sizeof(uint64_t)});
  const cuda::ReadSumParams p = {memory.data, memory.bytes() / kVectorBytes, static_cast<uint64_t*>(partial_.data())};
  Launch(cuda::kReadSum, {blocks}, 0, p);
}

void CudaBackend::Add(Tensor x, Tensor y) {
  CheckAdd(x, y);
  Flush();
  add_ = {x, y};
}

void CudaBackend::LayerNorm(Tensor y, Tensor x, const NormWeights& norm) {
  CheckLayerNorm(y, x, norm);
  MatrixOf<const float> add = {};
  if (add_.has_value() && SameView(add_->x, x)) {
    add = MatrixFrom<const float>(add_->y);
    add_.reset();
  }
  Flush();
  norm_ = {{MatrixFrom<float>(y), MatrixFrom<float>(x), add, VectorFrom<float>(norm.weight),
            VectorFrom<float>(norm.bias), Int(x.rows), Int(x.cols), norm.epsilon},
           y,
           x};
}

void CudaBackend::GatherRows(Tensor y, Tensor x, Tensor ids) {
  CheckGatherRows(y, x, ids);
  Flush();
  const cuda::GatherRowsParams p = {MatrixFrom<float>(y), MatrixFrom<const float>(x), VectorFrom<int32_t>(ids),
                                    Int(x.cols)};
  Launch(cuda::kGatherRows, RowGrid(y), 0, p);
}

void CudaBackend::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                         const Ride& ride) {
  CheckLinear(y, x, w, group, ride);
  Flush();
  if (TakesGemm(x, w, selected)) {
    Gemm(y, x, w);
    if (ride.w != nullptr) Multiply({.y = ride.y, .x = x, .w = *ride.w});
    return;
  }
  if (w.layout == LinearWeights::Layout::kInputRows) {
    Sum(y, x, w, selected, group, /*skip_zeros=*/false, {});
    return;
  }
  // What rides along shares a launch if it is int8, as predictors are.
  const bool shares = ride.w != nullptr && ride.w->weight.dtype == DType::kInt8;
  Multiply({.y = y,
            .x = x,
            .w = w,
            .selected = SelectionFrom(selected, /*masks=*/false),
            .group = group,
            .ride = shares ? ride : Ride()});
  if (ride.w != nullptr && !shares) Multiply({.y = ride.y, .x = x, .w = *ride.w});
}

// A block takes as much of x as lets two of them share a multiprocessor.
cuda::OutputRows CudaBackend::RowsOf(const LinearWeights& w, const Tensor& y, int64_t rows) const {
  CHECK(w.outputs() * w.inputs() > 0 && w.outputs() * w.weight.stride <= UINT32_MAX)
      << w.outputs() << " outputs of " << w.inputs() << " inputs";
  const int64_t window = 4 * kVectorBytes / SizeOf(w.weight.dtype);
  const int64_t range = DivideUp(DivideUp(w.inputs(), window), cuda::kWarps);
  const int64_t room = std::min<int64_t>(device_.shared_bytes_per_block,
                                         device_.shared_bytes_per_multiprocessor / kBlocksPerMultiprocessor - 1024) -
                       kLinearStaticBytes;
  const int64_t fit = room / (cuda::kWarps * rows * cuda::kLinearXBytes);
  return {w.weight.data,        w.weight.stride,  VectorFrom<float>(w.bias), VectorFrom<float>(w.scale),
          MatrixFrom<float>(y), Int(w.outputs()), HasVectors(w.weight),      Int(std::clamp<int64_t>(fit, 1, range))};
}

void CudaBackend::Multiply(const Products& job) {
  constexpr cuda::Kernel kKernels[] = {cuda::kLinearF32, cuda::kLinearF16, cuda::kLinearBF16, cuda::kLinearI8};
  constexpr cuda::Kernel kChunkedKernels[] = {cuda::kLinearF32, cuda::kLinearF16Chunked, cuda::kLinearBF16Chunked,
                                              cuda::kLinearI8Chunked};
  constexpr int64_t kMostInt8Inputs = 128 << 10;  // whose products with halves of integers add up in int32
  const DType dtype = job.w.weight.dtype;
  const bool int8 = dtype == DType::kInt8, rides = job.ride.w != nullptr;
  CHECK((!int8 && !rides) || job.x.cols <= kMostInt8Inputs) << job.x.cols << " inputs of int8 weights";
  const int64_t rows = std::min<int64_t>(job.x.rows, cuda::kLinearRows);
  const int64_t groups = DivideUp(job.x.rows, cuda::kLinearRows);
  if (groups == 0) return;

  cuda::LinearParams p = {};
  p.x = MatrixFrom<const float>(job.x);
  p.rows = Int(job.x.rows);
  p.inputs = Int(job.x.cols);
  p.x_vectors = HasVectors(job.x);
  p.relu = job.relu;
  p.group = Int(job.group);
  p.w = RowsOf(job.w, job.y, rows);
  p.selected = job.selected;
  p.cleared = VectorFrom<int32_t>(job.cleared);
  p.cleared_count = Int(job.cleared.cols);

  const int64_t window = 4 * kVectorBytes / SizeOf(dtype);
  const bool chunked = dtype != DType::kFloat32 && p.w.chunk * cuda::kWarps * window < p.inputs;
  const int64_t tiles = !chunked ? 1 : int8 ? cuda::kChunkedInt8Tiles : cuda::kChunkedTiles;
  const int64_t passes = DivideUp(job.w.outputs(), cuda::kLinearOutputs * tiles);
  const int64_t most_blocks = std::max<int64_t>(1, kBlocksPerMultiprocessor * device_.multiprocessors / groups);
  const int64_t passes_of_block = DivideUp(passes, most_blocks);  // alike, so that blocks end together
  int64_t blocks = DivideUp(passes, passes_of_block), chunk = p.w.chunk;
  if (rides) {
    const int64_t ride_tiles = chunked ? cuda::kChunkedInt8Tiles : 1;
    p.ride = RowsOf(*job.ride.w, job.ride.y, rows);
    p.ride_blocks = Int(DivideUp(DivideUp(p.ride.outputs, cuda::kLinearOutputs * ride_tiles), passes_of_block));
    blocks += p.ride_blocks;
    chunk = std::max<int64_t>(chunk, p.ride.chunk);
  }
  const cuda::WeightType type = TypeOf(dtype);
  Launch(chunked ? kChunkedKernels[type] : kKernels[type], {groups, blocks},
         chunk * cuda::kWarps * rows * cuda::kLinearXBytes, p);
}

// Segments of inputs depend on their number alone: they order the sums.
// In two products, of the upper and the lower halves of x, so that x keeps its precision.
void CudaBackend::Gemm(Tensor y, Tensor x, const LinearWeights& w, bool relu, Tensor cleared) {
  const bool bfloat16 = w.weight.dtype == DType::kBFloat16;
  const int64_t stride = RoundUp(x.cols, kVectorBytes / SizeOf(w.weight.dtype));
  Grow(halves_, 2 * x.rows * stride * SizeOf(w.weight.dtype));
  auto* const halves = static_cast<uint16_t*>(halves_.data());
  const cuda::SplitParams split = {MatrixFrom<const float>(x),         {halves, stride},
                                   {halves + x.rows * stride, stride}, Int(x.cols),
                                   VectorFrom<int32_t>(cleared),       Int(cleared.cols)};
  Launch(bfloat16 ? cuda::kSplitBF16 : cuda::kSplitF16, RowGrid(x), 0, split);
  for (const bool low : {false, true}) {
    DejavuCudaGemm gemm = {};
    gemm.a = low ? split.low.data : split.high.data;
    gemm.b = w.weight.data;
    gemm.c = VectorFrom<float>(y);
    gemm.m = x.rows;
    gemm.n = w.outputs();
    gemm.k = w.inputs();
    gemm.a_stride = stride;
    gemm.b_stride = w.weight.stride;
    gemm.c_stride = y.stride;
    gemm.bfloat16 = bfloat16;
    gemm.b_is_kn = w.layout == LinearWeights::Layout::kInputRows;
    gemm.accumulate = low;
    Try(module_.gemm(context_->context, &gemm), "product of many rows");
  }
  if (w.bias.empty() && !relu) return;
  const cuda::FinishGemmParams finish = {MatrixFrom<float>(y), VectorFrom<float>(w.bias), Int(y.cols), relu};
  Launch(cuda::kFinishGemm, RowGrid(y), 0, finish);
}

void CudaBackend::Sum(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                      bool skip_zeros, Tensor active) {
  struct Variant {
    cuda::Kernel kernel;
    int64_t rows;
  };
  constexpr Variant kVariants[][3] = {
      {{cuda::kSumF32x1, 1}, {cuda::kSumF32x4, 4}, {cuda::kSumF32x8, 8}},
      {{cuda::kSumF16x1, 1}, {cuda::kSumF16x4, 4}, {cuda::kSumF16x8, 8}},
      {{cuda::kSumBF16x1, 1}, {cuda::kSumBF16x4, 4}, {cuda::kSumBF16x8, 8}},
      {{cuda::kSumI8x1, 1}, {cuda::kSumI8x4, 4}, {cuda::kSumI8x4, 4}},
  };
  const auto& variants = kVariants[TypeOf(w.weight.dtype)];
  const Variant& variant = variants[x.rows == 1 ? 0 : x.rows <= variants[1].rows ? 1 : 2];
  const int64_t slab = 32 * kVectorBytes / SizeOf(w.weight.dtype), slabs = DivideUp(w.outputs(), slab);
  const int64_t segment = RoundUp(DivideUp(w.inputs(), kSumSegments), cuda::kSumSegment);
  const int64_t segments = DivideUp(w.inputs(), segment);
  const int64_t groups_at_once = kRowsAtOnce / variant.rows;
  CHECK(segment <= UINT16_MAX) << w.inputs() << " inputs";
  const int64_t shared =
      std::max(segment * variant.rows, cuda::kWarps * variant.rows * slab) * int64_t{sizeof(float)} + 3 * segment;

  cuda::SumParams p = {};
  p.x = MatrixFrom<const float>(x);
  p.y = MatrixFrom<float>(y);
  p.weight = w.weight.data;
  p.stride = w.weight.stride;
  p.bias = VectorFrom<float>(w.bias);
  p.scale = VectorFrom<float>(w.scale);
  p.selected = SelectionFrom(selected, selected.masks.rows >= x.rows);
  p.active = VectorFrom<int32_t>(active);
  p.counted = Int(std::max<int64_t>(0, active.cols - 1));
  p.rows = Int(x.rows);
  p.inputs = Int(w.inputs());
  p.outputs = Int(w.outputs());
  p.group = Int(group);
  p.segment = Int(segment);
  p.vectors = HasVectors(w.weight);
  p.skip_zeros = skip_zeros;
  for (int64_t row = 0; row < x.rows; row += groups_at_once * variant.rows) {
    const int64_t groups = std::min(groups_at_once, DivideUp(x.rows - row, variant.rows));
    p.first_row = Int(row);
    p.tickets = Tickets(groups * slabs);
    p.partial = Partial(groups * segments * variant.rows * slabs * slab);
    Launch(variant.kernel, {groups, slabs, segments}, shared, p);
    p.active = nullptr;
  }
}

cuda::AttentionParams CudaBackend::ParamsOf(const Keys& keys, int64_t first_row) {
  const KvLayer& kv = keys.kv;
  CHECK(kv.head_dim <= cuda::kMostHeadDim) << "heads of " << kv.head_dim << " features";
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  constexpr int32_t kPiece = 8;
  cuda::AttentionParams p = {};
  p.qkv = MatrixFrom<const float>(keys.qkv);
  p.qkv.data += first_row * p.qkv.stride;
  p.keys = kv.keys;
  p.values = kv.values;
  p.positions = VectorFrom<int32_t>(keys.rows.positions) + first_row;
  p.sequences = VectorFrom<int32_t>(keys.rows.sequences) + first_row;
  p.block_table = MatrixFrom<const int32_t>(keys.rows.block_table);
  p.heads = kv.heads;
  p.head_dim = kv.head_dim;
  p.block_tokens = kv.block_tokens;
  p.vectors = kv.block_tokens % kPiece == 0 && kv.head_dim % kPiece == 0 && aligned(kv.keys) && aligned(kv.values);
  return p;
}

void CudaBackend::WriteKv(const KvLayer& kv, Tensor qkv, const RowTable& rows) {
  CheckWriteKv(kv, qkv, rows);
  Flush();
  keys_ = {kv, qkv, rows};
}

void CudaBackend::Attention(Tensor context, Tensor qkv, const KvLayer& kv, const RowTable& rows, float scale,
                            const Selection& heads) {
  CheckAttention(context, qkv, kv, rows, heads);
  const bool writes =
      keys_.has_value() && rows.rows() <= kFusedRows && keys_->kv.keys == kv.keys && keys_->kv.values == kv.values &&
      SameView(keys_->qkv, qkv) && SameView(keys_->rows.positions, rows.positions) &&
      SameView(keys_->rows.sequences, rows.sequences) && SameView(keys_->rows.block_table, rows.block_table);
  if (writes) keys_.reset();
  Flush();
  const int64_t splits = DivideUp(rows.block_table.cols * kv.block_tokens, cuda::kSplitPositions);
  for (int64_t row = 0; row < rows.rows(); row += kRowsAtOnce) {
    const int64_t n = std::min(kRowsAtOnce, rows.rows() - row);
    cuda::AttentionParams p = ParamsOf({kv, qkv, rows}, row);
    p.context = MatrixFrom<float>(context);
    p.context.data += row * p.context.stride;
    p.rows = Int(n);
    p.write = writes;
    p.scale = scale;
    p.selected = SelectionFrom(heads, /*masks=*/true, row);
    p.tickets = Tickets(n * kv.heads);
    p.partial = Partial(n * kv.heads * splits * (kv.head_dim + 2));
    const bool half = kv.dtype == DType::kFloat16;
    if (rows.rows() > kFusedRows) {
      Launch(half ? cuda::kPromptAttentionF16 : cuda::kPromptAttentionF32,
             {splits, kv.heads, DivideUp(n, cuda::kPromptRows)}, 0, p);
    } else {
      Launch(half ? cuda::kAttentionF16 : cuda::kAttentionF32, {splits, kv.heads, n}, 0, p);
    }
  }
}

void CudaBackend::Select(const Selection& selection, Tensor counts, Tensor a, const SelectorWeights& w, Tensor points) {
  CheckSelect(selection, counts, a, w, points);
  if (norm_.has_value() && (Overlap(norm_->y, a) || Overlap(norm_->x, a))) Flush();
  cuda::NormSelectParams p = {};
  int64_t norm_bytes = 0;
  if (norm_.has_value()) {
    p.norm = norm_->params;
    norm_bytes = p.norm.features * int64_t{sizeof(float)};
    norm_.reset();
  }
  Flush();
  CHECK(w.b.stride % 4 == 0 && reinterpret_cast<uintptr_t>(w.b.data) % 4 == 0) << "b of Select is not aligned";
  const bool single = a.rows == 1;
  const int64_t rows_of_block = single ? 1 : 8, groups = DivideUp(a.rows, rows_of_block);
  p.select = {MatrixFrom<const float>(a),
              MatrixFrom<const int8_t>(w.b),
              MatrixFrom<const uint16_t>(w.thresholds),
              VectorFrom<int32_t>(w.ranks),
              VectorFrom<int32_t>(points),
              MatrixFrom<int32_t>(selection.masks),
              VectorFrom<int32_t>(selection.indices),
              VectorFrom<int32_t>(selection.count),
              VectorFrom<int32_t>(counts),
              Int(a.rows),
              Int(w.outputs),
              Int(w.b.cols / 32),
              Tickets(1)};
  const int64_t sums_bytes = cuda::kWarps * rows_of_block * cuda::kSelectColumns * int64_t{sizeof(int32_t)};
  Launch(single ? cuda::kNormSelect1 : cuda::kNormSelect8,
         {p.norm.rows + groups * DivideUp(w.b.cols, cuda::kSelectColumns)}, std::max(sums_bytes, norm_bytes), p);
}

void CudaBackend::Mlp(Tensor y, Tensor x, const MlpWeights& w, const Selection& neurons, bool skip_zeros, Tensor hidden,
                      Tensor active) {
  CheckMlp(y, x, w, neurons, hidden, active);
  Flush();
  if (TakesGemm(x, w.up, neurons) && TakesGemm(x, w.down, neurons)) {
    Gemm(hidden, x, w.up, /*relu=*/true, active);
    if (!active.empty()) {
      const cuda::CountActiveParams p = {MatrixFrom<const float>(hidden), VectorFrom<int32_t>(active),
                                         Int(active.cols - 1), Int(hidden.rows), Int(hidden.cols)};
      Launch(cuda::kCountActive, {DivideUp(hidden.cols, cuda::kBlockThreads)}, 0, p);
    }
    Gemm(y, hidden, w.down);
    return;
  }
  Multiply({.y = hidden,
            .x = x,
            .w = w.up,
            .selected = SelectionFrom(neurons, /*masks=*/true),
            .relu = true,
            .cleared = active});
  Sum(y, hidden, w.down, neurons, 1, skip_zeros, active);
}

void CudaBackend::Audit(Tensor result, Tensor x, const LinearWeights& up, Tensor worth, const Selection& neurons,
                        Tensor hidden) {
  CheckAudit(result, x, up, worth, neurons, hidden);
  Flush();
  if (TakesGemm(x, up, {})) {
    Gemm(hidden, x, up, /*relu=*/true);
  } else {
    Multiply({.y = hidden, .x = x, .w = up, .relu = true});
  }
  const cuda::AuditParams p = {MatrixFrom<float>(result), MatrixFrom<const float>(hidden), VectorFrom<float>(worth),
                               MatrixFrom<const int32_t>(neurons.masks), Int(up.outputs())};
  Launch(cuda::kAudit, {x.rows}, 0, p);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const DejavuCudaModule* module, int device) {
  if (module->abi_version != DEJAVU_CUDA_ABI_VERSION) {
    return absl::UnavailableError(absl::StrCat("cuda: the module speaks version ", module->abi_version,
                                               " of the interface, this program ", DEJAVU_CUDA_ABI_VERSION));
  }
  auto context = std::make_shared<Context>();
  context->module = module;
  if (module->open(device, &context->context, &context->device) != 0) {
    context->context = nullptr;
    return absl::UnavailableError(absl::StrCat("cuda: ", module->error()));
  }
  auto backend = std::make_unique<CudaBackend>(std::move(context));
  RETURN_IF_ERROR(backend->Prepare());
  return backend;
}

}  // namespace dejavu
