// Compiled without contraction: a product and a sum are rounded apart, and every level gives the same bits.
#include "hadamard/hadamard.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "common/cpu.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace pk::PK_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 15;  // less work than this is not worth waking a thread
constexpr int kVectors = 8;                  // of a block, which stays in registers
constexpr int64_t kBlock = kVectors * W;
// A longer transform is one of a matrix, whose columns are transformed first, a tile of them at a time, and then its
// rows.
constexpr int64_t kLongestRow = 1 << 15, kTile = 1 << 16;

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

int64_t padded(int64_t n) {
  int64_t size = 1;
  while (size < n) size *= 2;
  return size;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t n) {  // in whole cache lines, because vectors across two of them cost double
  void* p = std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// -- butterflies ------------------------------------------------------------------------------------------------------
// The strides are always taken from the longest to the shortest, which fixes the bits of the result: how many levels
// are done in one pass over memory, and how long a vector is, does not matter to them.

// Lane i gets lane i ^ h.
template <int h>
PK_INLINE vec swapped(vec v) {
#if defined(__AVX512F__)
  if constexpr (h == 8) return (vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4E);
  if constexpr (h == 4) return (vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xB1);
  if constexpr (h == 2) return (vec)_mm512_permute_ps((__m512)v, 0x4E);
  if constexpr (h == 1) return (vec)_mm512_permute_ps((__m512)v, 0xB1);
#elif defined(__AVX2__)
  if constexpr (h == 4) return (vec)_mm256_permute2f128_ps((__m256)v, (__m256)v, 0x01);
  if constexpr (h == 2) return (vec)_mm256_permute_ps((__m256)v, 0x4E);
  if constexpr (h == 1) return (vec)_mm256_permute_ps((__m256)v, 0xB1);
#elif defined(__SSE2__)
  if constexpr (h == 2) return (vec)_mm_shuffle_ps((__m128)v, (__m128)v, 0x4E);
  if constexpr (h == 1) return (vec)_mm_shuffle_ps((__m128)v, (__m128)v, 0xB1);
#else
  vec out;
  for (int i = 0; i < W; ++i) out[i] = v[i ^ h];
  return out;
#endif
}

template <int h>
PK_INLINE vec within(vec v) {
  uvec minus;
  for (int i = 0; i < W; ++i) minus[i] = i & h ? 0x80000000u : 0;
  return swapped<h>(v) + bit_cast<vec>(bit_cast<uvec>(v) ^ minus);
}

// The levels of stride h, h / 2, ... 1 vectors.
template <int h, int count>
PK_INLINE void across(vec (&v)[count]) {
  if constexpr (h > 0) {
    for (int first = 0; first < count; first += 2 * h)
      for (int i = first; i < first + h; ++i) {
        const vec a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
    across<h / 2>(v);
  }
}

// The levels of stride h, h / 2, ... 1 elements, h < W.
template <int h>
PK_INLINE vec within_from(vec v) {
  if constexpr (h > 0) {
    return within_from<h / 2>(within<h>(v));
  } else {
    return v;
  }
}

// `count` vectors from `at`, as so many transforms of `size` <= count * W side by side.
template <int64_t size, int count, class In, class Out>
PK_INLINE void block(const In& in, const Out& out, int64_t at) {
  vec v[count];
  for (int j = 0; j < count; ++j) v[j] = in(at + j * W);
  across<static_cast<int>(size / 2 / W)>(v);
  for (int j = 0; j < count; ++j) out(at + j * W, within_from<std::min<int>(size / 2, W / 2)>(v[j]));
}

// `levels` levels of the 2^levels * h elements from `at`, strides 2^levels * h / 2 to h, in one pass.
template <int levels, class In, class Out>
void pass(const In& in, const Out& out, int64_t at, int64_t h) {
  constexpr int count = 1 << levels;
  for (int64_t i = at; i < at + h; i += W) {
    vec v[count];
    for (int j = 0; j < count; ++j) v[j] = in(i + j * h);
    across<count / 2>(v);
    for (int j = 0; j < count; ++j) out(i + j * h, v[j]);
  }
}

struct Memory {
  float* p;
  PK_INLINE vec operator()(int64_t i) const { return load(p + i); }
  PK_INLINE void operator()(int64_t i, vec v) const { store(p + i, v); }
};

// The levels of `size` elements from `at`, strides size / 2 to low >= W, or to 1 where `whole` and low is kBlock. What
// is between passes is in memory; the parts that a pass leaves are finished one after the other, in the cache.
template <bool whole, class In, class Out>
void levels(const In& in, const Out& out, const Memory& memory, int64_t at, int64_t size, int64_t low) {
  const int left = __builtin_ctzll(size) - __builtin_ctzll(low);
  const auto last = [&](auto count) {
    if constexpr (whole) {
      pass<count.value>(in, memory, at, low);
      for (int64_t i = at; i < at + size; i += kBlock) block<kBlock, kVectors>(memory, out, i);
    } else {
      pass<count.value>(in, out, at, low);
    }
  };
  const auto first = [&](auto count) {
    const int64_t part = size >> count.value;
    pass<count.value>(in, memory, at, part);
    for (int64_t i = at; i < at + size; i += part) levels<whole>(memory, out, memory, i, part, low);
  };
  switch (left) {
    case 0:
      if constexpr (whole) block<kBlock, kVectors>(in, out, at);
      break;
    case 1:
      last(std::integral_constant<int, 1>{});
      break;
    case 2:
      last(std::integral_constant<int, 2>{});
      break;
    case 3:
      last(std::integral_constant<int, 3>{});
      break;
    case 4:
      first(std::integral_constant<int, 2>{});
      break;
    default:
      first(std::integral_constant<int, 3>{});
  }
}

// One transform of size <= kLongestRow or, where it is shorter than a block, `together` those of a whole block. memory
// holds max(size, kBlock) floats. in(i) and out(i, v) take W elements from i on, also where they are not all wanted.
template <bool together = false, class In, class Out>
void transform_row(const In& in, const Out& out, float* memory, int64_t size) {
  if (size >= kBlock) return levels<true>(in, out, Memory{memory}, 0, size, kBlock);
  const auto small = [&](auto self, auto n) {
    constexpr int64_t length = n.value;
    constexpr int count = together ? kVectors : std::max<int>(1, length / W);
    if (length == size) return block<length, count>(in, out, 0);
    if constexpr (length > 1) self(self, std::integral_constant<int64_t, length / 2>{});
  };
  small(small, std::integral_constant<int64_t, kBlock / 2>{});
}

// -- what is read and written -----------------------------------------------------------------------------------------

template <class T>
struct Source {                                        // n elements, then zeros
  static constexpr bool kLines = W * sizeof(T) >= 64;  // takes whole lines of the cache
  const T* p;
  int64_t n;
  PK_INLINE vec operator()(int64_t i) const {
    if (i + W <= n) return load(p + i);
    return i < n ? load_n(p + i, n - i) : vec{};
  }
  Source from(int64_t i) const { return {p + i, n - i}; }
};

template <class T>
struct Target {  // base + scale * v, n elements; what is beyond is dropped
  T* p;
  const T* base;
  int64_t n;
  vec scale;
  PK_INLINE void operator()(int64_t i, vec v) const {
    v = v * scale;
    if (i + W <= n) {
      store(p + i, base ? load(base + i) + v : v);
    } else if (i < n) {
      store_n(p + i, base ? load_n(base + i, n - i) + v : v, n - i);
    }
  }
  Target from(int64_t i) const { return {p + i, base ? base + i : nullptr, n - i, scale}; }
};

// -- long transforms --------------------------------------------------------------------------------------------------

// n elements as [rows, columns]; of the result only the rows with the first `numel` elements are wanted.
struct Matrix {
  int64_t rows, columns, tile, wanted;
  Matrix(int64_t n, int64_t numel)
      : rows(n <= kLongestRow ? 1 : std::max<int64_t>(32, n / kLongestRow)),
        columns(n / rows),
        tile(std::min({columns, kTile / rows, int64_t{256}})),
        wanted(std::min(rows, (numel + columns - 1) / columns)) {}
};

// Position i of a tile of columns, as rows that follow each other, is one of the whole.
template <class F>
struct Placed {
  const F& whole;
  int64_t column;
  int tile, columns;  // log2
  Placed(const F& whole, const Matrix& m, int64_t column)
      : whole(whole), column(column), tile(__builtin_ctzll(m.tile)), columns(__builtin_ctzll(m.columns)) {}
  PK_INLINE int64_t place(int64_t i) const { return (i >> tile << columns) + column + (i & ((1 << tile) - 1)); }
  PK_INLINE vec operator()(int64_t i) const { return whole(place(i)); }
  PK_INLINE void operator()(int64_t i, vec v) const { whole(place(i), v); }
};

// Column transforms of the tile from `column`: `in` takes positions in the whole, `out` in the tile.
template <class In, class Out>
void transform_columns(const Matrix& m, const In& in, const Out& out, const Memory& tile, int64_t column) {
  const int64_t size = m.rows * m.tile, part = size / 8;
  if constexpr (In::kLines) {
    pass<3>(Placed<In>(in, m, column), tile, 0, part);
    for (int64_t at = 0; at < size; at += part) levels<false>(tile, out, tile, at, part, m.tile);
  } else {  // rows far apart share few lines of the cache, where what is left of one would not last to the next step
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t i = 0; i < m.tile; i += W) tile(r * m.tile + i, in(r * m.columns + column + i));
    levels<false>(tile, out, tile, 0, size, m.tile);
  }
}

struct Kept {  // the wanted rows, of which the last may be longer than what is left of `work`
  float *work, *last_row;
  int64_t last, end;
  PK_INLINE void operator()(int64_t i, vec v) const {
    if (i < last) {
      store(work + i, v);
    } else if (i < end) {
      store(last_row + i - last, v);
    }
  }
};

// One transform of n = 2^m > kLongestRow elements, of which the first out.n are written. The rows of Matrix but the
// last wanted one are in `work` in between, which may be where `out` writes.
template <class In, class T>
void transform_long(const In& in, const Target<T>& out, float* work, int64_t n) {
  const Matrix m(n, out.n);
  const Buffer last_row = allocate(m.columns);
  const Kept kept{work, last_row.get(), (m.wanted - 1) * m.columns, m.wanted * m.columns};
  parallel_for(0, m.columns / m.tile, 1, [&](int64_t begin, int64_t end) {
    const Buffer tile = allocate(m.rows * m.tile);
    for (int64_t column = begin * m.tile; column < end * m.tile; column += m.tile)
      transform_columns(m, in, Placed<Kept>(kept, m, column), Memory{tile.get()}, column);
  });
  parallel_for(0, m.wanted, std::max<int64_t>(1, grain_elements / m.columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = r == m.wanted - 1 ? last_row.get() : work + r * m.columns;
      transform_row(Memory{row}, out.from(r * m.columns), row, m.columns);
    }
  });
}

