// Bottleneck adapters on the CPU: some rows go through both products while they are in the cache. README.md has the
// why.
#include "bottleneck/bottleneck.h"

#include <cmath>
#include <optional>

#include "common/product.h"
#include "common/vecmath.h"
#include "lora/lora_dropout.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kTile = 1 << 17;         // numbers of x or y of rows that go together: half of the second-level cache
constexpr int64_t kRows = 48;              // most of such rows
constexpr int64_t kSlab = 64;              // rows that a gradient of weights sums before it goes to the next ones
constexpr int64_t kStream = 1 << 23;       // numbers of a result that does not stay in a cache
constexpr int64_t kWidth = 2 * kMost * W;  // columns of weights that one task sums over all rows

// -- rows -----------------------------------------------------------------------------------------------------------

// dst is padded to whole vectors, with zeros.
void get(float* dst, LoraIn src, int64_t first, int64_t n) {
  switch_dtype(src.type,
               [&](auto element) { widen_row(dst, static_cast<const decltype(element)*>(src.data) + first, n); });
}

// src is padded to whole vectors.
void put(LoraOut dst, int64_t first, const float* src, int64_t n) {
  switch_dtype(dst.type, [&](auto element) { narrow_row(static_cast<decltype(element)*>(dst.data) + first, src, n); });
}

// Asks for n numbers that are needed a slab later: the hardware's own prefetching stops at the end of a piece of a row.
void prefetch(LoraIn src, int64_t first, int64_t n) {
  const int64_t size = src.type == Dtype::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(src.data) + first * size;
  for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(p + i, 0, 2);
}

float dot(const float* a, const float* b, int64_t n) {
  vec sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_n(a + i, static_cast<int>(n - i)), load_n(b + i, static_cast<int>(n - i)), sum);
  return hsum(sum);
}

// dst = x - mean, padded with zeros. Sums go over x - x[0], or those of a large mean would lose what differs.
template <class T>
void centre(float* dst, const T* x, int64_t k, float eps, float* mean, float* rstd) {
  const float first = widen(x[0]);
  const int64_t whole = k / W * W;
  vec sum[2] = {};
  float rest = 0;
  int64_t j = 0;
  for (; j + 2 * W <= k; j += 2 * W)
    for (int i = 0; i < 2; ++i) sum[i] = sum[i] + (load(x + j + i * W) - first);
  for (; j + W <= k; j += W) sum[0] = sum[0] + (load(x + j) - first);
  for (; j < k; ++j) rest += widen(x[j]) - first;
  *mean = first + (hsum(sum[0] + sum[1]) + rest) / static_cast<float>(k);
  const vec middle = splat(*mean);
  sum[0] = sum[1] = vec{};
  for (j = 0; j < whole; j += W) {
    const vec v = load(x + j) - middle;
    store(dst + j, v);
    sum[0] = fma(v, v, sum[0]);
  }
  rest = 0;
  if (j < k) store(dst + j, vec{});
  for (; j < k; ++j) {
    dst[j] = widen(x[j]) - *mean;
    rest += dst[j] * dst[j];
  }
  *rstd = 1.0f / std::sqrt((hsum(sum[0]) + rest) / static_cast<float>(k) + eps);
}

// -- activations ----------------------------------------------------------------------------------------------------

constexpr float kHalfRoot = 0.70710678118654752f, kDensity = 0.39894228040143268f;  // 1 / sqrt(2), 1 / sqrt(2 pi)
constexpr float kInner = 0.79788456080286536f, kCube = 0.044715f;                   // sqrt(2 / pi)

template <Act act>
PK_INLINE vec value(vec z) {
  if constexpr (act == Act::relu) return z < 0.0f ? vec{} : z;
  if constexpr (act == Act::gelu) return 0.5f * z * (1.0f + error_function(z * kHalfRoot));
  if constexpr (act == Act::gelu_tanh) return 0.5f * z * (1.0f + hyperbolic_tangent(kInner * fma(z * z, kCube * z, z)));
  if constexpr (act == Act::silu) return z * logistic(z);
  if constexpr (act == Act::tanh) return hyperbolic_tangent(z);
  if constexpr (act == Act::leaky_relu) return z > 0.0f ? z : 0.01f * z;
  return z;
}

