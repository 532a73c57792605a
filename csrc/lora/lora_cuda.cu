#include <algorithm>
#include <climits>

#include "lora/lora.cuh"
#include "lora/lora_tile.cuh"

namespace pk {
namespace {

constexpr int warps = 4;    // of a block, but for decode's
constexpr int cluster = 8;  // blocks of decode's; more would not be portable
constexpr int decode_warps = 8;
constexpr int wgrad_pitch = 65;     // of 64 columns in shared memory, against bank conflicts
constexpr int blocks_wanted = 264;  // two for each SM of an H100

// What a kernel needs of a streamed array, and of a factor.
struct Stream {
  void* data;
  int columns;
  bool wide;
};

struct FactorArgs {
  const void* data;
  int64_t rank_stride, column_stride;
  Along along;
};

// -- rows and adapters ------------------------------------------------------------------------------------------------

struct Adapter {
  int first, ranks;  // none where a tile is unused
  float scale;
};

__device__ inline int least(int a, int b) { return a < b ? a : b; }

__device__ inline Adapter adapter_of(const LoraRows& rows, int l) {
  if (!rows.planned) return {0, rows.r_max, 1.0f};
  if (l < 0 || l >= rows.adapters) return {0, 0, 0.0f};
  int first, last;
  if (rows.indptr64) {
    const auto* at = static_cast<const int64_t*>(rows.r_indptr) + l;
    first = static_cast<int>(at[0]), last = static_cast<int>(at[1]);
  } else {
    const auto* at = static_cast<const int32_t*>(rows.r_indptr) + l;
    first = at[0], last = at[1];
  }
  return {first, least(last - first, rows.r_max), rows.scaling[l]};
}

__device__ inline Adapter adapter_of_tile(const LoraRows& rows, int tile) {
  return adapter_of(rows, rows.planned ? rows.plan[static_cast<int64_t>(tile) * (1 + rows.block_m)] : 0);
}

// The row at a slot, -1 where there is none.
__device__ inline int row_at(const LoraRows& rows, int slot) {
  if (!rows.planned) return slot < rows.m ? slot : -1;
  return rows.plan[static_cast<int64_t>(slot) + slot / rows.block_m + 1];
}

// The rows of a lane in the fragments of 16 MT rows from `first` of a tile on.
template <int MT>
__device__ inline void rows_of(const LoraRows& rows, int tile, int first, int lane, int (&out)[MT][2]) {
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = first + 16 * i + 8 * half + lane / 4;
      out[i][half] = at < rows.block_m ? row_at(rows, tile * rows.block_m + at) : -1;
    }
}

// The first tile of an adapter >= l, by a warp that looks at 32 tiles at a time.
__device__ inline int first_tile(const LoraRows& rows, int l, int lane) {
  int low = 0, high = rows.tiles;
  while (low < high) {
    const int step = (high - low + 31) / 32, at = low + step * lane;
    const bool below = at < high && rows.plan[static_cast<int64_t>(at) * (1 + rows.block_m)] < l;
    const int count = static_cast<int>(warp_sum(below ? 1.0f : 0.0f));
    if (count == 0) return low;
    high = least(high, low + step * count);
    low += step * (count - 1) + 1;
  }
  return low;
}

template <class F>
__device__ inline Factor<F> factor_of(const FactorArgs& f, const Adapter& adapter, int rank, int columns) {
  return {static_cast<const F*>(f.data) + (adapter.first + rank) * f.rank_stride,
          f.rank_stride,
          f.column_stride,
          adapter.ranks - rank,
          columns,
          f.along};
}

// c of shrink_warp as rows [16 MT, 8 NT] in shared memory.
template <int MT, int NT>
__device__ inline void stage(float* shared, const float (&c)[MT][NT][4], int lane) {
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared[(16 * i + 8 * (e / 2) + lane / 4) * 8 * NT + (lane % 4 * 2 + e % 2) * NT + j] = c[i][j][e];
}

__device__ inline void store_as(void* out, Dtype type, int64_t i, float x) {
  if (type == Dtype::bf16)
    static_cast<bf16*>(out)[i] = narrow<bf16>(x);
  else if (type == Dtype::f16)
    static_cast<f16*>(out)[i] = narrow<f16>(x);
  else
    static_cast<float*>(out)[i] = x;
}

// -- shrink -----------------------------------------------------------------------------------------------------------

struct ShrinkArgs {
  LoraRows rows;
  Stream u;
  FactorArgs f;
  LoraRng drop;
  float scale;
  float* parts;
  int splits, chunk;  // columns of a part
  int rank_blocks, row_blocks;
};

// A block is 16 MT rows of a tile, 8 NT ranks and a chunk of columns, which its warps take in turn. Blocks that read
// the same u are neighbours, so that all but the first find it in L2.
template <bool WIDE, class U, class F, int MT, int NT>
__global__ void __launch_bounds__(32 * warps) lora_shrink_kernel(ShrinkArgs args) {
  const LoraRows& rows = args.rows;
  int index = blockIdx.x;
  const int first_rank = index % args.rank_blocks * 8 * NT;
  index /= args.rank_blocks;
  const int part = index % args.splits;
  index /= args.splits;
  const int first_row = index % args.row_blocks * 16 * MT, tile = index / args.row_blocks;
  const Adapter adapter = adapter_of_tile(rows, tile);
  const int first_slot = tile * rows.block_m + first_row;
  if (first_rank >= adapter.ranks || row_at(rows, first_slot) < 0) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int mine[MT][2];
  rows_of(rows, tile, first_row, lane, mine);
  const Factor<F> f = factor_of<F>(args.f, adapter, first_rank, args.u.columns);
  const int begin = part * args.chunk, end = least(begin + args.chunk, args.u.columns);
  float c[MT][NT][4] = {};
  shrink_warp<WIDE>(c, static_cast<const U*>(args.u.data), args.u.columns, args.u.wide, mine, f,
                    mask_of(args.drop.rng, args.drop.threshold), begin + 32 * warp, end, 32 * warps, lane);

  auto* shared = reinterpret_cast<float*>(shared_memory());  // [warps, 16 MT, 8 NT]
  constexpr int size = 16 * MT * 8 * NT;
  stage(shared + warp * size, c, lane);
  block_sync();
  const int64_t slots = rows.planned ? static_cast<int64_t>(rows.tiles) * rows.block_m : rows.m;
  const float scale = args.scale * adapter.scale;
  for (int i = threadIdx.x; i < size; i += 32 * warps) {
    const int row = i / (8 * NT), rank = first_rank + i % (8 * NT);
    if (rank >= adapter.ranks || first_row + row >= rows.block_m || row_at(rows, first_slot + row) < 0) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += shared[w * size + i];
    args.parts[(part * slots + first_slot + row) * rows.r_max + rank] = scale * sum;
  }
}

// -- expand -----------------------------------------------------------------------------------------------------------

struct ExpandArgs {
  LoraRows rows;
  Stream y;
  FactorArgs f;
  LoraRng drop;
  float scale;
  const float* parts;
  float* sum;
  int splits;
  int column_blocks, row_blocks;
};

// A block is 16 MT rows of a tile and 64 columns for each warp.
template <bool WIDE, class F, class Y, int MT>
__global__ void __launch_bounds__(32 * warps) lora_expand_kernel(ExpandArgs args) {
  const LoraRows& rows = args.rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = (blockIdx.x % args.column_blocks * warps + warp) * 64;
  const int index = blockIdx.x / args.column_blocks;
  const int first_row = index % args.row_blocks * 16 * MT, tile = index / args.row_blocks;
  const Adapter adapter = adapter_of_tile(rows, tile);
  const int first_slot = tile * rows.block_m + first_row;
  if (adapter.ranks <= 0 || row_at(rows, first_slot) < 0 || column >= args.y.columns) return;

  int mine[MT][2];
  rows_of(rows, tile, first_row, lane, mine);
  int64_t slots[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      slots[i][half] = mine[i][half] < 0 ? -1 : first_slot + 16 * i + 8 * half + lane / 4;
  Update<WIDE, Y, MT> update;  // asked for first: it is what takes long
  update.load(static_cast<const Y*>(args.y.data), args.y.columns, args.y.wide, mine, column, lane);
  const int64_t all = rows.planned ? static_cast<int64_t>(rows.tiles) * rows.block_m : rows.m;
  const Small v = {args.parts, all * rows.r_max, args.splits, rows.r_max, column == 0 ? args.sum : nullptr};
  float c[MT][8][4] = {};
  expand_warp<WIDE, F, Y>(c, v, slots, factor_of<F>(args.f, adapter, 0, args.y.columns), column, lane);
  update.store(static_cast<Y*>(args.y.data), args.y.columns, args.y.wide, mine, column, c, args.scale,
               mask_of(args.drop.rng, args.drop.threshold), lane);
}

// -- wgrad ------------------------------------------------------------------------------------------------------------

struct WgradArgs {
  LoraRows rows;
  Stream u;
  const float* v;
  LoraRng drop;
  float scale;
  void* out;
  Dtype out_type;
  int64_t rank_stride, column_stride, out_size;
  int splits;
  int column_blocks, rank_blocks;
};

// A block is 64 columns, 16 RT ranks of an adapter and a part of its rows, which its warps take 16 at a time.
template <bool WIDE, class U, int RT>
__global__ void __launch_bounds__(32 * warps) lora_wgrad_kernel(WgradArgs args) {
  const LoraRows& rows = args.rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int index = blockIdx.x;
  const int first_rank = index % args.rank_blocks * 16 * RT;
  index /= args.rank_blocks;
  const int column = index % args.column_blocks * 64;
  index /= args.column_blocks;
  const int part = index % args.splits, l = index / args.splits;
  const Adapter adapter = adapter_of(rows, l);
  if (first_rank >= adapter.ranks) return;

  int begin = 0, end = rows.m;
  if (rows.planned) {
    begin = first_tile(rows, l, lane) * rows.block_m;
    end = first_tile(rows, l + 1, lane) * rows.block_m;
  }
  constexpr int stride = 16 * warps;
  const int steps = (end - begin + stride - 1) / stride, chunk = (steps + args.splits - 1) / args.splits * stride;
  begin = least(begin + part * chunk, end);
  end = least(begin + chunk, end);

  const auto* u = static_cast<const U*>(args.u.data);
  const LoraMask mask = mask_of(args.drop.rng, args.drop.threshold);
  float c[RT][8][4] = {};
  // The next step's rows are on their way while one is multiplied, and the numbers of those after it.
  const auto numbers = [&](int slot, int (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = slot + lane % 4 * 4 + i;
      out[i] = at < end ? row_at(rows, at) : -1;
    }
  };
  Wgrad<WIDE, U, RT> now, next;
  begin += 16 * warp;
  numbers(begin, now.rows);
  now.load(u, args.u.columns, args.u.wide, column, args.v, rows.r_max, begin, first_rank, adapter.ranks, lane);
  numbers(begin + stride, next.rows);
#pragma unroll 1
  for (int slot = begin; slot < end; slot += stride) {
    int later[4];
    next.load(u, args.u.columns, args.u.wide, column, args.v, rows.r_max, slot + stride, first_rank, adapter.ranks,
              lane);
    numbers(slot + 2 * stride, later);
    now.multiply(c, column, mask, lane);
    now = next;
#pragma unroll
    for (int i = 0; i < 4; ++i) next.rows[i] = later[i];
  }

  auto* shared = reinterpret_cast<float*>(shared_memory());  // [warps, 16 RT, wgrad_pitch]
  constexpr int size = 16 * RT * wgrad_pitch;
#pragma unroll
  for (int t = 0; t < RT; ++t)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared[warp * size + (16 * t + lane / 4 * 2 + e / 2) * wgrad_pitch + (lane % 4 * 2 + e % 2) * 8 + j] =
            c[t][j][e];
  block_sync();
  for (int i = threadIdx.x; i < 16 * RT * 64; i += 32 * warps) {
    const bool along_ranks = args.rank_stride == 1;  // neighbouring threads write neighbours
    const int rank = along_ranks ? i % (16 * RT) : i / 64, at = along_ranks ? i / (16 * RT) : i % 64;
    if (first_rank + rank >= adapter.ranks || column + at >= args.u.columns) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += shared[w * size + rank * wgrad_pitch + at];
    const int64_t to = part * args.out_size + (adapter.first + first_rank + rank) * args.rank_stride +
                       (column + at) * args.column_stride;
    store_as(args.out, args.out_type, to, args.scale * sum);
  }
}

__global__ void __launch_bounds__(256)
    lora_sum_kernel(const float* parts, int splits, int64_t size, void* out, Dtype out_type) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < splits; ++part) sum += parts[part * size + i];
  store_as(out, out_type, i, sum);
}

