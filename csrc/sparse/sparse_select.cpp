// Glue of top-k and Fisher: checks, allocates, dispatches. The maths is in README.md.
#include "sparse/sparse_select.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace pk {
namespace {

std::vector<Scores> scores_of(const std::vector<Tensor>& scores, int64_t k, int64_t& total) {
  std::vector<Scores> out;
  total = 0;
  for (const Tensor& s : scores) {
    check_contiguous(s, "scores");
    check_same_device(s, scores[0], "scores");
    out.push_back({dtype_of(s, "scores"), s.data_ptr(), s.numel()});
    total += s.numel();
  }
  PK_CHECK(!scores.empty() && k >= 0 && k <= total, "k must be from 0 to the ", total,
           " scores, of one tensor at least");
  return out;
}

// threshold, how many are larger, how many are NaN
std::tuple<Tensor, Tensor, Tensor> topk_threshold_cpu(std::vector<Tensor> scores, int64_t k, bool use_abs) {
  int64_t total;
  const std::vector<Scores> all = scores_of(scores, k, total);
  Threshold found = {0, 0, 0};
  if (total > 0) found = PK_DISPATCH_ISA(topk_threshold, all, std::max<int64_t>(k, 1), use_abs);
  Tensor value = new_empty(scores[0], {}, ScalarType::Float);
  Tensor above = new_empty(scores[0], {}, ScalarType::Long), nan = new_empty(scores[0], {}, ScalarType::Long);
  *static_cast<float*>(value.data_ptr()) = found.value;
  *static_cast<int64_t*>(above.data_ptr()) = found.above;
  *static_cast<int64_t*>(nan.data_ptr()) = found.nan;
  return {value, above, nan};
}

// positions of the chosen, how many there are
std::tuple<Tensor, Tensor> topk_compact_cpu(std::vector<Tensor> scores, const Tensor& threshold, int64_t k,
                                            bool use_abs) {
  int64_t total;
  const std::vector<Scores> all = scores_of(scores, k, total);
  PK_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.numel() == 1, "threshold must be one float32");
  check_same_device(threshold, scores[0], "threshold and scores");
  Tensor positions = new_empty(scores[0], {k}, ScalarType::Long), count = new_empty(scores[0], {}, ScalarType::Long);
  *static_cast<int64_t*>(count.data_ptr()) =
      PK_DISPATCH_ISA(topk_compact, all, *static_cast<const float*>(threshold.data_ptr()), k, use_abs,
                      static_cast<int64_t*>(positions.data_ptr()));
  return {positions, count};
}

// f += weight * g^2 or |g|
void fisher_accum_cpu(const Tensor& f, const Tensor& g, double weight, bool absolute) {
  check_contiguous(f, "f");
  check_contiguous(g, "g");
  check_same_shape(f, g, "f and g");
  check_same_device(f, g, "f and g");
  PK_DISPATCH_ISA(fisher_accum, dtype_of(f, "f"), f.data_ptr(), dtype_of(g, "g"), g.data_ptr(), g.numel(),
                  static_cast<float>(weight), absolute);
}

// f += sum over samples of weight * (dy^T x)^2, over the rows of each
void fisher_linear_cpu(const Tensor& f, const Tensor& dy, const Tensor& x, const Tensor& bounds,
                       std::optional<Tensor> weight) {
  PK_CHECK(f.dim() == 2 && dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0) && f.size(0) == dy.size(1) &&
               f.size(1) == x.size(1),
           "f must be [out, in], dy [rows, out] and x [rows, in]");
  PK_CHECK(f.scalar_type() == ScalarType::Float, "f must be float32");
  PK_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x must have the same dtype");
  PK_CHECK(bounds.scalar_type() == ScalarType::Long && bounds.dim() == 1 && bounds.numel() > 0,
           "cu_samples must be int64 [N + 1]");
  for (const Tensor* t : {&f, &dy, &x, &bounds}) {
    check_contiguous(*t, "f, dy, x and cu_samples");
    check_same_device(*t, f, "f, dy, x and cu_samples");
  }
  const auto* first = static_cast<const int64_t*>(bounds.data_ptr());
  std::vector<int64_t> ends(first, first + bounds.numel());
  PK_CHECK(ends.front() >= 0 && ends.back() <= x.size(0) && std::is_sorted(ends.begin(), ends.end()),
           "cu_samples must ascend from 0 to at most the ", x.size(0), " rows of x");
  if (weight) {
    PK_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == bounds.numel() - 1,
             "weight must be float32 [N]");
    check_contiguous(*weight, "weight");
    check_same_device(*weight, f, "weight and f");
  }
  const FisherLinear s = {dtype_of(x, "x"), dy.data_ptr(),
                          x.data_ptr(),     static_cast<float*>(f.data_ptr()),
                          f.size(0),        f.size(1),
                          std::move(ends),  weight ? static_cast<const float*>(weight->data_ptr()) : nullptr};
  PK_DISPATCH_ISA(fisher_linear, s);
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("topk_threshold(Tensor[] scores, int k, bool use_abs) -> (Tensor threshold, Tensor above, Tensor nan)");
  m.def("topk_compact(Tensor[] scores, Tensor threshold, int k, bool use_abs) -> (Tensor positions, Tensor count)");
  m.def("fisher_accum_(Tensor(a!) f, Tensor g, float weight, bool absolute) -> ()");
  m.def("fisher_linear_(Tensor(a!) f, Tensor dy, Tensor x, Tensor cu_samples, Tensor? weight) -> ()");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("topk_threshold", TORCH_BOX(&pk::topk_threshold_cpu));
  m.impl("topk_compact", TORCH_BOX(&pk::topk_compact_cpu));
  m.impl("fisher_accum_", TORCH_BOX(&pk::fisher_accum_cpu));
  m.impl("fisher_linear_", TORCH_BOX(&pk::fisher_linear_cpu));
}
#endif
