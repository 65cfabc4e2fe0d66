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

using Register = int32x4_t;
using Weights = int8x16_t;
using Inputs = int8x16_t;
constexpr int kRegisters = 16, kAlone = 16, kTogether = 4;
inline int32x4_t splat(int32_t) { return vdupq_n_s32(0); }  // the weights have no offset
inline int8x16_t read(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80))); }
inline int8x16_t spread(int32_t quad) { return vreinterpretq_s8_s32(vdupq_n_s32(quad)); }
TARGET inline int32x4_t add(int32x4_t sum, int8x16_t w, int8x16_t x) { return vdotq_s32(sum, w, x); }
#include "dot_panel.inl"

bool supported() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple M has it
#endif
}

}  // namespace

const Kernel neon = make_kernel("neon", supported);

}  // namespace owlet
#endif
