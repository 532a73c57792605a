// Walsh-Hadamard transforms on CUDA, and Fastfood on top of them. README.md has the formulas.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/device.cuh"
#include "hadamard/hadamard.cuh"

namespace pk {
namespace {

// A block has a tile of 2^M numbers, each thread 32 of them in registers: five bits of a number's place in the tile are
// the thread's own at a time, and along these it adds and subtracts. Shared memory takes the numbers from one choice of
// bits to the next.
constexpr int own = 5, mine = 1 << own;

template <int M>
constexpr int threads_of = 1 << (M - own);

// -- which bits a thread has ------------------------------------------------------------------------------------------

// base: the place of the thread's first number, whose own bits are 0. at(i): those bits of number i. bit<B>: the place
// of bit B of i.

// Vectors of 2^L, and the highest bits. A warp's vectors lie side by side.
template <int M, int L>
struct Loading {
  __device__ static int base(int thread) { return thread << L; }
  __device__ static int at(int i) { return (i & ((1 << L) - 1)) | i >> L << (M - own + L); }
  template <int B>
  static constexpr int bit = B < L ? B : M - own + B;
};

// The bits from Q on.
template <int Q>
struct Between {
  __device__ static int base(int thread) { return (thread & ((1 << Q) - 1)) | thread >> Q << (Q + own); }
  __device__ static int at(int i) { return i << Q; }
  template <int B>
  static constexpr int bit = Q + B;
};

// Vectors of 2^L, and the bits behind those of the lanes.
template <int L>
struct Storing {
  __device__ static int base(int thread) { return (thread & 31) << L | thread >> 5 << 10; }
  __device__ static int at(int i) { return (i & ((1 << L) - 1)) | i >> L << (L + own); }
  template <int B>
  static constexpr int bit = B < L ? B : B + own;
};

template <class From>
constexpr int low_bits = From::lanes == 8 ? 3 : 2;

// Where a number is in shared memory, in bytes: behind each 32 a place is left empty, so that a warp finds its numbers
// in 32 banks, whichever of these layouts it has. The offset of base | at(i) is the sum of both offsets.
__device__ inline int offset(int place) { return (place + (place >> 5)) * 4; }

template <int M>
constexpr int tile_bytes = ((1 << M) + (1 << (M - 5))) * 4;

template <class From, class To>
__device__ inline void exchange(float (&v)[mine], char* shared) {
  const int thread = static_cast<int>(threadIdx.x), from = offset(From::base(thread)), to = offset(To::base(thread));
#pragma unroll
  for (int i = 0; i < mine; ++i) *reinterpret_cast<float*>(shared + from + offset(From::at(i))) = v[i];
  block_sync();
#pragma unroll
  for (int i = 0; i < mine; ++i) v[i] = *reinterpret_cast<const float*>(shared + to + offset(To::at(i)));
}

// Sums and differences along those bits of the thread that are in MASK and from `first` to `last` - 1.
template <class Layout, uint32_t MASK, int B = 0>
__device__ inline void butterflies(float (&v)[mine], int first, int last) {
  constexpr int place = Layout::template bit<B>;
  if constexpr ((MASK >> place & 1) != 0) {
    if (place >= first && place < last) {
#pragma unroll
      for (int i = 0; i < mine; ++i)
        if ((i >> B & 1) == 0) {
          const float a = v[i], b = v[i | 1 << B];
          v[i] = a + b;
          v[i | 1 << B] = a - b;
        }
    }
  }
  if constexpr (B + 1 < own) butterflies<Layout, MASK, B + 1>(v, first, last);
}

// -- where a tile is --------------------------------------------------------------------------------------------------

// Of rows of 2^m numbers, by the bits of their places: a tile is either 2^split numbers of each of 2^(M - split) rows,
// or, COLUMNS, 2^(M - split) neighbours in each of 2^split lines `line` bits apart. Tiles of one row follow one
// another.
struct Tiling {
  uint32_t tiles_of_row;
  int split, line;
  int first, last;  // the bits of the tile along which it is transformed
};

// In a row, and after how many rows from the first of the tile.
struct Place {
  int row, at;
};

template <int M, bool COLUMNS>
class Tile {
 public:
  __device__ explicit Tile(const Tiling& t) : split_(t.split), line_(t.line) {
    const int64_t row = blockIdx.x / t.tiles_of_row;
    const auto in_row = static_cast<int>(blockIdx.x % t.tiles_of_row);
    if constexpr (COLUMNS) {
      const int wide = M - split_, between = line_ - wide;  // 2^between tiles side by side
      first_row = row;
      at_ = (in_row >> between << (line_ + split_)) | (in_row & ((1 << between) - 1)) << wide;
    } else {
      first_row = row << (M - split_);
      at_ = in_row << split_;
    }
  }

