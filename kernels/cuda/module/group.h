// A context among others that add up with it, and the waits for the device, which in a group have a limit: what is
// under way may be an all-reduce that some rank never comes to.
#ifndef KERNELS_CUDA_MODULE_GROUP_H_
#define KERNELS_CUDA_MODULE_GROUP_H_

#include <cstdint>

#include "kernels/cuda/module/context.h"

namespace dejavu::cuda {

// Until all that was queued, or what came before the event, has been done.
int AwaitStream(DejavuCudaContext& context, const char* tried);
int AwaitEvent(DejavuCudaContext& context, cudaEvent_t event, const char* tried);

// Of the table (kernels/cuda/abi.h).
int GroupId(char* id);
int JoinGroup(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
              int64_t* memory_free_bytes);
void LeaveGroup(DejavuCudaContext* context);
int AllReduce(DejavuCudaContext* context, float* data, int64_t count, int32_t aside);
int JoinAllReduce(DejavuCudaContext* context);
int LimitGroup(DejavuCudaContext* context, double seconds);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_GROUP_H_
