// The AMX intrinsics that kernels use, in plain C++: how the tests run tile code on a CPU without tiles.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pk::emulate {

struct Tile {
  uint8_t rows;
  uint16_t bytes;
  alignas(64) uint8_t row[16][64];
};

inline thread_local Tile tiles[8];

inline float widened(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

inline void release_tiles() { std::memset(tiles, 0, sizeof(tiles)); }

inline void configure_tiles(const void* config) {
  const auto* p = static_cast<const uint8_t*>(config);
  assert(p[0] == 1 && p[1] == 0);
  release_tiles();
  for (int i = 0; i < 8; ++i) {
    tiles[i].rows = p[48 + i];
    std::memcpy(&tiles[i].bytes, p + 16 + 2 * i, 2);
  }
}

inline void load_tile(int tile, const void* base, size_t stride) {
  auto& t = tiles[tile];
  assert(t.rows && "used without a configuration");
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.row[r], static_cast<const uint8_t*>(base) + r * stride, t.bytes);
}

inline void store_tile(int tile, void* base, size_t stride) {
  const auto& t = tiles[tile];
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.row[r], t.bytes);
}

// c [m, n] fp32 += a [m, k pairs] b [k pairs, n pairs]
inline void multiply_tile(int c, int a, int b) {
  auto *to = &tiles[c], *left = &tiles[a], *right = &tiles[b];
  assert(left->rows == to->rows && left->bytes == 4 * right->rows && right->bytes == to->bytes);
  for (int m = 0; m < to->rows; ++m)
    for (int k = 0; k < left->bytes / 4; ++k)
      for (int n = 0; n < to->bytes / 4; ++n) {
        float sum;
        uint16_t x[2], y[2];
        std::memcpy(&sum, to->row[m] + 4 * n, 4);
        std::memcpy(x, left->row[m] + 4 * k, 4);
        std::memcpy(y, right->row[k] + 4 * n, 4);
        for (int i = 0; i < 2; ++i) sum += widened(x[i]) * widened(y[i]);
        std::memcpy(to->row[m] + 4 * n, &sum, 4);
      }
}

}  // namespace pk::emulate

// The compiler's header has been read: it defines these names whatever the CPU is.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::pk::emulate::configure_tiles
#define _tile_release ::pk::emulate::release_tiles
#define _tile_loadd ::pk::emulate::load_tile
#define _tile_stored ::pk::emulate::store_tile
#define _tile_dpbf16ps ::pk::emulate::multiply_tile
