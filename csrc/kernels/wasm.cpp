// WebAssembly with 128-bit SIMD. As in avx2.cpp, even and odd bytes are widened to 16 bits. The relaxed dot product of
// 8-bit values would be faster, but its sums differ from machine to machine.
#if defined(__wasm_simd128__)
#include <wasm_simd128.h>

#include "kernels.h"

namespace owlet {
namespace {

template <int Tokens>
void dot_panel(const int8_t* q, const int32_t* q_sum, const uint8_t* panel, int64_t quads, int32_t* acc) {
  // A panel is 16 vectors wide. It is taken in strips, to keep the sums in the 16 registers of x86-64.
  constexpr int Vecs = Tokens == 1 ? 8 : 2;
  for (int strip = 0; strip < 16; strip += Vecs) {
    v128_t sum[Tokens][Vecs];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) sum[t][v] = wasm_i32x4_splat(-128 * q_sum[t]);
    for (int64_t i = 0; i < quads; ++i) {
      const uint8_t* panel_quad = panel + i * kQuadBytes + 16 * strip;
      v128_t even[Vecs], odd[Vecs];
      for (int v = 0; v < Vecs; ++v) {
        const v128_t w = wasm_v128_load(panel_quad + 16 * v);
        even[v] = wasm_v128_and(w, wasm_i16x8_const_splat(0xff)), odd[v] = wasm_u16x8_shr(w, 8);
      }
      for (int t = 0; t < Tokens; ++t) {
        const v128_t a = wasm_i32x4_splat(load_quad(q + t * row_bytes(quads) + 4 * i));
        const v128_t a_even = wasm_i16x8_shr(wasm_i16x8_shl(a, 8), 8), a_odd = wasm_i16x8_shr(a, 8);
        for (int v = 0; v < Vecs; ++v)
          sum[t][v] = wasm_i32x4_add(sum[t][v], wasm_i32x4_add(wasm_i32x4_dot_i16x8(even[v], a_even),
                                                               wasm_i32x4_dot_i16x8(odd[v], a_odd)));
      }
    }
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) wasm_v128_store(acc + t * kPanelRows + 4 * (strip + v), sum[t][v]);
  }
}

const Variant variants[] = {{"1x0", dot_panel<1>}, {}};

}  // namespace

const Kernel wasm = {
    "wasm", [] { return true; }, &wasm_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, variants};

}  // namespace owlet
#endif
