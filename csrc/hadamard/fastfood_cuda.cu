// Fastfood on CUDA, on top of the transforms of hadamard_tile.cuh. README.md has the formulas.
#include <cmath>

#include "hadamard/hadamard_tile.cuh"

namespace pk {
namespace {

using namespace hadamard;

// -- where the transform over all numbers begins ----------------------------------------------------------------------

// What Fastfood has for each of n places, n a power of two: a number of a table of k, and a factor.
struct State {
  const void *places, *g;
  bool wide_places, fixed_point;
  bool vectors;  // n is a multiple of 4, and both are aligned to as many of them
  int n, k;

  template <class V, class T>
  __device__ Pack<V, 4> four(const T* from, int at) const {
    Pack<V, 4> out = {};
    if (vectors) {
      const auto pack = load_pack<4>(from + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) out.lane[i] = static_cast<V>(pack.lane[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at + i < n) out.lane[i] = static_cast<V>(from[at + i]);
    }
    return out;
  }

  // Of four places in a row, below k whatever is there.
  __device__ Pack<int, 4> numbers(int at) const {
    auto out = wide_places ? four<int>(static_cast<const int32_t*>(places), at)
                           : four<int>(static_cast<const int16_t*>(places), at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.lane[i] &= k - 1;
    return out;
  }

  __device__ Pack<float, 4> factors(int at) const {
    if (!fixed_point) return four<float>(static_cast<const float*>(g), at);
    auto out = four<float>(static_cast<const int16_t*>(g), at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.lane[i] *= 1.0f / 4096;
    return out;
  }
};

// g_i table[place_i] of one row; zeros beyond n. The table goes through shared memory if it has room, where random
// places of a warp meet in a bank three or four times.
struct Gathered {
  static constexpr int lanes = 4;
  State state;
  const float* table;

  template <class Layout, int M, class Where>
  __device__ void load(const Where& where, float (&v)[mine], char* shared) const {
    const int base = Layout::base(static_cast<int>(threadIdx.x));
    const bool here = state.k <= 1 << M;
    auto* copy = reinterpret_cast<float*>(shared);
    if (here) {
      for (int i = static_cast<int>(threadIdx.x); i < state.k; i += threads_of<M>) copy[i] = table[i];
      block_sync();
    }
#pragma unroll
    for (int i = 0; i < mine; i += 4) {
      const Place p = where(base | Layout::at(i));
      Pack<int, 4> number = {};
      Pack<float, 4> factor = {};
      if (p.row == 0 && p.at < state.n) number = state.numbers(p.at), factor = state.factors(p.at);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = factor.lane[j] * (here ? copy : table)[number.lane[j]];
    }
    if (here) block_sync();  // others read until here what the exchanges will overwrite
  }
};

// -- where that of the gradient ends ----------------------------------------------------------------------------------

__device__ inline float power_of_two(int exponent) { return float_of(static_cast<uint32_t>(127 + exponent) << 23); }

// parts [tiles, k]: the sums of the tile's g_i v_i by number_i. They are made of whole numbers, so that their order is
// of no account: of v / 2^e, with 2^e above the largest in the tile, 30 - M bits, and 31 - M of what that leaves. Both
// fit 32 bits if all of the tile have one number; what is lost is less than 2^-30 of the largest.
struct Binned {
  static constexpr int lanes = 4;
  template <int M>
  static constexpr int shared_bytes = bin_bytes<M>;

  State state;
  float* parts;

  template <class Layout, int M, class Where>
  __device__ void store(const Where& where, float (&v)[mine], char* shared) const {
    constexpr int threads = threads_of<M>, bits = 30 - M, finer = bits + 1, room = bins_of<M>;
    const int thread = static_cast<int>(threadIdx.x), base = Layout::base(thread);
    auto* coarse = reinterpret_cast<uint32_t*>(shared + tile_bytes<M>);
    auto* fine = coarse + room;

    // Values wait in shared memory, each thread's where it has read them.
    float most = 0;
#pragma unroll
    for (int i = 0; i < mine; i += 4) {
      const Place p = where(base | Layout::at(i));
      Pack<float, 4> factor = {};
      if (p.row == 0 && p.at < state.n) factor = state.factors(p.at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // What is beyond n is of no sum, NaN or not.
        const float value = p.row == 0 && p.at + j < state.n ? v[i + j] * factor.lane[j] : 0.0f;
        *reinterpret_cast<float*>(shared + offset(base) + offset(Layout::at(i + j))) = value;
        most = fmaxf(most, fabsf(value) < INFINITY ? fabsf(value) : INFINITY);  // NaN too
      }
    }
    most = warp_max(most);
    if (thread % 32 == 0) coarse[thread / 32] = bits_of(most);
    block_sync();
    for (int warp = 0; warp < threads / 32; ++warp) most = fmaxf(most, float_of(coarse[warp]));
    block_sync();

    // 2^exponent > most; of the smallest, what is below 2^-144 is lost
    constexpr int least = bits - 126;
    const int found = static_cast<int>(bits_of(most) >> 23) - 126, exponent = found < least ? least : found;
    const float scale = power_of_two(bits - exponent), back = power_of_two(exponent - bits);
#pragma unroll 1
    for (int begin = 0; begin < state.k; begin += room) {
      for (int i = thread; i < 2 * room; i += threads) coarse[i] = 0;
      block_sync();
      if (most < INFINITY) {
#pragma unroll 1
        for (int i = 0; i < mine; i += 4) {
          const Place p = where(base | Layout::at(i));
          Pack<int, 4> number = {};
          if (p.row == 0 && p.at < state.n) number = state.numbers(p.at);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float value =
                *reinterpret_cast<const float*>(shared + offset(base) + offset(Layout::at(i + j))) * scale;
            const float whole = rintf(value), rest = rintf((value - whole) * (1 << finer));
            const auto bin = static_cast<uint32_t>(number.lane[j] - begin);
            if (bin < room && value != 0) {
              count(coarse + bin, static_cast<uint32_t>(static_cast<int32_t>(whole)));
              count(fine + bin, static_cast<uint32_t>(static_cast<int32_t>(rest)));
            }
          }
        }
      }
      block_sync();
      for (int i = thread; i < room && begin + i < state.k; i += threads) {
        const int64_t sum =
            static_cast<int64_t>(static_cast<int32_t>(coarse[i])) * (1 << finer) + static_cast<int32_t>(fine[i]);
        parts[static_cast<int64_t>(blockIdx.x) * state.k + begin + i] =
            most < INFINITY ? static_cast<float>(sum) * power_of_two(-finer) * back : NAN;
      }
      block_sync();
    }
  }
};

constexpr int sum_threads = 128, sum_parts = 32;

// sums [ceil(parts / 32), k] of parts [parts, k], in order
__global__ void __launch_bounds__(sum_threads)
    hadamard_sum_kernel(const float* parts, int64_t count, int k, float* sums) {
  const int64_t blocks = (k + sum_threads - 1) / sum_threads, group = blockIdx.x / blocks;
  const auto i = static_cast<int64_t>(blockIdx.x % blocks) * sum_threads + threadIdx.x;
  if (i >= k) return;
  const int64_t first = group * sum_parts, last = first + sum_parts < count ? first + sum_parts : count;
  float sum = 0;
  for (int64_t part = first; part < last; ++part) sum += parts[part * k + i];
  sums[group * k + i] = sum;
}

// -- passes -----------------------------------------------------------------------------------------------------------

// A table of k should fit a tile.
Plan plan_of_fastfood(int levels, int64_t k) {
  if (levels <= least_tile) return one_pass(levels);
  return many_passes(levels, k > 1 << least_tile && levels > 14 ? 14 : least_tile);
}

int64_t table_size(const FastfoodCuda& f) { return int64_t{1} << levels_of(f.d); }

State state_of(const FastfoodCuda& f) {
  const bool whole = f.n % 4 == 0 && aligned16(static_cast<const char*>(f.places), static_cast<const char*>(f.g));
  return {f.places, f.g, f.wide_places, f.fixed_point, whole, static_cast<int>(f.n), static_cast<int>(table_size(f))};
}

Plan plan_of(const FastfoodCuda& f) { return plan_of_fastfood(levels_of(f.n), table_size(f)); }

// Scratch of a table, in whole vectors.
int64_t table_room(const FastfoodCuda& f) { return std::max<int64_t>(table_size(f), 4); }

// Room for what is left of `count` parts, after the first sum of 32, the second and so on.
int64_t sums_room(int64_t count, int64_t k) {
  int64_t room = 0;
  for (; count > 1; room += count * k) count = ceil_div(count, sum_parts);
  return room;
}

}  // namespace

int64_t fastfood_room(const FastfoodCuda& f, Dtype out_type) {
  const int64_t held = plan_of(f).held(f.numel);
  return table_room(f) + (out_type == Dtype::f32 && held == f.numel ? 0 : held);
}

cudaError_t fastfood_cuda(const FastfoodCuda& f, Dtype theta_type, const void* theta, float scale, Dtype out_type,
                          const void* base, void* out, float* room, cudaStream_t stream) {
  if (f.numel == 0) return cudaSuccess;
  const int64_t k = table_size(f);
  float* table = room;
  room += table_room(f);
  const cudaError_t code = transform_theta(theta_type, theta, f.sign, f.d, table, k, stream);
  if (code != cudaSuccess) return code;
  const Plan plan = plan_of(f);
  const int64_t held = plan.held(f.numel);
  return switch_dtype(out_type, [&](auto t) {
    using T = decltype(t);
    if (std::is_same_v<T, float> && held == f.numel) room = static_cast<float*>(out);
    const Gathered source = {state_of(f), table};
    const auto sink = written_to<T>(out, base, scale, 1, f.numel);
    if (plan.passes == 1) return in_one<smallest_tile>(plan, 1, source, sink, stream);
    const Held between = {room, 1, held};
    cudaError_t done = along_columns(plan, plan.passes - 1, plan.tiles(), 1, source, between.sink(), stream);
    if (done == cudaSuccess) done = second_pass(plan, 1, between, stream);
    if (done != cudaSuccess) return done;
    return along_rows(plan, held >> plan.tile, 1, between.source(), sink, stream);
  });
}

int64_t fastfood_backward_room(const FastfoodCuda& f) {
  const Plan plan = plan_of(f);
  const int64_t parts = plan.passes == 1 ? 1 : plan.tiles(), k = table_size(f);
  return plan.held(f.numel) + parts * k + sums_room(parts, k) + 2 * table_room(f);
}

cudaError_t fastfood_backward_cuda(const FastfoodCuda& f, Dtype type, const void* dy, float scale, float* dtheta,
                                   float* room, cudaStream_t stream) {
  if (f.d == 0) return cudaSuccess;
  const Plan plan = plan_of(f);
  const int64_t held = plan.held(f.numel), k = table_size(f);
  int64_t count = plan.passes == 1 ? 1 : plan.tiles();
  float* parts = room + held;
  const Binned sink = {state_of(f), parts};
  cudaError_t code;
  if (plan.passes == 1) {
    code = switch_dtype(type, [&](auto t) {
      return in_one<smallest_tile>(plan, 1, numbers_of<decltype(t)>(dy, nullptr, 1, f.numel), sink, stream);
    });
  } else {
    const Held between = {room, 1, held};
    code = first_passes(plan, type, dy, 1, f.numel, between, stream);
    if (code == cudaSuccess)
      code = along_columns(plan, plan.passes - 1, plan.tiles(), 1, between.source(), sink, stream);
  }
  while (code == cudaSuccess && count > 1) {
    float* sums = parts + count * k;
    const int64_t left = ceil_div(count, sum_parts);
    code = launch(hadamard_sum_kernel, static_cast<unsigned>(left * ceil_div(k, sum_threads)), sum_threads, 0, stream,
                  static_cast<const float*>(parts), count, static_cast<int>(k), sums);
    parts = sums, count = left;
  }
  return code == cudaSuccess ? transform_sums(parts, k, f.sign, scale, dtheta, f.d, stream) : code;
}

}  // namespace pk
