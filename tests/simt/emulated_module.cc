#include "emulated_module.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"

namespace {

using dejavu::CondVar;
using dejavu::Mutex;
using dejavu::MutexLock;
using dejavu::simt::GetEmulation;
using dejavu::simt::ModuleKernel;
using dejavu::simt::ModuleKernels;

struct Copy {
  char* to;
  const char* from;
  int64_t to_stride, from_stride, row_bytes, rows;
};

using Memory = std::map<const char*, int64_t>;  // bytes by begin
using Work = std::function<absl::Status()>;

// Contexts that add up.
class Group {
 public:
  // Returns when all have joined.
  absl::Status Join(int32_t device, int32_t rank, int32_t size, double seconds) {
    MutexLock lock(mutex_);
    if (!devices_.insert(device).second) {
      return absl::FailedPreconditionError(absl::StrCat("rank ", rank, ": another rank has device ", device));
    }
    parts_.resize(size);
    changed_.NotifyAll();
    return Wait(seconds, [&] { return std::ssize(devices_) == size; });
  }

  // In the order of ranks.
  absl::Status AllReduce(int32_t rank, float* data, int64_t count, double seconds) {
    MutexLock lock(mutex_);
    const int64_t before = done_;
    parts_[rank].assign(data, data + count);
    if (++come_ == parts_.size()) {
      sum_ = parts_[0];
      for (size_t i = 1; i < parts_.size(); ++i) {
        CHECK(parts_[i].size() == sum_.size()) << "ranks add up " << sum_.size() << " and " << parts_[i].size();
        std::ranges::transform(sum_, parts_[i], sum_.begin(), std::plus<>());
      }
      come_ = 0;
      ++done_;
      changed_.NotifyAll();
    }
    RETURN_IF_ERROR(Wait(seconds, [&] { return done_ > before; }));
    std::ranges::copy(sum_, data);  // the next one is not done before this rank has come to it
    return absl::OkStatus();
  }

 private:
  template <typename Come>
  absl::Status Wait(double seconds, const Come& come) {
    using Clock = std::chrono::steady_clock;
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(std::min(seconds, 1e6)));
    while (!come()) {
      if (!changed_.WaitUntil(mutex_, deadline) && !come()) {
        return absl::DeadlineExceededError(absl::StrCat("a rank did not come within ", seconds, " s"));
      }
    }
    return absl::OkStatus();
  }

  Mutex mutex_;  // guards the rest
  CondVar changed_;
  std::set<int32_t> devices_;
  std::vector<std::vector<float>> parts_;  // [rank] of the all-reduce under way
  size_t come_ = 0;                        // to it
  int64_t done_ = 0;
  std::vector<float> sum_;  // of the last one
};

}  // namespace

struct DejavuCudaGraph {
  std::vector<Work> work;
  int64_t launches = 0, gemms = 0, all_reduces = 0, asides = 0;
};

struct DejavuCudaContext {
  Memory device, pinned;
  int64_t device_bytes = 0;
  absl::Status failure;  // of a kernel: whatever comes after it fails
  Work held;             // the last launch, perhaps
  std::unique_ptr<DejavuCudaGraph> capture;
  bool has_blas = false;  // opened by the first gemm, which must not be captured
  int32_t number = 0;     // of the device
  std::shared_ptr<Group> group;
  int32_t rank = 0;
  float* aside = nullptr;  // what waits for join_all_reduce
  int64_t aside_count = 0;
  double group_limit_s = INFINITY;
  int64_t graphs_in_group = 0;  // that hold all-reduces
  struct Event {
    std::chrono::steady_clock::time_point time;
    size_t fetched = 0, uploaded = 0;  // rows before it, since the beginning
  };
  Event events[66];
  int32_t last_event = -1;

  // Until the host waits: rows on their way to pinned memory, and what pinned memory held when it was uploaded.
  struct Row {
    char* host;
    std::vector<char> bytes;
  };
  std::deque<Row> fetched, uploaded;
  size_t fetched_before = 0, uploaded_before = 0;  // rows that the host has waited for
};

