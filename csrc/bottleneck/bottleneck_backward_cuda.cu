// Backward for few rows, in three launches: the gradient of the bottleneck, what flows on to x, and everything that
// sums over rows or, with LayerNorm, needs a whole row of the second. Nobody adds to what another block has written.
#include "bottleneck/bottleneck_tile.cuh"

namespace pk {
namespace {

struct Args {
  BottleneckBackward b;
  BottleneckFactor down, up;
  bool x_wide, g_wide, dx_wide, dwd_wide, dwu_pairs;
  int ld;
  // Workspace: u [rows, ld], the gradient of z; ac [rows, ld], scale * gate * a; dots [groups of 16 ranks, rows],
  // the sums of a (g wu); dh [rows, in] with LayerNorm.
  float *u, *ac, *dots, *dh;
  int blocks[6];  // of the third launch, in the order of its parts
};

__device__ inline float factor_of_row(const BottleneckShape& s, int row) {
  return s.gate == nullptr ? s.scale : s.scale * s.gate[row];
}

__device__ inline RowNorm norm_of_row(const BottleneckBackward& b, int row) {
  RowNorm norm = {};
  if (row < b.s.rows) norm.mean[0] = b.stats[row], norm.inverse[0] = b.stats[b.s.rows + row];
  return norm;
}

// -- the first launch: u, a and dots; a block has 16 rows and 16 ranks ------------------------------------------------

template <class X, class F>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_back_kernel(Args args) {
  const BottleneckShape& s = args.b.s;
  const int groups = (s.mid + 15) / 16, group = blockIdx.x % groups, tile = blockIdx.x / groups;
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [16, 16]
  int rows[2];
  rows_of_tile(tile, s.rows, threadIdx.x % 32, rows);
  down_block<X, F, false>(sums, 16, sums + 256, static_cast<const X*>(args.b.g), s.out, args.g_wide, rows,
                          args.up.as<F>(), s, {}, 0, s.out, group, group + 1, 1);
  const int row = 16 * tile + threadIdx.x / 16, rank = 16 * group + threadIdx.x % 16;
  float product = 0;
  if (row < s.rows && rank < s.mid) {
    const float back = sums[threadIdx.x], c = factor_of_row(s, row);
    const float z = number_at(args.b.z, args.b.z_type, static_cast<int64_t>(row) * s.mid + rank);
    const bool kept = is_kept(mask_of(s.rng, s.threshold), row, rank);
    const float a = kept ? activated(s.act, z) * s.keep_scale : 0;
    const int64_t at = static_cast<int64_t>(row) * args.ld + rank;
    args.u[at] = kept ? back * c * s.keep_scale * slope(s.act, z) : 0;
    args.ac[at] = a * c;
    product = a * back;
  }
  sums[threadIdx.x] = product;  // each thread has read its own
  block_sync();
  if (threadIdx.x >= 16 || 16 * tile + static_cast<int>(threadIdx.x) >= s.rows) return;
  float dot = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) dot += sums[threadIdx.x * 16 + i];
  args.dots[group * s.rows + 16 * tile + threadIdx.x] = dot;
}

// -- the second: dh, or dx; a block has 16 rows and 64 columns --------------------------------------------------------

template <class X, class F>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_dx_kernel(Args args) {
  const BottleneckShape& s = args.b.s;
  const int tiles = (s.in + 63) / 64, first = blockIdx.x % tiles, tile = blockIdx.x / tiles;
  int rows[2];
  rows_of_tile(tile, s.rows, threadIdx.x % 32, rows);
  constexpr int parts = sizeof(F) == 4 ? 3 : 2;  // dln_w and dln_b may be float32
  up_block<X, F, parts>(reinterpret_cast<float*>(shared_memory()), args.u, args.ld, rows, args.down.as<F>(), first,
                        tiles, tiles, 1, [&](int row, int column, const float (&sums)[8]) {
                          const int left = s.in - column;
                          row += 16 * tile;
                          if (row >= s.rows || left <= 0) return;
                          const int64_t at = static_cast<int64_t>(row) * s.in + column;
                          if (s.ln) {
#pragma unroll
                            for (int e = 0; e < 8; ++e)
                              if (e < left) args.dh[at + e] = sums[e];
                            return;
                          }
                          float v[8];
                          Eight<X> own = {};
                          if (args.b.own_residual)
                            own = load_eight<false>(static_cast<const X*>(args.b.g) + at, 1, left, args.dx_wide);
#pragma unroll
                          for (int e = 0; e < 8; ++e) v[e] = sums[e] + get(own, e);
                          store_eight(static_cast<X*>(args.b.dx) + at, v, left, args.dx_wide);
                        });
}

// -- the third --------------------------------------------------------------------------------------------------------

// c of Wgrad in lora_tile.cuh: ranks rank .. rank + 15 by 64 columns, of v^T h, by a warp. h is kept in H.
template <class X, class H, bool LN>
__device__ inline void outer_warp(float (&c)[1][8][4], const Args& args, const X* data, int columns, bool wide,
                                  const float* v, int rank, int column, int lane) {
  const BottleneckShape& s = args.b.s;
  const int at = column + lane / 4 * 8;
  for (int first = 0; first < s.rows; first += 16) {
    Wgrad<false, H, 1> step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + lane % 4 * 4 + i;
      const bool real = row < s.rows;
      step.rows[i] = real ? row : -1;
      const Eight<X> u =
          load_eight<false>(data + static_cast<int64_t>(row) * columns + at, 1, real ? columns - at : 0, wide);
      if constexpr (LN) {
        const RowNorm norm = norm_of_row(args.b, row);
        step.u[i] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const bool inside = at + e < columns;
          const float h = normal(get(u, e), norm.mean[0], norm.inverse[0], inside ? number_at(s.ln_w, at + e, 1) : 0,
                                 inside ? number_at(s.ln_b, at + e, 0) : 0);
          if constexpr (sizeof(H) == 4)
            put(step.u[i], e, bits_of(h));
          else
            put(step.u[i], e, narrow<H>(h).bits);
        }
      } else {
        step.u[i] = u;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = rank + lane / 4 * 2 + half;
        step.v[0][i][half] = real && r < s.mid ? v[static_cast<int64_t>(row) * args.ld + r] : 0;
      }
    }
    step.multiply(c, column, {}, lane);
  }
}

