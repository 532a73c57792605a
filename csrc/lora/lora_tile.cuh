// The products of LoRA for one warp, in the fragments of mma m16n8k16 (common/device.cuh).
//
// No operand goes through shared memory: each of its elements is needed by one lane of a warp. The order of the sum,
// and that of rows and columns of the result, may be any, as long as both operands agree, so it is chosen such that
// what a lane needs is 16 consecutive bytes. Lane 4 g + q as in device.cuh.
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

// -- dropout ----------------------------------------------------------------------------------------------------------

struct LoraMask {
  uint32_t key[2], offset[2], threshold;  // threshold 0 keeps everything
};

__device__ inline LoraMask mask_of(const int64_t* rng, uint32_t threshold) {
  if (threshold == 0) return {};
  const auto seed = static_cast<uint64_t>(rng[0]), offset = static_cast<uint64_t>(rng[1]);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
          threshold};
}

// Philox4x32-10 of README.md; a half of keep[i] is 0xffff where the element 2 i or 2 i + 1 of the eight is kept, else
// 0.
__device__ inline void keep_eight(const LoraMask& mask, uint32_t row, uint32_t group, uint32_t (&keep)[4]) {
  uint32_t c0 = group, c1 = row, c2 = mask.offset[0], c3 = mask.offset[1], k0 = mask.key[0], k1 = mask.key[1];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t even = c0, odd = c2;
    c0 = multiply_high(odd, 0xCD9E8D57u) ^ c1 ^ k0;
    c1 = odd * 0xCD9E8D57u;
    c2 = multiply_high(even, 0xD2511F53u) ^ c3 ^ k1;
    c3 = even * 0xD2511F53u;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    keep[i] =
        ((words[i] & 0xffffu) >= mask.threshold ? 0xffffu : 0) | ((words[i] >> 16) >= mask.threshold ? 0xffff0000u : 0);
}

// Dropped elements become 0, whatever they were.
template <class T>
__device__ inline void drop(Eight<T>& v, const LoraMask& mask, int row, int column) {
  uint32_t keep[4];
  keep_eight(mask, row, column / 8, keep);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4) {
      v.w[2 * i] = keep[i] & 0xffffu ? v.w[2 * i] : 0;
      v.w[2 * i + 1] = keep[i] >> 16 ? v.w[2 * i + 1] : 0;
    } else {
      v.w[i] &= keep[i];
    }
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

// -- the factors ------------------------------------------------------------------------------------------------------

// A factor [ranks, columns] of one adapter; vectors along the axis whose stride is 1, if they are aligned.
enum class Along : int { columns, ranks, neither };

template <class F>
struct Factor {
  const F* data;
  int64_t rank_stride, column_stride;
  int ranks, columns;
  Along along;
};

// f[j] = columns column .. column + 7 of rank + j, j < R; zeros outside of the factor. rank is a multiple of R. WIDE:
// there are vectors, along one axis or the other.
template <bool WIDE, int R, class F>
__device__ inline void load_ranks(Eight<F> (&f)[R], const Factor<F>& factor, int rank, int column) {
  const F* at = factor.data + rank * factor.rank_stride + column * factor.column_stride;
  if (factor.along == Along::ranks) {
#pragma unroll
    for (int j = 0; j < R; ++j) f[j] = {};
    if (rank >= factor.ranks) return;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < factor.columns) {
        const auto pack = load_pack<R>(reinterpret_cast<const Raw<F>*>(at + i * factor.column_stride));
#pragma unroll
        for (int j = 0; j < R; ++j) put(f[j], i, pack.lane[j]);
      }
    return;
  }
#pragma unroll
  for (int j = 0; j < R; ++j)
    f[j] = load_eight<WIDE>(at + j * factor.rank_stride, factor.column_stride,
                            rank + j < factor.ranks ? factor.columns - column : 0, factor.along == Along::columns);
}

// -- shrink: c [16 MT, 8 NT] += drop(u) f^T over columns -------------------------------------------------------------

// Column 8 q + i of 32 is the sum's index i % 4 of lane q in step i / 4; rank g NT + j is column g of tile j. So
// c[.][j][e] of a lane is its row of half e / 2 and rank (2 q + e % 2) NT + j.
template <bool WIDE, class U, class F, int MT, int NT>
struct Shrink {
  static constexpr bool same = std::is_same_v<U, F>;
  using Multiply = Product<U, F, same ? 1 : parts_of<U>, same ? 1 : parts_of<F>, 3>;

  Eight<U> u[MT][2];
  Eight<F> f[NT];

  __device__ void load(const U* data, int64_t columns, bool wide, const int (&rows)[MT][2], const Factor<F>& factor,
                       int step, int lane) {
    const int column = step + lane % 4 * 8, left = static_cast<int>(columns) - column;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        u[i][half] = load_eight<WIDE>(data + rows[i][half] * columns + column, 1, rows[i][half] < 0 ? 0 : left, wide);
    load_ranks<WIDE>(f, factor, lane / 4 * NT, column);
  }

