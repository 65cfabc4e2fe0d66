// The same code, float_math.inl, over four kinds of registers.
#include "float_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "numerics.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace owlet {
namespace {

constexpr int kLanes = 16;
static_assert(kLanes == kQueries);

constexpr int64_t kAhead = 1024;  // floats of the cache to ask for before they are needed: 4 KB

}  // namespace

#if defined(__x86_64__)

namespace avx512 {
#define TARGET __attribute__((target("avx512f")))
constexpr int kRows = 8;  // as many sums as keep the multipliers busy and fit the registers
using Lanes = __m512;
TARGET inline Lanes splat(float x) { return _mm512_set1_ps(x); }
TARGET inline Lanes load(const float* x) { return _mm512_loadu_ps(x); }
TARGET inline void store(Lanes x, float* y) { _mm512_storeu_ps(y, x); }
TARGET inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
TARGET inline Lanes add_product(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(b, c, a); }
#include "float_math.inl"
#undef TARGET
}  // namespace avx512
const FloatMath avx512_math = avx512::math;

namespace fma {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int kRows = 6;
struct Lanes {
  __m256 low, high;
};
TARGET inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TARGET inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
TARGET inline void store(Lanes x, float* y) { _mm256_storeu_ps(y, x.low), _mm256_storeu_ps(y + 8, x.high); }
TARGET inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
TARGET inline Lanes add_product(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(b.low, c.low, a.low), _mm256_fmadd_ps(b.high, c.high, a.high)};
}
#include "float_math.inl"
#undef TARGET
}  // namespace fma
const FloatMath fma_math = fma::math;

#elif defined(__aarch64__)

namespace neon {
#define TARGET
constexpr int kRows = 6;
struct Lanes {
  float32x4_t quarter[4];
};
inline Lanes splat(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
inline Lanes load(const float* x) { return {{vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}}; }
inline void store(const Lanes& x, float* y) {
  for (int i = 0; i < 4; ++i) vst1q_f32(y + 4 * i, x.quarter[i]);
}
inline Lanes add(Lanes a, const Lanes& b) {
  for (int i = 0; i < 4; ++i) a.quarter[i] = vaddq_f32(a.quarter[i], b.quarter[i]);
  return a;
}
inline Lanes add_product(Lanes a, const Lanes& b, const Lanes& c) {
  for (int i = 0; i < 4; ++i) a.quarter[i] = vfmaq_f32(a.quarter[i], b.quarter[i], c.quarter[i]);
  return a;
}
#include "float_math.inl"
#undef TARGET
}  // namespace neon
const FloatMath neon_math = neon::math;

#endif

namespace generic {
#define TARGET
constexpr int kRows = 1;
struct Lanes {
  float lane[kLanes];
};
inline Lanes splat(float x) {
  Lanes y;
  std::fill_n(y.lane, kLanes, x);
  return y;
}
inline Lanes load(const float* x) {
  Lanes y;
  std::copy_n(x, kLanes, y.lane);
  return y;
}
inline void store(const Lanes& x, float* y) { std::copy_n(x.lane, kLanes, y); }
inline Lanes add(Lanes a, const Lanes& b) {
  for (int l = 0; l < kLanes; ++l) a.lane[l] += b.lane[l];
  return a;
}
inline Lanes add_product(Lanes a, const Lanes& b, const Lanes& c) {
  for (int l = 0; l < kLanes; ++l) a.lane[l] = std::fma(b.lane[l], c.lane[l], a.lane[l]);
  return a;
}
#include "float_math.inl"
#undef TARGET
}  // namespace generic
const FloatMath generic_math = generic::math;

}  // namespace owlet
