// The k largest of many tensors on CUDA: their threshold by a radix search, their positions by prefix sums.
#include <algorithm>
#include <climits>
#include <cmath>

#include "common/eight.cuh"
#include "sparse/sparse.cuh"

namespace pk {
namespace {

constexpr int threads = 256, warps = threads / 32;
constexpr int chunk = 8192;        // scores of a tensor that a block reads at a time, 8 for a thread
constexpr int bins = 2048;         // 11 bits of a score in the first two rounds, 10 in the last
constexpr int most_blocks = 1056;  // eight for each SM of an H100
constexpr int scan_threads = 1024;

// The tensors of a launch. Chunks and scores are numbered through all tensors, those of other launches too.
struct Table {
  ScoresCuda scores[scores_of_launch];
  int64_t first_score[scores_of_launch];
  int64_t first_chunk[scores_of_launch + 1];
  int tensors;
};

struct Chunk {
  ScoresCuda scores;
  int64_t begin, position;  // of its first score, in the tensor and among all
  int size;
};

__device__ inline Chunk chunk_of(const Table& table, int64_t number) {
  int low = 0, high = table.tensors;  // the last tensor that does not begin behind it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= number)
      low = middle;
    else
      high = middle;
  }
  const ScoresCuda& scores = table.scores[low];
  const int64_t begin = (number - table.first_chunk[low]) * chunk, left = scores.numel - begin;
  return {scores, begin, table.first_score[low] + begin, static_cast<int>(left < chunk ? left : chunk)};
}

// What f(eight scores, how many of them there are) does for those from `at` on, of one type.
template <class T, class F>
__device__ inline void with_eight(const Chunk& c, int at, F&& f) {
  const T* from = static_cast<const T*>(c.scores.data) + c.begin + at;
  const int left = c.size - at;
  const bool wide = left >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const Eight<T> eight = load_eight<false>(from, 1, left, wide);
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = get(eight, i);
  f(v, left);
}

template <class F>
__device__ inline void each_eight(const Chunk& c, F&& f) {
  const int first = static_cast<int>(threadIdx.x) * 8;
#pragma unroll 1
  for (int at = first; at - first < c.size; at += 8 * threads) {  // all threads together
    if (c.scores.type == Dtype::bf16)
      with_eight<bf16>(c, at, f);
    else if (c.scores.type == Dtype::f16)
      with_eight<f16>(c, at, f);
    else
      with_eight<float>(c, at, f);
  }
}

// The sum over the threads of the block before this one, and over all; shared [32].
template <class T>
__device__ inline T sum_before(T x, T* shared, T& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = warp_shuffle(sum, lane - distance);
    if (lane >= distance) sum += other;
  }
  block_sync();  // the last call's sums have been read
  if (lane == 31) shared[warp] = sum;
  block_sync();
  T before = 0;
  total = 0;
  const int count = static_cast<int>(blockDim.x) / 32;
  for (int i = 0; i < count; ++i) {
    before += i < warp ? shared[i] : 0;
    total += shared[i];
  }
  return before + sum - x;
}

// -- threshold --------------------------------------------------------------------------------------------------------

