// torch's thread pool for kernels that include no torch header.
#pragma once

#include <cstdint>
#include <stdexcept>

// From torch/csrc/stable/c/shim.h, torch >= 2.10. Glue includes both declarations, so the compiler compares them.
extern "C" {
typedef int32_t AOTITorchError;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* context);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context);
}

namespace pk {

// f(begin, end) over pieces of [begin, end) of at least `grain` each. Pieces depend on the thread count, so what f
// computes for an index must not depend on the piece the index is in. f must not throw: torch would lose the text.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const auto call = [](int64_t from, int64_t to, void* context) { (*static_cast<const F*>(context))(from, to); };
  if (torch_parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&f))))
    throw std::runtime_error("a CPU kernel failed inside parallel_for");
}

}  // namespace pk
