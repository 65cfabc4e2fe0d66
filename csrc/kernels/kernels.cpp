// Chooses the instruction set once, at run time.
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

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
#endif
    &generic,
};

const Kernel* find(const std::string& name) {
  std::string names;
  for (const Kernel* k : kKernels) {
    if (!k->supported()) continue;
    if (name == k->name) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' (OWLET_ISA) is unknown or not supported by this CPU, which has: " + names);
}

const Kernel*& current() {
  static const Kernel* chosen = [] {
    const char* name = std::getenv("OWLET_ISA");
    return find(name && *name ? name : kernel_names().front());
  }();
  return chosen;
}

}  // namespace

const Kernel& kernel() { return *current(); }

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel* k : kKernels)
    if (k->supported()) names.push_back(k->name);
  return names;
}

void use_kernel(const std::string& name) { current() = find(name); }

}  // namespace owlet
