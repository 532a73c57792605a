// x (A kron B) on the CPU: both products of a few tokens while what lies between them is in the cache. README.md has
// the why.
#include "common/product.h"
#include "kron/kron.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kTile = 1 << 16;  // floats of the operands of a few tokens: a quarter of the second-level cache
constexpr int64_t kParts = 32;      // pieces of the tokens with sums of their own

// -- factors --------------------------------------------------------------------------------------------------------

// scale * A [p, q], for the left of a product.
class Left {
 public:
  Left(KronFactor f, int64_t p, int64_t q, float scale) : ld(padded(q)), room_(p * ld) {
    unpack(room_.p, ld, f, 0, p, q);
    for (int64_t i = 0; i < p * ld; ++i) room_.p[i] *= scale;
  }
  const float* data() const { return room_.p; }
  const int64_t ld;

 private:
  const Buffer room_;
};

// -- tokens ---------------------------------------------------------------------------------------------------------

struct Rows {
  const float* p;
  int64_t ld;
};

// The tokens from `first` on, matrices [rows, n], as fp32: where they lie or, as vectors must be whole or the matrices
// turned to [n, rows], in `room`, padded.
Rows fetch(float* room, KronIn src, int64_t first, int64_t tokens, int64_t rows, int64_t n, bool turn, bool whole) {
  if (src.type == Dtype::f32 && !turn && (!whole || n % W == 0))
    return {static_cast<const float*>(src.data) + first * rows * n, n};
  const int64_t ld = padded(turn ? rows : n);
  switch_dtype(src.type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(src.data) + first * rows * n;
    for (int64_t t = 0; t < tokens && turn; ++t) transpose(room + t * n * ld, ld, from + t * rows * n, n, rows, n);
    for (int64_t i = 0; i < tokens * rows && !turn; ++i) widen_row(room + i * ld, from + i * n, n);
  });
  return {room, ld};
}

// dst = src + acc + bias [rows n], rounded, each [rows, n] of one token; acc and bias may be absent. Rows of src are ld
// apart.
void put(KronOut dst, int64_t token, const float* src, int64_t ld, int64_t rows, int64_t n, KronIn acc = {},
         const float* bias = nullptr) {
  switch_dtype(dst.type, [&](auto element) {
    switch_dtype(acc.type, [&](auto added) {
      auto* to = static_cast<decltype(element)*>(dst.data) + token * rows * n;
      const auto* more = acc.data ? static_cast<const decltype(added)*>(acc.data) + token * rows * n : nullptr;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; j += W) {
          const int64_t at = i * n + j;
          const int some = static_cast<int>(at_most(n - j, W));
          vec sum = load(src + i * ld + j);
          if (bias) sum = sum + (some == W ? load(bias + at) : load_n(bias + at, some));
          if (more) sum = sum + (some == W ? load(more + at) : load_n(more + at, some));
          if (some == W)
            store(to + at, sum);
          else
            store_n(to + at, sum, some);
        }
    });
  });
}

// As put, of a matrix that is turned to [n, rows].
void put_turned(KronOut dst, int64_t token, const float* src, int64_t ld, int64_t rows, int64_t n, float* room,
                KronIn acc = {}, const float* bias = nullptr) {
  transpose(room, padded(n), src, ld, n, rows);
  put(dst, token, room, padded(n), rows, n, acc, bias);
}

// Multiply-adds of vectors for one token, with B first or with A.
int64_t with_b_first(const KronShape& s) { return s.p * padded(s.s) * (s.r + s.q); }
int64_t with_a_first(const KronShape& s) { return s.q * (s.p * padded(s.r) + s.r * padded(s.s)); }

KronShape turned(const KronShape& s) { return {s.m, s.r, s.s, s.p, s.q}; }

// Y^T = B^T X^T A: with a narrow B, it pays to turn each token so that the vectors lie along A.
bool pays_to_turn(const KronShape& s) {
  const KronShape t = turned(s);
  const int64_t moved = 2 * W * (s.p * s.r + s.q * s.s);
  return at_most(with_b_first(t), with_a_first(t)) + moved < at_most(with_b_first(s), with_a_first(s));
}

int64_t tokens_of(int64_t m, int64_t floats) { return at_least(at_most(kTile / (floats + 1), blocks(m, 8)), 1); }

}  // namespace

