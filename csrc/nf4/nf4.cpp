// Glue of NF4: checks, allocates, dispatches. The format is in README.md.
#include "nf4/nf4.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "lora/lora_checks.h"

namespace pk {
namespace {

using Optional = std::optional<Tensor>;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t log2_of(int64_t blocksize) {
  int64_t shift = 0;
  while ((int64_t{1} << shift) < blocksize) ++shift;
  PK_CHECK((int64_t{1} << shift) == blocksize && blocksize >= 32 && blocksize <= 4096,
           "blocksize must be a power of two from 32 to 4096");
  return shift;
}

void check_holds(const Tensor& t, const char* name, ScalarType type, int64_t n) {
  check_contiguous(t, name);
  PK_CHECK(t.is_cpu() && t.scalar_type() == type && t.numel() == n, name, " must be on the CPU and hold ", n,
           type == ScalarType::Float ? " float32" : " uint8");
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.data_ptr()); }

// A blocksize2 that no sum or product of sizes overflows with: of n scales, larger blocks are the same.
int64_t bounded(int64_t block2, int64_t n) {
  PK_CHECK(block2 >= 1, "blocksize2 must be at least 1");
  return std::min(block2, std::max<int64_t>(n, 1));
}

// The second level, of n scales.
Nf4 second(const Tensor& absmax, const Tensor& q, const Tensor& code, const Tensor& offset, int64_t n, int64_t block2) {
  block2 = bounded(block2, n);
  check_holds(q, "absmax_q", ScalarType::Byte, n);
  check_holds(absmax, "absmax", ScalarType::Float, blocks(n, block2));
  check_holds(code, "code2", ScalarType::Float, 256);
  check_holds(offset, "offset", ScalarType::Float, 1);
  return {nullptr, 0, floats(absmax), bytes(q), floats(code), *floats(offset), block2};
}

Nf4 weights(const Tensor& packed, const Tensor& absmax, int64_t numel, int64_t blocksize, const Optional& q,
            const Optional& code, const Optional& offset, int64_t block2) {
  const int64_t shift = log2_of(blocksize), scales = blocks(numel, blocksize), held = packed.numel();
  check_contiguous(packed, "packed");
  PK_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && held >= (numel + 1) / 2,
           "packed must be on the CPU and hold ", (numel + 1) / 2, " uint8");
  Nf4 w = {nullptr, 0, floats(absmax), nullptr, nullptr, 0.0f, 1};
  if (q) {
    PK_CHECK(code.has_value() && offset.has_value(), "absmax_q needs code2 and offset");
    w = second(absmax, *q, *code, *offset, scales, block2);
  } else {
    check_holds(absmax, "absmax", ScalarType::Float, scales);
  }
  w.bytes = bytes(packed);
  w.shift = shift;
  return w;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& w, int64_t blocksize) {
  check_contiguous(w, "w");
  const int64_t shift = log2_of(blocksize), numel = w.numel();
  const Dtype type = dtype_of(w, "w");
  Tensor packed = new_empty(w, {(numel + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = new_empty(w, {blocks(numel, blocksize)}, ScalarType::Float);
  PK_DISPATCH_ISA(nf4_quantize, type, w.data_ptr(), numel, shift, static_cast<uint8_t*>(packed.data_ptr()),
                  static_cast<float*>(absmax.data_ptr()));
  return {packed, absmax};
}

void dequantize(const Tensor& out, const Tensor& packed, const Tensor& absmax, int64_t blocksize, Optional q,
                Optional code, Optional offset, int64_t block2) {
  check_contiguous(out, "out");
  const Nf4 w = weights(packed, absmax, out.numel(), blocksize, q, code, offset, block2);
  PK_DISPATCH_ISA(nf4_dequantize, w, out.numel(), dtype_of(out, "out"), out.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& code, int64_t block2) {
  const int64_t n = absmax.numel();
  block2 = bounded(block2, n);
  check_holds(absmax, "absmax", ScalarType::Float, n);
  check_holds(code, "code", ScalarType::Float, 256);
  Tensor q = new_empty(absmax, {n}, ScalarType::Byte);
  Tensor absmax2 = new_empty(absmax, {blocks(n, block2)}, ScalarType::Float);
  Tensor offset = new_empty(absmax, {}, ScalarType::Float);
  *static_cast<float*>(offset.data_ptr()) =
      PK_DISPATCH_ISA(nf4_quantize_absmax, floats(absmax), n, floats(code), block2, static_cast<uint8_t*>(q.data_ptr()),
                      static_cast<float*>(absmax2.data_ptr()));
  return {q, absmax2, offset};
}

Tensor dequantize_absmax(const Tensor& q, const Tensor& absmax2, const Tensor& code, const Tensor& offset,
                         int64_t block2) {
  const Nf4 w = second(absmax2, q, code, offset, q.numel(), block2);
  Tensor absmax = new_empty(absmax2, {q.numel()}, ScalarType::Float);
  PK_DISPATCH_ISA(nf4_dequantize_absmax, w, q.numel(), static_cast<float*>(absmax.data_ptr()));
  return absmax;
}

// A result [..., width] beside `like`, [..., last]
Tensor product(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  return new_empty(like, sizes, like.scalar_type());
}

void linear_into(const Tensor& y, const Tensor& x, const Nf4& w, const Optional& bias, const Nf4Lora& lora) {
  const int64_t n = y.size(y.dim() - 1);
  if (bias) {
    check_contiguous(*bias, "bias");
    PK_CHECK(bias->is_cpu() && bias->numel() == n, "bias must be on the CPU and hold ", n, " numbers");
  }
  const Dtype type = dtype_of(x, "x"), bias_type = bias ? dtype_of(*bias, "bias") : type;
  const Nf4Linear s = {n ? y.numel() / n : 0, n, x.size(x.dim() - 1)};
  PK_DISPATCH_ISA(nf4_linear, s, type, x.data_ptr(), w, bias_type, bias ? bias->data_ptr() : nullptr, lora,
                  y.data_ptr());
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t blocksize, Optional bias,
              Optional q, Optional code, Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && n >= 0, "x must be [..., in]");
  check_contiguous(x, "x");
  const Nf4 w = weights(packed, absmax, n * x.size(x.dim() - 1), blocksize, q, code, offset, block2);
  Tensor y = product(x, n);
  linear_into(y, x, w, bias, {});
  return y;
}

Tensor dgrad(const Tensor& g, const Tensor& packed, const Tensor& absmax, int64_t k, int64_t blocksize, Optional q,
             Optional code, Optional offset, int64_t block2) {
  PK_CHECK(g.dim() >= 1 && k >= 0, "g must be [..., out]");
  check_contiguous(g, "g");
  const int64_t n = g.size(g.dim() - 1);
  const Nf4 w = weights(packed, absmax, n * k, blocksize, q, code, offset, block2);
  Tensor dx = product(g, k);
  const Nf4Linear s = {k ? dx.numel() / k : 0, n, k};
  PK_DISPATCH_ISA(nf4_dgrad, s, dtype_of(g, "g"), g.data_ptr(), w, {}, dx.data_ptr());
  return dx;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                       const Tensor& a, const Tensor& b, double scale, Optional bias, double p,
                                       Optional rng, Optional q, Optional code, Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && b.dim() == 2, "x must be [..., in], b [out, r]");
  Tensor y = product(x, b.size(0));
  const LoraShape s = check(y, x, a, b, "y");
  const Nf4 w = weights(packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
  const LoraDropout drop = dropout_of(p, rng);
  Tensor t = new_empty(x, {s.m, s.r}, ScalarType::Float);
  auto* ts = static_cast<float*>(t.data_ptr());
  PK_DISPATCH_ISA(lora_add, s, {}, in(x, "x"), in(a, "a"), drop, ts);
  linear_into(y, x, w, bias, {ts, s.r, in(b, "b"), static_cast<float>(scale), {}});
  return {y, t};
}

std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& g, const Tensor& x, const Tensor& packed,
                                                 const Tensor& absmax, int64_t blocksize, const Tensor& a,
                                                 const Tensor& b, const Tensor& t, double scale, double p, Optional rng,
                                                 Optional q, Optional code, Optional offset, int64_t block2,
                                                 bool need_dx, bool need_da, bool need_db) {
  const LoraShape s = check(g, x, a, b, "g");
  check_t(t, s);
  const Nf4 w = weights(packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
  const LoraDropout drop = dropout_of(p, rng);
  const auto unwanted = [](const Tensor& like) { return new_empty(like, {0}, like.scalar_type()); };
  Tensor dx = need_dx ? product(x, s.k) : unwanted(x);
  Tensor da = need_da ? new_empty(a, {s.r, s.k}, a.scalar_type()) : unwanted(a);
  Tensor db = need_db ? new_empty(b, {s.n, s.r}, b.scalar_type()) : unwanted(b);
  Tensor dt = new_empty(t, {need_dx ? s.m : 0, s.r}, ScalarType::Float);
  auto* dts = need_dx ? static_cast<float*>(dt.data_ptr()) : nullptr;
  const std::vector<LoraSlice> slices = {
      {s.n, s.r, in(b, "b"), static_cast<float>(scale), in(g, "g"), need_db ? out(db, "db") : LoraOut{}}};
  PK_DISPATCH_ISA(lora_backward, s, slices, {}, in(x, "x"), in(a, "a"), static_cast<const float*>(t.data_ptr()), drop,
                  need_da ? out(da, "da") : LoraOut{}, dts);
  if (need_dx)
    PK_DISPATCH_ISA(nf4_dgrad, Nf4Linear{s.m, s.n, s.k}, dtype_of(g, "g"), g.data_ptr(), w,
                    Nf4Lora{dts, s.r, in(a, "a"), 1, drop}, dx.data_ptr());
  return {dx, da, db};
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(_peft_kernels, m) {
  m.def("quantize_nf4(Tensor w, int blocksize) -> (Tensor, Tensor)");
  m.def(
      "dequantize_nf4_(Tensor(a!) out, Tensor packed, Tensor absmax, int blocksize, Tensor? absmax_q, Tensor? code2, "
      "Tensor? offset, int blocksize2) -> ()");
  m.def("quantize_absmax(Tensor absmax, Tensor code, int blocksize2) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize_absmax(Tensor q, Tensor absmax2, Tensor code, Tensor offset, int blocksize2) -> Tensor");
  m.def(
      "nf4_linear(Tensor x, Tensor packed, Tensor absmax, int out_features, int blocksize, Tensor? bias, "
      "Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2) -> Tensor");
  m.def(
      "nf4_linear_dgrad(Tensor g, Tensor packed, Tensor absmax, int in_features, int blocksize, Tensor? absmax_q, "
      "Tensor? code2, Tensor? offset, int blocksize2) -> Tensor");
  m.def(
      "nf4_lora_linear(Tensor x, Tensor packed, Tensor absmax, int blocksize, Tensor a, Tensor b, float scale, "
      "Tensor? bias, float p, Tensor? rng, Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2) -> "
      "(Tensor y, Tensor t)");
  m.def(
      "nf4_lora_linear_backward(Tensor g, Tensor x, Tensor packed, Tensor absmax, int blocksize, Tensor a, Tensor b, "
      "Tensor t, float scale, float p, Tensor? rng, Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2, "
      "bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(_peft_kernels, CPU, m) {
  m.impl("quantize_nf4", TORCH_BOX(&pk::quantize));
  m.impl("dequantize_nf4_", TORCH_BOX(&pk::dequantize));
  m.impl("quantize_absmax", TORCH_BOX(&pk::quantize_absmax));
  m.impl("dequantize_absmax", TORCH_BOX(&pk::dequantize_absmax));
  m.impl("nf4_linear", TORCH_BOX(&pk::linear));
  m.impl("nf4_linear_dgrad", TORCH_BOX(&pk::dgrad));
  m.impl("nf4_lora_linear", TORCH_BOX(&pk::lora_linear));
  m.impl("nf4_lora_linear_backward", TORCH_BOX(&pk::lora_backward));
}
