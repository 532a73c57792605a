// Glue of LoRA: checks, allocates, dispatches. The maths is in README.md.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "lora/lora_cpu.h"

#ifdef PK_WITH_CUDA
#include "lora/lora.cuh"
#endif

namespace pk {
namespace {

// y or g [..., n]; b is [n, r] or, in a bank of many adapters, [r, n], and a has `slices` rows for each rank
LoraShape check(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, const char* y_name,
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

void check_dx(const std::optional<Tensor>& dx, const Tensor& x) {
  if (!dx) return;
  check_same_shape(*dx, x, "dx and x");
  check_contiguous(*dx, "dx");
}

void check_t(const Tensor& t, const LoraShape& s) {
  PK_CHECK(t.dim() == 2 && t.size(0) == s.m && t.size(1) == s.r && t.scalar_type() == ScalarType::Float,
           "t must be the [m, r] float32 that the forward returned");
  check_contiguous(t, "t");
}

void check_rng(double p, const std::optional<Tensor>& rng) {
  PK_CHECK(p > 0 && p <= 1, "p must be between 0 and 1");
  PK_CHECK(rng.has_value() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous(),
           "dropout needs rng, an int64 tensor (seed, offset)");
}

LoraDropout dropout_of(double p, const std::optional<Tensor>& rng) {
  if (p == 0) return {};
  check_rng(p, rng);
  PK_CHECK(rng->is_cpu(), "rng must be on the CPU");
  const auto* words = static_cast<const uint64_t*>(rng->data_ptr());
  return {words[0], words[1], static_cast<uint32_t>(std::nearbyint(p * 65536))};
}

LoraIn in(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }
LoraOut out(const Tensor& t, const char* name) { return {t.data_ptr(), dtype_of(t, name)}; }

// -- several linears ------------------------------------------------------------------------------------------------

// As check, of slices with y or g [..., n_s], b [n_s, r_s] and a [sum of the r_s, k].
LoraShape check_slices(const std::vector<Tensor>& ys, const Tensor& x, const Tensor& a, const std::vector<Tensor>& bs,
                       const std::vector<double>& scales, const char* y_name) {
  const size_t count = ys.size();
  PK_CHECK(count > 0 && bs.size() == count && scales.size() == count, "expected one b and scale for each ", y_name);
  const int64_t dims = x.dim();
  PK_CHECK(a.dim() == 2 && dims >= 1 && x.size(dims - 1) == a.size(1), "a must be [R, k] and x [..., k]");
  const LoraShape s = {a.size(1) == 0 ? 0 : x.numel() / a.size(1), a.size(1), 0, a.size(0)};
  int64_t ranks = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &y = ys[i], &b = bs[i];
    PK_CHECK(b.dim() == 2 && y.dim() == dims && y.size(dims - 1) == b.size(0) && y.numel() == s.m * b.size(0),
             "each b must be [n, r] and each ", y_name, " [..., n], with the leading dims of x");
    PK_CHECK(a.scalar_type() == b.scalar_type(), "a and bs must have the same dtype");
    check_contiguous(y, y_name);
    check_contiguous(b, "b");
    check_same_device(y, x, "ys, gs and x");
    check_same_device(b, x, "bs and x");
    ranks += b.size(1);
  }
  PK_CHECK(ranks == s.r, "a must have the ", ranks, " ranks of bs");
  check_contiguous(x, "x");
  check_contiguous(a, "a");
  check_same_device(a, x, "a and x");
  return s;
}

Tensor lora_slices_add_cpu(std::vector<Tensor> ys, const Tensor& x, const Tensor& a, std::vector<Tensor> bs,
                           std::vector<double> scales, double p, std::optional<Tensor> rng) {
  const LoraShape s = check_slices(ys, x, a, bs, scales, "y");
  const LoraDropout drop = dropout_of(p, rng);
  Tensor t = new_empty(x, {s.m, s.r}, ScalarType::Float);
  std::vector<LoraSlice> slices;
  for (size_t i = 0; i < ys.size(); ++i)
    slices.push_back(
        {bs[i].size(0), bs[i].size(1), in(bs[i], "b"), static_cast<float>(scales[i]), {}, out(ys[i], "y")});
  PK_DISPATCH_ISA(lora_add, s, slices, in(x, "x"), in(a, "a"), drop, static_cast<float*>(t.data_ptr()));
  return t;
}

std::tuple<Tensor, std::vector<Tensor>> lora_slices_backward_cpu(std::optional<Tensor> dx, std::vector<Tensor> gs,
                                                                 const Tensor& x, const Tensor& a,
                                                                 std::vector<Tensor> bs, std::vector<double> scales,
                                                                 const Tensor& t, double p, std::optional<Tensor> rng,
                                                                 bool need_da, bool need_db) {
  const LoraShape s = check_slices(gs, x, a, bs, scales, "g");
  const LoraDropout drop = dropout_of(p, rng);
  check_t(t, s);
  check_dx(dx, x);
  Tensor da = new_empty(a, {need_da ? s.r : 0, s.k}, a.scalar_type());
  std::vector<Tensor> dbs;
  std::vector<LoraSlice> slices;
  for (size_t i = 0; i < gs.size(); ++i) {
    const int64_t n = bs[i].size(0), r = bs[i].size(1);
    dbs.push_back(new_empty(bs[i], {need_db ? n : 0, r}, a.scalar_type()));
    slices.push_back(
        {n, r, in(bs[i], "b"), static_cast<float>(scales[i]), in(gs[i], "g"), need_db ? out(dbs[i], "db") : LoraOut{}});
  }
  PK_DISPATCH_ISA(lora_backward, s, slices, dx ? out(*dx, "dx") : LoraOut{}, in(x, "x"), in(a, "a"),
                  static_cast<const float*>(t.data_ptr()), drop, need_da ? out(da, "da") : LoraOut{});
  return {da, dbs};
}

// One linear is one slice.

Tensor lora_add_cpu(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double p,
                    std::optional<Tensor> rng) {
  return lora_slices_add_cpu({y}, x, a, {b}, {scale}, p, rng);
}

std::tuple<Tensor, Tensor> lora_backward_cpu(std::optional<Tensor> dx, const Tensor& g, const Tensor& x,
                                             const Tensor& a, const Tensor& b, const Tensor& t, double scale, double p,
                                             std::optional<Tensor> rng, bool need_da, bool need_db) {
  const auto [da, dbs] = lora_slices_backward_cpu(dx, {g}, x, a, {b}, {scale}, t, p, rng, need_da, need_db);
  return {da, dbs[0]};
}

// -- many adapters --------------------------------------------------------------------------------------------------

std::vector<int64_t> integers(const Tensor& t, const char* name) {
  PK_CHECK(t.is_cpu() && t.dim() == 1, name, " must be a 1-d tensor on the CPU");
  check_contiguous(t, name);
  const int64_t n = t.size(0);
  if (t.scalar_type() == ScalarType::Int) {
    const auto* p = static_cast<const int32_t*>(t.data_ptr());
    return {p, p + n};
  }
  PK_CHECK(t.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
  const auto* p = static_cast<const int64_t*>(t.data_ptr());
  return {p, p + n};
}

// Rows by adapter, in order: a counting sort.
struct Sorted {
  std::vector<int64_t> rows;
  std::vector<LoraGroup> groups;  // of rank > 0, with rows or without
};

Sorted sorted(const LoraShape& s, const Tensor& r_indptr, const Tensor& scaling, const Tensor& ids) {
  const std::vector<int64_t> indptr = integers(r_indptr, "r_indptr"), id = integers(ids, "ids");
  const auto adapters = static_cast<int64_t>(indptr.size()) - 1;
  bool rising = adapters >= 0 && indptr[0] == 0 && indptr[adapters] == s.r;
  for (int64_t l = 0; rising && l < adapters; ++l) rising = indptr[l] <= indptr[l + 1];
  PK_CHECK(rising, "r_indptr must rise from 0 to the ", s.r, " ranks of the bank");
  PK_CHECK(static_cast<int64_t>(id.size()) == s.m, "ids must have one number for each of the ", s.m, " rows");
  PK_CHECK(scaling.is_cpu() && scaling.scalar_type() == ScalarType::Float && scaling.numel() == adapters,
           "scaling must be float32 on the CPU, one number for each adapter");
  check_contiguous(scaling, "scaling");
  const auto served = [&](int64_t l) { return l >= 0 && l < adapters && indptr[l] < indptr[l + 1]; };
  std::vector<int64_t> at(adapters + 1);
  for (const int64_t l : id)
    if (served(l)) ++at[l + 1];
  for (int64_t l = 0; l < adapters; ++l) at[l + 1] += at[l];
  Sorted out;
  out.rows.resize(at[adapters]);
  const auto* scales = static_cast<const float*>(scaling.data_ptr());
  for (int64_t l = 0; l < adapters; ++l)
    if (served(l))
      out.groups.push_back(
          {out.rows.data() + at[l], at[l + 1] - at[l], indptr[l], indptr[l + 1] - indptr[l], scales[l]});
  for (int64_t i = 0; i < s.m; ++i)
    if (served(id[i])) out.rows[at[id[i]]++] = i;
  return out;
}

// The rows are sorted here, on the CPU: the plan and the widest rank are for GPU kernels.
void multi_lora_add_cpu(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& bt, const Tensor& r_indptr,
                        const Tensor& scaling, const Tensor& ids, std::optional<Tensor> /*plan*/, int64_t /*r_max*/,
                        double p, std::optional<Tensor> rng) {
  const LoraShape s = check(y, x, a, bt, "y", true);
  const LoraDropout drop = dropout_of(p, rng);
  const Sorted by = sorted(s, r_indptr, scaling, ids);
  PK_DISPATCH_ISA(multi_lora_add, s, by.groups, out(y, "y"), in(x, "x"), in(a, "a"), in(bt, "bt"), drop);
}

void lora_apply_cpu(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& bt, const Tensor& r_indptr,
                    const Tensor& scaling, const Tensor& ids, std::optional<Tensor> /*plan*/, int64_t /*r_max*/,
                    std::vector<int64_t> slice_n) {
  const LoraShape s = check(y, x, a, bt, "y", true, static_cast<int64_t>(slice_n.size()));
  int64_t columns = 0;
  for (const int64_t n : slice_n) {
    PK_CHECK(n > 0, "slice_n must be widths of at least 1");
    columns += n;
  }
  PK_CHECK(columns == s.n, "slice_n must add up to the ", s.n, " columns of y");
  const Sorted by = sorted(s, r_indptr, scaling, ids);
  PK_DISPATCH_ISA(lora_apply, s, by.groups, slice_n, out(y, "y"), in(x, "x"), in(a, "a"), in(bt, "bt"));
}

std::tuple<Tensor, Tensor> multi_lora_backward_cpu(std::optional<Tensor> dx, const Tensor& g, const Tensor& x,
                                                   const Tensor& a, const Tensor& bt, const Tensor& r_indptr,
                                                   const Tensor& scaling, const Tensor& ids,
                                                   std::optional<Tensor> /*plan*/, int64_t /*r_max*/, double p,
                                                   std::optional<Tensor> rng, bool need_da, bool need_dbt) {
  const LoraShape s = check(g, x, a, bt, "g", true);
  const LoraDropout drop = dropout_of(p, rng);
  const Sorted by = sorted(s, r_indptr, scaling, ids);
  check_dx(dx, x);
  Tensor da = new_empty(a, {need_da ? s.r : 0, s.k}, a.scalar_type());
  Tensor dbt = new_empty(bt, {need_dbt ? s.r : 0, s.n}, bt.scalar_type());
  PK_DISPATCH_ISA(multi_lora_backward, s, by.groups, dx ? out(*dx, "dx") : LoraOut{}, in(g, "g"), in(x, "x"),
                  in(a, "a"), in(bt, "bt"), drop, need_da ? out(da, "da") : LoraOut{},
                  need_dbt ? out(dbt, "dbt") : LoraOut{});
  return {da, dbt};
}

// -- CUDA -----------------------------------------------------------------------------------------------------------

#ifdef PK_WITH_CUDA
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

Tensor lora_add_cuda(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double p,
                     std::optional<Tensor> rng) {
  const LoraShape s = check(y, x, a, b, "y");
  const LoraCuda cuda(s, x, p, rng);
  if (s.m == 0 || s.r == 0) return new_empty(x, {s.m, s.r}, ScalarType::Float);
  return cuda.add(y, x, a, b, 1, s.r, static_cast<float>(scale));
}

std::tuple<Tensor, Tensor> lora_backward_cuda(std::optional<Tensor> dx, const Tensor& g, const Tensor& x,
                                              const Tensor& a, const Tensor& b, const Tensor& t, double scale, double p,
                                              std::optional<Tensor> rng, bool need_da, bool need_db) {
  const LoraShape s = check(g, x, a, b, "g");
  check_t(t, s);
  check_same_device(t, x, "t and x");
  check_dx(dx, x);
  const LoraCuda cuda(s, x, p, rng);
  Tensor da = new_empty(a, {need_da ? s.r : 0, s.k}, a.scalar_type());
  Tensor db = new_empty(b, {need_db ? s.n : 0, s.r}, b.scalar_type());
  if (s.r == 0) return {da, db};
  const auto factor = static_cast<float>(scale);
  if (dx || need_da) {
    const Tensor parts = cuda.shrink(g, b, 1, s.r, factor, {});
    const Tensor dt = dx ? cuda.expand(*dx, a, s.k, 1, cuda.keep_scale(), cuda.drop(), parts) : cuda.sum(parts);
    if (need_da) cuda.wgrad(da, s.k, 1, x, dt, cuda.keep_scale(), cuda.drop());
  }
  if (need_db) cuda.wgrad(db, 1, s.r, g, t, factor, {});
  return {da, db};
}

void multi_lora_add_cuda(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& bt, const Tensor& r_indptr,
                         const Tensor& scaling, const Tensor& /*ids*/, std::optional<Tensor> plan, int64_t r_max,
                         double p, std::optional<Tensor> rng) {
  const LoraShape s = check(y, x, a, bt, "y", true);
  LoraCuda cuda(s, x, p, rng);
  cuda.take(r_indptr, scaling, plan, r_max);
  if (s.m > 0 && s.r > 0 && s.n > 0) cuda.add(y, x, a, bt, s.n, 1, 1);
}

std::tuple<Tensor, Tensor> multi_lora_backward_cuda(std::optional<Tensor> dx, const Tensor& g, const Tensor& x,
                                                    const Tensor& a, const Tensor& bt, const Tensor& r_indptr,
                                                    const Tensor& scaling, const Tensor& /*ids*/,
                                                    std::optional<Tensor> plan, int64_t r_max, double p,
                                                    std::optional<Tensor> rng, bool need_da, bool need_dbt) {
  const LoraShape s = check(g, x, a, bt, "g", true);
  check_dx(dx, x);
  LoraCuda cuda(s, x, p, rng);
  cuda.take(r_indptr, scaling, plan, r_max);
  Tensor da = new_empty(a, {need_da ? s.r : 0, s.k}, a.scalar_type());
  Tensor dbt = new_empty(bt, {need_dbt ? s.r : 0, s.n}, bt.scalar_type());
  if (s.r == 0) return {da, dbt};
  if (dx || need_da) {
    const Tensor parts = cuda.shrink(g, bt, s.n, 1, 1, {});
    const Tensor dt = dx ? cuda.expand(*dx, a, s.k, 1, cuda.keep_scale(), cuda.drop(), parts) : cuda.sum(parts);
    if (need_da) cuda.wgrad(da, s.k, 1, x, dt, cuda.keep_scale(), cuda.drop());
  }
  if (need_dbt) cuda.wgrad(dbt, s.n, 1, g, cuda.sum(cuda.shrink(x, a, s.k, 1, cuda.keep_scale(), cuda.drop())), 1, {});
  return {da, dbt};
}
#endif

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("lora_add_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale, float p, Tensor? rng) -> Tensor");
  m.def(
      "lora_backward_(Tensor(a!)? dx, Tensor g, Tensor x, Tensor a, Tensor b, Tensor t, float scale, float p, "
      "Tensor? rng, bool need_da, bool need_db) -> (Tensor da, Tensor db)");
  m.def(
      "lora_slices_add_(Tensor(a!)[] ys, Tensor x, Tensor a, Tensor[] bs, float[] scales, float p, Tensor? rng) -> "
      "Tensor");
  m.def(
      "lora_slices_backward_(Tensor(a!)? dx, Tensor[] gs, Tensor x, Tensor a, Tensor[] bs, float[] scales, Tensor t, "
      "float p, Tensor? rng, bool need_da, bool need_db) -> (Tensor da, Tensor[] dbs)");
  m.def(
      "multi_lora_add_(Tensor(a!) y, Tensor x, Tensor a, Tensor bt, Tensor r_indptr, Tensor scaling, Tensor ids, "
      "Tensor? plan, int r_max, float p, Tensor? rng) -> ()");
  m.def(
      "lora_apply_(Tensor(a!) y, Tensor x, Tensor a, Tensor bt, Tensor r_indptr, Tensor scaling, Tensor ids, "
      "Tensor? plan, int r_max, int[] slice_n) -> ()");
  m.def(
      "multi_lora_backward_(Tensor(a!)? dx, Tensor g, Tensor x, Tensor a, Tensor bt, Tensor r_indptr, Tensor scaling, "
      "Tensor ids, Tensor? plan, int r_max, float p, Tensor? rng, bool need_da, bool need_dbt) -> (Tensor da, Tensor "
      "dbt)");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("lora_apply_", TORCH_BOX(&pk::lora_apply_cpu));
  m.impl("lora_add_", TORCH_BOX(&pk::lora_add_cpu));
  m.impl("lora_backward_", TORCH_BOX(&pk::lora_backward_cpu));
  m.impl("lora_slices_add_", TORCH_BOX(&pk::lora_slices_add_cpu));
  m.impl("lora_slices_backward_", TORCH_BOX(&pk::lora_slices_backward_cpu));
  m.impl("multi_lora_add_", TORCH_BOX(&pk::multi_lora_add_cpu));
  m.impl("multi_lora_backward_", TORCH_BOX(&pk::multi_lora_backward_cpu));
}
#endif

#ifdef PK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("lora_add_", TORCH_BOX(&pk::lora_add_cuda));
  m.impl("lora_backward_", TORCH_BOX(&pk::lora_backward_cuda));
  m.impl("multi_lora_add_", TORCH_BOX(&pk::multi_lora_add_cuda));
  m.impl("multi_lora_backward_", TORCH_BOX(&pk::multi_lora_backward_cuda));
}
#endif