void kron_linear(const KronShape& shape, KronIn x, KronFactor a, KronFactor b, KronIn acc, const float* bias,
                 float scale, KronOut y) {
  const bool turn = pays_to_turn(shape);
  if (turn) std::swap(a, b);
  const KronShape own = turn ? turned(shape) : shape;
  const int64_t m = own.m, p = own.p, q = own.q, r = own.r, s = own.s, rp = padded(r), sp = padded(s);
  const bool b_first = with_b_first(own) <= with_a_first(own);
  const Left left(a, p, q, scale);
  const Packed right(b, r, s, m * (b_first ? p : q));
  const int64_t between = b_first ? p * sp : q * rp, tokens = tokens_of(m, p * rp + between + q * sp);
  const bool direct = y.type == Dtype::f32 && !turn && !bias;
  const int64_t ldo = direct ? s : sp;
  parallel_for(0, blocks(m, tokens), grain(tokens * p * sp * (r + q)), [&](int64_t first, int64_t end) {
    const Buffer xs(tokens * p * rp), zs(tokens * between), ys(direct ? 0 : tokens * q * sp),
        room(turn ? s * padded(q) : 0);
    for (int64_t block = first; block < end; ++block) {
      const int64_t top = block * tokens, count = at_most(m - top, tokens);
      const Rows in = fetch(xs.p, x, top, count, shape.p, shape.r, turn, !b_first);
      float* const out = direct ? static_cast<float*>(y.data) + top * q * s : ys.p;
      const float* from = direct && acc.data ? static_cast<const float*>(acc.data) + top * q * s : nullptr;
      if (b_first) multiply({zs.p, sp, nullptr, 0, in.p, in.ld, 1}, count * p, right.right, sp);
      for (int64_t t = 0; t < count; ++t)
        if (b_first)
          multiply({out + t * q * ldo, ldo, from ? from + t * q * ldo : nullptr, ldo, left.data(), 1, left.ld}, q,
                   {zs.p + t * p * sp, sp, p}, direct ? s : sp);
        else
          multiply({zs.p + t * q * rp, rp, nullptr, 0, left.data(), 1, left.ld}, q, {in.p + t * p * in.ld, in.ld, p},
                   rp);
      if (!b_first) multiply({out, ldo, from, ldo, zs.p, rp, 1}, count * q, right.right, direct ? s : sp);
      for (int64_t t = 0; t < count && !direct; ++t)
        if (turn)
          put_turned(y, top + t, ys.p + t * q * sp, sp, s, q, room.p, acc, bias);
        else
          put(y, top + t, ys.p + t * q * sp, sp, q, s, acc, bias);
    }
  });
}

