#include "sparse/sparse_select.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>

#include "common/cpu.h"
#include "common/pairs.h"

namespace pk::PK_ISA {
namespace {

// -- top-k ----------------------------------------------------------------------------------------------------------

constexpr int64_t kSmallChunk = 1 << 16;  // elements: chunks are no smaller, and no more than kChunks
constexpr int64_t kChunks = 256;
constexpr int64_t kSample = 1 << 14;  // elements of a sample, and a sixteenth of what is worth one
constexpr int64_t kBlock = 4096;      // elements whose chosen are buffered before they are kept

constexpr uint32_t kAll = (1u << W) - 1;

// A bit for each lane.
PK_INLINE uint32_t lanes(ivec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// Stores the lanes of v whose bits are set side by side; may write W. Returns their number.
template <class V>
PK_INLINE int64_t compress(V* to, vec v, uint32_t bits) {
  static_assert(sizeof(V) == 4);
#if defined(__AVX512F__)
  // In a register: a compressing store to memory is many times slower on AMD.
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, (__m512i)v));
  return __builtin_popcount(bits);
#else
  V lane[W];
  std::memcpy(lane, &v, sizeof(v));
  int64_t n = 0;
  for (; bits; bits &= bits - 1) to[n++] = lane[__builtin_ctz(bits)];
  return n;
#endif
}

// Numbers whose unsigned order is that of the floats, with -0 at 0.
PK_INLINE uvec keys(vec v) {
  const ivec bits = bit_cast<ivec>(v + vec{});
  return bit_cast<uvec>(bits ^ ((bits >> 31) | INT32_MIN));
}

float unkey(uint32_t key) { return bit_cast<float>(key & 0x80000000 ? key & 0x7fffffff : ~key); }

// The tensors end to end, in equal chunks that do not depend on the number of threads.
class Joined {
 public:
  Joined(const std::vector<Scores>& scores, bool use_abs) : scores_(scores), mask_(use_abs ? INT32_MAX : -1) {
    for (const Scores& s : scores) {
      starts_.push_back(total);
      total += s.n;
    }
    size = std::max(kSmallChunk, (total + kChunks - 1) / kChunks);
    count = (total + size - 1) / size;
  }

  template <class T>
  PK_INLINE vec at(const T* p) const {
    return masked(load(p));
  }
  template <class T>
  PK_INLINE vec at(const T* p, int n) const {
    return masked(load_n(p, n));
  }

  float one(int64_t position) const {
    const size_t i = holder(position);
    const float v = switch_dtype(scores_[i].type, [&](auto t) {
      return widen(static_cast<const decltype(t)*>(scores_[i].data)[position - starts_[i]]);
    });
    return bit_cast<float>(bit_cast<int32_t>(v) & mask_);
  }

  // f(p, n, first) for each piece of a tensor in the chunk, p[0] at position `first` of the chunk.
  template <class F>
  void pieces(int64_t chunk, const F& f) const {
    const int64_t begin = chunk * size, end = std::min(total, begin + size);
    int64_t at = begin;
    for (size_t i = holder(begin); at < end; ++i) {
      const int64_t n = std::min(end, starts_[i] + scores_[i].n) - at;
      if (n <= 0) continue;
      switch_dtype(scores_[i].type, [&](auto t) {
        f(static_cast<const decltype(t)*>(scores_[i].data) + (at - starts_[i]), n, at - begin);
      });
      at += n;
    }
  }

  int64_t total = 0, size, count;

 private:
  PK_INLINE vec masked(vec v) const { return bit_cast<vec>(bit_cast<ivec>(v) & mask_); }

  size_t holder(int64_t position) const {
    return std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
  }

