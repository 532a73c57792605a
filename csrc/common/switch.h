// The element types as kernels see them, without torch, and the switch from the run-time type to the C++ one.
#pragma once

#include <cstdint>
#include <utility>

namespace pk {

enum class Dtype : int { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A matrix in memory: element (i, j) lies at i * row + j * next.
struct Strided {
  const void* data;
  Dtype type;
  int64_t row, next;
};

// Calls f(T{}) with T one of float, bf16, f16. Use: switch_dtype(type, [&](auto t) { using T = decltype(t); ... });
template <class F>
inline __attribute__((always_inline)) auto switch_dtype(Dtype type, F&& f) {
  switch (type) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

}  // namespace pk
