// Products of few rows with packed weights on CUDA, in the fragments of mma m16n8k16 (common/device.cuh).
//
// Weights are the left operand, so that 8 rows of x fill a product. As in lora_tile.cuh the order of the sum and those
// of rows and columns are free as long as both operands agree, and chosen such that a lane reads vectors: weights and x
// go from global memory into the fragment of the lane that needs them. Lane 4 g + q as in device.cuh.
#include <algorithm>

#include "nf4/nf4_tile.cuh"

namespace pk {
namespace {

constexpr int linear_warps = 8, linear_shares = 2;  // of K in a block; the other warps have other rows
constexpr int linear_rows = 32 * linear_warps / linear_shares;
constexpr int dgrad_warps = 4;
constexpr int blocks_wanted = 264;  // two for each SM of an H100

template <class T>
__device__ inline uint32_t pair_of(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16_pair(low, high);
  else
    return f16_pair(low, high);
}

__device__ inline float load_as(const void* p, Dtype type, int64_t i) {
  if (type == Dtype::bf16) return widen(static_cast<const bf16*>(p)[i]);
  if (type == Dtype::f16) return widen(static_cast<const f16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

struct Args {
  Nf4Args w;
  Nf4Product p;
  const void *in, *bias;
  Dtype bias_type;
  void* out;
  float* parts;               // null: write out
  int blocks, splits, chunk;  // of the result's columns; parts of the sum, and how much of it a part has
  Nf4Update update;
};

// c [16 MT, 8 NT] += a b, where a[i][e] is half e % 2 of register e / 2 in numbers, and u four pairs of elements of
// which `step` says the two for b.
template <class T, int MT, int NT>
__device__ inline void multiply(float (&c)[MT][NT][4], const float (&a)[MT][8], const Eight<T> (&u)[NT], int step) {
  if constexpr (sizeof(T) == 4) {
    float b[NT][4];
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) b[j][e] = get(u[j], 4 * step + e);
    mma_f32(c, a, b);
  } else {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      uint32_t left[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) left[e] = pair_of<T>(a[i][2 * e], a[i][2 * e + 1]);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const uint32_t right[2] = {u[j].w[2 * step], u[j].w[2 * step + 1]};
        if constexpr (std::is_same_v<T, bf16>)
          mma_bf16(c[i][j], left, right);
        else
          mma_f16(c[i][j], left, right);
      }
    }
  }
}

// Rows g, 8 + g .. of u [m, columns], eight columns from `column` on.
template <bool WIDE, class T, int NT>
__device__ inline void load_rows(Eight<T> (&u)[NT], const T* data, int m, int columns, int column, int g) {
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    const int row = 8 * j + g;
    u[j] =
        load_eight<WIDE>(data + static_cast<int64_t>(row) * columns + column, 1, row < m ? columns - column : 0, WIDE);
  }
}

// c += the parts of an update index, index + count .., by tensor cores as two bf16 parts of either operand, but for
// fp32. column_of(i, half) is that of row g + 8 half of tile i.
template <class T, int MT, int NT, class Column>
__device__ inline void add_update(float (&c)[MT][NT][4], const Nf4Update& update, int m, int columns, int index,
                                  int count, int lane, Column&& column_of) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll 1
  for (int part = index; part < update.parts; part += count)
#pragma unroll 1
    for (int rank = 4 * q; rank - 4 * q < update.ranks; rank += 16) {
      float v[NT][4], a[MT][8];
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row = static_cast<int64_t>(part) * m + 8 * j + g;
          const bool inside = 8 * j + g < m && rank + e < update.ranks;
          v[j][e] = inside ? update.scale * update.v[row * update.ranks + rank + e] : 0;
        }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = column_of(i, e / 2 % 2), at = rank + e / 4 * 2 + e % 2;
          a[i][e] = 0;
          if (column < columns && at < update.ranks)
            a[i][e] = load_as(update.f, update.type, at * update.rank_stride + column * update.column_stride);
        }
      if constexpr (sizeof(T) == 4) {
        mma_f32(c, a, v);
      } else {
        using Multiply = Product<float, float, 2, 2, 2>;
        uint32_t right[NT][2][2];
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t parts[2];
            split_pair(v[j][2 * e], v[j][2 * e + 1], parts);
            right[j][0][e] = parts[0], right[j][1][e] = parts[1];
          }
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          uint32_t left[2][4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            uint32_t parts[2];
            split_pair(a[i][2 * e], a[i][2 * e + 1], parts);
            left[0][e] = parts[0], left[1][e] = parts[1];
          }
