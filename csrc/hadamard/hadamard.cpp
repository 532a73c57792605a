// Glue of the Walsh-Hadamard transform and of Fastfood: checks, allocates, dispatches. The maths is in README.md.
#include "hadamard/hadamard.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/checks.h"

namespace pk {
namespace {

constexpr int64_t kLargest = int64_t{1} << 26;

// scale * H x along the last dimension
Tensor fwht_cpu(const Tensor& x, double scale) {
  check_contiguous(x, "x");
  PK_CHECK(x.dim() >= 1, "x must be [..., n]");
  const int64_t n = x.size(x.dim() - 1);
  PK_CHECK(n >= 1 && n <= kLargest, "n must be from 1 to 2^26");
  Tensor y = new_empty(x, x.sizes(), x.scalar_type());
  PK_DISPATCH_ISA(fwht, dtype_of(x, "x"), x.data_ptr(), y.data_ptr(), x.numel() / n, n, static_cast<float>(scale));
  return y;
}

FastfoodState state_of(const Tensor& sign, const Tensor& pi_mod, const Tensor& g) {
  for (const Tensor* t : {&sign, &pi_mod, &g}) {
    PK_CHECK(t->dim() == 1, "sign, pi_mod and g must have one dimension");
    check_contiguous(*t, "sign, pi_mod and g");
    check_same_device(*t, sign, "sign, pi_mod and g");
  }
  PK_CHECK(sign.scalar_type() == ScalarType::Char, "sign must be int8");
  const bool is_int32 = pi_mod.scalar_type() == ScalarType::Int, is_float = g.scalar_type() == ScalarType::Float;
  PK_CHECK(is_int32 || pi_mod.scalar_type() == ScalarType::Short, "pi_mod must be int16 or int32");
  PK_CHECK(is_float || g.scalar_type() == ScalarType::Short, "g must be int16 or float32");
  check_same_shape(pi_mod, g, "pi_mod and g");
  const int64_t d = sign.numel(), n = g.numel();
  PK_CHECK(d >= 1 && d <= n && (n & (n - 1)) == 0 && n <= kLargest, "n must be a power of two from d to 2^26");
  return {d, n, static_cast<const int8_t*>(sign.data_ptr()), pi_mod.data_ptr(), g.data_ptr(), is_int32, is_float};
}

// base + scale * P(theta)
Tensor fastfood_cpu(const Tensor& theta, const Tensor& sign, const Tensor& pi_mod, const Tensor& g,
                    std::optional<Tensor> base, int64_t numel, double scale) {
  const FastfoodState s = state_of(sign, pi_mod, g);
  check_contiguous(theta, "theta");
  check_same_shape(theta, sign, "theta and sign");
  check_same_device(theta, sign, "theta and sign");
  PK_CHECK(numel >= 1 && numel <= s.n, "numel must be from 1 to n");
  if (base) {
    PK_CHECK(base->numel() == numel, "base must have numel elements");
    check_contiguous(*base, "base");
    check_same_device(*base, theta, "base and theta");
  }
  Tensor out =
      base ? new_empty(theta, base->sizes(), base->scalar_type()) : new_empty(theta, {numel}, theta.scalar_type());
  PK_DISPATCH_ISA(fastfood, s, dtype_of(theta, "theta"), theta.data_ptr(), dtype_of(out, "base"),
                  base ? base->data_ptr() : nullptr, out.data_ptr(), numel, static_cast<float>(scale));
  return out;
}

// float32 dtheta
Tensor fastfood_backward_cpu(const Tensor& dy, const Tensor& sign, const Tensor& pi_mod, const Tensor& g,
                             double scale) {
  const FastfoodState s = state_of(sign, pi_mod, g);
  check_contiguous(dy, "dy");
  check_same_device(dy, sign, "dy and sign");
  PK_CHECK(dy.numel() >= 1 && dy.numel() <= s.n, "dy must have 1 to n elements");
  Tensor dtheta = new_empty(dy, {s.d}, ScalarType::Float);
  PK_DISPATCH_ISA(fastfood_backward, s, dtype_of(dy, "dy"), dy.data_ptr(), dy.numel(), static_cast<float>(scale),
                  static_cast<float*>(dtheta.data_ptr()));
  return dtheta;
}

// sign, pi_mod and g of a seed
std::tuple<Tensor, Tensor, Tensor> fastfood_state_cpu(const Tensor& quantiles, int64_t seed, int64_t n, int64_t d) {
  PK_CHECK(quantiles.scalar_type() == ScalarType::Short && quantiles.numel() == 1 << 16,
           "quantiles must be int16 [65536]");
  check_contiguous(quantiles, "quantiles");
  PK_CHECK(d >= 1 && d <= n && (n & (n - 1)) == 0 && n <= kLargest, "n must be a power of two from d to 2^26");
  const bool is_int32 = d > 1 << 15;
  Tensor sign = new_empty(quantiles, {d}, ScalarType::Char), g = new_empty(quantiles, {n}, ScalarType::Short);
  Tensor pi_mod = new_empty(quantiles, {n}, is_int32 ? ScalarType::Int : ScalarType::Short);
  PK_DISPATCH_ISA(fastfood_state, seed, n, d, static_cast<const int16_t*>(quantiles.data_ptr()),
                  static_cast<int8_t*>(sign.data_ptr()), is_int32, pi_mod.data_ptr(),
                  static_cast<int16_t*>(g.data_ptr()));
  return {sign, pi_mod, g};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("fwht(Tensor x, float scale) -> Tensor");
  m.def("fastfood(Tensor theta, Tensor sign, Tensor pi_mod, Tensor g, Tensor? base, int numel, float scale) -> Tensor");
  m.def("fastfood_state(Tensor quantiles, int seed, int n, int d) -> (Tensor sign, Tensor pi_mod, Tensor g)");
  m.def("fastfood_backward(Tensor dy, Tensor sign, Tensor pi_mod, Tensor g, float scale) -> Tensor");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("fwht", TORCH_BOX(&pk::fwht_cpu));
  m.impl("fastfood", TORCH_BOX(&pk::fastfood_cpu));
  m.impl("fastfood_backward", TORCH_BOX(&pk::fastfood_backward_cpu));
  m.impl("fastfood_state", TORCH_BOX(&pk::fastfood_state_cpu));
}
#endif
