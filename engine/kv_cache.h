// KvPool: which KV blocks are free, on the host. KvCache: the storage of all blocks of all layers, on the device, taken
// once. Engine thread only.
#ifndef ENGINE_KV_CACHE_H_
#define ENGINE_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/opt_config.h"
#include "kernels/backend.h"

namespace dejavu {

class KvPool {
 public:
  KvPool(int32_t blocks, int32_t block_tokens);

  int32_t total() const { return total_; }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }
  int32_t block_tokens() const { return block_tokens_; }
  int32_t BlocksFor(int64_t tokens) const { return static_cast<int32_t>((tokens + block_tokens_ - 1) / block_tokens_); }

  // Fills `blocks` or, when fewer are free, takes none and returns false.
  bool Take(absl::Span<int32_t> blocks);
  void Give(absl::Span<const int32_t> blocks);

 private:
  const int32_t total_;
  const int32_t block_tokens_;
  std::vector<int32_t> free_;  // a stack: what was used last is warm
};

// The type of keys and values by its name in options: "fp16" or "fp32".
absl::StatusOr<DType> ParseKvType(absl::string_view name);

class KvCache {
 public:
  // Bytes of one block over all layers, keys and values.
  static int64_t BlockBytes(const OptConfig& config, int32_t block_tokens, DType dtype);

  static absl::StatusOr<KvCache> Create(Backend& backend, const OptConfig& config, int32_t blocks, int32_t block_tokens,
                                        DType dtype);

  const KvLayer& layer(int32_t l) const { return layers_[l]; }

 private:
  Buffer storage_;
  std::vector<KvLayer> layers_;
};

}  // namespace dejavu

#endif  // ENGINE_KV_CACHE_H_
