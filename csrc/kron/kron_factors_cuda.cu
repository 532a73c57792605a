// The gradients of the factors of a Kronecker product, in the fragments of mma m16n8k16 (common/device.cuh).
//
// A team of warps takes row after row of x and g, which come through shared memory. Of da = Z G^T, Z = X b, a warp has
// 16 rows: the sums of Z are already its left operand of the second product. Of db = X^T V, V = a G, it has 16 columns:
// the sums of V^T are already its right operand. Both are sums over rows of X and of G, so these are read transposed,
// while da reads rows as they lie. Each team ends with its part of da and db; parts are added in order.
#include <algorithm>
#include <climits>

#include "kron/kron_tile.cuh"

namespace pk {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int stages = 3;               // of x and g on their way
constexpr int pitch = 128;              // bytes of a row of X or G in shared memory
constexpr int fragment_bytes = 256;     // of a right operand
constexpr int64_t blocks_wanted = 264;  // two for each SM of an H100

struct FactorsArgs {
  KronFactorsCuda k;
  int team_warps, blocks;
  float* parts;
};

__host__ __device__ inline int sixteens(int n) { return (n + 15) / 16; }

// Where chunk `chunk` of 16 bytes of a row is: eight rows of one chunk, and two rows of four, are in all banks.
__device__ inline int chunk_at(int row, int chunk) {
  return row * pitch + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) * 16;
}

// A matrix [rows, columns] into shared memory by the threads of a team, zeros up to multiples of 16 rows and of 32
// columns, and for all of it unless it is `real`.
template <bool WIDE, class T>
__device__ inline void load_matrix(char* to, const T* from, int rows, int columns, bool real, int thread, int count) {
  const int chunks = (columns + 31) / 32 * 4, items = sixteens(rows) * 16 * chunks;
  for (int item = thread; item < items; item += count) {
    const int row = item / chunks, chunk = item % chunks;
    const int left = real && row < rows ? columns - 8 * chunk : 0;
    const T* source = left > 0 ? from + row * columns + 8 * chunk : from;
    char* shared = to + chunk_at(row, chunk);
    if constexpr (WIDE) {
      async_copy(shared, source, left > 0);
    } else {
      const Eight<T> v = load_eight<false>(source, 1, left, false);
      *reinterpret_cast<Pack<uint32_t, 4>*>(shared) = {{v.w[0], v.w[1], v.w[2], v.w[3]}};
    }
  }
}

// `count` right operands into shared memory, by all threads; at(tile, k, column) is an element of theirs.
template <class O, class At>
__device__ inline void put_operands(char* to, int count, At&& at) {
  for (int item = static_cast<int>(threadIdx.x); item < 32 * count; item += threads) {
    const int tile = item / 32, column = item % 32 / 4, q = item % 4;
    uint32_t parts[O::parts][2];
#pragma unroll
    for (int e = 0; e < 2; ++e) O::put(parts, e, at(tile, 2 * q + 8 * e, column), at(tile, 2 * q + 8 * e + 1, column));
#pragma unroll
    for (int part = 0; part < O::parts; ++part)
      *reinterpret_cast<Pack<uint32_t, 2>*>(to + (tile * O::parts + part) * fragment_bytes +
                                            item % 32 * 8) = {{parts[part][0], parts[part][1]}};
  }
}

template <class O>
__device__ inline void get_operand(uint32_t (&b)[O::parts][2], const char* from, int tile, int lane) {
#pragma unroll
  for (int part = 0; part < O::parts; ++part) {
    const auto pack =
        load_pack<2>(reinterpret_cast<const uint32_t*>(from + (tile * O::parts + part) * fragment_bytes + lane * 8));
    b[part][0] = pack.lane[0], b[part][1] = pack.lane[1];
  }
}

