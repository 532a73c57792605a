// The CPU kernels of selection and statistics; README.md says what they compute.
#pragma once

#include <cstdint>
#include <vector>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

// One tensor of scores.
struct Scores {
  Dtype type;
  const void* data;
  int64_t n;
};

struct Threshold {
  float value;
  int64_t above, nan;
};

// dy [rows, out] and x [rows, in] of one type, f [out, in]; sample n has the rows bounds[n] to bounds[n + 1].
struct FisherLinear {
  Dtype type;
  const void *dy, *x;
  float* f;
  int64_t out, in;
  std::vector<int64_t> bounds;
  const float* weight;  // [samples] or null
};

}  // namespace pk

// use_abs: by magnitude. k from 1 to the number of scores; their NaN are counted and belong nowhere.
PK_DECLARE_ISA(Threshold topk_threshold(const std::vector<Scores>& scores, int64_t k, bool use_abs);)

// Writes the positions of the chosen to out[0..k), -1 behind the last, and returns how many are chosen, maybe over k.
PK_DECLARE_ISA(int64_t topk_compact(const std::vector<Scores>& scores, float threshold, int64_t k, bool use_abs,
                                    int64_t* out);)

PK_DECLARE_ISA(void fisher_accum(Dtype f_type, void* f, Dtype g_type, const void* g, int64_t n, float weight,
                                 bool absolute);)
PK_DECLARE_ISA(void fisher_linear(const FisherLinear& s);)
