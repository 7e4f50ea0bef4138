// All kernels of the CUDA backend. Included once by the real module (module/module.cu) and once by the emulated one.
#ifndef KERNELS_CUDA_KERNELS_CUH_
#define KERNELS_CUDA_KERNELS_CUH_

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/decode_attention.cuh"
#include "kernels/cuda/draw.cuh"
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/probe.cuh"
#include "kernels/cuda/prompt_attention.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/sum.cuh"

#endif  // KERNELS_CUDA_KERNELS_CUH_