template <class X, class F, bool LN>
__device__ inline void write_dwd(const Args& args, int item, int lane) {
  const BottleneckShape& s = args.b.s;
  const int tiles = (s.in + 63) / 64, rank = 16 * (item / tiles), column = item % tiles * 64;
  if (rank >= s.mid) return;
  float c[1][8][4] = {};
  using H = std::conditional_t<LN && !std::is_same_v<X, F>, float, X>;
  outer_warp<X, H, LN>(c, args, static_cast<const X*>(s.x), s.in, args.x_wide, args.u, rank, column, lane);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int r = rank + lane / 4 * 2 + e / 2, at = column + (lane % 4 * 2 + e % 2) * 8;
    if (r >= s.mid || at >= s.in) continue;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = c[0][j][e];
    store_eight(static_cast<F*>(args.b.dwd) + static_cast<int64_t>(r) * s.in + at, v, s.in - at, args.dwd_wide);
  }
}

template <class X, class F>
__device__ inline void write_dwu(const Args& args, int item, int lane) {
  const BottleneckShape& s = args.b.s;
  const int groups = (s.mid + 15) / 16, rank = item % groups * 16, column = item / groups * 64;
  if (column >= s.out) return;
  float c[1][8][4] = {};
  outer_warp<X, X, false>(c, args, static_cast<const X*>(args.b.g), s.out, args.g_wide, args.ac, rank, column, lane);
  const int r = rank + lane / 4 * 2;
#pragma unroll
  for (int side = 0; side < 2; ++side)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int row = column + (lane % 4 * 2 + side) * 8 + j;
      if (row >= s.out || r >= s.mid) continue;
      F* to = static_cast<F*>(args.b.dwu) + static_cast<int64_t>(row) * s.mid + r;
      const float pair_of[2] = {c[0][j][side], c[0][j][2 + side]};
      if (args.dwu_pairs) {
        store<2>(to, pair_of);
      } else {
        to[0] = narrow<F>(pair_of[0]);
        if (r + 1 < s.mid) to[1] = narrow<F>(pair_of[1]);
      }
    }
}

