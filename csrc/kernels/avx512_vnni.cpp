// AVX512-VNNI: vpdpbusd adds 4 products of uint8 weights and int8 activations to each int32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

#define TARGET __attribute__((target("avx512f,avx512vnni")))

namespace owlet {
namespace {

constexpr int kToL1 = 3, kToL2 = 2;  // where __builtin_prefetch brings the weights
// For several tokens, the prefetch distance in bytes.
constexpr int64_t kAhead = 2048;

template <int64_t Ahead, int Locality>
TARGET inline void add_quad(__m512i sum[4], const uint8_t* w, const int8_t* q, int64_t further = 0) {
  const __m512i a = _mm512_set1_epi32(load_quad(q));
  for (int v = 0; v < 4; ++v) {
    if constexpr (Ahead > 0) __builtin_prefetch(w + Ahead + further + 64 * v, 0, Locality);
    sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_loadu_si512(w + 64 * v), a);
  }
}

// For one token. Each stream reads its own part of the panel: hardware prefetchers follow a stream only to the end of a
// 4 KB page, and other streams bridge that gap on some machines. Weights are prefetched Ahead bytes before their use;
// from the end of a stream the prefetches run on to its start in the next panel.
template <int kStreams, int64_t Ahead, int Locality>
TARGET void dot_panel_once(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc) {
  const int64_t part = quads / kStreams, near_end = std::max<int64_t>(0, part - Ahead / kQuadBytes);
  const int64_t next_panel = (quads - part) * kQuadBytes;  // from the end of a stream to its start in the next panel
  __m512i sum[kStreams][4];
  for (int s = 0; s < kStreams; ++s)
    for (int v = 0; v < 4; ++v) sum[s][v] = _mm512_set1_epi32(s == 0 ? -128 * q_sum[0] : 0);

  for (int64_t i = 0; i < near_end; ++i)
    for (int s = 0; s < kStreams; ++s)
      add_quad<Ahead, Locality>(sum[s], panel + (s * part + i) * kQuadBytes, q + 4 * (s * part + i));
  for (int64_t i = near_end; i < part; ++i)
    for (int s = 0; s < kStreams; ++s)
      add_quad<Ahead, Locality>(sum[s], panel + (s * part + i) * kQuadBytes, q + 4 * (s * part + i), next_panel);
  for (int64_t i = kStreams * part; i < quads; ++i) add_quad<Ahead, Locality>(sum[0], panel + i * kQuadBytes, q + 4 * i);

  for (int v = 0; v < 4; ++v) {
    for (int s = 1; s < kStreams; ++s) sum[0][v] = _mm512_add_epi32(sum[0][v], sum[s][v]);
    _mm512_storeu_si512(acc + 16 * v, sum[0][v]);
  }
}

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc) {
  __m512i sum[Tokens][4];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) sum[t][v] = _mm512_set1_epi32(-128 * q_sum[t]);
  for (int64_t i = 0; i < quads; ++i, panel += kQuadBytes) {
    __m512i w[4];
    for (int v = 0; v < 4; ++v) {
      w[v] = _mm512_loadu_si512(panel + 64 * v);
      _mm_prefetch(panel + kAhead + 64 * v, _MM_HINT_T0);
    }
    for (int t = 0; t < Tokens; ++t) {
      const __m512i a = _mm512_set1_epi32(load_quad(q + t * row_bytes(quads) + 4 * i));
      for (int v = 0; v < 4; ++v) sum[t][v] = _mm512_dpbusd_epi32(sum[t][v], w[v], a);
    }
  }
  // If GCC does not unroll this loop, it keeps the sums in memory throughout the function.
#pragma GCC unroll 6
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(acc + t * kPanelRows + 16 * v, sum[t][v]);
}

}  // namespace

// docs/log.md, "Prefetch distance and streams"
const Variant avx512_variants[] = {
    {"4x2048 L1", dot_panel_once<4, 2048, kToL1>}, {"1x4096 L2", dot_panel_once<1, 4096, kToL2>},
    {"1x8192 L1", dot_panel_once<1, 8192, kToL1>}, {"1x0", dot_panel_once<1, 0, kToL1>}, {}};

const Kernel avx512_vnni = {
    "avx512_vnni", [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); },
    &avx512_math, 6,
    {dot_panel_once<4, 2048, kToL1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>},
    avx512_variants};

}  // namespace owlet
#endif
