#include "engine/model/weights_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/formats/safetensors_writer.h"
#include "engine/formats/sha256.h"
#include "engine/model/weight_convert.h"
#include "engine/model/weight_tensors.h"
#include "kernels/base/mapped_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

constexpr char kFormat[] = "dejavu-weights", kVersion[] = "1";
constexpr char kDigest[] = "header_sha256";
constexpr int64_t kDataAlignment = 4096;              // a page
constexpr int64_t kTouchedBytes = int64_t{64} << 20;  // between two reports of progress
constexpr DType kMatrixTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

std::string DescribeModel(const OptConfig& c) {
  return absl::StrCat("opt, layers ", c.layers, ", hidden ", c.hidden, ", heads ", c.heads, ", ffn ", c.ffn, ", vocab ",
                      c.vocab, ", context ", c.context, ", embed ", c.embed, c.pre_norm ? ", pre-norm" : ", post-norm",
                      c.final_norm ? ", final norm" : "", c.biases ? ", biases" : "");
}

int64_t DataStart(const FileTensors& contents) {
  int64_t start = INT64_MAX;
  for (const auto& [name, tensor] : contents.tensors) start = std::min(start, tensor.offset);
  return start;
}

// Of all that a header says but the digest itself.
std::string DigestOf(const FileTensors& contents) {
  const int64_t start = DataStart(contents);
  std::map<std::string, std::string> lines;
  for (const auto& [key, value] : contents.metadata) {
    if (key != kDigest) lines["metadata " + key] = value;
  }
  for (const auto& [name, tensor] : contents.tensors) {
    lines["tensor " + name] =
        absl::StrCat(Name(tensor.dtype), " ", absl::StrJoin(tensor.shape, "x"), " at ", tensor.offset - start);
  }
  for (const auto& [name, tensor] : contents.foreign) lines["foreign " + name] = tensor.type;
  Sha256 hash;
  for (const auto& [key, value] : lines) hash.Add(absl::StrCat(key, ": ", value, "\n"));
  const auto digest = hash.Digest();
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), digest.size()});
}

void AddTensor(const std::string& name, DType dtype, std::vector<int64_t> shape, int64_t offset, FileTensors* to) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  to->tensors.emplace(name, StoredTensor{name, dtype, std::move(shape), elements, nullptr, offset});
}

// What a file of these weights holds, each tensor at the place that it has in memory.
FileTensors ContentsOf(OptWeights& weights, const OptConfig& config) {
  const Tensor memory = weights.memory();
  FileTensors contents;
  const auto add = [&](const std::string& name, const Tensor& view, bool is_vector) {
    const int64_t offset = static_cast<const char*>(view.data) - static_cast<const char*>(memory.data);
    std::vector<int64_t> shape = {view.cols};
    if (!is_vector) shape = {view.rows, view.stride};
    AddTensor(name, view.dtype, std::move(shape), offset, &contents);
  };
  for (const WeightTensor& tensor : TensorsOf(config, Shard::Whole(config), weights.has_own_head(), &weights)) {
    add(tensor.name, *tensor.view, tensor.is_vector);
    if (tensor.view->dtype == DType::kInt8) add(tensor.scale_name, *tensor.scale, /*is_vector=*/true);
  }
  std::vector<const StoredTensor*> order;
  for (const auto& [name, tensor] : contents.tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->offset < b->offset; });
  std::vector<std::pair<int64_t, int64_t>> gaps;
  int64_t end = 0;
  for (const StoredTensor* tensor : order) {
    if (tensor->offset > end) gaps.emplace_back(end, tensor->offset - end);
    end = tensor->offset + tensor->elements * SizeOf(tensor->dtype);
  }
  if (memory.bytes() > end) gaps.emplace_back(end, memory.bytes() - end);
  for (const auto& [offset, bytes] : gaps) {
    AddTensor(absl::StrCat("gap.", offset), DType::kInt8, {bytes}, offset, &contents);
  }
  return contents;
}

