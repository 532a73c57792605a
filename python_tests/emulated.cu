// Small kernels for test_emulate.py: each function runs one on the CPU and returns the error, or null.
#include <string>

#include "common/device.cuh"

using namespace pk;

namespace {

std::string error;

template <class F>
const char* caught(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

template <class T>
__global__ void round_kernel(const float* x, T* narrowed, float* widened, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  narrowed[i] = narrow<T>(x[i]);
  widened[i] = widen(narrowed[i]);
}

// out [4, 64]: sum, maximum and reversal of each warp, and the number of the thread.
__global__ void shuffle_kernel(const float* x, float* out) {
  const int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  out[i] = warp_sum(x[i]);
  out[64 + i] = warp_max(x[i]);
  out[128 + i] = warp_shuffle(x[i], 31 - i % 32);
  out[192 + i] = static_cast<float>(i);
}

// c [16, 8] += a [16, 16] b [16, 8], the fragments spelled out from the PTX ISA's table for m16n8k16.
template <class F>
__device__ void mma_tile(const float* a, const float* b, float* c, F&& multiply) {
  const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, in_group = lane & 3;
  float fa[8], fb[4], fc[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    fa[i] = a[row * 16 + in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)];
  }
  for (int i = 0; i < 4; ++i) fb[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) fc[i] = c[at(i)];
  multiply(fa, fb, fc);
  for (int i = 0; i < 4; ++i) c[at(i)] = fc[i];
}

__global__ void mma_kernel(const float* a, const float* b, float* c, int kind) {
  mma_tile(a, b, c, [&](const float (&fa)[8], const float (&fb)[4], float (&fc)[4]) {
    if (kind == 0) {
      const float left[1][8] = {{fa[0], fa[1], fa[2], fa[3], fa[4], fa[5], fa[6], fa[7]}};
      const float right[1][4] = {{fb[0], fb[1], fb[2], fb[3]}};
      float sums[1][1][4] = {{{fc[0], fc[1], fc[2], fc[3]}}};
      mma_f32(sums, left, right);
      for (int i = 0; i < 4; ++i) fc[i] = sums[0][0][i];
      return;
    }
    const auto pair = kind == 1 ? bf16_pair : f16_pair;
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = pair(fa[2 * i], fa[2 * i + 1]);
    for (int i = 0; i < 2; ++i) right[i] = pair(fb[2 * i], fb[2 * i + 1]);
    kind == 1 ? mma_bf16(fc, left, right) : mma_f16(fc, left, right);
  });
}

// Each block reverses its 128 numbers through shared memory.
__global__ void reverse_kernel(const float* x, float* y, bool sync) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * 128;
  shared[i] = x[first + i];
  if (sync) block_sync();
  y[first + i] = shared[127 - i];
}

// Every block of a cluster gets the sum of the numbers of all its blocks. `last` keeps a block from ending while others
// still read its memory.
__global__ void cluster_kernel(const float* x, float* y, int cluster, bool sync, bool last) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  mine[threadIdx.x] = x[i];
  if (sync) cluster_sync();
  float sum = 0;
  for (int rank = 0; rank < cluster; ++rank) sum += *cluster_peer(mine + threadIdx.x, rank);
  y[i] = sum + 1000.f * static_cast<float>(cluster_rank());
  if (last) cluster_sync();
}

// y [blocks, 2, 128] = x, by copies of 16 bytes in two groups, and zeros for the blocks from `real` on. `late`: as it
// is after one group alone is waited for.
__global__ void copies_kernel(const float* x, float* y, int real, bool late) {
  char* shared = shared_memory();
  const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  for (int group = 0; group < 2; ++group) {
    if (i < 32) async_copy(shared + 512 * group + 16 * i, x + 256 * block + 128 * group + 4 * i, block < real);
    async_commit();
  }
  if (late)
    async_wait<1>();
  else
    async_wait<0>();
  block_sync();
  for (int group = 0; group < 2; ++group)
    y[256 * block + 128 * group + i] = reinterpret_cast<const float*>(shared)[128 * group + i];
}

