// 64-bit Arm with the dot product extension (Armv8.2 and later, every Apple M). Both operands of sdot are signed, so
// the offset of the weights is removed first: (w + 128) ^ 0x80 = w.
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

namespace owlet {
namespace {

template <int Tokens>
TARGET void dot_panel(const int8_t* q, const int32_t*, const uint8_t* panel, int64_t quads, int32_t* acc) {
  // A panel is 16 vectors wide. Several tokens take it in strips, to keep the sums in registers.
  constexpr int Vecs = Tokens == 1 ? 16 : 4;
  const uint8x16_t offset = vdupq_n_u8(0x80);
  for (int strip = 0; strip < 16; strip += Vecs) {
    int32x4_t sum[Tokens][Vecs];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) sum[t][v] = vdupq_n_s32(0);
    for (int64_t i = 0; i < quads; ++i) {
      const uint8_t* panel_quad = panel + i * kQuadBytes + 16 * strip;
      int8x16_t w[Vecs];
      for (int v = 0; v < Vecs; ++v) w[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(panel_quad + 16 * v), offset));
      for (int t = 0; t < Tokens; ++t) {
        const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(load_quad(q + t * row_bytes(quads) + 4 * i)));
        for (int v = 0; v < Vecs; ++v) sum[t][v] = vdotq_s32(sum[t][v], w[v], a);
      }
    }
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < Vecs; ++v) vst1q_s32(acc + t * kPanelRows + 4 * (strip + v), sum[t][v]);
  }
}

bool supported() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple M has it
#endif
}

const Variant variants[] = {{"1x0", dot_panel<1>}, {}};

}  // namespace

const Kernel neon = {
    "neon", supported, &neon_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, variants};

}  // namespace owlet
#endif
