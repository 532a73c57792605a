// Glue of NF4: checks, allocates, dispatches. The format is in README.md.
#include "nf4/nf4.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "lora/lora_launch.h"

#ifdef PK_WITH_CUDA
#include "nf4/nf4.cuh"
#endif

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

void check_holds(const Tensor& t, const char* name, ScalarType type, int64_t n, const Tensor& like) {
  check_contiguous(t, name);
  check_same_device(t, like, name);
  PK_CHECK(t.scalar_type() == type && t.numel() == n, name, " must hold ", n,
           type == ScalarType::Float ? " float32" : " uint8");
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
uint8_t* bytes(const Tensor& t) { return static_cast<uint8_t*>(t.data_ptr()); }

// Packed weights, the offset of which is read where it is.
struct Weights {
  const uint8_t* bytes;
  int64_t shift;
  const float* absmax;
  const uint8_t* q;
  const float *code, *offset;
  int64_t block2;

  Nf4 cpu() const { return {bytes, shift, absmax, q, code, offset == nullptr ? 0.0f : *offset, block2}; }
#ifdef PK_WITH_CUDA
  Nf4Cuda cuda() const { return {bytes, shift, absmax, q, code, offset, block2}; }
#endif
};

// A blocksize2 that no sum or product of sizes overflows with: of n scales, larger blocks are the same.
int64_t bounded(int64_t block2, int64_t n) {
  PK_CHECK(block2 >= 1, "blocksize2 must be at least 1");
  return std::min(block2, std::max<int64_t>(n, 1));
}

// The second level, of n scales.
Weights second(const Tensor& absmax, const Tensor& q, const Tensor& code, const Tensor& offset, int64_t n,
               int64_t block2) {
  block2 = bounded(block2, n);
  check_holds(q, "absmax_q", ScalarType::Byte, n, absmax);
  check_holds(absmax, "absmax", ScalarType::Float, blocks(n, block2), q);
  check_holds(code, "code2", ScalarType::Float, 256, absmax);
  check_holds(offset, "offset", ScalarType::Float, 1, absmax);
  return {nullptr, 0, floats(absmax), bytes(q), floats(code), floats(offset), block2};
}

// Those that `like`, on the same device, is computed with.
Weights weights(const Tensor& like, const Tensor& packed, const Tensor& absmax, int64_t numel, int64_t blocksize,
                const Optional& q, const Optional& code, const Optional& offset, int64_t block2) {
  const int64_t shift = log2_of(blocksize), scales = blocks(numel, blocksize), held = packed.numel();
  check_contiguous(packed, "packed");
  check_same_device(packed, like, "packed");
  check_same_device(absmax, like, "absmax");
  PK_CHECK(packed.scalar_type() == ScalarType::Byte && held >= (numel + 1) / 2, "packed must hold ", (numel + 1) / 2,
           " uint8");
  Weights w = {nullptr, 0, floats(absmax), nullptr, nullptr, nullptr, 1};
  if (q) {
    PK_CHECK(code.has_value() && offset.has_value(), "absmax_q needs code2 and offset");
    w = second(absmax, *q, *code, *offset, scales, block2);
  } else {
    check_holds(absmax, "absmax", ScalarType::Float, scales, like);
  }
  w.bytes = bytes(packed);
  w.shift = shift;
  return w;
}

// (packed, absmax) for numel weights
std::tuple<Tensor, Tensor> new_weights(const Tensor& w, int64_t blocksize) {
  const int64_t numel = w.numel();
  return {new_empty(w, {(numel + 1) / 2, 1}, ScalarType::Byte),
          new_empty(w, {blocks(numel, blocksize)}, ScalarType::Float)};
}

// (q, absmax2, offset) for the scales
std::tuple<Tensor, Tensor, Tensor> new_second(const Tensor& absmax, const Tensor& code, int64_t block2) {
  const int64_t n = absmax.numel();
  check_holds(absmax, "absmax", ScalarType::Float, n, code);
  check_holds(code, "code", ScalarType::Float, 256, absmax);
  return {new_empty(absmax, {n}, ScalarType::Byte), new_empty(absmax, {blocks(n, block2)}, ScalarType::Float),
          new_empty(absmax, {}, ScalarType::Float)};
}

// A result [..., width] beside `like`, [..., last]
Tensor product(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  return new_empty(like, sizes, like.scalar_type());
}

void check_bias(const Optional& bias, const Tensor& x, int64_t n) {
  if (!bias) return;
  check_contiguous(*bias, "bias");
  check_same_device(*bias, x, "bias and x");
  PK_CHECK(bias->numel() == n, "bias must hold ", n, " numbers");
}

// -- CPU ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize(const Tensor& w, int64_t blocksize) {
  check_contiguous(w, "w");
  const int64_t shift = log2_of(blocksize);
  const auto [packed, absmax] = new_weights(w, blocksize);
  PK_DISPATCH_ISA(nf4_quantize, dtype_of(w, "w"), w.data_ptr(), w.numel(), shift, bytes(packed), floats(absmax));
  return {packed, absmax};
}