std::string HeaderOf(const FileTensors& contents) {
  nlohmann::json header = {{"__metadata__", contents.metadata}};
  for (const auto& [name, tensor] : contents.tensors) {
    const int64_t end = tensor.offset + tensor.elements * SizeOf(tensor.dtype);
    header[name] = {
        {"dtype", SafetensorsName(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {tensor.offset, end}}};
  }
  return SafetensorsHeader(header.dump(), kDataAlignment);
}

}  // namespace

absl::Status WeightsFile::Write(OptWeights& weights, const OptConfig& config, const std::string& weights_hash,
                                const std::string& path, const LoadProgress& progress) {
  FileTensors contents = ContentsOf(weights, config);
  contents.metadata = {{"format", kFormat},
                       {"version", kVersion},
                       {"model", DescribeModel(config)},
                       {"weights", Name(weights.dtype())},
                       {"weights_hash", weights_hash}};
  contents.metadata[kDigest] = DigestOf(contents);
  const std::string header = HeaderOf(contents);
  const Tensor memory = weights.memory();
  const auto failed = [&] {
    const int error = errno;
    return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", std::strerror(error), "; it needs ",
                                               static_cast<int64_t>(header.size()) + memory.bytes(), " bytes"));
  };
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return failed();
  const absl::Cleanup close_file = [fd] { close(fd); };
  const auto write_all = [&](const char* data, int64_t bytes) {
    for (int64_t done = 0; done < bytes;) {
      const ssize_t wrote = write(fd, data + done, bytes - done);
      if (wrote < 0 && errno != EINTR) return false;
      done += std::max<ssize_t>(wrote, 0);
    }
    return true;
  };
  if (!write_all(header.data(), static_cast<int64_t>(header.size()))) return failed();
  for (int64_t done = 0; done < memory.bytes();) {
    const int64_t some = std::min(kStripeBytes, memory.bytes() - done);
    if (!write_all(static_cast<const char*>(memory.data) + done, some)) return failed();
    done += some;
    if (progress && !progress(done, memory.bytes())) return absl::CancelledError("writing was cancelled");
  }
  return fsync(fd) == 0 ? absl::OkStatus() : failed();
}

WeightsFile::WeightsFile(OptConfig config, FileTensors contents)
    : config_(std::move(config)), contents_(std::move(contents)) {}

const StoredTensor* WeightsFile::Find(const std::string& name) const {
  const auto found = contents_.tensors.find(name);
  return found == contents_.tensors.end() ? nullptr : &found->second;
}

bool WeightsFile::has_own_head() const { return Find("head.weight") != nullptr; }

absl::StatusOr<std::optional<WeightsFile>> WeightsFile::Open(const std::string& directory, const OptConfig& config) {
  const std::string path = absl::StrCat(directory, "/", kName);
  struct stat info;
  if (lstat(path.c_str(), &info) != 0 && errno == ENOENT) return std::nullopt;
  ASSIGN_OR_RETURN(FileTensors contents, ReadSafetensorsHeader(path));
  WeightsFile file(config, std::move(contents));
  const absl::Status checked = file.Check();
  if (!checked.ok()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", checked.message()));
  return file;
}

absl::Status WeightsFile::Check() {
  const auto metadata = [&](const char* key) -> std::string {
    const auto found = contents_.metadata.find(key);
    return found == contents_.metadata.end() ? "" : found->second;
  };
  if (metadata("format") != kFormat || contents_.tensors.empty()) {
    return absl::InvalidArgumentError("is no file of dejavu-convert");
  }
  if (metadata("version") != kVersion) {
    return absl::InvalidArgumentError(absl::StrCat("is of layout version ", Quoted(metadata("version")), "; this is ",
                                                   kVersion, ": convert the model again"));
  }
  if (metadata(kDigest) != DigestOf(contents_) || !contents_.metadata.contains("weights_hash")) {
    return absl::InvalidArgumentError("its header is damaged: the checksum in it is another");
  }
  if (metadata("model") != DescribeModel(config_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("is of ", metadata("model"), "; config.json says ", DescribeModel(config_)));
  }
  file_ = contents_.tensors.begin()->second.file;
  data_start_ = DataStart(contents_);
  OptWeights shapes;
  ASSIGN_OR_RETURN(const std::vector<Part> parts, MatchAll(Shard::Whole(config_), &shapes));
  dtype_ = shapes.token_embedding.weight.dtype;
  position_dtype_ = shapes.position_embedding.dtype;
  return absl::OkStatus();
}

absl::Status WeightsFile::CheckType(std::optional<DType> dtype) const {
  if (!dtype.has_value()) return absl::OkStatus();
  OptWeights shapes;
  for (const WeightTensor& tensor : TensorsOf(config_, Shard::Whole(config_), has_own_head(), &shapes)) {
    if (tensor.is_vector || (tensor.scale == nullptr && dtype == DType::kInt8)) continue;
    const DType stored = Find(tensor.name)->dtype;
    if (stored == *dtype) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        file_->path(), ": holds tensor ", tensor.name, " as ", Name(stored), " and is not converted again to ",
        Name(*dtype), "; take weights as stored, or the checkpoint that it was made from"));
  }
  return absl::OkStatus();
}

