// Glue of the CUDA kernels of the Hadamard ops: checks, allocates, launches. The schemas are in hadamard.cpp.
#ifdef PK_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/checks.h"
#include "hadamard/hadamard.cuh"

namespace pk {
namespace {

constexpr int64_t largest = int64_t{1} << most_levels, most_tiles = 0x7fffffff;

float* room_of(const Tensor& room) { return static_cast<float*>(room.data_ptr()); }

// scale * H x along the last dimension
Tensor fwht_device(const Tensor& x, double scale) {
  check_contiguous(x, "x");
  PK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1 && x.size(x.dim() - 1) <= largest,
           "x must be [..., n], n from 1 to 2^26");
  const int64_t n = x.size(x.dim() - 1);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = new_empty(x, x.sizes(), x.scalar_type());
  const FwhtCuda f = {dtype_of(x, "x"), x.data_ptr(), y.data_ptr(), x.numel() / n, n, static_cast<float>(scale)};
  PK_CHECK(f.rows * 2 * n / 4096 <= most_tiles, "x must have fewer than 2^42 numbers");
  const Tensor room = new_empty(x, {fwht_room(f)}, ScalarType::Float);
  check_cuda(fwht_cuda(f, room_of(room), stream_of(x)), "fwht");
  return y;
}

FastfoodCuda state_of(const Tensor& sign, const Tensor& pi_mod, const Tensor& g, int64_t numel) {
  for (const Tensor* t : {&sign, &pi_mod, &g}) {
    PK_CHECK(t->dim() == 1, "sign, pi_mod and g must have one dimension");
    check_contiguous(*t, "sign, pi_mod and g");
    check_same_device(*t, sign, "sign, pi_mod and g");
  }
  PK_CHECK(sign.scalar_type() == ScalarType::Char, "sign must be int8");
  const bool wide = pi_mod.scalar_type() == ScalarType::Int, fixed = g.scalar_type() == ScalarType::Short;
  PK_CHECK(wide || pi_mod.scalar_type() == ScalarType::Short, "pi_mod must be int16 or int32");
  PK_CHECK(fixed || g.scalar_type() == ScalarType::Float, "g must be int16 or float32");
  check_same_shape(pi_mod, g, "pi_mod and g");
  const int64_t d = sign.numel(), n = g.numel();
  PK_CHECK(d >= 1 && d <= fastfood_most, "d must be from 1 to ", fastfood_most);
  PK_CHECK(d <= n && (n & (n - 1)) == 0 && n <= largest, "n must be a power of two from d to 2^26");
  PK_CHECK(numel >= 1 && numel <= n, "there must be from 1 to n = ", n, " numbers");
  return {d, numel, n, static_cast<const int8_t*>(sign.data_ptr()), wide, pi_mod.data_ptr(), fixed, g.data_ptr()};
}

// base + scale * P theta
Tensor fastfood_device(const Tensor& theta, const Tensor& sign, const Tensor& pi_mod, const Tensor& g,
                       std::optional<Tensor> base, int64_t numel, double scale) {
  const FastfoodCuda f = state_of(sign, pi_mod, g, numel);
  check_contiguous(theta, "theta");
  check_same_shape(theta, sign, "theta and sign");
  check_same_device(theta, sign, "theta and sign");
  if (base) {
    PK_CHECK(base->numel() == numel, "base must have numel elements");
    check_contiguous(*base, "base");
    check_same_device(*base, theta, "base and theta");
  }
  const DeviceGuard guard(theta.get_device_index());
  Tensor out =
      base ? new_empty(theta, base->sizes(), base->scalar_type()) : new_empty(theta, {numel}, theta.scalar_type());
  const Dtype type = dtype_of(out, "base");
  const Tensor room = new_empty(theta, {fastfood_room(f, type)}, ScalarType::Float);
  check_cuda(fastfood_cuda(f, dtype_of(theta, "theta"), theta.data_ptr(), static_cast<float>(scale), type,
                           base ? base->data_ptr() : nullptr, out.data_ptr(), room_of(room), stream_of(theta)),
             "fastfood");
  return out;
}

// float32 dtheta
Tensor fastfood_backward_device(const Tensor& dy, const Tensor& sign, const Tensor& pi_mod, const Tensor& g,
                                double scale) {
  const FastfoodCuda f = state_of(sign, pi_mod, g, dy.numel());
  check_contiguous(dy, "dy");
  check_same_device(dy, sign, "dy and sign");
  const DeviceGuard guard(dy.get_device_index());
  Tensor dtheta = new_empty(dy, {f.d}, ScalarType::Float);
  const Tensor room = new_empty(dy, {fastfood_backward_room(f)}, ScalarType::Float);
  check_cuda(fastfood_backward_cuda(f, dtype_of(dy, "dy"), dy.data_ptr(), static_cast<float>(scale), room_of(dtheta),
                                    room_of(room), stream_of(dy)),
             "fastfood_backward");
  return dtheta;
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("fwht", TORCH_BOX(&pk::fwht_device));
  m.impl("fastfood", TORCH_BOX(&pk::fastfood_device));
  m.impl("fastfood_backward", TORCH_BOX(&pk::fastfood_backward_device));
}
#endif
