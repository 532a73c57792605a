// What the CUDA kernels of kron share: how operands of 16 bits and factors multiply, and in which order.
#pragma once

#include "common/eight.cuh"
#include "kron/kron.cuh"

namespace pk {

// x of type T by factors of type F. Of one type numbers are multiplied as they are, and what comes between two products
// is rounded to it. Beside 16 bits, fp32 is cut into PARTS bf16 parts: three lose 2^-24, two 2^-16.
template <class T, class F, int PARTS>
struct Operands {
  static constexpr bool same = std::is_same_v<T, F>;
  static constexpr int x_parts = same ? 1 : parts_of<T>, parts = same ? 1 : PARTS;

  // Register i of an operand, of two numbers.
  template <int N>
  __device__ static void put(uint32_t (&to)[parts][N], int i, float low, float high) {
    if constexpr (same) {
      to[0][i] = std::is_same_v<T, bf16> ? bf16_pair(low, high) : f16_pair(low, high);
    } else {
      uint32_t cut[parts];
      split_pair(low, high, cut);
#pragma unroll
      for (int part = 0; part < parts; ++part) to[part][i] = cut[part];
    }
  }

  // Register i of an operand, of two elements of x as they lie in memory.
  template <int N>
  __device__ static void put(uint32_t (&to)[x_parts][N], int i, uint32_t two) {
    if constexpr (x_parts == 1) {
      to[0][i] = two;
    } else {
      uint32_t cut[x_parts];
      split_pair(widen(T{static_cast<uint16_t>(two)}), widen(T{static_cast<uint16_t>(two >> 16)}), cut);
#pragma unroll
      for (int part = 0; part < x_parts; ++part) to[part][i] = cut[part];
    }
  }

  // c += left right, of factors (and sums) and x, in either place.
  template <int A, int B>
  __device__ static void add(float (&c)[4], const uint32_t (&left)[A][4], const uint32_t (&right)[B][2]) {
    Product<std::conditional_t<same, T, float>, T, A, B, PARTS>::add(c, left, right);
  }
};

// Element (i, j) of a factor [rows, columns], 0 outside of it.
template <class F>
__device__ inline float element(const KronFactorCuda& f, int rows, int columns, int i, int j) {
  if (i >= rows || j >= columns) return 0;
  return widen(static_cast<const F*>(f.data)[i * f.row + j * f.column]);
}

// In a row, lane q of four has the eight neighbours from 8 q on, of 32: four for each of two steps of a sum. Index k
// (0 .. 15) of step t is depth_of(t, k) of the 32; and where such a row comes from sums, column n of their tile j is
// column_of(j, n).
__device__ inline int depth_of(int t, int k) { return k / 2 % 4 * 8 + t * 4 + k / 8 * 2 + k % 2; }
__device__ inline int column_of(int j, int n) { return j / 4 * 32 + n / 2 * 8 + j % 4 * 2 + n % 2; }

}  // namespace pk
