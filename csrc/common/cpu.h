// The vector layer of the CPU kernels. A source that includes it is compiled once per level with PK_ISA set to the
// level's name, and everything here lives in pk::PK_ISA: two levels never share a symbol, so the linker cannot hand
// an AVX-512 function to a machine without it. Put kernels in namespace pk::PK_ISA too.
//
//   vec v = load(p);            W floats from float*, bf16* or f16*, any alignment
//   store(p, v);                rounds to nearest even; NaN stays NaN
//   load_n(p, n), store_n(...)  the first n < W elements only; the missing lanes load as 0
//   v * w + splat(2.0f)         operators are the compiler's own
//   fma(a, b, c)  hsum(v)  hmax(v)  max(a, b)  widen(x)  narrow<T>(x)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/parallel.h"
#include "common/switch.h"

#ifndef PK_ISA
#error "compiled per level: add the source through pk_add_op, which sets PK_ISA"
#endif

#define PK_INLINE inline __attribute__((always_inline))

namespace pk::PK_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));  // W 16-bit values, in memory order

template <class To, class From>
PK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

PK_INLINE vec splat(float x) { return x - vec{}; }  // 0 + x would turn -0 into 0, and cost the addition

// Scalars.

PK_INLINE float widen(float x) { return x; }
PK_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
PK_INLINE float widen(f16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  // Shifted into place, a half is a float whose exponent is 112 too small; a multiplication repairs that and
  // normalises subnormals on the way.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  const uint32_t magnitude =
      rest >= 0x7c00 ? (rest << 13) | 0x7f800000u : bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f);
  return bit_cast<float>(sign | magnitude);
#endif
}

template <class T>
T narrow(float x);
template <>
PK_INLINE float narrow<float>(float x) {
  return x;
}
template <>
PK_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // rounding could carry a NaN into infinity
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
PK_INLINE f16 narrow<f16>(float x) {
#ifdef __F16C__
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520, the smallest that rounds to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // a subnormal half: adding 1/2 leaves its 10 bits, rounded, at the bottom
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// Whole vectors.

PK_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

PK_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof(v)); }

PK_INLINE vec widen_bf16(hvec bits) {
#if defined(__AVX512F__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return bit_cast<vec>(__builtin_convertvector(bits, uvec) << 16);
#endif
}

PK_INLINE hvec narrow_bf16(vec v) {
  const uvec bits = bit_cast<uvec>(v);
  const uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  const ivec is_nan = v != v;
  const uvec chosen = (uvec)(is_nan ? quiet : rounded);
#if defined(__AVX512F__)
  return (hvec)_mm512_cvtepi32_epi16((__m512i)chosen);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);  // each 128-bit half twice
  return (hvec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(chosen, hvec);
#endif
}

PK_INLINE vec widen_f16(hvec bits) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps((__m128i)bits);
#else
  vec v;
  for (int i = 0; i < W; ++i) v[i] = widen(f16{bits[i]});
  return v;
#endif
}

PK_INLINE hvec narrow_f16(vec v) {
#if defined(__AVX512F__)
  return (hvec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (hvec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  hvec bits;
  for (int i = 0; i < W; ++i) bits[i] = narrow<f16>(v[i]).bits;
  return bits;
#endif
}

template <class T>
PK_INLINE hvec load_bits(const T* p) {
  hvec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

PK_INLINE vec load(const bf16* p) { return widen_bf16(load_bits(p)); }
PK_INLINE vec load(const f16* p) { return widen_f16(load_bits(p)); }

PK_INLINE void store(bf16* p, vec v) {
  const hvec bits = narrow_bf16(v);
  std::memcpy(p, &bits, sizeof(bits));
}
PK_INLINE void store(f16* p, vec v) {
  const hvec bits = narrow_f16(v);
  std::memcpy(p, &bits, sizeof(bits));
}

// Tails: nothing beyond the n-th element is touched.

template <class T>
PK_INLINE vec load_n(const T* p, int n) {
  T whole[W] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

template <class T>
PK_INLINE void store_n(T* p, vec v, int n) {
  T whole[W];
  store(whole, v);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

#if defined(__AVX512F__)
PK_INLINE vec load_n(const float* p, int n) { return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
PK_INLINE void store_n(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
PK_INLINE hvec load_bits_n(const void* p, int n) { return (hvec)_mm256_maskz_loadu_epi16((1u << n) - 1, p); }
PK_INLINE void store_bits_n(void* p, hvec v, int n) { _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)v); }
PK_INLINE vec load_n(const bf16* p, int n) { return widen_bf16(load_bits_n(p, n)); }
PK_INLINE vec load_n(const f16* p, int n) { return widen_f16(load_bits_n(p, n)); }
PK_INLINE void store_n(bf16* p, vec v, int n) { store_bits_n(p, narrow_bf16(v), n); }
PK_INLINE void store_n(f16* p, vec v, int n) { store_bits_n(p, narrow_f16(v), n); }
#elif defined(__AVX2__)
PK_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PK_INLINE vec load_n(const float* p, int n) { return (vec)_mm256_maskload_ps(p, first_lanes(n)); }
PK_INLINE void store_n(float* p, vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#endif

// Arithmetic that has no operator.

PK_INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PK_INLINE vec max(vec a, vec b) { return a > b ? a : b; }

// Pairs at distance W/2, W/4, ...: the order is fixed, so equal inputs give equal bits.
PK_INLINE float hsum(vec v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

PK_INLINE float hmax(vec v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

}  // namespace pk::PK_ISA
