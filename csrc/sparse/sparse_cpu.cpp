// Products with a sparse delta, and gradients at its entries, on the CPU. README.md has the why of the blocking.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "sparse/sparse.h"

namespace pk::PK_ISA {
namespace {

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;  // products of bf16 without widening them: vdpbf16ps
#else
constexpr bool kHasPairs = false;
#endif

constexpr int64_t kScalar = 8;        // tokens up to which entries are summed one by one
constexpr int64_t kFew = 128;         // words of a block of tokens for sparse masks: transposes stay in the L2 cache
constexpr int64_t kMany = 512;        // and for dense ones: fewer sums of lanes
constexpr int64_t kSparse = 33;       // a mask is sparse that has one entry in so many places
constexpr int64_t kRoom = 4 << 20;    // words of both transposes of dense masks
constexpr int64_t kTile = 384 << 10;  // bytes of columns of x^T, or of rows of dy^T, that stay in the L2 cache
constexpr int64_t kPerRow = 6;        // entries of a row in a tile that pay for loading the row
constexpr int64_t kNarrow = 16;       // columns of the narrowest tile, which stays in the L1 cache
constexpr int64_t kDense = 64;        // columns of the products that whole_rows sets aside
constexpr int64_t kPieces = 64;       // of the rows, for threads
constexpr int64_t kGrain = 1 << 18;   // elements or vectors that pay for waking a thread
constexpr int64_t kSlab = 512 << 10;  // bytes of the transposed tokens beside a sparse product
#ifdef __AVX512F__
constexpr int64_t kRows = 4;  // rows of whole_rows: 16 sums in 32 registers
#else
constexpr int64_t kRows = 2;
#endif

PK_INLINE int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
PK_INLINE int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }
PK_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
PK_INLINE int64_t padded(int64_t n, int64_t to) { return blocks(n, to) * to; }

// Uninitialised and aligned to vectors.
struct Buffer {
  std::unique_ptr<float, void (*)(void*)> p;
  explicit Buffer(int64_t floats)
      : p(static_cast<float*>(std::aligned_alloc(64, padded(floats * 4 + 1, 64))), std::free) {
    if (!p) throw std::bad_alloc();
  }
  float* get() const { return p.get(); }
};

template <class P>
using Bare = std::remove_const_t<std::remove_pointer_t<P>>;

template <class F>
auto switch_index(bool wide, F&& f) {
  return wide ? f(int64_t{}) : f(int32_t{});
}

// -- transposition --------------------------------------------------------------------------------------------------

// a0 b0 a1 b1 ...: the first W of them in lo, the others in hi
PK_INLINE void zip(vec a, vec b, vec& lo, vec& hi) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 first = (__m512)a, second = (__m512)b;
  lo = (vec)_mm512_permutex2var_ps(first, low, second);
  hi = (vec)_mm512_permutex2var_ps(first, high, second);
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  lo = (vec)_mm256_permute2f128_ps(even, odd, 0x20);
  hi = (vec)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  const vec first = a, second = b;
  lo = vec{first[0], second[0], first[1], second[1]};
  hi = vec{first[2], second[2], first[3], second[3]};
#endif
}

