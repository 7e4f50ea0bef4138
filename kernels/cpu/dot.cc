// Products where an output is a row of the weight. A group of outputs passes a block of inputs at a time: the block of
// x stays in L1 while all rows of weights of the group meet it, so memory is read once however many rows x has. Between
// blocks the accumulators of a group wait in the thread's scratch.
#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/selected.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dot.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

constexpr int64_t kGroupOutputs = 48;
constexpr int64_t kBlockRows = 96;       // rows of x whose accumulators, for a group, fit L2
constexpr int64_t kL1Bytes = 16 << 10;   // what a block of x may take of L1, of few rows
constexpr int64_t kL2Bytes = 256 << 10;  // and of L2, of many
static_assert(kGroupOutputs * kBlockRows * kLanes * int64_t{sizeof(float)} <= kScratchBytes);

// A tile has accumulators enough to hide the latency of a multiply-add and no more than the registers hold together
// with its rows of x and one vector of weights: 32 with AVX-512, else 16.
constexpr int kTileRows = 4;
constexpr int kTileOutputs = HWY_TARGET <= HWY_AVX3 ? 6 : 3;

// How many outputs further weights are fetched: the next tile's, and of a single stream what lies kStreamBytes ahead.
template <int kOutputs>
HWY_INLINE int64_t OutputsAhead(int64_t row_bytes) {
  if (kOutputs > 1) return kOutputs;
  return std::clamp<int64_t>((kStreamBytes + row_bytes - 1) / std::max<int64_t>(row_bytes, 1), 1, kGroupOutputs);
}

// Calls group.Outputs<n>(i) for tiles of n of the group's outputs. Up to kStreamRows of x meet one output after the
// other: memory gives a single stream the most; but of scattered outputs two side by side, between which the processor
// does not guess what comes next.
template <int kStreamRows, typename Group>
HWY_INLINE void ForOutputTiles(const Group& group, int64_t rows, bool scattered) {
  int64_t i = 0;
  const auto tiles = [&]<int kOutputs>() HWY_ATTR {
    for (; i + kOutputs <= group.count; i += kOutputs) group.template Outputs<kOutputs>(i);
  };
  if (rows > kStreamRows) {
    // Few rows leave registers for more outputs, and memory likes fewer.
    if (rows == 2 && kTileOutputs == 6) tiles.template operator()<8>();
    if (rows > kTileRows) tiles.template operator()<kTileOutputs>();
    tiles.template operator()<3>();
  } else if (scattered) {
    tiles.template operator()<2>();
  }
  tiles.template operator()<1>();
}

bool AnyStrict(const Selection& selection, int64_t rows) {
  bool any = false;
  for (int64_t r = 0; r < rows && !any; ++r) any = IsStrict(selection, r);
  return any;
}

// Which rows of x need which outputs of a group, where most need few: strict rows that selected their own.
class OwnRows {
 public:
  // Whether rows by themselves, each for what it needs, take less time than all of them in tiles.
  bool Take(const DotJob& job, int64_t first, int64_t count) {
    const int64_t rows = job.x.rows;
    if (job.selected == nullptr || job.selected->masks.empty() || rows <= kTileRows || rows > kBlockRows) return false;
    int64_t products = 0;
    std::fill_n(count_, count, 0);
    if (!AnyStrict(*job.selected, rows)) return false;
    for (int64_t r = 0; r < rows; ++r) {
      const bool strict = IsStrict(*job.selected, r);
      for (int64_t i = 0; i < count; ++i) {
        rows_[i][count_[i]] = static_cast<uint8_t>(r);
        const bool needs = !strict || Selected(job.selected->masks, r, job.outputs[first + i]);
        count_[i] += needs;
        products += needs;
      }
    }
    return BetterApart(products, rows * count);
  }

  const uint8_t* rows(int64_t i) const { return rows_[i]; }
  int64_t count(int64_t i) const { return count_[i]; }

 private:
  uint8_t rows_[kGroupOutputs][kBlockRows];
  int64_t count_[kGroupOutputs];
};

// A tile of outputs by tiles of rows, one after the other.
template <int kOutputs, typename Group>
struct OutputTile {
  const Group& group;
  int64_t i;
  int64_t rows;

  template <int kRows>
  void Tile(int64_t r) const {
    group.template Tile<kRows, kOutputs>(r, i, TurnOf(r, rows, kTileRows));
  }
};

// One block of inputs of one group of outputs.
template <typename W>
struct DotBlock {
  const DotJob& job;
  int64_t first;      // the group's outputs in the list
  int64_t count;      // and how many
  int64_t input;      // the first of the block
  int64_t inputs;     // and how many
  bool last;          // no input follows
  int64_t row;        // the first of the rows
  int64_t rows;       // and how many
  const W* const* w;  // [2 * kGroupOutputs] the outputs' weights at `input`; then what will be read after them
  float* sums;        // [kGroupOutputs][kBlockRows][kLanes]
  const uint8_t* own = nullptr;  // [rows] which ones; nullptr: from `row` on

