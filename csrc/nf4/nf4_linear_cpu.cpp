// Linear layers on packed weights on the CPU. README.md has the why of the blocking.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "nf4/nf4_decode.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kFew = 4;               // rows of x up to which weights go from the table into the product
constexpr int64_t kDepth = 256;           // columns of W that the forward decodes at a time
constexpr int64_t kRows = 48;             // rows of W beside them: whole tiles of 4, 6, 8, 12 and 24
constexpr int64_t kChunk = 512;           // rows of x, for each of which W is decoded anew
constexpr int64_t kSlab = 128;            // rows of W that the backward decodes at a time
constexpr int64_t kCols = 192;            // columns of W beside them: whole panels
constexpr int64_t kBackChunk = 256;       // rows of g, for each of which W is decoded anew
constexpr int64_t kWide = 3 * W;          // a panel: the widest tile
constexpr int kSums = W == 16 ? 24 : 12;  // vectors of sums in the registers beside what they are made of
constexpr int64_t kGrain = 1 << 20;       // multiply-adds that pay for waking a thread

int64_t grain(int64_t work_of_one) { return blocks(kGrain, work_of_one + 1); }

// An operand is made of 32-bit words along the sum: a float each, or two neighbouring bf16 for vdpbf16ps.
#ifdef __AVX512BF16__
template <class T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kPairs = false;
#endif

template <bool pairs>
PK_INLINE vec multiply_add(const uint32_t* left, vec right, vec sum) {
#ifdef __AVX512BF16__
  if constexpr (pairs)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*left)), (__m512bh)right);
#endif
  return fma(splat(bit_cast<float>(*left)), right, sum);
}

// c [rows, cols] += a [rows, depth] b [depth, cols], with words of a and b. cols are V whole vectors.
struct Product {
  float* c;
  int64_t ldc;
  const uint32_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb, depth;
};

template <bool pairs, int R, int V>
PK_INLINE void tile(const Product& p, int64_t row) {
  vec sum[R][V];
  float* c = p.c + row * p.ldc;
  const uint32_t *a = p.a + row * p.lda, *b = p.b;
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[i][v] = load(c + i * p.ldc + v * W);
  for (int64_t d = 0; d < p.depth; ++d, b += p.ldb) {
    vec right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + v * W, sizeof(vec));
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add<pairs>(a + i * p.lda + d, right[v], sum[i][v]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(c + i * p.ldc + v * W, sum[i][v]);
}

// Tiles of R rows, then of the next smaller size.
template <bool pairs, int R, int V>
void tiles(const Product& p, int64_t row, int64_t rows) {
  for (; row + R <= rows; row += R) tile<pairs, R, V>(p, row);
  if constexpr (R > 1) {
    if (row < rows) tiles<pairs, (R > 8 ? 8 : R > 4 ? 4 : R / 2), V>(p, row, rows);
  }
}

template <bool pairs>
void run(const Product& p, int64_t rows, int64_t vectors) {
  if (vectors == 3)
    tiles<pairs, kSums / 3, 3>(p, 0, rows);
  else if (vectors == 2)
    tiles<pairs, kSums / 2, 2>(p, 0, rows);
  else
    tiles<pairs, kSums, 1>(p, 0, rows);
}

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

// n weights as words; `line` has room for them as floats and a vector more.
template <bool pairs>
void fetch_weights(const Nf4& w, int64_t first, int64_t n, float* room, [[maybe_unused]] float* line, uint32_t* out) {
#ifdef __AVX512BF16__
  if constexpr (pairs) {
    decode(w, first, n, room, line);
    store(line + n, vec{});
    for (int64_t i = 0; i < n; i += W) {
      const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)load(line + i));
      std::memcpy(out + i / 2, &half, sizeof(half));
    }
    return;
  }
#endif
  decode(w, first, n, room, reinterpret_cast<float*>(out));
}

