// What the glue (hadamard.cpp) and the CPU kernels (hadamard_cpu.cpp) agree on.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

// The random matrices of Fastfood: n = 2^m >= d.
struct FastfoodState {
  int64_t d, n;
  const int8_t* sign;  // [d]
  const void* pi_mod;  // [n], int16 or int32, taken modulo the smallest power of two >= d
  const void* g;       // [n], int16 in units of 2^-12, or float32
  bool pi_is_int32, g_is_float;
};

}  // namespace pk

PK_DECLARE_ISA(
    // y = scale * H x for each row of x [rows, n], padded and cropped where n >= 1 is no power of two
    void fwht(Dtype type, const void* x, void* y, int64_t rows, int64_t n, float scale);
    // out = base + scale * (H G Pi H B pad(theta))[:numel]; base may be null, else it has the type of out
    void fastfood(const FastfoodState& s, Dtype theta_type, const void* theta, Dtype type, const void* base, void* out,
                  int64_t numel, float scale);
    // sign [d], pi_mod and g [n] of a seed; quantiles [65536]
    void fastfood_state(int64_t seed, int64_t n, int64_t d, const int16_t* quantiles, int8_t* sign, bool is_int32,
                        void* pi_mod, int16_t* g);
    // dtheta [d] of dy [numel]
    void fastfood_backward(const FastfoodState& s, Dtype type, const void* dy, int64_t numel, float scale,
                           float* dtheta);)
