// Linear layers on packed weights on the CPU. README.md has the why of the blocking.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "common/pairs.h"
#include "lora/lora_dropout.h"
#include "nf4/nf4_decode.h"
#include "nf4/nf4_tiles.h"

namespace pk::PK_ISA {
namespace {

constexpr int kAbreast = W == 16 ? 2 : 1;  // rows of W that share the loads of more than four rows of x
constexpr int64_t kDepth = 256;            // columns of W that the forward decodes at a time
constexpr int64_t kRows = 48;              // rows of W beside them: whole tiles of 4, 6, 8, 12 and 24
constexpr int64_t kGroup = 8;              // stripes of so many rows that take turns with one chunk of x, if their
constexpr int64_t kSumFloats = 3 << 15;    // sums fit in the second-level cache beside it: 384 KiB
constexpr int64_t kChunk = 512;            // rows of x, for each of which W is decoded anew
constexpr int64_t kSlab = 128;             // rows of W that the backward decodes at a time
constexpr int64_t kCols = 192;             // columns of W beside them: whole panels
constexpr int64_t kAhead = 16;             // rows of W between asking for one and decoding it
constexpr int64_t kBackChunk = 256;        // rows of g, for each of which W is decoded anew
constexpr int64_t kWide = 3 * W;           // a panel: the widest tile
constexpr int kSums = W == 16 ? 24 : 12;   // vectors of sums in the registers beside what they are made of
constexpr int64_t kGrain = 1 << 20;        // multiply-adds that pay for waking a thread

int64_t grain(int64_t work_of_one) { return blocks(kGrain, work_of_one + 1); }

// c [rows, cols] += a [rows, depth] b [depth, cols], with words of a and b. cols are V whole vectors. The sum over
// depth starts at 0: a single one over all depths would round worse.
struct Product {
  float* c;
  int64_t ldc;
  const uint32_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb, depth;
};

template <bool pairs, int lda_known, int R, int V>
PK_INLINE void tile(const Product& p, int64_t row) {
  vec sum[R][V] = {};
  const int64_t lda = lda_known ? lda_known : p.lda;
  float* c = p.c + row * p.ldc;
  const uint32_t *a = p.a + row * lda, *b = p.b;
  for (int64_t d = 0; d < p.depth; ++d, b += p.ldb) {
    vec right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + v * W, sizeof(vec));
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add<pairs>(a + i * lda + d, right[v], sum[i][v]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(c + i * p.ldc + v * W, load(c + i * p.ldc + v * W) + sum[i][v]);
}

// Tiles of R rows, then of the next smaller size.
template <bool pairs, int lda, int R, int V>
void tiles(const Product& p, int64_t row, int64_t rows) {
  for (; row + R <= rows; row += R) tile<pairs, lda, R, V>(p, row);
  if constexpr (R > 1) {
    if (row < rows) tiles<pairs, lda, (R > 8 ? 8 : R > 4 ? 4 : R / 2), V>(p, row, rows);
  }
}

// lda: that of p, or 0 if it is not known here; known, it costs no registers.
template <bool pairs, int lda>
void run_vectors(const Product& p, int64_t rows, int64_t vectors) {
  if (vectors == 3)
    tiles<pairs, lda, kSums / 3, 3>(p, 0, rows);
  else if (vectors == 2)
    tiles<pairs, lda, kSums / 2, 2>(p, 0, rows);
  else
    tiles<pairs, lda, kSums, 1>(p, 0, rows);
}

#ifdef PK_TILES
// Two by two matrix tiles of sums, which four loads feed with four products.
void run_tiles(const Product& p, int64_t rows, int64_t vectors, int64_t depth) {
  for (int64_t row = 0; row < rows; row += 32) {
    const uint32_t* a = p.a + row * p.lda;
    for (int64_t v = 0; v < vectors; v += 2) {
      float* c = p.c + row * p.ldc + v * W;
      const uint32_t* b = p.b + v * W;
      const auto multiply = row + 32 <= rows ? (v + 2 <= vectors ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                             : (v + 2 <= vectors ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      multiply(c, p.ldc, a, p.lda, b, p.ldb, depth);
    }
  }
}
#endif

template <bool pairs, int lda>
void run(const Product& p, int64_t rows, int64_t vectors) {
#ifdef PK_TILES
  if constexpr (pairs) {
    const int64_t whole = rows - rows % 16, depth = p.depth - p.depth % 16;
    if (whole && depth) {
      run_tiles(p, whole, vectors, depth);
      const Product rest = {p.c, p.ldc, p.a + depth, p.lda, p.b + depth * p.ldb, p.ldb, p.depth - depth};
      if (rest.depth) run_vectors<pairs, lda>(rest, whole, vectors);
      const Product below = {p.c + whole * p.ldc, p.ldc, p.a + whole * p.lda, p.lda, p.b, p.ldb, p.depth};
      if (whole < rows) run_vectors<pairs, lda>(below, rows - whole, vectors);
      return;
    }
  }
#endif
  run_vectors<pairs, lda>(p, rows, vectors);
}

// What a thread that calls run holds.
struct Nothing {};
#ifdef PK_TILES
template <bool pairs>
using Held = std::conditional_t<pairs, Tiles, Nothing>;
#else
template <bool pairs>
using Held = Nothing;
#endif

// Calls f(first column, vectors) for each panel of `cols` columns, which are whole vectors.
template <class F>
PK_INLINE void each_panel(int64_t cols, const F& f) {
  for (int64_t c = 0; c < cols; c += kWide) f(c, at_most(kWide, cols - c) / W);
}

// -- operands -------------------------------------------------------------------------------------------------------

// Words of n neighbours.
template <bool pairs>
PK_INLINE constexpr int64_t words(int64_t n) {
  return pairs ? (n + 1) / 2 : n;
}

// n neighbouring elements as words.
template <bool pairs, class T>
void fetch(const T* x, int64_t n, uint32_t* out) {
  if constexpr (pairs) {
    if (n % 2) out[n / 2] = 0;
    std::memcpy(out, x, n * sizeof(T));
  } else {
    float* v = reinterpret_cast<float*>(out);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(v + i, load(x + i));
    if (i < n) store_n(v + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
  }
}

// Asks for n weights that are needed a piece later: hardware prefetching stops at the end of each short piece of a row.
PK_INLINE void prefetch(const Nf4& w, int64_t first, int64_t n) {
  for (const uint8_t *p = w.bytes + first / 2, *end = p + n / 2; p < end; p += 64) __builtin_prefetch(p, 0, 2);
}

// n weights as words.
template <bool pairs>
void fetch_weights(const Nf4& w, int64_t first, int64_t n, float* room, uint32_t* out) {
#ifdef __AVX512BF16__
  if constexpr (pairs) {
    auto* to = reinterpret_cast<bf16*>(out);
    const bool done = each_64(w, first, n, room, [&](const Table& table, const uint8_t* p, int64_t c) {
#pragma GCC unroll 2
      for (int i = 0; i < 64; i += 2 * W) {
        const __m512 low = (__m512)table.at(p + i / 2), high = (__m512)table.at(p + (i + W) / 2);
        _mm512_storeu_si512(to + c + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    });
    if (done) return;
    if (n % 2) out[n / 2] = 0;
    each_block(w, first, n, room, [&](int64_t at, int64_t count, float scale) {
      const int64_t stop = at + count;
      if (at % 2) *to++ = narrow<bf16>(number(w, at++, scale));
      const Table table(scale);
      for (; at + 2 * W <= stop; at += 2 * W, to += 2 * W) {
        const __m512 low = (__m512)table.at(w.bytes + at / 2), high = (__m512)table.at(w.bytes + at / 2 + W / 2);
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
      for (; at < stop; ++at) *to++ = narrow<bf16>(number(w, at, scale));
    });
    return;
  }
#endif
  decode(w, first, n, room, reinterpret_cast<float*>(out));
}

// Where column c of row d is in a right operand of `depth` rows and `cols` columns, whole vectors, panel by panel.
PK_INLINE int64_t place(int64_t c, int64_t d, int64_t depth, int64_t cols) {
  const int64_t panel = c / kWide * kWide;
  return panel * depth + d * at_most(kWide, cols - panel) + c - panel;
}

#ifdef __AVX512BF16__
// v rounded to bf16, each beside the one of `below`.
PK_INLINE __m512i interleaved(vec v, vec below) {
  const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh((__m512)below, (__m512)v));
}
#endif

// Row d of that operand from n weights, or in pairs from as many of a next row, `stride` weights on; 0: there is none.
template <bool pairs>
void fetch_row(const Nf4& w, int64_t first, int64_t stride, int64_t n, int64_t d, int64_t depth, float* room,
               uint32_t* out) {
  const int64_t cols = padded(n, W);
#ifdef __AVX512BF16__
  if constexpr (pairs) {
    const int64_t next = (first + stride) >> w.shift, count = ((first + stride + n - 1) >> w.shift) - next + 1;
    if (stride > 0 && stride % 64 == 0 && w.shift >= 6) {
      const float* scale = scales(w, next, count, room + room_of(w, n));
      const bool done = each_64(w, first, n, room, [&](const Table& table, const uint8_t* p, int64_t c) {
        const Table below(scale[((first + stride + c) >> w.shift) - next]);
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += W) {
          const __m512i both = interleaved(table.at(p + i / 2), below.at(p + (stride + i) / 2));
          _mm512_storeu_si512(out + place(c + i, d, depth, cols), both);
        }
      });
      if (done) return;
    }
  }
#endif
  alignas(64) float line[2][kCols];
  decode(w, first, n, room, line[0]);
  if (pairs && stride)
    decode(w, first + stride, n, room, line[1]);
  else
    std::memset(line[1], 0, sizeof(line[1]));
  for (int64_t c = 0; c < cols; c += W) {
    uint32_t* to = out + place(c, d, depth, cols);
#ifdef __AVX512BF16__
    if constexpr (pairs) {
      _mm512_storeu_si512(to, interleaved(load(line[0] + c), load(line[1] + c)));
      continue;
    }
#endif
    std::memcpy(to, line[0] + c, sizeof(vec));
  }
}

template <class T>
void put(const float* v, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(v + i));
  if (i < n) store_n(out + i, load(v + i), static_cast<int>(n - i));
}

// Rows of equal chunks of at most `most`.
int64_t chunk_of(int64_t rows, int64_t most) { return blocks(rows, std::max<int64_t>(1, blocks(rows, most))); }

std::unique_ptr<float[]> widened(Dtype type, const void* v, int64_t n) {
  std::unique_ptr<float[]> out(new float[padded(n, W) + W]());
  if (v)
    switch_dtype(type, [&](auto t) {
      fetch<false>(static_cast<const decltype(t)*>(v), n, reinterpret_cast<uint32_t*>(out.get()));
    });
  return out;
}

// -- LoRA ------------------------------------------------------------------------------------------------------------

// out[i] = scale * v[i] for i < n, then zeros to the end of a vector.
void scaled(const float* v, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; i += W) store(out + i, load_n(v + i, static_cast<int>(at_most(W, n - i))) * scale);
}

// n elements of the factor from row * n on, then zeros to the end of a vector.
void factor_row(const Nf4Lora& lora, int64_t first, int64_t n, float* out) {
  switch_dtype(lora.f.type, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(lora.f.data) + first;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(in + i));
    if (i < n) store(out + i, load_n(in + i, static_cast<int>(n - i)));
  });
}

// -- the forward ----------------------------------------------------------------------------------------------------

// W weights at p in fp32, or twice as many in pairs, as words.
template <bool pairs>
PK_INLINE vec lookup(const Table& table, const uint8_t* p) {
#ifdef __AVX512BF16__
  if constexpr (pairs) return (vec)_mm512_cvtne2ps_pbh((__m512)table.at(p + W / 2), (__m512)table.at(p));
#endif
  return table.at(p);
}

// sum + left * right, word by word.
template <bool pairs>
PK_INLINE vec multiply_add(vec left, vec right, vec sum) {
#ifdef __AVX512BF16__
  if constexpr (pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#endif
  return fma(left, right, sum);
}

// The table of dot_64: W levels looked up at once or, in pairs, 32 in an order that permuted() gives to x too.
template <bool pairs>
struct Levels : Table {
  using Table::Table;
};

PK_INLINE vec permuted(vec x) {
#ifdef __AVX512BF16__
  return (vec)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), (__m512i)x);
#else
  return x;
#endif
}

#ifdef __AVX512BF16__
template <>
struct Levels<true> {
  __m512i twice;  // the levels times the scale in bf16, so that the lookup may ignore a fifth bit
  PK_INLINE explicit Levels(float scale)
      : twice(_mm512_broadcast_i64x4(
            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(kLevels), _mm512_set1_ps(scale))))) {}

