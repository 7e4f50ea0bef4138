#include "kernels/cuda/module/graphs.h"

#include <cuda_runtime.h>

#include <memory>

#include "kernels/cuda/module/group.h"

struct DejavuCudaGraph {
  ~DejavuCudaGraph() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  cudaGraphExec_t graph = nullptr;
};

namespace dejavu::cuda {

int BeginCapture(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "begin capture"));
  RETURN_IF_FAILED(
      Check(*context, cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal), "begin capture"));
  context->capturing = true;
  return 0;
}

int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  RETURN_IF_FAILED(Enter(*context, "end capture"));
  context->capturing = false;
  cudaGraph_t captured = nullptr;
  RETURN_IF_FAILED(Check(*context, cudaStreamEndCapture(context->stream, &captured), "end capture"));
  auto made = std::make_unique<DejavuCudaGraph>();
  cudaError_t error = cudaGraphInstantiate(&made->graph, captured, 0);
  cudaGraphDestroy(captured);
  // Now rather than within the first replay.
  if (error == cudaSuccess) error = cudaGraphUpload(made->graph, context->stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is not sticky
    *graph = nullptr;
    return 0;
  }
  RETURN_IF_FAILED(Check(*context, error, "instantiate a graph"));
  *graph = made.release();
  return 0;
}

int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  RETURN_IF_FAILED(Enter(*context, "replay"));
  RETURN_IF_FAILED(Check(*context, cudaGraphLaunch(graph->graph, context->stream), "replay"));
  context->last_launch = "a graph";
  return 0;
}

void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  cudaSetDevice(context->device);
  delete graph;
}

int Stamp(DejavuCudaContext* context, int32_t event) {
  RETURN_IF_FAILED(Enter(*context, "stamp"));
  if (event < 0 || event >= kEvents) return Fail(cudaErrorInvalidValue, "stamp: there is no event %d", event);
  if (context->events[event] == nullptr) {
    RETURN_IF_FAILED(Check(*context, cudaEventCreate(&context->events[event]), "stamp"));
  }
  // External: a stamp of its own in the graph, and not just an order of its launches.
  RETURN_IF_FAILED(
      Check(*context,
            cudaEventRecordWithFlags(context->events[event], context->stream,
                                     context->capturing ? cudaEventRecordExternal : cudaEventRecordDefault),
            "stamp"));
  return 0;
}

int Wait(DejavuCudaContext* context, int32_t event) {
  RETURN_IF_FAILED(Enter(*context, "wait"));
  if (event < 0 || event >= kEvents || context->events[event] == nullptr) {
    return Fail(cudaErrorInvalidValue, "wait: event %d was never stamped", event);
  }
  RETURN_IF_FAILED(AwaitEvent(*context, context->events[event], "wait"));
  return 0;
}

int ElapsedMs(DejavuCudaContext* context, int32_t from, int32_t to, float* ms) {
  RETURN_IF_FAILED(Enter(*context, "elapsed time"));
  for (const int32_t event : {from, to}) {
    if (event < 0 || event >= kEvents || context->events[event] == nullptr) {
      return Fail(cudaErrorInvalidValue, "elapsed time: event %d was never stamped", event);
    }
  }
  RETURN_IF_FAILED(AwaitEvent(*context, context->events[to], "elapsed time"));
  RETURN_IF_FAILED(
      Check(*context, cudaEventElapsedTime(ms, context->events[from], context->events[to]), "elapsed time"));
  return 0;
}

}  // namespace dejavu::cuda