namespace {

thread_local std::string last_error;
Mutex emulation_mutex;  // for Emulation's counts and fail_next_launch, where contexts have threads of their own

int Result(const absl::Status& status) {
  if (!status.ok()) last_error = std::string(status.message());
  return status.ok() ? 0 : status.code() == absl::StatusCode::kDeadlineExceeded ? DEJAVU_CUDA_PEER_LOST : 1;
}

absl::Status Refuse(const auto&... message) { return absl::FailedPreconditionError(absl::StrCat(message...)); }

bool Within(const Memory& memory, const char* begin, int64_t bytes) {
  auto block = memory.upper_bound(begin);
  if (block == memory.begin()) return false;
  --block;
  return begin + bytes <= block->first + block->second;
}

bool Within(const Memory& memory, const char* begin, int64_t stride, const Copy& copy) {
  return Within(memory, begin, (copy.rows - 1) * stride + copy.row_bytes);
}

// A launch that was held back (RunKernel) comes before anything but a launch.
absl::Status RunHeld(DejavuCudaContext* context) {
  if (context->held != nullptr && context->failure.ok()) context->failure = std::exchange(context->held, nullptr)();
  return context->failure;
}

// What the host finds once it has waited for so many rows.
absl::Status Arrive(DejavuCudaContext* context, size_t fetched, size_t uploaded) {
  RETURN_IF_ERROR(RunHeld(context));
  for (; context->fetched_before < fetched; ++context->fetched_before) {
    std::ranges::copy(context->fetched.front().bytes, context->fetched.front().host);
    context->fetched.pop_front();
  }
  for (; context->uploaded_before < uploaded; ++context->uploaded_before) {
    const auto row = std::move(context->uploaded.front());
    context->uploaded.pop_front();
    if (!std::equal(row.bytes.begin(), row.bytes.end(), row.host)) {
      return Refuse("pinned memory was changed while an upload from it was under way");
    }
  }
  return context->failure;
}

absl::Status Wait(DejavuCudaContext* context) {
  RETURN_IF_ERROR(RunHeld(context));
  return Arrive(context, context->fetched_before + context->fetched.size(),
                context->uploaded_before + context->uploaded.size());
}

// Calls that wait for the device, or allocate, have no place in a graph.
absl::Status CheckNothingAside(const DejavuCudaContext* context, const char* what) {
  return context->aside == nullptr ? absl::OkStatus() : Refuse(what, " before join_all_reduce");
}

absl::Status CheckNoCapture(const DejavuCudaContext* context, const char* what) {
  RETURN_IF_ERROR(CheckNothingAside(context, what));
  return context->capture == nullptr ? context->failure : Refuse(what, " during a capture");
}

absl::Status Submit(DejavuCudaContext* context, Work work) {
  RETURN_IF_ERROR(context->failure);
  if (context->capture == nullptr) return work();
  context->capture->work.push_back(std::move(work));
  return absl::OkStatus();
}

int Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info) {
  if (device < 0 || device >= GetEmulation().devices) {
    return Result(Refuse("no device ", device, ": the emulator has ", GetEmulation().devices));
  }
  *context = new DejavuCudaContext;
  (*context)->number = device;
  *info = {.name = "emulated device",
           .compute_major = 9,
           .compute_minor = 0,
           .multiprocessors = 4,
           .shared_bytes_per_block = dejavu::simt::kMostShared,
           .shared_bytes_per_multiprocessor = 228 << 10,
           .l2_bytes = 50 << 20,
           .memory_bytes = GetEmulation().memory_bytes,
           .memory_free_bytes = GetEmulation().memory_bytes,
           .driver_version = 13000,
           .runtime_version = 13000};
  return 0;
}

// What was not freed is left for LeakSanitizer to tell.
void Close(DejavuCudaContext* context) { delete context; }

absl::Status AllocateIn(Memory& blocks, int64_t bytes, int fill, void** memory) {
  if (posix_memalign(memory, 256, bytes) != 0) return Refuse("no host memory for ", bytes, " bytes");
  std::memset(*memory, fill, bytes);
  blocks[static_cast<char*>(*memory)] = bytes;
  return absl::OkStatus();
}

// Returns how many bytes were there.
absl::StatusOr<int64_t> FreeFrom(Memory& blocks, void* memory) {
  const auto block = blocks.find(static_cast<char*>(memory));
  if (block == blocks.end()) return Refuse("freed memory that was not allocated");
  std::free(memory);
  return blocks.extract(block).mapped();
}

