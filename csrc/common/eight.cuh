// Eight elements of a lane at a time, and products of mixed types, for kernels on the tensor cores.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/device.cuh"

namespace pk {

// -- eight elements ---------------------------------------------------------------------------------------------------

// Eight elements of T as they lie in memory.
template <class T>
struct Eight {
  uint32_t w[2 * sizeof(T)];
};

template <class T>
using Raw = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
__device__ inline void put(Eight<T>& v, int i, Raw<T> bits) {
  if constexpr (sizeof(T) == 4)
    v.w[i] = bits;
  else
    v.w[i / 2] |= static_cast<uint32_t>(bits) << 16 * (i % 2);
}

template <class T>
__device__ inline float get(const Eight<T>& v, int i) {
  if constexpr (sizeof(T) == 4)
    return float_of(v.w[i]);
  else
    return widen(T{static_cast<uint16_t>(v.w[i / 2] >> 16 * (i % 2))});
}

// The first `left` (any number) of eight elements at p, zeros for the others. WIDE or wide: p is aligned to 16 bytes
// and left a multiple of 8, or at most 0. Where that is known to the compiler, a kernel takes fewer registers.
template <bool WIDE, class T>
__device__ inline Eight<T> load_eight(const T* p, int64_t stride, int left, bool wide) {
  Eight<T> v = {};
  if (WIDE || wide) {
    if (left > 0) {
      constexpr int N = 2 * sizeof(T);
      const auto pack = load_pack<N>(reinterpret_cast<const uint32_t*>(p));
#pragma unroll
      for (int i = 0; i < N; ++i) v.w[i] = pack.lane[i];
    }
    return v;
  }
  const auto* bits = reinterpret_cast<const Raw<T>*>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < left) put(v, i, bits[i * stride]);
  return v;
}

// -- operands of mixed types ------------------------------------------------------------------------------------------

// How the tensor cores multiply operands of two types: as they are if both are bf16 or both fp16, else cut into bf16
// parts that add up to them, largest first (fp16 parts would overflow beyond 65504). The products of parts i and j with
// i + j >= `orders` are left out: 2^-24 of the product with three orders, 2^-16 with two. fp32 by fp32 is FMA's.
template <class A, class B, int A_PARTS, int B_PARTS, int ORDERS>
struct Product {
  static constexpr int a_parts = A_PARTS, b_parts = B_PARTS;

  __device__ static void add(float (&c)[4], const uint32_t (&a)[A_PARTS][4], const uint32_t (&b)[B_PARTS][2]) {
#pragma unroll
    for (int i = A_PARTS - 1; i >= 0; --i)  // the small ones first
#pragma unroll
      for (int j = B_PARTS - 1; j >= 0; --j)
        if (i + j < ORDERS) {
          if constexpr (std::is_same_v<A, f16> && std::is_same_v<B, f16>)
            mma_f16(c, a[i], b[j]);
          else
            mma_bf16(c, a[i], b[j]);
        }
  }
};

// bf16 parts that hold T beside an operand of another type.
template <class T>
constexpr int parts_of = std::is_same_v<T, bf16>  ? 1
                         : std::is_same_v<T, f16> ? 2
                                                  : 3;

// What the part leaves of x; 0 where that is not finite, so that an infinity stays one.
__device__ inline float rest(float x, uint32_t part) {
  const float left = x - float_of(part);
  return fabsf(left) < INFINITY ? left : 0.0f;
}

template <int P>
__device__ inline void split_pair(float low, float high, uint32_t (&parts)[P]) {
#pragma unroll
  for (int i = 0; i < P; ++i) {
    parts[i] = bf16_pair(low, high);
    low = rest(low, parts[i] << 16);
    high = rest(high, parts[i] & 0xffff0000u);
  }
}

// Elements i of u and j of v as a register for the tensor cores, in P parts; one part is T's own bits.
template <int P, class T>
__device__ inline void pair(const Eight<T>& u, int i, const Eight<T>& v, int j, uint32_t (&parts)[P]) {
  if constexpr (P == 1) {
    const uint32_t low = i % 2 ? u.w[i / 2] >> 16 : u.w[i / 2] & 0xffffu;
    parts[0] = low | (j % 2 ? v.w[j / 2] & 0xffff0000u : v.w[j / 2] << 16);
  } else {
    split_pair(get(u, i), get(v, j), parts);
  }
}

}  // namespace pk