// Each round moves the top bit of the row behind the bits of the lane: after log2(W) of them the two have changed
// places.
PK_INLINE void transpose(vec (&r)[W]) {
  for (int round = 1; round < W; round *= 2) {
    vec next[W];
    for (int i = 0; i < W / 2; ++i) zip(r[i], r[i + W / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < W; ++i) r[i] = next[i];
  }
}

// W columns of W rows of T, or with pairs 2 W of 2 W of bf16, transposed: column c goes to dst + slots[c] * ld, without
// slots to dst + c * ld, and nowhere where slots[c] is -1. Rows that do not exist are zeros.
template <bool pairs, class T>
PK_INLINE void transpose_block(const T* src, int64_t stride, int64_t rows, int64_t columns, const int32_t* slots,
                               float* dst, int64_t ld) {
  const auto put = [&](const vec& r, int64_t c) {
    if (c < columns && (slots == nullptr || slots[c] >= 0)) store(dst + (slots ? slots[c] : c) * ld, r);
  };
  vec r[W];
  if constexpr (pairs) {
#ifdef __AVX512BF16__
    vec high[W];
    const __mmask32 there = columns >= 32 ? ~0u : (1u << columns) - 1;
    const auto row = [&](int64_t i) {
      return i < rows ? _mm512_maskz_loadu_epi16(there, src + i * stride) : _mm512_setzero_si512();
    };
    for (int i = 0; i < W; ++i) {  // a word is a number of this row and the one below it
      const __m512i even = row(2 * i), odd = row(2 * i + 1);
      r[i] = (vec)_mm512_unpacklo_epi16(even, odd);
      high[i] = (vec)_mm512_unpackhi_epi16(even, odd);
    }
    transpose(r);
    for (int i = 0; i < W; ++i) put(r[i], i / 4 * 8 + i % 4);
    transpose(high);
    for (int i = 0; i < W; ++i) put(high[i], i / 4 * 8 + 4 + i % 4);
#endif
  } else {
    const int lanes = static_cast<int>(at_most(W, columns));
    for (int i = 0; i < W; ++i)
      r[i] = i >= rows ? vec{} : lanes == W ? load(src + i * stride) : load_n(src + i * stride, lanes);
    transpose(r);
    for (int i = 0; i < W; ++i) put(r[i], i);
  }
}

// src [tokens, n] transposed into dst [*, ld words], padded with zeros to whole vectors, in tasks. slots as above.
template <bool pairs, class T>
struct Transposition {
  static constexpr int64_t step = pairs ? 2 * W : W, strip = 1024;
  const T* src;
  int64_t tokens, n;
  const int32_t* slots;
  float* dst;
  int64_t ld;

  int64_t tasks() const { return blocks(tokens, step) * blocks(n, strip); }

  void run(int64_t task) const {
    const int64_t strips = blocks(n, strip), group = task / strips, first = task % strips * strip;
    const T* from = src + group * step * n;
    for (int64_t c = first; c < at_most(first + strip, n); c += step) {
      bool wanted = slots == nullptr;
      for (int64_t i = c; slots && i < at_most(c + step, n); ++i) wanted |= slots[i] >= 0;
      if (!wanted) continue;
      float* to = dst + group * W + (slots ? 0 : c * ld);
      transpose_block<pairs>(from + c, n, tokens - group * step, n - c, slots ? slots + c : slots, to, ld);
    }
  }
};

// All threads together, waiting for one another once.
template <class... Some>
void transpose_all(const Some&... some) {
  constexpr int64_t grain = kGrain / (16 * 1024);
  parallel_for(0, (some.tasks() + ...), grain, [&](int64_t begin, int64_t end) {
    const auto part = [&](const auto& one) {
      for (int64_t task = at_least(begin, 0); task < at_most(end, one.tasks()); ++task) one.run(task);
      begin -= one.tasks();
      end -= one.tasks();
    };
    (part(some), ...);
  });
}

// p[0 ... n) += v, rounded once
template <class T>
PK_INLINE void add_to(T* p, vec v, int64_t n) {
  n == W ? store(p, load(p) + v) : store_n(p, load_n(p, static_cast<int>(n)) + v, static_cast<int>(n));
}

// -- gradients at the entries ---------------------------------------------------------------------------------------

template <bool pairs>
PK_INLINE vec multiply(vec a, vec b, vec sum) {
#ifdef __AVX512BF16__
  if constexpr (pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, sum);
}

// out[k] += the sum of the lanes of s[k]
template <int K>
PK_INLINE void add_sums(vec (&s)[4], float* out) {
  vec lo, hi;
  for (int k = 0; k < 2; ++k) {
    zip(s[k], s[k + 2], lo, hi);
    s[k] = lo + hi;
  }
  zip(s[0], s[1], lo, hi);
  lo = lo + hi;  // s0 s1 s2 s3, W / 4 times
  typedef float quad __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)lo), _mm512_extractf32x8_ps((__m512)lo, 1));
  const quad total = (quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const quad total = (quad)_mm_add_ps(_mm256_castps256_ps128((__m256)lo), _mm256_extractf128_ps((__m256)lo, 1));
#else
  const quad total = lo;
#endif
  if constexpr (K == 4) {
    quad before;
    std::memcpy(&before, out, sizeof(before));
    before += total;
    std::memcpy(out, &before, sizeof(before));
  } else {
    for (int k = 0; k < K; ++k) out[k] += total[k];
  }
}