// Row d of a right operand of `depth` rows, panel by panel, from n floats: v, or pairs of v and what is below it.
template <bool pairs>
void put_row(const float* v, [[maybe_unused]] const float* below, int64_t n, int64_t d, int64_t depth, uint32_t* out) {
  each_panel(padded(n, W), [&](int64_t c, int64_t vectors) {
    uint32_t* to = out + c * depth + d * vectors * W;
    for (int64_t i = 0; i < vectors * W; i += W) {
      vec both = load(v + c + i);
#ifdef __AVX512BF16__
      if constexpr (pairs) {
        const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)load(below + c + i), (__m512)both);
        both = (vec)_mm512_permutexvar_epi16(mixed, (__m512i)halves);
      }
#endif
      std::memcpy(to + i, &both, sizeof(both));
    }
  });
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

// -- the forward ----------------------------------------------------------------------------------------------------

// One row of W times M rows of x, ldx apart. The row starts at `first`, which is even, and is n long.
template <int M>
PK_INLINE void dot(const Nf4& w, int64_t first, int64_t n, const float* x, int64_t ldx, float* room, float* out) {
  constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums of a row, so that they do not wait for each other
  vec sum[M][U] = {};
  each_block(w, first, n, room, [&](int64_t at, int64_t count, float scale) {
    const Table table(scale);
    const uint8_t* p = w.bytes + at / 2;
    const float* left = x + (at - first);
    int64_t i = 0;
    for (; i + U * W <= count; i += U * W)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const vec right = table.at(p + (i + u * W) / 2);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][u] = fma(load(left + m * ldx + i + u * W), right, sum[m][u]);
      }
    for (; i < count; i += W) {
      const int rest = static_cast<int>(at_most(W, count - i));
      float numbers[W] = {};
      for (int j = 0; j < rest; ++j) numbers[j] = number(w, at + i + j, scale);
      for (int m = 0; m < M; ++m) sum[m][0] = fma(load_n(left + m * ldx + i, rest), load(numbers), sum[m][0]);
    }
  });
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sum[m][0] += sum[m][u];
    out[m] = hsum(sum[m][0]);
  }
}

template <class T, int M>
void few_rows(const Nf4Linear& s, const T* x, const Nf4& w, const float* bias, T* y) {
  // A row that starts in the middle of a byte is read from the byte on, and its x from a zero on.
  const int64_t ldx = padded(s.k + 1, W), copies = 1 + s.k % 2;
  const Buffer left(copies * M * ldx);
  for (int64_t c = 0; c < copies; ++c)
    for (int m = 0; m < M; ++m) {
      float* to = left.p + (c * M + m) * ldx;
      to[0] = 0;
      fetch<false>(x + m * s.k, s.k, reinterpret_cast<uint32_t*>(to + c));
    }
  parallel_for(0, s.n, grain(s.k * M), [&](int64_t begin, int64_t end) {
    const Buffer room(room_of(w, s.k + 1));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t half = n * s.k % 2;
      float out[M];
      dot<M>(w, n * s.k - half, s.k + half, left.p + half * M * ldx, ldx, room.p, out);
      for (int m = 0; m < M; ++m) y[m * s.n + n] = narrow<T>(out[m] + bias[n]);
    }
  });
}

template <class T>
void many_rows(const Nf4Linear& s, const T* x, const Nf4& w, const float* bias, T* y) {
  constexpr bool pairs = kPairs<T>;
  const int64_t mp = padded(s.m, W);
  // x^T chunk by chunk of kDepth, in each panel by panel.
  const Buffer right(words<pairs>(s.k) * mp);
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
  parallel_for(0, blocks(s.n, kRows), grain(kRows * s.k * mp), [&](int64_t begin, int64_t end) {
    constexpr int64_t ldw = words<pairs>(kDepth) + 16;  // not a power of two, or rows would evict each other
    const int64_t ldc = mp + W;
    const Buffer left(kRows * ldw), sums(kRows * ldc), room(room_of(w, kDepth));
    auto* ws = reinterpret_cast<uint32_t*>(left.p);
    alignas(64) float line[kDepth + W];
    for (int64_t n = begin * kRows; n < at_most(s.n, end * kRows); n += kRows) {
      const int64_t rows = at_most(kRows, s.n - n);
      std::memset(sums.p, 0, rows * ldc * sizeof(float));
      for (int64_t k = 0; k < s.k; k += kDepth) {
        const int64_t cols = at_most(kDepth, s.k - k), depth = words<pairs>(cols);
        for (int64_t i = 0; i < rows; ++i) fetch_weights<pairs>(w, (n + i) * s.k + k, cols, room.p, line, ws + i * ldw);
        each_panel(mp, [&](int64_t c, int64_t vectors) {
          const uint32_t* panel = xs + words<pairs>(k) * mp + c * depth;
          run<pairs>({sums.p + c, ldc, ws, ldw, panel, vectors * W, depth}, rows, vectors);
        });
      }
      for (int64_t m = 0; m < s.m; ++m) {
        for (int64_t i = 0; i < rows; ++i) line[i] = sums.p[i * ldc + m] + bias[n + i];
        put(line, rows, y + m * s.n + n);
      }
    }
  });
}

