// Stands in for the CUDA toolkit's header of this name where kernels run on the CPU: the threads of a block, or of a
// cluster of blocks, are fibers that one scheduler runs in turn. For tests: it is strict rather than fast.
//
//   A warp runs until it waits for its block; which warp is next, and which of its lanes begins, is pseudo-random but
//   the same in every run. So a missing barrier shows in one order or the other. Shared memory is NaN before a block
//   and after it, and has a margin that must not be written. Threads that wait for one another for ever, misaligned
//   vector accesses, indices beyond a fixed-size array, too large shifts and signed overflow are errors (the last four
//   by the compiler's checks, whose handlers are below).
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulate/cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pk::emulate {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 64 << 10, margin_bytes = 1 << 10, most_shared_bytes = 227 << 10;
constexpr int poison = 0xff;  // NaN in every floating type

// How many of the threads that wait for one another have come, and to what.
struct Meeting {
  int come = 0;
  const char* doing = nullptr;
};

// Into shared memory; `from` is null for zeros.
struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  dim3 index, block;
  int number = 0;               // in the cluster: its blocks one after the other
  int waits = 0;                // how often it has waited so far
  const char* doing = nullptr;  // what it waits in; null if it can run
  void* given = nullptr;        // its part in what its warp does together
  Meeting warp;                 // of the warp, in its first thread
  bool returned = false;
  bool begun = false;  // its stack is in use; it runs one kernel after the other
  jmp_buf context;
  std::deque<std::vector<Copy>> copies;  // asynchronous ones, by groups
  void* stack;

  Thread() {
    stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, 4096, PROT_NONE);  // where an overflow of the stack ends
  }
  ~Thread() { munmap(stack, stack_bytes); }
};

struct Block {
  std::vector<char> shared;  // between two margins
  Meeting sync;
  int running = 0;  // threads
};

struct Machine {
  std::mutex busy;                               // one launch at a time
  std::vector<std::unique_ptr<Thread>> threads;  // of a cluster, block after block
  std::vector<Block> blocks;                     // of a cluster
  Meeting cluster_sync;
  std::function<void()> kernel;
  std::string where, error;
  Thread* current = nullptr;
  int block_threads = 0, cluster = 1;
  size_t shared_bytes = 0;
  jmp_buf scheduler;
};

inline Machine machine;

