// Fastfood's random matrices, from integers alone: see peft_kernels/ops/fastfood_state.py for what each number is.
#include <algorithm>

#include "common/philox.h"
#include "hadamard/hadamard.h"

namespace pk::PK_ISA {
namespace {

constexpr int64_t kPiece = 1 << 10;  // elements at a time
constexpr int kRounds = 8, kCounters = kLanes * 4;

// `count` 32-bit words of a stream from `first` on, a multiple of 4 * kCounters, as the halves of 64-bit ones.
void draw(const Philox& stream, int64_t first, int64_t count, uint64_t* words) {
  for (int64_t i = 0; i < count; i += 4 * kCounters) {
    wide left[4], right[4];
    stream((first + i) / 4, 0, left, right);
    for (int j = 0; j < kCounters; ++j) {
      *words++ = left[j / kLanes][j % kLanes];
      *words++ = right[j / kLanes][j % kLanes];
    }
  }
}

PK_INLINE uint32_t word(const uint64_t* words, int64_t i) { return static_cast<uint32_t>(words[i / 2] >> i % 2 * 32); }

PK_INLINE uvec mixed(uvec x, uint32_t key, int kept) {
  const uvec z = (x ^ key) * 0x7FEB352Du, y = (z ^ z >> 15) * 0x846CA68Bu;
  return kept ? y >> (32 - kept) : uvec{};
}

}  // namespace

void fastfood_state(int64_t seed, int64_t n, int64_t d, const int16_t* quantiles, int8_t* sign, bool is_int32,
                    void* pi_mod, int16_t* g) {
  static_assert(kPiece % (8 * kCounters) == 0);
  const Philox signs(seed, 0), normals(seed, 1), permutation(seed, 2);
  const int bits = __builtin_ctzll(n), high_bits = bits / 2, low_bits = bits - high_bits;
  uint32_t mask = 0;
  while (mask + 1 < d) mask = 2 * mask + 1;
  uint64_t drawn[2 * kCounters];
  draw(permutation, 0, kRounds, drawn);
  uint32_t keys[kRounds];
  for (int r = 0; r < kRounds; ++r) keys[r] = word(drawn, r);
  parallel_for(0, (d + kPiece - 1) / kPiece, 16, [&](int64_t begin, int64_t end) {
    uint64_t words[kPiece / 2];
    for (int64_t at = begin * kPiece; at < std::min(end * kPiece, d); at += kPiece) {
      draw(signs, at, kPiece, words);
      for (int64_t i = 0; i < std::min(kPiece, d - at); ++i) sign[at + i] = word(words, i) >> 31 ? -1 : 1;
    }
  });
  parallel_for(0, (n + kPiece - 1) / kPiece, 16, [&](int64_t begin, int64_t end) {
    uint64_t words[kPiece / 4];
    uint32_t image[kPiece];
    for (int64_t at = begin * kPiece; at < std::min(end * kPiece, n); at += kPiece) {
      const int64_t count = std::min(kPiece, n - at);
      draw(normals, at / 2, kPiece / 2, words);
      for (int64_t i = 0; i < count; ++i) g[at + i] = quantiles[words[i / 4] >> i % 4 * 16 & 0xffff];
      for (int64_t i = 0; i < kPiece; i += W) {
        uvec lane;
        for (int j = 0; j < W; ++j) lane[j] = j;
        const uvec element = lane + static_cast<uint32_t>(at + i);
        uvec low = element & ((1u << low_bits) - 1), high = element >> low_bits;
        for (int r = 0; r < kRounds; r += 2) {
          low ^= mixed(high, keys[r], low_bits);
          high ^= mixed(low, keys[r + 1], high_bits);
        }
        const uvec out = (high << low_bits | low) & mask;
        std::memcpy(image + i, &out, sizeof(out));
      }
      if (is_int32) {
        std::copy(image, image + count, static_cast<int32_t*>(pi_mod) + at);
      } else {
        std::copy(image, image + count, static_cast<int16_t*>(pi_mod) + at);
      }
    }
  });
}

}  // namespace pk::PK_ISA