  // 64 bits after 64 bits, in turn of the lower and of the upper 8 bytes, the next four.
  PK_INLINE vec at(const uint8_t* p) const {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    constexpr int64_t four = 0x0008000c00000004;  // where the nibbles of two bytes are, each the lower byte of a word
    constexpr int64_t next = 0x0010001000100010;
    const __m512i where = _mm512_setr_epi64(four, four, four + next, four + next, four + 2 * next, four + 2 * next,
                                            four + 3 * next, four + 3 * next);
    return (vec)_mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(where, all), twice);
  }
};
#endif

PK_INLINE vec load_words(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }

// The lanes of out[r][m] together are row r of R rows of W, K weights each from `first` on in whole blocks of 64, times
// row m of x, whose steps of W words lie row beside row.
template <bool pairs, int M, int R>
PK_INLINE void dot_64(const Nf4& w, int64_t first, int64_t k, const uint32_t* x, float* room, vec (*out)[M]) {
  constexpr int U = R * M > 3 ? 1 : M == 1 ? 4 : 2;  // sums of each, so that they do not wait for each other
  constexpr int step = pairs ? 2 * W : W;            // weights
  const float* scale[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    const int64_t begin = first + r * k, block = begin >> w.shift;
    scale[r] = scales(w, block, ((begin + k - 1) >> w.shift) - block + 1, room + r * room_of(w, k)) - block;
  }
  vec sum[U][R][M] = {};
  const uint8_t* p = w.bytes + first / 2;
  for (int64_t i = first; i < first + k; i += 64, p += 32) {
    const auto table = [&](int r) { return Levels<pairs>(scale[r][(i + r * k) >> w.shift]); };
    const Levels<pairs> tables[2] = {table(0), table(R - 1)};
#pragma GCC unroll 16
    for (int j = 0; j < 64 / step; ++j) {
      vec right[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) right[r] = tables[r].at(p + (r * k + j * step) / 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m, x += W) {
        const vec left = load_words(x);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sum[j % U][r][m] = multiply_add<pairs>(left, right[r], sum[j % U][r][m]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum[0][r][m] += sum[u][r][m];
      out[r][m] = sum[0][r][m];
    }
}

// As dot_64 for one row of n weights from `first` on, which is even, however its blocks lie, and for rows of x that are
// ldx words apart.
template <class T, bool pairs, int M>
PK_INLINE void dot(const Nf4& w, int64_t first, int64_t n, const uint32_t* x, int64_t ldx, float* room, vec* out) {
  using X = std::conditional_t<pairs, T, float>;
  constexpr int64_t step = pairs ? 2 * W : W;  // weights
  const auto from = [&](int m, int64_t i) { return reinterpret_cast<const X*>(x + m * ldx) + i; };
  vec sum[M] = {};
  each_block(w, first, n, room, [&](int64_t at, int64_t count, float scale) {
    const Table table(scale);
    int64_t i = 0;
    for (; i + step <= count; i += step) {
      const vec right = lookup<pairs>(table, w.bytes + (at + i) / 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const auto* left = reinterpret_cast<const uint32_t*>(from(m, at - first + i));
        sum[m] = multiply_add<pairs>(load_words(left), right, sum[m]);
      }
    }
    for (; i < count; i += W) {
      const int rest = static_cast<int>(at_most(W, count - i));
      float numbers[W] = {};
      for (int j = 0; j < rest; ++j) numbers[j] = number(w, at + i + j, scale);
#pragma GCC unroll 8  // an index that is no constant would put the sums into memory
      for (int m = 0; m < M; ++m) sum[m] = fma(load_n(from(m, at - first + i), rest), load(numbers), sum[m]);
    }
  });
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) out[m] = sum[m];
}

template <class T, int M>
void few_rows(const Nf4Linear& s, const T* x, const Nf4& w, const float* bias, const Nf4Lora& lora, T* y) {
  constexpr bool pairs = kPairs<T>;
  constexpr int64_t step = pairs ? 2 * W : W;
  constexpr int R = M < 5 ? 1 : kAbreast;
  const bool whole = s.k % 64 == 0 && w.shift >= 6;
  // A row that starts in the middle of a byte is read from the byte on, and its x from a zero on.
  const int64_t ldx = padded(words<pairs>(s.k + 1), W), copies = 1 + s.k % 2, rank = padded(lora.r, W);
  const Buffer left(copies * M * ldx), ts(M * rank);
  auto* xs = reinterpret_cast<uint32_t*>(left.p);
  for (int m = 0; m < M; ++m) {
    scaled(lora.u + m * lora.r, lora.r, lora.scale, ts.p + m * rank);
    for (int64_t k = 0; whole && k < s.k; k += step) {
      uint32_t* to = xs + words<pairs>(k) * M + m * W;
      fetch<pairs>(x + m * s.k + k, step, to);
      if (pairs) store(reinterpret_cast<float*>(to), permuted(load_words(to)));
    }
    for (int64_t c = 0; !whole && c < copies; ++c) {
      uint32_t* to = xs + (c * M + m) * ldx;
      to[0] = 0;
      if constexpr (pairs)
        std::memcpy(reinterpret_cast<T*>(to) + c, x + m * s.k, s.k * sizeof(T));
      else
        fetch<false>(x + m * s.k, s.k, to + c);
    }
  }
  parallel_for(0, blocks(s.n, R), grain(R * s.k * M), [&](int64_t begin, int64_t end) {
    const Buffer room(R * room_of(w, s.k + 1)), line(rank);
    const int64_t stop = at_most(s.n, end * R);
    for (int64_t top = begin * R, rows; top < stop; top += rows) {
      vec sums[R][M];
      rows = whole && top + R <= stop ? R : 1;
      if (!whole) {
        const int64_t half = top * s.k % 2;
        dot<T, pairs, M>(w, top * s.k - half, s.k + half, xs + half * M * ldx, ldx, room.p, sums[0]);
      } else if (rows == R) {
        dot_64<pairs, M, R>(w, top * s.k, s.k, xs, room.p, sums);
      } else {
        dot_64<pairs, M, 1>(w, top * s.k, s.k, xs, room.p, sums);
      }
      for (int64_t n = top; n < top + rows; ++n) {
        factor_row(lora, n * lora.r, lora.r, line.p);
        for (int m = 0; m < M; ++m) {
          vec sum = sums[n - top][m];
          for (int64_t i = 0; i < rank; i += W) sum = fma(load(ts.p + m * rank + i), load(line.p + i), sum);
          y[m * s.n + n] = narrow<T>(hsum(sum) + bias[n]);
        }
      }
    }
  });
}

// few_rows of the M of s, which is at most `most`.
template <class T, int most>
void by_rows(const Nf4Linear& s, const T* x, const Nf4& w, const float* bias, const Nf4Lora& lora, T* y) {
  if (s.m == most) return few_rows<T, most>(s, x, w, bias, lora, y);
  if constexpr (most > 1) by_rows<T, most - 1>(s, x, w, bias, lora, y);
}

template <class T>
void many_rows(const Nf4Linear& s, const T* x, const Nf4& w, const float* bias, const Nf4Lora& lora, T* y) {
  constexpr bool pairs = kPairs<T>;
  const int64_t mp = padded(s.m, W), ldc = mp + W, r = lora.r;
  // x^T chunk by chunk of kDepth, in each panel by panel, and t^T, panel by panel.
  const Buffer right(words<pairs>(s.k) * mp), terms(r * mp);
  auto* xs = reinterpret_cast<uint32_t*>(right.p);
  parallel_for(0, blocks(s.k, kDepth), grain(kDepth * mp), [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t line[kDepth];
    for (int64_t k = begin * kDepth; k < at_most(s.k, end * kDepth); k += kDepth) {
      const int64_t n = at_most(kDepth, s.k - k), depth = words<pairs>(n);
      each_panel(mp, [&](int64_t c, int64_t vectors) {
        uint32_t* to = xs + words<pairs>(k) * mp + c * depth;
        for (int64_t i = 0; i < vectors * W; ++i) {
          if (c + i < s.m)
            fetch<pairs>(x + (c + i) * s.k + k, n, line);
          else
            std::memset(line, 0, sizeof(line));
          for (int64_t d = 0; d < depth; ++d) to[d * vectors * W + i] = line[d];
        }
      });
    }
  });
  for (int64_t d = 0; d < r; ++d)
    for (int64_t c = 0; c < mp; ++c) terms.p[place(c, d, r, mp)] = c < s.m ? lora.scale * lora.u[c * r + d] : 0.0f;
  // Rows of W whose sums stay in the second-level cache, beside the chunk of x^T that all of them meet in turn.
  const int64_t group = kRows * std::max<int64_t>(1, at_most(kGroup, kSumFloats / (kRows * ldc)));
  parallel_for(0, blocks(s.n, kRows), grain(kRows * s.k * mp), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Held<pairs> held;
    const int64_t stop = at_most(s.n, end * kRows);
    constexpr int64_t ldw = words<pairs>(kDepth) + 16;  // not a power of two, or rows would evict each other
    const Buffer left(kRows * std::max(ldw, r)), sums(group * ldc), room(room_of(w, kDepth));
    auto* ws = reinterpret_cast<uint32_t*>(left.p);
    alignas(64) float line[kRows];
    const auto each_stripe = [&](int64_t top, const auto& f) {
      for (int64_t n = top; n < at_most(stop, top + group); n += kRows)
        f(n, at_most(kRows, stop - n), sums.p + (n - top) * ldc);
    };
    for (int64_t top = begin * kRows; top < stop; top += group) {
      std::memset(sums.p, 0, at_most(group, stop - top) * ldc * sizeof(float));
      if (r)
        each_stripe(top, [&](int64_t n, int64_t rows, float* c) {
          factor_row(lora, n * r, rows * r, left.p);
          each_panel(mp, [&](int64_t col, int64_t vectors) {
            const auto* panel = reinterpret_cast<const uint32_t*>(terms.p) + col * r;
            run<false, 0>({c + col, ldc, ws, r, panel, vectors * W, r}, rows, vectors);
          });
        });
      for (int64_t k = 0; k < s.k; k += kDepth) {
        const int64_t cols = at_most(kDepth, s.k - k), depth = words<pairs>(cols);
        each_stripe(top, [&](int64_t n, int64_t rows, float* c) {
          for (int64_t i = 0; i < rows; ++i) {
            prefetch(w, (n + i) * s.k + k + kDepth, kDepth);
            fetch_weights<pairs>(w, (n + i) * s.k + k, cols, room.p, ws + i * ldw);
          }
          each_panel(mp, [&](int64_t col, int64_t vectors) {
            const uint32_t* panel = xs + words<pairs>(k) * mp + col * depth;
            run<pairs, ldw>({c + col, ldc, ws, ldw, panel, vectors * W, depth}, rows, vectors);
          });
        });
      }
      each_stripe(top, [&](int64_t n, int64_t rows, const float* c) {
        for (int64_t m = 0; m < s.m; ++m) {
          for (int64_t i = 0; i < rows; ++i) line[i] = c[i * ldc + m] + bias[n + i];
          put(line, rows, y + m * s.n + n);
        }
      });
    }
  });
}

// -- the backward ---------------------------------------------------------------------------------------------------

// Of rows `first` on of all.
template <class T>
void back(const Nf4Linear& s, int64_t first, const T* g, const Nf4& w, const Nf4Lora& lora, T* dx) {
  constexpr bool pairs = kPairs<T>;
  constexpr int64_t ldg = words<pairs>(kSlab) + 16, ldc = kCols + W;
  const int64_t r = lora.r;
  const Dropout drop(lora.drop);
  parallel_for(0, blocks(s.k, kCols), grain(kCols * s.n * s.m), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Held<pairs> held;
    const Buffer left(s.m * ldg), right(std::max(words<pairs>(kSlab), r) * kCols), sums(s.m * ldc);
    const Buffer room(2 * room_of(w, kCols));
    auto *gs = reinterpret_cast<uint32_t*>(left.p), *ws = reinterpret_cast<uint32_t*>(right.p);
    alignas(64) float line[kCols];
    for (int64_t k = begin * kCols; k < at_most(s.k, end * kCols); k += kCols) {
      const int64_t cols = at_most(kCols, s.k - k), width = padded(cols, W);
      std::memset(sums.p, 0, s.m * ldc * sizeof(float));
      for (int64_t d = 0; d < r; ++d) {
        factor_row(lora, d * s.k + k, cols, line);
        for (int64_t c = 0; c < width; c += W) std::memcpy(ws + place(c, d, r, width), line + c, sizeof(vec));
      }
      const auto* terms = reinterpret_cast<const uint32_t*>(lora.u);
      each_panel(width, [&](int64_t c, int64_t vectors) {
        run<false, 0>({sums.p + c, ldc, terms, r, ws + c * r, vectors * W, r}, s.m, vectors);
      });
      for (int64_t m = 0; drop && m < s.m; ++m) drop(sums.p + m * ldc, first + m, k, cols);
      for (int64_t n = 0; n < s.n; n += kSlab) {
        const int64_t rows = at_most(kSlab, s.n - n), depth = words<pairs>(rows);
        for (int64_t d = 0; d < depth; ++d) {
          const int64_t row = (1 + pairs) * d, first = (n + row) * s.k + k;
          for (int64_t i = 0; i < 1 + pairs; ++i) prefetch(w, first + (kAhead + i) * s.k, cols);
          fetch_row<pairs>(w, first, row + 1 < rows ? s.k : 0, cols, d, depth, room.p, ws);
        }
        for (int64_t m = 0; m < s.m; ++m) fetch<pairs>(g + m * s.n + n, rows, gs + m * ldg);
        each_panel(width, [&](int64_t c, int64_t vectors) {
          run<pairs, ldg>({sums.p + c, ldc, gs, ldg, ws + c * depth, vectors * W, depth}, s.m, vectors);
        });
      }
      for (int64_t m = 0; m < s.m; ++m) put(sums.p + m * ldc, cols, dx + m * s.k + k);
    }
  });
}

}  // namespace

