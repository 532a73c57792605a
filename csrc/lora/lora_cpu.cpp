// LoRA on the CPU: three loops (shrink, expand, wgrad) around one register tile. README.md has the why of the blocking.
#include "lora/lora_cpu.h"

#include <cstdlib>
#include <new>
#include <vector>

#include "common/cpu.h"
#include "lora/lora_dropout.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace pk::PK_ISA {
namespace {

constexpr int64_t kDepth = 384;      // columns of x that shrink holds in L1
constexpr int64_t kSum = 96;         // of them, those that shrink sums before it adds: 384 in a row would round worse
constexpr int64_t kDots = 1024;      // columns of x that few rows are multiplied at a time: a page of the factor
constexpr int64_t kRows = 24;        // rows of x beside them: whole tiles of 4, 6 and 8
constexpr int64_t kCols = 384;       // widest column block of expand and wgrad: whole tiles, whole dropout steps
constexpr int64_t kBand = 64;        // rows of one expand task
constexpr int64_t kBare = 8;         // rows up to which expand reads its factor where it lies
constexpr int64_t kSlab = 32;        // rows that wgrad sums before it goes to the next columns of the tile
constexpr int64_t kRanks = 64;       // ranks of one pass over x or g
constexpr int64_t kMove = 16;        // multiply-adds in the time of moving one element
constexpr int64_t kGrain = 1 << 20;  // multiply-adds that pay for waking a thread
static_assert(kCols % kStep == 0 && kDepth % kStep == 0);  // blocks are whole dropout steps

PK_INLINE int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
PK_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
PK_INLINE int64_t padded(int64_t n, int64_t to) { return blocks(n, to) * to; }
int64_t grain(int64_t work_of_one) { return blocks(kGrain, work_of_one + 1); }

// -- 16-bit and dropped rows ----------------------------------------------------------------------------------------

// dst is padded to whole vectors, with zeros.
void fetch(float* dst, LoraIn src, int64_t first, int64_t n) {
  switch_dtype(src.type, [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(src.data) + first;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      store(dst + i, load(p + i));
      asm volatile("" ::: "memory");  // or the compiler sees a memcpy, which takes longer to start than a row of b
    }
    if (i < n) store(dst + i, load_n(p + i, static_cast<int>(n - i)));
  });
}

// Asks for n elements that are needed a block later: a product leaves memory idle, and the hardware's own prefetching
// stops at the end of each short piece of a row.
template <class Array>
void prefetch(Array src, int64_t first, int64_t n) {
  const int64_t size = src.type == Dtype::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(src.data) + first * size;
  for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// dst[i] = row[i], or dst[i] += row[i], rounded once; row is padded to whole vectors.
template <bool add>
void put(LoraOut dst, int64_t first, const float* row, int64_t n) {
  switch_dtype(dst.type, [&](auto element) {
    auto* p = static_cast<decltype(element)*>(dst.data) + first;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      store(p + i, add ? load(p + i) + load(row + i) : load(row + i));
      asm volatile("" ::: "memory");  // as in fetch
    }
    const int rest = static_cast<int>(n - i);
    if (rest) store_n(p + i, add ? load_n(p + i, rest) + load(row + i) : load(row + i), rest);
  });
}

// -- the product ----------------------------------------------------------------------------------------------------

// c [rows, cols] = factor * a [rows, depth] b [depth, cols], or c += that. Element (i, d) of a is a[i * row + d *
// next], so a transposed a costs nothing. cols are whole vectors, depth >= 1.
struct Product {
  float* c;
  int64_t ldc;
  const float* a;
  int64_t row, next;
  const float* b;
  int64_t ldb, depth;
  float factor;
  bool add;

  Product at(int64_t i, int64_t j) const {
    return {c + i * ldc + j, ldc, a + i * row, row, next, b + j, ldb, depth, factor, add};
  }
};

template <int R, int V>
PK_INLINE void tile(Product p) {
  vec sum[R][V] = {};
  do {
    vec right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = load(p.b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vec left = splat(p.a[i * p.row]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
    p.a += p.next;
    p.b += p.ldb;
  } while (--p.depth);
  const vec factor = splat(p.factor);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* c = p.c + i * p.ldc + v * W;
      store(c, p.add ? fma(factor, sum[i][v], load(c)) : factor * sum[i][v]);
    }
}

// Tiles of R rows, then of the next smaller size.
template <int R, int V>
void tiles(const Product& p, int64_t rows) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) tile<R, V>(p.at(i, 0));
  if constexpr (R > 1) {
    if (i < rows) tiles<(R > 4 ? 4 : R / 2), V>(p.at(i, 0), rows - i);
  }
}