absl::Status Allocate(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_ERROR(CheckNoCapture(context, "allocate"));
  const int64_t free_bytes = GetEmulation().memory_bytes - context->device_bytes;
  if (bytes > free_bytes) return Refuse("out of memory: ", bytes, " bytes asked for, ", free_bytes, " free");
  RETURN_IF_ERROR(AllocateIn(context->device, bytes, 0, memory));
  context->device_bytes += bytes;
  return absl::OkStatus();
}

absl::Status Free(DejavuCudaContext* context, void* memory) {
  RunHeld(context).IgnoreError();  // a later call tells
  ASSIGN_OR_RETURN(const int64_t bytes, FreeFrom(context->device, memory));
  context->device_bytes -= bytes;
  return absl::OkStatus();
}

absl::Status AllocatePinned(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_ERROR(CheckNoCapture(context, "allocate_pinned"));
  return AllocateIn(context->pinned, bytes, 0xFF, memory);
}

absl::Status FreePinned(DejavuCudaContext* context, void* memory) {
  const absl::Status waited = Wait(context);  // for copies that may use it
  RETURN_IF_ERROR(FreeFrom(context->pinned, memory).status());
  return waited;
}

absl::Status Upload(DejavuCudaContext* context, const Copy& copy) {
  if (!Within(context->device, copy.to, copy.to_stride, copy)) return Refuse("upload: the target is not device memory");
  const bool pinned = Within(context->pinned, copy.from, copy.from_stride, copy);
  if (!pinned) RETURN_IF_ERROR(CheckNoCapture(context, "upload of pageable memory"));
  return Submit(context, [=] {
    RETURN_IF_ERROR(RunHeld(context));
    for (int64_t row = 0; row < copy.rows; ++row) {
      const char* from = copy.from + row * copy.from_stride;
      std::copy_n(from, copy.row_bytes, copy.to + row * copy.to_stride);
      if (pinned)
        context->uploaded.push_back({const_cast<char*>(from), std::vector<char>(from, from + copy.row_bytes)});
    }
    return absl::OkStatus();
  });
}

absl::Status Download(DejavuCudaContext* context, const Copy& copy) {
  RETURN_IF_ERROR(CheckNoCapture(context, "download"));
  if (!Within(context->device, copy.from, copy.from_stride, copy)) {
    return Refuse("download: the source is not device memory");
  }
  RETURN_IF_ERROR(Wait(context));
  for (int64_t row = 0; row < copy.rows; ++row) {
    std::copy_n(copy.from + row * copy.from_stride, copy.row_bytes, copy.to + row * copy.to_stride);
  }
  return absl::OkStatus();
}

absl::Status Fetch(DejavuCudaContext* context, const Copy& copy) {
  if (!Within(context->device, copy.from, copy.from_stride, copy))
    return Refuse("fetch: the source is not device memory");
  if (!Within(context->pinned, copy.to, copy.to_stride, copy)) return Download(context, copy);
  return Submit(context, [=] {
    RETURN_IF_ERROR(RunHeld(context));
    for (int64_t row = 0; row < copy.rows; ++row) {
      const char* from = copy.from + row * copy.from_stride;
      char* to = copy.to + row * copy.to_stride;
      context->fetched.push_back({to, std::vector<char>(from, from + copy.row_bytes)});
      std::fill_n(to, copy.row_bytes, '\xFF');
    }
    return absl::OkStatus();
  });
}

// The table's three copies differ in the direction alone.
template <absl::Status (*kCopy)(DejavuCudaContext*, const Copy&)>
int CopyRows(DejavuCudaContext* context, void* to, int64_t to_stride, const void* from, int64_t from_stride,
             int64_t row_bytes, int64_t rows) {
  if (row_bytes <= 0 || rows <= 0) return 0;
  return Result(kCopy(context, {.to = static_cast<char*>(to),
                                .from = static_cast<const char*>(from),
                                .to_stride = to_stride,
                                .from_stride = from_stride,
                                .row_bytes = row_bytes,
                                .rows = rows}));
}

absl::Status Synchronize(DejavuCudaContext* context) {
  RETURN_IF_ERROR(CheckNoCapture(context, "synchronize"));
  return Wait(context);
}

