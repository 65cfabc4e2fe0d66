// Plain loops for any CPU, and the reference for the other instruction sets.
#include <algorithm>

#include "kernels.h"

namespace owlet {
namespace {

template <int Tokens>
void dot_panel(const int8_t* q, const int32_t*, const uint8_t* panel, int64_t quads, int32_t* acc) {
  std::fill_n(acc, Tokens * kPanelRows, 0);
  for (int64_t i = 0; i < quads; ++i, panel += kQuadBytes) {
    for (int t = 0; t < Tokens; ++t) {
      const int8_t* a = q + t * row_bytes(quads) + 4 * i;
      for (int n = 0; n < kPanelRows; ++n) {
        const uint8_t* w = panel + 4 * n;
        acc[t * kPanelRows + n] +=
            a[0] * (w[0] - 128) + a[1] * (w[1] - 128) + a[2] * (w[2] - 128) + a[3] * (w[3] - 128);
      }
    }
  }
}

const Variant variants[] = {{"1x0", dot_panel<1>}, {}};

}  // namespace

const Kernel generic = {
    "generic", [] { return true; }, &generic_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, variants};

}  // namespace owlet