// About 12 sums hide the latency of fma; with what they are made of, they fill the 16 registers of AVX2.
void run(const Product& p, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < cols; j += 3 * W) {
    const int64_t vectors = (cols - j) / W;
    if (vectors >= 3)
      tiles<4, 3>(p.at(0, j), rows);
    else if (vectors == 2)
      tiles<6, 2>(p.at(0, j), rows);
    else
      tiles<8, 1>(p.at(0, j), rows);
  }
}

// As run, over a long depth.
void run_deep(Product p, int64_t rows, int64_t cols) {
  for (int64_t left = p.depth; left > 0; left -= kSum) {
    p.depth = at_most(left, kSum);
    run(p, rows, cols);
    p.a += kSum * p.next;
    p.b += kSum * p.ldb;
    p.add = true;
  }
}

// -- products with rows of a factor as they lie -----------------------------------------------------------------------

typedef float quad __attribute__((vector_size(16)));

// The sum of each of four vectors.
PK_INLINE quad sums_of(const vec (&v)[4]) {
  quad q[4];
  for (int c = 0; c < 4; ++c) {
    quad part[W / 4];
    std::memcpy(part, &v[c], sizeof(part));
    for (int half = W / 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    q[c] = part[0];
  }
#ifdef __SSE2__
  __m128 lane[4];
  std::memcpy(lane, q, sizeof(lane));
  _MM_TRANSPOSE4_PS(lane[0], lane[1], lane[2], lane[3]);
  return (quad)((lane[0] + lane[2]) + (lane[1] + lane[3]));
#else
  quad sum;
  for (int c = 0; c < 4; ++c) sum[c] = (q[c][0] + q[c][2]) + (q[c][1] + q[c][3]);
  return sum;
#endif
}

// out[i][c] = x[i][0..depth) . f[c][0..depth) for R rows of x and four of f, `ahead` elements behind which lies what
// is wanted next.
template <int R, class F>
PK_INLINE void dot_tile(const float* const* x, const F* const* f, int64_t depth, int64_t ahead, quad* out) {
  vec sum[R][4] = {};
  const auto step = [&](const auto& element) {
    vec right[4];
    for (int c = 0; c < 4; ++c) right[c] = element(f[c]);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const vec left = element(x[i]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[i][c] = fma(left, right[c], sum[i][c]);
    }
  };
  int64_t d = 0;
  for (; d + W <= depth; d += W) {
    for (int c = 0; c < 4; ++c) __builtin_prefetch(f[c] + d + ahead);
    step([&](const auto* p) { return load(p + d); });
  }
  if (d < depth) step([&](const auto* p) { return load_n(p + d, static_cast<int>(depth - d)); });
  for (int i = 0; i < R; ++i) out[i] = sums_of(sum[i]);
}

// out [m, r] (rows ldo apart) = factor * x [m, depth] f^T, where f [r, depth] has rows ldf apart.
template <class F>
void dots(float* out, int64_t ldo, const float* const* x, int64_t m, const F* f, int64_t ldf, int64_t r, int64_t depth,
          float factor) {
  constexpr int R = W == 16 ? 4 : 2;  // 16 sums and what they are made of fill the registers of AVX-512
  for (int64_t rank = 0; rank < r; rank += 4) {
    const F* four[4];  // of a last tile that is not full some twice
    for (int64_t c = 0; c < 4; ++c) four[c] = f + at_most(rank + c, r - 1) * ldf;
    const int64_t ranks = at_most(r - rank, 4), ahead = rank + 8 <= r ? 4 * ldf : 0;
    quad sums[R];
    for (int64_t i = 0; i < m;) {
      const int64_t rows = m - i >= R ? R : 1;
      if (rows == R)
        dot_tile<R>(x + i, four, depth, i ? 0 : ahead, sums);
      else
        dot_tile<1>(x + i, four, depth, i ? 0 : ahead, sums);
      for (int64_t q = 0; q < rows; ++q) {
        const quad scaled = sums[q] * factor;
        std::memcpy(out + (i + q) * ldo + rank, &scaled, ranks * sizeof(float));
      }
      i += rows;
    }
  }
}

// -- packed factors -------------------------------------------------------------------------------------------------

class Buffer {
 public:
  explicit Buffer(int64_t floats) : p(static_cast<float*>(std::aligned_alloc(64, padded(floats * 4 + 1, 64)))) {
    if (p == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p); }
  float* const p;
};

// dst[c][i] = src[first + i * ld + c] for i < rows, which are padded to a multiple of 4 with zeros.
void transpose(float* dst, int64_t ldd, LoraIn src, int64_t first, int64_t ld, int64_t rows, int64_t cols) {
  constexpr int64_t chunk = 256;
  alignas(64) float line[4][chunk];
  for (int64_t c = 0; c < cols; c += chunk)
    for (int64_t i = 0; i < rows; i += 4) {
      const int64_t n = at_most(cols - c, chunk);
      for (int q = 0; q < 4; ++q)
        if (i + q < rows)
          fetch(line[q], src, first + (i + q) * ld + c, n);
        else
          std::memset(line[q], 0, sizeof(line[q]));
      int64_t j = 0;
#ifdef __SSE2__
      for (; j + 4 <= n; j += 4) {
        __m128 square[4];
        for (int q = 0; q < 4; ++q) square[q] = _mm_load_ps(line[q] + j);
        _MM_TRANSPOSE4_PS(square[0], square[1], square[2], square[3]);
        for (int q = 0; q < 4; ++q) _mm_storeu_ps(dst + (c + j + q) * ldd + i, square[q]);
      }
#endif
      for (; j < n; ++j) {
        const quad column = {line[0][j], line[1][j], line[2][j], line[3][j]};
        std::memcpy(dst + (c + j) * ldd + i, &column, sizeof(column));
      }
    }
}

// A block of rows of the factor that shrink multiplies with: u[i][j] = src(first + i, rank + j), a matrix [.., r] that
// is stored as [r, k] if transposed.
void pack_rows(float* u, int64_t ld, LoraIn src, bool transposed, int64_t k, int64_t r, int64_t first, int64_t rows,
               int64_t rank, int64_t ranks) {
  if (transposed) return transpose(u, ld, src, rank * k + first, k, ranks, rows);
  for (int64_t i = 0; i < rows; ++i) fetch(u + i * ld, src, (first + i) * r + rank, ranks);
}

// A block of columns of the factor that expand multiplies with: v[j][i] = src(j, first + i), a matrix [r, n] that is
// stored as [n, r] if transposed. Rows of v are kCols apart.
void pack_columns(float* v, LoraIn src, bool transposed, int64_t n, int64_t r, int64_t first, int64_t cols) {
  if (transposed) return transpose(v, kCols, src, first * r, r, cols, r);
  for (int64_t j = 0; j < r; ++j) fetch(v + j * kCols, src, j * n + first, cols);
}

// -- the three loops ------------------------------------------------------------------------------------------------
// Each over `count` groups of rows. LoRA of one adapter is one group of all rows.

// The numbers of m rows of x and y, in order.
struct Rows {
  const int64_t* index;  // null: 0 .. m - 1
  int64_t m;
  int64_t operator[](int64_t i) const { return index ? index[i] : i; }
  int64_t ahead(int64_t i) const { return (*this)[at_most(i, m - 1)]; }
  bool adjoining(int64_t from, int64_t count) const { return (*this)[from + count - 1] - (*this)[from] == count - 1; }
};

// The rows of one adapter, which has the ranks first .. first + r - 1 of a factor, and its t [m, r], rows ld apart.
struct Group {
  Rows rows;
  int64_t first, r;
  float scale;  // that shrink multiplies with
  float* t;
  int64_t ld;
};

template <class Array>
Array from(Array a, int64_t element) {
  const int64_t size = a.type == Dtype::f32 ? 4 : 2;
  a.data = static_cast<decltype(a.data)>((char*)a.data + element * size);
  return a;
}

// Columns d.. of `count` rows of x from `top` on, dropped; the rows of dst are `ld` apart. Asks for what is wanted
// next: `down` rows and `right` columns away.
void fetch_rows(float* dst, int64_t ld, LoraIn x, int64_t k, const Rows& rows, int64_t top, int64_t count, int64_t d,
                int64_t cols, int64_t down, int64_t right, const Dropout& drop) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[top + i];
    fetch(dst + i * ld, x, row * k + d, cols);
    prefetch(x, rows.ahead(top + i + down) * k + d + right, cols);
    if (drop) drop(dst + i * ld, row, d, cols);
  }
}

