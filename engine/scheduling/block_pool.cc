#include "engine/scheduling/block_pool.h"

#include <algorithm>
#include <cstring>

#include "engine/formats/sha256.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

BlockKey KeyOf(Sha256& hash) {
  const auto digest = hash.Digest();
  BlockKey key;
  std::memcpy(key.bits.data(), digest.data(), sizeof key.bits);
  return key;
}

}  // namespace

std::vector<BlockKey> BlockKeys(absl::string_view tenant, absl::string_view salt, absl::Span<const int32_t> tokens,
                                int32_t block_tokens, uint64_t group) {
  Sha256 hash;
  const uint64_t head[] = {group, tenant.size(), salt.size()};  // "ab" "c" is not "a" "bc"
  hash.Add(head, sizeof head);
  hash.Add(tenant);
  hash.Add(salt);
  BlockKey key = KeyOf(hash);
  std::vector<BlockKey> keys(tokens.size() / block_tokens);
  for (size_t i = 0; i < keys.size(); ++i) {
    hash.Add(&key, sizeof key);
    hash.Add(&tokens[i * block_tokens], block_tokens * sizeof(int32_t));
    key = keys[i] = KeyOf(hash);
  }
  return keys;
}

BlockPool::BlockPool(int32_t blocks, int32_t block_tokens) : block_tokens_(block_tokens) {
  CHECK(blocks > 0 && block_tokens > 0) << blocks << " blocks of " << block_tokens;
  blocks_.resize(blocks);
  free_.resize(blocks);
  for (int32_t i = 0; i < blocks; ++i) free_[i] = blocks - 1 - i;
  by_key_.reserve(2 * blocks);
}

bool BlockPool::Take(absl::Span<int32_t> blocks) {
  if (static_cast<int64_t>(blocks.size()) > free()) return false;
  for (int32_t& block : blocks) {
    if (free_.empty()) {
      const int32_t evicted = oldest_;
      Uncache(evicted);
      Forget(blocks_[evicted]);
      free_.push_back(evicted);
    }
    block = free_.back();
    free_.pop_back();
    blocks_[block].users = 1;
    blocks_[block].saturated = 0;
  }
  return true;
}

// Backwards: of a prefix, the end is evicted before the beginning, without which it could not be found.
void BlockPool::Give(absl::Span<const int32_t> blocks) {
  for (auto i = blocks.rbegin(); i != blocks.rend(); ++i) {
    Block& block = blocks_[*i];
    CHECK(block.users > 0) << "block " << *i << " given back twice";
    if (--block.users > 0) continue;
    if (block.kept) {
      block.older = newest_;
      (newest_ < 0 ? oldest_ : blocks_[newest_].newer) = *i;
      newest_ = *i;
      ++cached_;
    } else {
      Forget(block);
      free_.push_back(*i);
    }
  }
}

int32_t BlockPool::Share(absl::Span<const BlockKey> keys, absl::Span<int32_t> blocks) {
  int32_t found = 0;
  for (; found < static_cast<int32_t>(keys.size()); ++found) {
    const auto entry = by_key_.find(keys[found]);
    if (entry == by_key_.end() || !blocks_[entry->second].kept) break;
    blocks[found] = entry->second;
    if (blocks_[entry->second].users++ == 0) Uncache(entry->second);
  }
  return found;
}

void BlockPool::Promise(const BlockKey& key, int32_t block) {
  CHECK(blocks_[block].users == 1 && !blocks_[block].has_key) << "block " << block << " is not one's own";
  if (!by_key_.try_emplace(key, block).second) return;
  blocks_[block].has_key = true;
  blocks_[block].key = key;
}

int32_t BlockPool::Promised(const BlockKey& key) const {
  const auto entry = by_key_.find(key);
  return entry != by_key_.end() && !blocks_[entry->second].kept ? entry->second : -1;
}

bool BlockPool::Known(const BlockKey& key) const {
  const auto entry = by_key_.find(key);
  return entry != by_key_.end() && blocks_[entry->second].kept;
}

void BlockPool::Keep(int32_t block) {
  if (blocks_[block].has_key) blocks_[block].kept = true;
}

void BlockPool::Forget(Block& block) {
  if (block.has_key) by_key_.erase(block.key);
  block.has_key = block.kept = false;
}

void BlockPool::Uncache(int32_t i) {
  Block& block = blocks_[i];
  (block.older < 0 ? oldest_ : blocks_[block.older].newer) = block.newer;
  (block.newer < 0 ? newest_ : blocks_[block.newer].older) = block.older;
  block.older = block.newer = -1;
  --cached_;
}

void BlockPool::CheckConsistent() const {
  std::vector<int> seen(blocks_.size(), 0);
  for (int32_t i : free_) {
    CHECK(blocks_[i].users == 0 && !blocks_[i].has_key) << "free block " << i;
    ++seen[i];
  }
  int32_t cached = 0;
  for (int32_t i = oldest_, before = -1; i >= 0; before = i, i = blocks_[i].newer) {
    CHECK(blocks_[i].users == 0 && blocks_[i].kept && blocks_[i].older == before) << "cached block " << i;
    CHECK(blocks_[i].newer >= 0 || newest_ == i) << "the newest is " << newest_ << ", not " << i;
    ++seen[i];
    ++cached;
  }
  CHECK(cached == cached_) << cached << " cached, " << cached_ << " counted";
  size_t keys = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    CHECK(seen[i] == (blocks_[i].users == 0 ? 1 : 0)) << "block " << i << " has " << blocks_[i].users << " users";
    CHECK(!blocks_[i].kept || blocks_[i].has_key) << "block " << i;
    if (!blocks_[i].has_key) continue;
    const auto entry = by_key_.find(blocks_[i].key);
    CHECK(entry != by_key_.end() && entry->second == static_cast<int32_t>(i)) << "the key of block " << i;
    ++keys;
  }
  CHECK(keys == by_key_.size()) << by_key_.size() << " keys, " << keys << " of blocks";
}

}  // namespace dejavu
