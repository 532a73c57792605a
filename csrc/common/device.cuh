// What CUDA kernels share. No torch header, so that nvcc parses little and a kernel can be tried without torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/switch.h"

#ifdef PK_EMULATE
#include "emulate/device.h"
#else
// What takes PTX, or a launch. emulate/device.h has the same on the CPU.
namespace pk {

// Two numbers of 16 bits, rounded to nearest even, the low one in the low half.
__device__ inline uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline uint32_t f16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c [16, 8] += a [16, 16] b [16, 8] by a warp, with fp32 sums. Lane 4 g + q holds, pairs along k in one register and
// the lower k in its low half:
//   a[0] = a[g][2q..]    a[1] = a[g + 8][2q..]    a[2] = a[g][2q + 8..]    a[3] = a[g + 8][2q + 8..]
//   b[0] = b[2q..][g]    b[1] = b[2q + 8..][g]
//   c[0], c[1] = c[g][2q], c[g][2q + 1]           c[2], c[3] = c[g + 8][2q], c[g + 8][2q + 1]
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Four matrices of 8 x 8 numbers of 16 bits, transposed, from shared memory into a warp's registers. Lane l says where
// row l % 8 of matrix l / 8 begins, aligned to 16 bytes; of matrix i lane 4 g + q gets columns g of rows 2q (in the low
// half) and 2q + 1 in r[i]. So rows along k become operands of mma_bf16 and mma_f16.
__device__ inline void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Starts to copy 16 bytes, both sides aligned to 16, into shared memory, or zeros if `real` is false. The copies that a
// thread has started since its last async_commit are a group, and async_wait<N> waits for its groups but for the last
// N; other threads see what has come after a block_sync behind that.
__device__ inline void async_copy(void* shared, const void* global, bool real) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(real ? 16 : 0)
      : "memory");
}

__device__ inline void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ inline void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Asks for the line of 128 bytes around an address to come into the L2 cache.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Adds to a counter, of a block or of the device, to which other threads add as well: whole numbers, whose sum does not
// depend on the order.
__device__ inline void count(uint32_t* counter, uint32_t n) { atomicAdd(counter, n); }
__device__ inline void count(uint64_t* counter, uint64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(n));
}

// Blocks of a cluster (compute capability 9.0 and newer; see can_cluster): the number of this one, a barrier of all
// their threads, and where block `rank` has what this block has at `mine` in shared memory.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

template <class T>
__device__ inline const T* cluster_peer(const T* mine, int rank) {
  const T* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(mine), "r"(rank));
  return peer;
}
#else
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_sync() { __trap(); }
template <class T>
__device__ inline const T* cluster_peer(const T* mine, int) {
  return mine;
}
#endif

template <class... P, class... A>
inline cudaError_t launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                                  cudaStream_t stream, A... args) {
  if (shared_bytes > 48 << 10) {  // more than a kernel has unasked
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t done = cudaFuncSetAttribute(kernel, most, static_cast<int>(shared_bytes));
    if (done != cudaSuccess) return done;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

template <class... P, class... A>
inline cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          A... args) {
  return launch_cluster(kernel, 1, grid, block, shared_bytes, stream, args...);
}

// Bytes of shared memory that a block may have on the current device.
inline size_t most_shared() {
  int device = 0, bytes = 0;
  const bool found = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return found ? bytes : 48 << 10;
}

// Does the current device run clusters, and the kernel's code for it have them? Code that the driver makes from older
// PTX has not. The last answer of a thread is kept, as a model asks the same in each layer.
template <class... P>
inline bool can_cluster(void (*kernel)(P...)) {
  static thread_local struct {
    void (*kernel)(P...) = nullptr;
    int device = -1;
    bool can = false;
  } last;
  int device = -1;
  cudaFuncAttributes code;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (last.kernel == kernel && last.device == device) return last.can;
  const bool found = cudaFuncGetAttributes(&code, kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // nobody else's
  last.kernel = kernel, last.device = device;
  return last.can = found && code.ptxVersion >= 90 && code.binaryVersion >= 90;
}

}  // namespace pk
#endif

namespace pk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Elements of T in the widest load that every architecture has.
template <class T>
constexpr int lanes_of = 16 / sizeof(T);

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T lane[N];
};

// N elements at p, which is aligned to min(16, N * sizeof(T)) bytes.
template <int N, class T>
__device__ inline void load(const T* p, float (&v)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = widen(pack.lane[i]);
}

template <int N, class T>
__device__ inline void store(T* p, const float (&v)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(v[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Every lane gets the result; the order of the sum is fixed.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
  return x;
}

template <class T>
__device__ inline T warp_shuffle(T x, int lane) {
  return __shfl_sync(0xffffffff, x, lane);
}

// One raw vector of N elements; p is aligned to min(16, N * sizeof(T)) bytes.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
// a b + c, rounded twice.
__device__ inline float multiply_then_add(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); }
__device__ inline void block_sync() { __syncthreads(); }
__device__ inline uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// MT x NT such products in fp32 by FMA, whose operands the lanes hand each other. a[.][2 i], a[.][2 i + 1] are the
// halves of register a[i] above, b likewise. Four products are added up before they meet c, which rounds less.
template <int MT, int NT>
__device__ inline void mma_f32(float (&c)[MT][NT][4], const float (&a)[MT][8], const float (&b)[NT][4]) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;  // lanes of c's row, of its first column
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float left[MT][2][4];
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 4; ++k) left[i][half][k] = warp_shuffle(a[i][k / 2 * 4 + half * 2 + k % 2], row + q);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      float right[2][4];
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int k = 0; k < 4; ++k) right[side][k] = warp_shuffle(b[j][k], column + 4 * side + q);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float sum = left[i][e / 2][0] * right[e % 2][0];
#pragma unroll
          for (int k = 1; k < 4; ++k) sum += left[i][e / 2][k] * right[e % 2][k];
          c[i][j][e] += sum;
        }
    }
  }
}

// Host side: may these pointers be read in 16-byte loads?
template <class... P>
inline bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace pk
