#include "emulated_module.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "emulated_context.h"
#include "emulated_launches.h"
#include "emulated_memory.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {
namespace {

thread_local std::string last_error;

int Result(const absl::Status& status) {
  if (!status.ok()) last_error = std::string(status.message());
  return status.ok() ? 0 : status.code() == absl::StatusCode::kDeadlineExceeded ? DEJAVU_CUDA_PEER_LOST : 1;
}

absl::Status Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info) {
  if (device < 0 || device >= GetEmulation().devices) {
    return Refuse("no device ", device, ": the emulator has ", GetEmulation().devices);
  }
  *context = new DejavuCudaContext;
  (*context)->number = device;
  *info = {.name = "emulated device",
           .compute_major = 9,
           .compute_minor = 0,
           .multiprocessors = 4,
           .shared_bytes_per_block = kMostShared,
           .shared_bytes_per_multiprocessor = 228 << 10,
           .l2_bytes = 50 << 20,
           .memory_bytes = GetEmulation().memory_bytes,
           .memory_free_bytes = GetEmulation().memory_bytes,
           .driver_version = 13000,
           .runtime_version = 13000};
  return absl::OkStatus();
}

// What was not freed is left for LeakSanitizer to tell.
void Close(DejavuCudaContext* context) { delete context; }

absl::Status Synchronize(DejavuCudaContext* context) {
  RETURN_IF_ERROR(CheckNoCapture(context, "synchronize"));
  return Wait(context);
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
  ++GetEmulation().replays;
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

absl::Status GroupId(char* id) {
  static std::atomic<int> last = 0;
  if (GetEmulation().refuse_groups) return Refuse("groups of GPUs need NCCL, which the test took away");
  if (id != nullptr) std::snprintf(id, DEJAVU_CUDA_GROUP_ID_BYTES, "emulated group %d", ++last);
  return absl::OkStatus();
}

absl::Status JoinGroup(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
                       int64_t* memory_free_bytes) {
  RETURN_IF_ERROR(CheckNoCapture(context, "join_group"));
  if (context->group != nullptr) return Refuse("join_group: the context is in a group");
  const auto group = EmulatedGroup::Of(id);
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
  if (!Within(context->device, data, count * int64_t{sizeof(float)})) {
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
int Call(Arguments... arguments) {
  return Result(kFunction(arguments...));
}

constexpr DejavuCudaModule kModule = {
    .abi_version = DEJAVU_CUDA_ABI_VERSION,
    .error = [] { return last_error.c_str(); },
    .open = Call<Open>,
    .close = Close,
    .allocate = Call<Allocate>,
    .free = Call<Free>,
    .allocate_pinned = Call<AllocatePinned>,
    .free_pinned = Call<FreePinned>,
    .upload = Call<Upload>,
    .fetch = Call<Fetch>,
    .download = Call<Download>,
    .synchronize = Call<Synchronize>,
    .launch = Call<LaunchKernel>,
    .gemm = Call<Gemm>,
    .kernel_info = Call<KernelInfo>,
    .begin_capture = Call<BeginCapture>,
    .end_capture = Call<EndCapture>,
    .replay = Call<Replay>,
    .free_graph = FreeGraph,
    .stamp = Call<Stamp>,
    .wait = Call<WaitFor>,
    .elapsed_ms = Call<ElapsedMs>,
    .group_id = Call<GroupId>,
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

const DejavuCudaModule* EmulatedModule() { return &kModule; }

Emulation& GetEmulation() {
  static Emulation emulation;
  return emulation;
}

void Emulation::ResetCounts() {
  std::ranges::fill(launches, 0);
  all_launches = gemms = all_reduces = replays = waits_behind = 0;
  uploads = fetches = fetched_bytes = 0;
}

}  // namespace dejavu::simt