// -- decode: shrink and expand of 16 rows by a cluster ----------------------------------------------------------------

struct DecodeArgs {
  LoraRows rows;
  Stream x, y;
  FactorArgs a, b;
  LoraRng drop;
  float t_scale, y_scale;
  float* t;
  int chunk, ld;  // columns of x for a block; width of t in shared memory
};

// A block of the cluster multiplies its share of x's columns, adds up all shares of t in the order of the blocks, and
// expands its share of y's columns. t stays in shared memory.
template <class X, class F>
__global__ void __launch_bounds__(32 * decode_warps) lora_decode_kernel(DecodeArgs args) {
  const LoraRows& rows = args.rows;
  const int tile = blockIdx.x / cluster, block = cluster_rank();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Adapter adapter = adapter_of_tile(rows, tile);
  if (adapter.ranks <= 0) return;  // the whole cluster
  const int size = 16 * args.ld;
  auto* share = reinterpret_cast<float*>(shared_memory());  // [16, ld]
  float* t = share + size;                                  // [16, ld]
  float* staged = t + size;                                 // [decode_warps, 16, 16]

  int mine[1][2];
  rows_of(rows, tile, 0, lane, mine);
  const LoraMask mask = mask_of(args.drop.rng, args.drop.threshold);
  const int begin = block * args.chunk, end = least(begin + args.chunk, args.x.columns);
  for (int rank = 0; rank < adapter.ranks; rank += 16) {
    float c[1][2][4] = {};
    shrink_warp<false>(c, static_cast<const X*>(args.x.data), args.x.columns, args.x.wide, mine,
                       factor_of<F>(args.a, adapter, rank, args.x.columns), mask, begin + 32 * warp, end,
                       32 * decode_warps, lane);
    stage(staged + warp * 256, c, lane);
    block_sync();
    const int row = threadIdx.x / 16, at = rank + threadIdx.x % 16;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < decode_warps; ++w) sum += staged[w * 256 + threadIdx.x];
    if (at < args.ld) share[row * args.ld + at] = sum;
    block_sync();
  }
  cluster_sync();
  for (int i = threadIdx.x; i < size; i += 32 * decode_warps) {
    const int row = i / args.ld, rank = i % args.ld;
    if (rank >= adapter.ranks) continue;
    float sum = 0;
#pragma unroll
    for (int peer = 0; peer < cluster; ++peer) sum += cluster_peer(share, peer)[i];
    t[i] = sum *= args.t_scale * adapter.scale;
    if (args.t != nullptr && block == 0 && row_at(rows, tile * rows.block_m + row) >= 0)
      args.t[(static_cast<int64_t>(tile) * rows.block_m + row) * rows.r_max + rank] = sum;
  }
  cluster_sync();  // t is complete, and no block leaves before its peers have read its share

  const Small v = {t, 0, 1, args.ld, nullptr};
  int64_t slots[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) slots[0][half] = mine[0][half] < 0 ? -1 : 8 * half + lane / 4;
  for (int column = (block * decode_warps + warp) * 64; column < args.y.columns;
       column += cluster * decode_warps * 64) {
    Update<false, X, 1> update;
    update.load(static_cast<const X*>(args.y.data), args.y.columns, args.y.wide, mine, column, lane);
    float c[1][8][4] = {};
    expand_warp<false, F, X>(c, v, slots, factor_of<F>(args.b, adapter, 0, args.y.columns), column, lane);
    update.store(static_cast<X*>(args.y.data), args.y.columns, args.y.wide, mine, column, c, args.y_scale, {}, lane);
  }
}

