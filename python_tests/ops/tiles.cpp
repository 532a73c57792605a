// The NF4 products with AMX tiles, emulated, behind a C interface without torch: for test_nf4_tiles.py.
#include "common/parallel.h"
#include "nf4/nf4.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  const int64_t middle = (begin + end) / 2;  // two pieces, each with a configuration of its own
  if (begin < middle) f(begin, middle, context);
  f(middle, end, context);
  return 0;
}

namespace {

pk::Nf4 weights(const uint8_t* bytes, int64_t shift, const float* absmax) {
  return {bytes, shift, absmax, nullptr, nullptr, 0.0f, 1};
}

pk::Nf4Lora low_rank(const float* u, const float* f, int64_t r, float scale) {
  return {u, r, {f, pk::Dtype::f32}, scale, {}};
}

}  // namespace

EXPORT void linear(int64_t m, int64_t n, int64_t k, const void* x, const uint8_t* bytes, int64_t shift,
                   const float* absmax, const float* u, const float* f, int64_t r, void* y) {
  pk::amx::nf4_linear({m, n, k}, pk::Dtype::bf16, x, weights(bytes, shift, absmax), pk::Dtype::f32, nullptr,
                      low_rank(u, f, r, 0.5f), y);
}

EXPORT void dgrad(int64_t m, int64_t n, int64_t k, const void* g, const uint8_t* bytes, int64_t shift,
                  const float* absmax, const float* u, const float* f, int64_t r, void* dx) {
  pk::amx::nf4_dgrad({m, n, k}, pk::Dtype::bf16, g, weights(bytes, shift, absmax), low_rank(u, f, r, 1.0f), dx);
}