  const std::vector<Scores>& scores_;
  std::vector<int64_t> starts_;
  int32_t mask_;
};

// f(v, n) over all elements of p[0..n): W in v, or the first of them at the end.
template <class T, class F>
PK_INLINE void vectors(const Joined& all, const T* p, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(all.at(p + i), W, i);
  if (i < n) f(all.at(p + i, n - i), static_cast<int>(n - i), i);
}

// The k-th largest by three histograms of its key: the upper 11 bits of all, then the next of those that share them.
Threshold by_radix(const Joined& all, int64_t k) {
  constexpr int kBins = 1 << 11, kWays = 4;  // equal neighbours count in different ways, or each waits for the last
  std::vector<int64_t> sums(all.count * kBins), nan(all.count);
  uint32_t prefix = 0;
  int64_t above = 0;
  for (const int shift : {21, 10, 0}) {
    const int high = shift == 21 ? 32 : shift == 10 ? 21 : 10;
    std::fill(sums.begin(), sums.end(), 0);
    parallel_for(0, all.count, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint32_t[]> bins(new uint32_t[kWays * kBins]);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        std::fill(bins.get(), bins.get() + kWays * kBins, 0);
        int64_t found = 0;
        all.pieces(chunk, [&](const auto* p, int64_t n, int64_t) {
          vectors(all, p, n, [&](vec v, int count, int64_t) {
            uint32_t key[W];
            const uvec wide_keys = keys(v);
            std::memcpy(key, &wide_keys, sizeof(key));
            if (high == 32) {
              const uint32_t unordered = lanes(v != v) & static_cast<uint32_t>((1ull << count) - 1);
              found += __builtin_popcount(unordered);
              for (int l = 0; l < count; ++l) ++bins[l % kWays * kBins + (key[l] >> shift)];
            } else {
              for (int l = 0; l < count; ++l)
                if (key[l] >> high == prefix) ++bins[l % kWays * kBins + (key[l] >> shift) % (1u << (high - shift))];
            }
          });
        });
        if (high == 32) nan[chunk] = found;
        for (int b = 0; b < kWays * kBins; ++b) sums[chunk * kBins + b % kBins] += bins[b];
      }
    });
    for (int64_t chunk = 1; chunk < all.count; ++chunk)
      for (int b = 0; b < kBins; ++b) sums[b] += sums[chunk * kBins + b];
    int bin = (1 << (high - shift)) - 1;
    for (; bin > 0 && above + sums[bin] < k; --bin) above += sums[bin];
    prefix = prefix << (high - shift) | static_cast<uint32_t>(bin);
  }
  int64_t nans = 0;
  for (const int64_t n : nan) nans += n;
  return {unkey(prefix), above, nans};
}

// Two elements of a sample between which the k-th largest nearly surely lies: low, high.
std::pair<float, float> bracket(const Joined& all, int64_t k) {
  std::vector<float> sample(kSample);
  const int64_t step = all.total / kSample;
  for (int64_t i = 0; i < kSample; ++i) {
    uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15;  // no period that the scores might have too
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9;
    const float v = all.one(i * step + static_cast<int64_t>((mixed >> 32) % static_cast<uint64_t>(step)));
    sample[i] = v == v ? v : 0;
  }
  const double share = static_cast<double>(k) / static_cast<double>(all.total), rank = share * kSample;
  const double margin = 4 * std::sqrt(rank * (1 - share)) + 8;
  const auto ranked = [&](double from_top) {
    if (from_top < 0) return HUGE_VALF;
    if (from_top >= kSample) return -HUGE_VALF;
    const auto it = sample.begin() + static_cast<int64_t>(from_top);
    std::nth_element(sample.begin(), it, sample.end(), [](float a, float b) { return a > b; });
    return *it;
  };
  const float low = ranked(rank + margin), high = ranked(rank - margin);
  return {low, high};
}

