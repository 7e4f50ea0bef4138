// Random numbers that depend only on a seed and on where they are used, for synthetic weights. Any thread.
#ifndef ENGINE_LOAD_SYNTHETIC_NOISE_H_
#define ENGINE_LOAD_SYNTHETIC_NOISE_H_

#include <cstdint>
#include <vector>

namespace dejavu {

uint64_t Scramble(uint64_t x);  // splitmix64

// What draws random numbers of its own.
enum class NoisePart : uint64_t {
  kPool,
  kTokens,
  kPositions,
  kQkv,
  kOut,
  kUp,
  kDown,
  kDirections,
  kMixing,
  kOrder,
  kSigns
};
uint64_t NoiseKey(uint64_t seed, NoisePart part, int32_t layer = 0);

float SumOfSquares(const float* values, int64_t count);

// One pool of normal variates. A row of noise is a run of it, from an offset that is another one for each row of a
// matrix: a pool that has been scaled and rounded once is then copied at the speed of memory. Constant after
// construction.
class NoisePool {
 public:
  NoisePool(uint64_t seed, int64_t longest_row);

  // Where row `row` of the matrix of `key` starts: another place for each of kSize rows.
  static int64_t Offset(uint64_t key, int64_t row);
  const float* Row(uint64_t key, int64_t row) const { return &values_[Offset(key, row)]; }
  double SquareOfRow(uint64_t key, int64_t row, int64_t count) const {
    const int64_t offset = Offset(key, row);
    return squares_[offset + count] - squares_[offset];
  }
  const std::vector<float>& values() const { return values_; }
  float largest() const { return largest_; }

 private:
  static constexpr int64_t kSize = int64_t{1} << 18;
  std::vector<float> values_;    // [kSize + longest row], the end repeats the start
  std::vector<double> squares_;  // sums of the squares of the first so many
  float largest_ = 0.0f;
};

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_NOISE_H_