// dln_w and dln_b of a column of x.
template <class X>
__device__ inline void write_dln(const Args& args, int column) {
  const BottleneckBackward& b = args.b;
  if (column >= b.s.in) return;
  float weight = 0, bias = 0;
  for (int row = 0; row < b.s.rows; ++row) {
    const int64_t at = static_cast<int64_t>(row) * b.s.in + column;
    const RowNorm norm = norm_of_row(b, row);
    weight += args.dh[at] * ((widen(static_cast<const X*>(b.s.x)[at]) - norm.mean[0]) * norm.inverse[0]);
    bias += args.dh[at];
  }
  if (b.dln_w != nullptr) store_at(b.dln_w, b.s.ln_w.type, column, weight);
  if (b.dln_b != nullptr) store_at(b.dln_b, b.s.ln_b.type, column, bias);
}

template <class X>
__device__ inline void write_dbu(const Args& args, int column) {
  const BottleneckShape& s = args.b.s;
  if (column >= s.out) return;
  float sum = 0;
  for (int row = 0; row < s.rows; ++row)
    sum += factor_of_row(s, row) * widen(static_cast<const X*>(args.b.g)[static_cast<int64_t>(row) * s.out + column]);
  store_at(args.b.dbu, s.bu.type, column, sum);
}

__device__ inline void write_dbd(const Args& args, int rank) {
  if (rank >= args.b.s.mid) return;
  float sum = 0;
  for (int row = 0; row < args.b.s.rows; ++row) sum += args.u[static_cast<int64_t>(row) * args.ld + rank];
  store_at(args.b.dbd, args.b.s.bd.type, rank, sum);
}

// dgate of a row and, with LayerNorm, its dx, by a block.
template <class X>
__device__ inline void write_row(const Args& args, int row) {
  const BottleneckBackward& b = args.b;
  const BottleneckShape& s = b.s;
  const auto* g = static_cast<const X*>(b.g) + static_cast<int64_t>(row) * s.out;
  const auto* x = static_cast<const X*>(s.x) + static_cast<int64_t>(row) * s.in;
  const float* dh = args.dh + static_cast<int64_t>(row) * s.in;
  auto* parts = reinterpret_cast<float*>(shared_memory());  // [3, warps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool normed = s.ln && b.dx != nullptr;
  const RowNorm norm = normed ? norm_of_row(b, row) : RowNorm{};
  const auto d_of = [&](int i) { return dh[i] * number_at(s.ln_w, i, 1); };
  const auto unit_of = [&](int i) { return (widen(x[i]) - norm.mean[0]) * norm.inverse[0]; };
  float bias = 0, sum = 0, dot = 0;
  if (b.dgate != nullptr && s.bu.data != nullptr)
    for (int i = threadIdx.x; i < s.out; i += bottleneck_threads) bias += widen(g[i]) * number_at(s.bu, i, 0);
  if (normed)
    for (int i = threadIdx.x; i < s.in; i += bottleneck_threads) {
      const float d = d_of(i);
      sum += d;
      dot += d * unit_of(i);
    }
  const float mine[3] = {warp_sum(bias), warp_sum(sum), warp_sum(dot)};
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < 3; ++i) parts[i * bottleneck_warps + warp] = mine[i];
  block_sync();
  float all[3] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i)
#pragma unroll
    for (int w = 0; w < bottleneck_warps; ++w) all[i] += parts[i * bottleneck_warps + w];
  if (b.dgate != nullptr && threadIdx.x == 0) {
    float total = all[0];
    for (int group = 0; group < (s.mid + 15) / 16; ++group) total += args.dots[group * s.rows + row];
    b.dgate[row] = s.scale * total;
  }
  if (!normed) return;
  const float mean = all[1] / static_cast<float>(s.in), slope_of_unit = all[2] / static_cast<float>(s.in);
  for (int i = threadIdx.x; i < s.in; i += bottleneck_threads) {
    const float v = (d_of(i) - mean - unit_of(i) * slope_of_unit) * norm.inverse[0];
    static_cast<X*>(b.dx)[static_cast<int64_t>(row) * s.in + i] = narrow<X>(b.own_residual ? v + widen(g[i]) : v);
  }
}

