// Attention of steps of many rows: which of them the kernels of prompt_attention.cuh do, and over which grids.
#ifndef KERNELS_CUDA_PROMPT_ATTENTION_H_
#define KERNELS_CUDA_PROMPT_ATTENTION_H_

#include "kernels/cuda/abi.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/kernel_params.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

// Whether WritePromptKv stores the keys and values of these rows, and PromptAttention attends to them: heads of 128
// features take 104 KB of shared memory, which GPUs for desktops have not.
bool TakesPromptAttention(const DejavuCudaDevice& device, const KvRows& rows);

// As Backend::Attention, in one launch.
void LaunchPromptAttention(DeviceQueue& queue, const KvRows& rows, Tensor context, float scale, const Selection& heads);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PROMPT_ATTENTION_H_