template <class In, class T>
void transform_long(const In& in, const Target<T>& out, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    transform_long(in, out, out.p, n);
  } else {
    const Matrix m(n, out.n);
    const Buffer work = allocate((m.wanted - 1) * m.columns);
    transform_long(in, out, work.get(), n);
  }
}

}  // namespace

void fwht(Dtype type, const void* x, void* y, int64_t rows, int64_t n, float scale) {
  const int64_t size = padded(n);
  switch_dtype(type, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    if (size > kLongestRow) {
      for (int64_t r = 0; r < rows; ++r)
        transform_long(Source<T>{in + r * n, n}, Target<T>{out + r * n, nullptr, n, splat(scale)}, size);
      return;
    }
    // Short rows without gaps are transformed by the block.
    const int64_t together = size == n && size < kBlock ? kBlock / size : 1, length = together * n;
    const int64_t tasks = (rows + together - 1) / together;
    parallel_for(0, tasks, std::max<int64_t>(1, grain_elements / length), [&](int64_t begin, int64_t end) {
      const Buffer memory = allocate(std::max(size, kBlock));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * length, count = std::min(length, rows * n - at);
        const Source<T> from{in + at, count};
        const Target<T> to{out + at, nullptr, count, splat(scale)};
        together > 1 ? transform_row<true>(from, to, memory.get(), size) : transform_row(from, to, memory.get(), size);
      }
    });
  });
}

