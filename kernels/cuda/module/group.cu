#include "kernels/cuda/module/group.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "kernels/base/clock.h"
#include "kernels/cuda/module/nccl_group.h"

namespace dejavu::cuda {
namespace {

constexpr double kSpinS = 0.05;  // longer than a step that decodes
constexpr std::chrono::microseconds kPoll(100);

// After which the ranks no longer do the same.
int LoseGroup(DejavuCudaContext& context, int code, const std::string& why) {
  context.failure = code;
  context.failure_text = why + "; launched last: " + context.last_launch;
  context.group->Abort();
  return Fail(code, "%s", context.failure_text.c_str());
}

// Until `query` says something else than cudaErrorNotReady. In a group what is under way may be an all-reduce that some
// rank never comes to, so the device is asked again and again.
template <typename Query>
int AwaitGroup(DejavuCudaContext& context, const Query& query, const char* tried) {
  const SteadyTime start = std::chrono::steady_clock::now();
  while (true) {
    const cudaError_t error = query();
    if (error != cudaErrorNotReady) return Check(context, error, tried);
    const double seconds = SecondsSince(start);
    if (seconds < kSpinS) continue;
    const int rank = context.group->rank(), size = context.group->size();
    const std::string trouble = context.group->Trouble();
    char why[1024] = "";
    if (!trouble.empty()) {
      snprintf(why, sizeof(why), "%s: rank %d of %d: %s", tried, rank, size, trouble.c_str());
    } else if (seconds > context.group_limit_s) {
      snprintf(why, sizeof(why), "%s: rank %d of %d waited %g s for its GPU and the other ranks", tried, rank, size,
               context.group_limit_s);
    }
    if (why[0] != '\0') return LoseGroup(context, DEJAVU_CUDA_PEER_LOST, why);
    std::this_thread::sleep_for(kPoll);
  }
}

bool HasPeers(const DejavuCudaContext& context) { return context.group != nullptr && context.group->size() > 1; }

// `to` goes on when `from` has come as far as it has been queued.
int Follow(DejavuCudaContext& context, cudaStream_t to, cudaStream_t from, cudaEvent_t event) {
  RETURN_IF_FAILED(Check(context, cudaEventRecord(event, from), "all-reduce aside"));
  return Check(context, cudaStreamWaitEvent(to, event, 0), "all-reduce aside");
}

}  // namespace

int AwaitStream(DejavuCudaContext& context, const char* tried) {
  if (!HasPeers(context)) return Check(context, cudaStreamSynchronize(context.stream), tried);
  return AwaitGroup(
      context, [&] { return cudaStreamQuery(context.stream); }, tried);
}

int AwaitEvent(DejavuCudaContext& context, cudaEvent_t event, const char* tried) {
  if (!HasPeers(context)) return Check(context, cudaEventSynchronize(event), tried);
  return AwaitGroup(
      context, [&] { return cudaEventQuery(event); }, tried);
}

int GroupId(char* id) {
  const std::string why = NcclGroup::MakeId(id);
  return why.empty() ? 0 : Fail(cudaErrorUnknown, "%s", why.c_str());
}

int JoinGroup(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
              int64_t* memory_free_bytes) {
  RETURN_IF_FAILED(Enter(*context, "joining a group"));
  if (context->group != nullptr) return Fail(cudaErrorInvalidValue, "joining a group: the context is in one");
  const std::string why = NcclGroup::Join(context->device, id, rank, size, seconds, &context->group);
  if (!why.empty()) return Fail(cudaErrorUnknown, "%s", why.c_str());
  RETURN_IF_FAILED(
      Check(*context, cudaStreamCreateWithFlags(&context->aside, cudaStreamNonBlocking), "joining a group"));
  for (cudaEvent_t* event : {&context->fork, &context->join}) {
    RETURN_IF_FAILED(Check(*context, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "joining a group"));
  }
  size_t available = 0, total = 0;
  RETURN_IF_FAILED(Check(*context, cudaMemGetInfo(&available, &total), "joining a group"));
  *memory_free_bytes = static_cast<int64_t>(available);
  return 0;
}

void LeaveGroup(DejavuCudaContext* context) {
  if (context->group == nullptr) return;
  cudaSetDevice(context->device);
  if (context->failure == 0) AwaitStream(*context, "leaving a group");
  if (context->failure != 0) context->group->Abort();
  context->group.reset();
  for (cudaEvent_t* event : {&context->fork, &context->join}) {
    if (*event != nullptr) cudaEventDestroy(*event);
    *event = nullptr;
  }
  if (context->aside != nullptr) cudaStreamDestroy(context->aside);
  context->aside = nullptr;
}

int AllReduce(DejavuCudaContext* context, float* data, int64_t count, int32_t aside) {
  RETURN_IF_FAILED(Enter(*context, "all-reduce"));
  if (context->group == nullptr) return Fail(cudaErrorInvalidValue, "all-reduce: the context is in no group");
  if (aside) RETURN_IF_FAILED(Follow(*context, context->aside, context->stream, context->fork));
  bool peer_lost = false;
  const std::string why = context->group->AllReduce(data, count, aside ? context->aside : context->stream, &peer_lost);
  if (!why.empty()) return LoseGroup(*context, peer_lost ? DEJAVU_CUDA_PEER_LOST : cudaErrorUnknown, why);
  context->last_launch = "an all-reduce";
  return 0;
}

int JoinAllReduce(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "all-reduce aside"));
  if (context->group == nullptr) return Fail(cudaErrorInvalidValue, "all-reduce: the context is in no group");
  return Follow(*context, context->stream, context->aside, context->join);
}

int LimitGroup(DejavuCudaContext* context, double seconds) {
  context->group_limit_s = seconds;
  return 0;
}

}  // namespace dejavu::cuda
