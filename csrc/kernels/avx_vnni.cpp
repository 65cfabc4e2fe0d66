// AVX-VNNI: the 256-bit vpdpbusd of CPUs without AVX512 (Alder Lake and later, Zen 5).
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2,avxvnni")))

namespace owlet {
namespace {

TARGET inline __m256i add_products(__m256i sum, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }

#include "ymm.inl"

bool supported() {
  constexpr unsigned kAvxVnni = 1u << 4;  // of leaf 7, 1's eax: older compilers have no name for it
  unsigned eax, ebx, ecx, edx;
  return avx2.supported() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

const Variant variants[] = {{"1x0", dot_panel<1>}, {}};

}  // namespace

const Kernel avx_vnni = {
    "avx_vnni", supported, &fma_math, 6,
    {dot_panel<1>, dot_panel<2>, dot_panel<3>, dot_panel<4>, dot_panel<5>, dot_panel<6>}, variants};

}  // namespace owlet
#endif