// shrink of groups with m <= kRows: the factor is most of the traffic, so threads share its rows. The blocks of the sum
// depend on k alone, and are added in order. The t of the groups adjoin.
void shrink_few(const Group* groups, int64_t count, LoraIn x, LoraIn f, bool transposed, int64_t k, float factor,
                const Dropout& drop) {
  const int64_t block = transposed ? kDots : kDepth, parts = blocks(k, block);
  int64_t all = 0, work = 0;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t m = groups[g].rows.m, r = groups[g].r;
    all += m * r;
    work += m * (r + kMove) + r * kMove;
  }
  const Buffer partial(parts * all);
  parallel_for(0, count * parts, grain(block * work / count), [&](int64_t begin, int64_t end) {
    alignas(64) float rows[kRows * kDots], u[kDepth * kRanks], sums[kRows * kRanks];
    const float* row[kRows];
    for (int64_t task = begin; task < end; ++task) {
      const Group& group = groups[task / parts];
      const int64_t part = task % parts, d = part * block, depth = at_most(k - d, block);
      const int64_t m = group.rows.m, r = group.r;
      float* const own = partial.p + parts * (group.t - groups->t) + part * m * r;
      const bool as_it_lies = transposed && x.type == Dtype::f32 && !drop;
      if (!as_it_lies) fetch_rows(rows, block, x, k, group.rows, 0, m, d, depth, 0, block, drop);
      if (transposed) {
        for (int64_t i = 0; i < m; ++i)
          row[i] = as_it_lies ? static_cast<const float*>(x.data) + group.rows[i] * k + d : rows + i * block;
        switch_dtype(f.type, [&](auto element) {
          const auto* first = static_cast<const decltype(element)*>(f.data) + group.first * k + d;
          dots(own, r, row, m, first, k, r, depth, factor * group.scale);
        });
        continue;
      }
      for (int64_t rank = 0; rank < r; rank += kRanks) {
        const int64_t ranks = at_most(r - rank, kRanks), ld = padded(ranks, W);
        pack_rows(u, ld, from(f, group.first * k), false, k, r, d, depth, rank, ranks);
        run_deep({sums, kRanks, rows, block, 1, u, ld, depth, factor * group.scale, false}, m, ld);
        for (int64_t i = 0; i < m; ++i) put<false>({own}, i * r + rank, sums + i * kRanks, ranks);
      }
    }
  });
  for (int64_t g = 0; g < count; ++g) {
    const int64_t r = groups[g].r, size = groups[g].rows.m * r;
    const float* own = partial.p + parts * (groups[g].t - groups->t);
    for (int64_t i = 0; i < size; ++i) {
      float& t = groups[g].t[i / r * groups[g].ld + i % r];
      t = own[i];
      for (int64_t part = 1; part < parts; ++part) t += own[part * size + i];
    }
  }
}

