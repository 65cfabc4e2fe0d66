// AVX512-VNNI: vpdpbusd adds 4 products of uint8 weights and int8 activations to each int32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#define TARGET __attribute__((target("avx512f,avx512vnni")))

namespace owlet {
namespace {

// How far ahead to ask for weights. The hardware's prefetcher alone leaves a fifth of the second
// level cache's bandwidth unused.
constexpr int64_t kPrefetch = 2048;

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads,
                      int32_t* acc) {
  __m512i sum[Tokens][4];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) sum[t][v] = _mm512_set1_epi32(-128 * q_sum[t]);

  for (int64_t i = 0; i < quads; ++i, panel += kQuadBytes) {
    __m512i w[4];
    for (int v = 0; v < 4; ++v) {
      w[v] = _mm512_loadu_si512(panel + 64 * v);
      _mm_prefetch(panel + kPrefetch + 64 * v, _MM_HINT_T0);
    }
    for (int t = 0; t < Tokens; ++t) {
      int32_t quad;
      std::memcpy(&quad, q + t * row_bytes(quads) + 4 * i, 4);
      const __m512i a = _mm512_set1_epi32(quad);
      for (int v = 0; v < 4; ++v) sum[t][v] = _mm512_dpbusd_epi32(sum[t][v], w[v], a);
    }
  }

  // Left rolled by GCC, this loop alone would keep the sums in memory, all the way.
#pragma GCC unroll 6
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v)
      _mm512_storeu_si512(acc + t * kPanelRows + 16 * v, sum[t][v]);
}

}  // namespace

const Kernel avx512_vnni = {
    "avx512_vnni",
    [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); },
    &avx512_math,
    6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}};

}  // namespace owlet
#endif
