// One CPU backend of one thread, for tests that only need memory and arithmetic.
#ifndef TESTS_ENGINE_CPU_H_
#define TESTS_ENGINE_CPU_H_

#include <memory>

#include "kernels/cpu/cpu_backend.h"

namespace dejavu {

inline Backend& Cpu() {
  static const std::unique_ptr<Backend> backend = *CreateCpuBackend({1, false});
  return *backend;
}

}  // namespace dejavu

#endif  // TESTS_ENGINE_CPU_H_