// Rows 16 k .. of a matrix in shared memory as the k of a left operand whose rows are columns 16 i .. of it.
template <class O>
__device__ inline void get_transposed(uint32_t (&a)[O::x_parts][4], const char* from, int k, int i, int lane) {
  uint32_t words[4];
  load_transposed(words, from + chunk_at(16 * k + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
#pragma unroll
  for (int e = 0; e < 4; ++e) O::put(a, e, words[e]);
}

// Eight elements of a row: those of lane q in 32 columns.
template <class T>
__device__ inline Eight<T> get_row(const char* from, int row, int chunk) {
  return load_eight<true>(reinterpret_cast<const T*>(from + chunk_at(row, chunk)), 1, 8, true);
}

template <bool WIDE, class T, class F>
__global__ void __launch_bounds__(threads) kron_factors_kernel(FactorsArgs args) {
  using O = Operands<T, F, 3>;
  const KronFactorsCuda& k = args.k;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int team_threads = 32 * args.team_warps, teams = threads / team_threads;
  const int team = threadIdx.x / team_threads, thread = threadIdx.x % team_threads, slice = thread / 32;
  const int high = sixteens(k.p), wide = (k.s + 31) / 32, deep = (k.r + 31) / 32;
  const int x_bytes = high * 16 * pitch, own_bytes = x_bytes + sixteens(k.q) * 16 * pitch;
  char* const of_a = shared_memory();                                              // a^T: by 16 of q, then by 8 of p
  char* const of_b = of_a + sixteens(k.q) * 2 * high * O::parts * fragment_bytes;  // by 16 of r, by 8 columns
  char* const rows = of_b + 8 * deep * wide * O::parts * fragment_bytes + team * own_bytes;

  const int64_t stride = static_cast<int64_t>(args.blocks) * teams, first = static_cast<int64_t>(blockIdx.x) * teams;
  const int64_t steps = (k.m - first + stride - 1) / stride;
  const auto load = [&](int64_t step) {
    const int64_t m = first + step * stride + team;
    char* to = rows + step % stages * teams * own_bytes;
    const bool real = m < k.m;
    const T *x = static_cast<const T*>(k.x), *y = static_cast<const T*>(k.g);
    load_matrix<WIDE>(to, real ? x + m * k.p * k.r : x, k.p, k.r, real, thread, team_threads);
    load_matrix<WIDE>(to + x_bytes, real ? y + m * k.q * k.s : y, k.q, k.s, real, thread, team_threads);
  };
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) load(step);
    async_commit();
  }
  put_operands<O>(of_a, sixteens(k.q) * 2 * high, [&](int i, int at, int column) {
    return element<F>(k.a, k.p, k.q, i % (2 * high) * 8 + column, i / (2 * high) * 16 + at);
  });
  put_operands<O>(of_b, 8 * deep * wide, [&](int i, int at, int column) {
    const int step = i / (4 * wide);
    return element<F>(k.b, k.r, k.s, step / 2 * 32 + depth_of(step % 2, at), column_of(i % (4 * wide), column));
  });

  float da[8][4] = {}, db[4][2][4] = {};
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    async_wait<stages - 2>();
    block_sync();
    if (step + stages - 1 < steps) load(step + stages - 1);
    async_commit();
    const char *x = rows + step % stages * teams * own_bytes, *y = x + x_bytes;

    if (k.da != nullptr && 16 * slice < k.p) {
      float z[8][4] = {};
#pragma unroll
      for (int depth = 0; depth < 2; ++depth) {
        if (depth >= deep) continue;
        const Eight<T> upper = get_row<T>(x, 16 * slice + g, 4 * depth + q);
        const Eight<T> lower = get_row<T>(x, 16 * slice + 8 + g, 4 * depth + q);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          uint32_t left[O::x_parts][4];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            O::put(left, 2 * e, upper.w[2 * t + e]);
            O::put(left, 2 * e + 1, lower.w[2 * t + e]);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (j >= 4 * wide) continue;
            uint32_t right[O::parts][2];
            get_operand<O>(right, of_b, (2 * depth + t) * 4 * wide + j, lane);
            O::add(z[j], left, right);
          }
        }
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side >= wide) continue;
        uint32_t left[2][O::parts][4];
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float (&sums)[4] = z[4 * side + 2 * t + e / 2];
            O::put(left[t], e, sums[e % 2 * 2], sums[e % 2 * 2 + 1]);
          }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (8 * j >= k.q) continue;
          const Eight<T> row = get_row<T>(y, 8 * j + g, 4 * side + q);
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            uint32_t right[O::x_parts][2];
            O::put(right, 0, row.w[2 * t]);
            O::put(right, 1, row.w[2 * t + 1]);
            O::add(da[j], left[t], right);
          }
        }
      }
    }

    if (k.db != nullptr && 16 * slice < k.s) {
      float v[8][4] = {};
#pragma unroll
      for (int depth = 0; depth < 4; ++depth) {
        if (16 * depth >= k.q) continue;
        uint32_t left[O::x_parts][4];
        get_transposed<O>(left, y, depth, slice, lane);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (8 * j >= k.p) continue;
          uint32_t right[O::parts][2];
          get_operand<O>(right, of_a, depth * 2 * high + j, lane);
          O::add(v[j], left, right);
        }
      }
