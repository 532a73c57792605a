// Glue of LoRA: checks, allocates, dispatches. The maths is in README.md.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "lora/lora_cpu.h"

namespace pk {
namespace {

// y or g [..., n]
LoraShape check(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, const char* y_name) {
  const int64_t dims = x.dim();
  PK_CHECK(a.dim() == 2 && b.dim() == 2 && dims >= 1 && y.dim() == dims, "a must be [r, k], b [n, r], x [..., k], ",
           y_name, " [..., n]");
  const LoraShape s = {x.size(dims - 1) == 0 ? 0 : x.numel() / x.size(dims - 1), a.size(1), b.size(0), a.size(0)};
  PK_CHECK(x.size(dims - 1) == s.k && y.size(dims - 1) == s.n && b.size(1) == s.r && y.numel() == s.m * s.n,
           "a must be [r, k], b [n, r], x [..., k], ", y_name, " [..., n]");
  PK_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have the same dtype");
  check_contiguous(y, y_name);
  check_contiguous(x, "x");
  check_contiguous(a, "a");
  check_contiguous(b, "b");
  check_same_device(y, x, "y, g and x");
  check_same_device(a, x, "a and x");
  check_same_device(b, x, "b and x");
  return s;
}

LoraDropout dropout_of(double p, const std::optional<Tensor>& rng) {
  if (p == 0) return {};
  PK_CHECK(p > 0 && p <= 1, "p must be between 0 and 1");
  PK_CHECK(rng.has_value() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(),
           "dropout needs rng, an int64 tensor (seed, offset)");
  PK_CHECK(rng->is_cpu(), "rng must be on the CPU");
  const auto* words = static_cast<const uint64_t*>(rng->data_ptr());
  return {words[0], words[1], static_cast<uint32_t>(std::nearbyint(p * 65536))};
}

LoraIn in(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }
LoraOut out(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }

Tensor lora_add_cpu(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double p,
                    std::optional<Tensor> rng) {
  const LoraShape s = check(y, x, a, b, "y");
  const LoraDropout drop = dropout_of(p, rng);
  Tensor t = new_empty(x, {s.m, s.r}, ScalarType::Float);
  PK_DISPATCH_ISA(lora_add, s, out(y, "y"), in(x, "x"), in(a, "a"), in(b, "b"), static_cast<float>(scale), drop,
                  static_cast<float*>(t.data_ptr()));
  return t;
}

std::tuple<Tensor, Tensor> lora_backward_cpu(std::optional<Tensor> dx, const Tensor& g, const Tensor& x,
                                             const Tensor& a, const Tensor& b, const Tensor& t, double scale, double p,
                                             std::optional<Tensor> rng, bool need_da, bool need_db) {
  const LoraShape s = check(g, x, a, b, "g");
  const LoraDropout drop = dropout_of(p, rng);
  PK_CHECK(t.dim() == 2 && t.size(0) == s.m && t.size(1) == s.r && t.scalar_type() == ScalarType::Float,
           "t must be the [m, r] float32 that lora_add_ returned");
  check_contiguous(t, "t");
  if (dx) {
    check_same_shape(*dx, x, "dx and x");
    check_contiguous(*dx, "dx");
  }
  Tensor da = new_empty(a, {need_da ? s.r : 0, s.k}, a.scalar_type());
  Tensor db = new_empty(b, {need_db ? s.n : 0, s.r}, b.scalar_type());
  PK_DISPATCH_ISA(lora_backward, s, dx ? out(*dx, "dx") : LoraOut{}, in(g, "g"), in(x, "x"), in(a, "a"), in(b, "b"),
                  static_cast<const float*>(t.data_ptr()), static_cast<float>(scale), drop,
                  need_da ? out(da, "da") : LoraOut{}, need_db ? out(db, "db") : LoraOut{});
  return {da, db};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(_peft_kernels, m) {
  m.def("lora_add_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale, float p, Tensor? rng) -> Tensor");
  m.def(
      "lora_backward_(Tensor(a!)? dx, Tensor g, Tensor x, Tensor a, Tensor b, Tensor t, float scale, float p, "
      "Tensor? rng, bool need_da, bool need_db) -> (Tensor da, Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(_peft_kernels, CPU, m) {
  m.impl("lora_add_", TORCH_BOX(&pk::lora_add_cpu));
  m.impl("lora_backward_", TORCH_BOX(&pk::lora_backward_cpu));
}
