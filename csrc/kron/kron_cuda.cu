// Products with a Kronecker product in one pass, in the fragments of mma m16n8k16 (common/device.cuh).
//
// Of Y = a^T X b, a warp has a tile for one row of x after the other. It multiplies Z^T = b^T X^T for 16 rows of X at a
// time: the sums of a lane, two neighbours along p in a register, are already its part of the right operand of a^T Z.
// So Z never leaves registers. The orders of the sums and of y's columns are chosen such that a lane reads and writes
// 16 consecutive bytes of x and y; x comes through shared memory, where only the lane that asked for it reads it, so
// that many loads are on their way without registers. Factors lie in shared memory as operands. Lane 4 g + q as in
// device.cuh.
#include <algorithm>
#include <climits>

#include "kron/kron_tile.cuh"

namespace pk {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int stages = 4;          // of x on their way
constexpr int stage_bytes = 2048;  // 16 rows of X, 64 columns
constexpr int fragment_bytes = 512;

struct LinearArgs {
  KronLinearCuda k;
  int s_tiles, tiles, blocks;  // of y, and blocks that share the rows of x for each
};

// `count` left operands into shared memory, by all threads; at(tile, row, k) is an element of theirs.
template <class O, class At>
__device__ inline void put_operands(char* to, int count, At&& at) {
  for (int item = static_cast<int>(threadIdx.x); item < 32 * count; item += threads) {
    const int tile = item / 32, g = item % 32 / 4, q = item % 4;
    Pack<uint32_t, 4> packs[O::parts];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = g + e % 2 * 8, k = 2 * q + e / 2 * 8;
      uint32_t parts[O::parts][1];
      O::put(parts, 0, at(tile, row, k), at(tile, row, k + 1));
#pragma unroll
      for (int part = 0; part < O::parts; ++part) packs[part].lane[e] = parts[part][0];
    }
#pragma unroll
    for (int part = 0; part < O::parts; ++part)
      *reinterpret_cast<Pack<uint32_t, 4>*>(to + (tile * O::parts + part) * fragment_bytes + item % 32 * 16) =
          packs[part];
  }
}

template <class O>
__device__ inline void get_operand(uint32_t (&a)[O::parts][4], const char* from, int tile, int lane) {
#pragma unroll
  for (int part = 0; part < O::parts; ++part) {
    const auto pack =
        load_pack<4>(reinterpret_cast<const uint32_t*>(from + (tile * O::parts + part) * fragment_bytes + lane * 16));
#pragma unroll
    for (int e = 0; e < 4; ++e) a[part][e] = pack.lane[e];
  }
}

// A tile is 16 QT rows of Y and 32 NS columns. WIDE: r and s are multiples of 8, x, y and acc aligned to 16 bytes.
template <bool WIDE, class T, class F, int QT, int NS>
__global__ void __launch_bounds__(threads) kron_linear_kernel(LinearArgs args) {
  using O = Operands<T, F, 2>;
  const KronLinearCuda& k = args.k;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int tile = blockIdx.x % args.tiles, block = blockIdx.x / args.tiles;
  const int first_row = tile / args.s_tiles * 16 * QT, first_column = tile % args.s_tiles * 32 * NS;
  const int chunks = (k.r + 31) / 32, turns = (k.r + 63) / 64, heights = (k.p + 15) / 16;
  char* const of_b = shared_memory();  // by 16 of r, then by 16 columns of the tile
  char* const of_a = of_b + chunks * 4 * NS * O::parts * fragment_bytes;
  char* const mine = of_a + heights * QT * O::parts * fragment_bytes + warp * stages * stage_bytes + lane * 16;

  // The warp's steps: rows of x, of each its 16 rows of X, of those 64 columns.
  const int64_t start = static_cast<int64_t>(block) * warps + warp, stride = static_cast<int64_t>(args.blocks) * warps;
  const int64_t steps = start < k.m ? ((k.m - 1 - start) / stride + 1) * heights * turns : 0;
  int64_t loaded = 0, load_m = start;
  int load_height = 0, load_turn = 0;
  const auto load = [&] {
    if (loaded < steps) {
      char* to = mine + loaded % stages * stage_bytes;
      const T* x = static_cast<const T*>(k.x);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          const int row = 16 * load_height + 8 * half + g, column = 64 * load_turn + 32 * chunk + 8 * q;
          const int left = row < k.p ? k.r - column : 0;
          const T* from = left > 0 ? x + (load_m * k.p + row) * k.r + column : x;
          char* slot = to + (2 * half + chunk) * 512;
          if constexpr (WIDE) {
            async_copy(slot, from, left > 0);
          } else {
            const Eight<T> v = load_eight<false>(from, 1, left, false);
            *reinterpret_cast<Pack<uint32_t, 4>*>(slot) = {{v.w[0], v.w[1], v.w[2], v.w[3]}};
          }
        }
      if (++load_turn == turns) {
        load_turn = 0;
        if (++load_height == heights) load_height = 0, load_m += stride;
      }
    }
    ++loaded;
    async_commit();
  };
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) load();

  put_operands<O>(of_b, chunks * 4 * NS, [&](int i, int row, int at) {
    const int depth = i / (4 * NS) * 32 + depth_of(i / (2 * NS) % 2, at);
    const int column = first_column + column_of(i % (2 * NS) * 2 + row / 8, row % 8);
    return element<F>(k.b, k.r, k.s, depth, column);
  });
  put_operands<O>(of_a, heights * QT, [&](int i, int row, int at) {
    return element<F>(k.a, k.p, k.q, i / QT * 16 + at, first_row + i % QT * 16 + row);
  });
  block_sync();

  float y[QT][4 * NS][4] = {}, z[2 * NS][2][4] = {};
  int64_t m = start;
  int height = 0, turn = 0;
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    async_wait<stages - 2>();
    load();
    const char* stage = mine + step % stages * stage_bytes;
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      if (2 * turn + chunk >= chunks) continue;
      Eight<T> x[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x[half] = load_eight<true>(reinterpret_cast<const T*>(stage + (2 * half + chunk) * 512), 1, 8, true);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        uint32_t right[2][O::x_parts][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) O::put(right[half], e, x[half].w[2 * t + e]);
#pragma unroll
        for (int i = 0; i < 2 * NS; ++i) {
          uint32_t left[O::parts][4];
          get_operand<O>(left, of_b, ((2 * turn + chunk) * 2 + t) * 2 * NS + i, lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) O::add(z[i][half], left, right[half]);
        }
      }
    }
    if (++turn < turns) continue;
    turn = 0;
    uint32_t right[4 * NS][O::parts][2];