// Under a drawn order about every other launch is held back. If the next one may overlap with it, that one begins
// first.
absl::Status RunKernel(DejavuCudaContext* context, int32_t number, const std::vector<char>& params,
                       dejavu::simt::Launch launch) {
  auto& emulation = GetEmulation();
  const ModuleKernel& kernel = ModuleKernels()[number];
  {
    MutexLock lock(emulation_mutex);
    if (emulation.failing_device == context->number && std::exchange(emulation.fail_next_launch, false)) {
      return context->failure =
                 absl::InternalError(absl::StrCat("kernel ", kernel.name, ": failed as the test asked for"));
    }
    ++emulation.launches[number];
    ++emulation.all_launches;
    if (emulation.order != 0) launch.order = emulation.order * 1'000'003 + emulation.all_launches;
  }
  const bool hold = std::popcount(launch.order) % 2 == 1;
  if (launch.overlaps && context->held != nullptr) {
    launch.before = std::exchange(context->held, nullptr);
    return context->failure = kernel.run(params.data(), launch);
  }
  RETURN_IF_ERROR(RunHeld(context));
  if (!hold) return context->failure = kernel.run(params.data(), launch);
  context->held = [=] { return kernel.run(params.data(), launch); };
  return absl::OkStatus();
}

absl::Status LaunchKernel(DejavuCudaContext* context, const DejavuCudaLaunch& launch) {
  if (launch.kernel < 0 || launch.kernel >= static_cast<int32_t>(ModuleKernels().size())) {
    return Refuse("no kernel has the number ", launch.kernel);
  }
  const ModuleKernel& kernel = ModuleKernels()[launch.kernel];
  if (launch.params_bytes != kernel.params_bytes) {
    return Refuse("kernel ", kernel.name, " takes ", kernel.params_bytes, " bytes of parameters, not ",
                  launch.params_bytes);
  }
  const auto* bytes = static_cast<const char*>(launch.params);
  if (context->capture != nullptr) ++context->capture->launches;
  return Submit(context,
                [context, number = launch.kernel, params = std::vector<char>(bytes, bytes + launch.params_bytes),
                 how = dejavu::simt::Launch{.grid = {launch.grid[0], launch.grid[1], launch.grid[2]},
                                            .block = {launch.block[0], launch.block[1], launch.block[2]},
                                            .shared_bytes = launch.shared_bytes,
                                            .overlaps = launch.overlaps != 0}] {
                  return RunKernel(context, number, params, how);
                });
}

void RunGemm(const DejavuCudaGemm& g) {
  const auto widen = [&](const void* matrix, int64_t at) {
    const uint16_t bits = static_cast<const uint16_t*>(matrix)[at];
    return g.bfloat16 ? dejavu::FloatFromBFloat16(bits) : dejavu::FloatFromFloat16(bits);
  };
  std::vector<float> row(g.k);
  for (int64_t i = 0; i < g.m; ++i) {
    for (int64_t k = 0; k < g.k; ++k) row[k] = widen(g.a, i * g.a_stride + k);
    for (int64_t j = 0; j < g.n; ++j) {
      float sum = g.accumulate ? g.c[i * g.c_stride + j] : 0;
      for (int64_t k = 0; k < g.k; ++k) sum += row[k] * widen(g.b, g.b_is_kn ? k * g.b_stride + j : j * g.b_stride + k);
      g.c[i * g.c_stride + j] = sum;
    }
  }
}

absl::Status Gemm(DejavuCudaContext* context, const DejavuCudaGemm& gemm) {
  if (context->capture != nullptr && !context->has_blas) return Refuse("gemm: the first one cannot be captured");
  context->has_blas = true;
  if (context->capture != nullptr) ++context->capture->gemms;
  return Submit(context, [context, gemm] {
    RETURN_IF_ERROR(RunHeld(context));
    {
      MutexLock lock(emulation_mutex);
      ++GetEmulation().gemms;
    }
    RunGemm(gemm);
    return absl::OkStatus();
  });
}

