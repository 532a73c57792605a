// Dropout in the CPU kernels of LoRA, in the instruction set that includes it: the mask that README.md defines.
#pragma once

#include <cstring>

#include "common/philox.h"
#include "lora/lora_cpu.h"

namespace pk::PK_ISA {
namespace {

typedef uint16_t halves __attribute__((vector_size(4 * W)));
constexpr int kStep = kLanes * 8;  // columns of one vector of counters, eight of each

// Zeroes the dropped ones among v[0..kStep). Lane l of `left` holds the numbers of columns 8l..8l+3, of `right`
// those of 8l+4..8l+7.
PK_INLINE void keep(float* v, wide left, wide right, halves threshold) {
#ifdef __SSE2__
  // Arranged so that unpacking a 16-bit mask with itself, which stays within 128 bits, gives 32-bit masks in order.
#if defined(__AVX512F__)
  const __m512i first = {0, 2, 8, 10, 1, 3, 9, 11}, second = {4, 6, 12, 14, 5, 7, 13, 15};
  const halves numbers[2] = {(halves)_mm512_permutex2var_epi64((__m512i)left, first, (__m512i)right),
                             (halves)_mm512_permutex2var_epi64((__m512i)left, second, (__m512i)right)};
#elif defined(__AVX2__)
  const halves numbers[2] = {(halves)_mm256_permute2x128_si256((__m256i)left, (__m256i)right, 0x20),
                             (halves)_mm256_permute2x128_si256((__m256i)left, (__m256i)right, 0x31)};
#else
  const halves numbers[2] = {(halves)_mm_unpacklo_epi64((__m128i)left, (__m128i)right),
                             (halves)_mm_unpackhi_epi64((__m128i)left, (__m128i)right)};
#endif
  for (int i = 0; i < 2; ++i) {
    const auto kept = numbers[i] >= threshold;
#if defined(__AVX512F__)
    const ivec mask[2] = {(ivec)_mm512_unpacklo_epi16((__m512i)kept, (__m512i)kept),
                          (ivec)_mm512_unpackhi_epi16((__m512i)kept, (__m512i)kept)};
#elif defined(__AVX2__)
    const ivec mask[2] = {(ivec)_mm256_unpacklo_epi16((__m256i)kept, (__m256i)kept),
                          (ivec)_mm256_unpackhi_epi16((__m256i)kept, (__m256i)kept)};
#else
    const ivec mask[2] = {(ivec)_mm_unpacklo_epi16((__m128i)kept, (__m128i)kept),
                          (ivec)_mm_unpackhi_epi16((__m128i)kept, (__m128i)kept)};
#endif
    for (int j = 0; j < 2; ++j) {
      float* p = v + (2 * i + j) * W;
      store(p, bit_cast<vec>(bit_cast<ivec>(load(p)) & mask[j]));
    }
  }
#else
  for (int i = 0; i < kStep; ++i) {
    const uint64_t four = i % 8 < 4 ? left[i / 8] : right[i / 8];
    if (static_cast<uint16_t>(four >> 16 * (i % 4)) < threshold[0]) v[i] = 0;
  }
#endif
}

// The mask that README.md defines.
class Dropout {
 public:
  Dropout() = default;
  explicit Dropout(const LoraDropout& drop) : philox_(drop.seed, drop.offset), threshold_(drop.threshold) {}

  explicit operator bool() const { return threshold_ > 0; }

  // Zeroes the dropped ones among v[0..n), which are columns col.. (a multiple of 8) of `row`; v is padded to kStep.
  void operator()(float* v, int64_t row, int64_t col, int64_t n) const {
    if (threshold_ > 65535) {
      std::memset(v, 0, n * sizeof(float));
      return;
    }
    // One vector alone would wait on its multiplications; three keep them busy.
    int64_t i = 0;
    for (; n - i > 2 * kStep; i += 3 * kStep) step<3>(v + i, row, col + i);
    for (; i < n; i += kStep) step<1>(v + i, row, col + i);
  }

 private:
  template <int N>
  PK_INLINE void step(float* v, int64_t row, int64_t col) const {
    wide left[N], right[N];
    philox_(static_cast<uint64_t>(col / 8), static_cast<uint32_t>(row), left, right);
    const halves threshold = halves{} + static_cast<uint16_t>(threshold_);
    for (int i = 0; i < N; ++i) keep(v + i * kStep, left[i], right[i], threshold);
  }

  Philox philox_;
  uint32_t threshold_ = 0;
};

}  // namespace
}  // namespace pk::PK_ISA