inline std::string name(const dim3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

inline std::string name(const Thread& t) { return "thread " + name(t.index) + " of block " + name(t.block); }

inline std::string state(const Thread& t) {
  if (t.returned) return name(t) + " has returned";
  if (!t.doing) return name(t) + " runs";
  return name(t) + " waits in " + t.doing + " (its wait number " + std::to_string(t.waits) + ")";
}

// Stops the launch, which throws the text. Does not return: the thread is left where it is, without unwinding, because
// the compiler's checks call this where no exception may pass.
[[noreturn]] inline void fail(const std::string& text) {
  if (!machine.current) {
    std::fprintf(stderr, "emulated CUDA, outside of a kernel: %s\n", text.c_str());
    std::abort();
  }
  machine.error = name(*machine.current) + ": " + text;
  _longjmp(machine.scheduler, 1);
}

// -- fibers ---------------------------------------------------------------------------------------------------------

[[gnu::noinline]] inline void leave() {
  if (_setjmp(machine.current->context) == 0) _longjmp(machine.scheduler, 1);
}

inline void live() {
  for (;;) {
    machine.kernel();
    machine.current->returned = true;
    Block& block = machine.blocks[machine.current->number / machine.block_threads];
    if (--block.running == 0) std::memset(block.shared.data() + margin_bytes, poison, machine.shared_bytes);
    leave();
  }
}

[[gnu::noinline]] inline void resume(Thread& t) {
  machine.current = &t;
  threadIdx = t.index;
  blockIdx = t.block;
  if (_setjmp(machine.scheduler) == 0) {
    if (t.begun) _longjmp(t.context, 1);
    t.begun = true;
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = t.stack;
    fresh.uc_stack.ss_size = stack_bytes;
    fresh.uc_link = nullptr;
    makecontext(&fresh, live, 0);
    setcontext(&fresh);
  }
  machine.current = nullptr;
}

// Waits in `doing` until `size` threads have come to the meeting. True for the last to come, which goes on at once and
// must release() the others.
inline bool last_to_come(const char* doing, Meeting& meeting, int size) {
  Thread& me = *machine.current;
  if (meeting.come > 0 && std::strcmp(meeting.doing, doing) != 0)
    fail(std::string("comes to ") + doing + " while others wait in " + meeting.doing);
  ++me.waits;
  meeting.doing = doing;
  if (++meeting.come == size) {
    meeting.come = 0;
    return true;
  }
  me.doing = doing;
  leave();
  return false;
}

inline void release(int first, int size) {
  for (int i = first; i < first + size; ++i) machine.threads[i]->doing = nullptr;
}

// together(T* lanes[32]) runs once, when every lane of the warp has come here with its `mine`.
template <class T, class F>
void with_warp(const char* doing, T& mine, F&& together) {
  Thread& me = *machine.current;
  const int in_block = me.number % machine.block_threads, first = me.number - in_block % warp_size;
  if (in_block / warp_size * warp_size + warp_size > machine.block_threads)
    fail(std::string(doing) + " in a warp of fewer than 32 threads");
  me.given = &mine;
  if (!last_to_come(doing, machine.threads[first]->warp, warp_size)) return;
  T* lanes[warp_size];
  for (int i = 0; i < warp_size; ++i) lanes[i] = static_cast<T*>(machine.threads[first + i]->given);
  together(lanes);
  release(first, warp_size);
}

// -- a launch ---------------------------------------------------------------------------------------------------------

inline void run_warp(int first, int last, bool backwards) {
  for (bool ran = true; ran;) {
    ran = false;
    for (int i = first; i < last; ++i) {
      Thread& t = *machine.threads[backwards ? first + last - 1 - i : i];
      if (t.returned || t.doing) continue;
      ran = true;
      resume(t);
      if (!machine.error.empty()) return;
    }
  }
}

// The threads of one cluster, to their end.
inline void run_cluster(uint32_t seed) {
  const int n = machine.block_threads * machine.cluster;
  const int warps = (machine.block_threads + warp_size - 1) / warp_size, all = warps * machine.cluster;
  for (;;) {
    const Thread *waiting = nullptr, *other = nullptr;
    seed = seed * 1664525u + 1013904223u;
    for (int i = 0; i < all; ++i) {
      const int w = static_cast<int>((i + (seed >> 8)) % all), warp = seed >> 31 ? all - 1 - w : w;
      const int start = warp / warps * machine.block_threads, first = start + warp % warps * warp_size;
      run_warp(first, std::min(first + warp_size, start + machine.block_threads), seed >> 30 & 1);
      if (!machine.error.empty()) return;
    }
    bool can_run = false;
    for (int i = 0; i < n; ++i) {
      const Thread& t = *machine.threads[i];
      can_run = can_run || (!t.returned && !t.doing);
      if (t.doing && !waiting) waiting = &t;
    }
    if (can_run) continue;
    if (!waiting) return;
    for (int i = 0; i < n && !other; ++i) {
      const Thread& t = *machine.threads[i];
      if (t.returned || std::strcmp(t.doing, waiting->doing) != 0) other = &t;
    }
    machine.error = state(*waiting) + (other ? ", but " + state(*other) : " for ever");
    return;
  }
}

inline char* shared_of(int rank) { return machine.blocks[rank].shared.data() + margin_bytes; }

inline void check_margins() {
  for (const Block& block : machine.blocks)
    for (size_t i = 0; i < block.shared.size(); ++i)  // all of it is poison by now
      if (block.shared[i] != static_cast<char>(poison)) {
        const int64_t at = static_cast<int64_t>(i) - static_cast<int64_t>(margin_bytes);
        machine.error = "a thread wrote at byte " + std::to_string(at) + " of the " +
                        std::to_string(machine.shared_bytes) + " bytes of shared memory";
        return;
      }
}

// Runs kernel() for every thread of the grid. Throws std::runtime_error, which names the launch and the thread.
inline void run(std::function<void()> kernel, int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                const std::string& where) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  const auto refuse = [&](const std::string& text) { throw std::runtime_error(where + ": " + text); };
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) refuse("a block of " + name(block) + " threads");
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535)
    refuse("a grid of " + name(grid) + " blocks");
  if (cluster < 1 || cluster > 8 || grid.x % cluster) refuse("clusters of " + std::to_string(cluster));
  if (shared_bytes > most_shared_bytes) refuse(std::to_string(shared_bytes) + " bytes of shared memory");

  machine.kernel = std::move(kernel);
  machine.cluster = cluster;
  machine.block_threads = static_cast<int>(threads);
  machine.shared_bytes = shared_bytes;
  machine.error.clear();
  blockDim = block;
  gridDim = grid;
  while (machine.threads.size() < static_cast<size_t>(threads) * cluster)
    machine.threads.push_back(std::make_unique<Thread>());
  machine.blocks.assign(cluster, {});
  uint32_t count = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (int rank = 0; rank < cluster; ++rank) {
          Block& b = machine.blocks[rank];
          b.shared.assign(shared_bytes + 2 * margin_bytes, static_cast<char>(poison));
          b.running = machine.block_threads;
          for (unsigned i = 0; i < threads; ++i) {
            const int number = rank * machine.block_threads + static_cast<int>(i);
            Thread& t = *machine.threads[number];
            t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
            t.block = dim3(x + rank, y, z);
            t.number = number;
            t.waits = 0;
            t.doing = nullptr;
            t.returned = false;
            t.copies.assign(1, {});
          }
        }
        run_cluster(++count * 2654435761u);
        if (machine.error.empty()) check_margins();
        if (!machine.error.empty()) {
          machine.threads.clear();  // their stacks are in the middle of a kernel
          machine.cluster_sync = {};
          refuse(machine.error);
        }
      }
}

}  // namespace pk::emulate