// R rows of dy^T times up to 4 of x^T.
template <int R, int K, bool pairs>
PK_INLINE void dots(const float* const* d, const float* const* x, int64_t words, float* out, int64_t next) {
  vec sum[R][4] = {};
  for (int64_t i = 0; i < words; i += W) {
    vec right[K];
    for (int k = 0; k < K; ++k) right[k] = load(x[k] + i);
    for (int r = 0; r < R; ++r) {
      const vec left = load(d[r] + i);
      for (int k = 0; k < K; ++k) sum[r][k] = multiply<pairs>(left, right[k], sum[r][k]);
    }
  }
  for (int r = 0; r < R; ++r) add_sums<K>(sum[r], out + r * next);
}

// The mask without its empty rows and columns: which there are, and the place of each among those there are, or -1.
struct Used {
  std::vector<int32_t> rows, columns, row_slots, column_slots;
};

template <class I>
Used used(const Mask& mask, const I* crow, const I* col) {
  Used out;
  out.row_slots.assign(mask.m, -1);
  out.column_slots.assign(mask.n, -1);
  for (int64_t i = 0; i < mask.m; ++i) {
    if (crow[i] == crow[i + 1]) continue;
    out.row_slots[i] = static_cast<int32_t>(out.rows.size());
    out.rows.push_back(static_cast<int32_t>(i));
  }
  for (int64_t e = 0; e < mask.nnz; ++e) out.column_slots[col[e]] = 0;
  for (int64_t c = 0; c < mask.n; ++c) {
    if (out.column_slots[c] < 0) continue;
    out.column_slots[c] = static_cast<int32_t>(out.columns.size());
    out.columns.push_back(static_cast<int32_t>(c));
  }
  return out;
}

// What a thread needs to know of a block of tokens.
template <class I>
struct Tokens {
  const float *dyt, *xt;
  int64_t ld, words;
  const I *crow, *col;
  const Used& used;
  int64_t* at;  // the next entry of each used row
  float* out;
};

// The entries of one row before column `stop`.
template <bool pairs, class I>
PK_INLINE void one_row(const Tokens<I>& t, int64_t row, int64_t stop) {
  const int64_t end = t.crow[t.used.rows[row] + 1];
  const float* d = t.dyt + row * t.ld;
  const float* x[4];
  int64_t e = t.at[row];
  while (e < end && t.col[e] < stop) {
    int k = 0;
    for (; k < 4 && e + k < end && t.col[e + k] < stop; ++k) x[k] = t.xt + t.used.column_slots[t.col[e + k]] * t.ld;
    switch (k) {
      case 4:
        dots<1, 4, pairs>(&d, x, t.words, t.out + e, 0);
        break;
      case 3:
        dots<1, 3, pairs>(&d, x, t.words, t.out + e, 0);
        break;
      case 2:
        dots<1, 2, pairs>(&d, x, t.words, t.out + e, 0);
        break;
      default:
        dots<1, 1, pairs>(&d, x, t.words, t.out + e, 0);
    }
    e += k;
  }
  t.at[row] = e;
}

