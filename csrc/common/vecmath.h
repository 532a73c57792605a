// Functions of whole vectors: exp, tanh, erf, to a few units in the last place.
#pragma once

#include "common/cpu.h"

namespace pk::PK_ISA {

// exp(x) to about two units in the last place, 0 below -87 and 1e38 beyond 87; NaN stays.
PK_INLINE vec exponential(vec x) {
  const vec most = splat(87.0f);
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const vec round = splat(0x1.8p23f), n = x * 1.44269504f + round - round;
  vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vec p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  p = fma(p, r * r, r) + 1.0f;
  return p * bit_cast<vec>((__builtin_convertvector(n, ivec) + 127) << 23);
}

// 1 / (1 + exp(-x))
PK_INLINE vec logistic(vec x) { return 1.0f / (1.0f + exponential(-x)); }

PK_INLINE vec magnitude(vec x) { return bit_cast<vec>(bit_cast<uvec>(x) & 0x7fffffffu); }
PK_INLINE vec with_sign(vec x, vec sign) {
  return bit_cast<vec>(bit_cast<uvec>(x) | (bit_cast<uvec>(sign) & 0x80000000u));
}

// Near 0 the polynomial of Cephes' tanhf, because 1 - 2 / (exp(2x) + 1) cancels there.
PK_INLINE vec hyperbolic_tangent(vec x) {
  const vec t = magnitude(x), s = x * x;
  vec p = splat(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = fma(p, s, splat(c));
  const vec small = fma(p * s, x, x), large = with_sign(1.0f - 2.0f / (exponential(t + t) + 1.0f), x);
  return t < 0.625f ? small : large;
}

PK_INLINE vec error_function(vec x) {
  const vec t = magnitude(x), s = x * x;
  vec p = splat(-5.96761703e-4f);
  for (const float c : {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f})
    p = fma(p, s, splat(c));
  const vec small = fma(p, x, x);
  vec q = fma(splat(-1.72853470e-5f), t, splat(3.83197126e-4f));
  const vec u = fma(splat(-3.88396438e-3f), t, splat(2.42546219e-2f));
  q = fma(q, s, u);
  for (const float c : {-1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f}) q = fma(q, t, splat(c));
  const vec large = with_sign(1.0f - exponential(fma(q, t, -t)), x);
  return t < 0.921875f ? small : large;
}

}  // namespace pk::PK_ISA
