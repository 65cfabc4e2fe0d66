// WebAssembly with 128-bit SIMD. As in avx2.cpp, even and odd bytes are widened to 16 bits. The relaxed dot product of
// 8-bit values would be faster, but its sums differ from machine to machine.
#if defined(__wasm_simd128__)
#include <wasm_simd128.h>

#include "kernels.h"

#define TARGET

namespace owlet {
namespace {

using Register = v128_t;
constexpr int kRegisters = 16, kAlone = 8, kTogether = 2;  // for the 16 registers of x86-64
struct Weights {
  v128_t even, odd;
};
using Inputs = Weights;
inline v128_t splat(int32_t x) { return wasm_i32x4_splat(x); }
inline Weights read(const uint8_t* p) {
  const v128_t w = wasm_v128_load(p);
  return {wasm_v128_and(w, wasm_i16x8_const_splat(0xff)), wasm_u16x8_shr(w, 8)};
}
inline Inputs spread(int32_t quad) {
  const v128_t a = wasm_i32x4_splat(quad);
  return {wasm_i16x8_shr(wasm_i16x8_shl(a, 8), 8), wasm_i16x8_shr(a, 8)};
}
inline v128_t add(v128_t sum, const Weights& w, const Inputs& x) {
  return wasm_i32x4_add(sum, wasm_i32x4_add(wasm_i32x4_dot_i16x8(w.even, x.even), wasm_i32x4_dot_i16x8(w.odd, x.odd)));
}
#include "dot_panel.inl"

}  // namespace

const Kernel wasm = make_kernel("wasm", [] { return true; });

}  // namespace owlet
#endif
