// AVX512-VNNI: vpdpbusd adds 4 products of uint8 weights and int8 activations to each int32.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <iterator>

#include "kernels.h"

#define TARGET __attribute__((target("avx512f,avx512vnni")))

namespace owlet {
namespace {

using Register = __m512i;
using Weights = __m512i;
using Inputs = __m512i;
constexpr int kRegisters = 4, kAlone = 4, kTogether = 4;
constexpr int64_t kAhead = 2048;  // the prefetch distance in bytes, for several tokens
TARGET inline __m512i splat(int32_t x) { return _mm512_set1_epi32(x); }
TARGET inline __m512i read(const uint8_t* p) {
  _mm_prefetch(p + kAhead, _MM_HINT_T0);
  return _mm512_loadu_si512(p);
}
TARGET inline __m512i spread(int32_t quad) { return splat(quad); }
TARGET inline __m512i add(__m512i sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
#include "dot_panel.inl"

constexpr int kToL1 = 3, kToL2 = 2;  // where __builtin_prefetch brings the weights

template <int64_t Ahead, int Locality>
TARGET inline void add_quad(__m512i sum[4], const uint8_t* w, const int8_t* q, int64_t further = 0) {
  for (int v = 0; v < 4; ++v) {
    if constexpr (Ahead > 0) __builtin_prefetch(w + Ahead + further + 64 * v, 0, Locality);
    sum[v] = add(sum[v], _mm512_loadu_si512(w + 64 * v), spread(load_quad(q)));
  }
}

// For one token. Each stream reads its own part of the panel: hardware prefetchers follow a stream only to the end of a
// 4 KB page, and other streams bridge that gap on some machines. Weights are prefetched Ahead bytes before their use;
// from near_end on that is past the end of the stream, so the prefetches go to its start in the next panel.
template <int kStreams, int64_t Ahead, int Locality>
TARGET void dot_panel_one_token(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int,
                           int32_t* acc) {
  const int64_t part = quads / kStreams, near_end = std::max<int64_t>(0, part - Ahead / kQuadBytes);
  const int64_t next_panel = (quads - part) * kQuadBytes;
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

}  // namespace

// docs/log.md, "Prefetch distance and streams"
const Variant avx512_one_token[] = {{"4x2048 L1", dot_panel_one_token<4, 2048, kToL1>},
                               {"1x4096 L2", dot_panel_one_token<1, 4096, kToL2>},
                               {"1x0", dot_panel_one_token<1, 0, kToL1>}};

const Kernel avx512_vnni = make_kernel(
    "avx512_vnni", [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); },
    avx512_one_token, std::size(avx512_one_token));

}  // namespace owlet
#endif
