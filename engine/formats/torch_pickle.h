// The pickle inside a torch.save archive, read without executing anything: the reader knows ordered dictionaries,
// tensors and storages, and refuses every other name that a pickle may call, by that name. Any thread.
#ifndef ENGINE_FORMATS_TORCH_PICKLE_H_
#define ENGINE_FORMATS_TORCH_PICKLE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/tensor.h"

namespace dejavu {

// A tensor as the pickle describes it. Counts are not negative; whether they fit the storage is for the caller to
// check.
struct PickledTensor {
  std::string name;
  std::optional<DType> dtype;  // nothing: a type that the engine does not compute with
  std::string type;            // of the storage, such as "HalfStorage"; of what is no tensor, such as "an integer"
  std::string storage;         // the archive's entry data/<storage>
  int64_t storage_elements = 0;
  int64_t offset = 0;  // of the first element, in elements
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements, one per dimension
};

// The state dictionary: a dictionary of tensors, and perhaps of other things, at the top level. INVALID_ARGUMENT,
// without the file's path, for all else.
absl::StatusOr<std::vector<PickledTensor>> ReadTorchPickle(absl::string_view pickle);

}  // namespace dejavu

#endif  // ENGINE_FORMATS_TORCH_PICKLE_H_
