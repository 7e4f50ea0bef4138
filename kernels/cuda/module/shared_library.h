// A library that the module does without as long as it can: loaded at the first use, function by function, for the life
// of the process.
#ifndef KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_
#define KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_

#include <dlfcn.h>

#include <string>
#include <vector>

namespace dejavu::cuda {

class SharedLibrary {
 public:
  // The first of `names` that can be loaded.
  void Load(const std::vector<std::string>& names) {
    std::string reasons;
    for (const std::string& name : names) {
      library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) return;
      reasons += (reasons.empty() ? "" : "; ") + std::string(dlerror());
    }
    missing_ = reasons;
  }

  // Leaves `function` as it is where the library is missing, or has none of that name.
  template <typename Function>
  void Resolve(const char* name, Function** function) {
    if (library_ == nullptr) return;
    void* const found = dlsym(library_, name);
    if (found == nullptr && missing_.empty()) missing_ = dlerror();
    if (found != nullptr) *function = reinterpret_cast<Function*>(found);
  }

  // Why the library cannot be used; empty: it can.
  const std::string& missing() const { return missing_; }

 private:
  void* library_ = nullptr;
  std::string missing_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_
