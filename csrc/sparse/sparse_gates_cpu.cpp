#include "sparse/sparse_gates.h"

#include <algorithm>
#include <vector>

#include "common/philox.h"
#include "common/vecmath.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kBlock = 1 << 12;  // elements of one partial sum and of one task
constexpr float kLeft = -1.5f, kRight = 1.5f, kMargin = 1e-4f;

// The words of 4 * kLanes elements in their order, from those of their counters.
PK_INLINE void in_order(wide left, wide right, uvec (&out)[2]) {
#if defined(__AVX512F__)
  const __m512i first = {0, 8, 1, 9, 2, 10, 3, 11}, second = {4, 12, 5, 13, 6, 14, 7, 15};
  out[0] = (uvec)_mm512_permutex2var_epi64((__m512i)left, first, (__m512i)right);
  out[1] = (uvec)_mm512_permutex2var_epi64((__m512i)left, second, (__m512i)right);
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)left, (__m256i)right);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)left, (__m256i)right);
  out[0] = (uvec)_mm256_permute2x128_si256(even, odd, 0x20);
  out[1] = (uvec)_mm256_permute2x128_si256(even, odd, 0x31);
#else
  uint64_t pairs[2 * kLanes];
  for (int l = 0; l < kLanes; ++l) pairs[2 * l] = left[l], pairs[2 * l + 1] = right[l];
  std::memcpy(out, pairs, sizeof(out));
#endif
}

// sigmoid(log(u / v) + alpha) with v = 1 - u
PK_INLINE vec sigmoid(vec u, vec v, vec alpha) { return u / fma(v, exponential(-alpha), u); }

PK_INLINE vec noisy(uvec word, vec alpha) {
  const vec uniform = __builtin_convertvector(bit_cast<ivec>(word >> 8), vec) * 0x1p-24f;
  const vec margin = splat(kMargin), scale = splat(1 - 2 * kMargin);
  return sigmoid(fma(uniform, scale, margin), fma(1.0f - uniform, scale, margin), alpha);
}

PK_INLINE vec stretched(vec s) { return fma(s, splat(kRight - kLeft), splat(kLeft)); }

PK_INLINE vec gate(vec s) {
  vec z = stretched(s);
  z = z < 0.0f ? splat(0.0f) : z;
  return z > 1.0f ? splat(1.0f) : z;
}

// dz / dalpha
PK_INLINE vec slope(vec s) {
  const vec z = stretched(s), inside = (kRight - kLeft) * s * (1.0f - s);
  return (z > 0.0f) & (z < 1.0f) ? inside : splat(0.0f);
}

Philox generator(const Gates& g) {
  return g.rng ? Philox(static_cast<uint64_t>(g.rng[0]), static_cast<uint64_t>(g.rng[1])) : Philox();
}

// s of the group.
float group_sigmoid(const Gates& g, const Philox& philox) {
  const vec alpha = splat(*g.alpha_group);
  if (!g.rng) return sigmoid(splat(1.0f), splat(1.0f), alpha)[0];
  wide left[1], right[1];
  philox(0, 1, left, right);
  return noisy(uvec{} + static_cast<uint32_t>(left[0][0]), alpha)[0];
}

// f(s, i, n) for s of elements i..i + n of [begin, end), n = W but for the last; begin is a multiple of kBlock.
template <class P, class F>
PK_INLINE void sigmoids(const Gates& g, const Philox& philox, int64_t begin, int64_t end, const F& f) {
  constexpr int kVectors = 2, kStep = kVectors * 2 * W;  // vectors of counters, their elements
  const P* alpha = static_cast<const P*>(g.alpha);
  for (int64_t i = begin; i < end; i += kStep) {
    uvec words[kVectors][2] = {};
    if (g.rng) {
      wide left[kVectors], right[kVectors];
      philox(static_cast<uint64_t>(i / 4), 0, left, right);
      for (int j = 0; j < kVectors; ++j) in_order(left[j], right[j], words[j]);
    }
    for (int j = 0; j < 2 * kVectors; ++j) {
      const int64_t at = i + j * W;
      const auto one = [&](vec a, int n) {
        f(g.rng ? noisy(words[j / 2][j % 2], a) : sigmoid(splat(1.0f), splat(1.0f), a), at, n);
      };
      if (at + W <= end)
        one(load(alpha + at), W);
      else if (at < end)
        one(load_n(alpha + at, static_cast<int>(end - at)), static_cast<int>(end - at));
    }
  }
}

template <class T>
PK_INLINE vec get(const T* p, int64_t i, int n) {
  return n == W ? load(p + i) : load_n(p + i, n);
}

