#include <algorithm>
#include <memory>

#include "common/cpu.h"
#include "rescale/rescale.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t grain_elements = 1 << 15;  // less work than this is not worth waking a thread

// l is read once per row, so it is widened once.
std::unique_ptr<float[]> widened(Dtype type, const void* l, int64_t n) {
  std::unique_ptr<float[]> out(new float[n]);
  switch_dtype(type, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(l);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out.get() + i, load(in + i));
    if (i < n) store_n(out.get() + i, load_n(in + i, n - i), n - i);
  });
  return out;
}

template <class T>
void scale_row(const T* x, const float* l, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(x + i) * load(l + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i) * load_n(l + i, n - i), n - i);
}

// Columns [begin, end) of `rows` rows that lie n apart: sum[c] = sum over rows of g * x, and dx = g * l if wanted.
// `group` rows at a time, for which sum and l are read and written once.
template <class T, bool with_dx, int group>
void sum_rows(const T* g, const T* x, const float* l, T* dx, float* sum, int64_t rows, int64_t n, int64_t begin,
              int64_t end) {
  std::fill(sum + begin, sum + end, 0.0f);
  for (int64_t row = 0; row < rows;) {
    const T *gr = g + row * n, *xr = x + row * n;
    T* dxr = with_dx ? dx + row * n : nullptr;
    const auto step = [&](auto count, int64_t c, int lanes) {
      const bool whole = lanes == W;
      const vec lv = with_dx ? (whole ? load(l + c) : load_n(l + c, lanes)) : vec{};
      vec total = whole ? load(sum + c) : load_n(sum + c, lanes);
      for (int r = 0; r < decltype(count)::value; ++r) {
        const int64_t at = r * n + c;
        const vec gv = whole ? load(gr + at) : load_n(gr + at, lanes);
        const vec xv = whole ? load(xr + at) : load_n(xr + at, lanes);
        total = fma(gv, xv, total);
        if (with_dx) whole ? store(dxr + at, gv * lv) : store_n(dxr + at, gv * lv, lanes);
      }
      whole ? store(sum + c, total) : store_n(sum + c, total, lanes);
    };
    const auto all = [&](auto count) {
      int64_t c = begin;
      for (; c + W <= end; c += W) step(count, c, W);
      if (c < end) step(count, c, end - c);
      row += count;
    };
    if (rows - row >= group)
      all(std::integral_constant<int, group>{});
    else
      all(std::integral_constant<int, 1>{});
  }
}

}  // namespace

void rescale_fwd(Dtype x_type, const void* x, Dtype l_type, const void* l, void* y, int64_t rows, int64_t n) {
  const auto wide = widened(l_type, l, n);
  switch_dtype(x_type, [&](auto t) {
    using T = decltype(t);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    // Cut anywhere, not at rows only: one long row is as good as many short ones.
    parallel_for(0, rows * n, grain_elements, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t column = at % n, count = std::min(n - column, end - at);
        scale_row(in + at, wide.get() + column, out + at, count);
        at += count;
      }
    });
  });
}

// Blocks of rows are summed apart, then pairwise. Blocks depend on the shape alone, so the result has the same bits for
// any number of threads, and many short sums lose less than one long sum.
void rescale_bwd(Dtype x_type, const void* g, const void* x, Dtype l_type, const void* l, void* dx, void* dl,
                 int64_t rows, int64_t n) {
  const int64_t block = std::max<int64_t>(64, (rows + 1023) / 1024);
  const int64_t blocks = std::max<int64_t>(1, (rows + block - 1) / block);  // no rows: one empty block of zeros
  // Whole rows where there are blocks enough for threads.
  const int64_t strip = std::max<int64_t>(1, blocks < 32 ? std::min<int64_t>(n, 2048) : n);
  const int64_t strips = (n + strip - 1) / strip;
  const std::unique_ptr<float[]> sums(new float[blocks * n]);
  const auto wide = widened(l_type, l, n);
  switch_dtype(x_type, [&](auto t) {
    using T = decltype(t);
    // A row of less than a page is read at the rate of memory only if the next one follows.
    constexpr int64_t page = 4096;
    const bool one = n * static_cast<int64_t>(sizeof(T)) <= page;
    const auto sum = dx ? (one ? sum_rows<T, true, 1> : sum_rows<T, true, 4>)
                        : (one ? sum_rows<T, false, 1> : sum_rows<T, false, 4>);
    const int64_t grain = std::max<int64_t>(1, grain_elements / (block * strip));
    parallel_for(0, blocks * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / strips, first = task % strips * strip, row = b * block;
        const T *gb = static_cast<const T*>(g) + row * n, *xb = static_cast<const T*>(x) + row * n;
        T* dxb = dx ? static_cast<T*>(dx) + row * n : nullptr;
        sum(gb, xb, wide.get(), dxb, sums.get() + b * n, std::min(block, rows - row), n, first,
            std::min(first + strip, n));
      }
    });
  });
  switch_dtype(l_type, [&](auto t) {
    auto* out = static_cast<decltype(t)*>(dl);
    parallel_for(0, n, std::max<int64_t>(1, grain_elements / blocks), [&](int64_t begin, int64_t end) {
      for (int64_t step = 1; step < blocks; step *= 2)
        for (int64_t b = 0; b + step < blocks; b += 2 * step) {
          float *to = sums.get() + b * n, *from = to + step * n;
          for (int64_t c = begin; c < end; ++c) to[c] += from[c];
        }
      for (int64_t c = begin; c < end; ++c) out[c] = narrow<decltype(t)>(sums[c]);
    });
  });
}

}  // namespace pk::PK_ISA
