// The floating-point steps that give the same bits on CPUs, GPUs and in WebAssembly: plain products and sums. Compile
// without contraction to fused multiply-adds (-ffp-contract=off, nvcc -fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define OWLET_HOST_DEVICE __host__ __device__
#else
#define OWLET_HOST_DEVICE
#endif

namespace owlet {

OWLET_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

OWLET_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

OWLET_HOST_DEVICE inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// For |x| < 2^22, x + 1.5 * 2^23 has no bits for a fraction: the sum is rounded to the nearest integer, ties to even,
// and its low bits are that integer. Unlike lrint, this vectorizes.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4b400000;

OWLET_HOST_DEVICE inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(bits_of(x + kRound) - kRoundBits);
}

// |x| as an integer with the order of |x|: inf is above every number and NaN above inf.
OWLET_HOST_DEVICE inline int32_t abs_bits(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffff); }
constexpr int32_t kInfBits = 0x7f800000;

struct Scale {
  float scale;    // q * scale = x
  float inverse;  // round(x * inverse) = q; 0 if q must be 0
};

// For values of which the largest has these abs_bits.
OWLET_HOST_DEVICE inline Scale scale_for(int32_t amax_bits) {
  if (amax_bits >= kInfBits) return {float_of(0x7fc00000), 0.0f};  // NaN marks the row
  const float amax = float_of(amax_bits);
  return {amax / 127.0f, amax >= 1e-30f ? 127.0f / amax : 0.0f};
}

// Clamps x to the range of exp_approx. Call it in a loop of its own before exp_approx's: in one loop with it, GCC
// computes exp_approx twice.
OWLET_HOST_DEVICE inline float exp_range(float x) {
  x = x < -87.0f ? -87.0f : x;   // a NaN stays a NaN
  return x > 89.0f ? 89.0f : x;  // there 2^n in exp_approx has the bits of inf
}

// e^x to 1 ulp, inf from 88.4 on: x = n ln 2 + r, with e^r from Cephes' polynomial and 2^n from its bits. x must come
// from exp_range.
OWLET_HOST_DEVICE inline float exp_approx(float x) {
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000);
}

// x / (1 + e^-x). minus_x must be exp_range(-x).
OWLET_HOST_DEVICE inline float silu(float x, float minus_x) { return x / (1.0f + exp_approx(minus_x)); }

}  // namespace owlet