  __device__ Place operator()(int place) const {
    if constexpr (COLUMNS) {
      const int wide = M - split_;
      return {0, at_ + (place >> wide << line_) + (place & ((1 << wide) - 1))};
    } else {
      return {place >> split_, at_ + (place & ((1 << split_) - 1))};
    }
  }

  // How many of `rows` there are from the first on; some more than a tile has are as good.
  __device__ int left(int64_t rows) const {
    const int64_t left = rows - first_row;
    return static_cast<int>(left < 1 << M ? left : 1 << M);
  }

  int64_t first_row;

 private:
  int split_, line_, at_;
};

// -- sources ----------------------------------------------------------------------------------------------------------

// x [rows, n], and zeros beyond. wide: rows are whole vectors, aligned to 16 bytes.
template <class T>
struct Numbers {
  static constexpr int lanes = lanes_of<T>;
  const T* x;
  const int8_t* sign;  // null if wide; else those at whose place it is are negated
  int64_t rows;
  int n;
  bool wide;

  template <class Layout, int M, class Where>
  __device__ void load(const Where& where, float (&v)[mine], char* shared) const {
    const int base = Layout::base(static_cast<int>(threadIdx.x)), left = where.left(rows);
    const T* from = x + where.first_row * n;
    if (wide) {
      Pack<T, lanes> packs[mine / lanes];
#pragma unroll
      for (int i = 0; i < mine; i += lanes) {
        const Place p = where(base | Layout::at(i));
        packs[i / lanes] = {};
        if (p.row < left && p.at < n) packs[i / lanes] = load_pack<lanes>(from + p.row * n + p.at);
      }
#pragma unroll
      for (int i = 0; i < mine; ++i) v[i] = widen(packs[i / lanes].lane[i % lanes]);
    } else {
      // Neighbours by neighbouring threads.
      for (int i = static_cast<int>(threadIdx.x); i < 1 << M; i += threads_of<M>) {
        const Place p = where(i);
        float value = 0;
        if (p.row < left && p.at < n) {
          value = widen(from[p.row * n + p.at]);
          if (sign != nullptr && sign[p.at] < 0) value = -value;
        }
        *reinterpret_cast<float*>(shared + offset(i)) = value;
      }
      block_sync();
#pragma unroll
      for (int i = 0; i < mine; ++i)
        v[i] = *reinterpret_cast<const float*>(shared + offset(base) + offset(Layout::at(i)));
      block_sync();  // the exchanges write elsewhere
    }
  }
};

// What Fastfood has for each of n places, n a power of two: a number of a table of k, and a factor.
struct State {
  const void *places, *g;
  bool wide_places, fixed_point;
  bool vectors;  // n is a multiple of 4, and both are aligned to as many of them
  int n, k;