// Reads the scores once: counts those beyond and at the ends of the bracket, keeps those inside. Nothing where the
// bracket missed.
std::optional<Threshold> by_sample(const Joined& all, int64_t k) {
  struct Part {
    int64_t above = 0, high = 0, low = 0, nan = 0;
    std::vector<float> inside;
  };
  const auto [low, high] = bracket(all, k);
  const vec lows = splat(low), highs = splat(high);
  std::vector<Part> parts(all.count);
  parallel_for(0, all.count, 1, [&, low = low, high = high](int64_t begin, int64_t end) {
    float buffer[kBlock + W];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Part& part = parts[chunk];
      all.pieces(chunk, [&](const auto* whole, int64_t total, int64_t) {
        for (int64_t first = 0; first < total; first += kBlock) {
          const auto* p = whole + first;
          const int64_t n = std::min(kBlock, total - first);
          int64_t kept = 0, i = 0;
          ivec above = {}, at_high = {}, at_low = {}, nan = {};  // minus the numbers of each lane
          for (; i + W <= n; i += W) {
            const vec v = all.at(p + i);
            if (lanes(v < lows) == kAll) continue;
            above += v > highs;
            at_high += v == highs;
            at_low += v == lows;
            nan += v != v;
            if (const uint32_t bits = lanes((v > lows) & (v < highs))) kept += compress(buffer + kept, v, bits);
          }
          for (int l = 0; l < W; ++l) {
            part.above -= above[l], part.high -= at_high[l], part.low -= at_low[l], part.nan -= nan[l];
          }
          if (i < n) {
            const vec v = all.at(p + i, n - i);
            for (int l = 0; l < n - i; ++l) {
              part.above += v[l] > high, part.high += v[l] == high, part.low += v[l] == low, part.nan += v[l] != v[l];
              if (v[l] > low && v[l] < high) buffer[kept++] = v[l];
            }
          }
          part.inside.insert(part.inside.end(), buffer, buffer + kept);
        }
      });
    }
  });
  Part sum;
  for (const Part& part : parts) {
    sum.above += part.above, sum.high += part.high, sum.low += part.low, sum.nan += part.nan;
    sum.inside.insert(sum.inside.end(), part.inside.begin(), part.inside.end());
  }
  int64_t left = k - sum.above;
  if (left <= 0) return {};
  if (left <= sum.high) return Threshold{high + 0.0f, sum.above, sum.nan};
  left -= sum.high;
  const auto inside = static_cast<int64_t>(sum.inside.size());
  if (left <= inside) {
    const std::vector<Scores> few = {{Dtype::f32, sum.inside.data(), inside}};
    const Threshold found = by_radix(Joined(few, false), left);
    return Threshold{found.value, sum.above + sum.high + found.above, sum.nan};
  }
  left -= inside;
  if (low == high || left > sum.low) return {};
  return Threshold{low + 0.0f, sum.above + sum.high + inside, sum.nan};
}

// Writes the positions of a chunk's scores above `bar`, and of the first `ties` equal ones, or of every one.
void compact(const Joined& all, int64_t chunk, float bar, int64_t ties, bool every, int64_t* out, int64_t* end) {
  uint32_t buffer[kBlock + W];
  ivec lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  const vec bars = splat(bar);
  all.pieces(chunk, [&](const auto* whole, int64_t total, int64_t start) {
    for (int64_t first = 0; first < total; first += kBlock) {
      int64_t kept = 0;
      vectors(all, whole + first, std::min(kBlock, total - first), [&](vec v, int n, int64_t i) {
        const uint32_t present = static_cast<uint32_t>((1ull << n) - 1);
        uint32_t bits = (ties > 0 ? lanes(v >= bars) : lanes(v > bars)) & present;
        if (!bits) return;
        if (ties > 0 && !every)
          for (uint32_t equal = lanes(v == bars) & bits; equal; equal &= equal - 1)
            ties > 0 ? void(--ties) : void(bits &= ~(equal & -equal));
        kept += compress(buffer + kept, bit_cast<vec>(lane + static_cast<int32_t>(first + i)), bits);
      });
      const int64_t at = chunk * all.size + start, room = std::min(kept, end - out);
      for (int64_t i = 0; i < room; ++i) out[i] = at + buffer[i];
      out += std::max<int64_t>(room, 0);
    }
  });
}

}  // namespace

Threshold topk_threshold(const std::vector<Scores>& scores, int64_t k, bool use_abs) {
  const Joined all(scores, use_abs);
  if (all.total >= 16 * kSample) {
    if (const auto found = by_sample(all, k)) return *found;
  }
  return by_radix(all, k);
}

