// Glue of the Kronecker ops: checks, allocates, dispatches. The maths is in README.md.
#include "kron/kron.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/checks.h"

namespace pk {
namespace {

KronIn in(const Tensor& t, const char* name) {
  check_contiguous(t, name);
  return {t.data_ptr(), dtype_of(t, name)};
}

KronOut out(const Tensor& t, const char* name) {
  check_contiguous(t, name);
  return {t.data_ptr(), dtype_of(t, name)};
}

// Any strides.
KronFactor factor(const Tensor& t, const char* name) {
  return {t.data_ptr(), dtype_of(t, name), t.stride(0), t.stride(1)};
}

// x [m, p r], y [m, q s]: rows of what has any leading dims
KronShape check(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const char* y_name) {
  PK_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must be matrices");
  const int64_t p = a.size(0), q = a.size(1), r = b.size(0), s = b.size(1);
  PK_CHECK(p > 0 && q > 0 && r > 0 && s > 0, "a and b must have elements");
  PK_CHECK(x.dim() >= 1 && y.dim() == x.dim() && x.size(x.dim() - 1) == p * r && y.size(x.dim() - 1) == q * s &&
               x.numel() / (p * r) == y.numel() / (q * s),
           "x must be [..., ", p * r, "] and ", y_name, " [..., ", q * s, "], as many tokens");
  check_same_device(x, y, "x and the result");
  check_same_device(x, a, "x and a");
  check_same_device(x, b, "x and b");
  return {x.numel() / (p * r), p, q, r, s};
}

// y = acc + scale * x (a kron b) + bias; acc may be y
void linear(const Tensor& y, std::optional<Tensor> acc, const Tensor& x, const Tensor& a, const Tensor& b,
            std::optional<Tensor> bias, double scale) {
  const KronShape s = check(x, y, a, b, "y");
  KronIn from = {nullptr, Dtype::f32};
  if (acc) {
    check_same_shape(*acc, y, "acc and y");
    check_same_device(*acc, y, "acc and y");
    from = in(*acc, "acc");
  }
  if (bias) {
    PK_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == s.q * s.s, "bias must hold ", s.q * s.s,
             " float32");
    check_contiguous(*bias, "bias");
    check_same_device(*bias, y, "bias and y");
  }
  if (s.m == 0) return;
  PK_DISPATCH_ISA(kron_linear, s, in(x, "x"), factor(a, "a"), factor(b, "b"), from,
                  bias ? static_cast<const float*>(bias->data_ptr()) : nullptr, static_cast<float>(scale), out(y, "y"));
}

// What is not needed has 0 elements.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& g, const Tensor& x, const Tensor& a, const Tensor& b,
                                            double scale, bool need_dx, bool need_da, bool need_db) {
  const KronShape s = check(x, g, a, b, "g");
  Tensor dx = need_dx ? new_empty(x, x.sizes(), x.scalar_type()) : new_empty(x, {0}, x.scalar_type());
  Tensor da = need_da ? new_empty(a, {s.p, s.q}, a.scalar_type()) : new_empty(a, {0}, a.scalar_type());
  Tensor db = need_db ? new_empty(b, {s.r, s.s}, b.scalar_type()) : new_empty(b, {0}, b.scalar_type());
  const KronOut none = {nullptr, Dtype::f32};
  PK_CHECK(s.m > 0, "there must be tokens");
  PK_DISPATCH_ISA(kron_backward, s, in(g, "g"), in(x, "x"), factor(a, "a"), factor(b, "b"), static_cast<float>(scale),
                  need_dx ? out(dx, "dx") : none, need_da ? out(da, "da") : none, need_db ? out(db, "db") : none);
  return {dx, da, db};
}

KronShape check_sum(const Tensor& a, const Tensor& b) {
  PK_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.numel() > 0 && b.numel() > 0,
           "a and b must be [n, p, q] and [n, r, s] with elements");
  check_same_device(a, b, "a and b");
  return {a.size(0), a.size(1), a.size(2), b.size(1), b.size(2)};
}