// Whole numbers that order as scores do, -0 as 0.
__device__ inline uint32_t key_of(float x, bool use_abs) {
  const uint32_t bits = bits_of(use_abs ? fabsf(x) : x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct State {
  uint64_t bin[bins];
  uint64_t n_nan, left, above, prefix;  // the left-th largest is sought of those that begin with prefix
};
static_assert(sizeof(State) == topk_state_bytes);

__global__ void __launch_bounds__(threads) topk_start_kernel(State* state, int64_t k) {
  for (int i = threadIdx.x; i < bins; i += threads) state->bin[i] = 0;
  if (threadIdx.x == 0) state->n_nan = state->above = state->prefix = 0, state->left = k < 1 ? 1 : k;
}

// Counts the next bits of the scores that begin with the prefix.
template <int ROUND>
__global__ void __launch_bounds__(threads) topk_count_kernel(Table table, bool use_abs, State* state) {
  constexpr int shift = ROUND == 0 ? 21 : ROUND == 1 ? 10 : 0;
  auto* bin = reinterpret_cast<uint32_t*>(shared_memory());  // [bins], and the number of NaN
  for (int i = threadIdx.x; i <= bins; i += threads) bin[i] = 0;
  const auto prefix = ROUND == 0 ? 0 : static_cast<uint32_t>(state->prefix);
  block_sync();
  const int64_t end = table.first_chunk[table.tensors];
  for (int64_t number = table.first_chunk[0] + blockIdx.x; number < end; number += gridDim.x)
    each_eight(chunk_of(table, number), [&](const float (&v)[8], int left) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i >= left) continue;
        if (v[i] != v[i]) {
          if (ROUND == 0) count(bin + bins, 1u);
          continue;
        }
        const uint32_t key = key_of(v[i], use_abs);
        if constexpr (ROUND == 0)
          count(bin + (key >> shift), 1u);
        else if (key >> (ROUND == 1 ? 21 : 10) == prefix)
          count(bin + (key >> shift & (ROUND == 1 ? 0x7ffu : 0x3ffu)), 1u);
      }
    });
  block_sync();
  for (int i = threadIdx.x; i <= bins; i += threads)
    if (bin[i] != 0) count(i < bins ? state->bin + i : &state->n_nan, uint64_t{bin[i]});
}

// One block adds up the bins, the highest first, up to the one that has the score sought; LAST: of the rounds, after
// which `bits` bits of a key are known.
template <int ROUND>
__global__ void __launch_bounds__(threads)
    topk_choose_kernel(State* state, bool last, float* threshold, int64_t* n_above, int64_t* n_nan) {
  constexpr int each = bins / threads, bits = ROUND == 2 ? 10 : 11;
  uint64_t mine[each], sum = 0, total;
  const int highest = bins - 1 - static_cast<int>(threadIdx.x) * each;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    mine[i] = state->bin[highest - i];
    state->bin[highest - i] = 0;
    sum += mine[i];
  }
  const uint64_t left = state->left, prefix = state->prefix;
  uint64_t before = sum_before(sum, reinterpret_cast<uint64_t*>(shared_memory()), total);
  // Without scores, or with NaN among them, it may be in no bin: take that of 0.
  int found = total < left && threadIdx.x == 0 ? (ROUND == 0 ? bins / 2 : 0) : -1;
  uint64_t larger = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (before < left && left <= before + mine[i]) found = highest - i, larger = before;
    before += mine[i];
  }
  if (found < 0) return;
  const uint64_t next = prefix << bits | static_cast<uint64_t>(found);
  state->prefix = next, state->left = left - larger;
  const uint64_t above = state->above += larger;
  if (!last) return;
  // The lowest bits of a number of 16 bits are zeros, which a negative one has inverted.
  const uint64_t key = ROUND == 2 ? next : next << 10 | (next >> 21 ? 0 : 0x3ff);
  *threshold = score_of(static_cast<uint32_t>(key));
  *n_above = static_cast<int64_t>(above), *n_nan = static_cast<int64_t>(state->n_nan);
}

// -- positions --------------------------------------------------------------------------------------------------------

// ScoresCuda above the threshold, and 2^16 times those that equal it: of a chunk both fit.
__device__ inline uint32_t compared(float x, bool use_abs, float threshold) {
  x = use_abs ? fabsf(x) : x;
  return (x > threshold ? 1u : 0u) | (x == threshold ? 0x10000u : 0u);
}

