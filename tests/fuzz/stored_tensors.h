// What must hold of the tensors that a reader of checkpoints has accepted. Any thread.
#ifndef TESTS_FUZZ_STORED_TENSORS_H_
#define TESTS_FUZZ_STORED_TENSORS_H_

#include "engine/formats/checkpoint.h"

namespace dejavu {

// Shapes and extents fit together and lie in the file; all of it can be read.
void CheckTensors(const TensorMap& tensors);

}  // namespace dejavu

#endif  // TESTS_FUZZ_STORED_TENSORS_H_
