// The floating-point steps that give the same bits on CPU and CUDA. Compile without contraction to fused multiply-adds
// (-ffp-contract=off, nvcc -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __wasm__
#include <wasm_simd128.h>
#endif

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
// and its low bits are that integer. Unlike lrint, this vectorises.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4b400000;

OWLET_HOST_DEVICE inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(bits_of(x + kRound) - kRoundBits);
}

// |x| as an integer with the order of |x|: inf is above every number and NaN above inf.
OWLET_HOST_DEVICE inline int32_t abs_bits(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffff); }
constexpr int32_t kInfBits = 0x7f800000;

struct TokenScale {
  float scale;    // q * scale = x
  float inverse;  // round(x * inverse) = q; 0 if q must be 0
};

OWLET_HOST_DEVICE inline TokenScale token_scale(int32_t amax_bits) {
  if (amax_bits >= kInfBits) return {float_of(0x7fc00000), 0.0f};  // NaN marks the token
  const float amax = float_of(amax_bits);
  return {amax / 127.0f, amax >= 1e-30f ? 127.0f / amax : 0.0f};
}

#ifdef __wasm__
// WebAssembly has no fused multiply-add, and compilers do not vectorise one in software, so here it is, in registers of
// four. Both round once, so that the text is the same in a browser.
using Wide = float __attribute__((vector_size(16), aligned(4), may_alias));
using WideBits = uint32_t __attribute__((vector_size(16)));
inline Wide wide(float x) { return (Wide)wasm_f32x4_splat(x); }
inline WideBits bits_of(Wide x) { return (WideBits)x; }
inline Wide float_of(WideBits x) { return (Wide)x; }

// A product of two floats is exact in double. Its sum with c is rounded towards zero there, and the last bit set if
// that cut something off, so that rounding to float finds the sum on the right side of each tie (Boldo and Melquiond,
// 2008).
inline float fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c, back = sum - product;
  const double error = (product - (sum - back)) + (c - back);  // of the sum, which is exactly sum + error
  int64_t bits, error_bits;
  std::memcpy(&bits, &sum, 8), std::memcpy(&error_bits, &error, 8);
  if (std::fabs(error) > 0) bits = (bits + ((bits ^ error_bits) >> 63)) | 1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
}

__attribute__((noinline)) inline Wide fma_of_ties(Wide a, Wide b, Wide c) {
  return Wide{fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1]), fma(a[2], b[2], c[2]), fma(a[3], b[3], c[3])};
}

// Two roundings, to double and to float, differ from one only where the first gives a tie of the second. (Numbers below
// 2^-126 have other ties, which no sum depends on.)
__attribute__((always_inline)) inline Wide fma(Wide a, Wide b, Wide c) {
  const auto low = [](Wide x) { return wasm_f64x2_promote_low_f32x4((v128_t)x); };
  const auto high = [&](Wide x) { return low((Wide)wasm_i64x2_shuffle((v128_t)x, (v128_t)x, 1, 1)); };
  const v128_t x = wasm_f64x2_add(wasm_f64x2_mul(low(a), low(b)), low(c));
  const v128_t y = wasm_f64x2_add(wasm_f64x2_mul(high(a), high(b)), high(c));
  const v128_t rest = wasm_v128_and(wasm_i32x4_shuffle(x, y, 0, 2, 4, 6), wasm_i32x4_const_splat(0x1fffffff));
  if (wasm_v128_any_true(wasm_i32x4_eq(rest, wasm_i32x4_const_splat(0x10000000)))) [[unlikely]]
    return fma_of_ties(a, b, c);
  return (Wide)wasm_i64x2_shuffle(wasm_f32x4_demote_f64x2_zero(x), wasm_f32x4_demote_f64x2_zero(y), 0, 2);
}
#else
using Wide = float;
OWLET_HOST_DEVICE inline Wide wide(float x) { return x; }
using std::fma;  // a * b + c, rounded once
#endif

// Loops over exp_approx take kWide floats at a time.
constexpr int kWide = sizeof(Wide) / sizeof(float);
OWLET_HOST_DEVICE inline Wide& wide(float* x) { return *reinterpret_cast<Wide*>(x); }

// Clamps x to the range of exp_approx. Call it in a loop of its own before exp_approx's: in one loop with it, GCC
// computes exp_approx twice.
OWLET_HOST_DEVICE inline float exp_range(float x) {
  x = x < -87.0f ? -87.0f : x;   // a NaN stays a NaN
  return x > 89.0f ? 89.0f : x;  // there 2^n in exp_approx has the bits of inf
}

// e^x to 1 ulp, inf from 88.4 on: x = n ln 2 + r, with e^r from Cephes' polynomial and 2^n from its bits. x must come
// from exp_range.
OWLET_HOST_DEVICE inline Wide exp_approx(Wide x) {
  const Wide shifted = fma(x, wide(1.44269504f), wide(kRound));
  const Wide n = shifted - kRound;
  const Wide r = fma(n, wide(2.12194440e-4f), fma(n, wide(-0.693359375f), x));
  Wide p = wide(1.9875691500e-4f);
  p = fma(p, r, wide(1.3981999507e-3f));
  p = fma(p, r, wide(8.3334519073e-3f));
  p = fma(p, r, wide(4.1665795894e-2f));
  p = fma(p, r, wide(1.6666665459e-1f));
  p = fma(p, r, wide(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000);
}

#ifdef __wasm__
inline float exp_approx(float x) { return exp_approx(wide(x))[0]; }
#endif

// x / (1 + e^-x). minus_x must be exp_range(-x).
OWLET_HOST_DEVICE inline Wide silu(Wide x, Wide minus_x) { return x / (1.0f + exp_approx(minus_x)); }

}  // namespace owlet
