#include <algorithm>

#include "common/device.cuh"
#include "rescale/rescale.cuh"

namespace pk {
namespace {

// A block is 32 packs of columns times 8 rows: a warp reads one row's consecutive packs, and l stays in registers.
constexpr int columns = 32, rows_at_once = 8;
constexpr int64_t max_chunks = 128;

template <int N, class X, class L>
__global__ void rescale_fwd_kernel(const X* x, const L* l, X* y, int64_t rows, int64_t n) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * columns + threadIdx.x) * N;
  if (c >= n) return;
  float scale[N], v[N];
  load<N>(l + c, scale);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * rows_at_once;
  for (int64_t row = blockIdx.y * rows_at_once + threadIdx.y; row < rows; row += stride) {
    load<N>(x + row * n + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= scale[i];
    store<N>(y + row * n + c, v);
  }
}

template <int N>
using Sums = float[rows_at_once][columns * N + 1];

// blockIdx.y is a chunk of rows; partial[chunk] = sum over the chunk's rows of g * x.
template <int N, class X, class L>
__global__ void rescale_bwd_kernel(const X* g, const X* x, const L* l, X* dx, float* partial, int64_t rows, int64_t n,
                                   int64_t chunk_rows) {
  auto& sums = *reinterpret_cast<Sums<N>*>(shared_memory());
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * columns + threadIdx.x) * N;
  float total[N] = {};
  if (c < n) {
    float scale[N], gv[N], xv[N];
    load<N>(l + c, scale);
    const int64_t first = blockIdx.y * chunk_rows, last = rows - first < chunk_rows ? rows : first + chunk_rows;
    for (int64_t row = first + threadIdx.y; row < last; row += rows_at_once) {
      load<N>(g + row * n + c, gv);
      load<N>(x + row * n + c, xv);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i] += gv[i] * xv[i];
        gv[i] *= scale[i];
      }
      if (dx != nullptr) store<N>(dx + row * n + c, gv);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[threadIdx.y][threadIdx.x * N + i] = total[i];
  block_sync();
  const int thread = threadIdx.y * columns + threadIdx.x;
  const int64_t left = static_cast<int64_t>(blockIdx.x) * columns * N;
  for (int i = thread; i < columns * N && left + i < n; i += columns * rows_at_once) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) sum += sums[r][i];
    partial[blockIdx.y * n + left + i] = sum;
  }
}

template <class L>
__global__ void rescale_bwd_reduce_kernel(const float* partial, L* dl, int64_t chunks, int64_t n) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= n) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * n + c];
  dl[c] = narrow<L>(sum);
}

// f(X{}, L{}, N) for the pairs of types that the glue lets through, N elements per load.
template <class F>
void switch_case(Dtype x_type, Dtype l_type, bool wide, F&& f) {
  switch_dtype(x_type, [&](auto x) {
    using X = decltype(x);
    const auto with = [&](auto l) {
      if (wide)
        f(x, l, std::integral_constant<int, lanes_of<X>>{});
      else
        f(x, l, std::integral_constant<int, 1>{});
    };
    if (l_type == Dtype::f32)
      with(float{});
    else
      with(x);
  });
}

int64_t bytes_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

}  // namespace

int64_t rescale_chunks(int64_t rows) { return std::clamp<int64_t>(ceil_div(rows, 64), 1, max_chunks); }

cudaError_t rescale_fwd_cuda(Dtype x_type, const void* x, Dtype l_type, const void* l, void* y, int64_t rows, int64_t n,
                             cudaStream_t stream) {
  cudaError_t code = cudaSuccess;
  if (rows == 0 || n == 0) return code;
  const bool wide = n * bytes_of(x_type) % 16 == 0 && aligned16(x, l, y);
  switch_case(x_type, l_type, wide, [&](auto xt, auto lt, auto lanes) {
    using X = decltype(xt);
    using L = decltype(lt);
    constexpr int N = decltype(lanes)::value;
    // Each thread takes about four rows, to read l once for them.
    const dim3 grid(ceil_div(n, columns * N), std::clamp<int64_t>(ceil_div(rows, 4 * rows_at_once), 1, 65535));
    code = launch(rescale_fwd_kernel<N, X, L>, grid, dim3(columns, rows_at_once), 0, stream, static_cast<const X*>(x),
                  static_cast<const L*>(l), static_cast<X*>(y), rows, n);
  });
  return code;
}

cudaError_t rescale_bwd_cuda(Dtype x_type, const void* g, const void* x, Dtype l_type, const void* l, void* dx,
                             void* dl, float* partial, int64_t rows, int64_t n, cudaStream_t stream) {
  cudaError_t code = cudaSuccess;
  if (n == 0) return code;
  const bool wide = n * bytes_of(x_type) % 16 == 0 && aligned16(g, x, l, dx);
  const int64_t chunks = rescale_chunks(rows);
  switch_case(x_type, l_type, wide, [&](auto xt, auto lt, auto lanes) {
    using X = decltype(xt);
    using L = decltype(lt);
    constexpr int N = decltype(lanes)::value;
    code = launch(rescale_bwd_kernel<N, X, L>, dim3(ceil_div(n, columns * N), chunks), dim3(columns, rows_at_once),
                  sizeof(Sums<N>), stream, static_cast<const X*>(g), static_cast<const X*>(x), static_cast<const L*>(l),
                  static_cast<X*>(dx), partial, rows, n, ceil_div(rows, chunks));
    if (code == cudaSuccess)
      code = launch(rescale_bwd_reduce_kernel<L>, ceil_div(n, 128), 128, 0, stream, static_cast<const float*>(partial),
                    static_cast<L*>(dl), chunks, n);
  });
  return code;
}

}  // namespace pk