  template <class V, class T>
  __device__ Pack<V, 4> four(const T* from, int at) const {
    Pack<V, 4> out = {};
    if (vectors) {
      const auto pack = load_pack<4>(from + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) out.lane[i] = static_cast<V>(pack.lane[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at + i < n) out.lane[i] = static_cast<V>(from[at + i]);
    }
    return out;
  }

  // Of four places in a row, below k whatever is there.
  __device__ Pack<int, 4> numbers(int at) const {
    auto out = wide_places ? four<int>(static_cast<const int32_t*>(places), at)
                           : four<int>(static_cast<const int16_t*>(places), at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.lane[i] &= k - 1;
    return out;
  }

  __device__ Pack<float, 4> factors(int at) const {
    if (!fixed_point) return four<float>(static_cast<const float*>(g), at);
    auto out = four<float>(static_cast<const int16_t*>(g), at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.lane[i] *= 1.0f / 4096;
    return out;
  }
};

// g_i table[place_i] of one row; zeros beyond n. The table goes through shared memory if it has room, where random
// places of a warp meet in a bank three or four times.
struct Gathered {
  static constexpr int lanes = 4;
  State state;
  const float* table;

  template <class Layout, int M, class Where>
  __device__ void load(const Where& where, float (&v)[mine], char* shared) const {
    const int base = Layout::base(static_cast<int>(threadIdx.x));
    const bool here = state.k <= 1 << M;
    auto* copy = reinterpret_cast<float*>(shared);
    if (here) {
      for (int i = static_cast<int>(threadIdx.x); i < state.k; i += threads_of<M>) copy[i] = table[i];
      block_sync();
    }
#pragma unroll
    for (int i = 0; i < mine; i += 4) {
      const Place p = where(base | Layout::at(i));
      Pack<int, 4> number = {};
      Pack<float, 4> factor = {};
      if (p.row == 0 && p.at < state.n) number = state.numbers(p.at), factor = state.factors(p.at);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = factor.lane[j] * (here ? copy : table)[number.lane[j]];
    }
    if (here) block_sync();  // others read until here what the exchanges will overwrite
  }
};

// -- sinks ------------------------------------------------------------------------------------------------------------

// y [rows, n] = base + factor * number
template <class T>
struct Written {
  static constexpr int lanes = lanes_of<T>;
  template <int M>
  static constexpr int shared_bytes = 0;

  T* y;
  const T* base;       // or null
  const int8_t* sign;  // null if wide; else those at whose place it is are negated
  float factor;
  int64_t rows;
  int n;
  bool wide;

  template <class Layout, int M, class Where>
  __device__ void store(const Where& where, float (&v)[mine], char* shared) const {
    const int first = Layout::base(static_cast<int>(threadIdx.x)), left = where.left(rows);
    const int64_t begin = where.first_row * n;
    if (wide) {
#pragma unroll
      for (int i = 0; i < mine; i += lanes) {
        const Place p = where(first | Layout::at(i));
        if (p.row < left && p.at < n) {
          const int64_t to = begin + p.row * n + p.at;
          float before[lanes] = {}, part[lanes];
          if (base != nullptr) pk::load<lanes>(base + to, before);
#pragma unroll
          for (int j = 0; j < lanes; ++j) part[j] = before[j] + v[i + j] * factor;
          pk::store<lanes>(y + to, part);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < mine; ++i) *reinterpret_cast<float*>(shared + offset(first) + offset(Layout::at(i))) = v[i];
      block_sync();
      for (int i = static_cast<int>(threadIdx.x); i < 1 << M; i += threads_of<M>) {
        const Place p = where(i);
        if (p.row < left && p.at < n) {
          const int64_t to = begin + p.row * n + p.at;
          float value = *reinterpret_cast<const float*>(shared + offset(i)) * factor;
          if (sign != nullptr && sign[p.at] < 0) value = -value;
          y[to] = narrow<T>(base == nullptr ? value : widen(base[to]) + value);
        }
      }
    }
  }
};

__device__ inline float power_of_two(int exponent) { return float_of(static_cast<uint32_t>(127 + exponent) << 23); }

template <int M>
constexpr int bins_of = M < 14   ? 1 << (M - 2)
                        : M < 15 ? 4096
                                 : 2048;  // at a time

// parts [tiles, k]: the sums of the tile's g_i v_i by number_i. They are made of whole numbers, so that their order is
// of no account: of v / 2^e, with 2^e above the largest in the tile, 30 - M bits, and 31 - M of what that leaves. Both
// fit 32 bits if all of the tile have one number; what is lost is less than 2^-30 of the largest.
struct Binned {
  static constexpr int lanes = 4;
  template <int M>
  static constexpr int shared_bytes = 2 * sizeof(uint32_t) * bins_of<M>;

  State state;
  float* parts;

  template <class Layout, int M, class Where>
  __device__ void store(const Where& where, float (&v)[mine], char* shared) const {
    constexpr int threads = threads_of<M>, bits = 30 - M, finer = bits + 1, room = bins_of<M>;
    const int thread = static_cast<int>(threadIdx.x), base = Layout::base(thread);
    auto* coarse = reinterpret_cast<uint32_t*>(shared + tile_bytes<M>);
    auto* fine = coarse + room;

    // Values wait in shared memory, each thread's where it has read them.
    float most = 0;
#pragma unroll
    for (int i = 0; i < mine; i += 4) {
      const Place p = where(base | Layout::at(i));
      Pack<float, 4> factor = {};
      if (p.row == 0 && p.at < state.n) factor = state.factors(p.at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // What is beyond n is of no sum, NaN or not.
        const float value = p.row == 0 && p.at + j < state.n ? v[i + j] * factor.lane[j] : 0.0f;
        *reinterpret_cast<float*>(shared + offset(base) + offset(Layout::at(i + j))) = value;
        most = fmaxf(most, fabsf(value) < INFINITY ? fabsf(value) : INFINITY);  // NaN too
      }
    }
    most = warp_max(most);
    if (thread % 32 == 0) coarse[thread / 32] = bits_of(most);
    block_sync();
    for (int warp = 0; warp < threads / 32; ++warp) most = fmaxf(most, float_of(coarse[warp]));
    block_sync();

    // 2^exponent > most; of the smallest, what is below 2^-144 is lost
    constexpr int least = bits - 126;
    const int found = static_cast<int>(bits_of(most) >> 23) - 126, exponent = found < least ? least : found;
    const float scale = power_of_two(bits - exponent), back = power_of_two(exponent - bits);
#pragma unroll 1
    for (int begin = 0; begin < state.k; begin += room) {
      for (int i = thread; i < 2 * room; i += threads) coarse[i] = 0;
      block_sync();
      if (most < INFINITY) {
#pragma unroll 1
        for (int i = 0; i < mine; i += 4) {
          const Place p = where(base | Layout::at(i));
          Pack<int, 4> number = {};
          if (p.row == 0 && p.at < state.n) number = state.numbers(p.at);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float value =
                *reinterpret_cast<const float*>(shared + offset(base) + offset(Layout::at(i + j))) * scale;
            const float whole = rintf(value), rest = rintf((value - whole) * (1 << finer));
            const auto bin = static_cast<uint32_t>(number.lane[j] - begin);
            if (bin < room && value != 0) {
              count(coarse + bin, static_cast<uint32_t>(static_cast<int32_t>(whole)));
              count(fine + bin, static_cast<uint32_t>(static_cast<int32_t>(rest)));
            }
          }
        }
      }
      block_sync();
      for (int i = thread; i < room && begin + i < state.k; i += threads) {
        const int64_t sum =
            static_cast<int64_t>(static_cast<int32_t>(coarse[i])) * (1 << finer) + static_cast<int32_t>(fine[i]);
        parts[static_cast<int64_t>(blockIdx.x) * state.k + begin + i] =
            most < INFINITY ? static_cast<float>(sum) * power_of_two(-finer) * back : NAN;
      }
      block_sync();
    }
  }
};

// -- kernels ----------------------------------------------------------------------------------------------------------

template <int M, bool COLUMNS, class Source, class Sink>
__global__ void __launch_bounds__(threads_of<M>, 1024 / threads_of<M>)
    hadamard_kernel(Tiling tiling, Source source, Sink sink) {
  constexpr int out = low_bits<Sink>, top = M - own + low_bits<Source>;
  using First = Loading<M, low_bits<Source>>;
  using Third = Between<out>;
  using Last = Storing<out>;
  constexpr uint32_t highest = ~0u << top, middle = 31u << out & ~highest, lowest = 1023 & ~highest & ~middle;
  char* shared = shared_memory();
  const Tile<M, COLUMNS> where(tiling);
  float v[mine];
  source.template load<First, M>(where, v, shared);
  butterflies<First, highest>(v, tiling.first, tiling.last);
  if constexpr (top > 10) {
    using Second = Between<top - own>;
    exchange<First, Second>(v, shared);
    butterflies<Second, ~highest & ~1023u>(v, tiling.first, tiling.last);
    exchange<Second, Third>(v, shared);
  } else {
    exchange<First, Third>(v, shared);
  }
  butterflies<Third, middle>(v, tiling.first, tiling.last);
  exchange<Third, Last>(v, shared);
  butterflies<Last, lowest>(v, tiling.first, tiling.last);
  sink.template store<Last, M>(where, v, shared);
}

constexpr int sum_threads = 128, sum_parts = 32;

// sums [ceil(parts / 32), k] of parts [parts, k], in order
__global__ void __launch_bounds__(sum_threads)
    hadamard_sum_kernel(const float* parts, int64_t count, int k, float* sums) {
  const int64_t blocks = (k + sum_threads - 1) / sum_threads, group = blockIdx.x / blocks;
  const auto i = static_cast<int64_t>(blockIdx.x % blocks) * sum_threads + threadIdx.x;
  if (i >= k) return;
  const int64_t first = group * sum_parts, last = first + sum_parts < count ? first + sum_parts : count;
  float sum = 0;
  for (int64_t part = first; part < last; ++part) sum += parts[part * k + i];
  sums[group * k + i] = sum;
}

// -- passes -----------------------------------------------------------------------------------------------------------

constexpr int least_tile = 12;
constexpr int narrowest = 4;  // bits of a tile's columns: 64 bytes of fp32

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int levels_of(int64_t n) {
  int m = 0;
  while (int64_t{1} << m < n) ++m;
  return m;
}

// Not every architecture has room for a tile of 2^15.
int most_tile() { return most_shared() >= tile_bytes<15> + Binned::shared_bytes<15> ? 15 : 14; }

// The levels of a transform, `bits` at a time from `line` on. One pass: any rows of 2^m in a tile.
struct Plan {
  int levels, tile, passes;
  int line[3], bits[3];

  int64_t tiles() const { return int64_t{1} << (levels - tile); }
  // Of a row that holds n numbers, and whole lines of the last pass, between the passes.
  int64_t held(int64_t n) const {
    const int64_t line_size = int64_t{1} << line[passes - 1];
    return passes == 1 ? 0 : ceil_div(n, line_size) * line_size;
  }
};

Plan one_pass(int levels) { return {levels, std::max(levels, least_tile), 1, {0}, {levels}}; }

Plan many_passes(int levels, int tile) {
  const int most = most_tile();
  if (levels > 2 * tile - narrowest) tile = 14;
  if (levels > 2 * tile - narrowest) tile = most;
  const int left = levels - tile;
  if (left <= tile - narrowest) return {levels, tile, 2, {0, tile}, {tile, left}};
  return {levels, tile, 3, {0, tile, tile + left / 2}, {tile, left / 2, left - left / 2}};
}

Plan plan_of_rows(int levels) { return levels <= most_tile() ? one_pass(levels) : many_passes(levels, least_tile); }

// A table of k should fit a tile.
Plan plan_of_fastfood(int levels, int64_t k) {
  if (levels <= least_tile) return one_pass(levels);
  return many_passes(levels, k > 1 << least_tile && levels > 14 ? 14 : least_tile);
}

template <int M, bool COLUMNS, class Source, class Sink>
cudaError_t pass(const Tiling& tiling, int64_t rows, const Source& source, const Sink& sink, cudaStream_t stream) {
  const int64_t tiles =
      COLUMNS ? rows * tiling.tiles_of_row : ceil_div(rows, int64_t{1} << (M - tiling.split)) * tiling.tiles_of_row;
  return launch(hadamard_kernel<M, COLUMNS, Source, Sink>, static_cast<unsigned>(tiles), threads_of<M>,
                tile_bytes<M> + Sink::template shared_bytes<M>, stream, tiling, source, sink);
}

// Rows in one pass. TILES: bits 0 to 3 say which tiles, from 2^12 on, there are kernels for.
template <int TILES, class Source, class Sink>
cudaError_t in_one(const Plan& plan, int64_t rows, const Source& source, const Sink& sink, cudaStream_t stream) {
  const Tiling tiling = {1, plan.levels, 0, 0, plan.levels};
  switch (plan.tile) {
    case 13:
      if constexpr ((TILES & 2) != 0) return pass<13, false>(tiling, rows, source, sink, stream);
      break;
    case 14:
      if constexpr ((TILES & 4) != 0) return pass<14, false>(tiling, rows, source, sink, stream);
      break;
    case 15:
      if constexpr ((TILES & 8) != 0) return pass<15, false>(tiling, rows, source, sink, stream);
      break;
    default:
      return pass<12, false>(tiling, rows, source, sink, stream);
  }
  return cudaErrorInvalidValue;
}

// The first of several passes, over `tiles` of each row.
template <class Source, class Sink>
cudaError_t along_rows(const Plan& plan, int64_t tiles, int64_t rows, const Source& source, const Sink& sink,
                       cudaStream_t stream) {
  const Tiling tiling = {static_cast<uint32_t>(tiles), plan.tile, 0, 0, plan.tile};
  if (plan.tile == 15) return pass<15, false>(tiling, rows, source, sink, stream);
  if (plan.tile == 14) return pass<14, false>(tiling, rows, source, sink, stream);
  return pass<12, false>(tiling, rows, source, sink, stream);
}

// Another one.
template <class Source, class Sink>
cudaError_t along_columns(const Plan& plan, int number, int64_t tiles, int64_t rows, const Source& source,
                          const Sink& sink, cudaStream_t stream) {
  const int line = plan.line[number], bits = plan.bits[number];
  const Tiling tiling = {static_cast<uint32_t>(tiles), bits, line, plan.tile - bits, plan.tile};
  if (plan.tile == 15) return pass<15, true>(tiling, rows, source, sink, stream);
  if (plan.tile == 14) return pass<14, true>(tiling, rows, source, sink, stream);
  return pass<12, true>(tiling, rows, source, sink, stream);
}

// What the passes leave for one another: [rows, held] fp32.
struct Held {
  float* data;
  int64_t rows, held;

  Numbers<float> source() const { return {data, nullptr, rows, static_cast<int>(held), true}; }
  Written<float> sink() const { return {data, nullptr, nullptr, 1.0f, rows, static_cast<int>(held), true}; }
};

// Of a source that may end early, to a sink of all.
template <int TILES, class Source, class Sink>
cudaError_t ascend(const Plan& plan, int64_t rows, const Source& source, const Sink& sink, const Held& held,
                   cudaStream_t stream) {
  if (plan.passes == 1) return in_one<TILES>(plan, rows, source, sink, stream);
  const int last = plan.passes - 1;
  const int64_t tiles = held.held >> plan.tile;
  cudaError_t code = along_rows(plan, tiles, rows, source, held.sink(), stream);
  if (code == cudaSuccess && last == 2) code = along_columns(plan, 1, tiles, rows, held.source(), held.sink(), stream);
  if (code == cudaSuccess) code = along_columns(plan, last, plan.tiles(), rows, held.source(), sink, stream);
  return code;
}

// Of a source of all, to a sink that may end early.
template <int TILES, class Source, class Sink>
cudaError_t descend(const Plan& plan, const Source& source, const Sink& sink, const Held& held, cudaStream_t stream) {
  if (plan.passes == 1) return in_one<TILES>(plan, 1, source, sink, stream);
  const int last = plan.passes - 1;
  const int64_t tiles = held.held >> plan.tile;
  cudaError_t code = along_columns(plan, last, plan.tiles(), 1, source, held.sink(), stream);
  if (code == cudaSuccess && last == 2) code = along_columns(plan, 1, tiles, 1, held.source(), held.sink(), stream);
  if (code == cudaSuccess) code = along_rows(plan, tiles, 1, held.source(), sink, stream);
  return code;
}

constexpr int any_tile = 15, smallest_tile = 1;

template <class T>
bool vectors(int64_t n, const T* x, const T* y = nullptr) {
  return n % lanes_of<T> == 0 && aligned16(x, y);
}

template <class T>
Written<T> written_to(void* y, const void* base, float factor, int64_t rows, int64_t n) {
  auto* to = static_cast<T*>(y);
  const auto* before = static_cast<const T*>(base);
  return {to, before, nullptr, factor, rows, static_cast<int>(n), vectors(n, to, before)};
}

template <class T>
Numbers<T> numbers_of(const void* x, const int8_t* sign, int64_t rows, int64_t n) {
  const auto* data = static_cast<const T*>(x);
  return {data, sign, rows, static_cast<int>(n), sign == nullptr && vectors(n, data)};
}

// -- fastfood ---------------------------------------------------------------------------------------------------------

int64_t table_size(const FastfoodCuda& f) { return int64_t{1} << levels_of(f.d); }

State state_of(const FastfoodCuda& f) {
  const bool whole = f.n % 4 == 0 && aligned16(static_cast<const char*>(f.places), static_cast<const char*>(f.g));
  return {f.places, f.g, f.wide_places, f.fixed_point, whole, static_cast<int>(f.n), static_cast<int>(table_size(f))};
}

Plan plan_of(const FastfoodCuda& f) { return plan_of_fastfood(levels_of(f.n), table_size(f)); }

// Scratch of a table, in whole vectors.
int64_t table_room(const FastfoodCuda& f) { return std::max<int64_t>(table_size(f), 4); }

// Room for what is left of `count` parts, after the first sum of 32, the second and so on.
int64_t sums_room(int64_t count, int64_t k) {
  int64_t room = 0;
  for (; count > 1; room += count * k) count = ceil_div(count, sum_parts);
  return room;
}

}  // namespace

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
    return ascend<any_tile>(plan, f.rows, numbers_of<T>(f.x, nullptr, f.rows, f.n),
                            written_to<T>(f.y, nullptr, f.scale, f.rows, f.n), {room, f.rows, held}, stream);
  });
}

int64_t fastfood_room(const FastfoodCuda& f, Dtype out_type) {
  const int64_t held = plan_of(f).held(f.numel);
  return table_room(f) + (out_type == Dtype::f32 && held == f.numel ? 0 : held);
}

cudaError_t fastfood_cuda(const FastfoodCuda& f, Dtype theta_type, const void* theta, float scale, Dtype out_type,
                          const void* base, void* out, float* room, cudaStream_t stream) {
  if (f.numel == 0) return cudaSuccess;
  const int64_t k = table_size(f);
  float* table = room;
  room += table_room(f);
  const cudaError_t code = switch_dtype(theta_type, [&](auto t) {
    using T = decltype(t);
    const Plan plan = plan_of_rows(levels_of(k));
    return ascend<any_tile>(plan, 1, numbers_of<T>(theta, f.sign, 1, f.d),
                            written_to<float>(table, nullptr, 1.0f, 1, k), {table, 1, k}, stream);
  });
  if (code != cudaSuccess) return code;
  const Plan plan = plan_of(f);
  const int64_t held = plan.held(f.numel);
  return switch_dtype(out_type, [&](auto t) {
    using T = decltype(t);
    if (std::is_same_v<T, float> && held == f.numel) room = static_cast<float*>(out);
    return descend<smallest_tile>(plan, Gathered{state_of(f), table}, written_to<T>(out, base, scale, 1, f.numel),
                                  {room, 1, held}, stream);
  });
}

int64_t fastfood_backward_room(const FastfoodCuda& f) {
  const Plan plan = plan_of(f);
  const int64_t parts = plan.passes == 1 ? 1 : plan.tiles(), k = table_size(f);
  return plan.held(f.numel) + parts * k + sums_room(parts, k) + 2 * table_room(f);
}

cudaError_t fastfood_backward_cuda(const FastfoodCuda& f, Dtype type, const void* dy, float scale, float* dtheta,
                                   float* room, cudaStream_t stream) {
  if (f.d == 0) return cudaSuccess;
  const Plan plan = plan_of(f);
  const int64_t held = plan.held(f.numel), k = table_size(f);
  int64_t count = plan.passes == 1 ? 1 : plan.tiles();
  float* parts = room + held;
  cudaError_t code = switch_dtype(type, [&](auto t) {
    using T = decltype(t);
    return ascend<smallest_tile>(plan, 1, numbers_of<T>(dy, nullptr, 1, f.numel), Binned{state_of(f), parts},
                                 {room, 1, held}, stream);
  });
  while (code == cudaSuccess && count > 1) {
    float* sums = parts + count * k;
    const int64_t left = ceil_div(count, sum_parts);
    code = launch(hadamard_sum_kernel, static_cast<unsigned>(left * ceil_div(k, sum_threads)), sum_threads, 0, stream,
                  static_cast<const float*>(parts), count, static_cast<int>(k), sums);
    parts = sums, count = left;
  }
  if (code != cudaSuccess) return code;
  auto sink = written_to<float>(dtheta, nullptr, scale, 1, f.d);
  sink.sign = f.sign, sink.wide = false;
  return ascend<any_tile>(plan_of_rows(levels_of(k)), 1, numbers_of<float>(parts, nullptr, 1, k), sink, {parts, 1, k},
                          stream);
}

}  // namespace pk
