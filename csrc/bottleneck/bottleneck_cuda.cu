// Forward for few rows: in one launch by clusters, or in two, whichever README.md's figures say is shorter.
#include <algorithm>

#include "bottleneck/bottleneck_tile.cuh"

namespace pk {
namespace {

constexpr int cluster = 8;  // blocks; more would not be portable
// With more bytes of wd and wu, eight multiprocessors read for longer than a second launch takes.
constexpr int64_t most_cluster_bytes = 2 << 20;

struct Args {
  BottleneckForward f;
  BottleneckFactor down, up;
  bool x_wide, y_wide;
  int ld;                       // of a, in shared memory or in the workspace
  int chunk;                    // columns of x for a block of the cluster
  int group_warps, tile_warps;  // see down_block and up_block
  int64_t tile_bytes;           // of 64 columns of y in wu; 0 if they are scattered
};

// z and the activation of a sum of products.
__device__ inline float finish_down(const BottleneckForward& f, const LoraMask& mask, int row, int rank, float sum,
                                    bool keep_z) {
  const BottleneckShape& s = f.s;
  const float z = sum + number_at(s.bd, rank, 0);
  if (keep_z) store_at(f.z, f.z_type, static_cast<int64_t>(row) * s.mid + rank, z);
  return is_kept(mask, row, rank) ? activated(s.act, z) * s.keep_scale : 0;
}

// y of eight columns.
template <class X>
__device__ inline void finish_up(const Args& args, int row, int column, const float (&sums)[8]) {
  const BottleneckShape& s = args.f.s;
  const int left = s.out - column;
  if (row >= s.rows || left <= 0) return;
  const int64_t at = static_cast<int64_t>(row) * s.out + column;
  const Eight<X> before = load_eight<false>(static_cast<const X*>(args.f.residual) + at, 1, left, args.y_wide);
  const float c = s.gate == nullptr ? s.scale : s.scale * s.gate[row];
  float v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = get(before, e) + c * (sums[e] + (e < left ? number_at(s.bu, column + e, 0) : 0));
  store_eight(static_cast<X*>(args.f.y) + at, v, left, args.y_wide);
}

__device__ inline RowNorm norm_of(const float* stats, int lane) {
  RowNorm norm;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    norm.mean[half] = stats[row], norm.inverse[half] = stats[16 + row];
  }
  return norm;
}

__device__ inline void keep_stats(const BottleneckForward& f, int tile, const float* stats) {
  const int row = 16 * tile + static_cast<int>(threadIdx.x) % 16, which = threadIdx.x / 16;
  if (which < 2 && row < f.s.rows) f.stats[which * f.s.rows + row] = stats[threadIdx.x];
}

// -- one launch: a cluster has 16 rows --------------------------------------------------------------------------------

// A block of the cluster multiplies its share of x's columns, adds up all shares in the order of the blocks, and makes
// its tiles of y. The activations stay in shared memory. Mean and deviation of a row are put together from those of the
// blocks' columns.
template <class X, class F, bool LN>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_cluster_kernel(Args args) {
  const BottleneckShape& s = args.f.s;
  const int tile = blockIdx.x / cluster, block = cluster_rank();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = 16 * args.ld;
  auto* share = reinterpret_cast<float*>(shared_memory());  // [16, ld]
  float* a = share + size;                                  // [16, ld]
  float* staged = a + size;
  float* stats = staged + bottleneck_staged;  // [2, 16]: mean, 1 / deviation
  float* moments = stats + 32;                // [2, 16], of the block's columns

  // wu is on its way to the cache of the device while everything else is computed.
  const int tiles = (s.out + 63) / 64;
  for (int at = block; args.tile_bytes > 0 && at < tiles; at += cluster) {
    const int64_t end = static_cast<int64_t>(s.out) * s.mid * sizeof(F), first = at * args.tile_bytes;
    for (int64_t i = first + 128 * threadIdx.x; i < first + args.tile_bytes && i < end; i += 128 * bottleneck_threads)
      prefetch(static_cast<const char*>(s.wu.data) + i);
  }

  int rows[2];
  rows_of_tile(tile, s.rows, lane, rows);
  const auto* x = static_cast<const X*>(s.x);
  const auto columns_of = [&](int of, int& begin, int& end) {
    begin = of * args.chunk < s.in ? of * args.chunk : s.in;
    end = begin + args.chunk < s.in ? begin + args.chunk : s.in;
  };
  int begin, end;
  columns_of(block, begin, end);
  RowNorm norm = {};
  if constexpr (LN) {
    for (int i = warp; i < 16; i += bottleneck_warps) {
      const int row = 16 * tile + i;
      Moments m = {0, 0};
      if (row < s.rows) m = moments_of(x + static_cast<int64_t>(row) * s.in, begin, end, args.x_wide, lane);
      if (lane == 0) moments[i] = m.mean, moments[16 + i] = m.squares;
    }
    cluster_sync();
    if (threadIdx.x < 16) {
      float mean = 0, squares = 0;
      for (int peer = 0; peer < cluster; ++peer) {
        int first, last;
        columns_of(peer, first, last);
        mean += static_cast<float>(last - first) / static_cast<float>(s.in) * cluster_peer(moments, peer)[threadIdx.x];
      }
      for (int peer = 0; peer < cluster; ++peer) {
        int first, last;
        columns_of(peer, first, last);
        const float* of = cluster_peer(moments, peer);
        const float away = first < last ? of[threadIdx.x] - mean : 0;
        squares += of[16 + threadIdx.x] + static_cast<float>(last - first) * away * away;
      }
      stats[threadIdx.x] = mean, stats[16 + threadIdx.x] = deviation_inverse(squares, s.in, s.eps);
    }
    block_sync();
    if (block == 0) keep_stats(args.f, tile, stats);
    norm = norm_of(stats, lane);
  }

  down_block<X, F, LN>(share, args.ld, staged, x, s.in, args.x_wide, rows, args.down.as<F>(), s, norm, begin, end, 0,
                       (s.mid + 15) / 16, args.group_warps);
  cluster_sync();
  const LoraMask mask = mask_of(s.rng, s.threshold);
  for (int i = threadIdx.x; i < size; i += bottleneck_threads) {
    const int row = 16 * tile + i / args.ld, rank = i % args.ld;
    if (rank >= s.mid || row >= s.rows) continue;
    float sum = 0;
#pragma unroll
    for (int peer = 0; peer < cluster; ++peer) sum += cluster_peer(share, peer)[i];
    a[i] = finish_down(args.f, mask, row, rank, sum, block == 0);
  }
  cluster_sync();  // a is complete, and no block leaves before its peers have read its share

#pragma unroll
  for (int half = 0; half < 2; ++half) rows[half] = rows[half] < 0 ? -1 : 8 * half + lane / 4;
  up_block<X, F, 2>(
      staged, a, args.ld, rows, args.up.as<F>(), block, cluster, tiles, args.tile_warps,
      [&](int row, int column, const float (&sums)[8]) { finish_up<X>(args, 16 * tile + row, column, sums); });
}

// -- two launches -----------------------------------------------------------------------------------------------------

// a, z and stats: a block has 16 rows and 16 ranks, and finds the mean and the deviation of its rows itself.
template <class X, class F, bool LN>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_down_kernel(Args args) {
  const BottleneckShape& s = args.f.s;
  const int groups = (s.mid + 15) / 16, group = blockIdx.x % groups, tile = blockIdx.x / groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [16, 16]
  float* staged = sums + 256;                              // [warps, 16, 16]
  float* stats = staged + bottleneck_warps * 256;          // [2, 16]

  int rows[2];
  rows_of_tile(tile, s.rows, lane, rows);
  const auto* x = static_cast<const X*>(s.x);
  RowNorm norm = {};
  if constexpr (LN) {
    for (int i = warp; i < 16; i += bottleneck_warps) {
      const int row = 16 * tile + i;
      Moments m = {0, 0};
      if (row < s.rows) m = moments_of(x + static_cast<int64_t>(row) * s.in, 0, s.in, args.x_wide, lane);
      if (lane == 0) stats[i] = m.mean, stats[16 + i] = deviation_inverse(m.squares, s.in, s.eps);
    }
    block_sync();
    if (group == 0) keep_stats(args.f, tile, stats);
    norm = norm_of(stats, lane);
  }
  down_block<X, F, LN>(sums, 16, staged, x, s.in, args.x_wide, rows, args.down.as<F>(), s, norm, 0, s.in, group,
                       group + 1, 1);
  const int row = 16 * tile + threadIdx.x / 16, rank = 16 * group + threadIdx.x % 16;
  if (row < s.rows && rank < s.mid)
    args.f.a[static_cast<int64_t>(row) * args.ld + rank] =
        finish_down(args.f, mask_of(s.rng, s.threshold), row, rank, sums[threadIdx.x], true);
}

// y: a block has 16 rows and 64 columns.
template <class X, class F>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_up_kernel(Args args) {
  const BottleneckShape& s = args.f.s;
  const int tiles = (s.out + 63) / 64, first = blockIdx.x % tiles, tile = blockIdx.x / tiles;
  int rows[2];
  rows_of_tile(tile, s.rows, threadIdx.x % 32, rows);
  up_block<X, F, 2>(
      reinterpret_cast<float*>(shared_memory()), args.f.a, args.ld, rows, args.up.as<F>(), first, tiles, tiles, 1,
      [&](int row, int column, const float (&sums)[8]) { finish_up<X>(args, 16 * tile + row, column, sums); });
}

// -- launching --------------------------------------------------------------------------------------------------------

// f(kernel) with the cluster kernel for the types.
template <class Call>
auto switch_cluster(const BottleneckShape& s, Call&& call) {
  return switch_bottleneck(s, [&](auto x, auto w) {
    using X = decltype(x);
    using F = decltype(w);
    return s.ln ? call(bottleneck_cluster_kernel<X, F, true>) : call(bottleneck_cluster_kernel<X, F, false>);
  });
}

int pitch_of(const BottleneckShape& s) { return pieces(s.mid, 4) * 4 + 4; }  // against bank conflicts

bool in_one_launch(const BottleneckShape& s) {
  const int64_t bytes = static_cast<int64_t>(s.mid) * (s.in + s.out) * bytes_of(s.wd.type);
  if (bytes > most_cluster_bytes || s.mid > 512) return false;
  return switch_cluster(s, [](auto kernel) { return can_cluster(kernel); });
}

}  // namespace