void dequantize(const Tensor& out, const Tensor& packed, const Tensor& absmax, int64_t blocksize, Optional q,
                Optional code, Optional offset, int64_t block2) {
  check_contiguous(out, "out");
  const Weights w = weights(out, packed, absmax, out.numel(), blocksize, q, code, offset, block2);
  PK_DISPATCH_ISA(nf4_dequantize, w.cpu(), out.numel(), dtype_of(out, "out"), out.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& code, int64_t block2) {
  block2 = bounded(block2, absmax.numel());
  const auto [q, absmax2, offset] = new_second(absmax, code, block2);
  *floats(offset) = PK_DISPATCH_ISA(nf4_quantize_absmax, floats(absmax), absmax.numel(), floats(code), block2, bytes(q),
                                    floats(absmax2));
  return {q, absmax2, offset};
}

Tensor dequantize_absmax(const Tensor& q, const Tensor& absmax2, const Tensor& code, const Tensor& offset,
                         int64_t block2) {
  const Weights w = second(absmax2, q, code, offset, q.numel(), block2);
  Tensor absmax = new_empty(absmax2, {q.numel()}, ScalarType::Float);
  PK_DISPATCH_ISA(nf4_dequantize_absmax, w.cpu(), q.numel(), floats(absmax));
  return absmax;
}

void linear_into(const Tensor& y, const Tensor& x, const Weights& w, const Optional& bias, const Nf4Lora& lora) {
  const int64_t n = y.size(y.dim() - 1);
  check_bias(bias, x, n);
  const Dtype type = dtype_of(x, "x"), bias_type = bias ? dtype_of(*bias, "bias") : type;
  const Nf4Linear s = {n ? y.numel() / n : 0, n, x.size(x.dim() - 1)};
  PK_DISPATCH_ISA(nf4_linear, s, type, x.data_ptr(), w.cpu(), bias_type, bias ? bias->data_ptr() : nullptr, lora,
                  y.data_ptr());
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t blocksize, Optional bias,
              Optional q, Optional code, Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && n >= 0, "x must be [..., in]");
  check_contiguous(x, "x");
  const Weights w = weights(x, packed, absmax, n * x.size(x.dim() - 1), blocksize, q, code, offset, block2);
  Tensor y = product(x, n);
  linear_into(y, x, w, bias, {});
  return y;
}

