// Packed weights to numbers, for one lane.
#pragma once

#include "common/eight.cuh"
#include "nf4/nf4.cuh"

namespace pk {

__device__ constexpr float nf4_levels[16] = {-1.0f,
                                             -0.6961928009986877f,
                                             -0.5250730514526367f,
                                             -0.39491748809814453f,
                                             -0.28444138169288635f,
                                             -0.18477343022823334f,
                                             -0.09105003625154495f,
                                             0.0f,
                                             0.07958029955625534f,
                                             0.16093020141124725f,
                                             0.24611230194568634f,
                                             0.33791524171829224f,
                                             0.44070982933044434f,
                                             0.5626170039176941f,
                                             0.7229568362236023f,
                                             1.0f};

// -- scales -----------------------------------------------------------------------------------------------------------

// Nf4Cuda with a shift in place of a division, where block2 is a power of two.
struct Nf4Args {
  Nf4Cuda w;
  int shift2;  // -1: divide
};

inline Nf4Args nf4_args(const Nf4Cuda& w) {
  int shift2 = 0;
  while (shift2 < 62 && (int64_t{1} << shift2) < w.block2) ++shift2;
  return {w, (int64_t{1} << shift2) == w.block2 ? shift2 : -1};
}

// What is loaded of a block's scale, which takes a look into the code to be complete.
struct Scale {
  float absmax;
  int q;  // -1: absmax is the scale
};

__device__ inline Scale load_scale(const Nf4Args& args, int64_t block) {
  const Nf4Cuda& w = args.w;
  if (w.q == nullptr) return {w.absmax[block], -1};
  const int64_t group = args.shift2 >= 0 ? block >> args.shift2 : block / w.block2;
  return {w.absmax[group], w.q[block]};
}

__device__ inline float scale_of(const Scale& scale, const float* code, float offset) {
  return scale.q < 0 ? scale.absmax : multiply_then_add(code[scale.q], scale.absmax, offset);
}

__device__ inline float block_scale(const Nf4Args& args, int64_t block) {
  return scale_of(load_scale(args, block), args.w.code, args.w.q == nullptr ? 0.0f : *args.w.offset);
}

// -- pairs of levels in shared memory ---------------------------------------------------------------------------------

// The two levels of each byte, so often that the lanes of half a warp, which shared memory serves at once, have banks
// of their own. Behind them the code of scales.
struct Nf4Table {
  static constexpr int copies = 16, code_at = 256 * copies * 8, bytes = code_at + 256 * 4;

  const Pack<float, 2>* pairs;  // the copy of this lane
  const float* code;
  float offset;

  // By all threads of the block; block_sync() before the table is read.
  __device__ static Nf4Table make(const Nf4Args& args, char* shared, int threads) {
    const int lane = threadIdx.x % 32;
    auto* pairs = reinterpret_cast<Pack<float, 2>*>(shared);
    auto* code = reinterpret_cast<float*>(shared + code_at);
    for (int i = threadIdx.x; i < 256 * copies; i += threads)
      pairs[i] = {{nf4_levels[i / copies / 16], nf4_levels[i / copies % 16]}};
    const bool nested = args.w.q != nullptr;
    if (nested)
      for (int i = threadIdx.x; i < 256; i += threads) code[i] = args.w.code[i];
    return {pairs + lane % copies, code, nested ? *args.w.offset : 0.0f};
  }
};

// -- eight weights of each of some rows -------------------------------------------------------------------------------

// Of R rows from `row` on, 8 WORDS columns from `column` on, a multiple of that; zeros outside of w [n, k]. WIDE: k is
// a multiple of 8 WORDS and bytes aligned to 4 WORDS, so that a row's are one vector in one block.
template <bool WIDE, int R, int WORDS>
struct Nf4Piece {
  Pack<uint32_t, WORDS> words[R];
  Scale scale[R];

  __device__ void load(const Nf4Args& args, int n, int k, int row, int column) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      words[i] = {};
      scale[i] = {0.0f, -1};
      if (row + i >= n || column >= k) continue;
      const int64_t at = static_cast<int64_t>(row + i) * k + column;
      words[i] = load_pack<WORDS>(reinterpret_cast<const uint32_t*>(args.w.bytes + at / 2));
      scale[i] = load_scale(args, at >> args.w.shift);
    }
  }

  // v = the weights of word t of row i
  __device__ void numbers(float (&v)[8], int i, int t, const Nf4Table& table) const {
    const float s = scale_of(scale[i], table.code, table.offset);
    const uint32_t word = words[i].lane[t];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const Pack<float, 2> pair = table.pairs[(word >> 8 * b & 255) * Nf4Table::copies];
      v[2 * b] = pair.lane[0] * s;
      v[2 * b + 1] = pair.lane[1] * s;
    }
  }
};

template <int R, int WORDS>
struct Nf4Piece<false, R, WORDS> {
  Nf4Args args;
  int rows, columns;  // how many there are
  int64_t first, stride;

  __device__ void load(const Nf4Args& all, int n, int k, int row, int column) {
    args = all;
    rows = n - row, columns = k - column;
    first = static_cast<int64_t>(row) * k + column, stride = k;
  }

  __device__ void numbers(float (&v)[8], int i, int t, const Nf4Table& table) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v[e] = 0;
      if (i >= rows || 8 * t + e >= columns) continue;
      const int64_t at = first + i * stride + 8 * t + e;
      const Pack<float, 2> pair = table.pairs[args.w.bytes[at / 2] * Nf4Table::copies];
      const float s = scale_of(load_scale(args, at >> args.w.shift), table.code, table.offset);
      v[e] = (at % 2 ? pair.lane[1] : pair.lane[0]) * s;
    }
  }
};

}  // namespace pk
