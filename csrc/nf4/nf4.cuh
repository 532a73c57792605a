// The CUDA kernels of NF4 as the glue calls them: raw device pointers to contiguous, row-major arrays. Counts of parts
// follow from shapes alone, so that the order of every sum does too. All launchers are asynchronous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

// Packed weights, all of it on the device. If q is null, absmax holds the scale of each block, otherwise that of each
// block2 of scales.
struct Nf4Cuda {
  const uint8_t* bytes;
  int64_t shift;  // log2 of the block size
  const float* absmax;
  const uint8_t* q;
  const float *code, *offset;
  int64_t block2;
};

cudaError_t nf4_quantize_cuda(Dtype type, const void* w, int64_t numel, int64_t shift, uint8_t* bytes, float* absmax,
                              cudaStream_t stream);

// out [rows, columns] = weights first + row * stride + column
struct Nf4Part {
  int64_t first, stride, rows, columns;
};
cudaError_t nf4_dequantize_cuda(const Nf4Cuda& w, const Nf4Part& part, Dtype type, void* out, cudaStream_t stream);

cudaError_t nf4_quantize_absmax_cuda(const float* absmax, int64_t n, const float* code, int64_t block2, uint8_t* q,
                                     float* absmax2, float* offset, cudaStream_t stream);
cudaError_t nf4_dequantize_absmax_cuda(const Nf4Cuda& w, int64_t n, float* absmax, cudaStream_t stream);

// -- products with few rows -------------------------------------------------------------------------------------------

struct Nf4Product {
  Dtype type;   // of x, y, g and dx
  int m, n, k;  // x, dx [m, k]   w [n, k]   y, g [m, n]
};

int nf4_few_rows(Dtype type);  // the most that these kernels take

// An update of low rank of the result, scale * v f, v [m, ranks] being the sum of `parts` arrays, which goes to `sum`
// if that is not null. Element (rank, column) of f is f[rank * rank_stride + column * column_stride].
struct Nf4Update {
  const float* v = nullptr;
  int parts = 0, ranks = 0;
  const void* f = nullptr;
  Dtype type = Dtype::f32;  // of f
  int64_t rank_stride = 0, column_stride = 0;
  float scale = 0;
  float* sum = nullptr;
};

// y = x w^T + bias, where bias may be null, and dx = g w, both with the update. parts [splits, y's or dx's elements] if
// splits > 1.
int nf4_linear_splits(const Nf4Product& p);
cudaError_t nf4_linear_cuda(const Nf4Product& p, const void* x, const Nf4Cuda& w, Dtype bias_type, const void* bias,
                            const Nf4Update& update, void* y, float* parts, int splits, cudaStream_t stream);

int nf4_dgrad_splits(const Nf4Product& p);
cudaError_t nf4_dgrad_cuda(const Nf4Product& p, const void* g, const Nf4Cuda& w, const Nf4Update& update, void* dx,
                           float* parts, int splits, cudaStream_t stream);

}  // namespace pk