Tensor dgrad(const Tensor& g, const Tensor& packed, const Tensor& absmax, int64_t k, int64_t blocksize, Optional q,
             Optional code, Optional offset, int64_t block2) {
  PK_CHECK(g.dim() >= 1 && k >= 0, "g must be [..., out]");
  check_contiguous(g, "g");
  const int64_t n = g.size(g.dim() - 1);
  const Weights w = weights(g, packed, absmax, n * k, blocksize, q, code, offset, block2);
  Tensor dx = product(g, k);
  const Nf4Linear s = {k ? dx.numel() / k : 0, n, k};
  PK_DISPATCH_ISA(nf4_dgrad, s, dtype_of(g, "g"), g.data_ptr(), w.cpu(), {}, dx.data_ptr());
  return dx;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                       const Tensor& a, const Tensor& b, double scale, Optional bias, double p,
                                       Optional rng, Optional q, Optional code, Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && b.dim() == 2, "x must be [..., in], b [out, r]");
  Tensor y = product(x, b.size(0));
  const LoraShape s = check(y, x, a, b, "y");
  const Weights w = weights(x, packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
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
  const Weights w = weights(x, packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
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
    PK_DISPATCH_ISA(nf4_dgrad, Nf4Linear{s.m, s.n, s.k}, dtype_of(g, "g"), g.data_ptr(), w.cpu(),
                    Nf4Lora{dts, s.r, in(a, "a"), 1, drop}, dx.data_ptr());
  return {dx, da, db};
}

// -- CUDA -----------------------------------------------------------------------------------------------------------

#ifdef PK_WITH_CUDA
std::tuple<Tensor, Tensor> quantize_cuda(const Tensor& w, int64_t blocksize) {
  check_contiguous(w, "w");
  const int64_t shift = log2_of(blocksize);
  const DeviceGuard guard(w.get_device_index());
  const auto [packed, absmax] = new_weights(w, blocksize);
  check_cuda(
      nf4_quantize_cuda(dtype_of(w, "w"), w.data_ptr(), w.numel(), shift, bytes(packed), floats(absmax), stream_of(w)),
      "quantize_nf4");
  return {packed, absmax};
}

void dequantize_cuda(const Tensor& out, const Tensor& packed, const Tensor& absmax, int64_t blocksize, Optional q,
                     Optional code, Optional offset, int64_t block2) {
  check_contiguous(out, "out");
  const int64_t numel = out.numel();
  const Weights w = weights(out, packed, absmax, numel, blocksize, q, code, offset, block2);
  const DeviceGuard guard(out.get_device_index());
  check_cuda(nf4_dequantize_cuda(w.cuda(), {0, numel, 1, numel}, dtype_of(out, "out"), out.data_ptr(), stream_of(out)),
             "dequantize_nf4_");
}

// out [rows, columns] = w[row.., column..] of w [n, k]
void panel_cuda(const Tensor& out, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t k, int64_t row,
                int64_t column, int64_t blocksize, Optional q, Optional code, Optional offset, int64_t block2) {
  check_contiguous(out, "out");
  PK_CHECK(out.dim() == 2 && row >= 0 && column >= 0 && row + out.size(0) <= n && column + out.size(1) <= k,
           "out must be rows and columns of w [", n, ", ", k, "]");
  const Weights w = weights(out, packed, absmax, n * k, blocksize, q, code, offset, block2);
  Nf4Part part = {row * k + column, k, out.size(0), out.size(1)};
  if (part.columns == k) part = {part.first, out.numel(), 1, out.numel()};
  const DeviceGuard guard(out.get_device_index());
  check_cuda(nf4_dequantize_cuda(w.cuda(), part, dtype_of(out, "out"), out.data_ptr(), stream_of(out)), "nf4_panel_");
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax_cuda(const Tensor& absmax, const Tensor& code, int64_t block2) {
  const DeviceGuard guard(absmax.get_device_index());
  block2 = bounded(block2, absmax.numel());
  const auto [q, absmax2, offset] = new_second(absmax, code, block2);
  check_cuda(nf4_quantize_absmax_cuda(floats(absmax), absmax.numel(), floats(code), block2, bytes(q), floats(absmax2),
                                      floats(offset), stream_of(absmax)),
             "quantize_absmax");
  return {q, absmax2, offset};
}

Tensor dequantize_absmax_cuda(const Tensor& q, const Tensor& absmax2, const Tensor& code, const Tensor& offset,
                              int64_t block2) {
  const Weights w = second(absmax2, q, code, offset, q.numel(), block2);
  const DeviceGuard guard(q.get_device_index());
  Tensor absmax = new_empty(absmax2, {q.numel()}, ScalarType::Float);
  check_cuda(nf4_dequantize_absmax_cuda(w.cuda(), q.numel(), floats(absmax), stream_of(q)), "dequantize_absmax");
  return absmax;
}

Nf4Product product_of(const Tensor& u, int64_t n, int64_t k, int64_t last) {
  const Dtype type = dtype_of(u, "x and g");
  const int64_t m = last == 0 ? 0 : u.numel() / last;
  PK_CHECK(std::max(n, k) < int64_t{1} << 30, "weights may have at most 2^30 rows and columns");
  PK_CHECK(m <= nf4_few_rows(type), "expected at most ", nf4_few_rows(type), " rows; nf4_native.py multiplies more");
  return {type, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)};
}

Tensor new_parts(const Tensor& out, int splits) {
  return new_empty(out, {splits == 1 ? 0 : splits * out.numel()}, ScalarType::Float);
}

// y = x w^T + bias, or with an update.
void linear_into_cuda(const Tensor& y, const Tensor& x, const Weights& w, const Optional& bias, const Nf4Update& lora) {
  const int64_t n = y.size(y.dim() - 1), k = x.size(x.dim() - 1);
  check_bias(bias, x, n);
  const Nf4Product p = product_of(y, n, k, n);
  const int splits = nf4_linear_splits(p);
  const Tensor parts = new_parts(y, splits);
  check_cuda(
      nf4_linear_cuda(p, x.data_ptr(), w.cuda(), bias ? dtype_of(*bias, "bias") : p.type,
                      bias ? bias->data_ptr() : nullptr, lora, y.data_ptr(), floats(parts), splits, stream_of(x)),
      "nf4_linear");
}

void dgrad_into_cuda(const Tensor& dx, const Tensor& g, const Weights& w, const Nf4Update& lora) {
  const int64_t n = g.size(g.dim() - 1), k = dx.size(dx.dim() - 1);
  const Nf4Product p = product_of(dx, n, k, k);
  const int splits = nf4_dgrad_splits(p);
  const Tensor parts = new_parts(dx, splits);
  check_cuda(nf4_dgrad_cuda(p, g.data_ptr(), w.cuda(), lora, dx.data_ptr(), floats(parts), splits, stream_of(g)),
             "nf4_linear_dgrad");
}

Tensor linear_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t blocksize,
                   Optional bias, Optional q, Optional code, Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && n >= 0, "x must be [..., in]");
  check_contiguous(x, "x");
  const Weights w = weights(x, packed, absmax, n * x.size(x.dim() - 1), blocksize, q, code, offset, block2);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = product(x, n);
  linear_into_cuda(y, x, w, bias, {});
  return y;
}

