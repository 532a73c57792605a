// SDDMM and the optimizer step of sparse training on CUDA. README.md has the formulas.
#include <algorithm>
#include <climits>
#include <cmath>
#include <type_traits>

#include "common/device.cuh"
#include "sparse/sparse.cuh"

namespace pk {
namespace {

// -- tiles of dy^T x --------------------------------------------------------------------------------------------------

constexpr int tile_rows = 256, tile_columns = 128;  // of a block
constexpr int threads = 256;                        // in eight warps
constexpr int stages = 4;                           // of tokens in shared memory
constexpr int stage_bytes = 24576, dy_bytes = 16384;
constexpr int pitch = 136;          // of a row of sums in shared memory, against bank conflicts
constexpr int blocks_wanted = 132;  // one for each SM of an H100

constexpr int shared_bytes = stages * stage_bytes + threads / 32 * sizeof(float);

template <class T>
constexpr int depth = 64 / sizeof(T);  // tokens of a stage

// Where a chunk of 16 bytes of a stage is, of tokens with WIDTH numbers. Equal chunks of eight tokens in a row, which a
// warp reads together, are in all banks.
template <int WIDTH, class T>
__device__ inline int chunk_at(int token, int chunk) {
  return (token * (WIDTH / lanes_of<T>)+(chunk ^ (token & 7))) * 16;
}

// The columns first .. first + WIDTH - 1 of the tokens from `token` on; zeros beyond `end` and the last column. WIDE:
// columns is a multiple of the chunk and `from` aligned.
template <bool WIDE, int WIDTH, class T>
__device__ inline void load_part(char* to, const T* from, int columns, int first, int64_t token, int64_t end) {
  constexpr int lanes = lanes_of<T>, chunks = WIDTH / lanes;
#pragma unroll
  for (int i = 0; i < depth<T> * chunks / threads; ++i) {
    const int at = i * threads + static_cast<int>(threadIdx.x), k = at / chunks, chunk = at % chunks;
    const int left = token + k < end ? columns - first - chunk * lanes : 0;
    const T* source = left > 0 ? from + (token + k) * columns + first + chunk * lanes : from;
    char* shared = to + chunk_at<WIDTH, T>(k, chunk);
    if constexpr (WIDE) {
      async_copy(shared, source, left > 0);
    } else {
      Pack<T, lanes> pack;
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane) pack.lane[lane] = lane < left ? source[lane] : T{};
      *reinterpret_cast<Pack<T, lanes>*>(shared) = pack;
    }
  }
}

// The sums of a tile in the registers of a block. T of 16 bits: a warp has 64 x 64, on the tensor cores.
template <class T>
struct Sums {
  float c[4][8][4] = {};

  __device__ void add(const char* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8, row = lane % 8;
    const int left = warp / 2 * 8, right = warp % 2 * 8;
#pragma unroll
    for (int k = 0; k < depth<T>; k += 16) {
      uint32_t a[4][4], b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_transposed(a[i], stage + chunk_at<tile_rows, T>(k + matrix / 2 * 8 + row, left + 2 * i + matrix % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        load_transposed(
            b[j], stage + dy_bytes + chunk_at<tile_columns, T>(k + matrix % 2 * 8 + row, right + 2 * j + matrix / 2));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          if constexpr (std::is_same_v<T, bf16>)
            mma_bf16(c[i][j], a[i], pair);
          else
            mma_f16(c[i][j], a[i], pair);
        }
    }
  }

  // Rows 128 half .. of the tile into shared memory [128, pitch].
  __device__ void put(float* shared, int half) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp / 4 != half) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int row = warp / 2 % 2 * 64 + 16 * i + 4 * e + lane / 4, column = warp % 2 * 64 + 8 * j + lane % 4 * 2;
          store<2>(shared + row * pitch + column, {c[i][j][e], c[i][j][e + 1]});
        }
  }
};

// fp32: a thread has 4 rows of each half and four times 4 columns, by FMA.
template <>
struct Sums<float> {
  float c[8][16] = {};

