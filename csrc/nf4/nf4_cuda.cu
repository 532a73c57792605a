// Quantise and dequantise on CUDA. README.md has the format.
#include <climits>

#include "nf4/nf4_tile.cuh"

namespace pk {
namespace {

constexpr int threads = 256, warps = threads / 32;

// The scale, as it is stored and what multiplies numbers, of a group of `lanes` lanes; largest: the bits of the largest
// |x| of a lane, where those of numbers that are not finite are above all others.
struct Absmax {
  float stored, reciprocal;
};

__device__ inline Absmax absmax_of(uint32_t largest, int lanes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = warp_shuffle(largest, lane ^ distance);
    if (distance < lanes && other > largest) largest = other;
  }
  constexpr float highest = 3.402823466e38f;
  const float stored = float_of(largest < 0x7f800000u ? largest : 0x7fc00000u), reciprocal = 1.0f / stored;
  return {stored, reciprocal > highest ? highest : reciprocal};
}

__device__ inline uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

// -- quantise ---------------------------------------------------------------------------------------------------------

// A warp has 256 weights, or a block if that is larger, 8 for a lane at a time. WIDE: numel is a multiple of 8.
template <bool WIDE, class T>
__global__ void __launch_bounds__(threads)
    nf4_quantize_kernel(const T* w, int64_t numel, int shift, uint8_t* bytes, float* absmax) {
  const int lane = threadIdx.x % 32, size = 1 << shift, lanes = size < 256 ? size / 8 : 32;
  const int piece = size < 256 ? 256 : size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32) * piece;
  if (first >= numel) return;
  const auto eight = [&](int64_t at) {
    return load_eight<WIDE>(w + at, 1, static_cast<int>(numel - at < 8 ? numel - at : 8), WIDE);
  };
  uint32_t largest = 0;
  for (int64_t at = first + 8 * lane; at < first + piece; at += 256) {
    const Eight<T> v = eight(at);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t x = magnitude(get(v, i));
      largest = x > largest ? x : largest;
    }
  }
  const Absmax scale = absmax_of(largest, lanes);
  if (lane % lanes == 0 && first + 8 * lane < numel) absmax[(first + 8 * lane) >> shift] = scale.stored;

  for (int64_t at = first + 8 * lane; at < first + piece; at += 256) {
    const int64_t left = numel - at;
    if (left <= 0) return;
    const Eight<T> v = eight(at);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float y = get(v, i) * scale.reciprocal;
      uint32_t index = 15;  // less one for each midpoint that is not below y: NaN has 15, as bucketize gives
#pragma unroll
      for (int j = 0; j < 15; ++j) index -= y <= 0.5f * (nf4_levels[j] + nf4_levels[j + 1]);
      if (i >= left) index = 7;
      word |= index << (8 * (i / 2) + (i % 2 ? 0 : 4));
    }
    if (left >= 8)
      *reinterpret_cast<uint32_t*>(bytes + at / 2) = word;
    else
      for (int i = 0; 2 * i < left; ++i) bytes[at / 2 + i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// -- dequantise -------------------------------------------------------------------------------------------------------

// A thread has 8 columns of a row. WIDE: they begin at a multiple of 8, in w and in out.
template <bool WIDE, class T>
__global__ void __launch_bounds__(threads) nf4_dequantize_kernel(Nf4Args args, Nf4Part part, T* out) {
  auto* level = reinterpret_cast<float*>(shared_memory());  // 16 banks, which lanes read without conflicts
  if (threadIdx.x < 16) level[threadIdx.x] = nf4_levels[threadIdx.x];
  block_sync();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, groups = (part.columns + 7) / 8;
  if (index >= groups * part.rows) return;
  // Of several rows there are fewer than 2^32 groups.
  const int64_t row = part.rows == 1 ? 0 : static_cast<uint32_t>(index) / static_cast<uint32_t>(groups);
  const int64_t column = (index - row * groups) * 8, left = part.columns - column;
  const int64_t from = part.first + row * part.stride + column, shift = args.w.shift;
  T* to = out + row * part.columns + column;
  if (WIDE && left >= 8) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(args.w.bytes + from / 2);
    const float scale = block_scale(args, from >> shift);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = level[word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15] * scale;
    store<8>(to, v);
    return;
  }
  for (int i = 0; i < 8 && i < left; ++i) {
    const int64_t at = from + i;
    to[i] = narrow<T>(level[args.w.bytes[at / 2] >> (at % 2 ? 0 : 4) & 15] * block_scale(args, at >> shift));
  }
}

// -- scales -----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(threads) nf4_dequantize_absmax_kernel(Nf4Args args, int64_t n, float* absmax) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i < n) absmax[i] = block_scale(args, i);
}

