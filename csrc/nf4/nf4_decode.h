// Packed weights to numbers. Compile with -ffp-contract=off: scales of the second level round twice.
#pragma once

#include <cstdlib>
#include <new>

#include "common/cpu.h"
#include "nf4/nf4.h"

namespace pk::PK_ISA {

constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

PK_INLINE int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
PK_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
PK_INLINE int64_t padded(int64_t n, int64_t to) { return blocks(n, to) * to; }

// Uninitialised and aligned to vectors.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : p(static_cast<float*>(std::aligned_alloc(64, padded(floats * 4 + 1, 64)))) {
    if (p == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p); }
  float* const p;
};

// The 16 levels times a scale, and the lookup of W of them by the W / 2 bytes at p.
#if defined(__AVX512F__)
struct Table {
  __m512 level;
  PK_INLINE explicit Table(float scale) : level(_mm512_mul_ps(_mm512_loadu_ps(kLevels), _mm512_set1_ps(scale))) {}

  PK_INLINE vec at(const uint8_t* p) const {
    int64_t eight;
    std::memcpy(&eight, p, 8);
    const __m512i all = _mm512_set1_epi64(eight);
    // permutexvar ignores all but the lowest four bits of a lane.
#ifdef __AVX512VBMI__
    const __m512i where = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56);
    const __m512i index = _mm512_multishift_epi64_epi8(where, all);
#else
    const __m512i where = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i shifts = _mm512_set1_epi64(4);  // of even lanes
    const __m512i index = _mm512_srlv_epi32(_mm512_shuffle_epi8(all, where), shifts);
#endif
    return (vec)_mm512_permutexvar_ps(index, level);
  }
};
#elif defined(__AVX2__)
struct Table {
  __m256 low, high;
  PK_INLINE explicit Table(float scale)
      : low(_mm256_mul_ps(_mm256_loadu_ps(kLevels), _mm256_set1_ps(scale))),
        high(_mm256_mul_ps(_mm256_loadu_ps(kLevels + 8), _mm256_set1_ps(scale))) {}

  PK_INLINE vec at(const uint8_t* p) const {
    int32_t four;
    std::memcpy(&four, p, 4);
    const __m256i where = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), where);
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign chooses
    return (vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), is_high);
  }
};
#else
struct Table {
  float level[16];
  PK_INLINE explicit Table(float scale) {
    for (int i = 0; i < 16; ++i) level[i] = kLevels[i] * scale;
  }

  PK_INLINE vec at(const uint8_t* p) const {
    vec v;
    for (int i = 0; i < W; i += 2) {
      v[i] = level[p[i / 2] >> 4];
      v[i + 1] = level[p[i / 2] & 15];
    }
    return v;
  }
};
#endif

PK_INLINE float number(const Nf4& w, int64_t i, float scale) {
  return kLevels[(w.bytes[i / 2] >> (i % 2 ? 0 : 4)) & 15] * scale;
}

// The scales of n blocks from `first` on, at their place or in `room`.
inline const float* scales(const Nf4& w, int64_t first, int64_t n, float* room) {
  if (w.q == nullptr) return w.absmax + first;
  for (int64_t i = 0; i < n;) {
    const int64_t group = (first + i) / w.block2, stop = at_most(n, (group + 1) * w.block2 - first);
    const float scale = w.absmax[group];
    for (; i < stop; ++i) room[i] = w.code[w.q[first + i]] * scale + w.offset;
  }
  return room;
}

// Calls whole(first, count, scale) for the piece of each block among the n weights from `first` on.
template <class F>
PK_INLINE void each_block(const Nf4& w, int64_t first, int64_t n, float* room, const F& whole) {
  if (n == 0) return;
  const int64_t end = first + n, last = (end - 1) >> w.shift;
  const float* scale = scales(w, first >> w.shift, last - (first >> w.shift) + 1, room);
  while (first < end) {
    const int64_t stop = at_most(end, ((first >> w.shift) + 1) << w.shift);
    whole(first, stop - first, *scale++);
    first = stop;
  }
}

// Floats of `room` for n weights at any place.
inline int64_t room_of(const Nf4& w, int64_t n) { return w.q ? (n >> w.shift) + 2 : 0; }

// Calls f(table, bytes, i) for weights first + i to first + i + 63, if they all lie so that they share a scale: the
// usual case, with a length that the compiler knows. Otherwise false.
template <class F>
PK_INLINE bool each_64(const Nf4& w, int64_t first, int64_t n, float* room, const F& f) {
  if (w.shift < 6 || first % 64 || n % 64) return false;
  const int64_t block = first >> w.shift;
  const float* scale = scales(w, block, ((first + n - 1) >> w.shift) - block + 1, room);
  for (int64_t i = 0; i < n; i += 64) f(Table(scale[((first + i) >> w.shift) - block]), w.bytes + (first + i) / 2, i);
  return true;
}

// out[i] = weight first + i for i < n.
inline void decode(const Nf4& w, int64_t first, int64_t n, float* room, float* out) {
  const bool done = each_64(w, first, n, room, [&](const Table& table, const uint8_t* p, int64_t c) {
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += W) store(out + c + i, table.at(p + i / 2));
  });
  if (done) return;
  each_block(w, first, n, room, [&](int64_t at, int64_t count, float scale) {
    const int64_t stop = at + count;
    if (at % 2) *out++ = number(w, at++, scale);
    const Table table(scale);
    for (; at + W <= stop; at += W, out += W) store(out, table.at(w.bytes + at / 2));
    for (; at < stop; ++at) *out++ = number(w, at, scale);
  });
}

}  // namespace pk::PK_ISA