// kRows rows from `row` on and used columns [first, last): all products, of which the entries take theirs.
template <bool pairs, class I>
void whole_rows(const Tokens<I>& t, int64_t row, int64_t first, int64_t last, const int64_t* ends) {
  alignas(64) float all[kRows][kDense];
  const float *d[kRows], *x[4];
  for (int r = 0; r < kRows; ++r) d[r] = t.dyt + (row + r) * t.ld;
  for (int64_t c = first; c < last; c += kDense) {
    const int64_t stop = at_most(c + kDense, last);
    for (auto& line : all) std::fill(line, line + kDense, 0.0f);
    for (int64_t k = c; k < stop; k += 4) {
      for (int i = 0; i < 4; ++i) x[i] = t.xt + at_most(k + i, last - 1) * t.ld;
      dots<kRows, 4, pairs>(d, x, t.words, all[0] + k - c, kDense);
    }
    for (int r = 0; r < kRows; ++r) {
      int64_t& e = t.at[row + r];
      for (; e < ends[r]; ++e) {
        const int64_t slot = t.used.column_slots[t.col[e]];
        if (slot >= stop) break;
        t.out[e] += all[r][slot - c];
      }
    }
  }
}

// Used rows [begin, end), used columns [first, last).
template <bool pairs, class I>
void tile(const Tokens<I>& t, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t stop = t.used.columns[last - 1] + 1;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = at_most(kRows, end - row);
    int64_t ends[kRows], entries = 0;
    for (int r = 0; r < rows; ++r) {
      const I *from = t.col + t.at[row + r], *to = t.col + t.crow[t.used.rows[row + r] + 1];
      ends[r] = std::lower_bound(from, at_most(to - from, last - first) + from, stop) - t.col;
      entries += ends[r] - t.at[row + r];
    }
    if (rows == kRows && entries * 5 >= kRows * (last - first) * 3)  // single products take 5/3 of the time
      whole_rows<pairs>(t, row, first, last, ends);
    else
      for (int r = 0; r < rows; ++r) one_row<pairs>(t, row + r, stop);
  }
}

// Bounds of the used rows, in pieces of about as much work each and of whole groups.
template <class I>
std::vector<int64_t> pieces(const std::vector<int32_t>& rows, const I* crow, int64_t nnz) {
  std::vector<int64_t> bound(kPieces + 1, rows.size());
  int64_t row = 0;
  for (int64_t k = 0; k < kPieces; ++k) {
    while (row < static_cast<int64_t>(rows.size()) && crow[rows[row]] * kPieces < nnz * k) row += kRows;
    bound[k] = at_most(row, rows.size());
  }
  return bound;
}

template <bool pairs, class T, class I>
void sddmm_tiles(const T* dy, const T* x, int64_t tokens, const Mask& mask, const I* crow, const I* col, float* out) {
  constexpr int64_t per_word = pairs ? 2 : 1;
  const Used own = used(mask, crow, col);
  const int64_t m = own.rows.size(), n = own.columns.size(), nnz = mask.nnz;
  if (nnz == 0 || tokens == 0) return;
  const int64_t longest = nnz * kSparse < m * n ? kFew : at_most(at_least(kRoom / (m + n) / W * W, kFew), kMany);
  const int64_t ld = at_most(padded(tokens, W * per_word) / per_word, longest), block = ld * per_word;
  const Buffer room((m + n) * ld);
  float *dyt = room.get(), *xt = dyt + m * ld;
  std::vector<int64_t> at(m);
  const auto bound = pieces(own.rows, crow, nnz);
  const int64_t most = at_least(kTile / (ld * 4), kNarrow);
  const int64_t width = at_most(padded(at_least(kPerRow * m * n / nnz, kNarrow), 4), most);
  const int64_t height = width < most ? at_least(kTile / (ld * 4) / kRows * kRows, kNarrow) : m;
  for (int64_t t = 0; t < tokens; t += block) {
    const int64_t count = at_most(block, tokens - t), words = padded(count, W * per_word) / per_word;
    using Turn = Transposition<pairs, T>;
    transpose_all(Turn{dy + t * mask.m, count, mask.m, own.row_slots.data(), dyt, ld},
                  Turn{x + t * mask.n, count, mask.n, own.column_slots.data(), xt, ld});
    const Tokens<I> here{dyt, xt, ld, words, crow, col, own, at.data(), out};
    parallel_for(0, kPieces, at_least(1, kGrain * kPieces / (nnz * words)), [&](int64_t begin, int64_t end) {
      for (int64_t r = bound[begin]; r < bound[end]; r += height) {
        const int64_t last = at_most(r + height, bound[end]);
        for (int64_t i = r; i < last; ++i) at[i] = crow[own.rows[i]];
        for (int64_t c = 0; c < n; c += width) tile<pairs>(here, r, last, c, at_most(c + width, n));
      }
    });
  }
}