#pragma unroll
    for (int j = 0; j < 4 * NS; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&sums)[4] = z[j / 2][half];
        O::put(right[j], half, sums[j % 2 * 2], sums[j % 2 * 2 + 1]);
        sums[j % 2 * 2] = sums[j % 2 * 2 + 1] = 0;
      }
#pragma unroll
    for (int i = 0; i < QT; ++i) {
      uint32_t left[O::parts][4];
      get_operand<O>(left, of_a, height * QT + i, lane);
#pragma unroll
      for (int j = 0; j < 4 * NS; ++j) O::add(y[i][j], left, right[j]);
    }
    if (++height < heights) continue;
    height = 0;

#pragma unroll
    for (int i = 0; i < QT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int side = 0; side < NS; ++side) {
          const int row = first_row + 16 * i + 8 * half + g, column = first_column + 32 * side + 8 * q;
          const int left = row < k.q ? k.s - column : 0;
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            float& sum = y[i][4 * side + e / 2][2 * half + e % 2];
            v[e] = k.scale * sum;
            sum = 0;
          }
          if (left <= 0) continue;
          const int inside = row * k.s + column;
          const int64_t at = m * k.q * k.s + inside;
          if (k.bias != nullptr)
#pragma unroll
            for (int e = 0; e < 8; ++e)
              if (e < left) v[e] += k.bias[inside + e];
          if (k.acc != nullptr) {
            const Eight<T> before = load_eight<WIDE>(static_cast<const T*>(k.acc) + at, 1, left, WIDE);
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] += get(before, e);
          }
          T* to = static_cast<T*>(k.y) + at;
          if constexpr (WIDE) {
            store<8>(to, v);
          } else {
#pragma unroll
            for (int e = 0; e < 8; ++e)
              if (e < left) to[e] = narrow<T>(v[e]);
          }
        }
    m += stride;
  }
  async_wait<0>();
}

// -- launching --------------------------------------------------------------------------------------------------------

template <bool WIDE, class T, class F, int QT, int NS>
cudaError_t linear_of(const KronLinearCuda& k, cudaStream_t stream) {
  LinearArgs args = {};
  args.k = k;
  args.s_tiles = static_cast<int>(ceil_div(k.s, 32 * NS));
  args.tiles = static_cast<int>(ceil_div(k.q, 16 * QT)) * args.s_tiles;
  // Two blocks for each SM of an H100, four of the small ones: each makes operands of the factors only once.
  const int64_t most = std::max(264 * (QT * NS > 2 ? 1 : 2) / args.tiles, 1);
  args.blocks = static_cast<int>(std::min(ceil_div(k.m, warps), most));
  const int operands = static_cast<int>(ceil_div(k.r, 32) * 4 * NS + ceil_div(k.p, 16) * QT);
  const size_t shared = operands * Operands<T, F, 2>::parts * fragment_bytes + warps * stages * stage_bytes;
  return launch(kron_linear_kernel<WIDE, T, F, QT, NS>, dim3(args.blocks * args.tiles), dim3(threads), shared, stream,
                args);
}

template <class T, class F>
cudaError_t linear_with(const KronLinearCuda& k, cudaStream_t stream) {
  const auto *x = static_cast<const T*>(k.x), *acc = static_cast<const T*>(k.acc), *y = static_cast<const T*>(k.y);
  if (k.r % 8 != 0 || k.s % 8 != 0 || !aligned16(x, acc, y)) return linear_of<false, T, F, 2, 1>(k, stream);
  return k.q <= 32 || k.s <= 32 ? linear_of<true, T, F, 2, 1>(k, stream) : linear_of<true, T, F, 4, 2>(k, stream);
}

}  // namespace

cudaError_t kron_linear_cuda(const KronLinearCuda& k, cudaStream_t stream) {
  if (k.m == 0 || k.q == 0 || k.s == 0) return cudaSuccess;
  if (std::max(k.p, k.r) > kron_most || static_cast<int64_t>(k.q) * k.s > INT_MAX || k.a.type != k.b.type)
    return cudaErrorInvalidValue;
  const auto with = [&](auto t) {
    using T = decltype(t);
    return k.a.type == k.type ? linear_with<T, T>(k, stream) : linear_with<T, float>(k, stream);
  };
  if (k.a.type != k.type && k.a.type != Dtype::f32) return cudaErrorInvalidValue;
  if (k.type == Dtype::f32) return cudaErrorInvalidValue;
  return k.type == Dtype::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace pk
