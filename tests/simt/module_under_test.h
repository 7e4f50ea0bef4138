// The module that the tests of the CUDA backend run over: the emulated one in tests/simt, the real one, on a GPU, in
// tests/gpu. Either keeps the counts of Emulation and fails when that asks for it; orders are the emulated one's alone.
#ifndef TESTS_SIMT_MODULE_UNDER_TEST_H_
#define TESTS_SIMT_MODULE_UNDER_TEST_H_

#include "emulated_module.h"

namespace dejavu::simt {

const DejavuCudaModule* ModuleUnderTest();

// Whether there are so many devices. The emulated module has them from then on.
bool HasDevices(int count);

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_MODULE_UNDER_TEST_H_
