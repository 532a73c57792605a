// Walsh-Hadamard transforms on CUDA. README.md has the formulas.
#include "hadamard/hadamard_tile.cuh"

namespace pk {

namespace hadamard {
namespace {

template <class Source>
cudaError_t to_held(const Plan& plan, int64_t rows, const Source& source, const Held& held, cudaStream_t stream) {
  const cudaError_t code = along_rows(plan, held.held >> plan.tile, rows, source, held.sink(), stream);
  return code == cudaSuccess ? second_pass(plan, rows, held, stream) : code;
}

template <class Source, class Sink>
cudaError_t transform(const Plan& plan, int64_t rows, const Source& source, const Sink& sink, const Held& held,
                      cudaStream_t stream) {
  if (plan.passes == 1) return in_one<any_tile>(plan, rows, source, sink, stream);
  const cudaError_t code = to_held(plan, rows, source, held, stream);
  if (code != cudaSuccess) return code;
  return along_columns(plan, plan.passes - 1, plan.tiles(), rows, held.source(), sink, stream);
}

}  // namespace

cudaError_t first_passes(const Plan& plan, Dtype type, const void* x, int64_t rows, int64_t n, const Held& held,
                         cudaStream_t stream) {
  return switch_dtype(
      type, [&](auto t) { return to_held(plan, rows, numbers_of<decltype(t)>(x, nullptr, rows, n), held, stream); });
}

cudaError_t second_pass(const Plan& plan, int64_t rows, const Held& held, cudaStream_t stream) {
  if (plan.passes < 3) return cudaSuccess;
  return along_columns(plan, 1, held.held >> plan.tile, rows, held.source(), held.sink(), stream);
}

cudaError_t transform_theta(Dtype type, const void* theta, const int8_t* sign, int64_t d, float* table, int64_t k,
                            cudaStream_t stream) {
  return switch_dtype(type, [&](auto t) {
    return transform(plan_of_rows(levels_of(k)), 1, numbers_of<decltype(t)>(theta, sign, 1, d),
                     written_to<float>(table, nullptr, 1.0f, 1, k), {table, 1, k}, stream);
  });
}

cudaError_t transform_sums(float* sums, int64_t k, const int8_t* sign, float scale, float* dtheta, int64_t d,
                           cudaStream_t stream) {
  auto sink = written_to<float>(dtheta, nullptr, scale, 1, d);
  sink.sign = sign, sink.wide = false;
  return transform(plan_of_rows(levels_of(k)), 1, numbers_of<float>(sums, nullptr, 1, k), sink, {sums, 1, k}, stream);
}

}  // namespace hadamard

using namespace hadamard;

int64_t fwht_room(const FwhtCuda& f) {
  const int64_t held = plan_of_rows(levels_of(f.n)).held(f.n);
  return f.type == Dtype::f32 && held == f.n ? 0 : f.rows * held;
}

cudaError_t fwht_cuda(const FwhtCuda& f, float* room, cudaStream_t stream) {
  if (f.rows == 0) return cudaSuccess;
  const Plan plan = plan_of_rows(levels_of(f.n));
  const int64_t held = plan.held(f.n);
  return switch_dtype(f.type, [&](auto t) {
    using T = decltype(t);
    if (std::is_same_v<T, float> && held == f.n) room = static_cast<float*>(f.y);
    return transform(plan, f.rows, numbers_of<T>(f.x, nullptr, f.rows, f.n),
                     written_to<T>(f.y, nullptr, f.scale, f.rows, f.n), {room, f.rows, held}, stream);
  });
}

}  // namespace pk