#pragma unroll
          for (int j = 0; j < NT; ++j) Multiply::add(c[i][j], left, right[j]);
        }
      }
    }
}

// sum [m, ranks] of the parts of an update, by the threads of a block.
__device__ inline void sum_update(const Nf4Update& update, int m, int threads) {
  if (update.sum == nullptr) return;
  const int size = m * update.ranks;
  for (int i = threadIdx.x; i < size; i += threads) {
    float sum = 0;
    for (int part = 0; part < update.parts; ++part) sum += update.v[static_cast<int64_t>(part) * size + i];
    update.sum[i] = sum;
  }
}

// Adds up c of the `count` warps of each team, in pairs and in order, in the one of index 0. All threads of the block
// come here, done with what was in shared memory.
template <int A, int B, int C, int D>
__device__ inline void add_up(float (&c)[A][B][C][D], float* shared, int team, int index, int count, int lane) {
  constexpr int size = A * B * C * D;
  for (int half = count / 2; half > 0; half /= 2) {
    float* at = shared + (team * half + index % half) * size * 32 + lane;
    block_sync();
    if (index >= half && index < 2 * half)
#pragma unroll
      for (int i = 0; i < size; ++i) at[32 * i] = c[i / (B * C * D)][i / (C * D) % B][i / D % C][i % D];
    block_sync();
    if (index < half)
#pragma unroll
      for (int i = 0; i < size; ++i) c[i / (B * C * D)][i / (C * D) % B][i / D % C][i % D] += at[32 * i];
  }
}

// N neighbours of a row of out [., columns], as one vector if columns is a multiple of N.
template <int N, class T>
__device__ inline void store_some(T* out, int64_t row, int columns, int column, const float (&v)[N]) {
  if (column >= columns) return;
  T* to = out + row * columns + column;
  if (columns % N == 0) {
    store<N>(to, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column + i < columns) to[i] = narrow<T>(v[i]);
  }
}

// -- y = x w^T + bias -------------------------------------------------------------------------------------------------

// A block is 128 rows of w, all of x and a chunk of columns; its warps have 32 rows and, in turn, 128 columns. Lane q
// has 32 of those, which are 16 bytes of a row of w. Row g + 8 h of tile i is row 4 g + 2 i + h of 32.
template <bool WIDE, class T, int NT>
__global__ void __launch_bounds__(32 * linear_warps) nf4_linear_kernel(Args args) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int team = warp / linear_shares, share = warp % linear_shares;
  const int part = blockIdx.x / args.blocks, m = args.p.m, n = args.p.n, k = args.p.k;
  const int row = blockIdx.x % args.blocks * linear_rows + 32 * team + 4 * g;
  const int first = part * args.chunk + 128 * share, stop = (part + 1) * args.chunk, end = stop < k ? stop : k;
  constexpr int stride = 128 * linear_shares;
  Nf4Piece<WIDE, 4, 4> now, next;
  now.load(args.w, n, first < end ? k : 0, row, first + 32 * q);
  const Nf4Table table = Nf4Table::make(args.w, shared_memory(), 32 * linear_warps);
  block_sync();

  float c[1][2][NT][4] = {};
  add_update<T>(c[0], args.update, m, n, part * linear_shares + share, args.splits * linear_shares, lane,
                [&](int i, int half) { return row + 2 * i + half; });
  if (blockIdx.x == 0) sum_update(args.update, m, 32 * linear_warps);
  const auto* x = static_cast<const T*>(args.in);
#pragma unroll 1
  for (int step = first; step < end; step += stride) {
    if (step + stride < end) next.load(args.w, n, k, row, step + stride + 32 * q);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      Eight<T> u[NT];
      load_rows<WIDE>(u, x, m, k, step + 32 * q + 8 * t, g);
      float v[4][8];
#pragma unroll
      for (int i = 0; i < 4; ++i) now.numbers(v[i], i, t, table);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float a[2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 8; ++e) a[i][e] = v[2 * i + e / 2 % 2][4 * s + e / 4 * 2 + e % 2];
        multiply<T>(c[0], a, u, s);
      }
    }
    now = next;
  }
  add_up(c, reinterpret_cast<float*>(shared_memory()), team, share, linear_shares, lane);
  if (share > 0) return;

  float bias[4] = {};
  if (args.parts == nullptr && args.bias != nullptr)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < n) bias[i] = load_as(args.bias, args.bias_type, row + i);
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int to = 8 * j + 2 * q + side;
      if (to >= m) continue;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = c[0][i / 2][j][i % 2 * 2 + side] + bias[i];
      if (args.parts != nullptr)
        store_some(args.parts, static_cast<int64_t>(part) * m + to, n, row, v);
      else
        store_some(static_cast<T*>(args.out), to, n, row, v);
    }
}