  int64_t Row(int64_t r) const { return own != nullptr ? own[r] : row + r; }

  template <int kOutputs>
  void Outputs(int64_t i) const {
    ForRowTiles<kTileRows>(rows, OutputTile<kOutputs, DotBlock>{*this, i, rows});
  }

  template <int kRows, int kOutputs>
  HWY_INLINE void Tile(int64_t r, int64_t i, Turn turn) const {
    const float* x[kRows];
    for (int a = 0; a < kRows; ++a) x[a] = job.x.row<float>(Row(r + a)) + input;
    V sum[kRows][kOutputs];
    float* const kept = sums + (i * kBlockRows + r) * kLanes;
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
      for (int a = 0; a < kRows; ++a) {
        sum[a][o] = input == 0 ? hn::Zero(F32()) : hn::Load(F32(), kept + (o * kBlockRows + a) * kLanes);
      }
    }
    const int64_t ahead = OutputsAhead<kOutputs>(inputs * static_cast<int64_t>(sizeof(W)));
    DotTile<W, kRows, kOutputs>(w + i, w + i + ahead, turn, x, inputs, sum);
    if (last) return Finish<kRows, kOutputs>(sum, r, i);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
      for (int a = 0; a < kRows; ++a) hn::Store(sum[a][o], F32(), kept + (o * kBlockRows + a) * kLanes);
    }
  }

  template <int kRows, int kOutputs>
  HWY_INLINE void Finish(const V (&sum)[kRows][kOutputs], int64_t r, int64_t i) const {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t output = Output(job, first + i + o);
#pragma GCC unroll 8
      for (int a = 0; a < kRows; ++a) Write(job, Row(r + a), output, SumLanes(F32(), sum[a][o]));
    }
  }
};

template <typename W>
class DotRun {
 public:
  DotRun(const DotJob& job, int64_t first, int64_t last, float* scratch)
      : job_(job), first_(first), last_(last), sums_(scratch) {}

  void Run() {
    for (int64_t row = 0; row < job_.x.rows; row += kBlockRows) Rows(row, std::min(kBlockRows, job_.x.rows - row));
  }

 private:
  const W* Weights(int64_t i) const { return job_.w->weight.template row<W>(Output(job_, i)); }

  // A single row of x passes whole rows of weights; a few rows what of them fits L1, many what fits L2.
  static int64_t BlockInputs(int64_t rows, int64_t inputs) {
    if (rows == 1) return inputs;
    const int64_t bytes = rows > 4 ? kL2Bytes : kL1Bytes;
    return bytes / static_cast<int64_t>(sizeof(float)) / rows / kLineBytes * kLineBytes;
  }

  void Rows(int64_t row, int64_t rows) {
    const int64_t inputs = job_.x.cols;
    OwnRows own;
    for (int64_t first = first_; first < last_; first += kGroupOutputs) {
      const int64_t count = std::min(kGroupOutputs, last_ - first);
      const bool apart = own.Take(job_, first, count);
      const int64_t block = apart ? inputs : BlockInputs(rows, inputs);
      for (int64_t input = 0; input < inputs || input == 0; input += block) {
        const int64_t n = std::min(block, inputs - input);
        const bool last = input + n == inputs;
        const W* w[2 * kGroupOutputs];
        for (int64_t i = 0; i < count; ++i) w[i] = Weights(first + i) + input;
        for (int64_t i = 0; i < kGroupOutputs; ++i) {
          w[count + i] = last ? Weights(std::min(first + count + i, last_ - 1)) : w[std::min(i, count - 1)] + n;
        }
        for (int64_t i = 0; i < count && apart; ++i) {
          DotBlock<W>{job_, first + i, 1, 0, inputs, true, 0, own.count(i), w + i, sums_, own.rows(i)}
              .template Outputs<1>(0);
        }
        if (apart) break;
        const DotBlock<W> group{job_, first, count, input, n, last, row, rows, w, sums_};
        ForOutputTiles<1>(group, rows, Scattered(job_.outputs, first, first + count));
      }
    }
  }

  const DotJob& job_;
  const int64_t first_, last_;
  float* const sums_;  // [kGroupOutputs][kBlockRows][kLanes]
};

// int8 weights by int16 activations. Nothing is rounded, so the order does not matter.
template <bool kVnni>
struct IntegerDot {
  const DotJob& job;
  int64_t first;  // the group's outputs in the list
  int64_t count;
  int64_t last;                  // of the list, for this thread
  int64_t row;                   // the first of the rows of x
  int64_t rows;                  // and how many
  const uint8_t* own = nullptr;  // [rows] which ones; nullptr: from `row` on

