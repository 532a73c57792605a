// Products of bf16 pairs on the matrix tiles of AMX. PK_EMULATE: on a machine without, by emulate/tiles.h.
#pragma once

#include "common/cpu.h"

#ifdef PK_EMULATE
#include "emulate/tiles.h"
#endif

#if defined(__AMX_BF16__) || defined(PK_EMULATE)
#define PK_TILES

namespace pk::PK_ISA {

// As long as it lives, each of the thread's eight tiles has 16 rows of 64 bytes. Tiles that stay in use would make
// every context switch save them.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes in a row
      config[48 + tile] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// c [16 R, 16 V] += a [16 R, depth] b [depth, 16 V] with words of a and b, two bf16 each; depth is a multiple of 16.
template <int R, int V>
PK_INLINE void multiply_tiles(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                              int64_t depth) {
  static_assert((R == 1 || R == 2) && (V == 1 || V == 2));
  float* below = c + 16 * ldc;
  __asm__ volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  _tile_loadd(0, c, 4 * ldc);
  if constexpr (V == 2) _tile_loadd(1, c + 16, 4 * ldc);
  if constexpr (R == 2) _tile_loadd(2, below, 4 * ldc);
  if constexpr (R == 2 && V == 2) _tile_loadd(3, below + 16, 4 * ldc);
  for (int64_t d = 0; d < depth; d += 16) {
    _tile_loadd(4, a + d, 4 * lda);
    if constexpr (R == 2) _tile_loadd(5, a + 16 * lda + d, 4 * lda);
    _tile_loadd(6, b + d * ldb, 4 * ldb);
    if constexpr (V == 2) _tile_loadd(7, b + d * ldb + 16, 4 * ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R == 2 && V == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * ldc);
  if constexpr (V == 2) _tile_stored(1, c + 16, 4 * ldc);
  if constexpr (R == 2) _tile_stored(2, below, 4 * ldc);
  if constexpr (R == 2 && V == 2) _tile_stored(3, below + 16, 4 * ldc);
}

}  // namespace pk::PK_ISA
#endif
