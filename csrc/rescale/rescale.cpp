// Glue of rescale: checks, allocates, dispatches. The maths is in README.md.
#include "rescale/rescale.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/checks.h"

#ifdef PK_WITH_CUDA
#include "rescale/rescale.cuh"
#endif

namespace pk {
namespace {

struct Shape {
  int64_t rows, n;
};

Shape check(const Tensor& x, const Tensor& l) {
  PK_CHECK(x.dim() >= 1 && l.dim() == 1 && x.size(x.dim() - 1) == l.size(0), "x must be [..., n] and l [n]");
  PK_CHECK(l.scalar_type() == x.scalar_type() || l.scalar_type() == ScalarType::Float,
           "l must have the dtype of x, or float32");
  check_contiguous(x, "x");
  check_contiguous(l, "l");
  check_same_device(x, l, "x and l");
  const int64_t n = l.size(0);
  return {n == 0 ? 0 : x.numel() / n, n};
}

void forward(const Tensor& x, const Tensor& l, const Tensor& y, Shape s) {
  const Dtype x_type = dtype_of(x, "x"), l_type = dtype_of(l, "l");
#ifdef PK_WITH_CUDA
  if (on_cuda(x)) {
    const DeviceGuard guard(x.get_device_index());
    return check_cuda(
        rescale_fwd_cuda(x_type, x.data_ptr(), l_type, l.data_ptr(), y.data_ptr(), s.rows, s.n, stream_of(x)),
        "rescale");
  }
#endif
  PK_DISPATCH_ISA(rescale_fwd, x_type, x.data_ptr(), l_type, l.data_ptr(), y.data_ptr(), s.rows, s.n);
}

// y = x * l
Tensor rescale(const Tensor& x, const Tensor& l) {
  const Shape s = check(x, l);
  Tensor y = new_empty(x, x.sizes(), x.scalar_type());
  forward(x, l, y, s);
  return y;
}

// x *= l
void rescale_(const Tensor& x, const Tensor& l) { forward(x, l, x, check(x, l)); }

// dx = g * l, dl = sum over rows of g * x; what is not needed has 0 elements
std::tuple<Tensor, Tensor> rescale_backward(const Tensor& g, const Tensor& x, const Tensor& l, bool need_dx,
                                            bool need_dl) {
  const Shape s = check(x, l);
  check_contiguous(g, "g");
  check_same_shape(g, x, "g and x");
  check_same_device(g, x, "g and x");
  PK_CHECK(g.scalar_type() == x.scalar_type(), "g must have the dtype of x");
  const Dtype x_type = dtype_of(x, "x"), l_type = dtype_of(l, "l");
  Tensor dx = need_dx ? new_empty(x, x.sizes(), x.scalar_type()) : new_empty(x, {0}, x.scalar_type());
  Tensor dl = new_empty(l, {need_dl ? s.n : 0}, l.scalar_type());
  if (!need_dl) {
    if (need_dx) forward(g, l, dx, s);
    return {dx, dl};
  }
  void* dx_out = need_dx ? dx.data_ptr() : nullptr;
#ifdef PK_WITH_CUDA
  if (on_cuda(x)) {
    const DeviceGuard guard(x.get_device_index());
    const Tensor partial = new_empty(x, {rescale_chunks(s.rows), s.n}, ScalarType::Float);
    check_cuda(rescale_bwd_cuda(x_type, g.data_ptr(), x.data_ptr(), l_type, l.data_ptr(), dx_out, dl.data_ptr(),
                                static_cast<float*>(partial.data_ptr()), s.rows, s.n, stream_of(x)),
               "rescale_backward");
    return {dx, dl};
  }
#endif
  PK_DISPATCH_ISA(rescale_bwd, x_type, g.data_ptr(), x.data_ptr(), l_type, l.data_ptr(), dx_out, dl.data_ptr(), s.rows,
                  s.n);
  return {dx, dl};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("rescale(Tensor x, Tensor l) -> Tensor");
  m.def("rescale_(Tensor(a!) x, Tensor l) -> ()");
  m.def("rescale_backward(Tensor g, Tensor x, Tensor l, bool need_dx, bool need_dl) -> (Tensor dx, Tensor dl)");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("rescale", TORCH_BOX(&pk::rescale));
  m.impl("rescale_", TORCH_BOX(&pk::rescale_));
  m.impl("rescale_backward", TORCH_BOX(&pk::rescale_backward));
}
#endif

#ifdef PK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("rescale", TORCH_BOX(&pk::rescale));
  m.impl("rescale_", TORCH_BOX(&pk::rescale_));
  m.impl("rescale_backward", TORCH_BOX(&pk::rescale_backward));
}
#endif