// -- launching --------------------------------------------------------------------------------------------------------

int64_t bytes_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

Stream stream_args(const LoraStream& u) { return {u.data, u.columns, u.columns % 8 == 0 && aligned16(u.data)}; }

FactorArgs factor_args(const LoraFactor<const void>& f, int columns, int ranks) {
  Along along = Along::neither;
  if (f.column_stride == 1 && f.rank_stride % 8 == 0 && columns % 8 == 0 && aligned16(f.data))
    along = Along::columns;
  else if (f.rank_stride == 1 && f.column_stride % 4 == 0 && ranks % 4 == 0 &&
           reinterpret_cast<uintptr_t>(f.data) % (4 * bytes_of(f.type)) == 0)
    along = Along::ranks;
  return {f.data, f.rank_stride, f.column_stride, along};
}

// f(U{}, F{}): the streamed type with itself or with fp32.
template <class Call>
cudaError_t switch_types(Dtype streamed, Dtype factor, Call&& call) {
  if (factor != streamed && factor != Dtype::f32) return cudaErrorInvalidValue;
  return switch_dtype(streamed, [&](auto u) { return factor == streamed ? call(u, u) : call(u, float{}); });
}

// Large blocks want vectors; everything else is taken 16 rows at a time.
bool vectors(const Stream& u, const FactorArgs& f) { return u.wide && f.along != Along::neither; }

