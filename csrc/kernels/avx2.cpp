// AVX2 without VNNI. vpmaddubsw would saturate (2 * 255 * 127 > 32767), so both operands are widened to 16 bits for
// vpmaddwd. Splitting even from odd bytes widens within a lane, without shuffles.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2")))

namespace owlet {
namespace {

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc) {
  // A panel is 8 ymm registers wide. Several tokens take it in strips, to keep the sums in registers.
  constexpr int Vecs = Tokens == 1 ? 8 : 2;
  const __m256i low_byte = _mm256_set1_epi16(0xff);
  for (int strip = 0; strip < 8; strip += Vecs) {
    __m256i sum[Tokens][Vecs];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) sum[t][v] = _mm256_set1_epi32(-128 * q_sum[t]);

    for (int64_t i = 0; i < quads; ++i) {
      const auto* panel_quad = reinterpret_cast<const __m256i*>(panel + i * kQuadBytes) + strip;
      for (int t = 0; t < Tokens; ++t) {
        const __m256i a = _mm256_set1_epi32(load_quad(q + t * row_bytes(quads) + 4 * i));
        const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
        const __m256i a_odd = _mm256_srai_epi16(a, 8);
        for (int v = 0; v < Vecs; ++v) {
          const __m256i w = _mm256_loadu_si256(panel_quad + v);
          const __m256i w_even = _mm256_and_si256(w, low_byte);
          const __m256i w_odd = _mm256_srli_epi16(w, 8);
          sum[t][v] = _mm256_add_epi32(sum[t][v], _mm256_madd_epi16(w_even, a_even));
          sum[t][v] = _mm256_add_epi32(sum[t][v], _mm256_madd_epi16(w_odd, a_odd));
        }
      }
    }

    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + t * kPanelRows) + strip + v, sum[t][v]);
  }
}

}  // namespace

const Kernel avx2 = {
    "avx2", [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }, &fma_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}};

}  // namespace owlet
#endif
