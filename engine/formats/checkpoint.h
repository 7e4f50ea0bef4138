// Checkpoint: the tensors of a model directory in Hugging Face layout, by name, whatever file they lie in:
// model.safetensors, model.safetensors.index.json with its shards, pytorch_model.bin, pytorch_model.bin.index.json with
// its shards (in this order of preference). As in Transformers, an index says which files are shards, whatever tensors
// it says to be there; of two tensors of one name that of the shard whose name comes last counts. Opening reads headers
// only. Files are not trusted: every offset and product is checked against overflow and the file's size, pickles are
// interpreted by a reader that knows tensors, storages and ordered dictionaries and nothing else.
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

// A tensor of a type that the engine does not compute with. It may be no weight at all, such as a buffer of positions.
struct ForeignTensor {
  std::string type;  // as the file calls it
  std::string path;  // of the file
};

struct FileTensors {
  TensorMap tensors;  // float32, float16, bfloat16 and int8
  absl::flat_hash_map<std::string, ForeignTensor> foreign;
  absl::flat_hash_map<std::string, std::string> metadata;  // a safetensors file's "__metadata__"
};

// What the readers share: the product of a shape that came from a file (at most kMaxDimensions, none negative, the
// product so small that its bytes cannot overflow), and a name from a file as it may stand in a message (escaped, at
// most 200 bytes).
inline constexpr size_t kMaxDimensions = 64;  // as in PyTorch
absl::StatusOr<int64_t> ElementCount(absl::Span<const int64_t> shape);
std::string Quoted(absl::string_view name);

// The readers for one file.
absl::StatusOr<FileTensors> ReadSafetensorsHeader(const std::string& path);  // engine/formats/safetensors.cc
std::string SafetensorsName(DType dtype);                                    // "BF16", of a type that weights have
absl::StatusOr<FileTensors> ReadTorchArchive(const std::string& path);       // engine/formats/torch_archive.cc

class Checkpoint {
 public:
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  // nullptr where there is none of that name and of a type that the engine computes with; Missing says why.
  const StoredTensor* Find(const std::string& name) const;
  const TensorMap& tensors() const { return files_.tensors; }
  const absl::flat_hash_map<std::string, ForeignTensor>& foreign() const { return files_.foreign; }

  // INVALID_ARGUMENT for a tensor that is wanted and cannot be found: of which type it is, or that a shard lacks what
  // the index says to be there, or that it is missing.
  absl::Status Missing(const std::string& name) const;
  // True where Missing has more to say than that.
  bool IsExpected(const std::string& name) const;

  // Elements [first, first + count) of the flattened tensor, in their stored type. Any thread.
  static absl::Status Read(const StoredTensor& tensor, int64_t first, int64_t count, void* target);

 private:
  absl::Status ReadIndexed(const std::string& directory);

  std::string path_;  // of the one file, or of the index
  FileTensors files_;
  absl::flat_hash_map<std::string, std::string> promised_;  // by the index, and not there: the shard's path
};

}  // namespace dejavu

#endif  // ENGINE_FORMATS_CHECKPOINT_H_
