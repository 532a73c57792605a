// Glue of the bottleneck: checks, allocates, dispatches. The maths is in README.md.
#include "bottleneck/bottleneck.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "lora/lora_checks.h"

namespace pk {
namespace {

using Maybe = std::optional<Tensor>;

const float* vector(const Maybe& t, int64_t size, const char* name) {
  if (!t) return nullptr;
  PK_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == size && t->is_cpu(), name, " must hold ", size,
           " float32 on the CPU");
  check_contiguous(*t, name);
  return static_cast<const float*>(t->data_ptr());
}

LoraIn matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  PK_CHECK(t.numel() == rows * columns && t.dim() >= 1 && t.size(t.dim() - 1) == columns && t.is_cpu(), name,
           " must be [", rows, ", ", columns, "] on the CPU");
  check_contiguous(t, name);
  return in(t, name);
}

Bottleneck shape_of(const Tensor& x, const Maybe& ln_w, const Maybe& ln_b, const Tensor& wd, const Maybe& bd,
                    const Tensor& wu, const Maybe& bu, const Maybe& gate, int64_t act, double scale,
                    std::optional<double> eps, double p, const Maybe& rng) {
  PK_CHECK(wd.dim() == 2 && wu.dim() == 2 && wd.numel() > 0 && wu.numel() > 0,
           "wd and wu must be matrices with elements");
  PK_CHECK(act >= 0 && act < kActs, "act must be 0 .. ", kActs - 1);
  Bottleneck s;
  s.k = wd.size(1), s.m = wd.size(0), s.n = wu.size(0), s.rows = x.numel() / s.k;
  s.x = matrix(x, s.rows, s.k, "x");
  s.wd = matrix(wd, s.m, s.k, "wd");
  s.wu = matrix(wu, s.n, s.m, "wu");
  s.ln_w = vector(ln_w, s.k, "ln_w");
  s.ln_b = vector(ln_b, s.k, "ln_b");
  s.bd = vector(bd, s.m, "bd");
  s.bu = vector(bu, s.n, "bu");
  s.gate = vector(gate, s.rows, "gate");
  s.act = static_cast<Act>(act);
  s.scale = static_cast<float>(scale);
  s.norm = eps.has_value();
  s.eps = static_cast<float>(eps.value_or(0));
  s.drop = dropout_of(p, rng);
  return s;
}

void forward(const Tensor& y, const Tensor& z, Maybe stats, const Tensor& residual, const Tensor& x, Maybe ln_w,
             Maybe ln_b, const Tensor& wd, Maybe bd, const Tensor& wu, Maybe bu, Maybe gate, int64_t act, double scale,
             std::optional<double> eps, double p, Maybe rng) {
  const Bottleneck s = shape_of(x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng);
  PK_CHECK(y.scalar_type() == residual.scalar_type(), "y and the residual must have the same dtype");
  PK_CHECK(s.norm == stats.has_value(), "stats are those of a LayerNorm");
  matrix(y, s.rows, s.n, "y");
  matrix(z, s.rows, s.m, "z");
  if (s.rows == 0) return;
  if (y.data_ptr() != residual.data_ptr()) prefer_huge_pages(y.data_ptr(), y.numel() * y.element_size());
  PK_DISPATCH_ISA(bottleneck, s, matrix(residual, s.rows, s.n, "residual"), out(y, "y"), out(z, "z"),
                  const_cast<float*>(vector(stats, 2 * s.rows, "stats")));
}

// d: dx, dwd and dwu as x, wd and wu, then float32 dln_w, dln_b, dbd, dbu and dgate; null if not wanted.
void backward(Maybe dx, Maybe dwd, Maybe dwu, Maybe dln_w, Maybe dln_b, Maybe dbd, Maybe dbu, Maybe dgate,
              const Tensor& g, const Tensor& x, Maybe ln_w, Maybe ln_b, const Tensor& wd, Maybe bd, const Tensor& wu,
              Maybe bu, Maybe gate, const Tensor& z, Maybe stats, int64_t act, double scale, std::optional<double> eps,
              double p, Maybe rng, bool own_residual) {
  const Bottleneck s = shape_of(x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng);
  PK_CHECK(s.norm == stats.has_value(), "stats are those of a LayerNorm");
  PK_CHECK(s.rows > 0, "there must be rows");
  PK_CHECK(!own_residual || s.k == s.n, "x cannot be the residual of a y that is wider or narrower");
  if (dx) prefer_huge_pages(dx->data_ptr(), dx->numel() * dx->element_size());
  const auto like = [](const Maybe& d, const Tensor& t, const char* name) {
    if (!d) return LoraOut{};
    check_same_shape(*d, t, name);
    PK_CHECK(d->scalar_type() == t.scalar_type(), name, " must have the same dtype");
    check_contiguous(*d, name);
    return out(*d, name);
  };
  const auto sums = [](const Maybe& d, int64_t size, const char* name) {
    return const_cast<float*>(vector(d, size, name));
  };
  const BottleneckGrads d = {like(dx, x, "x and its gradient"),
                             like(dwd, wd, "wd and its gradient"),
                             like(dwu, wu, "wu and its gradient"),
                             sums(dln_w, s.k, "dln_w"),
                             sums(dln_b, s.k, "dln_b"),
                             sums(dbd, s.m, "dbd"),
                             sums(dbu, s.n, "dbu"),
                             sums(dgate, s.rows, "dgate")};
  PK_DISPATCH_ISA(bottleneck_backward, s, matrix(g, s.rows, s.n, "g"), matrix(z, s.rows, s.m, "z"),
                  vector(stats, 2 * s.rows, "stats"), own_residual, d);
}

}  // namespace
}  // namespace pk

#define PK_BOTTLENECK "Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor wd, Tensor? bd, Tensor wu, Tensor? bu, Tensor? gate"
#define PK_CONSTANTS "int act, float scale, float? eps, float p, Tensor? rng"

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("bottleneck_(Tensor(a!) y, Tensor(b!) z, Tensor(c!)? stats, Tensor residual, " PK_BOTTLENECK ", " PK_CONSTANTS
        ") -> ()");
  m.def(
      "bottleneck_backward_(Tensor(a!)? dx, Tensor(b!)? dwd, Tensor(c!)? dwu, Tensor(d!)? dln_w, Tensor(e!)? dln_b, "
      "Tensor(f!)? dbd, Tensor(g!)? dbu, Tensor(h!)? dgate, Tensor g, " PK_BOTTLENECK
      ", Tensor z, Tensor? stats, " PK_CONSTANTS ", bool own_residual) -> ()");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("bottleneck_", TORCH_BOX(&pk::forward));
  m.impl("bottleneck_backward_", TORCH_BOX(&pk::backward));
}
#endif
