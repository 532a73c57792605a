// Glue of hard-concrete gates and of the optimizer: checks, allocates, dispatches. The maths is in README.md.
#include "sparse/sparse_gates.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/checks.h"

namespace pk {
namespace {

Gates gates_of(const Tensor& like, const char* name, const Tensor& w, const Tensor& alpha,
               const std::optional<Tensor>& alpha_group, const std::optional<Tensor>& rng) {
  for (const Tensor* t : {&like, &w, &alpha}) {
    check_contiguous(*t, "w0, g, w and alpha");
    check_same_shape(*t, w, "w0, g, w and alpha");
    check_same_device(*t, w, "w0, g, w and alpha");
  }
  PK_CHECK(w.scalar_type() == alpha.scalar_type() &&
               (w.scalar_type() == ScalarType::Float || w.scalar_type() == like.scalar_type()),
           "w and alpha must both be float32, or have the dtype of ", name);
  if (alpha_group) {
    PK_CHECK(alpha_group->scalar_type() == ScalarType::Float && alpha_group->numel() == 1,
             "alpha_group must be one float32");
    check_same_device(*alpha_group, w, "alpha_group and w");
  }
  if (rng) {
    PK_CHECK(rng->scalar_type() == ScalarType::Long && rng->numel() == 2, "rng must be int64 [2]");
    check_contiguous(*rng, "rng");
    check_same_device(*rng, w, "rng and w");
  }
  return {w.numel(),
          dtype_of(w, "w"),
          w.data_ptr(),
          alpha.data_ptr(),
          alpha_group ? static_cast<const float*>(alpha_group->data_ptr()) : nullptr,
          rng ? static_cast<const int64_t*>(rng->data_ptr()) : nullptr};
}

// w0 + w z(alpha) z(alpha_group)
Tensor hard_concrete_cpu(const Tensor& w0, const Tensor& w, const Tensor& alpha, std::optional<Tensor> alpha_group,
                         std::optional<Tensor> rng) {
  const Gates gates = gates_of(w0, "w0", w, alpha, alpha_group, rng);
  Tensor out = new_empty(w0, w0.sizes(), w0.scalar_type());
  PK_DISPATCH_ISA(hard_concrete, gates, dtype_of(w0, "w0"), w0.data_ptr(), out.data_ptr());
  return out;
}

// dw, dalpha and the float32 dalpha_group; what is not needed has 0 elements
std::tuple<Tensor, Tensor, Tensor> hard_concrete_backward_cpu(const Tensor& g, const Tensor& w, const Tensor& alpha,
                                                              std::optional<Tensor> alpha_group,
                                                              std::optional<Tensor> rng, bool need_dw, bool need_dalpha,
                                                              bool need_dgroup) {
  const Gates gates = gates_of(g, "g", w, alpha, alpha_group, rng);
  PK_CHECK(!need_dgroup || alpha_group, "dalpha_group needs alpha_group");
  Tensor dw = need_dw ? new_empty(w, w.sizes(), w.scalar_type()) : new_empty(w, {0}, w.scalar_type());
  Tensor dalpha = need_dalpha ? new_empty(w, w.sizes(), w.scalar_type()) : new_empty(w, {0}, w.scalar_type());
  Tensor dgroup = need_dgroup ? new_empty(w, {}, ScalarType::Float) : new_empty(w, {0}, ScalarType::Float);
  PK_DISPATCH_ISA(hard_concrete_backward, gates, dtype_of(g, "g"), g.data_ptr(), need_dw ? dw.data_ptr() : nullptr,
                  need_dalpha ? dalpha.data_ptr() : nullptr,
                  need_dgroup ? static_cast<float*>(dgroup.data_ptr()) : nullptr);
  return {dw, dalpha, dgroup};
}

// One step on vals, m and v.
void sparse_adamw_cpu(const Tensor& vals, const Tensor& m, const Tensor& v, const Tensor& grad, double step,
                      std::optional<Tensor> w, std::optional<Tensor> idx, double lr, double beta1, double beta2,
                      double eps, double weight_decay) {
  for (const Tensor* t : {&vals, &m, &v, &grad}) {
    PK_CHECK(t->dim() == 1 && t->scalar_type() == ScalarType::Float, "vals, m, v and grad must be float32 [nnz]");
    check_contiguous(*t, "vals, m, v and grad");
    check_same_shape(*t, vals, "vals, m, v and grad");
    check_same_device(*t, vals, "vals, m, v and grad");
  }
  PK_CHECK(w.has_value() == idx.has_value(), "expected w and idx, or neither");
  if (w) {
    PK_CHECK(idx->scalar_type() == ScalarType::Int || idx->scalar_type() == ScalarType::Long,
             "idx must be int32 or int64");
    check_contiguous(*w, "w");
    check_contiguous(*idx, "idx");
    check_same_shape(*idx, vals, "idx and vals");
    check_same_device(*w, vals, "w and vals");
    check_same_device(*idx, vals, "idx and vals");
  }
  const auto f32 = [](double x) { return static_cast<float>(x); };
  const auto own = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const AdamW s = {vals.numel(),
                   own(vals),
                   own(m),
                   own(v),
                   own(grad),
                   f32(beta1),
                   f32(beta2),
                   f32(eps),
                   f32(lr * weight_decay),
                   f32(lr / (1 - std::pow(beta1, step))),
                   f32(1 - std::pow(beta2, step)),
                   w ? dtype_of(*w, "w") : Dtype::f32,
                   w ? w->data_ptr() : nullptr,
                   w ? idx->data_ptr() : nullptr,
                   w ? w->numel() : 0,
                   w && idx->scalar_type() == ScalarType::Long};
  PK_CHECK(PK_DISPATCH_ISA(sparse_adamw, s), "idx must be from 0 to the ", s.w_size,
           " elements of w; nothing was done");
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("hard_concrete(Tensor w0, Tensor w, Tensor alpha, Tensor? alpha_group, Tensor? rng) -> Tensor");
  m.def(
      "hard_concrete_backward(Tensor g, Tensor w, Tensor alpha, Tensor? alpha_group, Tensor? rng, bool need_dw, "
      "bool need_dalpha, bool need_dgroup) -> (Tensor dw, Tensor dalpha, Tensor dgroup)");
  m.def(
      "sparse_adamw_(Tensor(a!) vals, Tensor(b!) m, Tensor(c!) v, Tensor grad, float step, Tensor? w, Tensor? idx, "
      "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("hard_concrete", TORCH_BOX(&pk::hard_concrete_cpu));
  m.impl("hard_concrete_backward", TORCH_BOX(&pk::hard_concrete_backward_cpu));
  m.impl("sparse_adamw_", TORCH_BOX(&pk::sparse_adamw_cpu));
}
#endif
