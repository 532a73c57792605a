// Glue of the CUDA kernels of kron: checks, launches.
#ifdef PK_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include <climits>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "kron/kron.cuh"

namespace pk {
namespace {

using Optional = std::optional<Tensor>;

KronFactorCuda factor_of(const Tensor& f, const Tensor& x, const char* name) {
  PK_CHECK(f.dim() == 2 && f.size(0) > 0 && f.size(1) > 0, name, " must be a matrix");
  PK_CHECK(f.scalar_type() == x.scalar_type() || f.scalar_type() == ScalarType::Float, name,
           " must have the dtype of x, or float32");
  check_same_device(f, x, "x and the factors");
  return {f.data_ptr(), dtype_of(f, name), f.stride(0), f.stride(1)};
}

// What x [m, p r], a [p, q] and b [r, s] say.
KronLinearCuda product_of(const Tensor& x, const Tensor& a, const Tensor& b) {
  KronLinearCuda k = {};
  k.type = dtype_of(x, "x");
  k.a = factor_of(a, x, "a"), k.b = factor_of(b, x, "b");
  PK_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have one dtype");
  PK_CHECK(a.numel() <= INT_MAX && b.numel() <= INT_MAX && a.size(1) * b.size(1) <= INT_MAX,
           "factors may have at most 2^31 elements");
  PK_CHECK(x.dim() == 2 && x.size(1) == a.size(0) * b.size(0), "x must be [m, p r]");
  check_contiguous(x, "x");
  k.m = x.size(0);
  k.p = static_cast<int>(a.size(0)), k.q = static_cast<int>(a.size(1));
  k.r = static_cast<int>(b.size(0)), k.s = static_cast<int>(b.size(1));
  k.x = x.data_ptr();
  return k;
}

void check_result(const Tensor& y, const Tensor& x, int64_t columns, const char* name) {
  PK_CHECK(y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == columns && y.scalar_type() == x.scalar_type(), name,
           " must be [m, ", columns, "], of the dtype of x");
  check_contiguous(y, name);
  check_same_device(y, x, "x and y");
}

// y = acc + scale * x (a kron b) + bias; acc may be y
void kron_linear_device(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, Optional acc, Optional bias,
                        double scale) {
  KronLinearCuda k = product_of(x, a, b);
  const int64_t columns = a.size(1) * b.size(1);
  check_result(y, x, columns, "y");
  k.y = y.data_ptr(), k.scale = static_cast<float>(scale);
  if (acc) {
    check_result(*acc, x, columns, "acc");
    k.acc = acc->data_ptr();
  }
  if (bias) {
    PK_CHECK(bias->dim() == 1 && bias->numel() == columns && bias->scalar_type() == ScalarType::Float,
             "bias must be [q s], float32");
    check_contiguous(*bias, "bias");
    check_same_device(*bias, x, "bias and x");
    k.bias = static_cast<const float*>(bias->data_ptr());
  }
  const DeviceGuard guard(x.get_device_index());
  check_cuda(kron_linear_cuda(k, stream_of(x)), "kron_linear");
}

// (da, db); what is not needed has 0 elements
std::tuple<Tensor, Tensor> kron_factors_device(const Tensor& g, const Tensor& x, const Tensor& a, const Tensor& b,
                                               double scale, bool need_da, bool need_db) {
  const KronLinearCuda all = product_of(x, a, b);
  check_result(g, x, a.size(1) * b.size(1), "g");
  KronFactorsCuda k = {};
  k.type = all.type, k.m = all.m, k.p = all.p, k.q = all.q, k.r = all.r, k.s = all.s;
  k.x = all.x, k.g = g.data_ptr(), k.a = all.a, k.b = all.b, k.scale = static_cast<float>(scale);
  const auto result = [&](const Tensor& like, bool need) {
    return need ? new_empty(like, like.sizes(), like.scalar_type()) : new_empty(like, {0}, like.scalar_type());
  };
  Tensor da = result(a, need_da), db = result(b, need_db);
  if (need_da) k.da = da.data_ptr();
  if (need_db) k.db = db.data_ptr();
  const DeviceGuard guard(x.get_device_index());
  const Tensor parts = new_empty(x, {kron_parts(k), a.numel() + b.numel()}, ScalarType::Float);
  check_cuda(kron_factors_cuda(k, static_cast<float*>(parts.data_ptr()), stream_of(x)), "kron_factors");
  return {da, db};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("kron_linear_cuda_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? acc, Tensor? bias, float scale) -> ()");
  m.def(
      "kron_factors_cuda(Tensor g, Tensor x, Tensor a, Tensor b, float scale, bool need_da, bool need_db) -> (Tensor "
      "da, "
      "Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("kron_linear_cuda_", TORCH_BOX(&pk::kron_linear_device));
  m.impl("kron_factors_cuda", TORCH_BOX(&pk::kron_factors_device));
}
#endif
