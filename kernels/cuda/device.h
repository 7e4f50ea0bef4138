// What kernel sources may use of CUDA, by one name for both compilers: nvcc, and the host compiler over the emulator of
// tests/simt, which runs the very same sources on the CPU. Kernels use nothing else of CUDA.
//
//   DJ_KERNEL(Name, Params, threads) { ... p.field ... }
//                                    a kernel; its one parameter is called p; two blocks of it fit a multiprocessor's
//                                    registers; one of DJ_WIDE_KERNEL does, three of DJ_SLIM_KERNEL do
//   DJ_SHARED(T, name, N)            static shared memory T name[N]; T without constructors
//   DJ_DYNAMIC_SHARED(T, name)       the launch's dynamic shared memory, 16-byte aligned
//   DJ_DEVICE                        before functions that kernels call (always inlined)
//   threadIdx, blockIdx, blockDim, gridDim, __syncthreads(), __syncthreads_or, __syncwarp(), __shfl_sync,
//   __shfl_xor_sync, __shfl_down_sync, __shfl_up_sync, __ballot_sync, __any_sync, __all_sync, __popc, __ffs, __clz,
//   __byte_perm, __ldg, __threadfence(), atomicAdd (int32/uint32 only), atomicOr (uint32), fmaf, fmaxf, fminf, expf,
//   rintf, rsqrtf, sqrtf, __expf, __uint_as_float, __float_as_uint
//   and, of our own, what is declared below.
//
// Every kernel calls GridWait, in all of its threads, before it reads what the launch before it wrote and before it
// writes anything that others see: so a launch that begins early (DejavuCudaLaunch.overlaps) still comes after all
// launches before it. It calls GridLaunchDependents after GridWait: when the next launch begins, the one before this
// has ended, so that what is two launches old may be read before GridWait. LoadStream, LoadConstant and CopyAsync16
// before GridWait are for that and for weights, which no kernel writes.
#ifndef KERNELS_CUDA_DEVICE_H_
#define KERNELS_CUDA_DEVICE_H_

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DJ_KERNEL(Name, Params, threads) \
  __global__ void __launch_bounds__(threads, 2) Name(const __grid_constant__ Params p)
#define DJ_WIDE_KERNEL(Name, Params, threads) \
  __global__ void __launch_bounds__(threads, 1) Name(const __grid_constant__ Params p)
#define DJ_SLIM_KERNEL(Name, Params, threads) \
  __global__ void __launch_bounds__(threads, 3) Name(const __grid_constant__ Params p)
#define DJ_DEVICE __device__ __forceinline__
#define DJ_SHARED(T, name, N) __shared__ T name[N]
#define DJ_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::dejavu::cuda::dynamic_shared)

namespace dejavu::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

struct alignas(16) Vector16 {
  uint32_t w[4];
};

DJ_DEVICE uint32_t SharedAddress(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 aligned bytes at once, also where the compiler would rather read the parts that are used one by one.
DJ_DEVICE Vector16 LoadVector(const void* p) {
  Vector16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}

// Likewise of shared memory.
DJ_DEVICE Vector16 LoadShared(const void* p) {
  Vector16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(SharedAddress(p))
               : "memory");
  return v;
}

// 16 aligned bytes that are read once: they pass L1 by.
DJ_DEVICE Vector16 LoadStream(const void* p) {
  Vector16 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(p));
  return v;
}

// What no kernel writes, read where this stands: neither behind GridWait nor when it is first used.
DJ_DEVICE float LoadConstant(const float* p) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(p));
  return value;
}

// What launches write that are two launches old, read before GridWait: from L2, as L1 may have kept what was there
// before.
DJ_DEVICE int32_t LoadOld(const int32_t* p) {
  int32_t value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

DJ_DEVICE float HalfToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DJ_DEVICE uint16_t FloatToHalf(float value) { return __half_as_ushort(__float2half_rn(value)); }
DJ_DEVICE float BFloat16ToFloat(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
DJ_DEVICE uint16_t FloatToBFloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// d += a b: [16, 8] += [16, 16] [16, 8], of int8 [16, 32] [32, 8]. Fragments as in PTX: mma.m16n8k16, m16n8k32,
// row.col.
DJ_DEVICE void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DJ_DEVICE void MmaBF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DJ_DEVICE void MmaS8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cp.async of 16 aligned bytes; zeros in their place unless `copies`, whatever `global` is.
DJ_DEVICE void CopyAsync16(void* shared, const void* global, bool copies = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)), "l"(global),
               "r"(copies ? 16 : 0)
               : "memory");
}
DJ_DEVICE void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DJ_DEVICE void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ldmatrix: four matrices of 8 rows of 16 bytes in shared memory; lane l names row l % 8 of matrix l / 8 and gets in
// w[i] bytes 4 (l % 4) ... of row l / 4 of matrix i. Transposed: of 16-bit elements, w[i] holds rows 2 (l % 4) and the
// next of column l / 4.
DJ_DEVICE Vector16 LoadMatrices(const void* shared) {
  Vector16 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(SharedAddress(shared))
               : "memory");
  return v;
}
DJ_DEVICE Vector16 LoadMatricesTransposed(const void* shared) {
  Vector16 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(SharedAddress(shared))
               : "memory");
  return v;
}

// Programmatic dependent launch: nothing on devices before Hopper, where launches do not overlap.
DJ_DEVICE void GridWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DJ_DEVICE void GridLaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dejavu::cuda
#else
#include "simt.h"  // tests/simt, on the include path of the emulator alone
#endif

#endif  // KERNELS_CUDA_DEVICE_H_