  __device__ void add(const char* stage) {
    const int down = threadIdx.x / 8, across = threadIdx.x % 8;
#pragma unroll 4
    for (int k = 0; k < depth<float>; ++k) {
      Pack<float, 4> a[2], b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[i] = load_pack<4>(reinterpret_cast<const float*>(stage + chunk_at<tile_rows, float>(k, down + 32 * i)));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        b[j] = load_pack<4>(
            reinterpret_cast<const float*>(stage + dy_bytes + chunk_at<tile_columns, float>(k, across + 8 * j)));
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 16; ++j) c[i][j] += a[i / 4].lane[i % 4] * b[j / 4].lane[j % 4];
    }
  }

  __device__ void put(float* shared, int half) const {
    const int down = threadIdx.x / 8, across = threadIdx.x % 8;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (h == half)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 16; j += 4) {
            const float (&row)[16] = c[4 * h + i];
            store<4>(shared + (4 * down + i) * pitch + 4 * across + 8 * j,
                     {row[j], row[j + 1], row[j + 2], row[j + 3]});
          }
  }
};

// -- sddmm ------------------------------------------------------------------------------------------------------------

template <class I>
struct SddmmArgs {
  const void *dy, *x;
  int64_t tokens, share;  // share: of a part
  int m, n, nnz;
  const I *crow, *col;
  float* out;  // [splits, nnz]
  int column_tiles, splits;
};

// The first of the entries begin .. end - 1 of a row whose column is not below `column`, or end.
template <class I>
__device__ inline int first_from(const I* col, int begin, int end, int column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (col[middle] < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

struct Range {
  int begin, end;
};

// Nobody has looked through the mask, and what is none must not lead out of the arrays.
__device__ inline int within(int64_t entry, int nnz) {
  return static_cast<int>(entry < 0 ? 0 : entry > nnz ? nnz : entry);
}

// A block is a tile of the weight and a part of the tokens. It has nothing to do where the mask has no entry.
template <bool WIDE, class T, class I>
__global__ void __launch_bounds__(threads, 1) sddmm_kernel(SddmmArgs<I> args) {
  char* shared = shared_memory();
  const int part = blockIdx.x % args.splits, index = blockIdx.x / args.splits;
  const int first_row = index / args.column_tiles * tile_rows, first_column = index % args.column_tiles * tile_columns;
  const int64_t first = part * args.share, last = first + args.share < args.tokens ? first + args.share : args.tokens;
  const int steps = first < last ? static_cast<int>((last - first + depth<T> - 1) / depth<T>) : 0;
  const auto load = [&](int step) {
    char* to = shared + step % stages * stage_bytes;
    const int64_t token = first + static_cast<int64_t>(step) * depth<T>;
    load_part<WIDE, tile_rows>(to, static_cast<const T*>(args.dy), args.m, first_row, token, last);
    load_part<WIDE, tile_columns>(to + dy_bytes, static_cast<const T*>(args.x), args.n, first_column, token, last);
  };
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) load(step);
    async_commit();
  }

  // Meanwhile, the entries of this thread's row in the tile: columns ascend, so that they follow one another.
  Range mine = {0, 0};
  const int row = first_row + static_cast<int>(threadIdx.x);
  if (row < args.m) {
    const int end = within(args.crow[row + 1], args.nnz);
    mine.begin = first_from(args.col, within(args.crow[row], args.nnz), end, first_column);
    const int most = end - mine.begin > tile_columns ? mine.begin + tile_columns : end;
    mine.end = first_from(args.col, mine.begin, most, first_column + tile_columns);
  }
  auto* in_warps = reinterpret_cast<float*>(shared + stages * stage_bytes);
  in_warps[threadIdx.x / 32] = warp_max(static_cast<float>(mine.end - mine.begin));
  block_sync();
  float longest = 0;
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) longest = fmaxf(longest, in_warps[warp]);
  if (longest <= 0) {
    async_wait<0>();
    return;
  }

  Sums<T> sums;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    async_wait<stages - 2>();
    block_sync();
    if (step + stages - 1 < steps) load(step + stages - 1);
    async_commit();
    sums.add(shared + step % stages * stage_bytes);
  }
  async_wait<0>();
  block_sync();

  // Half of the rows at a time: of few entries four lanes have a row, of many a warp.
  auto* rows = reinterpret_cast<float*>(shared);
  auto* ranges = reinterpret_cast<Range*>(shared + tile_rows / 2 * pitch * sizeof(float));
  ranges[threadIdx.x] = mine;
  const int group = longest > 32 ? 32 : 4, lane = static_cast<int>(threadIdx.x) % group;
  float* out = args.out + static_cast<int64_t>(part) * args.nnz;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    sums.put(rows, half);
    block_sync();
    for (int i = static_cast<int>(threadIdx.x) / group; i < tile_rows / 2; i += threads / group) {
      const Range range = ranges[half * tile_rows / 2 + i];
      for (int entry = range.begin + lane; entry < range.end; entry += group) {
        const int64_t column = args.col[entry] - static_cast<int64_t>(first_column);
        if (column >= 0 && column < tile_columns) out[entry] = rows[i * pitch + static_cast<int>(column)];
      }
    }
    block_sync();
  }
}