// offset = the mean of what is finite, by one block: the sums of threads in pairs, in order.
__global__ void __launch_bounds__(threads) nf4_offset_kernel(const float* absmax, int64_t n, float* offset) {
  auto* total = reinterpret_cast<double*>(shared_memory());  // [threads], then [threads] counts
  double *count = total + threads, sum = 0, finite = 0;
  for (int64_t i = threadIdx.x; i < n; i += threads)
    if (magnitude(absmax[i]) < 0x7f800000u) sum += absmax[i], ++finite;
  total[threadIdx.x] = sum, count[threadIdx.x] = finite;
  block_sync();
  for (unsigned half = threads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      total[threadIdx.x] += total[threadIdx.x + half];
      count[threadIdx.x] += count[threadIdx.x + half];
    }
    block_sync();
  }
  if (threadIdx.x == 0) *offset = static_cast<float>(total[0] / (count[0] > 0 ? count[0] : 1));
}

// A warp has a block of scales.
__global__ void __launch_bounds__(threads)
    nf4_quantize_absmax_kernel(const float* absmax, int64_t n, const float* code, int64_t block2, const float* offset,
                               uint8_t* q, float* absmax2) {
  auto* midpoint = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x < 255) midpoint[threadIdx.x] = 0.5f * (code[threadIdx.x] + code[threadIdx.x + 1]);
  block_sync();
  const int lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32, first = block * block2;
  if (first >= n) return;
  const int64_t end = first + block2 < n ? first + block2 : n;
  const float middle = *offset;
  uint32_t largest = 0;
  for (int64_t i = first + lane; i < end; i += 32) {
    const uint32_t x = magnitude(absmax[i] - middle);
    largest = x > largest ? x : largest;
  }
  const Absmax scale = absmax_of(largest, 32);
  if (lane == 0) absmax2[block] = scale.stored;
  for (int64_t i = first + lane; i < end; i += 32) {
    const float y = (absmax[i] - middle) * scale.reciprocal;
    int at = 0;  // midpoints below y; a NaN is below none, and has 255 as bucketize gives
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
      if (!(y <= midpoint[at + step - 1])) at += step;
    q[i] = static_cast<uint8_t>(at);
  }
}

// -- launching --------------------------------------------------------------------------------------------------------

// One thread, or warp, for each of n.
template <class... P, class... A>
cudaError_t launch_for(int64_t n, int each, void (*kernel)(P...), size_t shared, cudaStream_t stream,
                       const A&... args) {
  const int64_t blocks = (n + each - 1) / each;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared, stream, args...);
}

}  // namespace

cudaError_t nf4_quantize_cuda(Dtype type, const void* w, int64_t numel, int64_t shift, uint8_t* bytes, float* absmax,
                              cudaStream_t stream) {
  const int64_t piece = int64_t{1} << (shift < 8 ? 8 : shift);
  return switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const bool wide = numel % 8 == 0 && aligned16(w);
    const auto kernel = wide ? nf4_quantize_kernel<true, T> : nf4_quantize_kernel<false, T>;
    return launch_for((numel + piece - 1) / piece, warps, kernel, 0, stream, static_cast<const T*>(w), numel,
                      static_cast<int>(shift), bytes, absmax);
  });
}

cudaError_t nf4_dequantize_cuda(const Nf4Cuda& w, const Nf4Part& part, Dtype type, void* out, cudaStream_t stream) {
  const int64_t groups = (part.columns + 7) / 8 * part.rows;
  if (part.rows > 1 && groups > UINT_MAX) return cudaErrorInvalidValue;
  const bool rows = part.rows == 1 || (part.columns % 8 == 0 && part.stride % 8 == 0);
  const bool wide = rows && part.first % 8 == 0 && aligned16(out) && reinterpret_cast<uintptr_t>(w.bytes) % 4 == 0;
  return switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const auto kernel = wide ? nf4_dequantize_kernel<true, T> : nf4_dequantize_kernel<false, T>;
    return launch_for(groups, threads, kernel, 16 * sizeof(float), stream, nf4_args(w), part, static_cast<T*>(out));
  });
}

cudaError_t nf4_dequantize_absmax_cuda(const Nf4Cuda& w, int64_t n, float* absmax, cudaStream_t stream) {
  return launch_for(n, threads, nf4_dequantize_absmax_kernel, 0, stream, nf4_args(w), n, absmax);
}

cudaError_t nf4_quantize_absmax_cuda(const float* absmax, int64_t n, const float* code, int64_t block2, uint8_t* q,
                                     float* absmax2, float* offset, cudaStream_t stream) {
  const cudaError_t done = launch_for(1, 1, nf4_offset_kernel, 2 * threads * sizeof(double), stream, absmax, n, offset);
  if (done != cudaSuccess) return done;
  return launch_for((n + block2 - 1) / block2, warps, nf4_quantize_absmax_kernel, 255 * sizeof(float), stream, absmax,
                    n, code, block2, offset, q, absmax2);
}

}  // namespace pk
