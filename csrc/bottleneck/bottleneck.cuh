// CUDA launchers of the bottleneck for few rows. README.md has the maths. All pointers are of one device, arrays are
// contiguous and row-major, launchers are asynchronous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

constexpr int bottleneck_most_rows = 64;
constexpr int64_t bottleneck_most_weight = 4 << 20;  // elements of wd, and of wu

// data may be null: ones or zeros, whatever changes nothing.
struct BottleneckVector {
  const void* data;
  Dtype type;
};

struct BottleneckShape {
  Dtype type;  // of x
  int rows, in, mid, out;
  const void* x;  // [rows, in]
  bool ln;
  float eps;
  BottleneckVector ln_w, ln_b, bd, bu;
  Strided wd, wu;     // [mid, in], [out, mid], of one type: x's, or f32
  const float* gate;  // [rows] or null
  int act;            // its place in ACTIVATIONS of the contract
  float scale;
  const int64_t* rng;  // (seed, offset), on the device
  uint32_t threshold;  // of 65536; 0 keeps everything
  float keep_scale;
};

// y [rows, out] = residual + scale * gate * (a wu^T + bu), z [rows, mid] = h wd^T + bd, stats [2, rows] = (mean,
// 1 / deviation) with ln. y may be residual. a [bottleneck_kept(s)] is workspace: with none, there is one launch.
struct BottleneckForward {
  BottleneckShape s;
  const void* residual;
  void *y, *z;
  Dtype z_type;
  float *stats, *a;
};

int64_t bottleneck_kept(const BottleneckShape& s);
cudaError_t bottleneck_cuda(const BottleneckForward& f, cudaStream_t stream);

// The gradients that are not null; each has the type of its argument, dgate is fp32. dx has g within if own_residual.
// z and stats are the forward's, workspace [bottleneck_backward_kept(s)].
struct BottleneckBackward {
  BottleneckShape s;
  const void *g, *z;  // [rows, out], of the type of x; [rows, mid]
  Dtype z_type;
  const float* stats;
  bool own_residual;
  void *dx, *dln_w, *dln_b, *dwd, *dbd, *dwu, *dbu;
  float *dgate, *workspace;
};

int64_t bottleneck_backward_kept(const BottleneckShape& s);
cudaError_t bottleneck_backward_cuda(const BottleneckBackward& b, cudaStream_t stream);

}  // namespace pk