// Rows of a large block of shrink, as many as registers hold, and ranks of any.
int shrink_rows(const LoraRows& rows, Dtype type) { return rows.block_m <= 16 ? 16 : type == Dtype::f32 ? 32 : 64; }
int ranks_at_once(const LoraRows& rows) { return rows.r_max <= 16 ? 16 : 32; }

// All grids have one dimension.
template <class... P, class Args>
cudaError_t launch_blocks(void (*kernel)(P...), int64_t blocks, size_t shared_floats, cudaStream_t stream,
                          const Args& args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps), shared_floats * sizeof(float), stream,
                args);
}

template <bool WIDE, class U, class F, int MT, int NT>
cudaError_t launch_shrink(ShrinkArgs args, cudaStream_t stream) {
  args.row_blocks = ceil_div(args.rows.block_m, 16 * MT);
  const int64_t blocks = static_cast<int64_t>(args.rows.tiles) * args.row_blocks * args.splits * args.rank_blocks;
  return launch_blocks(lora_shrink_kernel<WIDE, U, F, MT, NT>, blocks, warps * 16 * MT * 8 * NT, stream, args);
}

template <bool WIDE, class F, class Y, int MT>
cudaError_t launch_expand(ExpandArgs args, cudaStream_t stream) {
  args.row_blocks = ceil_div(args.rows.block_m, 16 * MT);
  const int64_t blocks = static_cast<int64_t>(args.rows.tiles) * args.row_blocks * args.column_blocks;
  return launch_blocks(lora_expand_kernel<WIDE, F, Y, MT>, blocks, 0, stream, args);
}

