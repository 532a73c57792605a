// Memory that is written for the first time, in pages of 2 MiB where the system gives them on request.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pk {

// For a result that is about to be written as a whole. Blocks of 32 MiB and more come from the system anew at each call
// (smaller ones the allocator keeps), and a fault for each 4 KiB takes longer than writing them.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  if (bytes < 1 << 25) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) & ~(page - 1), end = (address + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pk
