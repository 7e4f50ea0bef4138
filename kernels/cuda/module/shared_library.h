// A library that the module does without as long as it can: loaded at the first use, function by function, for the life
// of the process.
#ifndef KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_
#define KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_

#include <dlfcn.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace dejavu::cuda {

class SharedLibrary {
 public:
  // The first of `names` that can be loaded: from the folders of the environment variable DEJAVU_CUDA_LIBRARIES, a list
  // with colons, and then from where the system's loader looks.
  void Load(const std::vector<std::string>& names) {
    std::string reasons;
    for (const std::string& place : Places(names)) {
      library_ = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) return;
      reasons += (reasons.empty() ? "" : "; ") + std::string(dlerror());  // names the place
    }
    missing_ = reasons + "; " + kFolders + (std::getenv(kFolders) != nullptr ? " was searched" : " can name folders");
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
  static constexpr const char* kFolders = "DEJAVU_CUDA_LIBRARIES";

  static std::vector<std::string> Places(const std::vector<std::string>& names) {
    std::vector<std::string> places;
    const char* const list = std::getenv(kFolders);
    std::istringstream folders(list != nullptr ? list : "");
    for (std::string folder; std::getline(folders, folder, ':');) {
      if (folder.empty()) continue;
      for (const std::string& name : names) places.push_back(folder + "/" + name);
    }
    places.insert(places.end(), names.begin(), names.end());
    return places;
  }

  void* library_ = nullptr;
  std::string missing_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_SHARED_LIBRARY_H_