// t [m, r] = factor * scale * drop(x) [m, k] f [k, r]; f is stored as [r, k] if transposed.
void shrink(const Group* groups, int64_t count, LoraIn x, LoraIn f, bool transposed, int64_t k, float factor,
            const Dropout& drop) {
  if (groups->rows.m <= kRows) return shrink_few(groups, count, x, f, transposed, k, factor, drop);
  const Group& group = *groups;
  const int64_t m = group.rows.m, r = group.r, ld = padded(r, W);
  const Buffer u(k * ld);
  parallel_for(0, blocks(k, kDepth), grain(kDepth * r * kMove), [&](int64_t begin, int64_t end) {
    const int64_t d = begin * kDepth, rows = at_most(end * kDepth, k) - d;
    pack_rows(u.p + d * ld, ld, from(f, group.first * k), transposed, k, r, d, rows, 0, r);
  });
  parallel_for(0, blocks(m, kRows), grain(kRows * k * (r + kMove)), [&](int64_t begin, int64_t end) {
    alignas(64) float rows[kRows * kDepth], sums[kRows * kRanks];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t top = task * kRows, count = at_most(m - top, kRows);
      for (int64_t rank = 0; rank < r; rank += kRanks) {
        const int64_t ranks = at_most(r - rank, kRanks);
        for (int64_t d = 0; d < k; d += kDepth) {
          const int64_t depth = at_most(k - d, kDepth);
          fetch_rows(rows, kDepth, x, k, group.rows, top, count, d, depth, 0, kDepth, drop);
          run_deep({sums, kRanks, rows, kDepth, 1, u.p + d * ld + rank, ld, depth, factor * group.scale, d > 0}, count,
                   padded(ranks, W));
        }
        for (int64_t i = 0; i < count; ++i)
          put<false>({group.t}, (top + i) * group.ld + rank, sums + i * kRanks, ranks);
      }
    }
  });
}

