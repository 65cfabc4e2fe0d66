// The ladder of docs/int8.md: the int8 product of one token, from the naive loop to what csrc/kernels does. Each rung
// is a function of its own, so that it can be read and timed alone. The Python module owlet_ladder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "../../csrc/kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace owlet {
namespace {

struct Product {          // y[n] = x_scale * scale[n] * sum over k of w[n, k] * q[k]
  const int8_t* w;        // (N, K)
  const uint8_t* panels;  // w packed: (N / 64, K / 4, 64, 4), each value + 128. Row n = 64 i starts at n * K.
  const float* scale;     // (N)
  const int8_t* q;        // (K)
  int32_t q_sum;
  float x_scale;
  int64_t N, K;
  float* y;  // (N)
};

// Computes rows [begin, end), both multiples of 256.
using Rung = void(const Product& p, int64_t begin, int64_t end);
constexpr int64_t kBlock = 4 * kPanelRows;

// 1. Dequantize, then multiply. Every sum is rounded, so the result depends on the order of the terms.
void scales_inside(const Product& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += (p.w[n * p.K + k] * p.scale[n]) * (p.q[k] * p.x_scale);
    p.y[n] = sum;
  }
}

// 2. Multiply and add integers, which is exact, and scale the sum once.
void int32_sums(const Product& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      sum += p.w[n * p.K + k] * p.q[k];
      asm volatile("" : "+r"(sum));  // keeps the compiler from vectorizing the loop
    }
    p.y[n] = static_cast<float>(sum) * p.x_scale * p.scale[n];
  }
}

// Compiles a function for AVX2 too; the loader chooses.
#if defined(__x86_64__) && defined(__GLIBC__)
#define AVX2_CLONE __attribute__((target_clones("avx2", "default")))
#else
#define AVX2_CLONE
#endif

// 3. The same without the barrier: integers may be added in any order, so the compiler vectorizes.
AVX2_CLONE void vectorized(const Product& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += p.w[n * p.K + k] * p.q[k];
    p.y[n] = static_cast<float>(sum) * p.x_scale * p.scale[n];
  }
}

void scale_panel(const Product& p, int64_t n, const int32_t* sums) {
  for (int i = 0; i < kPanelRows; ++i) p.y[n + i] = static_cast<float>(sums[i]) * p.x_scale * p.scale[n + i];
}

// 4. 64 rows side by side, 4 values of each in turn: a vector of sums is 16 rows, and no sum crosses lanes.
AVX2_CLONE void packed(const Product& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kPanelRows) {
    int32_t sums[kPanelRows] = {};
    const uint8_t* w = p.panels + n * p.K;
    for (int64_t k = 0; k < p.K; k += 4, w += kQuadBytes)
      for (int i = 0; i < kPanelRows; ++i)
        for (int j = 0; j < 4; ++j) sums[i] += (w[4 * i + j] - 128) * p.q[k + j];
    scale_panel(p, n, sums);
  }
}

#if defined(__x86_64__)
// 5. to 7. One vpdpbusd multiplies 4 weights of each of 16 rows by the same 4 activations, and adds the products to 16
// sums. Panels: how many are read at a time. Ahead: how many bytes further on to prefetch, to cache level Level.
template <int Panels, int Ahead, _mm_hint Level>
__attribute__((target("avx512f,avx512vnni"))) void vpdpbusd(const Product& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += Panels * kPanelRows) {
    __m512i sum[Panels][4];
    for (auto& of_panel : sum)
      for (__m512i& s : of_panel) s = _mm512_set1_epi32(-128 * p.q_sum);
    for (int64_t k = 0; k < p.K; k += 4) {
      const __m512i a = _mm512_set1_epi32(load_quad(p.q + k));
      for (int i = 0; i < Panels; ++i) {
        const uint8_t* w = p.panels + (n + i * kPanelRows) * p.K + k * kPanelRows;
        for (int v = 0; v < 4; ++v) {
          if (Ahead) _mm_prefetch(w + Ahead + 64 * v, Level);
          sum[i][v] = _mm512_dpbusd_epi32(sum[i][v], _mm512_loadu_si512(w + 64 * v), a);
        }
      }
    }
    for (int i = 0; i < Panels; ++i) {
      int32_t sums[kPanelRows];
      for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums + 16 * v, sum[i][v]);
      scale_panel(p, n + i * kPanelRows, sums);
    }
  }
}
#endif

// The rungs that this CPU can climb, with their names.
std::vector<std::pair<std::string, Rung*>> rungs() {
  std::vector<std::pair<std::string, Rung*>> all = {{"naive, scales inside", scales_inside},
                                                    {"int32 sums", int32_sums},
                                                    {"vectorized by the compiler", vectorized},
                                                    {"packed in panels", packed}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
    all.emplace_back("vpdpbusd", vpdpbusd<1, 0, _MM_HINT_T0>);
    all.emplace_back("vpdpbusd, 4 panels at a time, prefetch", vpdpbusd<4, 2048, _MM_HINT_T0>);
    all.emplace_back("vpdpbusd, 1 panel, prefetch to L2", vpdpbusd<1, 4096, _MM_HINT_T1>);
  }
#endif
  return all;
}

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// Threads share the blocks of 256 rows. All arrays are flat.
void multiply(const std::string& name, int threads, const Array<int8_t>& w, const Array<uint8_t>& panels,
              const Array<float>& scale, const Array<int8_t>& q, float x_scale, Array<float>& y) {
  Product p{w.data(), panels.data(), scale.data(), q.data(), 0, x_scale, scale.size(), q.size(), y.mutable_data()};
  if (p.N % kBlock || p.K % 4 || w.size() != p.N * p.K || panels.size() != w.size() || y.size() != p.N)
    throw std::invalid_argument("N must be a multiple of 256 and K of 4, and the sizes must fit each other");
  for (int64_t k = 0; k < p.K; ++k) p.q_sum += p.q[k];
  for (const auto& [rung, run] : rungs())
    if (name == rung) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
      for (int t = 0; t < threads; ++t)
        run(p, p.N / kBlock * t / threads * kBlock, p.N / kBlock * (t + 1) / threads * kBlock);
      return;
    }
  throw std::invalid_argument("there is no rung '" + name + "' on this CPU");
}

}  // namespace
}  // namespace owlet

PYBIND11_MODULE(owlet_ladder, m) {
  m.def("rungs", [] {
    std::vector<std::string> names;
    for (const auto& rung : owlet::rungs()) names.push_back(rung.first);
    return names;
  });
  m.def("multiply", owlet::multiply);
}
