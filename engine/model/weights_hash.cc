// SHA-256 over a description of the model and a few rows of each of its matrices: all the attention and MLP matrices of
// every layer, kSampledRows rows each, at fixed places. A predictor depends on every weight; one that was trained
// further differs in nearly all of them, so a sample tells models apart, and costs a few pages per matrix.
#include "engine/model/weights_hash.h"

#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/sha256.h"
#include "engine/model/weight_names.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kSampledRows = 3;

absl::StatusOr<std::vector<float>> ReadRow(const StoredTensor& tensor, int64_t row) {
  const int64_t cols = tensor.shape[1];
  std::vector<char> stored(cols * SizeOf(tensor.dtype));
  RETURN_IF_ERROR(Checkpoint::Read(tensor, row * cols, cols, stored.data()));
  std::vector<float> values(cols);
  for (int64_t i = 0; i < cols; ++i) {
    if (tensor.dtype == DType::kFloat32) {
      values[i] = reinterpret_cast<const float*>(stored.data())[i];
    } else {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(stored.data())[i];
      values[i] = tensor.dtype == DType::kFloat16 ? FloatFromFloat16(bits) : FloatFromBFloat16(bits);
    }
  }
  return values;
}

}  // namespace

absl::StatusOr<std::string> WeightsHash(const Checkpoint& checkpoint, const OptConfig& config) {
  Sha256 hash;
  hash.Add(absl::StrCat("opt ", config.layers, " ", config.hidden, " ", config.heads, " ", config.ffn, " ",
                        config.vocab, " ", config.embed, " ", config.pre_norm, "\n"));
  const WeightNames names(checkpoint, config);
  const auto add = [&](const std::string& name, const StoredTensor& tensor) -> absl::Status {
    hash.Add(absl::StrCat(name, " ", tensor.shape[0], " ", tensor.shape[1], "\n"));
    for (int64_t i = 0; i < kSampledRows; ++i) {
      ASSIGN_OR_RETURN(const std::vector<float> row, ReadRow(tensor, i * (tensor.shape[0] - 1) / (kSampledRows - 1)));
      hash.Add(row.data(), row.size() * sizeof(float));
    }
    return absl::OkStatus();
  };
  const int64_t hidden = config.hidden, ffn = config.ffn;
  const struct {
    const char* name;
    std::vector<int64_t> shape;
  } parts[] = {{"self_attn.q_proj", {hidden, hidden}},
               {"self_attn.v_proj", {hidden, hidden}},
               {"self_attn.out_proj", {hidden, hidden}},
               {"fc1", {ffn, hidden}},
               {"fc2", {hidden, ffn}}};
  ASSIGN_OR_RETURN(const WeightNames::Ends ends, names.FindEnds());
  RETURN_IF_ERROR(add("embed_tokens.weight", *ends.embedding));
  for (int32_t l = 0; l < config.layers; ++l) {
    for (const auto& part : parts) {
      const std::string name = absl::StrCat("layers.", l, ".", part.name, ".weight");
      ASSIGN_OR_RETURN(const StoredTensor* const tensor, names.Find(name, part.shape));
      RETURN_IF_ERROR(add(name, *tensor));
    }
  }
  if (ends.head != nullptr) RETURN_IF_ERROR(add("lm_head.weight", *ends.head));
  const auto digest = hash.Digest();
  return absl::StrCat("sha256:", absl::BytesToHexString({reinterpret_cast<const char*>(digest.data()), digest.size()}));
}

}  // namespace dejavu