__global__ void __launch_bounds__(threads)
    topk_chunks_kernel(Table table, const float* threshold, bool use_abs, uint32_t* counts) {
  const int64_t number = table.first_chunk[0] + blockIdx.x;
  const float middle = *threshold;
  uint32_t sum = 0, total;
  each_eight(chunk_of(table, number), [&](const float (&v)[8], int left) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) sum += compared(v[i], use_abs, middle);
  });
  sum_before(sum, reinterpret_cast<uint32_t*>(shared_memory()), total);
  if (threadIdx.x == 0) counts[2 * number] = total & 0xffffu, counts[2 * number + 1] = total >> 16;
}

__device__ inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Of those that equal the threshold, so many are taken.
__device__ inline int64_t wanted_ties(int64_t k, int64_t above) { return above < k ? k - above : 0; }

// One block: counts [chunks, 2] to their sums before each chunk, and over all at the end.
__global__ void __launch_bounds__(scan_threads)
    topk_before_kernel(const uint32_t* counts, int64_t chunks, int64_t k, int64_t* before, int64_t* positions,
                       int64_t* count) {
  auto* shared = reinterpret_cast<int64_t*>(shared_memory());
  int64_t above = 0, ties = 0;
  for (int64_t first = 0; first < chunks; first += scan_threads) {
    const int64_t number = first + threadIdx.x;
    const bool real = number < chunks;
    int64_t all_above, all_ties;
    const int64_t my_above = sum_before(int64_t{real ? counts[2 * number] : 0}, shared, all_above);
    const int64_t my_ties = sum_before(int64_t{real ? counts[2 * number + 1] : 0}, shared, all_ties);
    if (real) before[2 * number] = above + my_above, before[2 * number + 1] = ties + my_ties;
    above += all_above, ties += all_ties;
  }
  const int64_t chosen = above + lesser(ties, wanted_ties(k, above));
  if (threadIdx.x == 0) before[2 * chunks] = above, before[2 * chunks + 1] = ties, *count = chosen;
  for (int64_t i = chosen + threadIdx.x; i < k; i += scan_threads) positions[i] = -1;
}

__global__ void __launch_bounds__(threads)
    topk_positions_kernel(Table table, const float* threshold, bool use_abs, int64_t k, const int64_t* before,
                          int64_t chunks, int64_t* positions) {
  const int64_t number = table.first_chunk[0] + blockIdx.x;
  const int64_t wanted = wanted_ties(k, before[2 * chunks]);
  int64_t above = before[2 * number], ties = before[2 * number + 1];
  const int64_t first = above + lesser(ties, wanted);
  if (first >= k || first == before[2 * number + 2] + lesser(before[2 * number + 3], wanted)) return;  // none is here
  const float middle = *threshold;
  const Chunk c = chunk_of(table, number);
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  int at = static_cast<int>(threadIdx.x) * 8;
  each_eight(c, [&](const float (&v)[8], int left) {
    uint32_t sum = 0, total;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) sum += compared(v[i], use_abs, middle);
    const uint32_t mine = sum_before(sum, shared, total);
    int64_t my_above = above + (mine & 0xffffu), my_ties = ties + (mine >> 16);
    if (sum != 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i >= left) continue;
        const uint32_t is = compared(v[i], use_abs, middle);
        const int64_t to = my_above + lesser(my_ties, wanted);
        if ((is == 1 || (is != 0 && my_ties < wanted)) && to < k) positions[to] = c.position + at + i;
        my_above += is & 1, my_ties += is >> 16;
      }
    }
    above += total & 0xffffu, ties += total >> 16;
    at += 8 * threads;
  });
}

// -- launching --------------------------------------------------------------------------------------------------------

int64_t chunks_of(const ScoresCuda& s) { return (s.numel + chunk - 1) / chunk; }