int KernelInfo(DejavuCudaContext*, int32_t kernel, DejavuCudaKernel* info) {
  if (kernel < 0 || kernel >= static_cast<int32_t>(ModuleKernels().size())) {
    return Result(Refuse("no kernel has the number ", kernel));
  }
  *info = {.name = ModuleKernels()[kernel].name,
           .registers = 0,
           .shared_bytes = 0,
           .local_bytes = 0,
           .params_bytes = static_cast<int32_t>(ModuleKernels()[kernel].params_bytes)};
  return 0;
}

absl::Status BeginCapture(DejavuCudaContext* context) {
  RETURN_IF_ERROR(CheckNoCapture(context, "begin_capture"));
  context->capture = std::make_unique<DejavuCudaGraph>();
  return absl::OkStatus();
}

absl::Status EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  if (context->capture == nullptr) return Refuse("end_capture without begin_capture");
  RETURN_IF_ERROR(CheckNothingAside(context, "end_capture"));
  {
    MutexLock lock(emulation_mutex);
    GetEmulation().captured_launches = context->capture->launches;
    GetEmulation().captured_gemms = context->capture->gemms;
    GetEmulation().captured_all_reduces = context->capture->all_reduces;
    GetEmulation().captured_asides = context->capture->asides;
  }
  *graph = GetEmulation().refuse_graphs ? nullptr : context->capture.get();
  auto captured = std::exchange(context->capture, nullptr);
  if (*graph != nullptr) {
    context->graphs_in_group += captured->all_reduces > 0;
    captured.release();
  }
  return context->failure;
}

absl::Status Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  RETURN_IF_ERROR(CheckNoCapture(context, "replay"));
  for (const Work& work : graph->work) RETURN_IF_ERROR(work());
  return absl::OkStatus();
}

absl::Status Stamp(DejavuCudaContext* context, int32_t event) {
  if (event < 0 || event >= std::ssize(context->events)) return Refuse("no event has the number ", event);
  RETURN_IF_ERROR(CheckNoCapture(context, "stamp"));
  context->last_event = event;
  context->events[event] = {std::chrono::steady_clock::now(), context->fetched_before + context->fetched.size(),
                            context->uploaded_before + context->uploaded.size()};
  return absl::OkStatus();
}

absl::Status CheckStamped(const DejavuCudaContext* context, int32_t event) {
  if (event >= 0 && event < std::ssize(context->events) &&
      context->events[event].time.time_since_epoch().count() != 0) {
    return absl::OkStatus();
  }
  return Refuse("event ", event, " has no time stamp");
}

absl::Status WaitFor(DejavuCudaContext* context, int32_t event) {
  RETURN_IF_ERROR(CheckStamped(context, event));
  RETURN_IF_ERROR(CheckNoCapture(context, "wait"));
  {
    MutexLock lock(emulation_mutex);
    GetEmulation().waits_behind += event != context->last_event;
  }
  return Arrive(context, context->events[event].fetched, context->events[event].uploaded);
}

absl::Status ElapsedMs(DejavuCudaContext* context, int32_t from, int32_t to, float* ms) {
  for (const int32_t event : {from, to}) RETURN_IF_ERROR(CheckStamped(context, event));
  RETURN_IF_ERROR(CheckNoCapture(context, "elapsed_ms"));
  *ms = std::chrono::duration<float, std::milli>(context->events[to].time - context->events[from].time).count();
  return absl::OkStatus();
}

// Those that somebody may join yet, by id.
std::shared_ptr<Group> GroupOf(const std::string& id) {
  static Mutex mutex;
  static std::map<std::string, std::weak_ptr<Group>> groups;
  MutexLock lock(mutex);
  std::shared_ptr<Group> group = groups[id].lock();
  if (group == nullptr) groups[id] = group = std::make_shared<Group>();
  return group;
}

int GroupId(char* id) {
  static std::atomic<int> last = 0;
  if (GetEmulation().refuse_groups) return Result(Refuse("groups of GPUs need NCCL, which the test took away"));
  if (id != nullptr) std::snprintf(id, DEJAVU_CUDA_GROUP_ID_BYTES, "emulated group %d", ++last);
  return 0;
}