// d * act'(z)
template <Act act>
PK_INLINE vec slope(vec d, vec z) {
  if constexpr (act == Act::relu) return z <= 0.0f ? vec{} : d;
  if constexpr (act == Act::gelu)
    return d * fma(z * kDensity, exponential(-0.5f * z * z), 0.5f + 0.5f * error_function(z * kHalfRoot));
  if constexpr (act == Act::gelu_tanh) {
    const vec t = hyperbolic_tangent(kInner * fma(z * z, kCube * z, z));
    const vec inner = kInner * (1.0f + (3 * kCube) * z * z);
    return d * (0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner);
  }
  if constexpr (act == Act::silu) {
    const vec s = logistic(z);
    return d * s * (1.0f + z * (1.0f - s));
  }
  if constexpr (act == Act::tanh) {
    const vec t = hyperbolic_tangent(z);
    return d * (1.0f - t * t);
  }
  if constexpr (act == Act::leaky_relu) return z > 0.0f ? d : 0.01f * d;
  return d;
}

// f.template operator()<act>()
template <class F>
void switch_act(Act act, const F& f) {
  switch (act) {
    case Act::relu:
      return f(std::integral_constant<Act, Act::relu>());
    case Act::gelu:
      return f(std::integral_constant<Act, Act::gelu>());
    case Act::gelu_tanh:
      return f(std::integral_constant<Act, Act::gelu_tanh>());
    case Act::silu:
      return f(std::integral_constant<Act, Act::silu>());
    case Act::tanh:
      return f(std::integral_constant<Act, Act::tanh>());
    case Act::leaky_relu:
      return f(std::integral_constant<Act, Act::leaky_relu>());
    default:
      return f(std::integral_constant<Act, Act::identity>());
  }
}

void activate(Act act, float* a, const float* z, int64_t m) {
  switch_act(act, [&](auto own) {
    for (int64_t j = 0; j < m; j += W) store(a + j, value<decltype(own)::value>(load(z + j)));
  });
}

// d = factor * d * act'(z)
void differentiate(Act act, float* d, const float* z, float factor, int64_t m) {
  switch_act(act, [&](auto own) {
    for (int64_t j = 0; j < m; j += W) store(d + j, slope<decltype(own)::value>(factor * load(d + j), load(z + j)));
  });
}

void times(float* a, float factor, int64_t n) {
  for (int64_t j = 0; j < n; j += W) store(a + j, factor * load(a + j));
}

// -- weights --------------------------------------------------------------------------------------------------------

float total(const float* p, int64_t n) {
  vec sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum = sum + load(p + i);
  if (i < n) sum = sum + load_n(p + i, static_cast<int>(n - i));
  return hsum(sum);
}

// Wd with what a LayerNorm multiplies and adds drawn into it: h Wd^T + bd = unit w^T + shift, where unit is x - mean
// over the deviation.
struct Down {
  explicit Down(const Bottleneck& s) : shift(padded(s.m)), mean(padded(s.m)), room(s.ln_w ? s.m * s.k : 0) {
    w = s.ln_w ? Strided{room.p, Dtype::f32, s.k, 1} : Strided{s.wd.data, s.wd.type, s.k, 1};
    for (int64_t r = s.m; r < padded(s.m); ++r) shift.p[r] = mean.p[r] = 0;
    parallel_for(0, s.m, grain(8 * s.k), [&](int64_t begin, int64_t end) {
      const Buffer row(padded(s.k));
      for (int64_t r = begin; r < end; ++r) {
        shift.p[r] = s.bd ? s.bd[r] : 0;
        if (!s.norm) continue;
        get(row.p, s.wd, r * s.k, s.k);
        if (s.ln_b) shift.p[r] += dot(row.p, s.ln_b, s.k);
        for (int64_t j = 0; j < s.k && s.ln_w; ++j) room.p[r * s.k + j] = row.p[j] *= s.ln_w[j];
        mean.p[r] = total(row.p, s.k) / static_cast<float>(s.k);
      }
    });
  }
  const Buffer shift, mean;  // mean: of each row of w
  const Buffer room;
  Strided w;
};

// Rows that go together.
int64_t tile_of(const Bottleneck& s) {
  const int64_t fit = kTile / at_least(s.k, s.n) / 12 * 12;
  return at_most(at_least(fit, 12), at_least(at_most(kRows, blocks(s.rows, 8)), 1));
}

// Apart in memory are the rows of m activations, with one number more that the bias is multiplied with, in whole steps
// of dropout.
int64_t apart(const Bottleneck& s) {
  return blocks(s.m + 1, s.drop.threshold ? kStep : W) * (s.drop.threshold ? kStep : W);
}

