// Argument checks of the glue. They run before nested aten calls and outside parallel_for, or their text is lost.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "common/switch.h"

#ifdef PK_WITH_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif

#define PK_CHECK STD_TORCH_CHECK

// Where the glue registers its ops, and for which tensors the launchers of .cu files are.
#ifdef PK_EMULATE  // the CUDA kernels on the CPU, for tests: emulate/cuda_runtime.h
#define PK_OPS _peft_kernels_emulated
#define PK_CUDA_KEY CPU
#else
#define PK_OPS _peft_kernels
#define PK_CUDA_KEY CUDA
#endif

namespace pk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      PK_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline void check_contiguous(const Tensor& t, const char* name) {
  PK_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_same_device(const Tensor& a, const Tensor& b, const char* names) {
  PK_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), names,
           " must be on the same device");
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* names) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  PK_CHECK(same, names, " must have the same shape");
}

// Memory that the allocator has just mapped costs a page fault every 4 KiB, which can take longer than the kernel that
// fills it. Large tensors ask for huge pages, as torch does under THP_MEM_ALLOC_ENABLE=1; it is no error if there are
// none.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096;
  if (bytes < int64_t{4} << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised and contiguous, on the device of `like`. The C shim costs a third of a call through the dispatcher.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, like.get_device_index(), &out));
  const Tensor made(out);
  if (!made.is_cuda()) prefer_huge_pages(made.data_ptr(), made.numel() * made.element_size());
  return made;
}

#ifdef PK_EMULATE
inline bool on_cuda(const Tensor&) { return true; }
inline cudaStream_t stream_of(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#elif defined(PK_WITH_CUDA)
using torch::stable::accelerator::DeviceGuard;
inline bool on_cuda(const Tensor& t) { return t.is_cuda(); }
inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

#ifdef PK_WITH_CUDA
inline void check_cuda(cudaError_t code, const char* what) {
  PK_CHECK(code == cudaSuccess, what, ": ", cudaGetErrorString(code));
}
#endif

}  // namespace pk