// -- the backward ---------------------------------------------------------------------------------------------------

template <class T>
void back(const Nf4Linear& s, const T* g, const Nf4& w, T* dx) {
  constexpr bool pairs = kPairs<T>;
  constexpr int64_t ldg = words<pairs>(kSlab) + 16, ldc = kCols + W;
  parallel_for(0, blocks(s.k, kCols), grain(kCols * s.n * s.m), [&](int64_t begin, int64_t end) {
    const Buffer left(s.m * ldg), right(words<pairs>(kSlab) * kCols), sums(s.m * ldc), room(room_of(w, kCols));
    auto *gs = reinterpret_cast<uint32_t*>(left.p), *ws = reinterpret_cast<uint32_t*>(right.p);
    alignas(64) float line[2][kCols] = {};
    for (int64_t k = begin * kCols; k < at_most(s.k, end * kCols); k += kCols) {
      const int64_t cols = at_most(kCols, s.k - k);
      std::memset(sums.p, 0, s.m * ldc * sizeof(float));
      for (int64_t n = 0; n < s.n; n += kSlab) {
        const int64_t rows = at_most(kSlab, s.n - n), depth = words<pairs>(rows);
        for (int64_t d = 0; d < depth; ++d) {
          for (int64_t i = 0; i < 1 + pairs; ++i)
            if (const int64_t row = (1 + pairs) * d + i; row < rows)
              decode(w, (n + row) * s.k + k, cols, room.p, line[i]);
            else
              std::memset(line[i], 0, sizeof(line[i]));
          put_row<pairs>(line[0], line[1], cols, d, depth, ws);
        }
        for (int64_t m = 0; m < s.m; ++m) fetch<pairs>(g + m * s.n + n, rows, gs + m * ldg);
        each_panel(padded(cols, W), [&](int64_t c, int64_t vectors) {
          run<pairs>({sums.p + c, ldc, gs, ldg, ws + c * depth, vectors * W, depth}, s.m, vectors);
        });
      }
      for (int64_t m = 0; m < s.m; ++m) put(sums.p + m * ldc, cols, dx + m * s.k + k);
    }
  });
}

}  // namespace

void nf4_linear(const Nf4Linear& s, Dtype type, const void* x, const Nf4& w, Dtype bias_type, const void* bias,
                void* y) {
  const auto wide = widened(bias_type, bias, s.n);
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    static_assert(kFew == 4);
    if (s.m == 1) return few_rows<T, 1>(s, in, w, wide.get(), out);
    if (s.m == 2) return few_rows<T, 2>(s, in, w, wide.get(), out);
    if (s.m == 3) return few_rows<T, 3>(s, in, w, wide.get(), out);
    if (s.m == 4) return few_rows<T, 4>(s, in, w, wide.get(), out);
    const int64_t chunk = chunk_of(s.m, kChunk);
    for (int64_t m = 0; m < s.m; m += chunk)
      many_rows<T>({at_most(chunk, s.m - m), s.n, s.k}, in + m * s.k, w, wide.get(), out + m * s.n);
  });
}

void nf4_dgrad(const Nf4Linear& s, Dtype type, const void* g, const Nf4& w, void* dx) {
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    const int64_t chunk = chunk_of(s.m, kBackChunk);
    for (int64_t m = 0; m < s.m; m += chunk)
      back<T>({at_most(chunk, s.m - m), s.n, s.k}, static_cast<const T*>(g) + m * s.n, w,
              static_cast<T*>(dx) + m * s.k);
  });
}

}  // namespace pk::PK_ISA
