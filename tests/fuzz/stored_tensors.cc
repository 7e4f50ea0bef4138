#include "tests/fuzz/stored_tensors.h"

#include <string>

#include "tests/fuzz/target.h"

namespace dejavu {

void CheckTensors(const TensorMap& tensors) {
  for (const auto& [name, tensor] : tensors) {
    CHECK(tensor.name == name) << name << " is called " << tensor.name;
    int64_t elements = 1;
    for (const int64_t dimension : tensor.shape) {
      CHECK(dimension >= 0 && !__builtin_mul_overflow(elements, dimension, &elements)) << name;
    }
    CHECK(tensor.elements == elements) << name << " has " << tensor.elements << " elements";
    const int64_t bytes = elements * SizeOf(tensor.dtype);
    CHECK(tensor.offset >= 0 && tensor.offset <= tensor.file->size() - bytes) << name << " at " << tensor.offset;
    std::string data(static_cast<size_t>(bytes), '\0');
    CHECK(Checkpoint::Read(tensor, 0, elements, data.data()).ok()) << name;
  }
}

}  // namespace dejavu
