// Products of fp32 matrices as kron and bottleneck need them: tiles in registers, over operands that lie in the cache.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

#include "common/cpu.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kDepth = 128;         // numbers summed in registers: more would round worse, and not stay in L1
constexpr int64_t kGrain = 1 << 20;     // multiply-adds that pay for waking a thread
constexpr int kMost = W == 16 ? 4 : 3;  // vectors across of a tile

PK_INLINE int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
PK_INLINE int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }
PK_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
PK_INLINE int64_t padded(int64_t n) { return blocks(n, W) * W; }
inline int64_t grain(int64_t work_of_one, int64_t worth = kGrain) { return blocks(worth, work_of_one + 1); }

class Buffer {
 public:
  explicit Buffer(int64_t floats) : p(static_cast<float*>(std::aligned_alloc(64, blocks(floats + 1, 16) * 64))) {
    if (p == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p); }
  float* const p;
};

// The vectors of n columns in panels of equal width, or of two widths that differ by one.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t n) : vectors(blocks(n, W)), count(blocks(vectors, kMost)) {}
  int64_t begin(int64_t i) const { return vectors * i / count; }
};

// The right operand [depth, n] of a product, rows ld apart or, where ld is 0, packed panel by panel. It can be read to
// the end of its last vector.
struct Right {
  const float* p;
  int64_t ld, depth;
};

// c [rows, n] = from + a b, or a b where from is null. Element (i, d) of a lies at a[i * row + d * next], so a
// transposed a costs nothing. Rows of c and of from are ldc and ldf apart; nothing behind their n-th column is touched.
struct Product {
  float* c;
  int64_t ldc;
  const float* from;
  int64_t ldf;
  const float* a;
  int64_t row, next;
  bool stream = false;  // c lies on whole vectors and is not read again soon: it goes past the caches
};

PK_INLINE void put_sum([[maybe_unused]] const Product& p, float* c, vec sum) {
#if defined(__AVX512F__)
  if (p.stream) return _mm512_stream_ps(c, (__m512)sum);
#elif defined(__AVX2__)
  if (p.stream) return _mm256_stream_ps(c, (__m256)sum);
#endif
  store(c, sum);
}

// Before another thread may read what went past the caches.
PK_INLINE void end_of_stream() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

template <int R, int V>
PK_INLINE void tile(const Product& p, const float* b, int64_t ldb, int64_t depth, int last) {
  vec sum[R][V] = {};
  const float* a = p.a;
  // What the sums are added to and written to arrives while they are made.
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 64 / (4 * W)) {
      if (p.from != p.c) __builtin_prefetch(p.from + i * p.ldf + v * W);
      if (!p.stream) __builtin_prefetch(p.c + i * p.ldc + v * W, 1);
    }
  do {
    vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const vec left = splat(a[i * p.row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
    a += p.next;
    b += ldb;
  } while (--depth);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    float* c = p.c + i * p.ldc;
    const float* from = p.from + i * p.ldf;
#pragma GCC unroll 4
    for (int v = 0; v < V - 1; ++v) put_sum(p, c + v * W, p.from ? load(from + v * W) + sum[i][v] : sum[i][v]);
    constexpr int v = V - 1;
    if (last == W)
      put_sum(p, c + v * W, p.from ? load(from + v * W) + sum[i][v] : sum[i][v]);
    else
      store_n(c + v * W, p.from ? load_n(from + v * W, last) + sum[i][v] : sum[i][v], last);
  }
}

template <int R, int V>
void tile_of(int64_t rows, const Product& p, const float* b, int64_t ldb, int64_t depth, int last) {
  if (rows == R) return tile<R, V>(p, b, ldb, depth, last);
  if constexpr (R > 1) tile_of<R - 1, V>(rows, p, b, ldb, depth, last);
}

// Tiles whose heights differ by one at most; their sums and what those are made of fill the registers.
template <int V>
void tiles(const Product& p, int64_t rows, const float* b, int64_t ldb, int64_t depth, int last) {
  constexpr int height = W == 16 ? (V == 4 ? 6 : V == 3 ? 8 : V == 2 ? 12 : 14) : V == 3 ? 4 : V == 2 ? 6 : 8;
  const int64_t count = blocks(rows, height);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = rows * t / count;
    Product own = p;
    own.c += i * p.ldc, own.a += i * p.row;
    if (p.from) own.from += i * p.ldf;
    tile_of<height, V>(rows * (t + 1) / count - i, own, b, ldb, depth, last);
  }
}