  __device__ void multiply(float (&c)[MT][NT][4], const int (&rows)[MT][2], const LoraMask& mask, int step, int lane) {
    if (mask.threshold > 0)
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) drop(u[i][half], mask, rows[i][half], step + lane % 4 * 8);
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      if constexpr (sizeof(U) == 4) {
        float a[MT][8], b[NT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int e = 0; e < 8; ++e) a[i][e] = get(u[i][e / 2 % 2], k + e / 4 * 2 + e % 2);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) b[j][e] = get(f[j], k + e);
        mma_f32(c, a, b);
      } else {
        uint32_t b[NT][Multiply::b_parts][2];
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t parts[Multiply::b_parts];
            pair(f[j], k + 2 * e, f[j], k + 2 * e + 1, parts);
#pragma unroll
            for (int part = 0; part < Multiply::b_parts; ++part) b[j][part][e] = parts[part];
          }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          uint32_t a[Multiply::a_parts][4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            uint32_t parts[Multiply::a_parts];
            pair(u[i][e % 2], k + e / 2 * 2, u[i][e % 2], k + e / 2 * 2 + 1, parts);
#pragma unroll
            for (int part = 0; part < Multiply::a_parts; ++part) a[part][e] = parts[part];
          }
#pragma unroll
          for (int j = 0; j < NT; ++j) Multiply::add(c[i][j], a, b[j]);
        }
      }
    }
  }
};

// The steps first, first + stride .. below end, 32 columns each; the next one is on its way while one is multiplied.
template <bool WIDE, class U, class F, int MT, int NT>
__device__ inline void shrink_warp(float (&c)[MT][NT][4], const U* data, int64_t columns, bool wide,
                                   const int (&rows)[MT][2], const Factor<F>& factor, const LoraMask& mask, int first,
                                   int end, int stride, int lane) {
  if (first >= end) return;
  Shrink<WIDE, U, F, MT, NT> now, next;
  now.load(data, columns, wide, rows, factor, first, lane);
#pragma unroll 1
  for (int step = first; step < end; step += stride) {
    if (step + stride < end) next.load(data, columns, wide, rows, factor, step + stride, lane);
    now.multiply(c, rows, mask, step, lane);
    now = next;
  }
}

// -- expand: c [16 MT, 64] += v f ------------------------------------------------------------------------------------

// fp32 rows of v [., ld], the sum of `parts` arrays; slots as rows of u, -1 where there are none. The sum goes to
// `sum`, an array of its own, unless that is null.
struct Small {
  const float* data;
  int64_t part_stride;
  int parts, ld;
  float* sum;
};

// Four ranks of a row, zeros from `ranks` on.
__device__ inline void load_small(float (&v)[4], const Small& small, int64_t slot, int rank, int ranks) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = 0;
  if (slot < 0 || rank >= ranks) return;
  const float* at = small.data + slot * small.ld + rank;
  if (small.ld % 4 == 0) {  // a row is aligned to 16 bytes and goes on to the end of the four
#pragma unroll 1
    for (int part = 0; part < small.parts; ++part) {
      const auto pack = load_pack<4>(at + part * small.part_stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += rank + i < ranks ? pack.lane[i] : 0;
    }
  } else {
#pragma unroll 1
    for (int part = 0; part < small.parts; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (rank + i < ranks) v[i] += at[part * small.part_stride + i];
  }
  if (small.sum != nullptr)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (rank + i < ranks) small.sum[slot * small.ld + rank + i] = v[i];
}

// Rank 4 q + i of 16 is the sum's index i of lane q; column g of tile j is column (g % 2) 32 + g / 2 8 + j of 64. So
// c[.][j][e] of a lane is its row of half e / 2 and column e % 2 32 + 8 q + j: vectors along j.
template <bool WIDE, class F, class Y, int MT>
__device__ inline void expand_warp(float (&c)[MT][8][4], const Small& small, const int64_t (&slots)[MT][2],
                                   const Factor<F>& factor, int column, int lane) {
  constexpr bool fma = sizeof(F) == 4 && sizeof(Y) == 4;
  using Multiply = Product<float, F, 2, std::is_same_v<F, bf16> ? 1 : 2, 2>;
  const int g = lane / 4, q = lane % 4;
#pragma unroll 1
  for (int step = 0; step < factor.ranks; step += 16) {
    const int rank = step + 4 * q;
    float v[MT][2][4];
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) load_small(v[i][half], small, slots[i][half], rank, factor.ranks);
    Eight<F> f[4];
    load_ranks<WIDE>(f, factor, rank, column + g % 2 * 32 + g / 2 * 8);
    if constexpr (fma) {
      float a[MT][8], b[8][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) a[i][e] = v[i][e / 2 % 2][e / 4 * 2 + e % 2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = get(f[e], j);
      mma_f32(c, a, b);
    } else {
      uint32_t a[MT][Multiply::a_parts][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t parts[Multiply::a_parts];
          split_pair(v[i][e % 2][e / 2 * 2], v[i][e % 2][e / 2 * 2 + 1], parts);
#pragma unroll
          for (int part = 0; part < Multiply::a_parts; ++part) a[i][part][e] = parts[part];
        }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t b[Multiply::b_parts][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t parts[Multiply::b_parts];
          pair(f[2 * e], j, f[2 * e + 1], j, parts);
#pragma unroll
          for (int part = 0; part < Multiply::b_parts; ++part) b[part][e] = parts[part];
        }
#pragma unroll
        for (int i = 0; i < MT; ++i) Multiply::add(c[i][j], a[i], b);
      }
    }
  }
}

