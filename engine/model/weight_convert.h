// Matrix values from one type to another on the host. Any thread.
#ifndef ENGINE_MODEL_WEIGHT_CONVERT_H_
#define ENGINE_MODEL_WEIGHT_CONVERT_H_

#include <cstdint>

#include "kernels/tensor.h"

namespace dejavu {

// Of a matrix: read, made or written at a time, in whole rows.
inline constexpr int64_t kStripeBytes = int64_t{4} << 20;

// `source` holds finite values of float32, float16 or bfloat16.
void WidenValues(const void* source, DType dtype, int64_t count, float* target);

// Finite values to float32, float16 or bfloat16, to the nearest, ties to even. False where one of them is beyond the
// largest of the type; `target` then holds an infinity.
bool NarrowValues(const float* source, int64_t count, DType dtype, void* target);

// int8 is symmetric and by row: value = integer * scale, the largest magnitude of a row gets 127.
inline float Int8Scale(float largest_magnitude) { return largest_magnitude / 127.0f; }
// What a row of that scale is multiplied with to get integers; 0 for a row that rounds to zeros.
inline float Int8Inverse(float scale) { return scale < 1e-35f ? 0.0f : 1.0f / scale; }
// Integers are rounded to the nearest, ties to even.
void QuantiseRow(const float* source, int64_t count, float inverse, int8_t* target);
// The same where each column has an inverse of its own, [count].
void QuantiseColumns(const float* source, int64_t count, const float* inverses, int8_t* target);

// target [cols, rows] = source [rows, cols].
void TransposeValues(const void* source, int64_t element_bytes, int64_t rows, int64_t cols, void* target);

float LargestMagnitude(const float* values, int64_t count);

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_CONVERT_H_
