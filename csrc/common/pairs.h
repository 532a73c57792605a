// Operands of matrix products made of 32-bit words along the sum: a float each, or two neighbouring bf16 for
// vdpbf16ps, where the level has it.
#pragma once

#include <type_traits>

#include "common/cpu.h"

namespace pk::PK_ISA {

#ifdef __AVX512BF16__
template <class T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kPairs = false;
#endif

// sum + the word at `left` times each word of right
template <bool pairs>
PK_INLINE vec multiply_add(const uint32_t* left, vec right, vec sum) {
#ifdef __AVX512BF16__
  if constexpr (pairs)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*left)), (__m512bh)right);
#endif
  return fma(splat(bit_cast<float>(*left)), right, sum);
}

}  // namespace pk::PK_ISA