void nf4_linear(const Nf4Linear& s, Dtype type, const void* x, const Nf4& w, Dtype bias_type, const void* bias,
                const Nf4Lora& lora, void* y) {
  const auto wide = widened(bias_type, bias, s.n);
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    constexpr int few = kPairs<T> ? 12 : 4;
    if (s.m <= few) return by_rows<T, few>(s, in, w, wide.get(), lora, out);
    const int64_t chunk = chunk_of(s.m, kChunk);
    for (int64_t m = 0; m < s.m; m += chunk) {
      Nf4Lora own = lora;
      own.u += m * lora.r;
      many_rows<T>({at_most(chunk, s.m - m), s.n, s.k}, in + m * s.k, w, wide.get(), own, out + m * s.n);
    }
  });
}

void nf4_dgrad(const Nf4Linear& s, Dtype type, const void* g, const Nf4& w, const Nf4Lora& lora, void* dx) {
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const int64_t chunk = chunk_of(s.m, kBackChunk);
    for (int64_t m = 0; m < s.m; m += chunk) {
      Nf4Lora own = lora;
      own.u += m * lora.r;
      back<T>({at_most(chunk, s.m - m), s.n, s.k}, m, static_cast<const T*>(g) + m * s.n, w, own,
              static_cast<T*>(dx) + m * s.k);
    }
  });
}

}  // namespace pk::PK_ISA
