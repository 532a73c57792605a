// What the glue (nf4.cpp) and the CPU kernels agree on: raw pointers to contiguous arrays. README.md has the format.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"
#include "lora/lora_cpu.h"

namespace pk {

// Packed weights. If q is null, absmax holds the scale of each block, otherwise that of each block2 of scales.
struct Nf4 {
  const uint8_t* bytes;
  int64_t shift;  // log2 of the block size
  const float* absmax;
  const uint8_t* q;
  const float* code;
  float offset;
  int64_t block2;
};

struct Nf4Linear {
  int64_t m, n, k;  // x, dx [m, k]   w [n, k]   y, g [m, n]
};

// A term of rank r beside that of the weights: drop'(scale * u f), where f is stored as [columns, r] in the forward.
struct Nf4Lora {
  const float* u = nullptr;  // [m, r]
  int64_t r = 0;
  LoraIn f;  // [n, r] in the forward, [r, k] in the backward
  float scale = 1;
  LoraDropout drop;
};

}  // namespace pk

PK_DECLARE_ISA(void nf4_quantize(Dtype type, const void* w, int64_t numel, int64_t shift, uint8_t* bytes,
                                 float* absmax);
               void nf4_dequantize(const Nf4& w, int64_t numel, Dtype type, void* out);
               // Returns the offset.
               float nf4_quantize_absmax(const float* absmax, int64_t n, const float* code, int64_t block2, uint8_t* q,
                                         float* absmax2);
               void nf4_dequantize_absmax(const Nf4& w, int64_t n, float* absmax);)

// y = x w^T + bias + lora, where bias may be null, and dx = g w + lora. x, y, g and dx are of one type.
PK_DECLARE_ISA(void nf4_linear(const Nf4Linear& s, Dtype type, const void* x, const Nf4& w, Dtype bias_type,
                               const void* bias, const Nf4Lora& lora, void* y);
               void nf4_dgrad(const Nf4Linear& s, Dtype type, const void* g, const Nf4& w, const Nf4Lora& lora,
                              void* dx);)