Tensor sum_weight(const Tensor& a, const Tensor& b, double scale) {
  const KronShape s = check_sum(a, b);
  Tensor h = new_empty(a, {s.p * s.r, s.q * s.s}, a.scalar_type());
  PK_DISPATCH_ISA(kron_sum_weight, s, in(a, "a"), in(b, "b"), static_cast<float>(scale), out(h, "h"));
  return h;
}

std::tuple<Tensor, Tensor> sum_weight_backward(const Tensor& g, const Tensor& a, const Tensor& b, double scale,
                                               bool need_da, bool need_db) {
  const KronShape s = check_sum(a, b);
  PK_CHECK(g.dim() == 2 && g.size(0) == s.p * s.r && g.size(1) == s.q * s.s, "g must be [", s.p * s.r, ", ", s.q * s.s,
           "]");
  check_same_device(g, a, "g and a");
  Tensor da = need_da ? new_empty(a, {s.m, s.p, s.q}, a.scalar_type()) : new_empty(a, {0}, a.scalar_type());
  Tensor db = need_db ? new_empty(b, {s.m, s.r, s.s}, b.scalar_type()) : new_empty(b, {0}, b.scalar_type());
  const KronOut none = {nullptr, Dtype::f32};
  PK_DISPATCH_ISA(kron_sum_weight_backward, s, in(g, "g"), in(a, "a"), in(b, "b"), static_cast<float>(scale),
                  need_da ? out(da, "da") : none, need_db ? out(db, "db") : none);
  return {da, db};
}

// w [p r, q s] += alpha * a kron b, one of whose strides is 1
void add(const Tensor& w, const Tensor& a, const Tensor& b, double alpha) {
  PK_CHECK(w.dim() == 2 && a.dim() == 2 && b.dim() == 2 && w.size(0) == a.size(0) * b.size(0) &&
               w.size(1) == a.size(1) * b.size(1),
           "w must be [p r, q s], a [p, q] and b [r, s]");
  PK_CHECK(w.stride(0) == 1 || w.stride(1) == 1, "the elements of a row or of a column of w must adjoin");
  check_same_device(w, a, "w and a");
  check_same_device(w, b, "w and b");
  if (w.numel() == 0) return;
  const KronOut to = {w.data_ptr(), dtype_of(w, "w")};
  KronFactor left = factor(a, "a"), right = factor(b, "b");
  KronShape s = {1, a.size(0), a.size(1), b.size(0), b.size(1)};
  const bool by_columns = w.stride(1) != 1;
  if (by_columns) {
    s = {1, s.q, s.p, s.s, s.r};
    for (KronFactor* f : {&left, &right}) std::swap(f->row, f->next);
  }
  PK_DISPATCH_ISA(kron_add, s, to, w.stride(by_columns ? 1 : 0), left, right, static_cast<float>(alpha));
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("kron_linear_(Tensor(a!) y, Tensor? acc, Tensor x, Tensor a, Tensor b, Tensor? bias, float scale) -> ()");
  m.def(
      "kron_backward(Tensor g, Tensor x, Tensor a, Tensor b, float scale, bool need_dx, bool need_da, bool need_db) -> "
      "(Tensor dx, Tensor da, Tensor db)");
  m.def("kron_sum_weight(Tensor a, Tensor b, float scale) -> Tensor");
  m.def(
      "kron_sum_weight_backward(Tensor g, Tensor a, Tensor b, float scale, bool need_da, bool need_db) -> (Tensor da, "
      "Tensor db)");
  m.def("kron_add_(Tensor(a!) w, Tensor a, Tensor b, float alpha) -> ()");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("kron_linear_", TORCH_BOX(&pk::linear));
  m.impl("kron_backward", TORCH_BOX(&pk::backward));
  m.impl("kron_sum_weight", TORCH_BOX(&pk::sum_weight));
  m.impl("kron_sum_weight_backward", TORCH_BOX(&pk::sum_weight_backward));
  m.impl("kron_add_", TORCH_BOX(&pk::add));
}
#endif