float factor_of(const Bottleneck& s, int64_t row) { return s.gate ? s.scale * s.gate[row] : s.scale; }

// The rows from `first` on as fp32: where they lie or in `room`.
struct Rows {
  const float* p;
  int64_t ld;
};
Rows rows_of(float* room, LoraIn src, int64_t first, int64_t count, int64_t n) {
  if (src.type == Dtype::f32) return {static_cast<const float*>(src.data) + first * n, n};
  for (int64_t i = 0; i < count; ++i) get(room + i * padded(n), src, (first + i) * n, n);
  return {room, padded(n)};
}

// Whether rows of n numbers go past the caches: as many as are in none when somebody reads them.
bool streams(LoraOut y, int64_t rows, int64_t n) {
  return rows * n >= kStream && n % 16 == 0 && reinterpret_cast<uintptr_t>(y.data) % 64 == 0;
}

// sums [r, cols] = left^T right over all rows: left [rows, r] has rows ldl apart, right are the columns from `col` on
// of x [rows, n], or what change(row of right, its number, columns) makes of them.
template <class Change>
void sum_over_rows(float* sums, float* slab, const float* left, int64_t ldl, int64_t r, LoraIn x, int64_t rows,
                   int64_t n, int64_t col, int64_t cols, const Change& change) {
  const Panels panels(cols);
  for (int64_t top = 0; top < rows; top += kSlab) {
    const int64_t count = at_most(rows - top, kSlab);
    for (int64_t i = 0; i < count; ++i) {
      prefetch(x, at_most(top + i + kSlab, rows - 1) * n + col, cols);
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t j = panels.begin(panel) * W, width = panels.begin(panel + 1) * W - j;
        float* const own = slab + j * count + i * width;
        get(own, x, (top + i) * n + col + j, at_most(cols - j, width));
        change(own, top + i, width);
      }
    }
    multiply({sums, kWidth, top ? sums : nullptr, kWidth, left + top * ldl, 1, ldl}, r, {slab, 0, count}, padded(cols));
  }
}

// Of columns col .. col + cols - 1, from sums [m, cols] of u^T unit: dWd = sums * ln_w + dbd ln_b^T, and as dh = u Wd,
// dln_w and dln_b are the sums over the rows of Wd * sums and of Wd dbd.
void finish_down(const Bottleneck& s, const BottleneckGrads& d, float* sums, const float* dbd, int64_t col,
                 int64_t cols) {
  alignas(64) float w[kWidth] = {}, b[kWidth] = {}, row[kWidth], dw[kWidth] = {}, db[kWidth] = {};
  if (s.ln_w) get(w, {s.ln_w, Dtype::f32}, col, cols);
  if (s.ln_b) get(b, {s.ln_b, Dtype::f32}, col, cols);
  for (int64_t r = 0; r < s.m; ++r) {
    float* const own = sums + r * kWidth;
    const vec bias = splat(dbd[r]);
    if (d.dln_w || d.dln_b) {
      get(row, s.wd, r * s.k + col, cols);
      for (int64_t j = 0; j < cols; j += W) {
        store(dw + j, fma(load(row + j), load(own + j), load(dw + j)));
        store(db + j, fma(load(row + j), bias, load(db + j)));
      }
    }
    if (!d.dwd.data) continue;
    for (int64_t j = 0; j < cols; j += W) {
      const vec v = s.ln_w ? load(own + j) * load(w + j) : load(own + j);
      store(own + j, s.ln_b ? fma(bias, load(b + j), v) : v);
    }
    put(d.dwd, r * s.k + col, own, cols);
  }
  if (d.dln_w) std::memcpy(d.dln_w + col, dw, cols * sizeof(float));
  if (d.dln_b) std::memcpy(d.dln_b + col, db, cols * sizeof(float));
}

}  // namespace

