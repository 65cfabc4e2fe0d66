// AVX2 without VNNI. vpmaddubsw would saturate (2 * 255 * 127 > 32767), so both operands are widened to 16 bits for
// vpmaddwd. Splitting even from odd bytes widens within a lane, without shuffles.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2")))

namespace owlet {
namespace {

using Register = __m256i;
constexpr int kRegisters = 8, kAlone = 8, kTogether = 2;
struct Weights {
  __m256i even, odd;
};
using Inputs = Weights;
TARGET inline __m256i splat(int32_t x) { return _mm256_set1_epi32(x); }
TARGET inline Weights read(const uint8_t* p) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(w, 8)};
}
TARGET inline Inputs spread(int32_t quad) {
  const __m256i a = _mm256_set1_epi32(quad);
  return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)};
}
TARGET inline __m256i add(__m256i sum, const Weights& w, const Inputs& x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
}
#include "dot_panel.inl"

}  // namespace

const Kernel avx2 = make_kernel("avx2", [] { return bool(__builtin_cpu_supports("avx2")); });

}  // namespace owlet
#endif
