// CUDA launchers of the Hadamard ops. README.md has the formulas and the byte counts. Arrays are contiguous and of one
// device; `room` is scratch of so many floats as the function of that name says, aligned to 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

constexpr int most_levels = 26;  // of a transform: 2^26 numbers

// y [rows, n] = scale * the first n of H pad(x), n from 1 to 2^26
struct FwhtCuda {
  Dtype type;
  const void* x;
  void* y;
  int64_t rows, n;
  float scale;
};
int64_t fwht_room(const FwhtCuda& f);
cudaError_t fwht_cuda(const FwhtCuda& f, float* room, cudaStream_t stream);

// The constant part of P: theta [d] -> [numel]. n = 2^m is at least numel and k, the power of two that holds d.
struct FastfoodCuda {
  int64_t d, numel, n;
  const int8_t* sign;  // [d], +-1
  bool wide_places;
  const void* places;  // [n], 16 or 32 bits, from 0 to k - 1
  bool fixed_point;
  const void* g;  // [n], 16 bits with 12 behind the point, or fp32
};
constexpr int64_t fastfood_most = 1 << 15;  // of d

// out [numel] = base + scale * P theta; base may be null.
int64_t fastfood_room(const FastfoodCuda& f, Dtype out_type);
cudaError_t fastfood_cuda(const FastfoodCuda& f, Dtype theta_type, const void* theta, float scale, Dtype out_type,
                          const void* base, void* out, float* room, cudaStream_t stream);

// dtheta [d] = scale * P^T dy, dy [numel]
int64_t fastfood_backward_room(const FastfoodCuda& f);
cudaError_t fastfood_backward_cuda(const FastfoodCuda& f, Dtype type, const void* dy, float scale, float* dtheta,
                                   float* room, cudaStream_t stream);

}  // namespace pk