// out [4, 32, 2]: registers of matrices [4, 8, 8], the rows of which lie apart.
__global__ void transposed_kernel(const uint16_t* matrices, uint16_t* out) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int column = 0; column < 8; ++column) shared[24 * lane + column] = matrices[8 * lane + column];
  block_sync();
  uint32_t r[4];
  load_transposed(r, shared + 24 * lane);
  for (int i = 0; i < 4; ++i) {
    out[64 * i + 2 * lane] = static_cast<uint16_t>(r[i]);
    out[64 * i + 2 * lane + 1] = static_cast<uint16_t>(r[i] >> 16);
  }
}

// Each of 128 threads of 5 blocks counts x[i] times in bin i % 3, of the block and then of all.
__global__ void count_kernel(const int* x, uint64_t* total) {
  auto* bin = reinterpret_cast<uint32_t*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  if (i < 3) bin[i] = 0;
  block_sync();
  count(bin + i % 3, static_cast<uint32_t>(x[128 * blockIdx.x + i]));
  block_sync();
  if (i < 3) count(total + i, uint64_t{bin[i]});
}

enum Fault { none, early_return, different, half_a_warp, misaligned, overflow, shift, index, beyond, before, apart };

__global__ void fault_kernel(int fault, float* x, int big) {
  const int i = static_cast<int>(threadIdx.x);
  float* shared = reinterpret_cast<float*>(shared_memory());
  float two[2] = {0, 1};
  switch (fault) {
    case early_return:
      if (i == 5) return;
      break;
    case different:
      if (i == 7) __syncwarp();
      warp_sum(x[i]);
      break;
    case half_a_warp:
      if (i < 16) warp_sum(x[i]);
      break;
    case misaligned: {
      float v[4];
      load<4>(x + 1, v);
      x[i] = v[0];
      break;
    }
    case overflow:
      x[i] = static_cast<float>(big + i);
      break;
    case shift:
      x[i] = static_cast<float>(1u << (big - 0x7fffffff + 32));
      break;
    case index:
      x[i] = two[i];
      break;
    case beyond:
      shared[32] = x[i];
      break;
    case before:
      shared[-1] = x[i];
      break;
    case apart:
      async_copy(shared + 1, x, true);
      break;
  }
  block_sync();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* round_bf16(const float* x, bf16* narrowed, float* widened, int n) {
  return caught([&] { launch(round_kernel<bf16>, (n + 127) / 128, 128, 0, nullptr, x, narrowed, widened, n); });
}

EXPORT const char* round_f16(const float* x, f16* narrowed, float* widened, int n) {
  return caught([&] { launch(round_kernel<f16>, (n + 127) / 128, 128, 0, nullptr, x, narrowed, widened, n); });
}

EXPORT const char* shuffle(const float* x, float* out) {
  return caught([&] { launch(shuffle_kernel, 1, dim3(16, 4), 0, nullptr, x, out); });
}

EXPORT const char* mma(const float* a, const float* b, float* c, int kind) {
  return caught([&] { launch(mma_kernel, 1, 32, 0, nullptr, a, b, c, kind); });
}

EXPORT const char* reverse(const float* x, float* y, int blocks, bool sync) {
  return caught([&] { launch(reverse_kernel, blocks, 128, 512, nullptr, x, y, sync); });
}

EXPORT const char* copies(const float* x, float* y, int blocks, int real, bool late) {
  return caught([&] { launch(copies_kernel, blocks, 128, 1024, nullptr, x, y, real, late); });
}

EXPORT const char* transposed(const uint16_t* matrices, uint16_t* out) {
  return caught([&] { launch(transposed_kernel, 1, 32, 32 * 48, nullptr, matrices, out); });
}

EXPORT const char* counted(const int* x, uint64_t* total) {
  return caught([&] { launch(count_kernel, 5, 128, 12, nullptr, x, total); });
}

EXPORT const char* cluster(const float* x, float* y, int clusters, int size, bool sync, bool last) {
  return caught(
      [&] { launch_cluster(cluster_kernel, size, clusters * size, 64, 256, nullptr, x, y, size, sync, last); });
}

EXPORT const char* fault(int which, float* x) {
  return caught([&] { launch(fault_kernel, 1, 32, 128, nullptr, which, x, 0x7fffffff); });
}

EXPORT const char* grid(int blocks, int threads, int shared_bytes) {
  return caught([&] { launch(fault_kernel, blocks, threads, shared_bytes, nullptr, 0, nullptr, 0); });
}

EXPORT bool clusters_here() { return can_cluster(cluster_kernel); }
