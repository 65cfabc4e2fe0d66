// Plain C++ for any CPU, and the reference for the other instruction sets.
#include "kernels.h"

namespace owlet {
namespace {

#define TARGET
using Register = int32_t;
constexpr int kRegisters = 64, kAlone = 64, kTogether = 64;
struct Weights {
  uint8_t w[4];
};
struct Inputs {
  int8_t a[4];
};
inline int32_t splat(int32_t x) { return x; }
inline Weights read(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Inputs spread(int32_t quad) {
  Inputs inputs;
  std::memcpy(&inputs, &quad, 4);
  return inputs;
}
inline int32_t add(int32_t sum, const Weights& w, const Inputs& x) {
  return sum + x.a[0] * w.w[0] + x.a[1] * w.w[1] + x.a[2] * w.w[2] + x.a[3] * w.w[3];
}
#include "dot_panel.inl"

}  // namespace

const Kernel generic = make_kernel("generic", [] { return true; });

}  // namespace owlet
