// KvCache: the storage of the KV blocks of all layers, on the device, taken once; a rank of several keeps its own
// heads, or nothing where it has none. Engine thread only.
#ifndef ENGINE_MODEL_KV_CACHE_H_
#define ENGINE_MODEL_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/model_shape.h"
#include "kernels/backend.h"

namespace dejavu {

// The type of keys and values by its name in options: "fp16" or "fp32".
absl::StatusOr<DType> ParseKvType(absl::string_view name);

class KvCache {
 public:
  // Bytes of one block over all layers, keys and values of so many heads.
  static int64_t BlockBytes(const ModelShape& shape, int32_t block_tokens, DType dtype, int32_t heads);

  static absl::StatusOr<KvCache> Create(Backend& backend, const ModelShape& shape, int32_t blocks, int32_t block_tokens,
                                        DType dtype, int32_t heads);

  const KvLayer& layer(int32_t l) const { return layers_[l]; }

 private:
  Buffer storage_;
  std::vector<KvLayer> layers_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_KV_CACHE_H_
