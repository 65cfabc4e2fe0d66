// What lies between the int8 products, in fp32: norms, rotations, attention.
//
// Sums run in sixteen lanes, whatever the CPU's registers hold, and each step of them is one fused
// multiply-add: every instruction set gives the same result to the last bit.
#pragma once

#include <cstdint>

namespace owlet {

constexpr int kQueries = 32;  // that attend_block takes at once

struct FloatMath {
  // y = x / rms(x) * weight, all (size); y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y);

  // Rotates the pairs (x[i], x[i + half]) by one position's angles: cos, sin (half).
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);

  // y (count, size) = q * scales, one a row.
  void (*dequantize)(const int8_t* q, const float* scales, int64_t count, int64_t size, float* y);

  // softmax(q K^T / sqrt(size)) V of one head: q (size), keys and values (count, size) -> y (size).
  // next: what will be read after the values.
  void (*attend)(const float* q, const float* keys, const float* values, int64_t count, int64_t size, float* scratch,
                 float* y, const void* next);

  // The same over int8 keys and values, with a scale a row.
  void (*attend_int8)(const float* q, const int8_t* keys, const float* key_scales, const int8_t* values,
                      const float* value_scales, int64_t count, int64_t size, float* scratch, float* y,
                      const void* next);

  // attend for up to kQueries queries, q_stride apart, at positions pos, pos + 1 ...: each sees the
  // keys up to its own position. The results are y_stride apart.
  void (*attend_block)(const float* q, int64_t q_stride, int64_t queries, int64_t pos, const float* keys,
                       const float* values, int64_t size, float* scratch, float* y, int64_t y_stride);
};

// Floats of scratch that both need.
inline int64_t attention_scratch(int64_t keys, int64_t size) { return kQueries * (keys + 2 * size); }

extern const FloatMath avx512_math, fma_math;  // x86-64
extern const FloatMath neon_math;              // 64-bit Arm
extern const FloatMath generic_math;

}  // namespace owlet
