// Matrix products of a warp, and how it loads matrices for them.
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/base/float16.h"
#include "simt.h"

namespace dejavu::cuda {
namespace {

using simt::kWarp;

struct Half {
  static constexpr int kPerRegister = 2;
  static float Element(uint32_t bits) { return FloatFromFloat16(static_cast<uint16_t>(bits)); }
};
struct BFloat16 {
  static constexpr int kPerRegister = 2;
  static float Element(uint32_t bits) { return FloatFromBFloat16(static_cast<uint16_t>(bits)); }
};
struct Int8 {
  static constexpr int kPerRegister = 4;
  static int32_t Element(uint32_t bits) { return static_cast<int8_t>(bits); }
};

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "... m16n8k32". With E elements in a register, lane l holds of
//   A [16, 8 E], register r: row l/4 + 8 (r%2),  columns E (l%4) + 4 E (r/2) + 0 ... E-1
//   B [8 E, 8],  register r: column l/4,         rows    E (l%4) + 4 E r     + 0 ... E-1
//   D [16, 8],   element i:  row l/4 + 8 (i/2),  column  2 (l%4) + i%2
template <typename Type, typename Sum>
void Mma(const char* what, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  struct Operand {
    Sum* d;
    const uint32_t *a, *b;
  } operand{d, a, b};
  simt::MeetWarp(
      what, simt::kAllLanes, &operand,
      [](uint32_t, void* const* operands) {
        constexpr int E = Type::kPerRegister, K = 8 * E, kBits = 32 / E;
        Sum left[16][K], right[K][8];
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          const auto& of = *static_cast<Operand*>(operands[lane]);
          for (int e = 0; e < E; ++e) {
            const int k = E * (lane % 4) + e;
            for (int r = 0; r < 4; ++r)
              left[lane / 4 + 8 * (r % 2)][k + 4 * E * (r / 2)] = Type::Element(of.a[r] >> (kBits * e));
            for (int r = 0; r < 2; ++r) right[k + 4 * E * r][lane / 4] = Type::Element(of.b[r] >> (kBits * e));
          }
        }
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          Sum* const sums = static_cast<Operand*>(operands[lane])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            Sum sum = sums[i];
            for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
            sums[i] = sum;
          }
        }
      },
      where);
}

}  // namespace

namespace {

Vector16 LoadFour(const char* what, bool transposed, const void* shared, simt::Where where) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) simt::Fail("ldmatrix: a row is not aligned to 16 bytes");
  struct Operand {
    const void* row;
    bool transposed;
    Vector16 result;
  } operand{shared, transposed, {}};
  simt::MeetWarp(
      what, simt::kAllLanes, &operand,
      [](uint32_t, void* const* operands) {
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
          auto& mine = *static_cast<Operand*>(operands[lane]);
          for (uint32_t matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (uint32_t i = 0; i < 2; ++i) {
              const uint32_t along = 2 * (lane % 4) + i, across = lane / 4;
              const uint32_t row = mine.transposed ? along : across, column = mine.transposed ? across : along;
              const auto* from = static_cast<const uint16_t*>(static_cast<Operand*>(operands[8 * matrix + row])->row);
              pair[i] = from[column];
            }
            mine.result.w[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
          }
        }
      },
      where);
  return operand.result;
}

}  // namespace

Vector16 LoadMatrices(const void* shared, simt::Where where) { return LoadFour("LoadMatrices", false, shared, where); }
Vector16 LoadMatricesTransposed(const void* shared, simt::Where where) {
  return LoadFour("LoadMatricesTransposed", true, shared, where);
}

uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<Half>("MmaF16", d, a, b, where);
}
void MmaBF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<BFloat16>("MmaBF16", d, a, b, where);
}
void MmaS8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  Mma<Int8>("MmaS8", d, a, b, where);
}

}  // namespace dejavu::cuda
