// The CUDA launchers of LoRA over tensors, for the glue of the ops that have a LoRA in them.
#pragma once

#include <algorithm>

#include "lora/lora_checks.h"

#ifdef PK_WITH_CUDA
#include "lora/lora.cuh"

namespace pk {

// The products of README.md on the current stream, over the rows of one adapter or of a plan.
class LoraCuda {
 public:
  LoraCuda(const LoraShape& s, const Tensor& x, double p, const std::optional<Tensor>& rng)
      : guard_(x.get_device_index()), like_(x), stream_(stream_of(x)) {
    PK_CHECK(std::max({s.m, s.k, s.n, s.r}) < limit, "x, a and b may have at most 2^30 rows and columns");
    rows_.m = static_cast<int>(s.m), rows_.r_max = static_cast<int>(s.r);
    rows_.block_m = lora_block_m(s.m);
    rows_.tiles = static_cast<int>((s.m + rows_.block_m - 1) / rows_.block_m);
    slots_ = s.m;
    if (p == 0) return;
    check_rng(p, rng);
    check_same_device(*rng, x, "rng and x");
    drop_ = {static_cast<const int64_t*>(rng->data_ptr()), static_cast<uint32_t>(std::nearbyint(p * 65536))};
    keep_scale_ = LoraDropout{0, 0, drop_.threshold}.scale();
  }

  void take(const Tensor& r_indptr, const Tensor& scaling, const std::optional<Tensor>& plan, int64_t r_max) {
    PK_CHECK(plan.has_value() && plan->scalar_type() == ScalarType::Int && plan->dim() == 2 && plan->size(1) > 1,
             "plan must be the int32 [T, 1 + block_m] of plan.py");
    check_contiguous(*plan, "plan");
    const int64_t block_m = plan->size(1) - 1, adapters = scaling.numel();
    PK_CHECK(r_indptr.dim() == 1 && r_indptr.size(0) == adapters + 1 &&
                 (r_indptr.scalar_type() == ScalarType::Int || r_indptr.scalar_type() == ScalarType::Long),
             "r_indptr must be int32 or int64 [L + 1]");
    check_contiguous(r_indptr, "r_indptr");
    PK_CHECK(scaling.scalar_type() == ScalarType::Float, "scaling must be float32 [L]");
    check_contiguous(scaling, "scaling");
    check_same_device(*plan, like_, "plan and x");
    check_same_device(r_indptr, like_, "r_indptr and x");
    check_same_device(scaling, like_, "scaling and x");
    PK_CHECK(plan->size(0) * block_m < limit && adapters < limit, "a plan may have at most 2^30 rows");
    rows_.planned = true;
    rows_.plan = static_cast<const int32_t*>(plan->data_ptr());
    rows_.r_indptr = r_indptr.data_ptr(), rows_.indptr64 = r_indptr.scalar_type() == ScalarType::Long;
    rows_.scaling = static_cast<const float*>(scaling.data_ptr());
    rows_.tiles = static_cast<int>(plan->size(0)), rows_.block_m = static_cast<int>(block_m);
    rows_.adapters = static_cast<int>(adapters);
    rows_.r_max = static_cast<int>(std::min<int64_t>(r_max, rows_.r_max));
    slots_ = plan->size(0) * block_m;
  }

  const LoraRng& drop() const { return drop_; }
  float keep_scale() const { return keep_scale_; }

  // y += y_scale * t b, t = t_scale * drop(x) a [slots, r]; the strides of b are those of (rank, column).
  Tensor add(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, int64_t rank_stride,
             int64_t column_stride, float y_scale) const {
    const LoraStream xs = stream(x, "x"), ys = stream(y, "y");
    if (lora_can_decode(rows_, xs, ys, dtype_of(a, "a"))) {
      const bool keep = !rows_.planned;  // t of many adapters is not asked for
      Tensor t = new_empty(like_, {keep ? slots_ : 0, rows_.r_max}, ScalarType::Float);
      check_cuda(
          lora_decode_cuda(rows_, xs, ys, factor(a, xs.columns, 1), factor(b, rank_stride, column_stride), keep_scale_,
                           y_scale, drop_, keep ? static_cast<float*>(t.data_ptr()) : nullptr, stream_),
          "lora_add_");
      return t;
    }
    return expand(y, b, rank_stride, column_stride, y_scale, {}, shrink(x, a, xs.columns, 1, keep_scale_, drop_));
  }

