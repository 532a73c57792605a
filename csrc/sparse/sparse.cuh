// CUDA launchers of sparse training. README.md has the formulas and the byte counts. All pointers are of one device,
// scores, vals and the like contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/switch.h"

namespace pk {

// -- sddmm ------------------------------------------------------------------------------------------------------------

// dy [tokens, m], x [tokens, n], fp32 sums. The mask is CSR: crow [m + 1], col [nnz], of 64 or of 32 bits.
struct SddmmCuda {
  Dtype type;
  const void *dy, *x;
  int64_t tokens, m, n, nnz;  // all but tokens below 2^30
  bool wide_indices;
  const void *crow, *col;
};

// The sum is cut over tokens where a mask has few tiles: a function of the shapes alone.
int sddmm_splits(const SddmmCuda& s);
// vals [nnz]; parts [splits, nnz] if splits > 1
cudaError_t sddmm_cuda(const SddmmCuda& s, float* vals, float* parts, int splits, cudaStream_t stream);

// -- the largest of many tensors --------------------------------------------------------------------------------------

// One kernel reads so many tensors; of more, several launches do.
constexpr int scores_of_launch = 64;

struct ScoresCuda {
  const void* data;
  int64_t numel;
  Dtype type;
};

constexpr int64_t topk_state_bytes = (2048 + 4) * 8;
// state: topk_state_bytes of scratch
cudaError_t topk_threshold_cuda(const ScoresCuda* scores, int64_t tensors, int64_t k, bool use_abs, void* state,
                                float* threshold, int64_t* n_above, int64_t* n_nan, cudaStream_t stream);

// Chunks that the scores are cut into, and so many pairs of counts and of their sums over the chunks before.
int64_t topk_chunks(const ScoresCuda* scores, int64_t tensors);
// counts [chunks, 2] and before [chunks + 1, 2] of scratch; positions [k], -1 from count on, which may be over k
cudaError_t topk_compact_cuda(const ScoresCuda* scores, int64_t tensors, const float* threshold, int64_t k,
                              bool use_abs, uint32_t* counts, int64_t* before, int64_t* positions, int64_t* count,
                              cudaStream_t stream);

// -- optimizer --------------------------------------------------------------------------------------------------------

// One step on nnz values. step: the number of this step, on the device, or null, and then `step_number` is.
struct SparseAdamwCuda {
  int64_t nnz;
  const float *vals, *m, *v;
  float *vals_out, *m_out, *v_out;  // may be the same
  Dtype grad_type;
  const void* grad;
  const float* step;
  double step_number;
  Dtype w_type;
  const void* w;  // or null: decay pulls vals, instead of w[idx] + vals
  bool wide_indices;
  const void* idx;  // null: w has the nnz numbers themselves
  double lr, beta1, beta2, eps, weight_decay;
};
cudaError_t sparse_adamw_cuda(const SparseAdamwCuda& a, cudaStream_t stream);

}  // namespace pk