// Of one adapter: smaller tiles waste fewer rows, and clusters make one launch of two.
constexpr int64_t few_rows = 64;
constexpr int max_decode_rows = 1024, max_decode_ranks = 256;  // t and its share in 48 KB of shared memory

int decode_pitch(const LoraRows& rows) { return (rows.r_max + 3) / 4 * 4; }

// f(kernel) with the decode kernel for the types.
template <class Call>
auto switch_decode(Dtype x, Dtype factor, Call&& call) {
  return switch_dtype(x, [&](auto u) {
    using X = decltype(u);
    return factor == x ? call(lora_decode_kernel<X, X>) : call(lora_decode_kernel<X, float>);
  });
}

}  // namespace

int lora_block_m(int64_t m) { return m <= few_rows ? 16 : 64; }

int lora_shrink_splits(const LoraRows& rows, const LoraStream& u) {
  const int64_t blocks = static_cast<int64_t>(rows.tiles) * ceil_div(rows.block_m, shrink_rows(rows, u.type)) *
                         ceil_div(rows.r_max, ranks_at_once(rows));
  const int64_t wanted = std::min<int64_t>(blocks_wanted / std::max<int64_t>(blocks, 1), u.columns / 256);
  const int chunk = ceil_div(u.columns, std::clamp<int64_t>(wanted, 1, 16));
  return std::max<int>(1, ceil_div(u.columns, std::max<int>(1, ceil_div(chunk, 32) * 32)));
}