__global__ void __launch_bounds__(256) sddmm_sum_kernel(const float* parts, int splits, int nnz, float* vals) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= nnz) return;
  float sum = 0;
  for (int part = 0; part < splits; ++part) sum += parts[static_cast<int64_t>(part) * nnz + i];
  vals[i] = sum;
}

// -- optimizer --------------------------------------------------------------------------------------------------------

constexpr int step_threads = 256;

struct AdamwArgs {
  int64_t nnz;
  const float *vals, *m, *v;
  float *vals_out, *m_out, *v_out;
  Dtype grad_type, w_type;
  const void *grad, *w, *idx;
  bool wide_indices;
  const float* step;            // or null, and then the corrections are given
  double log_beta1, log_beta2;  // of the corrections 1 - beta^step
  double lr, correction1, correction2;
  float beta1, rest1, beta2, rest2, eps, decay;  // rest: 1 - beta, decay: lr * weight_decay
};

__device__ inline float number(const void* data, Dtype type, int64_t i) {
  if (type == Dtype::bf16) return widen(static_cast<const bf16*>(data)[i]);
  if (type == Dtype::f16) return widen(static_cast<const f16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

// Four values for a thread; WIDE: all arrays of fp32 are aligned to 16 bytes.
template <bool WIDE>
__global__ void __launch_bounds__(step_threads) sparse_adamw_kernel(AdamwArgs args) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) {
    double correction1 = args.correction1, correction2 = args.correction2;
    if (args.step != nullptr) {
      const double step = *args.step;
      correction1 = -expm1(step * args.log_beta1), correction2 = -expm1(step * args.log_beta2);
    }
    shared[0] = static_cast<float>(args.lr / correction1);
    shared[1] = static_cast<float>(correction2);
  }
  block_sync();
  const float size = shared[0], correction = shared[1];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * step_threads + threadIdx.x) * 4;
  const int left = args.nnz - first < 4 ? static_cast<int>(args.nnz - first) : 4;
  if (left <= 0) return;
  const bool whole = WIDE && left == 4;

  float p[4] = {}, mean[4] = {}, square[4] = {};
  if (whole) {
    load<4>(args.vals + first, p), load<4>(args.m + first, mean), load<4>(args.v + first, square);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) p[i] = args.vals[first + i], mean[i] = args.m[first + i], square[i] = args.v[first + i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= left) continue;
    const int64_t at = first + i;
    const float g = number(args.grad, args.grad_type, at);
    float decayed = p[i];
    if (args.w != nullptr) {
      int64_t place = at;
      if (args.idx != nullptr)
        place =
            args.wide_indices ? static_cast<const int64_t*>(args.idx)[at] : static_cast<const int32_t*>(args.idx)[at];
      decayed += number(args.w, args.w_type, place);
    }
    mean[i] = args.beta1 * mean[i] + args.rest1 * g;
    square[i] = args.beta2 * square[i] + args.rest2 * g * g;
    const float update = mean[i] / (sqrtf(square[i] / correction) + args.eps) * size;
    p[i] = p[i] - args.decay * decayed - update;
  }
  if (whole) {
    store<4>(args.vals_out + first, p), store<4>(args.m_out + first, mean), store<4>(args.v_out + first, square);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < left) args.vals_out[first + i] = p[i], args.m_out[first + i] = mean[i], args.v_out[first + i] = square[i];
}

