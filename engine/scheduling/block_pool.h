// BlockPool: which KV blocks are in use, by whom, and what the others still hold. A block whose contents are those of a
// prompt's prefix can be found by the key of that prefix and shared; when its last user leaves it stays findable until
// its memory is wanted, least recently used first. Pure bookkeeping; after construction nothing allocates. Engine
// thread only.
#ifndef ENGINE_SCHEDULING_BLOCK_POOL_H_
#define ENGINE_SCHEDULING_BLOCK_POOL_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace dejavu {

// Names the contents of a block: a chained SHA-256, cut to 128 bits, of everything from the first token to its last
// one, and of whom they belong to.
struct BlockKey {
  std::array<uint64_t, 2> bits = {};
  friend bool operator==(const BlockKey& a, const BlockKey& b) { return a.bits == b.bits; }
  template <typename H>
  friend H AbslHashValue(H h, const BlockKey& key) {
    return H::combine(std::move(h), key.bits);
  }
};

// Of every full block of the tokens. Different tenants, salts or groups have no key in common.
std::vector<BlockKey> BlockKeys(absl::string_view tenant, absl::string_view salt, absl::Span<const int32_t> tokens,
                                int32_t block_tokens, uint64_t group = 0);

class BlockPool {
 public:
  BlockPool(int32_t blocks, int32_t block_tokens);

  int32_t total() const { return static_cast<int32_t>(blocks_.size()); }
  // What Take can give: blocks without a user, findable or not.
  int32_t free() const { return static_cast<int32_t>(free_.size()) + cached_; }
  // Of those, the findable ones.
  int32_t cached() const { return cached_; }
  int32_t block_tokens() const { return block_tokens_; }
  int32_t BlocksFor(int64_t tokens) const { return static_cast<int32_t>((tokens + block_tokens_ - 1) / block_tokens_); }

  // Fills `blocks`, each with one user, or takes none and returns false when fewer are free.
  bool Take(absl::Span<int32_t> blocks);
  // One user less for each. Promises that were not kept are withdrawn.
  void Give(absl::Span<const int32_t> blocks);

  // How many of the first keys are there, and the blocks with one user more in `blocks`, which is as long as `keys`.
  int32_t Share(absl::Span<const BlockKey> keys, absl::Span<int32_t> blocks);
  // `block`, which has one user, will hold what the key names; ignored where another block does or will.
  void Promise(const BlockKey& key, int32_t block);
  // The block that will hold what the key names, promised and not kept yet; -1: none.
  int32_t Promised(const BlockKey& key) const;
  // A block holds what the key names.
  bool Known(const BlockKey& key) const;
  // Now it does hold it.
  void Keep(int32_t block);

  // Of what has been put into a block since it was taken: numbers that were beyond the range of their type.
  void NoteSaturated(int32_t block, int64_t count) { blocks_[block].saturated += count; }
  int64_t saturated(int32_t block) const { return blocks_[block].saturated; }

  // CHECKs what must always hold. Slow: for tests.
  void CheckConsistent() const;

 private:
  struct Block {
    int32_t users = 0;
    bool has_key = false;  // the key's entry names this block
    bool kept = false;     // and the contents are there
    BlockKey key;
    int64_t saturated = 0;
    int32_t older = -1, newer = -1;  // among the cached ones
  };
  void Forget(Block& block);
  void Uncache(int32_t i);

  const int32_t block_tokens_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // without a user and without a key; a stack: what was used last is warm
  absl::flat_hash_map<BlockKey, int32_t> by_key_;
  int32_t oldest_ = -1, newest_ = -1, cached_ = 0;  // without a user, but kept
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_BLOCK_POOL_H_
