// Glue of the CUDA kernels of the bottleneck: checks, launches.
#ifdef PK_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include <climits>
#include <optional>
#include <tuple>

#include "bottleneck/bottleneck.cuh"
#include "lora/lora_checks.h"

namespace pk {
namespace {

using Optional = std::optional<Tensor>;

BottleneckVector vector_of(const Optional& v, int64_t size, const Tensor& x, const char* name) {
  if (!v) return {};
  PK_CHECK(v->dim() == 1 && v->numel() == size, name, " must be [", size, "]");
  check_contiguous(*v, name);
  check_same_device(*v, x, "x and the vectors");
  return {v->data_ptr(), dtype_of(*v, name)};
}

BottleneckShape shape_of(const Tensor& x, const Optional& ln_w, const Optional& ln_b, const Tensor& wd,
                         const Optional& bd, const Tensor& wu, const Optional& bu, const Optional& gate, int64_t act,
                         double scale, bool ln, double eps, double p, const Optional& rng) {
  PK_CHECK(x.dim() == 2 && wd.dim() == 2 && wu.dim() == 2 && wd.size(1) == x.size(1) && wu.size(1) == wd.size(0),
           "x must be [rows, in], wd [mid, in] and wu [out, mid]");
  PK_CHECK(x.numel() > 0 && wd.numel() > 0 && wu.numel() > 0, "x, wd and wu must have elements");
  PK_CHECK(
      x.size(0) <= bottleneck_most_rows && wd.numel() <= bottleneck_most_weight && wu.numel() <= bottleneck_most_weight,
      "x may have at most ", bottleneck_most_rows, " rows, wd and wu ", bottleneck_most_weight, " elements");
  PK_CHECK(wd.scalar_type() == wu.scalar_type() &&
               (wd.scalar_type() == x.scalar_type() || wd.scalar_type() == ScalarType::Float),
           "wd and wu must have the dtype of x, or float32");
  check_contiguous(x, "x");
  check_same_device(wd, x, "x and the weights");
  check_same_device(wu, x, "x and the weights");
  BottleneckShape s = {};
  s.type = dtype_of(x, "x");
  s.rows = static_cast<int>(x.size(0)), s.in = static_cast<int>(x.size(1));
  s.mid = static_cast<int>(wd.size(0)), s.out = static_cast<int>(wu.size(0));
  s.x = x.data_ptr();
  s.ln = ln, s.eps = static_cast<float>(eps);
  s.ln_w = vector_of(ln_w, s.in, x, "ln_w"), s.ln_b = vector_of(ln_b, s.in, x, "ln_b");
  s.bd = vector_of(bd, s.mid, x, "bd"), s.bu = vector_of(bu, s.out, x, "bu");
  s.wd = {wd.data_ptr(), dtype_of(wd, "wd"), wd.stride(0), wd.stride(1)};
  s.wu = {wu.data_ptr(), dtype_of(wu, "wu"), wu.stride(0), wu.stride(1)};
  if (gate) {
    PK_CHECK(gate->scalar_type() == ScalarType::Float, "gate must be float32");
    s.gate = static_cast<const float*>(vector_of(gate, s.rows, x, "gate").data);
  }
  s.act = static_cast<int>(act), s.scale = static_cast<float>(scale), s.keep_scale = 1;
  if (p > 0) {
    check_rng(p, rng);
    check_same_device(*rng, x, "rng and x");
    s.rng = static_cast<const int64_t*>(rng->data_ptr());
    s.threshold = static_cast<uint32_t>(std::nearbyint(p * 65536));
    s.keep_scale = LoraDropout{0, 0, s.threshold}.scale();
  }
  return s;
}

void check_rows(const Tensor& t, const Tensor& x, int64_t columns, const char* name) {
  PK_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == columns && t.scalar_type() == x.scalar_type(), name,
           " must be [rows, ", columns, "], of the dtype of x");
  check_contiguous(t, name);
  check_same_device(t, x, "x and the rows of another tensor");
}

// (z, stats); y, which may be residual, is written
std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& residual, const Tensor& x, Optional ln_w,
                                   Optional ln_b, const Tensor& wd, Optional bd, const Tensor& wu, Optional bu,
                                   Optional gate, int64_t act, double scale, bool ln, double eps, double p,
                                   Optional rng) {
  BottleneckForward f = {};
  f.s = shape_of(x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, ln, eps, p, rng);
  check_rows(y, x, f.s.out, "y");
  check_rows(residual, x, f.s.out, "residual");
  const DeviceGuard guard(x.get_device_index());
  Tensor z = new_empty(x, {f.s.rows, f.s.mid}, wd.scalar_type());
  Tensor stats = ln ? new_empty(x, {2, f.s.rows}, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
  f.residual = residual.data_ptr(), f.y = y.data_ptr(), f.z = z.data_ptr(), f.z_type = f.s.wd.type;
  if (ln) f.stats = static_cast<float*>(stats.data_ptr());
  const int64_t kept = bottleneck_kept(f.s);
  const Tensor a = new_empty(x, {kept}, ScalarType::Float);
  if (kept > 0) f.a = static_cast<float*>(a.data_ptr());
  check_cuda(bottleneck_cuda(f, stream_of(x)), "bottleneck");
  return {z, stats};
}

// The gradients of x, ln_w, ln_b, wd, bd, wu, bu and gate whose bit of `needs` is set; the others have no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& g, const Tensor& x, Optional ln_w, Optional ln_b, const Tensor& wd, Optional bd, const Tensor& wu,
    Optional bu, Optional gate, const Tensor& z, Optional stats, int64_t act, double scale, bool ln, double p,
    Optional rng, bool own_residual, int64_t needs) {
  BottleneckBackward b = {};
  b.s = shape_of(x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, ln, 0, p, rng);
  check_rows(g, x, b.s.out, "g");
  PK_CHECK(!own_residual || b.s.in == b.s.out, "without a residual wu must have as many rows as wd has columns");
  PK_CHECK(z.dim() == 2 && z.size(0) == b.s.rows && z.size(1) == b.s.mid, "z must be [rows, mid]");
  check_contiguous(z, "z");
  check_same_device(z, x, "z and x");
  if (ln) {
    PK_CHECK(stats.has_value() && stats->dim() == 2 && stats->size(0) == 2 && stats->size(1) == b.s.rows &&
                 stats->scalar_type() == ScalarType::Float,
             "stats must be the [2, rows] float32 that the forward returned");
    check_contiguous(*stats, "stats");
    check_same_device(*stats, x, "stats and x");
    b.stats = static_cast<const float*>(stats->data_ptr());
  }
  b.g = g.data_ptr(), b.z = z.data_ptr(), b.z_type = dtype_of(z, "z"), b.own_residual = own_residual;
  const DeviceGuard guard(x.get_device_index());
  const auto result = [&](int i, const Tensor* like, auto*& at) {
    const bool need = needs >> i & 1;
    PK_CHECK(!need || like != nullptr, "a gradient was asked for of what is None");
    Tensor d = need ? new_empty(x, like->sizes(), like->scalar_type()) : new_empty(x, {0}, x.scalar_type());
    if (need) at = static_cast<std::remove_reference_t<decltype(at)>>(d.data_ptr());
    return d;
  };
  const auto given = [](const Optional& t) { return t ? &*t : nullptr; };
  Tensor dx = result(0, &x, b.dx), dln_w = result(1, given(ln_w), b.dln_w), dln_b = result(2, given(ln_b), b.dln_b);
  Tensor dwd = result(3, &wd, b.dwd), dbd = result(4, given(bd), b.dbd), dwu = result(5, &wu, b.dwu);
  Tensor dbu = result(6, given(bu), b.dbu), dgate = result(7, given(gate), b.dgate);
  const Tensor workspace = new_empty(x, {bottleneck_backward_kept(b.s)}, ScalarType::Float);
  b.workspace = static_cast<float*>(workspace.data_ptr());
  check_cuda(bottleneck_backward_cuda(b, stream_of(x)), "bottleneck_backward");
  return {dx, dln_w, dln_b, dwd, dbd, dwu, dbu, dgate};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def(
      "bottleneck_cuda_(Tensor(a!) y, Tensor residual, Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor wd, Tensor? bd, "
      "Tensor wu, Tensor? bu, Tensor? gate, int act, float scale, bool ln, float eps, float p, Tensor? rng) -> (Tensor "
      "z, Tensor stats)");
  m.def(
      "bottleneck_backward_cuda(Tensor g, Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor wd, Tensor? bd, Tensor wu, "
      "Tensor? bu, Tensor? gate, Tensor z, Tensor? stats, int act, float scale, bool ln, float p, Tensor? rng, bool "
      "own_residual, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("bottleneck_cuda_", TORCH_BOX(&pk::forward));
  m.impl("bottleneck_backward_cuda", TORCH_BOX(&pk::backward));
}
#endif