// Up to kScalar tokens, which would leave most lanes of a transposed vector empty.
template <class T, class I>
void sddmm_few(const T* dy, const T* x, int64_t tokens, const Mask& mask, const I* crow, const I* col, float* out) {
  const int64_t m = mask.m, n = mask.n;
  parallel_for(0, m, at_least(1, kGrain * m / (mask.nnz * tokens + m)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float row[kScalar];
      for (int64_t t = 0; t < tokens; ++t) row[t] = widen(dy[t * m + i]);
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
        float sum = 0;
        for (int64_t t = 0; t < tokens; ++t) sum += row[t] * widen(x[t * n + col[e]]);
        out[e] = sum;
      }
    }
  });
}

// -- products with the delta ----------------------------------------------------------------------------------------

// y [tokens, m] += x D^T. V vectors of tokens at a time.
template <int V, class T, class I>
void add_product(T* y, const T* x, int64_t tokens, const Mask& mask, const I* crow, const I* col, const float* vals) {
  constexpr int64_t ld = V * W;
  const int64_t m = mask.m, n = mask.n, groups = blocks(m, W);
  const Buffer xt(n * ld);
  for (int64_t t = 0; t < tokens; t += ld) {
    const int64_t count = at_most(ld, tokens - t);
    transpose_all(Transposition<false, T>{x + t * n, count, n, nullptr, xt.get(), ld});
    parallel_for(0, groups, at_least(1, kGrain * groups / (mask.nnz * V + m)), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * W, rows = at_most(W, m - first);
        if (crow[first] == crow[first + rows]) continue;
        vec sums[V][W] = {};
        for (int64_t r = 0; r < rows; ++r) {
          vec sum[V] = {};
          for (int64_t e = crow[first + r]; e < crow[first + r + 1]; ++e) {
            const float* from = xt.get() + col[e] * ld;
            const vec value = splat(vals[e]);
            for (int v = 0; v < V; ++v) sum[v] = fma(value, load(from + v * W), sum[v]);
          }
          for (int v = 0; v < V; ++v) sums[v][r] = sum[v];
        }
        for (int v = 0; v < V; ++v) {
          transpose(sums[v]);
          for (int64_t i = 0; i < at_most(W, count - v * W); ++i)
            add_to(y + (t + v * W + i) * m + first, sums[v][i], rows);
        }
      }
    });
  }
}