// f(table, its chunks) for the tensors, so many at a time.
template <class F>
cudaError_t each_table(const ScoresCuda* scores, int64_t tensors, F&& f) {
  int64_t first_chunk = 0, first_score = 0;
  for (int64_t first = 0; first < tensors; first += scores_of_launch) {
    Table table = {};
    table.tensors = static_cast<int>(std::min<int64_t>(tensors - first, scores_of_launch));
    const int64_t begin = first_chunk;
    for (int i = 0; i < table.tensors; ++i) {
      table.scores[i] = scores[first + i];
      table.first_chunk[i] = first_chunk, table.first_score[i] = first_score;
      first_chunk += chunks_of(scores[first + i]), first_score += scores[first + i].numel;
    }
    table.first_chunk[table.tensors] = first_chunk;
    if (first_chunk == begin) continue;
    if (first_chunk - begin > INT_MAX) return cudaErrorInvalidValue;
    const cudaError_t done = f(table, first_chunk - begin);
    if (done != cudaSuccess) return done;
  }
  return cudaSuccess;
}

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

template <int ROUND>
cudaError_t search(const ScoresCuda* scores, int64_t tensors, bool use_abs, State* state, bool last, float* threshold,
                   int64_t* n_above, int64_t* n_nan, cudaStream_t stream) {
  const cudaError_t done = each_table(scores, tensors, [&](const Table& table, int64_t chunks) {
    return launch(topk_count_kernel<ROUND>, grid_of(std::min<int64_t>(chunks, most_blocks)), dim3(threads),
                  (bins + 1) * sizeof(uint32_t), stream, table, use_abs, state);
  });
  if (done != cudaSuccess) return done;
  return launch(topk_choose_kernel<ROUND>, dim3(1), dim3(threads), warps * sizeof(uint64_t), stream, state, last,
                threshold, n_above, n_nan);
}

}  // namespace

cudaError_t topk_threshold_cuda(const ScoresCuda* scores, int64_t tensors, int64_t k, bool use_abs, void* scratch,
                                float* threshold, int64_t* n_above, int64_t* n_nan, cudaStream_t stream) {
  auto* state = static_cast<State*>(scratch);
  const bool wide = std::any_of(scores, scores + tensors, [](const ScoresCuda& s) { return s.type == Dtype::f32; });
  cudaError_t done = launch(topk_start_kernel, dim3(1), dim3(threads), 0, stream, state, k);
  if (done == cudaSuccess) done = search<0>(scores, tensors, use_abs, state, false, threshold, n_above, n_nan, stream);
  if (done == cudaSuccess) done = search<1>(scores, tensors, use_abs, state, !wide, threshold, n_above, n_nan, stream);
  if (done == cudaSuccess && wide)
    done = search<2>(scores, tensors, use_abs, state, true, threshold, n_above, n_nan, stream);
  return done;
}

int64_t topk_chunks(const ScoresCuda* scores, int64_t tensors) {
  int64_t sum = 0;
  for (int64_t i = 0; i < tensors; ++i) sum += chunks_of(scores[i]);
  return sum;
}

cudaError_t topk_compact_cuda(const ScoresCuda* scores, int64_t tensors, const float* threshold, int64_t k,
                              bool use_abs, uint32_t* counts, int64_t* before, int64_t* positions, int64_t* count,
                              cudaStream_t stream) {
  const int64_t all = topk_chunks(scores, tensors);
  cudaError_t done = each_table(scores, tensors, [&](const Table& table, int64_t chunks) {
    return launch(topk_chunks_kernel, grid_of(chunks), dim3(threads), warps * sizeof(uint32_t), stream, table,
                  threshold, use_abs, counts);
  });
  if (done != cudaSuccess) return done;
  done = launch(topk_before_kernel, dim3(1), dim3(scan_threads), scan_threads / 32 * sizeof(int64_t), stream, counts,
                all, k, before, positions, count);
  if (done != cudaSuccess) return done;
  return each_table(scores, tensors, [&](const Table& table, int64_t chunks) {
    return launch(topk_positions_kernel, grid_of(chunks), dim3(threads), warps * sizeof(uint32_t), stream, table,
                  threshold, use_abs, k, before, all, positions);
  });
}

}  // namespace pk
