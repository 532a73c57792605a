// CUDA launchers of kron. README.md has the maths. All pointers are of one device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

// Element (i, j) lies at i * row + j * column.
struct KronFactorCuda {
  const void* data;
  Dtype type;  // x's, or f32
  int64_t row, column;
};

// y [m, q s] = acc + scale * x (a kron b) + bias; x [m, p r], y and acc contiguous, of one type of 16 bits. acc, which
// may be y, and bias [q s], fp32, may be null.
struct KronLinearCuda {
  Dtype type;
  int64_t m;
  int p, q, r, s;
  const void* x;
  KronFactorCuda a, b;  // [p, q], [r, s]
  const void* acc;
  const float* bias;
  float scale;
  void* y;
};

constexpr int kron_most = 128;  // p and r
cudaError_t kron_linear_cuda(const KronLinearCuda& k, cudaStream_t stream);

// da [p, q] = scale * sum over m of X b G^T and db [r, s] = scale * sum of X^T a G, of the type of a and b; either may
// be null. x as above, g [m, q s] of its type. parts [kron_parts(k), p q + r s], whose number follows from shapes.
struct KronFactorsCuda {
  Dtype type;
  int64_t m;
  int p, q, r, s;
  const void *x, *g;
  KronFactorCuda a, b;
  float scale;
  void *da, *db;
};

constexpr int kron_factors_most = 64;  // of all four sides
int64_t kron_parts(const KronFactorsCuda& k);
cudaError_t kron_factors_cuda(const KronFactorsCuda& k, float* parts, cudaStream_t stream);

}  // namespace pk
