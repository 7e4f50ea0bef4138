#include "engine/model/weight_names.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr char kEmbedding[] = "embed_tokens.weight";

// Elements [first, first + count) as float32.
absl::Status ReadWide(const StoredTensor& tensor, int64_t first, int64_t count, std::vector<char>* stored,
                      std::vector<float>* wide) {
  stored->resize(count * SizeOf(tensor.dtype));
  wide->resize(count);
  RETURN_IF_ERROR(Checkpoint::Read(tensor, first, count, stored->data()));
  WidenValues(stored->data(), tensor.dtype, count, wide->data());
  return absl::OkStatus();
}

// Both of the same shape. NaN and infinities are refused when they are loaded, whatever is answered here.
absl::StatusOr<bool> HoldSameValues(const StoredTensor& a, const StoredTensor& b) {
  if (a.file == b.file && a.offset == b.offset && a.dtype == b.dtype) return true;
  constexpr int64_t kStripe = kStripeBytes / static_cast<int64_t>(sizeof(float));
  std::vector<char> stored;
  std::vector<float> of_a, of_b;
  for (int64_t first = 0; first < a.elements; first += kStripe) {
    const int64_t count = std::min(kStripe, a.elements - first);
    RETURN_IF_ERROR(ReadWide(a, first, count, &stored, &of_a));
    RETURN_IF_ERROR(ReadWide(b, first, count, &stored, &of_b));
    if (of_a != of_b) return false;
  }
  return true;
}

}  // namespace

// Where several are there, Transformers takes the first in the order of the alphabet. Exports of a decoder alone,
// without any prefix, are taken here and not there.
WeightNames::Names WeightNames::NamesOf(const std::string& name) {
  return {"model.decoder." + name, {"decoder." + name, "model.decoder." + name, "model.model.decoder." + name, name}};
}

WeightNames::Names WeightNames::NamesOfHead() { return {"lm_head.weight", {"lm_head.weight", "model.lm_head.weight"}}; }

const StoredTensor* WeightNames::Look(const Names& names) const {
  for (const std::string& name : names.read) {
    if (const StoredTensor* tensor = checkpoint_.Find(name)) return tensor;
    if (checkpoint_.foreign().contains(name)) return nullptr;
  }
  return nullptr;
}

// What a wrapper such as torch's DataParallel or PEFT saves has its prefix before every name.
absl::Status WeightNames::Missing(const Names& names) const {
  for (const std::string& name : names.read) {
    if (checkpoint_.IsExpected(name)) return checkpoint_.Missing(name);
  }
  const absl::Status missing = checkpoint_.Missing(names.written);
  const StoredTensor* wrapped = nullptr;
  size_t prefix_size = 0;
  for (const std::string& inner : {names.written, names.read.front()}) {
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (!absl::EndsWith(name, "." + inner) || (wrapped != nullptr && wrapped->name <= name)) continue;
      wrapped = &tensor;
      prefix_size = name.size() - inner.size();
    }
    if (wrapped != nullptr) break;
  }
  if (wrapped == nullptr) return missing;
  const std::string prefix = wrapped->name.substr(0, prefix_size);
  return absl::InvalidArgumentError(absl::StrCat(missing.message(), "; ", wrapped->file->path(), " has it as ",
                                                 Quoted(wrapped->name), ": the weights of a wrapped model, which put ",
                                                 Quoted(prefix),
                                                 " before every name; save the state_dict() of the model inside"));
}

absl::StatusOr<const StoredTensor*> WeightNames::Check(const Names& names, const std::vector<int64_t>& shape) const {
  const StoredTensor* const tensor = Look(names);
  if (tensor == nullptr) return Missing(names);
  if (tensor->dtype == DType::kInt8) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file->path(), ": tensor ", tensor->name,
                                                   " is int8; weights must be float32, float16 or bfloat16"));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file->path(), ": tensor ", tensor->name, " has shape [",
                                                   absl::StrJoin(tensor->shape, ", "), "]; config.json implies [",
                                                   absl::StrJoin(shape, ", "), "]"));
  }
  return tensor;
}

absl::StatusOr<const StoredTensor*> WeightNames::Find(const std::string& name,
                                                      const std::vector<int64_t>& shape) const {
  return Check(NamesOf(name), shape);
}

absl::StatusOr<WeightNames::Ends> WeightNames::FindEnds() const {
  const std::vector<int64_t> shape = {config_.vocab, config_.embed};
  const auto is_stored = [&](const Names& names) {
    return Look(names) != nullptr || std::any_of(names.read.begin(), names.read.end(), [&](const std::string& name) {
             return checkpoint_.foreign().contains(name);
           });
  };
  const bool has_embedding = is_stored(NamesOf(kEmbedding)), has_head = is_stored(NamesOfHead());
  if (config_.tied && !has_head) {
    ASSIGN_OR_RETURN(const StoredTensor* const embedding, Check(NamesOf(kEmbedding), shape));
    return Ends{embedding, nullptr};
  }
  if (config_.tied && !has_embedding) {
    ASSIGN_OR_RETURN(const StoredTensor* const head, Check(NamesOfHead(), shape));
    return Ends{head, nullptr};
  }
  const auto check = [&](const Names& names, bool is_there) -> absl::StatusOr<const StoredTensor*> {
    absl::StatusOr<const StoredTensor*> tensor = Check(names, shape);
    if (tensor.ok() || is_there) return tensor;
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.status().message(), ", and config.json says that tie_word_embeddings is false"));
  };
  ASSIGN_OR_RETURN(const StoredTensor* const embedding, check(NamesOf(kEmbedding), has_embedding));
  ASSIGN_OR_RETURN(const StoredTensor* const head, check(NamesOfHead(), has_head));
  ASSIGN_OR_RETURN(const bool same, HoldSameValues(*embedding, *head));
  return Ends{embedding, same ? nullptr : head};
}

absl::Status WeightNames::CheckLayers() const {
  const StoredTensor* const beyond = Look(NamesOf(absl::StrCat("layers.", config_.layers, ".fc1.weight")));
  if (beyond == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(beyond->file->path(), ": tensor ", beyond->name,
                   " is there, but config.json says num_hidden_layers = ", config_.layers));
}

}  // namespace dejavu