// y [m, n] += factor * drop'(t [m, r] f [r, n]); f is stored as [n, r] if transposed. Rows of y, and of an f that is
// not transposed, are ld apart.
void expand(LoraOut y, const Group* groups, int64_t count, LoraIn f, bool transposed, int64_t n, int64_t ld,
            float factor, const Dropout& drop) {
  constexpr int64_t rows = 8;
  const int64_t across = blocks(n, kCols), bands = blocks(groups->rows.m, kBand);
  // As in shrink: packed once for all bands or, if there is one band only, on the way.
  const bool packed = groups->rows.m > kBand || groups->r > kRanks;
  const Buffer all(packed ? across * kCols * groups->r : 0);
  parallel_for(0, packed ? across : 0, grain(kCols * groups->r * kMove), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * kCols, r = groups->r;
      pack_columns(all.p + col * r, from(f, groups->first * ld), transposed, ld, r, col, at_most(n - col, kCols));
    }
  });
  int64_t work = 0;
  for (int64_t g = 0; g < count; ++g)
    work += at_most(groups[g].rows.m, kBand) * (groups[g].r + kMove) + (packed ? 0 : groups[g].r * kMove);
  parallel_for(0, count * bands * across, grain(kCols * work / count), [&](int64_t begin, int64_t end) {
    alignas(64) float sums[rows * kCols], block[kRanks * kCols];
    for (int64_t task = begin; task < end; ++task) {
      const Group& group = groups[task / across / bands];
      const int64_t m = group.rows.m, r = group.r;
      const int64_t col = task % across * kCols, cols = at_most(n - col, kCols);
      const int64_t band = task / across % bands * kBand, bottom = at_most(m, band + kBand);
      // With very few rows, packing would cost more than the conflicts in the cache that it avoids.
      const bool as_it_lies = !packed && !transposed && f.type == Dtype::f32 && m <= kBare && cols % W == 0;
      if (!packed && !as_it_lies) pack_columns(block, from(f, group.first * ld), transposed, ld, r, col, cols);
      const float* v = packed       ? all.p + col * r
                       : as_it_lies ? static_cast<const float*>(f.data) + group.first * ld + col
                                    : block;
      for (int64_t top = band; top < bottom; top += rows) {
        const int64_t some = at_most(bottom - top, rows), row = group.rows[top];
        const bool direct = y.type == Dtype::f32 && !drop && cols % W == 0 && group.rows.adjoining(top, some);
        for (int64_t i = 0; i < some; ++i) prefetch(y, group.rows.ahead(top + i + rows) * ld + col, cols);
        float* const c = direct ? static_cast<float*>(y.data) + row * ld + col : sums;
        run({c, direct ? ld : kCols, group.t + top * group.ld, group.ld, 1, v, as_it_lies ? ld : kCols, r, factor,
             direct},
            some, padded(cols, W));
        for (int64_t i = 0; i < some && !direct; ++i) {
          if (drop) drop(sums + i * kCols, group.rows[top + i], col, cols);
          put<true>(y, group.rows[top + i] * ld + col, sums + i * kCols, cols);
        }
      }
    }
  });
}

