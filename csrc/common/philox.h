// Philox4x32-10 (Salmon et al. 2011), several counters side by side: the random numbers of the CPU kernels.
#pragma once

#include "common/cpu.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace pk::PK_ISA {

typedef uint64_t wide __attribute__((vector_size(4 * W)));
constexpr int kLanes = W / 2;  // counters of one vector

PK_INLINE wide spread(uint64_t x) { return wide{} + x; }

// 32 x 32 -> 64 bits, from the low halves of the lanes.
PK_INLINE wide multiply(wide a, wide b) {
#if defined(__AVX512F__)
  return (wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The generator of one (seed, offset), which is the key and the upper half of every counter.
class Philox {
 public:
  Philox() = default;
  Philox(uint64_t seed, uint64_t offset) : offset_(offset) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      key0_[round] = key0;
      key1_[round] = key1;
    }
  }

  // The counters (first + lane, second, offset low, offset high) of N vectors, which one after the other would wait on
  // their multiplications. Lane l of left[i] gets words 0 and 1 of counter first + i * kLanes + l, right[i] 2 and 3.
  template <int N>
  PK_INLINE void operator()(uint64_t first, uint32_t second, wide (&left)[N], wide (&right)[N]) const {
    wide lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    wide c0[N], c1[N], c2[N], c3[N];
    for (int i = 0; i < N; ++i) {
      c0[i] = lane + (first + i * kLanes);
      c1[i] = spread(second);
      c2[i] = spread(offset_);
      c3[i] = spread(offset_ >> 32);
    }
    // Upper halves hold leftovers all the way: a multiplication reads lower halves only.
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round)
      for (int i = 0; i < N; ++i) {
        const wide even = multiply(c0[i], spread(0xD2511F53)), odd = multiply(c2[i], spread(0xCD9E8D57));
        c0[i] = (odd >> 32) ^ (c1[i] ^ spread(key0_[round]));
        c1[i] = odd;
        c2[i] = (even >> 32) ^ (c3[i] ^ spread(key1_[round]));
        c3[i] = even;
      }
    constexpr uint64_t low = 0xffffffff;
    for (int i = 0; i < N; ++i) {
      left[i] = (c0[i] & low) | c1[i] << 32;
      right[i] = (c2[i] & low) | c3[i] << 32;
    }
  }

 private:
  uint64_t offset_ = 0, key0_[10] = {}, key1_[10] = {};
};

}  // namespace pk::PK_ISA