// -- launching --------------------------------------------------------------------------------------------------------

template <class I>
cudaError_t sddmm_of(const SddmmCuda& s, float* out, int splits, cudaStream_t stream) {
  const int64_t column_tiles = ceil_div(s.n, tile_columns), blocks = ceil_div(s.m, tile_rows) * column_tiles * splits;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  return switch_dtype(s.type, [&](auto t) {
    using T = decltype(t);
    SddmmArgs<I> args = {};
    args.dy = s.dy, args.x = s.x, args.tokens = s.tokens;
    args.share = ceil_div(ceil_div(s.tokens, splits), depth<T>) * depth<T>;
    args.m = static_cast<int>(s.m), args.n = static_cast<int>(s.n), args.nnz = static_cast<int>(s.nnz);
    args.crow = static_cast<const I*>(s.crow), args.col = static_cast<const I*>(s.col), args.out = out;
    args.column_tiles = static_cast<int>(column_tiles), args.splits = splits;
    const bool wide = s.m % lanes_of<T> == 0 && s.n % lanes_of<T> == 0 &&
                      aligned16(static_cast<const T*>(s.dy), static_cast<const T*>(s.x));
    const auto kernel = wide ? sddmm_kernel<true, T, I> : sddmm_kernel<false, T, I>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream, args);
  });
}

}  // namespace

int sddmm_splits(const SddmmCuda& s) {
  const int64_t tiles = std::max<int64_t>(ceil_div(s.m, tile_rows) * ceil_div(s.n, tile_columns), 1);
  return static_cast<int>(std::clamp<int64_t>(std::min(blocks_wanted / tiles, s.tokens / 256), 1, blocks_wanted));
}

cudaError_t sddmm_cuda(const SddmmCuda& s, float* vals, float* parts, int splits, cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  float* out = splits > 1 ? parts : vals;
  const auto done =
      s.wide_indices ? sddmm_of<int64_t>(s, out, splits, stream) : sddmm_of<int32_t>(s, out, splits, stream);
  if (done != cudaSuccess || splits == 1) return done;
  return launch(sddmm_sum_kernel, dim3(static_cast<unsigned>(ceil_div(s.nnz, 256))), dim3(256), 0, stream, parts,
                splits, static_cast<int>(s.nnz), vals);
}

cudaError_t sparse_adamw_cuda(const SparseAdamwCuda& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.nnz, 4 * step_threads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  AdamwArgs args = {};
  args.nnz = a.nnz, args.vals = a.vals, args.m = a.m, args.v = a.v;
  args.vals_out = a.vals_out, args.m_out = a.m_out, args.v_out = a.v_out;
  args.grad_type = a.grad_type, args.grad = a.grad, args.w_type = a.w_type, args.w = a.w;
  args.wide_indices = a.wide_indices, args.idx = a.idx, args.step = a.step;
  args.log_beta1 = std::log(a.beta1), args.log_beta2 = std::log(a.beta2), args.lr = a.lr;
  args.correction1 = -std::expm1(a.step_number * args.log_beta1);
  args.correction2 = -std::expm1(a.step_number * args.log_beta2);
  args.beta1 = static_cast<float>(a.beta1), args.rest1 = static_cast<float>(1 - a.beta1);
  args.beta2 = static_cast<float>(a.beta2), args.rest2 = static_cast<float>(1 - a.beta2);
  args.eps = static_cast<float>(a.eps), args.decay = static_cast<float>(a.lr * a.weight_decay);
  const bool wide = aligned16(a.vals, a.m, a.v) && aligned16(a.vals_out, a.m_out, a.v_out);
  const auto kernel = wide ? sparse_adamw_kernel<true> : sparse_adamw_kernel<false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(step_threads), 2 * sizeof(float), stream, args);
}

}  // namespace pk
