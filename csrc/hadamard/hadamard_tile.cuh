// What the CUDA kernels of the Hadamard ops share: a transform of a tile in registers, and the passes over tiles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/device.cuh"
#include "hadamard/hadamard.cuh"

namespace pk::hadamard {

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

// Bins for sums of Fastfood's gradient beside a tile, so many at a time, and their bytes: two numbers of 32 bits each.
template <int M>
constexpr int bins_of = M < 14   ? 1 << (M - 2)
                        : M < 15 ? 4096
                                 : 2048;

template <int M>
constexpr int bin_bytes = 2 * sizeof(uint32_t) * bins_of<M>;

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

// -- passes -----------------------------------------------------------------------------------------------------------

constexpr int least_tile = 12;
constexpr int narrowest = 4;  // bits of a tile's columns: 64 bytes of fp32

inline int levels_of(int64_t n) {
  int m = 0;
  while (int64_t{1} << m < n) ++m;
  return m;
}

// Not every architecture has room for a tile of 2^15.
inline int most_tile() { return most_shared() >= tile_bytes<15> + bin_bytes<15> ? 15 : 14; }

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

inline Plan one_pass(int levels) { return {levels, std::max(levels, least_tile), 1, {0}, {levels}}; }

inline Plan many_passes(int levels, int tile) {
  const int most = most_tile();
  if (levels > 2 * tile - narrowest) tile = 14;
  if (levels > 2 * tile - narrowest) tile = most;
  const int left = levels - tile;
  if (left <= tile - narrowest) return {levels, tile, 2, {0, tile}, {tile, left}};
  return {levels, tile, 3, {0, tile, tile + left / 2}, {tile, left / 2, left - left / 2}};
}

inline Plan plan_of_rows(int levels) {
  return levels <= most_tile() ? one_pass(levels) : many_passes(levels, least_tile);
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

// -- by the kernels of hadamard_cuda.cu -------------------------------------------------------------------------------

// Of several passes over x [rows, n] all but the last.
cudaError_t first_passes(const Plan& plan, Dtype type, const void* x, int64_t rows, int64_t n, const Held& held,
                         cudaStream_t stream);
// The second of three; of two nothing.
cudaError_t second_pass(const Plan& plan, int64_t rows, const Held& held, cudaStream_t stream);

// table [k] = H pad(sign * theta), theta [d]; k is a power of two that holds d.
cudaError_t transform_theta(Dtype type, const void* theta, const int8_t* sign, int64_t d, float* table, int64_t k,
                            cudaStream_t stream);
// dtheta [d] = scale * sign * the first d of H sums, sums [k], which may be written.
cudaError_t transform_sums(float* sums, int64_t k, const int8_t* sign, float scale, float* dtheta, int64_t d,
                           cudaStream_t stream);

}  // namespace pk::hadamard
