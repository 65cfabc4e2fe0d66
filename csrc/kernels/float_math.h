// The fp32 operations between the int8 products: RMSNorm, RoPE, attention.
//
// Sums use sixteen lanes on every CPU, whatever the width of its registers, and each step is one fused multiply-add. So
// every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace owlet {

constexpr int kQueries = 32;  // the most that one attend_block takes (docs/log.md, "Blocks of attention")

struct FloatMath {
  // y = x / rms(x) * weight, each (size); y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y);

  // Rotates the pairs (x[i], x[i + half]) by one position's angles: cos, sin (half).
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);

  // y (count, size) = q * scales, with one scale per row.
  void (*dequantize)(const int8_t* q, const float* scales, int64_t count, int64_t size, float* y);

  // softmax(q K^T / sqrt(size)) V of one head: q (size), keys and values (count, size) -> y (size). Scales: one per row
  // of int8, null for floats. next: the address that will be read after the values, for prefetching.
  template <typename T>
  using Attend = void(const float* q, const T* keys, const float* key_scales, const T* values,
                      const float* value_scales, int64_t count, int64_t size, float* scratch, float* y,
                      const void* next);
  Attend<float>* attend;
  Attend<int8_t>* attend_int8;

  // attend for up to kQueries queries, q_stride apart, at positions pos, pos + 1, ...: each sees the keys up to its own
  // position. The results are y_stride apart.
  void (*attend_block)(const float* q, int64_t q_stride, int64_t queries, int64_t pos, const float* keys,
                       const float* values, int64_t size, float* scratch, float* y, int64_t y_stride);
};

// The size of scratch, in floats, for attend and attend_block.
inline int64_t attention_scratch(int64_t keys, int64_t size) { return kQueries * (keys + 2 * size); }

extern const FloatMath avx512_math, fma_math;  // x86-64
extern const FloatMath neon_math;              // 64-bit Arm
extern const FloatMath generic_math;

}  // namespace owlet
