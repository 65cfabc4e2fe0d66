// AVX2 without VNNI. vpmaddubsw would saturate (2 * 255 * 127 > 32767), so both operands are widened to 16 bits for
// vpmaddwd. Splitting even from odd bytes widens within a lane, without shuffles.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2")))

namespace owlet {
namespace {

TARGET inline __m256i add_products(__m256i sum, __m256i w, __m256i a) {
  const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
  const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, a_even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, a_odd));
}

#include "ymm.inl"

const Variant variants[] = {{"1x0", dot_panel<1>}, {}};

}  // namespace

const Kernel avx2 = {
    "avx2", [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }, &fma_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, variants};

}  // namespace owlet
#endif