// dx [tokens, n] += g D. A thread owns V vectors of tokens.
template <int V, class T, class I>
void add_transposed_product(T* dx, const T* g, int64_t tokens, const Mask& mask, const I* crow, const I* col,
                            const float* vals) {
  constexpr int64_t ld = V * W;
  const int64_t m = mask.m, n = mask.n, held = padded(n, W) * ld;
  parallel_for(0, blocks(tokens, ld), at_least(1, kGrain / (mask.nnz * V + 1)), [&](int64_t begin, int64_t end) {
    const Buffer dxt(held);
    float gt[W * ld];
    for (int64_t t = begin * ld; t < at_most(end * ld, tokens); t += ld) {
      const int64_t count = at_most(ld, tokens - t);
      std::fill(dxt.get(), dxt.get() + held, 0.0f);
      for (int64_t first = 0; first < m; first += W) {
        const int64_t rows = at_most(W, m - first);
        if (crow[first] == crow[first + rows]) continue;
        for (int v = 0; v < V; ++v)
          transpose_block<false>(g + (t + v * W) * m + first, m, count - v * W, rows, nullptr, gt + v * W, ld);
        for (int64_t r = 0; r < rows; ++r) {
          vec row[V];
          for (int v = 0; v < V; ++v) row[v] = load(gt + r * ld + v * W);
          for (int64_t e = crow[first + r]; e < crow[first + r + 1]; ++e) {
            float* to = dxt.get() + col[e] * ld;
            const vec value = splat(vals[e]);
            for (int v = 0; v < V; ++v) store(to + v * W, fma(value, row[v], load(to + v * W)));
          }
        }
      }
      for (int64_t c = 0; c < n; c += W)
        for (int v = 0; v < V; ++v) {
          vec r[W];
          for (int i = 0; i < W; ++i) r[i] = load(dxt.get() + (c + i) * ld + v * W);
          transpose(r);
          for (int64_t i = 0; i < at_most(W, count - v * W); ++i)
            add_to(dx + (t + v * W + i) * n + c, r[i], at_most(W, n - c));
        }
    }
  });
}

// -- the elements of a matrix ---------------------------------------------------------------------------------------

// Where the f-th element lies of a matrix with so many columns.
PK_INLINE int64_t place(const Matrix& w, int64_t columns, int64_t f) {
  if (w.next == 1 && w.row == columns) return f;
  return f / columns * w.row + f % columns * w.next;
}

template <class F>
void for_each_entry(int64_t nnz, const F& f) {
  parallel_for(0, nnz, kGrain / 16, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) f(e);
  });
}

// Whether no piece of [0, count) is wrong.
template <class F>
bool all_of(int64_t count, const F& wrong) {
  const int64_t size = at_least(1, kGrain);
  std::vector<char> bad(blocks(count, size));
  parallel_for(0, bad.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) bad[k] = wrong(k * size, at_most(k * size + size, count));
  });
  return std::find(bad.begin(), bad.end(), 1) == bad.end();
}

template <class F>
void with_indices(const Mask& mask, const F& f) {
  switch_index(mask.col.wide, [&](auto index) {
    using I = decltype(index);
    f(static_cast<const I*>(mask.crow.data), static_cast<const I*>(mask.col.data));
  });
}

}  // namespace

bool sparse_ascends(Index idx, int64_t nnz, int64_t size) {
  return switch_index(idx.wide, [&](auto index) {
    const auto* p = static_cast<const decltype(index)*>(idx.data);
    if (nnz && (p[0] < 0 || p[nnz - 1] >= size)) return false;
    return all_of(nnz, [=](int64_t begin, int64_t end) {
      bool wrong = false;
      for (int64_t e = at_least(begin, 1); e < end; ++e) wrong |= p[e] <= p[e - 1];
      return wrong;
    });
  });
}

bool sparse_is_mask(Mask mask) {
  bool right = true;
  with_indices(mask, [&](const auto* crow, const auto* col) {
    right = crow[0] == 0 && crow[mask.m] == mask.nnz;
    for (int64_t i = 0; i < mask.m; ++i) right &= crow[i] <= crow[i + 1];
    right = right && all_of(mask.m, [=](int64_t begin, int64_t end) {
              bool wrong = false;
              for (int64_t i = begin; i < end; ++i) {
                const int64_t first = crow[i], last = crow[i + 1];
                if (first == last) continue;
                wrong |= col[first] < 0 || col[last - 1] >= mask.n;
                for (int64_t e = first + 1; e < last; ++e) wrong |= col[e] <= col[e - 1];
              }
              return wrong;
            });
  });
  return right;
}

