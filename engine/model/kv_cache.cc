#include "engine/model/kv_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<DType> ParseKvType(absl::string_view name) {
  if (name == "fp16") return DType::kFloat16;
  if (name == "fp32") return DType::kFloat32;
  return absl::InvalidArgumentError(absl::StrCat("kv dtype is '", name, "'; it must be fp16 or fp32"));
}

int64_t KvCache::BlockBytes(const ModelShape& shape, int32_t block_tokens, DType dtype, int32_t heads) {
  return int64_t{2} * shape.layers * heads * shape.head_dim * block_tokens * SizeOf(dtype);
}

absl::StatusOr<KvCache> KvCache::Create(Backend& backend, const ModelShape& shape, int32_t blocks, int32_t block_tokens,
                                        DType dtype, int32_t heads) {
  KvCache cache;
  ASSIGN_OR_RETURN(cache.storage_, backend.Allocate(blocks * BlockBytes(shape, block_tokens, dtype, heads)));
  const int64_t part_bytes = int64_t{blocks} * heads * shape.head_dim * block_tokens * SizeOf(dtype);
  char* next = static_cast<char*>(cache.storage_.data());
  for (int32_t l = 0; l < shape.layers; ++l) {
    cache.layers_.push_back({next, next + part_bytes, blocks, heads, block_tokens, shape.head_dim, dtype});
    next += 2 * part_bytes;
  }
  return cache;
}

}  // namespace dejavu
