// CUDA launchers of rescale. Shapes: x, y, g, dx [rows, n]; l, dl [n]; partial [rescale_chunks(rows), n] fp32 scratch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

// A function of the shape alone, so that the order of the sum, and with it every bit, is too.
int64_t rescale_chunks(int64_t rows);

cudaError_t rescale_fwd_cuda(Dtype x_type, const void* x, Dtype l_type, const void* l, void* y, int64_t rows, int64_t n,
                             cudaStream_t stream);

// dx may be null.
cudaError_t rescale_bwd_cuda(Dtype x_type, const void* g, const void* x, Dtype l_type, const void* l, void* dx,
                             void* dl, float* partial, int64_t rows, int64_t n, cudaStream_t stream);

}  // namespace pk
