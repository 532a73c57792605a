// The two thin products of the bottleneck for 16 rows, by a block, in the fragments of mma m16n8k16.
//
// As in lora/lora_tile.cuh no weight goes through shared memory: each of its elements is needed by one lane of a warp,
// and the orders of sums and columns are chosen such that what a lane needs is 16 consecutive bytes. Warps of a block
// share the columns or the terms of the sums, whichever keeps all of them busy, and their parts are added in order.
#pragma once

#include <cmath>

#include "bottleneck/bottleneck.cuh"
#include "lora/lora_tile.cuh"

namespace pk {

constexpr int bottleneck_warps = 8, bottleneck_threads = 32 * bottleneck_warps;
constexpr int up_pitch = 65;  // of 64 columns in shared memory, against bank conflicts
// Floats in shared memory in which warps leave their parts: [warps, 16, 16] of down, [warps, 16, up_pitch] of up.
constexpr int bottleneck_staged = bottleneck_warps * 16 * up_pitch;

__device__ inline float number_at(const void* data, Dtype type, int64_t i) {
  if (type == Dtype::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Dtype::bf16 ? widen(bf16{bits}) : widen(f16{bits});
}

__device__ inline float number_at(const BottleneckVector& v, int64_t i, float otherwise) {
  return v.data == nullptr ? otherwise : number_at(v.data, v.type, i);
}

__device__ inline void store_at(void* data, Dtype type, int64_t i, float x) {
  if (type == Dtype::bf16)
    static_cast<bf16*>(data)[i] = narrow<bf16>(x);
  else if (type == Dtype::f16)
    static_cast<f16*>(data)[i] = narrow<f16>(x);
  else
    static_cast<float*>(data)[i] = x;
}

// -- activations ------------------------------------------------------------------------------------------------------

enum Activation : int { relu, gelu, gelu_tanh, silu, tanh_, leaky_relu, identity };

__device__ inline float activated(int act, float z) {
  switch (act) {
    case relu:
      return z < 0 ? 0 : z;  // NaN stays
    case gelu:
      return 0.5f * z * (1 + erff(z * 0.70710678f));
    case gelu_tanh:
      return 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case silu:
      return z / (1 + expf(-z));
    case tanh_:
      return tanhf(z);
    case leaky_relu:
      return z < 0 ? 0.01f * z : z;
    default:
      return z;
  }
}

__device__ inline float slope(int act, float z) {
  switch (act) {
    case relu:
      return z <= 0 ? 0 : 1;
    case gelu:
      return 0.5f * (1 + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    case gelu_tanh: {
      const float t = tanhf(0.79788456f * (z + 0.044715f * z * z * z));
      return 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * 0.79788456f * (1 + 3 * 0.044715f * z * z);
    }
    case silu: {
      const float s = 1 / (1 + expf(-z));
      return s * (1 + z * (1 - s));
    }
    case tanh_: {
      const float t = tanhf(z);
      return 1 - t * t;
    }
    case leaky_relu:
      return z > 0 ? 1 : 0.01f;
    default:
      return 1;
  }
}

__device__ inline bool is_kept(const LoraMask& mask, int row, int column) {
  if (mask.threshold == 0) return true;
  uint32_t keep[4];
  keep_eight(mask, row, column / 8, keep);
  uint32_t bits = 0;  // one for each of the eight: an index into keep would take it out of registers
#pragma unroll
  for (int i = 0; i < 8; ++i) bits |= (keep[i / 2] >> 16 * (i % 2) & 1) << i;
  return bits >> column % 8 & 1;
}

// -- LayerNorm --------------------------------------------------------------------------------------------------------

struct Moments {
  float mean, squares;  // of the deviations from the mean
};

// Of columns begin .. end - 1 of a row, by a warp.
template <class X>
__device__ inline Moments moments_of(const X* row, int begin, int end, bool wide, int lane) {
  if (begin >= end) return {0, 0};
  float sum = 0, squares = 0;
  for (int c = begin + 8 * lane; c < end; c += 256) {
    const Eight<X> v = load_eight<false>(row + c, 1, end - c, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += get(v, i);
  }
  const float mean = warp_sum(sum) / static_cast<float>(end - begin);
  for (int c = begin + 8 * lane; c < end; c += 256) {
    const Eight<X> v = load_eight<false>(row + c, 1, end - c, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = c + i < end ? get(v, i) - mean : 0;
      squares += d * d;
    }
  }
  return {mean, warp_sum(squares)};
}

__device__ inline float deviation_inverse(float squares, int columns, float eps) {
  return 1 / sqrtf(squares / static_cast<float>(columns) + eps);
}

// What a lane needs to normalise its rows g and g + 8.
struct RowNorm {
  float mean[2], inverse[2];
};

__device__ inline float normal(float x, float mean, float inverse, float w, float b) {
  return (x - mean) * inverse * w + b;
}

// -- down: c [16, 16] += h f^T over columns ---------------------------------------------------------------------------

// Orders as in Shrink of lora_tile.cuh. h is rounded to X beside weights of X, as a tensor of h would be, else it is
// not.
template <class X, class F, bool LN>
struct Down {
  static constexpr bool same = std::is_same_v<X, F>;
  using Multiply = Product<X, F, same ? 1 : LN ? 3 : parts_of<X>, same ? 1 : parts_of<F>, 3>;

  Eight<X> u[2];
  Eight<F> f[2];

  __device__ void load(const X* x, int columns, bool wide, const int (&rows)[2], const Factor<F>& factor, int step,
                       int lane) {
    const int column = step + lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      u[half] = load_eight<false>(x + static_cast<int64_t>(rows[half]) * columns + column, 1,
                                  rows[half] < 0 ? 0 : columns - column, wide);
    load_ranks<false>(f, factor, lane / 4 * 2, column);
  }

  __device__ void multiply(float (&c)[1][2][4], const BottleneckShape& s, const RowNorm& norm, int step, int lane) {
    float h[2][8];
    if constexpr (LN) {
      const int column = step + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool real = column + i < s.in;
        const float w = real ? number_at(s.ln_w, column + i, 1) : 0, b = real ? number_at(s.ln_b, column + i, 0) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          h[half][i] = normal(get(u[half], i), norm.mean[half], norm.inverse[half], w, b);
      }
    } else if constexpr (sizeof(X) == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 8; ++i) h[half][i] = get(u[half], i);
    }
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      if constexpr (sizeof(X) == 4) {
        float a[1][8], b[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) a[0][e] = h[e / 2 % 2][k + e / 4 * 2 + e % 2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) b[j][e] = get(f[j], k + e);
        mma_f32(c, a, b);
      } else {
        uint32_t a[Multiply::a_parts][4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          uint32_t parts[Multiply::a_parts];
          const int i = k + e / 2 * 2;
          if constexpr (!LN)
            pair(u[e % 2], i, u[e % 2], i + 1, parts);
          else if constexpr (same && std::is_same_v<X, f16>)
            parts[0] = f16_pair(h[e % 2][i], h[e % 2][i + 1]);
          else
            split_pair(h[e % 2][i], h[e % 2][i + 1], parts);
#pragma unroll
          for (int part = 0; part < Multiply::a_parts; ++part) a[part][e] = parts[part];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[Multiply::b_parts][2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t parts[Multiply::b_parts];
            pair(f[j], k + 2 * e, f[j], k + 2 * e + 1, parts);
#pragma unroll
            for (int part = 0; part < Multiply::b_parts; ++part) b[part][e] = parts[part];
          }
          Multiply::add(c[0][j], a, b);
        }
      }
    }
  }
};

// Columns first .. end - 1 in steps of 32, each warp every stride-th: as many are on their way as registers hold.
template <class X, class F, bool LN>
__device__ inline void down_warp(float (&c)[1][2][4], const X* x, int columns, bool wide, const int (&rows)[2],
                                 const Factor<F>& factor, const BottleneckShape& s, const RowNorm& norm, int first,
                                 int end, int stride, int lane) {
  constexpr int depth = sizeof(X) + sizeof(F) == 4 ? 4 : 2;
  Down<X, F, LN> steps[depth];
#pragma unroll
  for (int i = 0; i < depth - 1; ++i)
    if (first + i * stride < end) steps[i].load(x, columns, wide, rows, factor, first + i * stride, lane);
#pragma unroll 1
  for (int at = first; at < end; at += depth * stride)
#pragma unroll
    for (int i = 0; i < depth; ++i) {
      const int step = at + i * stride, later = step + (depth - 1) * stride;
      if (later < end) steps[(i + depth - 1) % depth].load(x, columns, wide, rows, factor, later, lane);
      if (step < end) steps[i].multiply(c, s, norm, step, lane);
    }
}

// sums [16, ld] of ranks 16 first_group .. 16 end_group - 1, from the block's columns begin .. end - 1 of x; a rank's
// column in sums counts from `first_group`. Groups of 16 ranks are taken group_warps at a time, the columns of each by
// the other warps in turn. All threads of the block.
template <class X, class F, bool LN>
__device__ inline void down_block(float* sums, int ld, float* staged, const X* x, int columns, bool wide,
                                  const int (&rows)[2], const Factor<F>& factor, const BottleneckShape& s,
                                  const RowNorm& norm, int begin, int end, int first_group, int end_group,
                                  int group_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int shares = bottleneck_warps / group_warps, mine = warp / shares;
  for (int base = first_group; base < end_group; base += group_warps) {
    float c[1][2][4] = {};
    const int rank = 16 * (base + mine);
    if (base + mine < end_group) {
      const Factor<F> f = {factor.data + rank * factor.rank_stride,
                           factor.rank_stride,
                           factor.column_stride,
                           factor.ranks - rank,
                           factor.columns,
                           factor.along};
      down_warp<X, F, LN>(c, x, columns, wide, rows, f, s, norm, begin + 32 * (warp % shares), end, 32 * shares, lane);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[warp * 256 + (8 * (e / 2) + lane / 4) * 16 + (lane % 4 * 2 + e % 2) * 2 + j] = c[0][j][e];
    block_sync();
    for (int i = threadIdx.x; i < 256 * group_warps; i += bottleneck_threads) {
      const int group = i / 256, row = i % 256 / 16, at = 16 * (base - first_group + group) + i % 16;
      float sum = 0;
      for (int share = 0; share < shares; ++share) sum += staged[(group * shares + share) * 256 + i % 256];
      if (at < ld) sums[row * ld + at] = sum;
    }
    block_sync();
  }
}

// -- up: c [16, 64] += v f --------------------------------------------------------------------------------------------

// Orders as in expand_warp of lora_tile.cuh. PARTS of bf16 hold an element of v, and at most so many one of f: with two
// 2^-16 of a product is lost, with three 2^-24.
template <class X, class F, int PARTS>
struct Up {
  static constexpr bool fma = sizeof(F) == 4 && sizeof(X) == 4;
  using Multiply = Product < float, F, PARTS, parts_of<F><PARTS ? parts_of<F> : PARTS, PARTS>;

  Eight<F> f[4];

  __device__ void load(const Factor<F>& factor, int step, int column, int lane) {
    const int g = lane / 4;
    load_ranks<false>(f, factor, step + lane % 4 * 4, column + g % 2 * 32 + g / 2 * 8);
  }

  // v: row i at i * ld, rows as a lane has them, -1 where there is none.
  __device__ void multiply(float (&c)[1][8][4], const float* v, int ld, const int (&rows)[2], int ranks, int step,
                           int lane) {
    const int rank = step + lane % 4 * 4;
    float left[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[half][i] = rows[half] >= 0 && rank + i < ranks ? v[static_cast<int64_t>(rows[half]) * ld + rank + i] : 0;
    if constexpr (fma) {
      float a[1][8], b[8][4];
#pragma unroll
      for (int e = 0; e < 8; ++e) a[0][e] = left[e / 2 % 2][e / 4 * 2 + e % 2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e] = get(f[e], j);
      mma_f32(c, a, b);
    } else {
      uint32_t a[Multiply::a_parts][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        uint32_t parts[Multiply::a_parts];
        split_pair(left[e % 2][e / 2 * 2], left[e % 2][e / 2 * 2 + 1], parts);
#pragma unroll
        for (int part = 0; part < Multiply::a_parts; ++part) a[part][e] = parts[part];
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
        Multiply::add(c[0][j], a, b);
      }
    }
  }
};

// Tiles of 64 columns: first, first + stride, .. of `tiles`, tile_warps at a time, the ranks of each by the other warps
// in turn. finish(row, column, sums[8]) for each row of 16 and eight columns. All threads of the block.
template <class X, class F, int PARTS, class Finish>
__device__ inline void up_block(float* staged, const float* v, int ld, const int (&rows)[2], const Factor<F>& factor,
                                int first, int stride, int tiles, int tile_warps, Finish&& finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int shares = bottleneck_warps / tile_warps;
  for (int base = first; base < tiles; base += stride * tile_warps) {
    const int tile = base + warp / shares * stride, turn = 16 * shares;
    float c[1][8][4] = {};
    if (tile < tiles) {
      Up<X, F, PARTS> now, next;
      int step = 16 * (warp % shares);
      if (step < factor.ranks) now.load(factor, step, 64 * tile, lane);
#pragma unroll 1
      for (; step < factor.ranks; step += turn) {
        if (step + turn < factor.ranks) next.load(factor, step + turn, 64 * tile, lane);
        now.multiply(c, v, ld, rows, factor.ranks, step, lane);
        now = next;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(warp * 16 + e / 2 * 8 + lane / 4) * up_pitch + e % 2 * 32 + lane % 4 * 8 + j] = c[0][j][e];
    block_sync();
    for (int i = threadIdx.x; i < 128 * tile_warps; i += bottleneck_threads) {
      const int slot = i / 128, row = i % 128 / 8, eight = i % 8 * 8, at = base + slot * stride;
      if (at >= tiles) continue;
      float sums[8] = {};
      for (int share = 0; share < shares; ++share)
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e] += staged[((slot * shares + share) * 16 + row) * up_pitch + eight + e];
      finish(row, 64 * at + eight, sums);
    }
    block_sync();
  }
}

// -- what kernels and launchers share ---------------------------------------------------------------------------------

// The rows of a lane among the 16 of a tile, -1 where there is none.
__device__ inline void rows_of_tile(int tile, int rows, int lane, int (&out)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * tile + 8 * half + lane / 4;
    out[half] = row < rows ? row : -1;
  }
}

// Eight numbers of a row to `to`, of which `left` exist.
template <class X>
__device__ inline void store_eight(X* to, const float (&v)[8], int left, bool wide) {
  if (wide) {
    store<8>(to, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < left) to[e] = narrow<X>(v[e]);
  }
}

// Of n, so many at a time.
inline int pieces(int64_t n, int64_t size) { return static_cast<int>((n + size - 1) / size); }

// The weight as ranks by columns; a rank is a row of wd and a column of wu.
struct BottleneckFactor {
  const void* data;
  int64_t rank_stride, column_stride;
  int ranks, columns;
  Along along;

  template <class F>
  __device__ Factor<F> as() const {
    return {static_cast<const F*>(data), rank_stride, column_stride, ranks, columns, along};
  }
};

inline int64_t bytes_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

inline BottleneckFactor factor_of(const Strided& w, int64_t rank_stride, int64_t column_stride, int ranks,
                                  int columns) {
  Along along = Along::neither;
  if (column_stride == 1 && rank_stride % 8 == 0 && columns % 8 == 0 && aligned16(w.data))
    along = Along::columns;
  else if (rank_stride == 1 && column_stride % 4 == 0 && ranks % 4 == 0 &&
           reinterpret_cast<uintptr_t>(w.data) % (4 * bytes_of(w.type)) == 0)
    along = Along::ranks;
  return {w.data, rank_stride, column_stride, ranks, columns, along};
}

inline BottleneckFactor down_factor(const BottleneckShape& s) {
  return factor_of(s.wd, s.wd.row, s.wd.next, s.mid, s.in);
}

inline BottleneckFactor up_factor(const BottleneckShape& s) {
  return factor_of(s.wu, s.wu.next, s.wu.row, s.mid, s.out);
}

// Rows of n elements that may be read eight at a time.
template <class... P>
inline bool is_wide(int n, const P*... arrays) {
  return n % 8 == 0 && aligned16(arrays...);
}

// Of the warps of a block, as many side by side as there are `items` for, and a power of two.
inline int side_by_side(int items) {
  int warps = 1;
  while (warps < bottleneck_warps && warps < items) warps *= 2;
  return warps;
}

// f(X{}, F{}) for the types of x and of the weights.
template <class Call>
auto switch_bottleneck(const BottleneckShape& s, Call&& call) {
  return switch_dtype(s.type, [&](auto x) { return s.wd.type == s.type ? call(x, x) : call(x, float{}); });
}

inline cudaError_t bottleneck_refused(const BottleneckShape& s) {
  const bool fits = s.rows <= bottleneck_most_rows && s.wu.type == s.wd.type &&
                    (s.wd.type == s.type || s.wd.type == Dtype::f32) &&
                    static_cast<int64_t>(s.mid) * s.in <= bottleneck_most_weight &&
                    static_cast<int64_t>(s.mid) * s.out <= bottleneck_most_weight;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace pk