// -- what the toolkit's headers define --------------------------------------------------------------------------------

inline void __syncthreads() {
  using namespace pk::emulate;
  const int size = machine.block_threads, rank = machine.current->number / size;
  if (last_to_come("__syncthreads", machine.blocks[rank].sync, size)) release(rank * size, size);
}

inline void __syncwarp() {
  int none = 0;
  pk::emulate::with_warp("__syncwarp", none, [](int**) {});
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  struct {
    T x, out;
    int lane;
  } mine{x, T{}, lane};
  if (mask != 0xffffffff) pk::emulate::fail("a shuffle of a part of the warp is not emulated");
  pk::emulate::with_warp("__shfl_sync", mine, [](auto** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[lanes[i]->lane & 31]->x;
  });
  return mine.out;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return __shfl_sync(mask, x,
                     static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) ^ distance);
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Of two roundings, whatever the compiler may contract.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) { return a + b; }

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

// -- handlers of the compiler's checks --------------------------------------------------------------------------------

namespace pk::emulate {

struct Site {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] inline void fail_at(const void* data, const std::string& text) {
  const Site& site = *static_cast<const Site*>(data);
  fail(std::string(site.file) + ":" + std::to_string(site.line) + ": " + text);
}

}  // namespace pk::emulate

#define PK_CHECK_HANDLER(name, text, ...)                                                                \
  extern "C" __attribute__((visibility("hidden"), weak, used)) void __ubsan_handle_##name(__VA_ARGS__) { \
    pk::emulate::fail_at(data, text);                                                                    \
  }
PK_CHECK_HANDLER(type_mismatch_v1, "a misaligned access, or one through a null pointer", void* data, void*)
PK_CHECK_HANDLER(out_of_bounds, "an index beyond the array", void* data, void*)
PK_CHECK_HANDLER(shift_out_of_bounds, "a shift by a negative number or by too many bits", void* data, void*, void*)
PK_CHECK_HANDLER(add_overflow, "a signed sum overflows", void* data, void*, void*)
PK_CHECK_HANDLER(sub_overflow, "a signed difference overflows", void* data, void*, void*)
PK_CHECK_HANDLER(mul_overflow, "a signed product overflows", void* data, void*, void*)
PK_CHECK_HANDLER(negate_overflow, "a signed negation overflows", void* data, void*)
PK_CHECK_HANDLER(divrem_overflow, "a division by zero, or one that overflows", void* data, void*, void*)
#undef PK_CHECK_HANDLER