Tensor dgrad_cuda(const Tensor& g, const Tensor& packed, const Tensor& absmax, int64_t k, int64_t blocksize, Optional q,
                  Optional code, Optional offset, int64_t block2) {
  PK_CHECK(g.dim() >= 1 && k >= 0, "g must be [..., out]");
  check_contiguous(g, "g");
  const Weights w = weights(g, packed, absmax, g.size(g.dim() - 1) * k, blocksize, q, code, offset, block2);
  const DeviceGuard guard(g.get_device_index());
  Tensor dx = product(g, k);
  dgrad_into_cuda(dx, g, w, {});
  return dx;
}

// scale * v f, v being the sum of parts that LoraCuda::shrink made, which `sum` becomes.
Nf4Update update(const Tensor& parts, const Tensor& f, int64_t rank_stride, int64_t column_stride, double scale,
                 Tensor& sum) {
  const bool split = parts.dim() == 3;
  const int64_t m = parts.size(split ? 1 : 0), ranks = parts.size(split ? 2 : 1);
  sum = split ? new_empty(parts, {m, ranks}, ScalarType::Float) : parts;
  Nf4Update to;
  to.v = floats(parts), to.parts = split ? static_cast<int>(parts.size(0)) : 1;
  to.ranks = static_cast<int>(ranks), to.scale = static_cast<float>(scale);
  to.f = f.data_ptr(), to.type = dtype_of(f, "a and b");
  to.rank_stride = rank_stride, to.column_stride = column_stride;
  to.sum = split ? floats(sum) : nullptr;
  return to;
}