void bottleneck(const Bottleneck& s, LoraIn residual, LoraOut y, LoraOut z, float* stats) {
  const int64_t m = s.m, k = s.k, n = s.n, mp = padded(m), kp = padded(k), np = padded(n), lda = apart(s);
  const Down down(s);
  const Packed across(transposed(down.w), k, m, s.rows);
  const Packed up({s.wu.data, s.wu.type, 1, m}, m, n, s.rows, s.bu);
  const Dropout drop(s.drop);
  const bool direct = y.type == Dtype::f32, stream = direct && streams(y, s.rows, n);
  const int64_t tile = tile_of(s);
  parallel_for(0, blocks(s.rows, tile), grain(tile * m * (k + n)), [&](int64_t first, int64_t end) {
    const Buffer xs(s.norm || s.x.type != Dtype::f32 ? tile * kp : 0), zs(tile * mp), as(tile * lda),
        ys(direct ? 0 : tile * np);
    for (int64_t block = first; block < end; ++block) {
      const int64_t top = block * tile, count = at_most(s.rows - top, tile);
      if (s.norm)
        switch_dtype(s.x.type, [&](auto element) {
          const auto* x = static_cast<const decltype(element)*>(s.x.data) + top * k;
          for (int64_t i = 0; i < count; ++i)
            centre(xs.p + i * kp, x + i * k, k, s.eps, stats + top + i, stats + s.rows + top + i);
        });
      const Rows in = s.norm ? Rows{xs.p, kp} : rows_of(xs.p, s.x, top, count, k);
      multiply({zs.p, mp, s.norm ? nullptr : down.shift.p, 0, in.p, in.ld, 1}, count, across.right, mp);
      for (int64_t i = 0; i < count; ++i) {
        float *const own = zs.p + i * mp, *const a = as.p + i * lda;
        if (s.norm) {
          const vec rstd = splat(stats[s.rows + top + i]);
          for (int64_t j = 0; j < mp; j += W) store(own + j, fma(rstd, load(own + j), load(down.shift.p + j)));
        }
        put(z, (top + i) * m, own, m);
        activate(s.act, a, own, m);
        if (drop) drop(a, top + i, 0, m);
        const float c = factor_of(s, top + i);
        times(a, c * s.drop.scale(), m);
        a[m] = c;
      }
      float* const to = direct ? static_cast<float*>(y.data) + top * n : ys.p;
      const Rows from = rows_of(ys.p, residual, top, count, n);
      multiply({to, direct ? n : np, from.p, from.ld, as.p, lda, 1, stream}, count, up.right, direct ? n : np);
      for (int64_t i = 0; i < count && !direct; ++i) put(y, (top + i) * n, to + i * np, n);
    }
    if (stream) end_of_stream();
  });
}