cudaError_t lora_shrink_cuda(const LoraRows& rows, const LoraStream& u, const LoraFactor<const void>& f, float scale,
                             const LoraRng& drop, float* parts, int splits, cudaStream_t stream) {
  ShrinkArgs args = {};
  args.rows = rows, args.u = stream_args(u), args.f = factor_args(f, u.columns, rows.r_max);
  args.drop = drop, args.scale = scale, args.parts = parts;
  args.splits = splits, args.chunk = ceil_div(ceil_div(u.columns, splits), 32) * 32;
  args.rank_blocks = ceil_div(rows.r_max, ranks_at_once(rows));
  return switch_types(u.type, f.type, [&](auto ut, auto ft) {
    using U = decltype(ut);
    using F = decltype(ft);
    constexpr int most = sizeof(U) == 4 ? 2 : 4;
    const bool narrow = ranks_at_once(rows) == 16;
    if (rows.block_m > 16 && vectors(args.u, args.f))
      return narrow ? launch_shrink<true, U, F, most, 2>(args, stream)
                    : launch_shrink<true, U, F, most, 4>(args, stream);
    return narrow ? launch_shrink<false, U, F, 1, 2>(args, stream) : launch_shrink<false, U, F, 1, 4>(args, stream);
  });
}

cudaError_t lora_expand_cuda(const LoraRows& rows, const LoraStream& y, const LoraFactor<const void>& f, float scale,
                             const LoraRng& drop, const float* parts, int splits, float* sum, cudaStream_t stream) {
  ExpandArgs args = {};
  args.rows = rows, args.y = stream_args(y), args.f = factor_args(f, y.columns, rows.r_max);
  args.drop = drop, args.scale = scale, args.parts = parts, args.splits = splits, args.sum = sum;
  args.column_blocks = ceil_div(y.columns, 64 * warps);
  return switch_types(y.type, f.type, [&](auto yt, auto ft) {
    using Y = decltype(yt);
    using F = decltype(ft);
    if (rows.block_m > 16 && vectors(args.y, args.f)) return launch_expand<true, F, Y, 2>(args, stream);
    return launch_expand<false, F, Y, 1>(args, stream);
  });
}