std::tuple<Tensor, Tensor> lora_linear_cuda(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                            int64_t blocksize, const Tensor& a, const Tensor& b, double scale,
                                            Optional bias, double p, Optional rng, Optional q, Optional code,
                                            Optional offset, int64_t block2) {
  PK_CHECK(x.dim() >= 1 && b.dim() == 2, "x must be [..., in], b [out, r]");
  Tensor y = product(x, b.size(0));
  const LoraShape s = check(y, x, a, b, "y");
  const Weights w = weights(x, packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
  const LoraCuda cuda(s, x, p, rng);
  if (s.m == 0 || s.r == 0) {
    linear_into_cuda(y, x, w, bias, {});
    return {y, new_empty(x, {s.m, s.r}, ScalarType::Float)};
  }
  const Tensor parts = cuda.shrink(x, a, s.k, 1, cuda.keep_scale(), cuda.drop());
  if (s.n == 0) return {y, cuda.sum(parts)};
  Tensor t = parts;
  linear_into_cuda(y, x, w, bias, update(parts, b, 1, s.r, scale, t));
  return {y, t};
}

std::tuple<Tensor, Tensor, Tensor> lora_backward_cuda(const Tensor& g, const Tensor& x, const Tensor& packed,
                                                      const Tensor& absmax, int64_t blocksize, const Tensor& a,
                                                      const Tensor& b, const Tensor& t, double scale, double p,
                                                      Optional rng, Optional q, Optional code, Optional offset,
                                                      int64_t block2, bool need_dx, bool need_da, bool need_db) {
  const LoraShape s = check(g, x, a, b, "g");
  check_t(t, s);
  check_same_device(t, x, "t and x");
  const Weights w = weights(x, packed, absmax, s.n * s.k, blocksize, q, code, offset, block2);
  const LoraCuda cuda(s, x, p, rng);
  const auto unwanted = [](const Tensor& like) { return new_empty(like, {0}, like.scalar_type()); };
  Tensor dx = need_dx ? product(x, s.k) : unwanted(x);
  Tensor da = need_da ? new_empty(a, {s.r, s.k}, a.scalar_type()) : unwanted(a);
  Tensor db = need_db ? new_empty(b, {s.n, s.r}, b.scalar_type()) : unwanted(b);
  if (s.r == 0) {
    if (need_dx) dgrad_into_cuda(dx, g, w, {});
    return {dx, da, db};
  }
  const auto factor = static_cast<float>(scale);
  if (need_dx || need_da) {
    const Tensor parts = cuda.shrink(g, b, 1, s.r, factor, {});
    Tensor dt = parts;
    if (need_dx && p == 0 && s.k > 0) {
      dgrad_into_cuda(dx, g, w, update(parts, a, s.k, 1, 1, dt));
    } else if (need_dx) {  // dropout is of the update alone
      dgrad_into_cuda(dx, g, w, {});
      dt = cuda.expand(dx, a, s.k, 1, cuda.keep_scale(), cuda.drop(), parts);
    } else {
      dt = cuda.sum(parts);
    }
    if (need_da) cuda.wgrad(da, s.k, 1, x, dt, cuda.keep_scale(), cuda.drop());
  }
  if (need_db) cuda.wgrad(db, 1, s.r, g, t, factor, {});
  return {dx, da, db};
}
#endif

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("quantize_nf4(Tensor w, int blocksize) -> (Tensor, Tensor)");
  m.def(
      "dequantize_nf4_(Tensor(a!) out, Tensor packed, Tensor absmax, int blocksize, Tensor? absmax_q, Tensor? code2, "
      "Tensor? offset, int blocksize2) -> ()");
#ifdef PK_WITH_CUDA
  m.def(
      "nf4_panel_(Tensor(a!) out, Tensor packed, Tensor absmax, int n, int k, int row, int column, int blocksize, "
      "Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2) -> ()");
#endif
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

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("quantize_nf4", TORCH_BOX(&pk::quantize));
  m.impl("dequantize_nf4_", TORCH_BOX(&pk::dequantize));
  m.impl("quantize_absmax", TORCH_BOX(&pk::quantize_absmax));
  m.impl("dequantize_absmax", TORCH_BOX(&pk::dequantize_absmax));
  m.impl("nf4_linear", TORCH_BOX(&pk::linear));
  m.impl("nf4_linear_dgrad", TORCH_BOX(&pk::dgrad));
  m.impl("nf4_lora_linear", TORCH_BOX(&pk::lora_linear));
  m.impl("nf4_lora_linear_backward", TORCH_BOX(&pk::lora_backward));
}
#endif

#ifdef PK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("quantize_nf4", TORCH_BOX(&pk::quantize_cuda));
  m.impl("dequantize_nf4_", TORCH_BOX(&pk::dequantize_cuda));
  m.impl("nf4_panel_", TORCH_BOX(&pk::panel_cuda));
  m.impl("quantize_absmax", TORCH_BOX(&pk::quantize_absmax_cuda));
  m.impl("dequantize_absmax", TORCH_BOX(&pk::dequantize_absmax_cuda));
  m.impl("nf4_linear", TORCH_BOX(&pk::linear_cuda));
  m.impl("nf4_linear_dgrad", TORCH_BOX(&pk::dgrad_cuda));
  m.impl("nf4_lora_linear", TORCH_BOX(&pk::lora_linear_cuda));
  m.impl("nf4_lora_linear_backward", TORCH_BOX(&pk::lora_backward_cuda));
}
#endif