absl::Status JoinGroup(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
                       int64_t* memory_free_bytes) {
  RETURN_IF_ERROR(CheckNoCapture(context, "join_group"));
  if (context->group != nullptr) return Refuse("join_group: the context is in a group");
  const auto group = GroupOf(id);
  RETURN_IF_ERROR(group->Join(context->number, rank, size, seconds));
  context->group = group;
  context->rank = rank;
  *memory_free_bytes = GetEmulation().memory_bytes - context->device_bytes;
  return absl::OkStatus();
}

void LeaveGroup(DejavuCudaContext* context) {
  CHECK(context->graphs_in_group == 0) << "a group is left while a graph holds its all-reduces: NCCL would wait for it";
  context->group = nullptr;
}

// One aside runs as late as it may: at the join.
absl::Status SubmitAllReduce(DejavuCudaContext* context, float* data, int64_t count) {
  if (context->capture != nullptr) ++context->capture->all_reduces;
  return Submit(context, [=] {
    RETURN_IF_ERROR(RunHeld(context));
    {
      MutexLock lock(emulation_mutex);
      ++GetEmulation().all_reduces;
    }
    return context->failure = context->group->AllReduce(context->rank, data, count, context->group_limit_s);
  });
}

absl::Status AllReduce(DejavuCudaContext* context, float* data, int64_t count, int32_t aside) {
  if (context->group == nullptr) return Refuse("all_reduce: the context is in no group");
  if (!Within(context->device, reinterpret_cast<const char*>(data), count * int64_t{sizeof(float)})) {
    return Refuse("all_reduce of what is not device memory");
  }
  RETURN_IF_ERROR(CheckNothingAside(context, "all_reduce"));
  if (!aside) return SubmitAllReduce(context, data, count);
  if (context->capture != nullptr) ++context->capture->asides;
  context->aside = data;
  context->aside_count = count;
  return absl::OkStatus();
}

absl::Status JoinAllReduce(DejavuCudaContext* context) {
  if (context->aside == nullptr) return Refuse("join_all_reduce: there is none aside");
  return SubmitAllReduce(context, std::exchange(context->aside, nullptr), context->aside_count);
}

void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  context->graphs_in_group -= graph->all_reduces > 0;
  delete graph;
}

// A function of the table: calls kFunction and keeps its message.
template <auto kFunction, typename... Arguments>
int Call(DejavuCudaContext* context, Arguments... arguments) {
  return Result(kFunction(context, arguments...));
}

constexpr DejavuCudaModule kModule = {
    .abi_version = DEJAVU_CUDA_ABI_VERSION,
    .error = [] { return last_error.c_str(); },
    .open = Open,
    .close = Close,
    .allocate = Call<Allocate>,
    .free = Call<Free>,
    .allocate_pinned = Call<AllocatePinned>,
    .free_pinned = Call<FreePinned>,
    .upload = CopyRows<Upload>,
    .fetch = CopyRows<Fetch>,
    .download = CopyRows<Download>,
    .synchronize = Call<Synchronize>,
    .launch = [](DejavuCudaContext* context,
                 const DejavuCudaLaunch* launch) { return Result(LaunchKernel(context, *launch)); },
    .gemm = [](DejavuCudaContext* context, const DejavuCudaGemm* gemm) { return Result(Gemm(context, *gemm)); },
    .kernel_info = KernelInfo,
    .begin_capture = Call<BeginCapture>,
    .end_capture = Call<EndCapture>,
    .replay = Call<Replay>,
    .free_graph = FreeGraph,
    .stamp = Call<Stamp>,
    .wait = Call<WaitFor>,
    .elapsed_ms = Call<ElapsedMs>,
    .group_id = GroupId,
    .join_group = Call<JoinGroup>,
    .leave_group = LeaveGroup,
    .all_reduce = Call<AllReduce>,
    .join_all_reduce = Call<JoinAllReduce>,
    .limit_group =
        [](DejavuCudaContext* context, double seconds) {
          context->group_limit_s = seconds;
          return 0;
        },
};

}  // namespace

namespace dejavu::simt {

const DejavuCudaModule* EmulatedModule() { return &kModule; }

Emulation& GetEmulation() {
  static Emulation emulation;
  return emulation;
}

void Emulation::ResetCounts() {
  std::ranges::fill(launches, 0);
  all_launches = gemms = all_reduces = waits_behind = 0;
}

}  // namespace dejavu::simt