#pragma unroll
      for (int depth = 0; depth < 4; ++depth) {
        if (depth >= high) continue;
        uint32_t right[2][O::parts][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            O::put(right[half], e, v[2 * depth + e][2 * half], v[2 * depth + e][2 * half + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (16 * i >= k.r) continue;
          uint32_t left[O::x_parts][4];
          get_transposed<O>(left, x, depth, i, lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) O::add(db[i][half], left, right[half]);
        }
      }
    }
  }
  async_wait<0>();

  float* part = args.parts + (first + team) * (k.p * k.q + k.r * k.s);
  if (k.da != nullptr)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * slice + e / 2 * 8 + g, column = 8 * j + 2 * q + e % 2;
        if (row < k.p && column < k.q) part[row * k.q + column] = da[j][e];
      }
  if (k.db != nullptr)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * i + e / 2 * 8 + g, column = 16 * slice + 8 * half + 2 * q + e % 2;
          if (row < k.r && column < k.s) part[k.p * k.q + row * k.s + column] = db[i][half][e];
        }
}

// out [size] = scale * the sum of parts [count, stride], 32 elements a block and every eighth part a warp, in order.
template <class F>
__global__ void __launch_bounds__(256)
    kron_sum_kernel(const float* parts, int64_t count, int64_t stride, int size, float scale, F* out) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane;
  float sum = 0;
  if (i < size)
    for (int64_t part = warp; part < count; part += 8) sum += parts[part * stride + i];
  sums[threadIdx.x] = sum;
  block_sync();
  if (warp > 0 || i >= size) return;
  for (int other = 1; other < 8; ++other) sum += sums[32 * other + lane];
  out[i] = narrow<F>(scale * sum);
}

// -- launching --------------------------------------------------------------------------------------------------------

// Warps that share a row: 1, 2 or 4.
int team_warps(const KronFactorsCuda& k) {
  const int slices = sixteens(std::max({k.p, k.q, k.s}));
  return slices > 2 ? 4 : slices;
}

int64_t block_count(const KronFactorsCuda& k) {
  return std::clamp<int64_t>(ceil_div(k.m, 4 * warps / team_warps(k)), 1, blocks_wanted);
}

template <class T, class F>
cudaError_t factors_of(const KronFactorsCuda& k, float* parts, cudaStream_t stream) {
  FactorsArgs args = {};
  args.k = k, args.parts = parts;
  args.team_warps = team_warps(k);
  args.blocks = static_cast<int>(block_count(k));
  const int operands = sixteens(k.q) * 2 * sixteens(k.p) + static_cast<int>(8 * ceil_div(k.r, 32) * ceil_div(k.s, 32));
  const int row_bytes = (sixteens(k.p) + sixteens(k.q)) * 16 * pitch;
  const size_t shared =
      operands * Operands<T, F, 3>::parts * fragment_bytes + stages * (warps / args.team_warps) * row_bytes;
  const bool wide = k.r % 8 == 0 && k.s % 8 == 0 && aligned16(static_cast<const T*>(k.x), static_cast<const T*>(k.g));
  const auto kernel = wide ? kron_factors_kernel<true, T, F> : kron_factors_kernel<false, T, F>;
  const auto done = launch(kernel, dim3(args.blocks), dim3(threads), shared, stream, args);
  if (done != cudaSuccess) return done;
  const int sizes[2] = {k.p * k.q, k.r * k.s};
  void* const outs[2] = {k.da, k.db};
  for (int i = 0; i < 2; ++i) {
    if (outs[i] == nullptr) continue;
    const auto summed = launch(kron_sum_kernel<F>, dim3(static_cast<unsigned>(ceil_div(sizes[i], 32))), dim3(256),
                               256 * sizeof(float), stream, parts + i * sizes[0], kron_parts(k),
                               static_cast<int64_t>(sizes[0] + sizes[1]), sizes[i], k.scale, static_cast<F*>(outs[i]));
    if (summed != cudaSuccess) return summed;
  }
  return cudaSuccess;
}

}  // namespace

int64_t kron_parts(const KronFactorsCuda& k) { return block_count(k) * (warps / team_warps(k)); }

cudaError_t kron_factors_cuda(const KronFactorsCuda& k, float* parts, cudaStream_t stream) {
  if (std::max({k.p, k.q, k.r, k.s}) > kron_factors_most || k.a.type != k.b.type) return cudaErrorInvalidValue;
  if (k.type == Dtype::f32 || (k.a.type != k.type && k.a.type != Dtype::f32)) return cudaErrorInvalidValue;
  const auto with = [&](auto t) {
    using T = decltype(t);
    return k.a.type == k.type ? factors_of<T, T>(k, parts, stream) : factors_of<T, float>(k, parts, stream);
  };
  return k.type == Dtype::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace pk
