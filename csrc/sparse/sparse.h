// What the glue (sparse.cpp) and the CPU kernels (sparse_cpu.cpp) agree on.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/switch.h"

namespace pk {

// Indices, int32 or int64.
struct Index {
  const void* data;
  bool wide;
};

// A mask [m, n] with nnz entries in CSR.
struct Mask {
  Index crow, col;
  int64_t m, n, nnz;
};

// Rows of a matrix: element (i, j) lies at i * row + j * next.
struct Matrix {
  void* data;
  Dtype type;
  int64_t row, next;
};

}  // namespace pk

// Whether the mask is what README.md says, and whether idx [nnz] ascends within [0, size).
PK_DECLARE_ISA(bool sparse_is_mask(Mask mask); bool sparse_ascends(Index idx, int64_t nnz, int64_t size);
               // out[e] = sum over t of dy[t, row e] x[t, col e]; dy [tokens, m] and x [tokens, n] contiguous
               void sddmm(Dtype type, const void* dy, const void* x, int64_t tokens, Mask mask, float* out);
               // y += x D^T; y [tokens, m] and x [tokens, n] contiguous
               void sparse_add(Dtype type, void* y, const void* x, int64_t tokens, Mask mask, const float* vals);
               // dx += g D; dx [tokens, n] and g [tokens, m] contiguous
               void sparse_dx_add(Dtype type, void* dx, const void* g, int64_t tokens, Mask mask, const float* vals);
               // panel += D[row : row + rows, column : column + columns]
               void sparse_patch(Matrix panel, int64_t row, int64_t rows, int64_t column, int64_t columns, Mask mask,
                                 const float* vals);
               // Element f of w, counted as if it were contiguous, lies at f, or where it is a matrix with `columns`
               // columns, at (f / columns, f % columns).
               void sparse_scatter(Matrix w, int64_t columns, Index idx, int64_t nnz, const float* vals, float alpha,
                                   bool add);
               // 2 or 4 bytes each; old [nnz] receives what was there
               void sparse_swap(Matrix w, int64_t columns, Index idx, int64_t nnz, int64_t bytes, const void* in,
                                void* old);)
