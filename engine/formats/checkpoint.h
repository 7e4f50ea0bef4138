// Checkpoint: the tensors of a model directory in Hugging Face layout, by name, whatever file they lie in:
// model.safetensors, model.safetensors.index.json with its shards, pytorch_model.bin, pytorch_model.bin.index.json with
// its shards (in this order of preference). Opening reads headers only. Files are not trusted: every offset and product
// is checked against overflow and the file's size, pickles are interpreted by a reader that knows tensors, storages and
// ordered dictionaries and nothing else.
#ifndef ENGINE_FORMATS_CHECKPOINT_H_
#define ENGINE_FORMATS_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/base/regular_file.h"
#include "kernels/tensor.h"

namespace dejavu {

// INVALID_ARGUMENT with the path and what is wrong with the file.
absl::Status Refuse(const RegularFile& file, absl::string_view reason);

// A dense row-major tensor in a file. Element count and extent have been checked against the file.
struct StoredTensor {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  std::shared_ptr<RegularFile> file;
  int64_t offset = 0;  // of the first element, in bytes
};

using TensorMap = absl::flat_hash_map<std::string, StoredTensor>;

// What the readers share: the product of a shape that came from a file (at most kMaxDimensions, none negative, the
// product so small that its bytes cannot overflow), and a name from a file as it may stand in a message (escaped, at
// most 200 bytes).
inline constexpr size_t kMaxDimensions = 8;
absl::StatusOr<int64_t> ElementCount(absl::Span<const int64_t> shape);
std::string Quoted(absl::string_view name);

// The readers for one file. Tensors of types other than float32, float16, bfloat16 and int8 are left out. `metadata`,
// unless nullptr, receives the string under "__metadata__" of key `metadata_key`, or nothing.
absl::StatusOr<TensorMap> ReadSafetensorsHeader(const std::string& path, const std::string& metadata_key = "",
                                                std::string* metadata = nullptr);  // engine/formats/safetensors.cc
absl::StatusOr<TensorMap> ReadTorchArchive(const std::string& path);               // engine/formats/torch_archive.cc

class Checkpoint {
 public:
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  const StoredTensor* Find(const std::string& name) const;
  const TensorMap& tensors() const { return tensors_; }

  // Elements [first, first + count) of the flattened tensor, in their stored type. Any thread.
  static absl::Status Read(const StoredTensor& tensor, int64_t first, int64_t count, void* target);

 private:
  TensorMap tensors_;
};

}  // namespace dejavu

#endif  // ENGINE_FORMATS_CHECKPOINT_H_