// -- dx = g w ---------------------------------------------------------------------------------------------------------

// A block is 64 WORDS columns of w, all of g and a chunk of rows of w, which its warps take 32 at a time. Lane q has 8
// of those, lanes of g 8 WORDS columns. Row g + 8 h of tile j is column 2 j + h of the eight of a word.
template <bool WIDE, class T, int NT, int WORDS>
__global__ void __launch_bounds__(32 * dgrad_warps) nf4_dgrad_kernel(Args args) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int part = blockIdx.x / args.blocks, m = args.p.m, n = args.p.n, k = args.p.k;
  const int column = (blockIdx.x % args.blocks * 8 + g) * 8 * WORDS;
  const int first = part * args.chunk + 32 * warp, stop = (part + 1) * args.chunk, end = stop < n ? stop : n;
  constexpr int stride = 32 * dgrad_warps;
  Nf4Piece<WIDE, 8, WORDS> now, next;
  now.load(args.w, first < end ? n : 0, k, first + 8 * q, column);
  const Nf4Table table = Nf4Table::make(args.w, shared_memory(), 32 * dgrad_warps);
  block_sync();

  float c[WORDS][4][NT][4] = {};
#pragma unroll
  for (int t = 0; t < WORDS; ++t)
    add_update<T>(c[t], args.update, m, k, part * dgrad_warps + warp, args.splits * dgrad_warps, lane,
                  [&](int j, int half) { return column + 8 * t + 2 * j + half; });
  if (blockIdx.x == 0) sum_update(args.update, m, 32 * dgrad_warps);
  const auto* from = static_cast<const T*>(args.in);
#pragma unroll 1
  for (int step = first; step < end; step += stride) {
    Eight<T> u[NT];
    load_rows<WIDE>(u, from, m, n, step + 8 * q, g);
    if (step + stride < end) next.load(args.w, n, k, step + stride + 8 * q, column);
#pragma unroll
    for (int t = 0; t < WORDS; ++t)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float v[4][8], a[4][8];
#pragma unroll
        for (int i = 0; i < 4; ++i) now.numbers(v[i], 4 * s + i, t, table);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 8; ++e) a[j][e] = v[e / 4 * 2 + e % 2][2 * j + e / 2 % 2];
        multiply<T>(c[t], a, u, s);
      }
    now = next;
  }
  add_up(c, reinterpret_cast<float*>(shared_memory()), 0, warp, dgrad_warps, lane);
  if (warp > 0) return;

#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int to = 8 * j + 2 * q + side;
      if (to >= m) continue;
#pragma unroll
      for (int t = 0; t < WORDS; ++t) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = c[t][i / 2][j][i % 2 * 2 + side];
        if (args.parts != nullptr)
          store_some(args.parts, static_cast<int64_t>(part) * m + to, k, column + 8 * t, v);
        else
          store_some(static_cast<T*>(args.out), to, k, column + 8 * t, v);
      }
    }
}

// out [size] = the sum of parts [splits, size] and of bias [columns], if there is one, in each row.
template <class T>
__global__ void __launch_bounds__(256) nf4_sum_kernel(const float* parts, int splits, int64_t size, Dtype bias_type,
                                                      const void* bias, int columns, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < splits; ++part) sum += parts[part * size + i];
  if (bias != nullptr) sum += load_as(bias, bias_type, static_cast<int>(i % columns));
  out[i] = narrow<T>(sum);
}

// -- launching --------------------------------------------------------------------------------------------------------

constexpr int shared_bytes = std::max(Nf4Table::bytes, 32 << 10);  // the sums of two warps with 128 for a lane

// call(NT, WIDE) with constants, NT being the tiles of 8 rows. fp32, and weights without vectors, have less choice, as
// nvcc takes long for each of these loops.
template <class T, class Call>
cudaError_t switch_rows(int m, bool wide, Call&& call) {
  const auto either = [&](auto tiles) { return wide ? call(tiles, std::true_type{}) : call(tiles, std::false_type{}); };
  if (m <= 8 && wide) return call(std::integral_constant<int, 1>{}, std::true_type{});
  if (m <= 16) return either(std::integral_constant<int, 2>{});
  if constexpr (sizeof(T) == 2) {
    if (m <= 32 && wide) return call(std::integral_constant<int, 4>{}, std::true_type{});
    if (m <= 64) return either(std::integral_constant<int, 8>{});
  }
  return cudaErrorInvalidValue;
}