// Counts first, so that each chunk knows where its positions belong and how many of its ties are chosen.
int64_t topk_compact(const std::vector<Scores>& scores, float threshold, int64_t k, bool use_abs, int64_t* out) {
  const Joined all(scores, use_abs);
  const vec bar = splat(threshold);
  std::vector<int64_t> above(all.count), tied(all.count);
  parallel_for(0, all.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t over = 0, equal = 0;
      all.pieces(chunk, [&](const auto* p, int64_t n, int64_t) {
        vectors(all, p, n, [&](vec v, int count, int64_t) {
          const uint32_t bits = lanes(v >= bar) & static_cast<uint32_t>((1ull << count) - 1);
          if (!bits) return;
          const uint32_t ties = lanes(v == bar) & bits;
          over += __builtin_popcount(bits & ~ties);
          equal += __builtin_popcount(ties);
        });
      });
      above[chunk] = over, tied[chunk] = equal;
    }
  });
  int64_t found = 0;
  for (const int64_t n : above) found += n;
  int64_t budget = std::max<int64_t>(0, k - found);
  std::vector<int64_t> starts(all.count), ties(all.count);
  found = 0;
  for (int64_t c = 0; c < all.count; ++c) {
    starts[c] = found;
    ties[c] = std::min(budget, tied[c]);
    budget -= ties[c];
    found += above[c] + ties[c];
  }
  parallel_for(0, all.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      if (above[c] + ties[c] > 0)
        compact(all, c, threshold, ties[c], ties[c] == tied[c], out + std::min(k, starts[c]), out + k);
  });
  std::fill(out + std::min(k, found), out + k, -1);
  return found;
}

// -- Fisher ---------------------------------------------------------------------------------------------------------

void fisher_accum(Dtype f_type, void* f, Dtype g_type, const void* g, int64_t n, float weight, bool absolute) {
  const vec w = splat(weight);
  const ivec mask = ivec{} + INT32_MAX;
  switch_dtype(f_type, [&](auto tf) {
    switch_dtype(g_type, [&](auto tg) {
      auto* sum = static_cast<decltype(tf)*>(f);
      const auto* in = static_cast<const decltype(tg)*>(g);
      const auto added = [&](vec total, vec v) {
        return fma(w, absolute ? bit_cast<vec>(bit_cast<ivec>(v) & mask) : v * v, total);
      };
      parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + W <= end; i += W) store(sum + i, added(load(sum + i), load(in + i)));
        const int left = static_cast<int>(end - i);
        if (left > 0) store_n(sum + i, added(load_n(sum + i, left), load_n(in + i, left)), left);
      });
    });
  });
}

namespace {

// A tile of f in registers, of which there are 32 or 16, then the tile that stays in the second-level cache while all
// samples pass, and how many words along the rows are packed at a time.
#if defined(__AVX512F__)
constexpr int kDown = 12;
#else
constexpr int kDown = 6;
#endif
constexpr int kAcross = 2 * W, kTileDown = 96, kTileAcross = 256, kDepth = 128;
constexpr int kTile = kTileDown * kTileAcross, kMicro = kDown * kAcross;

// The first n words at `from`, or of that row and the one below, which may be missing.
template <class T>
PK_INLINE uvec words(const T* from, [[maybe_unused]] const T* below, int n) {
#ifdef __AVX512BF16__
  if constexpr (kPairs<T>) {
    const auto row = [&](const T* p) { return __builtin_convertvector(load_bits_n(p, n), uvec); };
    return below ? row(from) | row(below) << 16 : row(from);
  }
#endif
  return bit_cast<uvec>(n == W ? load(from) : load_n(from, n));
}

// to[i / step][t][i % step] = the words of from[t][i], with zeros beyond n; `to` is [panels, words, step]. Whole
// vectors are stored: what is beyond a step is overwritten by the next, and behind the last one there is room.
template <int step, class T>
void pack(const T* from, int64_t stride, int rows, int64_t n, int panels, uint32_t* to) {
  constexpr int per_word = kPairs<T> ? 2 : 1;
  for (int p = 0; p < panels; ++p)
    for (int t = 0; t < rows; t += per_word, to += step)
      for (int i = 0; i < step; i += W) {
        const T* upper = from + t * stride + p * step + i;
        const auto left = static_cast<int>(std::clamp<int64_t>(n - p * step - i, 0, W));
        const uvec w = words(upper, t + 1 < rows ? upper + stride : nullptr, left);
        std::memcpy(to + i, &w, sizeof(w));
      }
}

// sums = a^T b + sums where `more`, of a [depth, kDown] and b [depth, kAcross] words; into `sums`, or squared into f.
// Not inlined, and its loops unrolled: it takes nearly all registers, and keeps c in them only so.
template <bool pairs>
__attribute__((noinline)) void micro(const uint32_t* a, const uint32_t* b, int depth, float* sums, bool more, bool last,
                                     float weight, float* f) {
  vec c[2 * kDown];
#pragma GCC unroll 24
  for (int i = 0; i < 2 * kDown; ++i) c[i] = vec{};
  if (more)
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kDown; ++i) c[i] = load(sums + i * W);
  for (int t = 0; t < depth; ++t, a += kDown, b += kAcross) {
    vec right[2];
    std::memcpy(right, b, sizeof(right));
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kDown; ++i) c[i] = multiply_add<pairs>(a + i / 2, right[i % 2], c[i]);
  }
  const vec scale = splat(weight);
  if (last)
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kDown; ++i) store(f + i * W, fma(scale * c[i], c[i], load(f + i * W)));
  else
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kDown; ++i) store(sums + i * W, c[i]);
}