// d [r, n] = factor * t^T [r, m] drop(u) [m, n], written as [n, r] if transposed
void wgrad(LoraOut d, bool transposed, const Group* groups, int64_t count, LoraIn u, int64_t n, float factor,
           const Dropout& drop) {
  // Columns alone are dealt out, never rows: a sum has one owner and one order.
  const int64_t width = at_most(padded(blocks(n, 32), 96), kCols), across = blocks(n, width);
  int64_t work = 0;
  for (int64_t g = 0; g < count; ++g) work += groups[g].rows.m * width * (groups[g].r + kMove);
  parallel_for(0, count * across, grain(work / count), [&](int64_t begin, int64_t end) {
    alignas(64) float rows[kSlab * kCols], sums[kRanks * kCols];
    for (int64_t task = begin; task < end; ++task) {
      const Group& group = groups[task / across];
      const int64_t m = group.rows.m, r = group.r, col = task % across * width, cols = at_most(n - col, width);
      for (int64_t rank = 0; rank < r; rank += kRanks) {
        const int64_t ranks = at_most(r - rank, kRanks);
        if (m == 0) std::memset(sums, 0, sizeof(sums));
        for (int64_t top = 0; top < m; top += kSlab) {
          const int64_t some = at_most(m - top, kSlab);
          fetch_rows(rows, kCols, u, n, group.rows, top, some, col, cols, kSlab, 0, drop);
          run({sums, kCols, group.t + top * group.ld + rank, 1, group.ld, rows, kCols, some, factor, top > 0}, ranks,
              padded(cols, W));
        }
        if (!transposed) {
          for (int64_t j = 0; j < ranks; ++j) put<false>(d, (group.first + rank + j) * n + col, sums + j * kCols, cols);
        } else {
          // Whole blocks, because a vector that reads what scalars have just written stalls.
          const int64_t ld = padded(ranks, 4), step = kSlab * kCols / padded(ranks, W);
          for (int64_t i = 0; i < cols; i += step) {
            const int64_t some = at_most(cols - i, step);
            transpose(rows, ld, {sums}, i, kCols, ranks, some);
            for (int64_t c = 0; c < some; ++c) put<false>(d, (col + i + c) * r + rank, rows + c * ld, ranks);
          }
        }
      }
    }
  });
}

// -- many adapters --------------------------------------------------------------------------------------------------

// The groups as the loops take them: first those of few rows and ranks, which share the loops' tasks, then those that
// fill the threads alone, then those without rows.
class Bank {
 public:
  // `slices` of t lie side by side.
  explicit Bank(const std::vector<LoraGroup>& groups, int64_t slices = 1) : t_(slices * size(groups)) {
    float* t = t_.p;
    for (int kind = 0; kind < 3; ++kind) {
      for (const LoraGroup& g : groups)
        if (kind_of(g) == kind) {
          groups_.push_back({{g.rows, g.m}, g.first, g.r, g.scale, t, slices * g.r});
          t += slices * g.m * g.r;
        }
      ends_[kind] = static_cast<int64_t>(groups_.size());
    }
  }

  // f(groups, count) for what goes through the loops at once.
  template <class F>
  void each(const F& f) const {
    if (ends_[0]) f(groups_.data(), ends_[0]);
    for (int64_t g = ends_[0]; g < ends_[1]; ++g) f(groups_.data() + g, 1);
  }

  template <class F>
  void all(const F& f) const {
    if (ends_[2]) f(groups_.data(), ends_[2]);
  }

 private:
  static int kind_of(const LoraGroup& g) { return g.m == 0 ? 2 : g.m <= kRows && g.r <= kRanks ? 0 : 1; }
  static int64_t size(const std::vector<LoraGroup>& groups) {
    int64_t sum = 0;
    for (const LoraGroup& g : groups) sum += g.m * g.r;
    return sum;
  }

  Buffer t_;
  std::vector<Group> groups_;
  int64_t ends_[3];
};

// -- several linears ------------------------------------------------------------------------------------------------

// r columns of the t of all slices, whose rows are ld apart.
Group columns(int64_t m, float* t, int64_t r, int64_t ld) { return {{nullptr, m}, 0, r, 1.0f, t, ld}; }

// f(slice, its columns of t) for the slices of some rank.
template <class F>
void each(const std::vector<LoraSlice>& slices, const LoraShape& s, float* t, const F& f) {
  for (const LoraSlice& slice : slices) {
    if (slice.r) f(slice, columns(s.m, t, slice.r, s.r));
    t += slice.r;
  }
}

}  // namespace