// -- Fastfood ---------------------------------------------------------------------------------------------------------

namespace {

constexpr float kUnit = 1.0f / 4096;  // of an int16 g

PK_INLINE ivec widen_int(const int16_t* p) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  ivec v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
#endif
}

PK_INLINE ivec widen_int(const int32_t* p) {
  ivec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

PK_INLINE vec factors(const int16_t* g) { return __builtin_convertvector(widen_int(g), vec); }
PK_INLINE vec factors(const float* g) { return load(g); }

PK_INLINE vec gather(const float* table, ivec index) {
#if defined(__AVX512F__)
  return (vec)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (vec)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  vec v;
  for (int i = 0; i < W; ++i) v[i] = table[index[i]];
  return v;
#endif
}

// Elements at a time of what has whole vectors, or of short vectors in a padded copy.
template <class P, class G>
struct Picked {  // g[i] * table[pi[i]], n elements, then zeros
  static constexpr bool kLines = false;
  const P* pi;
  const G* g;
  const float* table;
  int32_t mask;
  int64_t n;
  PK_INLINE vec operator()(int64_t i) const {
    if (i + W <= n) return factors(g + i) * gather(table, widen_int(pi + i) & mask);
    vec v = {};
    for (int lane = 0; lane < n - i; ++lane) v[lane] = static_cast<float>(g[i + lane]) * table[pi[i + lane] & mask];
    return v;
  }
};

template <class F>
void switch_state(const FastfoodState& s, const F& f) {
  const auto with = [&](auto pi) {
    s.g_is_float ? f(pi, static_cast<const float*>(s.g)) : f(pi, static_cast<const int16_t*>(s.g));
  };
  s.pi_is_int32 ? with(static_cast<const int32_t*>(s.pi_mod)) : with(static_cast<const int16_t*>(s.pi_mod));
}

// In place.
void transform_table(float* table, int64_t k, float scale) {
  const Source<float> in{table, k};
  const Target<float> out{table, nullptr, k, splat(scale)};
  if (k > kLongestRow) return transform_long(in, out, k);
  const Buffer memory = allocate(std::max(k, kBlock));
  transform_row(in, out, memory.get(), k);
}

}  // namespace