inline void multiply(const Product& p, int64_t rows, const Right& b, int64_t n) {
  const Panels panels(n);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t j = panels.begin(i), width = panels.begin(i + 1) - j;
    const int last = i + 1 == panels.count ? static_cast<int>(n - (panels.vectors - 1) * W) : W;
    const int64_t ldb = b.ld ? b.ld : width * W;
    const float* right = b.p + (b.ld ? j * W : j * W * b.depth);
    for (int64_t d = 0; d < b.depth; d += kDepth) {
      const int64_t depth = at_most(b.depth - d, kDepth);
      const bool more = d > 0;
      const Product own = {p.c + j * W,
                           p.ldc,
                           more     ? p.c + j * W
                           : p.from ? p.from + j * W
                                    : nullptr,
                           more ? p.ldc : p.ldf,
                           p.a + d * p.next,
                           p.row,
                           p.next,
                           p.stream && b.depth <= kDepth};
      const float* from = right + d * ldb;
      if (width == 1)
        tiles<1>(own, rows, from, ldb, depth, last);
      else if (width == 2)
        tiles<2>(own, rows, from, ldb, depth, last);
      else if (width == 3)
        tiles<3>(own, rows, from, ldb, depth, last);
      else if constexpr (kMost == 4)
        tiles<4>(own, rows, from, ldb, depth, last);
    }
  }
}

// -- moving ---------------------------------------------------------------------------------------------------------

// dst is padded to whole vectors, with zeros.
template <class T>
PK_INLINE void widen_row(float* dst, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load_n(src + i, static_cast<int>(n - i)));
}

// src is padded to whole vectors.
template <class T>
PK_INLINE void narrow_row(T* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load(src + i), static_cast<int>(n - i));
}

// a and b side by side, of which lane l of the result is number at(l).
template <int... lane, class At>
PK_INLINE vec pick(vec a, vec b, std::integer_sequence<int, lane...>, At at) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, at(lane)...);
#else
  return __builtin_shuffle(a, b, ivec{at(lane)...});
#endif
}

// The two halves off the diagonal of each 2H x 2H square change places.
template <int H>
PK_INLINE void exchange(vec (&v)[W]) {
  constexpr std::make_integer_sequence<int, W> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & H)) {
      const vec a = v[i], b = v[i + H];
      v[i] = pick(a, b, lanes, [](int l) constexpr { return l & H ? W + l - H : l; });
      v[i + H] = pick(a, b, lanes, [](int l) constexpr { return l & H ? W + l : l + H; });
    }
}

PK_INLINE void transpose_square(vec (&v)[W]) {
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (W > 4) exchange<4>(v);
  if constexpr (W > 8) exchange<8>(v);
}

// dst[j][i] = src[i][j] for rows i and cols j; rows of dst are padded to whole vectors with zeros.
template <class T>
void transpose(float* dst, int64_t ldd, const T* src, int64_t lds, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      vec v[W] = {};
      const int64_t some = at_most(cols - j, W);
      for (int64_t k = 0; k < W && i + k < rows; ++k) {
        const T* from = src + (i + k) * lds + j;
        v[k] = some == W ? load(from) : load_n(from, static_cast<int>(some));
      }
      transpose_square(v);
      for (int64_t k = 0; k < some; ++k) store(dst + (j + k) * ldd + i, v[k]);
    }
}

// A piece of a factor as fp32 rows ld apart, which are padded to whole vectors with zeros.
inline void unpack(float* dst, int64_t ld, Strided f, int64_t first, int64_t rows, int64_t cols) {
  switch_dtype(f.type, [&](auto element) {
    const auto* src = static_cast<const decltype(element)*>(f.data) + first * f.next;
    if (f.next == 1) {
      for (int64_t i = 0; i < rows; ++i) widen_row(dst + i * ld, src + i * f.row, cols);
    } else if (f.row == 1) {
      transpose(dst, ld, src, f.next, cols, rows);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < padded(cols); ++j) dst[i * ld + j] = j < cols ? widen(src[i * f.row + j * f.next]) : 0;
    }
  });
}

PK_INLINE Strided transposed(Strided f) { return {f.data, f.type, f.next, f.row}; }

// B [depth, n] for the right of a product, and below it the row `last` [n], if given. Where few rows are multiplied
// with it, it is read where it lies.
class Packed {
 public:
  Packed(Strided f, int64_t depth, int64_t n, int64_t rows, const float* last = nullptr)
      : in_place_(rows < 2 * W && !last && f.type == Dtype::f32 && f.next == 1 && n % W == 0),
        room_(in_place_ ? 0 : (depth + (last != nullptr)) * padded(n)) {
    const int64_t all = depth + (last != nullptr);
    right = {in_place_ ? static_cast<const float*>(f.data) : room_.p, in_place_ ? f.row : 0, all};
    if (in_place_) return;
    const Panels panels(n);
    parallel_for(0, panels.count, grain(4 * depth * W), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = panels.begin(i) * W, ld = panels.begin(i + 1) * W - j, cols = at_most(n - j, ld);
        unpack(room_.p + j * all, ld, f, j, depth, cols);
        if (last) widen_row(room_.p + j * all + depth * ld, last + j, cols);
      }
    });
  }
  Right right;

 private:
  const bool in_place_;
  const Buffer room_;
};

}  // namespace
}  // namespace pk::PK_ISA