  // Parts [splits, slots, r], or just [slots, r], of scale * drop(u) f^T.
  Tensor shrink(const Tensor& u, const Tensor& f, int64_t rank_stride, int64_t column_stride, float scale,
                const LoraRng& drop) const {
    const LoraStream us = stream(u, "x and g");
    const Tensor fitting = fit(f, u);
    const int splits = lora_shrink_splits(rows_, us);
    Tensor parts = splits == 1 ? new_v() : new_empty(like_, {splits, slots_, rows_.r_max}, ScalarType::Float);
    check_cuda(lora_shrink_cuda(rows_, us, factor(fitting, rank_stride, column_stride), scale, drop,
                                static_cast<float*>(parts.data_ptr()), splits, stream_),
               "lora shrink");
    return parts;
  }

  // y += scale * mask * (v f); returns v, the sum of the parts.
  Tensor expand(const Tensor& y, const Tensor& f, int64_t rank_stride, int64_t column_stride, float scale,
                const LoraRng& drop, const Tensor& parts) const {
    const LoraStream ys = stream(y, "y and dx");
    if (ys.columns == 0) return sum(parts);
    const Tensor fitting = fit(f, y);
    const int splits = splits_of(parts);
    Tensor v = splits == 1 ? parts : new_v();
    check_cuda(lora_expand_cuda(rows_, ys, factor(fitting, rank_stride, column_stride), scale, drop,
                                static_cast<const float*>(parts.data_ptr()), splits,
                                splits == 1 ? nullptr : static_cast<float*>(v.data_ptr()), stream_),
               "lora expand");
    return v;
  }

  Tensor sum(const Tensor& parts) const {
    const int splits = splits_of(parts);
    if (splits == 1) return parts;
    Tensor v = new_v();
    check_cuda(lora_sum_cuda(static_cast<const float*>(parts.data_ptr()), splits, v.numel(), v.data_ptr(), Dtype::f32,
                             stream_),
               "lora sum");
    return v;
  }

  // out = scale * v^T drop(u)
  void wgrad(const Tensor& out, int64_t rank_stride, int64_t column_stride, const Tensor& u, const Tensor& v,
             float scale, const LoraRng& drop) const {
    const LoraStream us = stream(u, "x and g");
    const int splits = lora_wgrad_splits(rows_, us);
    const Tensor partial = new_empty(like_, {splits == 1 ? 0 : splits, out.numel()}, ScalarType::Float);
    check_cuda(lora_wgrad_cuda(rows_, us, static_cast<const float*>(v.data_ptr()), scale, drop,
                               {out.data_ptr(), dtype_of(out, "a and b"), rank_stride, column_stride}, out.numel(),
                               static_cast<float*>(partial.data_ptr()), splits, stream_),
               "lora wgrad");
  }

 private:
  Tensor new_v() const { return new_empty(like_, {slots_, rows_.r_max}, ScalarType::Float); }
  static int splits_of(const Tensor& parts) { return parts.dim() == 3 ? static_cast<int>(parts.size(0)) : 1; }

  static constexpr int64_t limit = int64_t{1} << 30;

  // The kernels multiply a 16-bit array by a factor of its own dtype or fp32; of the rare others there is a copy.
  static Tensor fit(const Tensor& f, const Tensor& u) {
    const bool fits = f.scalar_type() == u.scalar_type() || f.scalar_type() == ScalarType::Float;
    return fits ? f : torch::stable::to(f, ScalarType::Float);
  }

  static LoraStream stream(const Tensor& u, const char* name) {
    return {u.data_ptr(), dtype_of(u, name), static_cast<int>(u.size(u.dim() - 1))};
  }

  static LoraFactor<const void> factor(const Tensor& f, int64_t rank_stride, int64_t column_stride) {
    return {f.data_ptr(), dtype_of(f, "a and b"), rank_stride, column_stride};
  }

  const DeviceGuard guard_;
  const Tensor like_;
  cudaStream_t stream_;
  LoraRows rows_ = {};
  int64_t slots_ = 0;
  LoraRng drop_;
  float keep_scale_ = 1;
};

}  // namespace pk
#endif
