#include "kernels/cuda/load_module.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_backend.h"

namespace dejavu::cuda {
namespace {

std::vector<std::string> Places() {
  if (const char* const named = std::getenv("DEJAVU_CUDA_MODULE")) return {named};
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  constexpr char kFile[] = "libdejavu_cuda.so";
  return {folder / kFile, folder.parent_path() / "lib/dejavu" / kFile};
}

// A file that turns out not to be the module stays loaded: what its libraries have begun cannot be undone.
absl::StatusOr<const DejavuCudaModule*> LoadFrom(const std::string& place) {
  void* const library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnavailableError(dlerror());  // names the file
  const auto entry = reinterpret_cast<const DejavuCudaModule* (*)()>(dlsym(library, DEJAVU_CUDA_ENTRY));
  if (entry == nullptr) return absl::UnavailableError(dlerror());
  const DejavuCudaModule* const module = entry();
  if (module->abi_version != DEJAVU_CUDA_ABI_VERSION) {
    return absl::UnavailableError(
        absl::StrCat(place, ": is of version ", module->abi_version, "; this program needs ", DEJAVU_CUDA_ABI_VERSION));
  }
  return module;
}

}  // namespace

absl::StatusOr<const DejavuCudaModule*> LoadModule() {
  std::vector<std::string> reasons;
  for (const std::string& place : Places()) {
    const absl::StatusOr<const DejavuCudaModule*> module = LoadFrom(place);
    if (module.ok()) return module;
    reasons.emplace_back(module.status().message());
  }
  return absl::UnavailableError(absl::StrCat("no CUDA module: ", absl::StrJoin(reasons, "; ")));
}

}  // namespace dejavu::cuda

namespace dejavu {

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int device) {
  ASSIGN_OR_RETURN(const DejavuCudaModule* const module, cuda::LoadModule());
  return MakeCudaBackend(module, device);
}

}  // namespace dejavu