// y += scale * mask * c in the layout of expand_warp, one rounding.
template <bool WIDE, class Y, int MT>
struct Update {
  Eight<Y> y[MT][2][2];

  __device__ void load(const Y* data, int64_t columns, bool wide, const int (&rows)[MT][2], int column, int lane) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int at = column + 32 * side + lane % 4 * 8;
          y[i][half][side] = load_eight<WIDE>(data + rows[i][half] * columns + at, 1,
                                              rows[i][half] < 0 ? 0 : static_cast<int>(columns) - at, wide);
        }
  }

  __device__ void store(Y* data, int64_t columns, bool wide, const int (&rows)[MT][2], int column,
                        const float (&c)[MT][8][4], float scale, const LoraMask& mask, int lane) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int at = column + 32 * side + lane % 4 * 8, left = static_cast<int>(columns) - at;
          if (rows[i][half] < 0 || left <= 0) continue;
          uint32_t keep[4] = {~0u, ~0u, ~0u, ~0u};
          if (mask.threshold > 0) keep_eight(mask, rows[i][half], at / 8, keep);
          float out[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const bool kept = keep[j / 2] >> 16 * (j % 2) & 1;
            out[j] = get(y[i][half][side], j) + (kept ? scale * c[i][j][2 * half + side] : 0.0f);
          }
          Y* to = data + rows[i][half] * columns + at;
          if (WIDE || wide) {
            pk::store<8>(to, out);
          } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
              if (j < left) to[j] = narrow<Y>(out[j]);
          }
        }
  }
};

// -- wgrad: c [16 RT, 64] += v^T drop(u) over rows -------------------------------------------------------------------

// Row 4 q + i of 16 is the sum's index i of lane q; rank 2 g + half is row g + 8 half, and column 8 g + j is column g
// of tile j. So c[.][j][e] of a lane is rank 2 g + e / 2 and column 8 (2 q + e % 2) + j.
template <bool WIDE, class U, int RT>
struct Wgrad {
  using Multiply = Product<float, U, 3, parts_of<U>, 3>;

  int rows[4];
  Eight<U> u[4];
  float v[RT][4][2];

  // rows: -1 where there are none; slot is that of the first row, v's column `rank` that of the first rank.
  __device__ void load(const U* data, int64_t columns, bool wide, int column, const float* small, int ld, int64_t slot,
                       int rank, int ranks, int lane) {
    const int at = column + lane / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u[i] = load_eight<WIDE>(data + rows[i] * columns + at, 1, rows[i] < 0 ? 0 : static_cast<int>(columns) - at, wide);
      const float* from = small + (slot + lane % 4 * 4 + i) * ld;
#pragma unroll
      for (int t = 0; t < RT; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = rank + 16 * t + lane / 4 * 2 + half;
          v[t][i][half] = rows[i] >= 0 && r < ranks ? from[r] : 0;
        }
    }
  }

  __device__ void multiply(float (&c)[RT][8][4], int column, const LoraMask& mask, int lane) {
    if (mask.threshold > 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) drop(u[i], mask, rows[i], column + lane / 4 * 8);
    if constexpr (sizeof(U) == 4) {
      float a[RT][8], b[8][4];
#pragma unroll
      for (int t = 0; t < RT; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) a[t][e] = v[t][e / 4 * 2 + e % 2][e / 2 % 2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = get(u[e], j);
      mma_f32(c, a, b);
    } else {
      uint32_t a[RT][Multiply::a_parts][4];
#pragma unroll
      for (int t = 0; t < RT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t parts[Multiply::a_parts];
          split_pair(v[t][e / 2 * 2][e % 2], v[t][e / 2 * 2 + 1][e % 2], parts);
#pragma unroll
          for (int part = 0; part < Multiply::a_parts; ++part) a[t][part][e] = parts[part];
        }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t b[Multiply::b_parts][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t parts[Multiply::b_parts];
          pair(u[2 * e], j, u[2 * e + 1], j, parts);
#pragma unroll
          for (int part = 0; part < Multiply::b_parts; ++part) b[part][e] = parts[part];
        }
#pragma unroll
        for (int t = 0; t < RT; ++t) Multiply::add(c[t][j], a[t], b);
      }
    }
  }
};

}  // namespace pk
