// Glue of the sparse ops: checks, allocates, dispatches. The maths is in README.md.
#include "sparse/sparse.h"

#include <torch/csrc/stable/library.h>

#include "common/checks.h"

namespace pk {
namespace {

Index index_of(const Tensor& t, const char* name, int64_t n) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  PK_CHECK(wide || t.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  check_contiguous(t, name);
  PK_CHECK(t.numel() == n, name, " must hold ", n, " numbers");
  return {t.data_ptr(), wide};
}

Mask mask_of(const Tensor& crow, const Tensor& col, int64_t m, int64_t n) {
  const Index starts = index_of(crow, "crow", m + 1), columns = index_of(col, "col", col.numel());
  PK_CHECK(starts.wide == columns.wide, "crow and col must have the same dtype");
  return {starts, columns, m, n, col.numel()};
}

const float* floats(const Tensor& t, const char* name, int64_t n) {
  PK_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == n, name, " must hold ", n, " float32");
  check_contiguous(t, name);
  return static_cast<const float*>(t.data_ptr());
}

void check_rows(const Tensor& a, const Tensor& b) {
  PK_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0), "both must be matrices with as many rows");
  PK_CHECK(a.scalar_type() == b.scalar_type(), "both must have the same dtype");
  check_contiguous(a, "the first");
  check_contiguous(b, "the second");
}

// Whether crow [m + 1] and col are a mask [m, n]. The other ops go by it unasked.
bool is_mask(const Tensor& crow, const Tensor& col, int64_t m, int64_t n) {
  return PK_DISPATCH_ISA(sparse_is_mask, mask_of(crow, col, m, n));
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col) {
  check_rows(dy, x);
  const Mask mask = mask_of(crow, col, dy.size(1), x.size(1));
  const Tensor out = new_empty(dy, {mask.nnz}, ScalarType::Float);
  PK_DISPATCH_ISA(sddmm, dtype_of(dy, "dy"), dy.data_ptr(), x.data_ptr(), dy.size(0), mask,
                  static_cast<float*>(out.data_ptr()));
  return out;
}

void add(const Tensor& y, const Tensor& x, const Tensor& vals, const Tensor& crow, const Tensor& col) {
  check_rows(y, x);
  const Mask mask = mask_of(crow, col, y.size(1), x.size(1));
  PK_DISPATCH_ISA(sparse_add, dtype_of(y, "y"), y.data_ptr(), x.data_ptr(), y.size(0), mask,
                  floats(vals, "vals", mask.nnz));
}

void dx_add(const Tensor& dx, const Tensor& g, const Tensor& vals, const Tensor& crow, const Tensor& col) {
  check_rows(dx, g);
  const Mask mask = mask_of(crow, col, g.size(1), dx.size(1));
  PK_DISPATCH_ISA(sparse_dx_add, dtype_of(g, "g"), dx.data_ptr(), g.data_ptr(), g.size(0), mask,
                  floats(vals, "vals", mask.nnz));
}

// panel [rows, columns], any strides, += that piece of D [m, n] whose first element is (row, column)
void patch(const Tensor& panel, int64_t row, int64_t column, const Tensor& vals, const Tensor& crow, const Tensor& col,
           int64_t n) {
  PK_CHECK(panel.dim() == 2, "panel must be a matrix");
  const Mask mask = mask_of(crow, col, crow.numel() - 1, n);
  const int64_t rows = panel.size(0), columns = panel.size(1);
  PK_CHECK(row >= 0 && row + rows <= mask.m && column >= 0 && column + columns <= n, "panel must lie within the mask");
  const Matrix to = {panel.data_ptr(), dtype_of(panel, "panel"), panel.stride(0), panel.stride(1)};
  PK_DISPATCH_ISA(sparse_patch, to, row, rows, column, columns, mask, floats(vals, "vals", mask.nnz));
}

// (w as a matrix, its columns): w of any shape where it is contiguous.
std::pair<Matrix, int64_t> elements(const Tensor& w, Dtype type) {
  if (w.is_contiguous()) return {{w.data_ptr(), type, 1, 1}, 1};
  PK_CHECK(w.dim() == 2, "w must be contiguous or a matrix");
  return {{w.data_ptr(), type, w.stride(0), w.stride(1)}, w.size(1)};
}

Index places(const Tensor& idx, const Tensor& w) {
  const Index out = index_of(idx, "idx", idx.numel());
  PK_CHECK(PK_DISPATCH_ISA(sparse_ascends, out, idx.numel(), w.numel()), "idx must ascend strictly within the ",
           w.numel(), " elements of w");
  return out;
}

void scatter(const Tensor& w, const Tensor& idx, const Tensor& vals, double alpha, bool add) {
  const auto [to, columns] = elements(w, dtype_of(w, "w"));
  const Index at = places(idx, w);
  PK_DISPATCH_ISA(sparse_scatter, to, columns, at, idx.numel(), floats(vals, "vals", idx.numel()),
                  static_cast<float>(alpha), add);
}

// Writes stash into w and returns what was there.
Tensor swap(const Tensor& w, const Tensor& idx, const Tensor& stash) {
  PK_CHECK(stash.scalar_type() == w.scalar_type() && stash.numel() == idx.numel(), "stash must be like w and idx");
  const int64_t bytes = w.element_size();
  PK_CHECK(bytes == 2 || bytes == 4, "w must have 16 or 32 bits");
  check_contiguous(stash, "stash");
  const auto [to, columns] = elements(w, Dtype::f32);
  const Index at = places(idx, w);
  const Tensor old = new_empty(stash, stash.sizes(), stash.scalar_type());
  PK_DISPATCH_ISA(sparse_swap, to, columns, at, idx.numel(), bytes, stash.data_ptr(), old.data_ptr());
  return old;
}

}  // namespace
}  // namespace pk

STABLE_TORCH_LIBRARY_FRAGMENT(PK_OPS, m) {
  m.def("sparse_is_mask(Tensor crow, Tensor col, int m, int n) -> bool");
  m.def("sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col) -> Tensor");
  m.def("sparse_add_(Tensor(a!) y, Tensor x, Tensor vals, Tensor crow, Tensor col) -> ()");
  m.def("sparse_dx_add_(Tensor(a!) dx, Tensor g, Tensor vals, Tensor crow, Tensor col) -> ()");
  m.def("sparse_patch_(Tensor(a!) panel, int row, int column, Tensor vals, Tensor crow, Tensor col, int n) -> ()");
  m.def("sparse_scatter_(Tensor(a!) w, Tensor idx, Tensor vals, float alpha, bool add) -> ()");
  m.def("sparse_swap_(Tensor(a!) w, Tensor idx, Tensor stash) -> Tensor");
}

#ifndef PK_EMULATE
STABLE_TORCH_LIBRARY_IMPL(PK_OPS, CPU, m) {
  m.impl("sparse_is_mask", TORCH_BOX(&pk::is_mask));
  m.impl("sddmm", TORCH_BOX(&pk::sddmm));
  m.impl("sparse_add_", TORCH_BOX(&pk::add));
  m.impl("sparse_dx_add_", TORCH_BOX(&pk::dx_add));
  m.impl("sparse_patch_", TORCH_BOX(&pk::patch));
  m.impl("sparse_scatter_", TORCH_BOX(&pk::scatter));
  m.impl("sparse_swap_", TORCH_BOX(&pk::swap));
}
#endif
