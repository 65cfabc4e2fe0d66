// Finds the best instruction set at run time.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace owlet {
namespace {

// Best first.
const Kernel* const kKernels[] = {
#if defined(__x86_64__)
#if defined(__linux__)
    &amx,
#endif
    &avx512_vnni, &avx_vnni, &avx2,
#elif defined(__aarch64__)
    &neon,
#elif defined(__wasm_simd128__)
    &wasm,
#endif
    &generic,
};

// Those that this CPU supports. To ask it can take microseconds.
const std::vector<const Kernel*>& supported() {
  static const auto kernels = [] {
    std::vector<const Kernel*> kernels;
    std::copy_if(std::begin(kKernels), std::end(kKernels), std::back_inserter(kernels),
                 [](const Kernel* k) { return k->supported(); });
    return kernels;
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel* k : supported()) names.push_back(k->name);
  return names;
}

const Kernel& kernel() {
#ifndef __wasm__  // has no environment
  if (const char* set = std::getenv("OWLET_ISA"); set && *set) {  // for tests
    std::string names;
    for (const Kernel* k : supported()) {
      if (std::string(set) == k->name) return *k;
      names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument("instruction set '" + std::string(set) + "' (OWLET_ISA) is unknown or not supported " +
                                "by this CPU, which has: " + names);
  }
#endif
  return *supported()[0];
}

}  // namespace owlet
