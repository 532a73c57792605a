// Glue of the CUDA kernels of sparse training: checks, allocates, launches. Schemas of ops that the CPU has too are in
// sparse.cpp and sparse_select.cpp.
#ifdef PK_WITH_CUDA
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "sparse/sparse.cuh"

namespace pk {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t limit = int64_t{1} << 30;

bool wide_indices(const Tensor& t, const char* name) {
  check_contiguous(t, name);
  PK_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
  return t.scalar_type() == ScalarType::Long;
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// dy [tokens, m] and x [tokens, n] to fp32 [nnz]
Tensor sddmm_device(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col) {
  PK_CHECK(dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0) && dy.scalar_type() == x.scalar_type(),
           "dy must be [tokens, out] and x [tokens, in], of one dtype");
  for (const Tensor* t : {&dy, &x, &crow, &col}) check_same_device(*t, x, "dy, x, crow and col");
  check_contiguous(dy, "dy");
  check_contiguous(x, "x");
  const bool wide = wide_indices(col, "col");
  PK_CHECK(wide_indices(crow, "crow") == wide && crow.numel() == dy.size(1) + 1, "crow must hold ", dy.size(1) + 1,
           " numbers, of the dtype of col");
  PK_CHECK(std::max({dy.size(1), x.size(1), col.numel()}) < limit, "a mask may have at most 2^30 rows and entries");
  const SddmmCuda s = {dtype_of(x, "x"), dy.data_ptr(), x.data_ptr(), x.size(0),       dy.size(1),
                       x.size(1),        col.numel(),   wide,         crow.data_ptr(), col.data_ptr()};
  const DeviceGuard guard(x.get_device_index());
  Tensor vals = new_empty(x, {s.nnz}, ScalarType::Float);
  const int splits = sddmm_splits(s);
  const Tensor parts = new_empty(x, {splits > 1 ? splits * s.nnz : 0}, ScalarType::Float);
  check_cuda(sddmm_cuda(s, pointer<float>(vals), pointer<float>(parts), splits, stream_of(x)), "sddmm");
  return vals;
}

std::vector<ScoresCuda> scores_of(const std::vector<Tensor>& scores, int64_t k) {
  std::vector<ScoresCuda> out;
  int64_t total = 0;
  for (const Tensor& s : scores) {
    check_contiguous(s, "scores");
    check_same_device(s, scores[0], "scores");
    out.push_back({s.data_ptr(), s.numel(), dtype_of(s, "scores")});
    total += s.numel();
  }
  PK_CHECK(!scores.empty() && k >= 0 && k <= total, "k must be from 0 to the ", total,
           " scores, of one tensor at least");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> topk_threshold_device(std::vector<Tensor> scores, int64_t k, bool use_abs) {
  const std::vector<ScoresCuda> all = scores_of(scores, k);
  const Tensor& like = scores[0];
  const DeviceGuard guard(like.get_device_index());
  const Tensor state = new_empty(like, {topk_state_bytes / 8}, ScalarType::Long);
  Tensor value = new_empty(like, {}, ScalarType::Float);
  Tensor above = new_empty(like, {}, ScalarType::Long), nan = new_empty(like, {}, ScalarType::Long);
  check_cuda(
      topk_threshold_cuda(all.data(), static_cast<int64_t>(all.size()), k, use_abs, state.data_ptr(),
                          pointer<float>(value), pointer<int64_t>(above), pointer<int64_t>(nan), stream_of(like)),
      "topk_threshold");
  return {value, above, nan};
}

std::tuple<Tensor, Tensor> topk_compact_device(std::vector<Tensor> scores, const Tensor& threshold, int64_t k,
                                               bool use_abs) {
  const std::vector<ScoresCuda> all = scores_of(scores, k);
  const Tensor& like = scores[0];
  PK_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.numel() == 1, "threshold must be one float32");
  check_same_device(threshold, like, "threshold and scores");
  const auto tensors = static_cast<int64_t>(all.size());
  const int64_t chunks = topk_chunks(all.data(), tensors);
  const DeviceGuard guard(like.get_device_index());
  const Tensor counts = new_empty(like, {chunks, 2}, ScalarType::Int);
  const Tensor before = new_empty(like, {chunks + 1, 2}, ScalarType::Long);
  Tensor positions = new_empty(like, {k}, ScalarType::Long), count = new_empty(like, {}, ScalarType::Long);
  check_cuda(topk_compact_cuda(all.data(), tensors, pointer<float>(threshold), k, use_abs, pointer<uint32_t>(counts),
                               pointer<int64_t>(before), pointer<int64_t>(positions), pointer<int64_t>(count),
                               stream_of(like)),
             "topk_compact");
  return {positions, count};
}

// One step on vals, m and v: that of `step`, float32 on the device, which is not waited for, or else step_number.
void sparse_adamw_device(const Tensor& vals, const Tensor& m, const Tensor& v, const Tensor& grad, Optional step,
                         double step_number, Optional w, Optional idx, double lr, double beta1, double beta2,
                         double eps, double weight_decay) {
  for (const Tensor* t : {&vals, &m, &v, &grad}) {
    PK_CHECK(t == &grad || t->scalar_type() == ScalarType::Float, "vals, m and v must be float32");
    check_contiguous(*t, "vals, m, v and grad");
    check_same_shape(*t, vals, "vals, m, v and grad");
    check_same_device(*t, vals, "vals, m, v and grad");
  }
  SparseAdamwCuda a = {};
  a.nnz = vals.numel();
  a.vals = a.vals_out = pointer<float>(vals);
  a.m = a.m_out = pointer<float>(m);
  a.v = a.v_out = pointer<float>(v);
  a.grad = grad.data_ptr(), a.grad_type = dtype_of(grad, "grad");
  if (step) {
    PK_CHECK(step->scalar_type() == ScalarType::Float && step->numel() == 1, "step must be one float32");
    check_same_device(*step, vals, "step and vals");
    a.step = pointer<float>(*step);
  }
  if (w) {
    check_contiguous(*w, "w");
    check_same_device(*w, vals, "w and vals");
    a.w = w->data_ptr(), a.w_type = dtype_of(*w, "w");
    PK_CHECK(idx.has_value() || w->numel() == a.nnz, "without idx, w must hold ", a.nnz, " numbers");
  }
  if (idx) {
    a.wide_indices = wide_indices(*idx, "idx"), a.idx = idx->data_ptr();
    check_same_shape(*idx, vals, "idx and vals");
    check_same_device(*idx, vals, "idx and vals");
  }
  a.step_number = step_number;
  a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay;
  const DeviceGuard guard(vals.get_device_index());
  check_cuda(sparse_adamw_cuda(a, stream_of(vals)), "sparse_adamw");
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def(
      "sparse_adamw_cuda_(Tensor(a!) vals, Tensor(b!) m, Tensor(c!) v, Tensor grad, Tensor? step, float step_number, "
      "Tensor? w, Tensor? idx, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PK_OPS, PK_CUDA_KEY, m) {
  m.impl("sddmm", TORCH_BOX(&pk::sddmm_device));
  m.impl("topk_threshold", TORCH_BOX(&pk::topk_threshold_device));
  m.impl("topk_compact", TORCH_BOX(&pk::topk_compact_device));
  m.impl("sparse_adamw_cuda_", TORCH_BOX(&pk::sparse_adamw_device));
}
#endif