void bottleneck_backward(const Bottleneck& s, LoraIn g, LoraIn z, const float* stats, bool own_residual,
                         const BottleneckGrads& d) {
  const int64_t m = s.m, k = s.k, n = s.n, mp = padded(m), kp = padded(k), np = padded(n), lda = apart(s);
  const bool of_u = d.dwd.data || d.dln_w || d.dln_b || d.dbd, of_a = d.dwu.data || d.dbu;
  const bool through = d.dx.data || of_u || d.dgate;
  const float* const means = stats;
  const float* const rstds = stats + s.rows;
  const Down down(s);
  const Dropout drop(s.drop);
  const float kept = s.drop.scale();
  std::optional<Packed> across, back;
  if (through) across.emplace(Strided{s.wu.data, s.wu.type, m, 1}, n, m, s.rows);
  if (d.dx.data) back.emplace(down.w, m, k, s.rows);
  const Buffer us(of_u ? s.rows * lda : 0), all_as(of_a ? s.rows * lda : 0);
  const bool direct = d.dx.type == Dtype::f32, stream = direct && streams(d.dx, s.rows, k);
  const int64_t tile = tile_of(s);
  parallel_for(0, blocks(s.rows, tile), grain(tile * m * (k + n)), [&](int64_t first, int64_t end) {
    const Buffer gs(g.type != Dtype::f32 ? tile * np : 0), bs(tile * lda), as(of_a ? 0 : lda), zs(mp),
        dxs(d.dx.data && (s.norm || !direct) ? tile * kp : 0), xs(d.dx.data && s.norm ? kp : 0);
    for (int64_t block = first; block < end; ++block) {
      const int64_t top = block * tile, count = at_most(s.rows - top, tile);
      const Rows up = rows_of(gs.p, g, top, count, n);
      if (through) multiply({bs.p, lda, nullptr, 0, up.p, up.ld, 1}, count, across->right, mp);
      float* const to = direct ? static_cast<float*>(d.dx.data) + top * k : dxs.p;
      const int64_t ldx = direct ? k : kp;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = top + i;
        float *const u = bs.p + i * lda, *const a = of_a ? all_as.p + row * lda : as.p;
        const float c = factor_of(s, row);
        get(zs.p, z, row * m, m);
        activate(s.act, a, zs.p, m);
        if (drop) drop(a, row, 0, m);
        if (d.dgate) d.dgate[row] = s.scale * (kept * dot(a, u, m) + (s.bu ? dot(up.p + i * up.ld, s.bu, n) : 0));
        times(a, c * kept, m);
        a[m] = c;
        if (!through) continue;
        if (drop) drop(u, row, 0, m);
        differentiate(s.act, u, zs.p, c * kept, m);
        if (of_u) std::memcpy(us.p + row * lda, u, mp * sizeof(float));
        if (!d.dx.data || !s.norm) continue;
        // The two means that a LayerNorm takes off, from z: those over u w and u w * unit are products with rows of w.
        const float rstd = rstds[row], mean = means[row];
        for (int64_t j = 0; j < mp; j += W) store(zs.p + j, load(zs.p + j) - load(down.shift.p + j));
        const float offset = -rstd * dot(u, down.mean.p, m);
        const float per_x = -rstd * rstd * dot(u, zs.p, m) / static_cast<float>(k);
        times(u, rstd, m);
        get(xs.p, s.x, row * k, k);
        float* const base = dxs.p + i * kp;
        const float* const more = up.p + i * up.ld;
        for (int64_t j = 0; j < k; j += W) {
          const vec v = fma(splat(per_x), load(xs.p + j) - mean, splat(offset));
          const int some = static_cast<int>(at_most(k - j, W));
          store(base + j, !own_residual ? v : some == W ? v + load(more + j) : v + load_n(more + j, some));
        }
      }
      if (!d.dx.data) continue;
      const Rows from = s.norm ? Rows{dxs.p, kp} : own_residual ? up : Rows{nullptr, 0};
      multiply({to, ldx, from.p, from.ld, bs.p, lda, 1, stream}, count, back->right, direct ? k : kp);
      for (int64_t i = 0; i < count && !direct; ++i) put(d.dx, (top + i) * k, to + i * kp, k);
    }
    if (stream) end_of_stream();
  });
  if (!of_u && !of_a) return;

  const Buffer dbd(mp);
  if (of_u) {
    std::memset(dbd.p, 0, mp * sizeof(float));
    for (int64_t top = 0; top < s.rows; top += kSlab)
      for (int64_t j = 0; j < mp; j += W) {
        vec sum = {};
        for (int64_t i = top; i < at_most(s.rows, top + kSlab); ++i) sum = sum + load(us.p + i * lda + j);
        store(dbd.p + j, load(dbd.p + j) + sum);
      }
    if (d.dbd) std::memcpy(d.dbd, dbd.p, m * sizeof(float));
  }
  // Columns alone are dealt out, never rows: a sum has one owner and one order.
  const bool of_wd = d.dwd.data || d.dln_w || d.dln_b;
  const int64_t down_tasks = of_wd ? blocks(k, kWidth) : 0, up_tasks = of_a ? blocks(n, kWidth) : 0;
  parallel_for(0, down_tasks + up_tasks, grain(s.rows * m * kWidth), [&](int64_t first, int64_t end) {
    const Buffer sums((m + 1) * kWidth), slab(kSlab * kWidth), turned(kWidth * mp);
    for (int64_t task = first; task < end; ++task) {
      if (task < down_tasks) {
        const int64_t col = task * kWidth, cols = at_most(k - col, kWidth);
        sum_over_rows(sums.p, slab.p, us.p, lda, m, s.x, s.rows, k, col, cols,
                      [&](float* x, int64_t row, int64_t width) {
                        if (!s.norm) return;
                        const float mean = means[row], rstd = rstds[row];
                        for (int64_t i = 0; i < width; i += W) store(x + i, (load(x + i) - mean) * rstd);
                      });
        finish_down(s, d, sums.p, dbd.p, col, cols);
        continue;
      }
      const int64_t col = (task - down_tasks) * kWidth, cols = at_most(n - col, kWidth);
      const int64_t skip = d.dwu.data ? 0 : m;  // the bias alone
      sum_over_rows(sums.p + skip * kWidth, slab.p, all_as.p + skip, lda, m + 1 - skip, g, s.rows, n, col, cols,
                    [](float*, int64_t, int64_t) {});
      if (d.dbu) std::memcpy(d.dbu + col, sums.p + m * kWidth, cols * sizeof(float));
      if (!d.dwu.data) continue;
      transpose(turned.p, mp, sums.p, kWidth, m, cols);
      for (int64_t j = 0; j < cols; ++j) put(d.dwu, (col + j) * m, turned.p + j * mp, m);
    }
  });
}

}  // namespace pk::PK_ISA
