// Memory for data that is read from front to back again and again (docs/log.md, "Huge pages").
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace owlet {

constexpr int64_t kHugePage = 2 << 20;

// `bytes`, rounded up to whole huge pages.
constexpr int64_t huge_size(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

// huge_size(bytes) of memory on pages of 2 MB, where the system has them: address look-ups for pages of 4 KB cost up
// to half of the bandwidth. Null if there is no memory. Free it with std::free.
inline void* huge_alloc(int64_t bytes) {
  void* memory = std::aligned_alloc(kHugePage, huge_size(bytes));
#if defined(__linux__)
  if (memory) madvise(memory, huge_size(bytes), MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace owlet
