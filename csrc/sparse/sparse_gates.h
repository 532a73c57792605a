// The CPU kernels of hard-concrete gates and of the optimizer; README.md says what they compute.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

// n elements under gates. w and alpha have one type; alpha_group and rng (seed, offset) may be null.
struct Gates {
  int64_t n;
  Dtype w_type;
  const void *w, *alpha;
  const float* alpha_group;
  const int64_t* rng;
};

struct AdamW {
  int64_t nnz;
  float *vals, *m, *v;
  const float* grad;
  float beta1, beta2, eps, decay, rate, correction2;  // decay: lr * weight_decay   rate: lr / correction1
  Dtype w_type;
  const void *w, *idx;  // or null
  int64_t w_size;
  bool idx64;
};

}  // namespace pk

PK_DECLARE_ISA(void hard_concrete(const Gates& s, Dtype type, const void* w0, void* out);)

// What is null is not wanted; dgroup points to one float.
PK_DECLARE_ISA(void hard_concrete_backward(const Gates& s, Dtype type, const void* g, void* dw, void* dalpha,
                                           float* dgroup);)

// False if an index is outside of w; then nothing is written.
PK_DECLARE_ISA(bool sparse_adamw(const AdamW& s);)