constexpr int dgrad_words(int tiles, bool fp32) { return tiles <= 2 && !fp32 ? 2 : 1; }
int dgrad_columns(const Nf4Product& p) { return 64 * dgrad_words(ceil_div(p.m, 8), p.type == Dtype::f32); }

// The columns, or rows, of a part: a multiple of what a block takes in one turn.
int chunk_of(int size, int splits, int turn) { return ceil_div(ceil_div(size, splits), turn) * turn; }

int splits_of(int size, int blocks, int least, int turn) {
  const int wanted = std::clamp(std::min(blocks_wanted / std::max(blocks, 1), size / least), 1, 16);
  return std::max<int>(1, ceil_div(size, std::max(1, chunk_of(size, wanted, turn))));
}

template <class T>
cudaError_t launch_sum(const float* parts, int splits, int64_t size, Dtype bias_type, const void* bias, int columns,
                       void* out, cudaStream_t stream) {
  return launch(nf4_sum_kernel<T>, dim3(ceil_div(size, 256)), dim3(256), 0, stream, parts, splits, size, bias_type,
                bias, columns, static_cast<T*>(out));
}

}  // namespace

int nf4_few_rows(Dtype type) { return type == Dtype::f32 ? 16 : 64; }

int nf4_linear_splits(const Nf4Product& p) {
  return splits_of(p.k, ceil_div(p.n, linear_rows), 512, 128 * linear_shares);
}

cudaError_t nf4_linear_cuda(const Nf4Product& p, const void* x, const Nf4Cuda& w, Dtype bias_type, const void* bias,
                            const Nf4Update& update, void* y, float* parts, int splits, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const bool wide = p.k % 32 == 0 && aligned16(x, w.bytes);
  Args args = {nf4_args(w), p, x, bias, bias_type, y, splits > 1 ? parts : nullptr};
  args.blocks = ceil_div(p.n, linear_rows), args.splits = splits, args.update = update;
  args.chunk = chunk_of(p.k, splits, 128 * linear_shares);
  return switch_dtype(p.type, [&](auto t) {
    using T = decltype(t);
    const cudaError_t done = switch_rows<T>(p.m, wide, [&](auto tiles, auto vectors) {
      const auto kernel = nf4_linear_kernel<decltype(vectors)::value, T, decltype(tiles)::value>;
      return launch(kernel, dim3(args.blocks * splits), dim3(32 * linear_warps), shared_bytes, stream, args);
    });
    if (done != cudaSuccess || splits == 1) return done;
    return launch_sum<T>(parts, splits, static_cast<int64_t>(p.m) * p.n, bias_type, bias, p.n, y, stream);
  });
}

int nf4_dgrad_splits(const Nf4Product& p) {
  return splits_of(p.n, ceil_div(p.k, dgrad_columns(p)), 128, 32 * dgrad_warps);
}

cudaError_t nf4_dgrad_cuda(const Nf4Product& p, const void* g, const Nf4Cuda& w, const Nf4Update& update, void* dx,
                           float* parts, int splits, cudaStream_t stream) {
  if (p.m == 0 || p.k == 0) return cudaSuccess;
  const bool wide = p.k % 32 == 0 && p.n % 8 == 0 && aligned16(g, w.bytes);
  Args args = {nf4_args(w), p, g, nullptr, p.type, dx, splits > 1 ? parts : nullptr};
  args.blocks = ceil_div(p.k, dgrad_columns(p)), args.splits = splits, args.update = update;
  args.chunk = chunk_of(p.n, splits, 32 * dgrad_warps);
  return switch_dtype(p.type, [&](auto t) {
    using T = decltype(t);
    const cudaError_t done = switch_rows<T>(p.m, wide, [&](auto tiles, auto vectors) {
      constexpr int words = dgrad_words(decltype(tiles)::value, sizeof(T) == 4);
      const auto kernel = nf4_dgrad_kernel<decltype(vectors)::value, T, decltype(tiles)::value, words>;
      return launch(kernel, dim3(args.blocks * splits), dim3(32 * dgrad_warps), shared_bytes, stream, args);
    });
    if (done != cudaSuccess || splits == 1) return done;
    return launch_sum<T>(parts, splits, static_cast<int64_t>(p.m) * p.k, p.type, nullptr, p.k, dx, stream);
  });
}

}  // namespace pk
