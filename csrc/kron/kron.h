// What the glue (kron.cpp) and the CPU kernels agree on.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

// m tokens of x [p, r] and y [q, s]; a is [p, q] and b [r, s].
struct KronShape {
  int64_t m, p, q, r, s;
};

// Elements of one type in memory; null where there are none.
struct KronIn {
  const void* data;
  Dtype type;
};
struct KronOut {
  void* data;
  Dtype type;
};

using KronFactor = Strided;

}  // namespace pk

// y = acc + scale * a^T x b + bias of each token; acc may be y, or null, as may bias [q s], fp32. x, y, acc contiguous.
PK_DECLARE_ISA(void kron_linear(const KronShape& shape, KronIn x, KronFactor a, KronFactor b, KronIn acc,
                                const float* bias, float scale, KronOut y);
               // dx, da and db, of which any may be null; g and x contiguous
               void kron_backward(const KronShape& shape, KronIn g, KronIn x, KronFactor a, KronFactor b, float scale,
                                  KronOut dx, KronOut da, KronOut db);
               // h [p r, q s] = scale * sum of a[i] kron b[i]; a [n, p, q], b [n, r, s], h contiguous. shape.m is n.
               void kron_sum_weight(const KronShape& shape, KronIn a, KronIn b, float scale, KronOut h);
               void kron_sum_weight_backward(const KronShape& shape, KronIn g, KronIn a, KronIn b, float scale,
                                             KronOut da, KronOut db);
               // w [p r, q s] += alpha * a kron b, where row i of w begins at i * ldw and is contiguous. shape.m is 1.
               void kron_add(const KronShape& shape, KronOut w, int64_t ldw, KronFactor a, KronFactor b, float alpha);)