void lora_add(const LoraShape& s, const std::vector<LoraSlice>& slices, LoraIn x, LoraIn a, const LoraDropout& drop,
              float* t) {
  if (s.m == 0 || s.r == 0) return;
  const Group all = columns(s.m, t, s.r, s.r);
  shrink(&all, 1, x, a, true, s.k, drop.scale(), Dropout(drop));
  each(slices, s, t,
       [&](const LoraSlice& own, const Group& u) { expand(own.out, &u, 1, own.b, true, own.n, own.n, own.scale, {}); });
}

void lora_backward(const LoraShape& s, const std::vector<LoraSlice>& slices, LoraOut dx, LoraIn x, LoraIn a,
                   const float* t, const LoraDropout& drop, LoraOut da, float* dt_out) {
  each(slices, s, const_cast<float*>(t), [&](const LoraSlice& own, const Group& u) {
    if (own.out.data) wgrad(own.out, true, &u, 1, own.g, own.n, own.scale, {});
  });
  if (s.r == 0 || (!dx.data && !da.data && !dt_out)) return;
  const Buffer buffer(dt_out ? 0 : s.m * s.r);
  const Group dt = columns(s.m, dt_out ? dt_out : buffer.p, s.r, s.r);
  // The factor of what dropout keeps goes into dt, for all of its uses.
  each(slices, s, dt.t, [&](const LoraSlice& own, const Group& u) {
    if (s.m) shrink(&u, 1, own.g, own.b, false, own.n, own.scale * drop.scale(), {});
  });
  if (da.data) wgrad(da, false, &dt, 1, x, s.k, 1.0f, Dropout(drop));
  if (dx.data && s.m) expand(dx, &dt, 1, a, false, s.k, s.k, 1.0f, Dropout(drop));
}

void multi_lora_add(const LoraShape& s, const std::vector<LoraGroup>& groups, LoraOut y, LoraIn x, LoraIn a, LoraIn bt,
                    const LoraDropout& drop) {
  const Bank bank(groups);
  bank.each([&](const Group* g, int64_t n) { shrink(g, n, x, a, true, s.k, drop.scale(), Dropout(drop)); });
  bank.each([&](const Group* g, int64_t n) { expand(y, g, n, bt, false, s.n, s.n, 1.0f, {}); });
}

void lora_apply(const LoraShape& s, const std::vector<LoraGroup>& groups, const std::vector<int64_t>& slice_n,
                LoraOut y, LoraIn x, LoraIn a, LoraIn bt) {
  const auto slices = static_cast<int64_t>(slice_n.size());
  const Bank bank(groups, slices);
  bank.each([&](const Group* g, int64_t n) {
    std::vector<Group> parts(g, g + n);
    for (Group& part : parts) part.first *= slices, part.r *= slices;
    shrink(parts.data(), n, x, a, true, s.k, 1.0f, {});
    for (int64_t slice = 0, col = 0; slice < slices; col += slice_n[slice++]) {
      for (int64_t i = 0; i < n; ++i) {
        parts[i] = g[i];
        parts[i].t += slice * g[i].r;
      }
      expand(from(y, col), parts.data(), n, from(bt, col), false, slice_n[slice], s.n, 1.0f, {});
    }
  });
}

void multi_lora_backward(const LoraShape& s, const std::vector<LoraGroup>& groups, LoraOut dx, LoraIn dy, LoraIn x,
                         LoraIn a, LoraIn bt, const LoraDropout& drop, LoraOut da, LoraOut dbt) {
  const Bank bank(groups);
  if (dbt.data) {
    bank.each([&](const Group* g, int64_t n) { shrink(g, n, x, a, true, s.k, drop.scale(), Dropout(drop)); });
    bank.all([&](const Group* g, int64_t n) { wgrad(dbt, false, g, n, dy, s.n, 1.0f, {}); });
  }
  if (!dx.data && !da.data) return;
  bank.each([&](const Group* g, int64_t n) { shrink(g, n, dy, bt, true, s.n, drop.scale(), {}); });
  if (da.data) bank.all([&](const Group* g, int64_t n) { wgrad(da, false, g, n, x, s.k, 1.0f, Dropout(drop)); });
  if (dx.data) bank.each([&](const Group* g, int64_t n) { expand(dx, g, n, a, false, s.k, s.k, 1.0f, Dropout(drop)); });
}

}  // namespace pk::PK_ISA