template <class T>
PK_INLINE void put(T* p, int64_t i, vec v, int n) {
  n == W ? store(p + i, v) : store_n(p + i, v, n);
}

// f(T{}, P{}) of the types of w0 or g, and of w and alpha.
template <class F>
void types(Dtype type, Dtype w_type, const F& f) {
  switch_dtype(type, [&](auto t) { w_type == Dtype::f32 ? f(t, float{}) : f(t, t); });
}

// f(begin, end) over blocks.
template <class F>
void blocks(int64_t n, const F& f) {
  parallel_for(0, (n + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b * kBlock, std::min(n, (b + 1) * kBlock));
  });
}

}  // namespace

void hard_concrete(const Gates& s, Dtype type, const void* w0, void* out) {
  const Philox philox = generator(s);
  const vec whole = s.alpha_group ? gate(splat(group_sigmoid(s, philox))) : splat(1.0f);
  types(type, s.w_type, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    const T* base = static_cast<const T*>(w0);
    const P* w = static_cast<const P*>(s.w);
    blocks(s.n, [&](int64_t begin, int64_t end) {
      sigmoids<P>(s, philox, begin, end, [&](vec own, int64_t i, int n) {
        put(static_cast<T*>(out), i, fma(get(w, i, n) * gate(own), whole, get(base, i, n)), n);
      });
    });
  });
}

void hard_concrete_backward(const Gates& s, Dtype type, const void* g, void* dw, void* dalpha, float* dgroup) {
  const Philox philox = generator(s);
  const vec group = s.alpha_group ? splat(group_sigmoid(s, philox)) : splat(0.0f);
  const vec whole = s.alpha_group ? gate(group) : splat(1.0f);
  std::vector<float> sums(dgroup ? (s.n + kBlock - 1) / kBlock : 0);
  types(type, s.w_type, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    const T* in = static_cast<const T*>(g);
    const P* w = static_cast<const P*>(s.w);
    blocks(s.n, [&](int64_t begin, int64_t end) {
      vec sum = {};
      sigmoids<P>(s, philox, begin, end, [&](vec own, int64_t i, int n) {
        const vec gv = get(in, i, n), z = gate(own);
        if (dw) put(static_cast<P*>(dw), i, gv * z * whole, n);
        if (!dalpha && !dgroup) return;
        const vec gw = gv * get(w, i, n);
        if (dalpha) put(static_cast<P*>(dalpha), i, gw * whole * slope(own), n);
        if (dgroup) sum = fma(gw, z, sum);  // missing lanes are 0 * 0
      });
      if (dgroup) sums[begin / kBlock] = hsum(sum);
    });
  });
  if (!dgroup) return;
  double total = 0;
  for (const float part : sums) total += part;
  *dgroup = static_cast<float>(total) * slope(group)[0];
}

// -- AdamW ----------------------------------------------------------------------------------------------------------

namespace {

PK_INLINE vec root(vec v) {
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int l = 0; l < W; ++l) v[l] = std::sqrt(v[l]);
  return v;
#endif
}

template <class T, class I>
bool adamw(const AdamW& s) {
  constexpr int64_t kAhead = 64;  // elements: each is a line of its own
  const T* w = static_cast<const T*>(s.w);
  const I* idx = static_cast<const I*>(s.idx);
  uint64_t outside = 0;
  for (int64_t i = 0; w && i < s.nnz; ++i) outside |= static_cast<uint64_t>(idx[i]) >= static_cast<uint64_t>(s.w_size);
  if (outside) return false;
  parallel_for(0, s.nnz, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, end - i));
      const vec g = get(s.grad, i, n), vals = get(s.vals, i, n);
      vec decayed = vals;
      if (w) {
        float base[W] = {};
        for (int l = 0; l < n; ++l) {
          if (i + l + kAhead < end) __builtin_prefetch(w + idx[i + l + kAhead]);
          base[l] = widen(w[idx[i + l]]);
        }
        decayed += load(base);
      }
      const vec m = fma(splat(s.beta1), get(s.m, i, n), (1 - s.beta1) * g);
      const vec v = fma(splat(s.beta2), get(s.v, i, n), (1 - s.beta2) * g * g);
      const vec step = s.rate * m / (root(v / s.correction2) + s.eps);
      put(s.m, i, m, n);
      put(s.v, i, v, n);
      put(s.vals, i, vals - s.decay * decayed - step, n);
    }
  });
  return true;
}

}  // namespace

bool sparse_adamw(const AdamW& s) {
  return switch_dtype(s.w_type, [&](auto t) {
    using T = decltype(t);
    return s.idx64 ? adamw<T, int64_t>(s) : adamw<T, int32_t>(s);
  });
}

}  // namespace pk::PK_ISA