template <class X, class F>
__global__ void __launch_bounds__(bottleneck_threads) bottleneck_rest_kernel(Args args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block = blockIdx.x, part = 0;
  while (block >= args.blocks[part]) block -= args.blocks[part++];
  const int item = block * bottleneck_warps + warp, column = block * bottleneck_threads + threadIdx.x;
  if (part == 0 && args.b.s.ln)
    write_dwd<X, F, true>(args, item, lane);
  else if (part == 0)
    write_dwd<X, F, false>(args, item, lane);
  else if (part == 1)
    write_dwu<X, F>(args, item, lane);
  else if (part == 2)
    write_dln<X>(args, column);
  else if (part == 3)
    write_dbu<X>(args, column);
  else if (part == 4)
    write_dbd(args, column);
  else
    write_row<X>(args, block);
}

int pitch_of(const BottleneckShape& s) { return pieces(s.mid, 4) * 4; }

}  // namespace

int64_t bottleneck_backward_kept(const BottleneckShape& s) {
  return static_cast<int64_t>(s.rows) * (2 * pitch_of(s) + pieces(s.mid, 16) + (s.ln ? s.in : 0));
}

cudaError_t bottleneck_backward_cuda(const BottleneckBackward& b, cudaStream_t stream) {
  const BottleneckShape& s = b.s;
  if (s.rows == 0 || s.in == 0 || s.mid == 0 || s.out == 0) return cudaErrorInvalidValue;
  if (const cudaError_t refused = bottleneck_refused(s); refused != cudaSuccess) return refused;
  Args args = {};
  args.b = b, args.down = down_factor(s), args.up = up_factor(s);
  args.x_wide = is_wide(s.in, s.x), args.g_wide = is_wide(s.out, b.g);
  args.dx_wide = is_wide(s.in, b.dx) && (!b.own_residual || aligned16(b.g));
  args.dwd_wide = is_wide(s.in, b.dwd), args.dwu_pairs = s.mid % 2 == 0 && aligned16(b.dwu);
  args.ld = pitch_of(s);
  const int row_tiles = pieces(s.rows, 16), groups = pieces(s.mid, 16);
  const int in_tiles = pieces(s.in, 64), out_tiles = pieces(s.out, 64);
  args.u = b.workspace, args.ac = args.u + static_cast<int64_t>(s.rows) * args.ld;
  args.dots = args.ac + static_cast<int64_t>(s.rows) * args.ld;
  args.dh = args.dots + static_cast<int64_t>(s.rows) * groups;
  const bool dln = b.dln_w != nullptr || b.dln_b != nullptr, dh = dln || b.dx != nullptr;
  const int blocks[6] = {b.dwd == nullptr ? 0 : pieces(groups * in_tiles, bottleneck_warps),
                         b.dwu == nullptr ? 0 : pieces(groups * out_tiles, bottleneck_warps),
                         dln ? pieces(s.in, bottleneck_threads) : 0,
                         b.dbu == nullptr ? 0 : pieces(s.out, bottleneck_threads),
                         b.dbd == nullptr ? 0 : pieces(s.mid, bottleneck_threads),
                         b.dgate != nullptr || (s.ln && b.dx != nullptr) ? s.rows : 0};
  int all = 0;
  for (int i = 0; i < 6; ++i) all += args.blocks[i] = blocks[i];
  return switch_bottleneck(s, [&](auto x, auto w) {
    using X = decltype(x);
    using F = decltype(w);
    const dim3 threads(bottleneck_threads);
    cudaError_t code = launch(bottleneck_back_kernel<X, F>, dim3(row_tiles * groups), threads,
                              (256 + bottleneck_warps * 256) * sizeof(float), stream, args);
    if (code == cudaSuccess && dh)
      code = launch(bottleneck_dx_kernel<X, F>, dim3(row_tiles * in_tiles), threads, bottleneck_staged * sizeof(float),
                    stream, args);
    if (code == cudaSuccess && all > 0)
      code =
          launch(bottleneck_rest_kernel<X, F>, dim3(all), threads, 3 * bottleneck_warps * sizeof(float), stream, args);
    return code;
  });
}

}  // namespace pk