// Copies the tile of f at (down, across) to or from registers' order, padded.
template <bool in>
void move(const FisherLinear& s, int64_t down, int64_t across, float* tile) {
  const int64_t rows = std::min<int64_t>(kTileDown, s.out - down);
  const int64_t columns = std::min<int64_t>(kTileAcross, s.in - across);
  if (in) std::fill(tile, tile + kTile, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kAcross) {
      float* own = tile + (j / kAcross * (kTileDown / kDown) + i / kDown) * kMicro + i % kDown * kAcross;
      float* f = s.f + (down + i) * s.in + across + j;
      std::memcpy(in ? own : f, in ? f : own, std::min<int64_t>(kAcross, columns - j) * sizeof(float));
    }
}

}  // namespace

// A thread owns tiles of f and goes over all samples with each, so f passes through memory once and sums are in order.
void fisher_linear(const FisherLinear& s) {
  const int64_t down = (s.out + kTileDown - 1) / kTileDown, across = (s.in + kTileAcross - 1) / kTileAcross;
  switch_dtype(s.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kRows = kPairs<T> ? 2 * kDepth : kDepth;
    parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> memory(new float[2 * kTile]);
      const std::unique_ptr<uint32_t[]> packed(new uint32_t[kDepth * (kTileDown + kTileAcross)]);
      float *f = memory.get(), *sums = f + kTile;
      uint32_t *a = packed.get(), *b = a + kDepth * kTileDown;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / across * kTileDown, j = task % across * kTileAcross;
        const int downs = static_cast<int>((std::min<int64_t>(kTileDown, s.out - i) + kDown - 1) / kDown);
        const int acrosses = static_cast<int>((std::min<int64_t>(kTileAcross, s.in - j) + kAcross - 1) / kAcross);
        move<true>(s, i, j, f);
        for (size_t n = 0; n + 1 < s.bounds.size(); ++n)
          for (int64_t t = s.bounds[n]; t < s.bounds[n + 1]; t += kRows) {
            const int rows = static_cast<int>(std::min<int64_t>(kRows, s.bounds[n + 1] - t));
            const int depth = kPairs<T> ? (rows + 1) / 2 : rows;
            pack<kDown>(static_cast<const T*>(s.dy) + t * s.out + i, s.out, rows, s.out - i, downs, a);
            pack<kAcross>(static_cast<const T*>(s.x) + t * s.in + j, s.in, rows, s.in - j, acrosses, b);
            for (int q = 0; q < acrosses; ++q)
              for (int p = 0; p < downs; ++p) {
                const int at = (q * (kTileDown / kDown) + p) * kMicro;
                micro<kPairs<T>>(a + p * depth * kDown, b + q * depth * kAcross, depth, sums + at, t > s.bounds[n],
                                 t + rows == s.bounds[n + 1], s.weight ? s.weight[n] : 1.0f, f + at);
              }
          }
        move<false>(s, i, j, f);
      }
    });
  });
}

}  // namespace pk::PK_ISA