void fastfood(const FastfoodState& s, Dtype theta_type, const void* theta, Dtype type, const void* base, void* out,
              int64_t numel, float scale) {
  const int64_t k = padded(s.d);
  const Buffer table = allocate(k);
  switch_dtype(theta_type, [&](auto zero) {
    const auto* values = static_cast<const decltype(zero)*>(theta);
    for (int64_t i = 0; i < s.d; ++i) table[i] = widen(values[i]) * static_cast<float>(s.sign[i]);
  });
  std::fill(table.get() + s.d, table.get() + k, 0.0f);
  transform_table(table.get(), k, s.g_is_float ? 1.0f : kUnit);
  switch_dtype(type, [&](auto zero) {
    using T = decltype(zero);
    const Target<T> to{static_cast<T*>(out), static_cast<const T*>(base), numel, splat(scale)};
    switch_state(s, [&](auto pi, auto g) {
      using P = std::remove_const_t<std::remove_pointer_t<decltype(pi)>>;
      using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
      const Picked<P, G> in{pi, g, table.get(), static_cast<int32_t>(k - 1), s.n};
      if (s.n > kLongestRow) return transform_long(in, to, s.n);
      const Buffer row = allocate(std::max(s.n, kBlock));
      for (int64_t i = 0; i < std::max(s.n, kBlock); i += W) store(row.get() + i, in(i));
      transform_row(Memory{row.get()}, to, row.get(), s.n);
    });
  });
}

// The transpose of the above, with rows before columns, so that nothing of n elements is held: what a tile of columns
// becomes is summed into bins at once. Each of a fixed number of chunks of tiles has its own bins, and where they are
// few, neighbours have different ones, which need not wait for each other.
void fastfood_backward(const FastfoodState& s, Dtype type, const void* dy, int64_t numel, float scale, float* dtheta) {
  const int64_t k = padded(s.d), slots = std::max<int64_t>(k, 256);
  const Matrix m(s.n, numel);
  const int64_t tiles = m.columns / m.tile, most = m.rows == 1 ? 1 : std::min<int64_t>(64, tiles);
  const int64_t chunks = std::clamp<int64_t>(s.n / (16 * slots), 1, most);
  const Buffer rows = allocate(std::max(m.wanted * m.columns, kBlock)), bins = allocate(chunks * slots);
  std::fill(bins.get(), bins.get() + chunks * slots, 0.0f);
  switch_dtype(type, [&](auto zero) {
    const Source<decltype(zero)> in{static_cast<const decltype(zero)*>(dy), numel};
    parallel_for(0, m.wanted, std::max<int64_t>(1, grain_elements / m.columns), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * m.columns; at < end * m.columns; at += m.columns) {
        const Memory row{rows.get() + at};
        transform_row(in.from(at), row, row.p, m.columns);
      }
    });
  });
  switch_state(s, [&](auto pi, auto g) {
    const auto add = [&](float* own, float* u, int64_t at, int64_t count) {
      int64_t i = 0;
      for (; i + W <= count; i += W) store(u + i, load(u + i) * factors(g + at + i));
      for (; i < count; ++i) u[i] *= static_cast<float>(g[at + i]);
      if (slots == k) {
        for (i = 0; i < count; ++i) own[pi[at + i] & (k - 1)] += u[i];
      } else {
        for (i = 0; i < count; ++i) own[(i * k & (slots - 1)) | (pi[at + i] & (k - 1))] += u[i];
      }
    };
    if (m.rows == 1) return add(bins.get(), rows.get(), 0, s.n);
    const Source<float> in{rows.get(), m.wanted * m.columns};
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const Buffer memory = allocate(m.rows * m.tile);
      const Memory tile{memory.get()};
      for (int64_t c = begin; c < end; ++c)
        for (int64_t t = tiles * c / chunks; t < tiles * (c + 1) / chunks; ++t) {
          transform_columns(m, in, tile, tile, t * m.tile);
          for (int64_t r = 0; r < m.rows; ++r)
            add(bins.get() + c * slots, tile.p + r * m.tile, r * m.columns + t * m.tile, m.tile);
        }
    });
  });
  const Buffer table = allocate(k);
  for (int64_t j = 0; j < k; ++j) {
    float sum = 0.0f;
    for (int64_t i = j; i < chunks * slots; i += k) sum += bins[i];
    table[j] = sum;
  }
  transform_table(table.get(), k, s.g_is_float ? scale : scale * kUnit);
  for (int64_t i = 0; i < s.d; ++i) dtheta[i] = table[i] * static_cast<float>(s.sign[i]);
}

}  // namespace pk::PK_ISA
