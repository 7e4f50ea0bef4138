// Optional parts are libraries that a program loads at run time: each exports one function, which returns a table of
// functions that starts with an int32_t version.
#ifndef KERNELS_BASE_LOAD_MODULE_H_
#define KERNELS_BASE_LOAD_MODULE_H_

#include <cstdint>

#include "absl/status/statusor.h"

namespace dejavu {

struct ModuleName {
  const char* what;      // "MPI": for messages
  const char* variable;  // of the environment: a file instead of the usual places
  const char* file;
  const char* entry;  // const Table* (*)(void)
  int32_t version;
};

// From the file that the variable names; without it `file` beside the executable or in ../lib/dejavu from there. Stays
// loaded for the life of the process. UNAVAILABLE, with why each place was not it. Any thread.
absl::StatusOr<const void*> LoadModuleTable(const ModuleName& name);

// The same as the type that the module's abi.h declares.
template <typename Table>
absl::StatusOr<const Table*> LoadModuleAs(const ModuleName& name) {
  const absl::StatusOr<const void*> table = LoadModuleTable(name);
  if (!table.ok()) return table.status();
  return static_cast<const Table*>(*table);
}

}  // namespace dejavu

#endif  // KERNELS_BASE_LOAD_MODULE_H_
