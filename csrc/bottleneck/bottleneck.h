// What the glue (bottleneck.cpp) and the CPU kernels agree on.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"
#include "lora/lora_cpu.h"

namespace pk {

// In the order of ACTIVATIONS in ops/bottleneck.py.
enum class Act : int { relu, gelu, gelu_tanh, silu, tanh, leaky_relu, identity };
constexpr int kActs = 7;

// y = residual + c (drop(act(h wd^T + bd)) wu^T + bu), h = LN(x) or x, c = scale * gate. Arrays are contiguous and
// row-major: x [rows, k], wd [m, k], wu [n, m], the others vectors, null where there are none.
struct Bottleneck {
  int64_t rows, k, m, n;
  LoraIn x, wd, wu;
  const float *ln_w, *ln_b, *bd, *bu, *gate;
  Act act;
  float scale, eps;
  bool norm;
  LoraDropout drop;
};

// Null where a gradient is not wanted.
struct BottleneckGrads {
  LoraOut dx, dwd, dwu;
  float *dln_w, *dln_b, *dbd, *dbu, *dgate;
};

}  // namespace pk

// y [rows, n] may be the residual, of whose type it is; z [rows, m] = h wd^T + bd; stats [2, rows] of a LayerNorm:
// mean and 1 / deviation.
PK_DECLARE_ISA(void bottleneck(const Bottleneck& s, LoraIn residual, LoraOut y, LoraOut z, float* stats);
               // g [rows, n] = dL/dy; dx includes it where x is the residual
               void bottleneck_backward(const Bottleneck& s, LoraIn g, LoraIn z, const float* stats, bool own_residual,
                                        const BottleneckGrads& d);)
