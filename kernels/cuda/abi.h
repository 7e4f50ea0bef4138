// What the daemon and the CUDA module say to each other: a table of C functions, so that the module can be built by
// another compiler against another C++ library, and be absent. The module is thin on purpose: memory, copies, launches
// and graphs. Which kernels run, over which grids and in what order, is decided by CudaBackend
// (kernels/cuda/cuda_backend.cc), which is built everywhere and runs in the tests over an emulated module (tests/simt).
//
// A function that returns an int returns 0, or another number and a message from `error` (of the calling thread, valid
// until its next call; it names what was tried and CUDA's own error). One thread at a time uses a context. Work is
// queued in order on the context's one stream; only `download`, `synchronize`, `wait`, `elapsed_ms`, `join_group` and
// `leave_group` wait.
#ifndef KERNELS_CUDA_ABI_H_
#define KERNELS_CUDA_ABI_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DEJAVU_CUDA_ABI_VERSION 8
#define DEJAVU_CUDA_ENTRY "DejavuCudaEntry"  // const DejavuCudaModule* (*)(void); all that the module exports
#define DEJAVU_CUDA_GROUP_ID_BYTES 128
#define DEJAVU_CUDA_PEER_LOST 1000000  // what a call returns because another rank did not come; the context is lost

typedef struct DejavuCudaContext DejavuCudaContext;
typedef struct DejavuCudaGraph DejavuCudaGraph;

typedef struct DejavuCudaDevice {
  char name[256];
  int32_t compute_major, compute_minor;
  int32_t multiprocessors;
  int32_t shared_bytes_per_block;  // largest, opted in
  int32_t shared_bytes_per_multiprocessor;
  int32_t l2_bytes;
  int64_t memory_bytes, memory_free_bytes;
  int32_t driver_version, runtime_version;  // as CUDA gives them: 13000 is 13.0
} DejavuCudaDevice;

typedef struct DejavuCudaLaunch {
  int32_t kernel;  // Kernel (kernels/cuda/params.h)
  uint32_t grid[3], block[3];
  uint32_t shared_bytes;  // dynamic
  int32_t overlaps;       // may begin before the launch before it has ended, and waits for it by itself
  const void* params;     // the kernel's one parameter, copied before `launch` returns
  uint32_t params_bytes;
} DejavuCudaLaunch;

typedef struct DejavuCudaKernel {
  const char* name;
  int32_t registers, shared_bytes, local_bytes;  // per thread, static per block, per thread: spills
  int32_t params_bytes;
  // As 90 for compute capability 9.0: of the code that runs, and of the PTX that it was made from, which is older where
  // the driver has compiled it. Sources saw that of the PTX; from 90 on kernels wait by themselves (`overlaps`).
  int32_t binary_version, ptx_version;
} DejavuCudaKernel;

// c [m, n] = a [m, k] * b [n, k]^T, or with `b_is_kn` b [k, n]; float32 sums. a and b of one type, c float32. Then
// `bias` is added to every row, and then `relu` makes zero of what is below it (and perhaps of NaN).
typedef struct DejavuCudaGemm {
  const void *a, *b;
  float* c;
  int64_t m, n, k, a_stride, b_stride, c_stride;
  int32_t bfloat16;  // a and b: 0 float16, 1 bfloat16
  int32_t b_is_kn;
  int32_t accumulate;  // c += instead
  int32_t relu;
  const float* bias;  // [n] or nullptr
} DejavuCudaGemm;

// `rows` pieces of `row_bytes`, so far apart on either side.
typedef struct DejavuCudaCopy {
  void* to;
  int64_t to_stride;
  const void* from;
  int64_t from_stride;
  int64_t row_bytes, rows;
} DejavuCudaCopy;

// A type for each kind of copy, so that none is taken for another.
typedef struct DejavuCudaUpload {
  DejavuCudaCopy copy;  // to the device
} DejavuCudaUpload;
typedef struct DejavuCudaFetch {
  DejavuCudaCopy copy;  // from the device to pinned memory
} DejavuCudaFetch;
typedef struct DejavuCudaDownload {
  DejavuCudaCopy copy;  // from the device to any memory of the host
} DejavuCudaDownload;

typedef struct DejavuCudaModule {
  int32_t abi_version;
  const char* (*error)(void);

  // Says what is missing: driver, device, or the compute capability that this build needs.
  int (*open)(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info);
  void (*close)(DejavuCudaContext* context);

  int (*allocate)(DejavuCudaContext* context, int64_t bytes, void** memory);  // zeroed, 256-byte aligned
  int (*free)(DejavuCudaContext* context, void* memory);
  int (*allocate_pinned)(DejavuCudaContext* context, int64_t bytes, void** memory);  // of the host
  int (*free_pinned)(DejavuCudaContext* context, void* memory);

  // From pinned memory `upload` and into it `fetch` return at once; pageable memory may be reused when upload returns.
  // `download` waits.
  int (*upload)(DejavuCudaContext* context, DejavuCudaUpload upload);
  int (*fetch)(DejavuCudaContext* context, DejavuCudaFetch fetch);
  int (*download)(DejavuCudaContext* context, DejavuCudaDownload download);
  int (*synchronize)(DejavuCudaContext* context);

  int (*launch)(DejavuCudaContext* context, const DejavuCudaLaunch* launch);
  int (*gemm)(DejavuCudaContext* context, const DejavuCudaGemm* gemm);
  int (*kernel_info)(DejavuCudaContext* context, int32_t kernel, DejavuCudaKernel* info);

  // What is launched in between is kept instead of run; replay runs it. No copies of pageable memory in between. A
  // graph of nullptr: the device has no memory for it.
  int (*begin_capture)(DejavuCudaContext* context);
  int (*end_capture)(DejavuCudaContext* context, DejavuCudaGraph** graph);
  int (*replay)(DejavuCudaContext* context, DejavuCudaGraph* graph);
  void (*free_graph)(DejavuCudaContext* context, DejavuCudaGraph* graph);

  // Time stamps in the queue, numbered by the caller, 0 ... 65. `wait` returns when the queue has passed the last stamp
  // of that number: what was fetched before it has arrived.
  int (*stamp)(DejavuCudaContext* context, int32_t event);
  int (*wait)(DejavuCudaContext* context, int32_t event);
  int (*elapsed_ms)(DejavuCudaContext* context, int32_t from, int32_t to, float* ms);

  // Groups of contexts on different devices, in one process or in several, by NCCL. Rank 0 makes an id, which all ranks
  // get by other means and join with. group_id with nullptr only says whether there can be groups. join_group gives up
  // after so many seconds, and tells what memory the group has left free. leave_group: when no graph holds an
  // all_reduce of it any more. A context is in one group at a time.
  int (*group_id)(char* id);
  int (*join_group)(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
                    int64_t* memory_free_bytes);
  void (*leave_group)(DejavuCudaContext* context);

  // data = the sum over the ranks, in place, by the stream. May be captured, by all ranks at once. Every rank queues
  // the same ones in the same order. With `aside` it runs beside what is queued after it, up to join_all_reduce, which
  // must come before the next all_reduce, the end of a capture and whatever waits.
  int (*all_reduce)(DejavuCudaContext* context, float* data, int64_t count, int32_t aside);
  int (*join_all_reduce)(DejavuCudaContext* context);

  // From now on whatever waits for the device in a group of several gives up after so many seconds. At first infinite.
  int (*limit_group)(DejavuCudaContext* context, double seconds);
} DejavuCudaModule;

#ifdef __cplusplus
}
#endif

#endif  // KERNELS_CUDA_ABI_H_
