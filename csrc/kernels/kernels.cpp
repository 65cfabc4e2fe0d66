// Chooses the instruction set once, at run time.
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace owlet {
namespace {

[[noreturn]] void refuse(const std::string& what) {
#ifdef __wasm__  // where there are no exceptions, and no environment that could name what is unknown
  std::abort();
#else
  throw std::invalid_argument(what);
#endif
}

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

const Kernel* find(const std::string& name) {
  std::string names;
  for (const Kernel* k : kKernels) {
    if (!k->supported()) continue;
    if (name == k->name) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  refuse("instruction set '" + name + "' (OWLET_ISA) is unknown or not supported by this CPU, which has: " + names);
}

const Kernel*& current() {
  static const Kernel* chosen = [] {
    const char* name = std::getenv("OWLET_ISA");
    return find(name && *name ? name : kernel_names().front());
  }();
  return chosen;
}

const Variant& find_variant(const std::string& name) {
  for (const Variant* v = kernel().variants; v->dot_panel; ++v)
    if (name == v->name) return *v;
  std::string names;
  for (const std::string& known : variant_names()) names += (names.empty() ? "" : ", ") + known;
  refuse("kernel '" + name + "' (OWLET_KERNEL) is unknown to " + kernel().name + ", which has: " + names);
}

const Variant*& current_variant() {
  static const Variant* chosen = [] {
    const char* name = std::getenv("OWLET_KERNEL");
    return name && *name ? &find_variant(name) : kernel().variants;
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

void use_kernel(const std::string& name) {
  current() = find(name);
  current_variant() = kernel().variants;
}

const Variant& variant() { return *current_variant(); }

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const Variant* v = kernel().variants; v->dot_panel; ++v) names.push_back(v->name);
  return names;
}

void use_variant(const std::string& name) { current_variant() = &find_variant(name); }

}  // namespace owlet
