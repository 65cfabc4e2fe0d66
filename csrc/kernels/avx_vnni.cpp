// AVX-VNNI: the 256-bit vpdpbusd, for CPUs without AVX512 (Intel's clients from Alder Lake on).
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2,avxvnni")))

namespace owlet {
namespace {

using Register = __m256i;
using Weights = __m256i;
using Inputs = __m256i;
constexpr int kRegisters = 8, kAlone = 8, kTogether = 2;
TARGET inline __m256i splat(int32_t x) { return _mm256_set1_epi32(x); }
TARGET inline __m256i read(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
TARGET inline __m256i spread(int32_t quad) { return splat(quad); }
TARGET inline __m256i add(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#include "dot_panel.inl"

bool supported() {
  constexpr unsigned kAvxVnni = 1u << 4;  // a bit of leaf 7.1's eax; older compilers have no name for it
  unsigned eax, ebx, ecx, edx;
  return avx2.supported() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

}  // namespace

const Kernel avx_vnni = make_kernel("avx_vnni", supported);

}  // namespace owlet
#endif
