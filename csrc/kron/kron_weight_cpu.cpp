// Weights that are Kronecker products, on the CPU: written or read once, a row or a band of rows at a time.
#include "common/product.h"
#include "kron/kron.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kWorth = 1 << 16;  // elements of the weight that pay for waking a thread
constexpr int N = 4;                 // terms, and columns of a, of a tile of dots

// Rows of n of a contiguous tensor as fp32, padded to whole vectors with zeros.
class Rows {
 public:
  Rows(KronIn src, int64_t rows, int64_t n) : ld(padded(n)), room_(rows * ld) {
    parallel_for(0, rows, grain(n, kWorth),
                 [&](int64_t begin, int64_t end) { fetch(room_.p, ld, src, begin, begin, end, n); });
  }
  static void fetch(float* dst, int64_t ld, KronIn src, int64_t first, int64_t begin, int64_t end, int64_t n) {
    switch_dtype(src.type, [&](auto element) {
      const auto* from = static_cast<const decltype(element)*>(src.data) + first * n;
      for (int64_t i = begin; i < end; ++i) widen_row(dst + i * ld, from + (i - begin) * n, n);
    });
  }
  const float* operator[](int64_t i) const { return room_.p + i * ld; }
  const int64_t ld;

 private:
  const Buffer room_;
};

void put(KronOut dst, int64_t first, const float* src, int64_t n) {
  switch_dtype(dst.type, [&](auto element) { narrow_row(static_cast<decltype(element)*>(dst.data) + first, src, n); });
}

}  // namespace

void kron_sum_weight(const KronShape& shape, KronIn a, KronIn b, float scale, KronOut h) {
  const int64_t n = shape.m, p = shape.p, q = shape.q, r = shape.r, s = shape.s;
  const Rows left(a, n * p, q), right(b, n * r, s);
  const bool direct = h.type == Dtype::f32;
  parallel_for(0, p * r, grain(q * s * n, kWorth), [&](int64_t begin, int64_t end) {
    const Buffer line(direct ? 0 : q * right.ld), scaled(n * left.ld);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / r, k = row % r;
      if (row == begin || k == 0)
        for (int64_t term = 0; term < n; ++term)
          for (int64_t j = 0; j < left.ld; ++j) scaled.p[term * left.ld + j] = scale * left[term * p + i][j];
      float* const out = direct ? static_cast<float*>(h.data) + row * q * s : line.p;
      const int64_t ld = direct ? s : right.ld;
      multiply({out, ld, nullptr, 0, scaled.p, 1, left.ld}, q, {right[k], r * right.ld, n}, s);
      for (int64_t j = 0; j < q && !direct; ++j) put(h, (row * q + j) * s, line.p + j * ld, s);
    }
  });
}

void kron_sum_weight_backward(const KronShape& shape, KronIn g, KronIn a, KronIn b, float scale, KronOut da,
                              KronOut db) {
  const int64_t n = shape.m, p = shape.p, q = shape.q, r = shape.r, s = shape.s;
  const Rows left(a, n * p, q), right(b, n * r, s);
  const int64_t ld = right.ld;
  parallel_for(0, db.data ? r : 0, grain(p * q * s * n, kWorth), [&](int64_t begin, int64_t end) {
    const Buffer row(q * ld), sum(n * ld);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = 0; i < p; ++i) {
        Rows::fetch(row.p, ld, g, (i * r + k) * q, 0, q, s);
        multiply({sum.p, ld, i ? sum.p : nullptr, ld, left[i], p * left.ld, 1}, n, {row.p, ld, q}, ld);
      }
      for (int64_t term = 0; term < n; ++term) {
        for (int64_t l = 0; l < ld; ++l) sum.p[term * ld + l] *= scale;
        put(db, (term * r + k) * s, sum.p + term * ld, s);
      }
    }
  });
  // Of da, a tile of sums of N terms and N columns at a time.
  parallel_for(0, da.data ? p : 0, grain(q * r * s * n, kWorth), [&](int64_t begin, int64_t end) {
    const Buffer row(q * ld), sums(blocks(n, N) * N * blocks(q, N) * N * W);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < r; ++k) {
        Rows::fetch(row.p, ld, g, (i * r + k) * q, 0, q, s);
        float* own = sums.p;
        for (int64_t term = 0; term < n; term += N)
          for (int64_t j = 0; j < q; j += N, own += N * N * W) {
            const float *x[N], *y[N];  // of a last tile that is not full some twice
            for (int64_t c = 0; c < N; ++c) x[c] = right[at_most(term + c, n - 1) * r + k];
            for (int64_t c = 0; c < N; ++c) y[c] = row.p + at_most(j + c, q - 1) * ld;
            vec sum[N][N] = {};
            for (int64_t l = 0; l < ld; l += W)
              for (int u = 0; u < N; ++u)
                for (int v = 0; v < N; ++v) sum[u][v] = fma(load(x[u] + l), load(y[v] + l), sum[u][v]);
            for (int u = 0; u < N; ++u)
              for (int v = 0; v < N; ++v) {
                float* const total = own + (u * N + v) * W;
                store(total, k ? load(total) + sum[u][v] : sum[u][v]);
              }
          }
      }
      for (int64_t term = 0; term < n; ++term)
        for (int64_t j = 0; j < q; ++j) {
          const int64_t tile = term / N * blocks(q, N) + j / N, at = term % N * N + j % N;
          const float sum = scale * hsum(load(sums.p + (tile * N * N + at) * W));
          switch_dtype(da.type, [&](auto element) {
            using T = decltype(element);
            static_cast<T*>(da.data)[(term * p + i) * q + j] = narrow<T>(sum);
          });
        }
    }
  });
}

void kron_add(const KronShape& shape, KronOut w, int64_t ldw, KronFactor a, KronFactor b, float alpha) {
  const int64_t p = shape.p, q = shape.q, r = shape.r, s = shape.s;
  const int64_t lda = padded(q), ldb = padded(s);
  const Buffer left(p * lda), right(r * ldb);
  unpack(left.p, lda, a, 0, p, q);
  unpack(right.p, ldb, b, 0, r, s);
  parallel_for(0, p * r, grain(q * s, kWorth), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const line = right.p + row % r * ldb;
      for (int64_t j = 0; j < q; ++j) {
        const vec factor = splat(alpha * left.p[row / r * lda + j]);
        switch_dtype(w.type, [&](auto element) {
          auto* to = static_cast<decltype(element)*>(w.data) + row * ldw + j * s;
          int64_t l = 0;
          for (; l + W <= s; l += W) store(to + l, fma(factor, load(line + l), load(to + l)));
          const int rest = static_cast<int>(s - l);
          if (rest) store_n(to + l, fma(factor, load(line + l), load_n(to + l, rest)), rest);
        });
      }
    }
  });
}

}  // namespace pk::PK_ISA
