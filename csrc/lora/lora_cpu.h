// The CPU kernels of LoRA as the glue calls them: raw pointers to contiguous, row-major arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

struct LoraShape {
  int64_t m, k, n, r;  // x [m, k]   a [r, k]   b [n, r]   y, g [m, n]   t [m, r]
};

// A row-major array; `data` is null where the caller wants nothing written.
template <class Void>
struct LoraArray {
  Void* data = nullptr;
  Dtype type = Dtype::f32;
};
using LoraIn = LoraArray<const void>;
using LoraOut = LoraArray<void>;

struct LoraDropout {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;  // of 65536; 0 keeps everything
  float scale() const { return threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f; }
};

// One of several linears of the same x: r of the r ranks of LoraShape, whose n is not used then.
struct LoraSlice {
  int64_t n, r;
  LoraIn b;  // [n, r]
  float scale;
  LoraIn g;     // [m, n], in the backward
  LoraOut out;  // y [m, n] or, in the backward, db [n, r]
};

// One of many adapters: m rows of x by their numbers, and its ranks first .. first + r - 1 of the bank, r >= 1.
struct LoraGroup {
  const int64_t* rows;
  int64_t m, first, r;
  float scale;
};

}  // namespace pk

// Over the slices, t [m, r] = drop(x) a^T and each y += scale * t_s b^T.
PK_DECLARE_ISA(void lora_add(const LoraShape& s, const std::vector<LoraSlice>& slices, LoraIn x, LoraIn a,
                             const LoraDropout& drop, float* t);)

// With dt_s = scale * g b: dx += drop'(dt a), da = dt^T drop(x), each db = scale * g^T t_s, and dt [m, r] itself, times
// what dropout multiplies with; each only if its data is not null.
PK_DECLARE_ISA(void lora_backward(const LoraShape& s, const std::vector<LoraSlice>& slices, LoraOut dx, LoraIn x,
                                  LoraIn a, const float* t, const LoraDropout& drop, LoraOut da, float* dt = nullptr);)

// Over the rows of each group, whose factors are rows of a [R, k] and bt [R, n], b transposed: y += scale * t b^T.
PK_DECLARE_ISA(void multi_lora_add(const LoraShape& s, const std::vector<LoraGroup>& groups, LoraOut y, LoraIn x,
                                   LoraIn a, LoraIn bt, const LoraDropout& drop);)

// As multi_lora_add without dropout, for outputs side by side in y: slice_n are their widths, at least 1. bt [R, n] has
// their columns, a [slices R, k] for each adapter the ranks of the first, then those of the second, and so on.
PK_DECLARE_ISA(void lora_apply(const LoraShape& s, const std::vector<LoraGroup>& groups,
                               const std::vector<int64_t>& slice_n, LoraOut y, LoraIn x, LoraIn a, LoraIn bt);)

// As lora_backward, with da [R, k] and dbt [R, n]; the groups cover all ranks, those without rows too.
PK_DECLARE_ISA(void multi_lora_backward(const LoraShape& s, const std::vector<LoraGroup>& groups, LoraOut dx, LoraIn g,
                                        LoraIn x, LoraIn a, LoraIn bt, const LoraDropout& drop, LoraOut da,
                                        LoraOut dbt);)
