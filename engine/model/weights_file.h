// WeightsFile: an OPT model's weights in a file as they lie in memory (docs/models.md#converted-models), so that a
// device which reads this machine's memory computes with the mapped file itself, and ranks and other devices copy their
// rows. Opening reads and checks the header. Any thread.
//
// It is a safetensors file with tensors of our own: rows with their padding, the data aligned to pages, gaps between
// tensors as tensors too. Metadata say which version of the layout it is, of which model, and a checksum of the header.
#ifndef ENGINE_MODEL_WEIGHTS_FILE_H_
#define ENGINE_MODEL_WEIGHTS_FILE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/formats/checkpoint.h"
#include "engine/load_progress.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/shard.h"
#include "kernels/backend.h"
#include "kernels/base/mapped_file.h"
#include "kernels/base/regular_file.h"
#include "kernels/layout.h"

namespace dejavu {

class WeightsFile {
 public:
  static constexpr char kName[] = "dejavu.safetensors";

  // Nothing where `directory` has no such file. INVALID_ARGUMENT with the file and the reason where it is another
  // version's, another model's than `config`, cut short or damaged.
  static absl::StatusOr<std::optional<WeightsFile>> Open(const std::string& directory, const OptConfig& config);

  // All weights, on a device that reads this machine's memory, with WeightsHash of those that they were made from.
  // Syncs the file to the disk. UNAVAILABLE with the reason where it cannot be written; what is there then is of no
  // use.
  static absl::Status Write(OptWeights& weights, const OptConfig& config, const std::string& weights_hash,
                            const std::string& path, const LoadProgress& progress);

  const std::string& weights_hash() const { return contents_.metadata.at("weights_hash"); }
  bool has_own_head() const;
  // Of the matrices, and of the position embedding, which int8 leaves as it was stored.
  DType dtype() const { return dtype_; }
  DType position_dtype() const { return position_dtype_; }

  // INVALID_ARGUMENT where matrices are wanted as `dtype` and are something else: nothing is converted twice.
  absl::Status CheckType(std::optional<DType> dtype) const;

  // As OptWeights has them.
  absl::StatusOr<int64_t> Measure(const Shard& shard, std::optional<DType> dtype) const;
  // With `map` the whole model on a device that reads this machine's memory is the mapped file; else it is a copy.
  absl::StatusOr<OptWeights> Load(const Shard& shard, Backend& backend, const LoadProgress& progress,
                                  std::optional<DType> dtype, bool map = true) const;

 private:
  // A stored tensor and what becomes of it.
  struct Part {
    const StoredTensor* stored;
    Tensor* view;
    bool is_vector;  // which counts as rows of one element
    int64_t cols;
    Runs own;  // of the rows
  };

  WeightsFile(OptConfig config, FileTensors contents);

  absl::Status Check();
  const StoredTensor* Find(const std::string& name) const;
  absl::StatusOr<Part> Match(const std::string& name, absl::Span<const DType> types, bool is_vector, int64_t rows,
                             int64_t cols, const Runs& own, Tensor* view) const;
  absl::StatusOr<std::vector<Part>> MatchAll(const Shard& shard, OptWeights* weights) const;
  static DeviceLayout LayOut(const std::vector<Part>& parts);
  absl::Status TouchAll(const MappedFile& file, const LoadProgress& progress) const;
  static absl::Status CopyAll(const std::vector<Part>& parts, const MappedFile& file, Backend& backend,
                              const LoadProgress& progress);

  OptConfig config_;
  FileTensors contents_;
  std::shared_ptr<RegularFile> file_;
  int64_t data_start_ = 0;
  DType dtype_ = DType::kFloat32, position_dtype_ = DType::kFloat32;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHTS_FILE_H_
