// Memory for what is read from front to back again and again.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace owlet {

constexpr int64_t kHugePage = 2 << 20;

// `bytes` or a little more on pages of 2 MB, where the system has them: to look up pages of 4 KB costs
// up to half of the bandwidth. Null if there is no memory; for std::free.
inline void* huge_alloc(int64_t bytes) {
  const int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, size);
#if defined(__linux__)
  if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace owlet