// Of one of `types`, in the shape that our layout gives it.
absl::StatusOr<WeightsFile::Part> WeightsFile::Match(const std::string& name, absl::Span<const DType> types,
                                                     bool is_vector, int64_t rows, int64_t cols, const Runs& own,
                                                     Tensor* view) const {
  const StoredTensor* const stored = Find(name);
  if (stored == nullptr) return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is missing"));
  if (std::find(types.begin(), types.end(), stored->dtype) == types.end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is ", Name(stored->dtype)));
  }
  std::vector<int64_t> shape = {cols};
  if (!is_vector) shape = {rows, DeviceLayout::StrideOf(stored->dtype, rows, cols)};
  if (stored->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape [", absl::StrJoin(stored->shape, ", "),
                                                   "]; config.json implies [", absl::StrJoin(shape, ", "), "]"));
  }
  if ((stored->offset - data_start_) % DeviceLayout::kAlignmentBytes != 0 || data_start_ % kDataAlignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " begins at byte ", stored->offset, ", which is not aligned"));
  }
  return Part{stored, view, is_vector, is_vector ? 1 : cols, own};
}

// Gives the views of `weights` their types and the shapes of the whole model's.
absl::StatusOr<std::vector<WeightsFile::Part>> WeightsFile::MatchAll(const Shard& shard, OptWeights* weights) const {
  const absl::Span<const DType> all(kMatrixTypes), float32 = all.first(1), unscaled = all.first(3);
  std::vector<Part> parts;
  for (const WeightTensor& tensor : TensorsOf(config_, shard, has_own_head(), weights)) {
    const auto types = tensor.is_vector ? float32 : tensor.scale != nullptr ? all : unscaled;
    ASSIGN_OR_RETURN(Part part,
                     Match(tensor.name, types, tensor.is_vector, tensor.rows, tensor.cols, tensor.own, tensor.view));
    *tensor.view = {nullptr, part.stored->dtype, tensor.rows, tensor.cols, part.stored->shape.back()};
    parts.push_back(std::move(part));
    if (tensor.view->dtype != DType::kInt8) continue;
    ASSIGN_OR_RETURN(part,
                     Match(tensor.scale_name, float32, /*is_vector=*/true, 1, tensor.rows, tensor.own, tensor.scale));
    *tensor.scale = {nullptr, DType::kFloat32, 1, tensor.rows, tensor.rows};
    parts.push_back(std::move(part));
  }
  return parts;
}

// A place of its own for each part that the shard owns.
DeviceLayout WeightsFile::LayOut(const std::vector<Part>& parts) {
  DeviceLayout layout;
  for (const Part& part : parts) {
    const int64_t own = CountOf(part.own);
    layout.Reserve(part.view, part.stored->dtype, part.is_vector ? 1 : own, part.is_vector ? own : part.cols);
  }
  return layout;
}

