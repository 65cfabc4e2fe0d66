// Compiles float_math.inl once for each of five kinds of registers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns about its own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace owlet {
namespace {

constexpr int kLanes = 16;

// The prefetch distance for keys and values, in bytes (docs/log.md, "Prefetch in attention").
constexpr int64_t kAhead = 4096;

// Every sum has this order: add the upper half to the lower, then add neighbours three times.
inline float sum_of(const float* x) {
  float sum[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) sum[i] = x[i] + x[i + kLanes / 2];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

}  // namespace

#if defined(__x86_64__)

// The sums of four vectors whose halves are already added.
__attribute__((target("avx"))) inline void sums_of_folded(__m256 a, __m256 b, __m256 c, __m256 d, float* y) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

namespace lanes_avx512 {
#define TARGET __attribute__((target("avx512f")))
constexpr int kRows = 8, kVecs = 2;  // enough sums to keep the multipliers busy, few enough for the registers
struct Lanes {
  __m512 part[1];
};
TARGET inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
TARGET inline Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
TARGET inline Lanes load(const int8_t* x) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))))};
}
TARGET inline void store(Lanes x, float* y) { _mm512_storeu_ps(y, x.part[0]); }
TARGET inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
TARGET inline __m256 fold(Lanes x) {
  const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(x.part[0]), 1);
  return _mm256_add_ps(_mm512_castps512_ps256(x.part[0]), _mm256_castpd_ps(high));
}
TARGET inline void sums_of(const Lanes* x, float* y) {
  sums_of_folded(fold(x[0]), fold(x[1]), fold(x[2]), fold(x[3]), y);
}
#include "float_math.inl"
#undef TARGET
}  // namespace lanes_avx512
const FloatMath avx512_math = lanes_avx512::math;

namespace lanes_fma {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int kRows = 6, kVecs = 1;
struct Lanes {
  __m256 part[2];
};
TARGET inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TARGET inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
TARGET inline __m256 load_half(const int8_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
TARGET inline Lanes load(const int8_t* x) { return {load_half(x), load_half(x + 8)}; }
TARGET inline void store(Lanes x, float* y) { _mm256_storeu_ps(y, x.part[0]), _mm256_storeu_ps(y + 8, x.part[1]); }
TARGET inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
TARGET inline __m256 fold(Lanes x) { return _mm256_add_ps(x.part[0], x.part[1]); }
TARGET inline void sums_of(const Lanes* x, float* y) {
  sums_of_folded(fold(x[0]), fold(x[1]), fold(x[2]), fold(x[3]), y);
}
#include "float_math.inl"
#undef TARGET
}  // namespace lanes_fma
const FloatMath fma_math = lanes_fma::math;

#elif defined(__aarch64__)

namespace lanes_neon {
#define TARGET
constexpr int kRows = 6, kVecs = 1;
struct Lanes {
  float32x4_t part[4];
};
inline Lanes splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Lanes load(const float* x) { return {vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}; }
inline Lanes load(const int8_t* x) {
  const int8x16_t all = vld1q_s8(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_s8(vget_high_s8(all));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))};
}
inline void store(const Lanes& x, float* y) {
  for (int i = 0; i < 4; ++i) vst1q_f32(y + 4 * i, x.part[i]);
}
inline float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
inline float32x4_t fold(const Lanes& x) {
  return vpaddq_f32(vaddq_f32(x.part[0], x.part[2]), vaddq_f32(x.part[1], x.part[3]));
}
inline void sums_of(const Lanes* x, float* y) {
  vst1q_f32(y, vpaddq_f32(vpaddq_f32(fold(x[0]), fold(x[1])), vpaddq_f32(fold(x[2]), fold(x[3]))));
}
#include "float_math.inl"
#undef TARGET
}  // namespace lanes_neon
const FloatMath neon_math = lanes_neon::math;

#elif defined(__wasm_simd128__)

namespace lanes_wasm {
#define TARGET __attribute__((always_inline))
constexpr int kRows = 2, kVecs = 1;
struct Lanes {
  Wide part[4];
};
inline Lanes splat(float x) { return {wide(x), wide(x), wide(x), wide(x)}; }
template <typename T>
inline Lanes load(const T* x) {
  Lanes y;
  for (int i = 0; i < kLanes; ++i) y.part[i / 4][i % 4] = x[i];
  return y;
}
inline void store(const Lanes& x, float* y) { std::memcpy(y, &x, sizeof x); }
using owlet::fma;
inline void sums_of(const Lanes* x, float* y) {
  float lanes[kLanes];
  for (int i = 0; i < 4; ++i) store(x[i], lanes), y[i] = owlet::sum_of(lanes);
}
#include "float_math.inl"
#undef TARGET
}  // namespace lanes_wasm
const FloatMath wasm_math = lanes_wasm::math;

#endif

namespace lanes_generic {
#define TARGET
constexpr int kRows = 1, kVecs = 1;
struct Lanes {
  float part[kLanes];
};
inline Lanes splat(float x) {
  Lanes y;
  std::fill_n(y.part, kLanes, x);
  return y;
}
template <typename T>
inline Lanes load(const T* x) {
  Lanes y;
  std::copy_n(x, kLanes, y.part);
  return y;
}
inline void store(const Lanes& x, float* y) { std::copy_n(x.part, kLanes, y); }
using owlet::fma;
inline void sums_of(const Lanes* x, float* y) {
  for (int i = 0; i < 4; ++i) y[i] = owlet::sum_of(x[i].part);
}
#include "float_math.inl"
#undef TARGET
}  // namespace lanes_generic
const FloatMath generic_math = lanes_generic::math;

}  // namespace owlet
