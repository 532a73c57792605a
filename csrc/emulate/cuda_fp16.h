// Stands in for the CUDA toolkit's header of this name where kernels run on the CPU.
#pragma once

#include <cmath>

#include "emulate/cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
  float magnitude;
  if (exponent == 31)
    magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return {static_cast<unsigned short>(sign | 0x7c00)};  // the smallest that rounds to infinity
  int exponent;                                                                 // of the half's last bit
  std::frexp(magnitude, &exponent);
  exponent = magnitude < 0x1p-14f ? -24 : exponent - 11;  // a subnormal, or a number with 11 bits
  const unsigned units = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -exponent)));  // to nearest even
  // 1024 units or more carry into the exponent field by themselves.
  return {static_cast<unsigned short>(sign | ((static_cast<unsigned>(exponent + 24) << 10) + units))};
}
