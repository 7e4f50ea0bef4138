// Launches that are kept and run again, and time stamps among them.
#ifndef KERNELS_CUDA_MODULE_GRAPHS_H_
#define KERNELS_CUDA_MODULE_GRAPHS_H_

#include <cstdint>

#include "kernels/cuda/module/context.h"

namespace dejavu::cuda {

// Of the table (kernels/cuda/abi.h).
int BeginCapture(DejavuCudaContext* context);
int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph);
int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph);
void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph);
int Stamp(DejavuCudaContext* context, int32_t event);
int Wait(DejavuCudaContext* context, int32_t event);
int ElapsedMs(DejavuCudaContext* context, int32_t from, int32_t to, float* ms);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_GRAPHS_H_