int64_t bottleneck_kept(const BottleneckShape& s) {
  return in_one_launch(s) ? 0 : static_cast<int64_t>(s.rows) * pitch_of(s);
}

cudaError_t bottleneck_cuda(const BottleneckForward& f, cudaStream_t stream) {
  const BottleneckShape& s = f.s;
  if (s.rows == 0 || s.in == 0 || s.mid == 0 || s.out == 0) return cudaErrorInvalidValue;
  if (const cudaError_t refused = bottleneck_refused(s); refused != cudaSuccess) return refused;
  Args args = {};
  args.f = f, args.down = down_factor(s), args.up = up_factor(s);
  args.x_wide = is_wide(s.in, s.x), args.y_wide = is_wide(s.out, f.residual, f.y);
  args.ld = pitch_of(s);
  const int row_tiles = pieces(s.rows, 16), groups = pieces(s.mid, 16), tiles = pieces(s.out, 64);
  if (f.a == nullptr) {
    args.chunk = pieces(pieces(s.in, cluster), 32) * 32;
    args.group_warps = side_by_side(groups), args.tile_warps = side_by_side(pieces(tiles, cluster));
    if (s.wu.next == 1 && s.wu.row == s.mid) args.tile_bytes = static_cast<int64_t>(64) * s.mid * bytes_of(s.wd.type);
    const size_t shared = (2 * 16 * args.ld + bottleneck_staged + 64) * sizeof(float);
    return switch_cluster(s, [&](auto kernel) {
      return launch_cluster(kernel, cluster, dim3(row_tiles * cluster), dim3(bottleneck_threads), shared, stream, args);
    });
  }
  return switch_bottleneck(s, [&](auto x, auto w) {
    using X = decltype(x);
    using F = decltype(w);
    const auto down = s.ln ? bottleneck_down_kernel<X, F, true> : bottleneck_down_kernel<X, F, false>;
    const size_t shared = (256 + bottleneck_warps * 256 + 32) * sizeof(float);
    const cudaError_t code = launch(down, dim3(row_tiles * groups), dim3(bottleneck_threads), shared, stream, args);
    if (code != cudaSuccess) return code;
    return launch(bottleneck_up_kernel<X, F>, dim3(row_tiles * tiles), dim3(bottleneck_threads),
                  bottleneck_staged * sizeof(float), stream, args);
  });
}

}  // namespace pk
