// Memory for data that is read from front to back again and again (docs/log.md, "Huge pages").
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace owlet {

// `bytes`, rounded up to whole pages of 2 MB, where the system has such: address look-ups for pages of 4 KB cost up to
// half of the bandwidth. Null if there is no memory. Free it with std::free.
inline void* huge_alloc(int64_t bytes) {
  constexpr int64_t kPage = 2 << 20;
  const int64_t size = (bytes + kPage - 1) / kPage * kPage;
  void* memory = std::aligned_alloc(kPage, size);
#if defined(__linux__)
  if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace owlet