int lora_wgrad_splits(const LoraRows& rows, const LoraStream& u) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(u.columns, 64)) * ceil_div(rows.r_max, ranks_at_once(rows)) *
                         (rows.planned ? rows.adapters : 1);
  const int64_t wanted = 2 * blocks_wanted / std::max<int64_t>(blocks, 1);
  return static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(wanted, rows.m / 256), 1, 32));
}

cudaError_t lora_wgrad_cuda(const LoraRows& rows, const LoraStream& u, const float* v, float scale, const LoraRng& drop,
                            const LoraFactor<void>& out, int64_t out_size, float* partial, int splits,
                            cudaStream_t stream) {
  const bool split = splits > 1;
  WgradArgs args = {};
  args.rows = rows, args.u = stream_args(u), args.v = v, args.drop = drop, args.scale = scale;
  args.out = split ? partial : out.data, args.out_type = split ? Dtype::f32 : out.type;
  args.rank_stride = out.rank_stride, args.column_stride = out.column_stride, args.out_size = out_size;
  args.splits = splits, args.column_blocks = ceil_div(u.columns, 64);
  const auto go = [&](auto kernel, int ranks) {
    args.rank_blocks = ceil_div(rows.r_max, ranks);
    const int64_t blocks =
        static_cast<int64_t>(rows.planned ? rows.adapters : 1) * splits * args.column_blocks * args.rank_blocks;
    return launch_blocks(kernel, blocks, warps * ranks * wgrad_pitch, stream, args);
  };
  const cudaError_t code = switch_dtype(u.type, [&](auto ut) {
    using U = decltype(ut);
    if (!args.u.wide) return go(lora_wgrad_kernel<false, U, 1>, 16);
    return ranks_at_once(rows) == 16 ? go(lora_wgrad_kernel<true, U, 1>, 16) : go(lora_wgrad_kernel<true, U, 2>, 32);
  });
  if (code != cudaSuccess || !split) return code;
  return lora_sum_cuda(partial, splits, out_size, out.data, out.type, stream);
}

cudaError_t lora_sum_cuda(const float* parts, int splits, int64_t size, void* out, Dtype out_type,
                          cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return launch(lora_sum_kernel, dim3(ceil_div(size, 256)), dim3(256), 0, stream, parts, splits, size, out, out_type);
}

bool lora_can_decode(const LoraRows& rows, const LoraStream& x, const LoraStream& y, Dtype factors) {
  const bool shapes =
      rows.block_m == 16 && rows.m <= (rows.planned ? max_decode_rows : few_rows) && rows.r_max <= max_decode_ranks;
  if (!shapes || x.type != y.type || (factors != x.type && factors != Dtype::f32)) return false;
  return switch_decode(x.type, factors, [](auto kernel) { return can_cluster(kernel); });
}

cudaError_t lora_decode_cuda(const LoraRows& rows, const LoraStream& x, const LoraStream& y,
                             const LoraFactor<const void>& a, const LoraFactor<const void>& b, float t_scale,
                             float y_scale, const LoraRng& drop, float* t, cudaStream_t stream) {
  if (rows.tiles == 0) return cudaSuccess;
  const int ld = decode_pitch(rows);
  DecodeArgs args = {};
  args.rows = rows, args.x = stream_args(x), args.y = stream_args(y);
  args.a = factor_args(a, x.columns, rows.r_max), args.b = factor_args(b, y.columns, rows.r_max);
  args.drop = drop, args.t_scale = t_scale, args.y_scale = y_scale, args.t = t, args.ld = ld;
  args.chunk = ceil_div(ceil_div(x.columns, cluster), 32) * 32;
  const size_t shared = (2 * 16 * ld + decode_warps * 256) * sizeof(float);
  return switch_decode(x.type, a.type, [&](auto kernel) {
    return launch_cluster(kernel, cluster, dim3(rows.tiles * cluster), dim3(32 * decode_warps), shared, stream, args);
  });
}

}  // namespace pk
