// A CUDA module without a device: launches do nothing, memory has addresses and no bytes. For asking the CUDA backend
// what it would launch on an H200, for a model of any size. One thread.
#ifndef TESTS_BENCH_PRETENDED_DEVICE_H_
#define TESTS_BENCH_PRETENDED_DEVICE_H_

#include "kernels/cuda/abi.h"

namespace dejavu {

// What comes from the device is zero. No groups.
const DejavuCudaModule* PretendedModule();

}  // namespace dejavu

#endif  // TESTS_BENCH_PRETENDED_DEVICE_H_
