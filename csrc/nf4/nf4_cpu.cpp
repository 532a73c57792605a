// Quantise and dequantise on the CPU. README.md has the format.
#include <algorithm>

#include "nf4/nf4_decode.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kLargestBlock = 4096;
constexpr int64_t kGrain = 1 << 14;  // elements that pay for waking a thread

// s of a block of scale absmax, and absmax as it is stored.
struct Scale {
  float absmax, reciprocal;
};

// Of n numbers, padded to whole vectors with zeros.
Scale scale_of(const float* v, int64_t n) {
  vec largest = {}, poison = {};
  for (int64_t i = 0; i < n; i += W) {
    const vec x = load(v + i);
    largest = max(bit_cast<vec>(bit_cast<ivec>(x) & 0x7fffffff), largest);
    poison += x - x;  // 0, or NaN if x is not finite
  }
  const float absmax = hmax(largest) + hsum(poison);
  constexpr float highest = 3.402823466e38f;
  const float reciprocal = 1.0f / absmax;
  return {absmax, reciprocal > highest ? highest : reciprocal};
}

}  // namespace

void nf4_quantize(Dtype type, const void* w, int64_t numel, int64_t shift, uint8_t* bytes, float* absmax) {
  float midpoint[15];
  for (int i = 0; i < 15; ++i) midpoint[i] = static_cast<float>((static_cast<double>(kLevels[i]) + kLevels[i + 1]) / 2);
  const int64_t size = int64_t{1} << shift;
  switch_dtype(type, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(w);
    parallel_for(0, blocks(numel, size), std::max<int64_t>(1, kGrain >> shift), [&](int64_t begin, int64_t end) {
      alignas(64) float v[kLargestBlock];
      alignas(64) int32_t index[kLargestBlock];
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * size, n = at_most(size, numel - first);
        int64_t i = 0;
        for (; i + W <= n; i += W) store(v + i, load(in + first + i));
        if (i < n) store(v + i, load_n(in + first + i, static_cast<int>(n - i)));
        const Scale s = scale_of(v, n);
        absmax[b] = s.absmax;
        for (i = 0; i < n; i += W) {
          const vec y = load(v + i) * splat(s.reciprocal);
          ivec at = ivec{} + 15;  // less one for each midpoint that is not below y: NaN has 15, as bucketize gives
          for (int j = 0; j < 15; ++j) at += (ivec)(y <= splat(midpoint[j]));
          std::memcpy(index + i, &at, sizeof(at));
        }
        if (n % 2) index[n] = 7;
        uint8_t* out = bytes + first / 2;
        for (i = 0; i < (n + 1) / 2; ++i) out[i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
      }
    });
  });
}

void nf4_dequantize(const Nf4& w, int64_t numel, Dtype type, void* out) {
  switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t piece = kLargestBlock;
    parallel_for(0, blocks(numel, piece), kGrain / piece, [&](int64_t begin, int64_t end) {
      alignas(64) float v[piece], room[piece / 32 + 2];
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * piece, n = at_most(piece, numel - first);
        T* to = static_cast<T*>(out) + first;
        if constexpr (sizeof(T) == 4) {
          decode(w, first, n, room, to);
        } else {
          decode(w, first, n, room, v);
          int64_t i = 0;
          for (; i + W <= n; i += W) store(to + i, load(v + i));
          if (i < n) store_n(to + i, load(v + i), static_cast<int>(n - i));
        }
      }
    });
  });
}

float nf4_quantize_absmax(const float* absmax, int64_t n, const float* code, int64_t block2, uint8_t* q,
                          float* absmax2) {
  double total = 0;
  int64_t finite = 0;
  for (int64_t i = 0; i < n; ++i)
    if (std::isfinite(absmax[i])) total += absmax[i], ++finite;
  const auto offset = static_cast<float>(total / static_cast<double>(std::max<int64_t>(finite, 1)));
  float midpoint[255];
  for (int i = 0; i < 255; ++i) midpoint[i] = static_cast<float>((static_cast<double>(code[i]) + code[i + 1]) / 2);
  parallel_for(0, blocks(n, block2), blocks(kGrain / 8, block2), [&](int64_t begin, int64_t end) {
    const Buffer shifted(padded(block2, W));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block2, count = at_most(block2, n - first);
      std::fill_n(shifted.p, padded(count, W), 0.0f);
      for (int64_t i = 0; i < count; ++i) shifted.p[i] = absmax[first + i] - offset;
      const Scale s = scale_of(shifted.p, count);
      absmax2[b] = s.absmax;
      for (int64_t i = 0; i < count; ++i) {
        const float y = shifted.p[i] * s.reciprocal;
        int at = 0;  // midpoints below y; a NaN is below none, and has 255 as bucketize gives
        for (int step = 128; step; step /= 2)
          if (!(y <= midpoint[at + step - 1])) at += step;
        q[first + i] = static_cast<uint8_t>(at);
      }
    }
  });
  return offset;
}

void nf4_dequantize_absmax(const Nf4& w, int64_t n, float* absmax) {
  parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) { scales(w, begin, end - begin, absmax + begin); });
}

}  // namespace pk::PK_ISA
