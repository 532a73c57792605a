// Checks of LoRA's tensors, for the glue of the ops that have them.
#pragma once

#include <cmath>
#include <optional>

#include "common/checks.h"
#include "lora/lora_cpu.h"

namespace pk {

// y or g [..., n]; b is [n, r] or, in a bank of many adapters, [r, n], and a has `slices` rows for each rank
inline LoraShape check(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, const char* y_name,
                       bool bank = false, int64_t slices = 1) {
  const int64_t dims = x.dim();
  const char* expected =
      bank ? "a must be [R, k] for each slice, bt [R, n], x [..., k], " : "a must be [r, k], b [n, r], x [..., k], ";
  PK_CHECK(a.dim() == 2 && b.dim() == 2 && dims >= 1 && y.dim() == dims, expected, y_name, " [..., n]");
  const LoraShape s = {x.size(dims - 1) == 0 ? 0 : x.numel() / x.size(dims - 1), a.size(1), b.size(bank ? 1 : 0),
                       b.size(bank ? 0 : 1)};
  PK_CHECK(x.size(dims - 1) == s.k && y.size(dims - 1) == s.n && a.size(0) == slices * s.r && y.numel() == s.m * s.n,
           expected, y_name, " [..., n]");
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

inline void check_dx(const std::optional<Tensor>& dx, const Tensor& x) {
  if (!dx) return;
  check_same_shape(*dx, x, "dx and x");
  check_contiguous(*dx, "dx");
}

inline void check_t(const Tensor& t, const LoraShape& s) {
  PK_CHECK(t.dim() == 2 && t.size(0) == s.m && t.size(1) == s.r && t.scalar_type() == ScalarType::Float,
           "t must be the [m, r] float32 that the forward returned");
  check_contiguous(t, "t");
}

inline void check_rng(double p, const std::optional<Tensor>& rng) {
  PK_CHECK(p > 0 && p <= 1, "p must be between 0 and 1");
  PK_CHECK(rng.has_value() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(),
           "dropout needs rng, an int64 tensor (seed, offset)");
}

inline LoraDropout dropout_of(double p, const std::optional<Tensor>& rng) {
  if (p == 0) return {};
  check_rng(p, rng);
  PK_CHECK(rng->is_cpu(), "rng must be on the CPU");
  const auto* words = static_cast<const uint64_t*>(rng->data_ptr());
  return {words[0], words[1], static_cast<uint32_t>(std::nearbyint(p * 65536))};
}

inline LoraIn in(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }
inline LoraOut out(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }

}  // namespace pk
