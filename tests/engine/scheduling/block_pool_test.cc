#include "engine/scheduling/block_pool.h"

#include <numeric>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;

std::vector<int32_t> Tokens(int count, int first = 0) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST(BlockKeys, NameFullBlocksAndEverythingBeforeThem) {
  const auto keys = BlockKeys("t", "s", Tokens(11), 4);
  ASSERT_EQ(keys.size(), 2u);
  EXPECT_EQ(BlockKeys("t", "s", Tokens(8), 4), keys);
  std::vector<int32_t> other = Tokens(8);
  other[0] = 99;
  const auto changed = BlockKeys("t", "s", other, 4);
  EXPECT_FALSE(changed[0] == keys[0]);
  EXPECT_FALSE(changed[1] == keys[1]) << "the same tokens after others are something else";
}

TEST(BlockKeys, KeepTenantsAndSaltsApart) {
  EXPECT_NE(BlockKeys("t", "s", Tokens(4), 4, 1)[0], BlockKeys("t", "s", Tokens(4), 4)[0]) << "another group";
  const auto key = [](const char* tenant, const char* salt) { return BlockKeys(tenant, salt, Tokens(4), 4)[0]; };
  EXPECT_FALSE(key("a", "") == key("b", ""));
  EXPECT_FALSE(key("a", "x") == key("a", "y"));
  EXPECT_FALSE(key("ab", "c") == key("a", "bc"));
}

class BlockPoolTest : public testing::Test {
 protected:
  void TearDown() override { pool_.CheckConsistent(); }
  std::vector<int32_t> Take(int count) {
    std::vector<int32_t> blocks(count);
    return pool_.Take(absl::MakeSpan(blocks)) ? blocks : std::vector<int32_t>();
  }
  std::vector<int32_t> Share(const std::vector<BlockKey>& keys) {
    std::vector<int32_t> blocks(keys.size());
    blocks.resize(pool_.Share(keys, absl::MakeSpan(blocks)));
    return blocks;
  }
  // Blocks with those contents, without a user.
  std::vector<int32_t> Cache(const std::vector<BlockKey>& keys) {
    const std::vector<int32_t> blocks = Take(static_cast<int>(keys.size()));
    for (size_t i = 0; i < keys.size(); ++i) {
      pool_.Promise(keys[i], blocks[i]);
      pool_.Keep(blocks[i]);
    }
    pool_.Give(blocks);
    return blocks;
  }

  BlockPool pool_{8, 4};
};

TEST_F(BlockPoolTest, SharesWhatIsKeptAndOnlyThat) {
  const auto keys = BlockKeys("", "", Tokens(12), 4);
  const std::vector<int32_t> blocks = Take(3);
  for (int i = 0; i < 3; ++i) pool_.Promise(keys[i], blocks[i]);
  EXPECT_EQ(pool_.Promised(keys[0]), blocks[0]);
  EXPECT_THAT(Share(keys), ElementsAre());
  pool_.Keep(blocks[0]);
  pool_.Keep(blocks[1]);
  EXPECT_TRUE(pool_.Known(keys[1]));
  EXPECT_THAT(Share(keys), ElementsAre(blocks[0], blocks[1]));
  pool_.Give(blocks);
  EXPECT_EQ(pool_.free(), 6) << "two blocks still have a user";
  EXPECT_EQ(pool_.Promised(keys[2]), -1) << "a promise that was not kept is withdrawn";
  pool_.Give({blocks[0], blocks[1]});
  EXPECT_EQ(pool_.free(), 8);
  EXPECT_EQ(pool_.cached(), 2);
}

TEST_F(BlockPoolTest, GivesIdleBlocksAwayLeastRecentlyUsedFirstAndPrefixesFromTheirEnd) {
  const auto a = BlockKeys("a", "", Tokens(12), 4), b = BlockKeys("b", "", Tokens(8), 4);
  Cache(a);
  Cache(b);
  EXPECT_EQ(pool_.cached(), 5);
  pool_.Give(Share(a));        // used last
  const auto taken = Take(4);  // 3 were empty: one is evicted
  EXPECT_THAT(Share(b), testing::SizeIs(1)) << "the end of the one used longest ago went first";
  EXPECT_THAT(Share(a), testing::SizeIs(3));
}

TEST_F(BlockPoolTest, NeverGivesAwayWhatIsUsedAndTakesAllOrNothing) {
  const auto keys = BlockKeys("", "", Tokens(12), 4);
  Cache(keys);
  const std::vector<int32_t> shared = Share(keys);
  EXPECT_THAT(Take(6), ElementsAre());
  EXPECT_EQ(pool_.free(), 5);
  const std::vector<int32_t> taken = Take(5);
  for (int32_t block : taken) EXPECT_THAT(shared, testing::Not(testing::Contains(block)));
  EXPECT_THAT(Share(keys), testing::SizeIs(3));
}

TEST_F(BlockPoolTest, TheFirstPromiseOfAKeyCounts) {
  const auto keys = BlockKeys("", "", Tokens(4), 4);
  const std::vector<int32_t> first = Take(1), second = Take(1);
  pool_.Promise(keys[0], first[0]);
  pool_.Promise(keys[0], second[0]);
  pool_.Keep(second[0]);
  EXPECT_EQ(pool_.Promised(keys[0]), first[0]);
  pool_.Give(second);
  pool_.Keep(first[0]);
  EXPECT_EQ(Share(keys), first);
}

}  // namespace
}  // namespace dejavu