void sddmm(Dtype type, const void* dy, const void* x, int64_t tokens, Mask mask, float* out) {
  std::fill(out, out + mask.nnz, 0.0f);
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    constexpr bool pairs = kHasPairs && std::is_same_v<T, bf16>;
    with_indices(mask, [&](const auto* crow, const auto* col) {
      const T *left = static_cast<const T*>(dy), *right = static_cast<const T*>(x);
      if (tokens <= kScalar)
        sddmm_few(left, right, tokens, mask, crow, col, out);
      else
        sddmm_tiles<pairs>(left, right, tokens, mask, crow, col, out);
    });
  });
}

void sparse_add(Dtype type, void* y, const void* x, int64_t tokens, Mask mask, const float* vals) {
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    with_indices(mask, [&](const auto* crow, const auto* col) {
      const auto add = tokens > W && mask.n * 2 * W * 4 <= kSlab ? add_product<2, T, Bare<decltype(col)>>
                                                                 : add_product<1, T, Bare<decltype(col)>>;
      add(static_cast<T*>(y), static_cast<const T*>(x), tokens, mask, crow, col, vals);
    });
  });
}

void sparse_dx_add(Dtype type, void* dx, const void* g, int64_t tokens, Mask mask, const float* vals) {
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    with_indices(mask, [&](const auto* crow, const auto* col) {
      const auto add = tokens >= 16 * W && mask.n * 2 * W * 4 <= kSlab
                           ? add_transposed_product<2, T, Bare<decltype(col)>>
                           : add_transposed_product<1, T, Bare<decltype(col)>>;
      add(static_cast<T*>(dx), static_cast<const T*>(g), tokens, mask, crow, col, vals);
    });
  });
}

void sparse_patch(Matrix panel, int64_t row, int64_t rows, int64_t column, int64_t columns, Mask mask,
                  const float* vals) {
  switch_dtype(panel.type, [&](auto t) {
    using T = decltype(t);
    with_indices(mask, [&](const auto* crow, const auto* col) {
      const int64_t entries = crow[row + rows] - crow[row];
      parallel_for(0, rows, at_least(1, kGrain / 16 * rows / (entries + rows)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const auto *first = col + crow[row + i], *last = col + crow[row + i + 1];
          if (column > 0) first = std::lower_bound(first, last, column);
          T* to = static_cast<T*>(panel.data) + i * panel.row;
          for (; first < last && *first < column + columns; ++first) {
            T& w = to[(*first - column) * panel.next];
            w = narrow<T>(widen(w) + vals[first - col]);
          }
        }
      });
    });
  });
}

void sparse_scatter(Matrix w, int64_t columns, Index idx, int64_t nnz, const float* vals, float alpha, bool add) {
  switch_dtype(w.type, [&](auto t) {
    using T = decltype(t);
    switch_index(idx.wide, [&](auto index) {
      const auto* p = static_cast<const decltype(index)*>(idx.data);
      for_each_entry(nnz, [&](int64_t e) {
        T& to = static_cast<T*>(w.data)[place(w, columns, p[e])];
        to = narrow<T>(add ? widen(to) + alpha * vals[e] : alpha * vals[e]);
      });
    });
  });
}

void sparse_swap(Matrix w, int64_t columns, Index idx, int64_t nnz, int64_t bytes, const void* in, void* old) {
  const auto swap = [&](auto word) {
    using T = decltype(word);
    switch_index(idx.wide, [&](auto index) {
      const auto* p = static_cast<const decltype(index)*>(idx.data);
      for_each_entry(nnz, [&](int64_t e) {
        T& to = static_cast<T*>(w.data)[place(w, columns, p[e])];
        static_cast<T*>(old)[e] = to;
        to = static_cast<const T*>(in)[e];
      });
    });
  };
  bytes == 2 ? swap(uint16_t{}) : swap(uint32_t{});
}

}  // namespace pk::PK_ISA
