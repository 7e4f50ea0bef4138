#include "kernels/base/load_module.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace dejavu {
namespace {

std::vector<std::string> Places(const ModuleName& name) {
  if (const char* const named = std::getenv(name.variable)) return {named};
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  return {folder / name.file, folder.parent_path() / "lib/dejavu" / name.file};
}

absl::StatusOr<const void*> LoadFrom(const std::string& place, const ModuleName& name) {
  void* const library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnavailableError(dlerror());  // names the file
  const auto entry = reinterpret_cast<const void* (*)()>(dlsym(library, name.entry));
  if (entry == nullptr) return absl::UnavailableError(dlerror());
  const void* const table = entry();
  if (const int32_t version = *static_cast<const int32_t*>(table); version != name.version) {
    return absl::UnavailableError(
        absl::StrCat(place, ": is of version ", version, "; this program needs ", name.version));
  }
  return table;
}

}  // namespace

absl::StatusOr<const void*> LoadModuleTable(const ModuleName& name) {
  std::vector<std::string> reasons;
  for (const std::string& place : Places(name)) {
    const absl::StatusOr<const void*> table = LoadFrom(place, name);
    if (table.ok()) return table;
    reasons.emplace_back(table.status().message());
  }
  return absl::UnavailableError(absl::StrCat("no ", name.what, " module: ", absl::StrJoin(reasons, "; ")));
}

}  // namespace dejavu