void kron_backward(const KronShape& shape, KronIn g, KronIn x, KronFactor a, KronFactor b, float scale, KronOut dx,
                   KronOut da, KronOut db) {
  const bool turn = pays_to_turn(shape);
  if (turn) std::swap(a, b), std::swap(da, db);
  const KronShape own = turn ? turned(shape) : shape;
  const int64_t m = own.m, p = own.p, q = own.q, r = own.r, s = own.s;
  const int64_t qp = padded(q), rp = padded(r), sp = padded(s);
  // V = A G lies between, or H = G B^T: the order depends on the shape alone, or a gradient would on what else is
  // asked.
  const bool by_v = q * p * sp + p * s * rp + 2 * r * p * sp + p * s * qp <=
                    q * s * rp + p * q * rp + p * r * qp + q * p * rp + r * q * sp;
  const Left left(a, p, q, scale);
  const Packed across(transposed(b), s, r, m * q), along(b, r, s, by_v ? m * p : 0);
  const int64_t rows = by_v ? p : q, width = by_v ? sp : rp;  // of V or H, and of X B or A^T X
  const int64_t tokens = tokens_of(m, p * rp + q * sp + 2 * rows * width + width * qp);
  // Pieces with sums of their own, so that threads share nothing: a number that depends on the shape alone.
  int64_t parts = at_most(at_least(at_most(m * (p * r + q * s) / (4 * (p * q + r * s)), kParts), 2), m);
  while (parts & (parts - 1)) parts &= parts - 1;
  const int64_t sums = p * qp + r * sp;
  const Buffer partial(parts * sums);
  parallel_for(
      0, parts, grain(blocks(m, parts) * (2 * p * sp * (r + q) + r * p * sp)), [&](int64_t first, int64_t end) {
        const Buffer xs(tokens * p * rp), gs(tokens * q * sp), vs(tokens * rows * width), zs(tokens * rows * width),
            flipped(width * qp), out(dx.data && (turn || dx.type != Dtype::f32) ? tokens * p * rp : 0),
            room(turn ? r * padded(p) : 0);
        for (int64_t part = first; part < end; ++part) {
          float *const own_a = partial.p + part * sums, *const own_b = own_a + p * qp;
          const int64_t stop = m * (part + 1) / parts;
          const float *from_a = nullptr, *from_b = nullptr;
          for (int64_t top = m * part / parts; top < stop; top += tokens) {
            const int64_t count = at_most(stop - top, tokens);
            const Rows in = fetch(xs.p, x, top, count, shape.p, shape.r, turn, !by_v);
            const Rows up = fetch(gs.p, g, top, count, shape.q, shape.s, turn, true);
            const bool direct = dx.type == Dtype::f32 && !turn;
            float* const to = dx.data && direct ? static_cast<float*>(dx.data) + top * p * r : out.p;
            const int64_t ldx = direct ? r : rp;
            if (by_v) {
              if (dx.data || db.data)
                for (int64_t t = 0; t < count; ++t)
                  multiply({vs.p + t * p * sp, sp, nullptr, 0, left.data(), left.ld, 1}, p,
                           {up.p + t * q * up.ld, up.ld, q}, sp);
              if (dx.data) multiply({to, ldx, nullptr, 0, vs.p, sp, 1}, count * p, across.right, direct ? r : rp);
              if (db.data) multiply({own_b, sp, from_b, sp, in.p, 1, in.ld}, r, {vs.p, sp, count * p}, sp);
              if (da.data) multiply({zs.p, sp, nullptr, 0, in.p, in.ld, 1}, count * p, along.right, sp);
            } else {
              multiply({vs.p, rp, nullptr, 0, up.p, up.ld, 1}, count * q, across.right, rp);
              for (int64_t t = 0; t < count; ++t) {
                if (dx.data)
                  multiply({to + t * p * ldx, ldx, nullptr, 0, left.data(), left.ld, 1}, p, {vs.p + t * q * rp, rp, q},
                           direct ? r : rp);
                if (db.data)
                  multiply({zs.p + t * q * rp, rp, nullptr, 0, left.data(), 1, left.ld}, q,
                           {in.p + t * p * in.ld, in.ld, p}, rp);
              }
              if (db.data) multiply({own_b, sp, from_b, sp, zs.p, 1, rp}, r, {up.p, up.ld, count * q}, sp);
            }
            for (int64_t t = 0; t < count && da.data; ++t) {
              const Rows one = by_v ? Rows{up.p + t * q * up.ld, up.ld} : Rows{vs.p + t * q * rp, rp};
              const Rows other = by_v ? Rows{zs.p + t * p * sp, sp} : Rows{in.p + t * p * in.ld, in.ld};
              transpose(flipped.p, qp, one.p, one.ld, q, by_v ? s : r);
              multiply({own_a, qp, from_a, qp, other.p, other.ld, 1}, p, {flipped.p, qp, by_v ? s : r}, qp);
              from_a = own_a;
            }
            from_b = own_b;
            for (int64_t t = 0; t < count && dx.data && !direct; ++t)
              if (turn)
                put_turned(dx, top + t, out.p + t * p * rp, rp, r, p, room.p);
              else
                put(dx, top + t, out.p + t * p * rp, rp, p, r);
          }
        }
      });
  const auto join = [&](KronOut d, int64_t offset, int64_t ld, int64_t rows, int64_t n, float factor) {
    parallel_for(0, d.data ? rows : 0, grain(parts * ld), [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        float* const sum = partial.p + offset + i * ld;
        for (int64_t j = 0; j < ld; j += W) {
          vec v = load(sum + j);
          for (int64_t part = 1; part < parts; ++part) v = v + load(sum + part * sums + j);
          store(sum + j, splat(factor) * v);
        }
        put(d, i, sum, ld, 1, n);
      }
    });
  };
  join(da, 0, qp, p, q, scale);
  join(db, p * qp, sp, r, s, 1.0f);
}

}  // namespace pk::PK_ISA
