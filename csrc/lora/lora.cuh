// The CUDA kernels of LoRA as the glue calls them: raw device pointers to contiguous, row-major arrays. A factor has
// the dtype of the array that streams past it (u or y), or fp32. Counts of parts follow from shapes alone, so that the
// order of every sum does too. All launchers are asynchronous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

// Which rows are whose. A slot is a place in a tile of block_m rows; v (t or dt) has a row for each slot.
struct LoraRows {
  bool planned;          // else one adapter has all rows, and slot i is row i
  const int32_t* plan;   // [tiles, 1 + block_m] of README.md
  const void* r_indptr;  // [adapters + 1], int64 if indptr64, else int32
  const float* scaling;  // [adapters]
  bool indptr64;
  int m, tiles, block_m;  // rows of x; with a plan there are tiles * block_m slots, else m
  int adapters, r_max;    // no adapter has more ranks than r_max, which is the width of v
};

// Element (rank, column) is data[rank * rank_stride + column * column_stride]; with a plan, of the whole bank.
template <class Void>
struct LoraFactor {
  Void* data;
  Dtype type;
  int64_t rank_stride, column_stride;
};

struct LoraStream {  // x, y, g or dx
  void* data;
  Dtype type;
  int columns;
};

struct LoraRng {
  const int64_t* rng = nullptr;  // (seed, offset), on the device
  uint32_t threshold = 0;        // of 65536; 0 keeps everything
};

// Which tiles suit this many rows of one adapter.
int lora_block_m(int64_t m);

// parts [splits, slots, r_max] = scale * scaling * drop(u) f^T, to be added up.
int lora_shrink_splits(const LoraRows& rows, const LoraStream& u);
cudaError_t lora_shrink_cuda(const LoraRows& rows, const LoraStream& u, const LoraFactor<const void>& f, float scale,
                             const LoraRng& drop, float* parts, int splits, cudaStream_t stream);

// y += scale * mask * (v f), v being the sum of the parts, which also goes to `sum` [slots, r_max] if that is not null.
cudaError_t lora_expand_cuda(const LoraRows& rows, const LoraStream& y, const LoraFactor<const void>& f, float scale,
                             const LoraRng& drop, const float* parts, int splits, float* sum, cudaStream_t stream);

// out = scale * v^T drop(u), zeros for an adapter without rows; partial [splits, out's elements] if splits > 1.
int lora_wgrad_splits(const LoraRows& rows, const LoraStream& u);
cudaError_t lora_wgrad_cuda(const LoraRows& rows, const LoraStream& u, const float* v, float scale, const LoraRng& drop,
                            const LoraFactor<void>& out, int64_t out_size, float* partial, int splits,
                            cudaStream_t stream);

// out [size] = the sum of parts [splits, size].
cudaError_t lora_sum_cuda(const float* parts, int splits, int64_t size, void* out, Dtype out_type, cudaStream_t stream);

// shrink and expand in one launch, for few rows on a GPU with clusters; t [slots, r_max] or null.
bool lora_can_decode(const LoraRows& rows, const LoraStream& x, const LoraStream& y, Dtype factors);
cudaError_t lora_decode_cuda(const LoraRows& rows, const LoraStream& x, const LoraStream& y,
                             const LoraFactor<const void>& a, const LoraFactor<const void>& b, float t_scale,
                             float y_scale, const LoraRng& drop, float* t, cudaStream_t stream);

}  // namespace pk