absl::StatusOr<int64_t> WeightsFile::Measure(const Shard& shard, std::optional<DType> dtype) const {
  RETURN_IF_ERROR(CheckType(dtype));
  OptWeights weights;
  ASSIGN_OR_RETURN(const std::vector<Part> parts, MatchAll(shard, &weights));
  return LayOut(parts).bytes();
}

absl::StatusOr<OptWeights> WeightsFile::Load(const Shard& shard, Backend& backend, const LoadProgress& progress,
                                             std::optional<DType> dtype, bool map) const {
  RETURN_IF_ERROR(CheckType(dtype));
  OptWeights weights;
  ASSIGN_OR_RETURN(const std::vector<Part> parts, MatchAll(shard, &weights));
  ASSIGN_OR_RETURN(const std::shared_ptr<const MappedFile> file, MappedFile::Map(*file_));
  if (map && shard.whole() && backend.ReadsHostMemory()) {
    RETURN_IF_ERROR(TouchAll(*file, progress));
    char* const base = const_cast<char*>(file->data());  // nobody writes to weights
    for (const Part& part : parts) part.view->data = base + part.stored->offset;
    weights.storage_ = Buffer(base + data_start_, file->size() - data_start_, [file](void*) {});
  } else {
    DeviceLayout layout = LayOut(parts);
    ASSIGN_OR_RETURN(weights.storage_, layout.Allocate(backend));
    RETURN_IF_ERROR(CopyAll(parts, *file, backend, progress));
  }
  if (!has_own_head()) weights.TieHead();
  return weights;
}

absl::Status WeightsFile::TouchAll(const MappedFile& file, const LoadProgress& progress) const {
  const int64_t bytes = file.size() - data_start_;
  for (int64_t done = 0; done < bytes;) {
    const int64_t some = std::min(kTouchedBytes, bytes - done);
    RETURN_IF_ERROR(file.Touch(data_start_ + done, some));
    done += some;
    if (progress && !progress(done, bytes)) return absl::CancelledError("loading was cancelled");
  }
  return absl::OkStatus();
}

// Packed, stripe by stripe.
absl::Status WeightsFile::CopyAll(const std::vector<Part>& parts, const MappedFile& file, Backend& backend,
                                  const LoadProgress& progress) {
  std::vector<char> stripe;
  int64_t done_bytes = 0, all_bytes = 0;
  for (const Part& part : parts) all_bytes += part.view->bytes();
  for (const Part& part : parts) {
    if (part.view->empty()) continue;
    const int64_t element = SizeOf(part.stored->dtype), row_bytes = part.cols * element;
    const int64_t stride_bytes = part.is_vector ? element : part.stored->shape.back() * element;
    const int64_t first = part.own.front().first, end = part.own.back().first + part.own.back().count;
    RETURN_IF_ERROR(file.Touch(part.stored->offset + first * stride_bytes, (end - first) * stride_bytes));
    const int64_t most = std::max<int64_t>(1, kStripeBytes / row_bytes);
    stripe.resize(most * row_bytes);
    int64_t copied = 0, filled = 0;  // rows
    const auto send = [&] {
      backend.Upload(part.is_vector ? part.view->Cols(copied, filled) : part.view->Rows(copied, filled), stripe.data());
      copied += filled;
      done_bytes += filled * row_bytes;
      filled = 0;
      return !progress || progress(done_bytes, all_bytes);
    };
    bool goes_on = true;
    for (const Shard::Range& run : part.own) {
      for (int64_t row = run.first; row < run.first + run.count && goes_on; ++row) {
        std::memcpy(&stripe[filled * row_bytes], file.data() + part.stored->offset + row * stride_bytes, row_bytes);
        if (++filled == most) goes_on = send();
      }
    }
    if (goes_on && filled > 0) goes_on = send();
    if (!goes_on) return absl::CancelledError("loading was cancelled");
  }
  backend.Synchronize();
  return absl::OkStatus();
}

}  // namespace dejavu