  int64_t Row(int64_t r) const { return own != nullptr ? own[r] : row + r; }
  const int8_t* Weights(int64_t i) const {
    return job.w->weight.row<int8_t>(Output(job, std::min(first + i, last - 1)));
  }

  template <int kOutputs>
  void Outputs(int64_t i) const {
    ForRowTiles<kTileRows>(rows, OutputTile<kOutputs, IntegerDot>{*this, i, rows});
  }

  template <int kRows, int kOutputs>
  HWY_INLINE void Tile(int64_t r, int64_t i, Turn turn) const {
    const int8_t* w[kOutputs];
    const int8_t* next[kOutputs];
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = Weights(i + o);
      next[o] = Weights(i + OutputsAhead<kOutputs>(job.x.cols) + o);
    }
    const int16_t* x[kRows];
    for (int a = 0; a < kRows; ++a) x[a] = job.quantized.q + Row(r + a) * job.quantized.stride;
    int64_t sum[kRows][kOutputs] = {};
    for (int64_t input = 0; input < job.x.cols; input += kIntegerBlock) {
      const int64_t n = std::min(kIntegerBlock, job.x.cols - input);
      int64_t part[kRows][kOutputs];
      IntegerDotTile<kVnni>(w, next, turn, x, input, n, job.x.cols, part);
      for (int a = 0; a < kRows; ++a) {
        for (int o = 0; o < kOutputs; ++o) sum[a][o] += part[a][o];
      }
    }
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t output = Output(job, first + i + o);
      for (int a = 0; a < kRows; ++a) Write(job, Row(r + a), output, Product(job, Row(r + a), output, sum[a][o]));
    }
  }
};

template <bool kVnni>
void IntegerDotProducts(const DotJob& job, int64_t first, int64_t last) {
  OwnRows own;
  for (int64_t i = first; i < last; i += kGroupOutputs) {
    const int64_t count = std::min(kGroupOutputs, last - i);
    if (own.Take(job, i, count)) {
      for (int64_t k = 0; k < count; ++k) {
        IntegerDot<kVnni>{job, i + k, 1, last, 0, own.count(k), own.rows(k)}.template Outputs<1>(0);
      }
      continue;
    }
    // So many rows of x that they stay in L2 while the group's outputs meet them.
    const int64_t fit = kL2Bytes / (job.quantized.stride * static_cast<int64_t>(sizeof(int16_t)));
    const int64_t block = std::max<int64_t>(4, fit / 4) * kTileRows;
    for (int64_t row = 0; row < job.x.rows; row += block) {
      const int64_t rows = std::min(block, job.x.rows - row);
      ForOutputTiles<2>(IntegerDot<kVnni>{job, i, count, last, row, rows}, rows, Scattered(job.outputs, i, i + count));
    }
  }
}

int64_t DotStepInputs(DType weights) { return weights == DType::kBFloat16 ? kStepInputs<hwy::bfloat16_t> : 1; }

void PutInSteps(const float* x, int64_t inputs, float* to) {
  constexpr int64_t kStep = 2 * kLanes;
  int64_t i = 0;
  const auto put = [](const float* from, float* step) HWY_ATTR {
    for (int64_t l = 0; l < kLanes; ++l) {
      step[l] = from[2 * l];
      step[kLanes + l] = from[2 * l + 1];
    }
  };
  for (; i + kStep <= inputs; i += kStep) put(x + i, to + i);
  if (i == inputs) return;
  float rest[kStep] = {};
  std::copy(x + i, x + inputs, rest);
  put(rest, to + i);
}

void DotProducts(const DotJob& job, int64_t first, int64_t last, float* scratch) {
  switch (job.w->weight.dtype) {
    case DType::kFloat32:
      return DotRun<float>(job, first, last, scratch).Run();
    case DType::kFloat16:
      return DotRun<hwy::float16_t>(job, first, last, scratch).Run();
    case DType::kBFloat16:
      return DotRun<hwy::bfloat16_t>(job, first, last, scratch).Run();
    case DType::kInt8:
      return WithVnni([&]<bool kVnni>() HWY_ATTR { IntegerDotProducts<kVnni>(job, first, last); });
    default:
      CHECK(false) << "weights of type " << Name(job.w->weight.dtype);
  }
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(DotProducts);
HWY_EXPORT(DotStepInputs);
HWY_EXPORT(PutInSteps);

int64_t DotStepInputs(DType weights) { return HWY_DYNAMIC_DISPATCH(DotStepInputs)(weights); }

void PutInSteps(const float* x, int64_t inputs, float* to) { HWY_DYNAMIC_DISPATCH(PutInSteps)(x, inputs, to); }

void DotProducts(const DotJob& job, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DotProducts)(job, first, last, scratch);
}

}  // namespace dejavu::cpu
#endif
