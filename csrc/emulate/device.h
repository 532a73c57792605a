// What common/device.cuh does by PTX and by launches, on the CPU.
#pragma once

#include <cstdlib>
#include <tuple>

#include "emulate/cuda_bf16.h"
#include "emulate/cuda_fp16.h"
#include "emulate/cuda_runtime.h"

namespace pk {
namespace emulate {

// c += a b of one warp. Fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16": lane = 4 g + q holds
//   A[g + 8 (i / 2 % 2)][2 q + i % 2 + 8 (i / 4)] for i < 8,   B[2 q + i % 2 + 8 (i / 2)][g] and
//   C[g + 8 (i / 2)][2 q + i % 2] for i < 4.
struct Mma {
  float a[8], b[4];
  float* c;
};

inline void mma(const char* doing, Mma& mine) {
  with_warp(doing, mine, [](Mma** lanes) {
    float a[16][16], b[16][8], c[16][8];
    const auto each_c = [&](auto&& f) {
      for (int g = 0; g < 8; ++g)
        for (int q = 0; q < 4; ++q)
          for (int i = 0; i < 4; ++i) f(c[g + 8 * (i / 2)][2 * q + i % 2], lanes[4 * g + q]->c[i]);
    };
    for (int g = 0; g < 8; ++g)
      for (int q = 0; q < 4; ++q) {
        const Mma& lane = *lanes[4 * g + q];
        for (int i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][2 * q + i % 2 + 8 * (i / 4)] = lane.a[i];
        for (int i = 0; i < 4; ++i) b[2 * q + i % 2 + 8 * (i / 2)][g] = lane.b[i];
      }
    each_c([](float& tile, float& fragment) { tile = fragment; });
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    each_c([](float& tile, float& fragment) { fragment = tile; });
  });
}

inline float half_of(uint32_t pair, int i) { return __half2float(__ushort_as_half(pair >> 16 * i & 0xffff)); }
inline float bf16_of(uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xffff0000 : pair << 16); }

// Where a launch is, for messages: made from the stream in the line of the call.
struct Stream {
  std::string where;
  Stream(cudaStream_t, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : where(std::string(file) + ":" + std::to_string(line)) {}
};

}  // namespace emulate

inline uint32_t bf16_pair(float low, float high) {
  const auto bits = [](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); };
  return bits(low) | static_cast<uint32_t>(bits(high)) << 16;
}

inline uint32_t f16_pair(float low, float high) {
  const auto bits = [](float x) { return __half_as_ushort(__float2half_rn(x)); };
  return bits(low) | static_cast<uint32_t>(bits(high)) << 16;
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate::Mma mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = emulate::bf16_of(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = emulate::bf16_of(b[i / 2], i % 2);
  mine.c = c;
  emulate::mma("mma_bf16", mine);
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate::Mma mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = emulate::half_of(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = emulate::half_of(b[i / 2], i % 2);
  mine.c = c;
  emulate::mma("mma_f16", mine);
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
  struct {
    const uint16_t* row;
    uint32_t r[4];
  } mine{static_cast<const uint16_t*>(row), {}};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("load_transposed of a row that is not aligned to 16 bytes");
  emulate::with_warp("load_transposed", mine, [](auto** lanes) {
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half)
          lanes[lane]->r[i] |= static_cast<uint32_t>(lanes[8 * i + lane % 4 * 2 + half]->row[lane / 4]) << 16 * half;
  });
  std::copy(mine.r, mine.r + 4, r);
}

// The copy is made when it is waited for: who reads earlier finds what was there.
inline void async_copy(void* shared, const void* global, bool real) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    emulate::fail("async_copy of 16 bytes that are not aligned to 16");
  emulate::machine.current->copies.back().push_back({shared, real ? global : nullptr});
}

inline void async_commit() { emulate::machine.current->copies.emplace_back(); }

template <int N>
void async_wait() {
  auto& groups = emulate::machine.current->copies;  // the last one is still open
  for (; groups.size() > N + 1; groups.pop_front())
    for (const auto& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
}

inline void prefetch(const void*) {}

// Threads run in turn.
inline void count(uint32_t* counter, uint32_t n) { *counter += n; }
inline void count(uint64_t* counter, uint64_t n) { *counter += n; }

inline int cluster_rank() { return emulate::machine.current->number / emulate::machine.block_threads; }

inline char* shared_memory() { return emulate::shared_of(cluster_rank()); }

inline void cluster_sync() {
  const int all = emulate::machine.block_threads * emulate::machine.cluster;
  if (emulate::last_to_come("cluster_sync", emulate::machine.cluster_sync, all)) emulate::release(0, all);
}

template <class T>
const T* cluster_peer(const T* mine, int rank) {
  const int64_t at = reinterpret_cast<const char*>(mine) - shared_memory();
  if (rank < 0 || rank >= emulate::machine.cluster) emulate::fail("block " + std::to_string(rank) + " of the cluster");
  if (at < 0 || at >= static_cast<int64_t>(emulate::machine.shared_bytes))
    emulate::fail("cluster_peer of what is not in shared memory");
  return reinterpret_cast<const T*>(emulate::shared_of(rank) + at);
}

template <class... P, class... A>
cudaError_t launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                           emulate::Stream stream, A... args) {
  const std::tuple<P...> given(static_cast<P>(args)...);
  emulate::run([&] { std::apply(kernel, given); }, cluster, grid, block, shared_bytes, stream.where);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, emulate::Stream stream,
                   A... args) {
  return launch_cluster(kernel, 1, grid, block, shared_bytes, stream, args...);
}

// PEFT_KERNELS_EMULATED_SHARED: so many bytes.
inline size_t most_shared() {
  const char* bytes = std::getenv("PEFT_KERNELS_EMULATED_SHARED");
  return bytes ? std::strtoul(bytes, nullptr, 10) : emulate::most_shared_bytes;
}

// PEFT_KERNELS_EMULATED_CLUSTERS=0 makes the launchers take their other way.
template <class... P>
bool can_cluster(void (*)(P...)) {
  const char* clusters = std::getenv("PEFT_KERNELS_EMULATED_CLUSTERS");
  return !clusters || std::strcmp(clusters, "0") != 0;
}

}  // namespace pk
