// Native CPU kernels of raystar's generator: a fast 3x3 convolution, and a fused normalisation.
//
// Activations are bfloat16 in NHWC order (PyTorch's channels_last), sums are float32. Channel counts are multiples
// of 32 (`kGroup`), height and width of a convolution's image are even. The callers in kernels.py check all this.
//
// The convolution (stride 1, padding 1)
// -------------------------------------
// A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), https://arxiv.org/abs/1509.09308,
// section 4.1: Winograd's minimal filtering F(2x2, 3x3). The image is cut into tiles of 2x2 outputs, each of which
// needs 4x4 inputs d and a 3x3 filter g. With
//
//           1  0 -1  0           1    0    0
//   B^T  =  0  1  1  0     G  = 1/2  1/2  1/2     A^T  =  1  1  1  0
//           0 -1  1  0          1/2 -1/2  1/2             0  1 -1 -1
//           0  1  0 -1           0    0    1
//
// a tile's output is  A^T [ (G g G^T) * (B^T d B) ] A,  where * multiplies element by element: 16 multiplications
// instead of 36. Summed over input channels, the element-wise product at each of the 16 positions p is a matrix
// product over channels,  M_p[tile, out] = sum_in V_p[tile, in] U_p[in, out],  with V = B^T d B and U = G g G^T.
//
//   forward:          x -> V;   M = V U;    M -> y
//   backward, data:   the same convolution of dy with the filters turned by 180 degrees and in/out swapped
//   backward, weight: dM = A dy A^T;   dU_p[in, out] = sum_tile V_p[tile, in] dM_p[tile, out];   dg = G^T dU G
//
// V and M are four times as large as x and y: written to memory they would cost more than they save. So the work goes
// block by block: a few dozen tiles are transformed, multiplied and transformed back while all of it lies in the
// level-1 and level-2 caches. V, U and dM are rounded to bfloat16 for the multiplier (`_mm512_dpbf16_ps` adds products
// of pairs to float32 sums); M, dU and all transforms stay in float32.
//
// Layouts of the bfloat16 factors. The multiplier wants two neighbours of the summed index side by side:
//   V    [position][tile][in]                     forward; the summed index is `in`
//   U    [panel][position][in / 2][64 out][2]     a panel is up to 64 outputs
//   V^T  [position][in / 32][tile / 2][32][2]     backward, weight; the summed index is the tile
//   dM   [panel][position][tile / 2][64 out][2]
// A register of 32 bfloat16 is split into its even and its odd channels (a shift and a mask), so V holds every group
// of 32 channels in the order 0, 2, ..., 30, 1, 3, ..., 31, and U's rows follow it (`channel_at`).
//
// Results do not depend on timing: every worker has a fixed share of the tiles, and sums over workers have a fixed
// order. The number of workers does change the rounding of weight gradients.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = std::uint16_t;
using i64 = std::int64_t;

constexpr int kLanes = 16;      // floats in a register
constexpr int kGroup = 32;      // bfloat16 in a register
constexpr int kPositions = 16;  // of a 4x4 tile
constexpr int kPanel = 64;      // outputs multiplied at once: four registers
constexpr int kWideRows = 4;    // rows multiplied at once by a whole panel: 4 x 4 of the 32 registers hold sums,
constexpr int kSlimRows = 8;    // and by half a panel: 8 x 2
constexpr i64 kAlign = 64;      // bytes of a cache line
// Bytes put between positions: 16 lines a power of two apart would fall into one set of the level-1 cache.
constexpr i64 kGap = kAlign;

constexpr i64 kChunk = 8;                 // tiles multiplied and transformed back at once: M stays in level 1
constexpr i64 kAhead = 16;                // pixels that the normalisation fetches before their turn
constexpr i64 kForwardTiles = 48;         // tiles of a block, at most
constexpr i64 kForwardBytes = 400 << 10;  // of V of a block
constexpr i64 kGradTiles = 128;           // the same for weight gradients, where two factors share the cache
constexpr i64 kGradBytes = 512 << 10;

alignas(kAlign) constexpr bf16 kZeros[kGroup] = {};

// ---------------------------------------------------------------------------------------------------------------
// Vectors

using Words = std::uint32_t __attribute__((vector_size(64)));

// 32 channels as float32.
struct Channels {
  __m512 even, odd;
};

inline Channels operator+(Channels a, Channels b) { return {a.even + b.even, a.odd + b.odd}; }
inline Channels operator-(Channels a, Channels b) { return {a.even - b.even, a.odd - b.odd}; }
inline Channels operator*(Channels a, Channels b) { return {a.even * b.even, a.odd * b.odd}; }

inline Channels load(const bf16* from) {
  const Words both = reinterpret_cast<Words>(_mm512_loadu_si512(from));
  return {reinterpret_cast<__m512>(both << 16), reinterpret_cast<__m512>(both & 0xffff0000u)};
}

// For lines too far apart for the processor's own prefetcher.
inline void prefetch(const bf16* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// Rounded to bfloat16: `first` in the lower half.
inline __m512i pack(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

inline __m512i pack(Channels c) { return pack(c.even, c.odd); }

// Channel that stands at place k of V's rows.
inline i64 channel_at(i64 k) {
  const i64 within = k % kGroup;
  return k - within + (within < kLanes ? 2 * within : 2 * (within - kLanes) + 1);
}

inline bf16 round_to_bf16(float value) {
  const __m128i bits = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_set_ss(value)));
  return static_cast<bf16>(_mm_extract_epi16(bits, 0));
}

// ---------------------------------------------------------------------------------------------------------------
// Matrix products

// c[Rows, 16 Vectors] (+)= a[Rows, 2 pairs] b[2 pairs, 16 Vectors]; strides count elements. Pairs of a lie side by
// side, `a_pair` apart, and b holds [pair][out][2].
template <int Rows, int Vectors>
inline void multiply(const bf16* a, i64 a_row, i64 a_pair, const bf16* b, i64 b_pair, i64 pairs, float* c,
                     i64 c_row, bool add) {
  __m512 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = add ? _mm512_load_ps(c + r * c_row + v * kLanes) : _mm512_setzero_ps();
  for (i64 k = 0; k < pairs; ++k, a += a_pair, b += b_pair) {
    __m512bh column[Vectors];
    for (int v = 0; v < Vectors; ++v)
      column[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + v * kGroup));
    for (int r = 0; r < Rows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * a_row, sizeof(pair));
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, column[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) _mm512_store_ps(c + r * c_row + v * kLanes, sum[r][v]);
}

// The same for any number of rows; the last ones, fewer than Rows, go in ones and twos.
template <int Rows, int Vectors>
void multiply_rows(const bf16* a, i64 a_row, i64 a_pair, const bf16* b, i64 b_pair, i64 pairs, float* c,
                   i64 c_row, i64 rows, bool add) {
  i64 r = 0;
  for (; r + Rows <= rows; r += Rows)
    multiply<Rows, Vectors>(a + r * a_row, a_row, a_pair, b, b_pair, pairs, c + r * c_row, c_row, add);
  for (; r + 2 <= rows; r += 2)
    multiply<2, Vectors>(a + r * a_row, a_row, a_pair, b, b_pair, pairs, c + r * c_row, c_row, add);
  if (r < rows) multiply<1, Vectors>(a + r * a_row, a_row, a_pair, b, b_pair, pairs, c + r * c_row, c_row, add);
}

// ---------------------------------------------------------------------------------------------------------------
// Tiles

struct Image {  // [batch, height, width, channels]
  i64 batch, height, width, channels;

  i64 tile_rows() const { return height / 2; }
  i64 tile_columns() const { return width / 2; }
  i64 tiles() const { return batch * tile_rows() * tile_columns(); }
  i64 at(i64 b, i64 y, i64 x) const { return ((b * height + y) * width + x) * channels; }
};

struct Tile {  // number in [batch, tile row, tile column], and where that is
  i64 b, row, column;

  Tile(const Image& image, i64 number)
      : b(number / image.tile_columns() / image.tile_rows()),
        row(number / image.tile_columns() % image.tile_rows()),
        column(number % image.tile_columns()) {}

  void advance(const Image& image) {
    if (++column < image.tile_columns()) return;
    column = 0;
    if (++row < image.tile_rows()) return;
    row = 0;
    ++b;
  }
};

// B^T applied to one column of 4 inputs.
struct Column {
  Channels at[4];
};

// The 4 inputs rows of a tile row; those outside the image are zeros, with a stride of 0.
struct Rows {
  const bf16* start[4];
  i64 step[4];

  Rows(const bf16* data, const Image& image, Tile tile, i64 channel) {
    for (i64 r = 0; r < 4; ++r) {
      const i64 y = 2 * tile.row - 1 + r;
      const bool inside = y >= 0 && y < image.height;
      start[r] = inside ? data + image.at(tile.b, y, 0) + channel : kZeros;
      step[r] = inside ? image.channels : 0;
    }
  }

  Column column(i64 x, i64 width) const {
    if (x < 0 || x >= width) {
      const Channels zero = load(kZeros);
      return {{zero, zero, zero, zero}};
    }
    const Channels d0 = load(start[0] + x * step[0]), d1 = load(start[1] + x * step[1]);
    const Channels d2 = load(start[2] + x * step[2]), d3 = load(start[3] + x * step[3]);
    return {{d0 - d2, d1 + d2, d2 - d1, d1 - d3}};
  }
};

// V = B^T d B of 32 channels of `count` tiles: calls emit(tile in block, position, 32 bfloat16).
template <class Emit>
inline void transform_input(const bf16* data, const Image& image, i64 first, i64 count, i64 channel, Emit emit) {
  for (i64 done = 0; done < count;) {
    const Tile tile(image, first + done);
    const i64 end = std::min(count - done, image.tile_columns() - tile.column);
    const Rows rows(data, image, tile, channel);
    Column c0 = rows.column(2 * tile.column - 1, image.width), c1 = rows.column(2 * tile.column, image.width);
    for (i64 i = 0; i < end; ++i) {
      const i64 x = 2 * (tile.column + i) + 1;
      const bf16* const below = data + image.at(tile.b, 2 * tile.row + 3, x) + channel;  // new in the next tile row
      prefetch(below);
      prefetch(below + image.channels);
      prefetch(below + image.width * image.channels);
      prefetch(below + (image.width + 1) * image.channels);
      const Column c2 = rows.column(x, image.width), c3 = rows.column(x + 1, image.width);
      for (int r = 0; r < 4; ++r) {
        emit(done + i, 4 * r + 0, pack(c0.at[r] - c2.at[r]));
        emit(done + i, 4 * r + 1, pack(c1.at[r] + c2.at[r]));
        emit(done + i, 4 * r + 2, pack(c2.at[r] - c1.at[r]));
        emit(done + i, 4 * r + 3, pack(c1.at[r] - c3.at[r]));
      }
      c0 = c2;
      c1 = c3;
    }
    done += end;
  }
}

// dM = A dy A^T, but for the signs of its last row and column, which `kGradFilter` takes back. Returns the sum of dy.
template <class Emit>
inline Channels transform_gradient(const bf16* data, const Image& image, i64 first, i64 count, i64 channel,
                                   Emit emit) {
  Channels total = load(kZeros);
  Tile tile(image, first);
  for (i64 i = 0; i < count; ++i, tile.advance(image)) {
    const bf16* at = data + image.at(tile.b, 2 * tile.row, 2 * tile.column) + channel;
    const i64 below = image.width * image.channels;
    for (i64 ahead = 2; ahead < 4; ++ahead) {
      prefetch(at + ahead * below);
      prefetch(at + ahead * below + image.channels);
    }
    const Channels y00 = load(at), y01 = load(at + image.channels);
    const Channels y10 = load(at + below), y11 = load(at + below + image.channels);
    const Channels left[4] = {y00, y00 + y10, y00 - y10, y10};
    const Channels right[4] = {y01, y01 + y11, y01 - y11, y11};
    for (int r = 0; r < 4; ++r) {
      const Channels sum = left[r] + right[r];
      if (r == 1) total = total + sum;
      emit(i, 4 * r + 0, pack(left[r]));
      emit(i, 4 * r + 1, pack(sum));
      emit(i, 4 * r + 2, pack(left[r] - right[r]));
      emit(i, 4 * r + 3, pack(right[r]));
    }
  }
  return total;
}

// Brings tiles 2n and 2n + 1 side by side, [32 channels][2], and channels back into their own order.
class Pairs {
 public:
  // Where the group of channels of position 0's first pair goes; strides count elements.
  Pairs(bf16* to, i64 position_stride, i64 pair_stride)
      : to_(to), position_stride_(position_stride), pair_stride_(pair_stride) {
    alignas(kAlign) std::uint16_t order[2][kGroup];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kLanes; ++i) {
        const int channel = half * kLanes + i, place = channel / 2 + (channel % 2) * kLanes;
        order[half][2 * i] = static_cast<std::uint16_t>(place);
        order[half][2 * i + 1] = static_cast<std::uint16_t>(place + kGroup);
      }
    lower_ = _mm512_load_si512(order[0]);
    upper_ = _mm512_load_si512(order[1]);
  }

  void put(i64 tile, int position, __m512i value) {
    if (tile % 2 == 0) {
      held_[position] = value;
      return;
    }
    bf16* at = to_ + position * position_stride_ + tile / 2 * pair_stride_;
    _mm512_store_si512(at, _mm512_permutex2var_epi16(held_[position], lower_, value));
    _mm512_store_si512(at + kGroup, _mm512_permutex2var_epi16(held_[position], upper_, value));
  }

  // An odd number of tiles ends with a tile of zeros.
  void finish(i64 tiles) {
    if (tiles % 2 == 1)
      for (int p = 0; p < kPositions; ++p) put(tiles, p, _mm512_setzero_si512());
  }

 private:
  bf16* to_;
  i64 position_stride_, pair_stride_;
  __m512i lower_, upper_, held_[kPositions];
};

// ---------------------------------------------------------------------------------------------------------------
// Filters

// U = G g G^T.
inline void transform_filter(const float g[9], float u[kPositions]) {
  float half[4][3];
  for (int j = 0; j < 3; ++j) {
    const float outer = 0.5f * (g[j] + g[6 + j]), middle = 0.5f * g[3 + j];
    half[0][j] = g[j];
    half[1][j] = outer + middle;
    half[2][j] = outer - middle;
    half[3][j] = g[6 + j];
  }
  for (int i = 0; i < 4; ++i) {
    const float outer = 0.5f * (half[i][0] + half[i][2]), middle = 0.5f * half[i][1];
    u[4 * i] = half[i][0];
    u[4 * i + 1] = outer + middle;
    u[4 * i + 2] = outer - middle;
    u[4 * i + 3] = half[i][2];
  }
}

// dg = G^T dU G for 16 filters at once, with the signs that `transform_gradient` left out.
inline void transform_filter_gradient(const __m512 u[kPositions], __m512 g[9]) {
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 rows[3][4];
  for (int j = 0; j < 4; ++j) {
    const __m512 sum = half * (u[4 + j] + u[8 + j]);
    rows[0][j] = u[j] + sum;
    rows[1][j] = half * (u[4 + j] - u[8 + j]);
    rows[2][j] = sum - u[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const __m512 sum = half * (rows[i][1] + rows[i][2]);
    g[3 * i] = rows[i][0] + sum;
    g[3 * i + 1] = half * (rows[i][1] - rows[i][2]);
    g[3 * i + 2] = sum - rows[i][3];
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Shares of the work and of the workspace

inline i64 round_up(i64 value, i64 unit) { return (value + unit - 1) / unit * unit; }

// First unit of a worker's share of `units`; the share ends where the next worker's begins.
inline i64 share(i64 units, i64 worker, i64 workers) { return units * worker / workers; }

struct ForwardPlan {
  i64 tiles;                   // of a block
  i64 v_position, m_position;  // elements from one position to the next
  i64 v_bytes, m_bytes, u_bytes;

  ForwardPlan(i64 in, i64 out) {
    tiles = std::clamp(kForwardBytes / (kPositions * in * i64{sizeof(bf16)}) / kChunk * kChunk, kChunk,
                       kForwardTiles);
    v_position = tiles * in + kGap / i64{sizeof(bf16)};
    m_position = kChunk * kPanel + kGap / i64{sizeof(float)};
    v_bytes = kPositions * v_position * i64{sizeof(bf16)};
    m_bytes = kPositions * m_position * i64{sizeof(float)};
    u_bytes = kPositions * in * out * i64{sizeof(bf16)};
  }
  i64 bytes(i64 workers) const { return u_bytes + workers * (v_bytes + m_bytes); }
};

struct GradPlan {
  i64 tiles;                   // of a block
  i64 v_position, m_position;  // elements from one position to the next; of M within a panel of kPanel
  i64 v_bytes, m_bytes, u_bytes, bias_bytes;

  GradPlan(i64 in, i64 out) {
    const i64 each = kPositions * (in + out) * i64{sizeof(bf16)};
    tiles = std::clamp(kGradBytes / each / 2 * 2, i64{kGradTiles / 2}, kGradTiles);
    v_position = tiles * in + kGap / i64{sizeof(bf16)};
    m_position = tiles * kPanel + kGap / i64{sizeof(bf16)};
    v_bytes = kPositions * v_position * i64{sizeof(bf16)};
    m_bytes = kPositions * m_position * round_up(out, kPanel) / kPanel * i64{sizeof(bf16)};
    u_bytes = kPositions * in * out * i64{sizeof(float)};
    bias_bytes = round_up(out * i64{sizeof(float)}, kAlign);
  }
  i64 each() const { return v_bytes + m_bytes + u_bytes + bias_bytes; }
  i64 bytes(i64 workers) const { return workers * each(); }
};

// ---------------------------------------------------------------------------------------------------------------
// The convolution

// Weights [out, in, 3, 3] of a panel as U; or of the backward convolution, whose inputs are the weights' outputs.
void pack_filters(const float* weights, bool backward, i64 in, i64 out, i64 from, i64 width, bf16* to) {
  for (i64 k = 0; k < in; ++k) {
    const i64 channel = channel_at(k);
    for (i64 n = 0; n < width; ++n) {
      float g[9], u[kPositions];
      const float* source = weights + 9 * (backward ? channel * out + from + n : (from + n) * in + channel);
      for (int i = 0; i < 9; ++i) g[i] = source[backward ? 8 - i : i];
      transform_filter(g, u);
      for (int p = 0; p < kPositions; ++p) to[((p * in / 2 + k / 2) * width + n) * 2 + k % 2] = round_to_bf16(u[p]);
    }
  }
}

// y = A^T M A for 16 outputs of a tile; `m` is that of position 0.
struct Square {
  __m512 y[2][2];

  Square(const float* m, i64 position_stride, __m512 bias) {
    __m512 top[4], bottom[4];
    for (int j = 0; j < 4; ++j) {
      const __m512 m0 = _mm512_load_ps(m + j * position_stride), m1 = _mm512_load_ps(m + (4 + j) * position_stride);
      const __m512 m2 = _mm512_load_ps(m + (8 + j) * position_stride);
      const __m512 m3 = _mm512_load_ps(m + (12 + j) * position_stride);
      // Position (1, 1) enters all four outputs with a plus sign: the bias rides on it.
      const __m512 inner = j == 1 ? m1 + bias : m1;
      top[j] = m0 + inner + m2;
      bottom[j] = inner - m2 - m3;
    }
    y[0][0] = top[0] + top[1] + top[2];
    y[0][1] = top[1] - top[2] - top[3];
    y[1][0] = bottom[0] + bottom[1] + bottom[2];
    y[1][1] = bottom[1] - bottom[2] - bottom[3];
  }
};

// 16 bfloat16 as float32, in their own order.
inline __m512 widen(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<__m512>(reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
}

// Outputs [from, from + width) of `count` tiles, from m [position][tile][width].
void transform_output(const float* m, i64 position_stride, i64 width, const float* bias, const bf16* residual, bf16* y,
                      const Image& image, i64 first, i64 count, i64 from) {
  const i64 below = image.width * image.channels;
  for (i64 c = 0; c < width; c += kGroup) {
    const __m512 bias0 = bias ? _mm512_loadu_ps(bias + from + c) : _mm512_setzero_ps();
    const __m512 bias1 = bias ? _mm512_loadu_ps(bias + from + c + kLanes) : _mm512_setzero_ps();
    for (i64 i = 0; i < count; ++i) {
      const Tile tile(image, first + i);
      const i64 corner = image.at(tile.b, 2 * tile.row, 2 * tile.column) + from + c;
      const Square lower(m + i * width + c, position_stride, bias0);
      const Square upper(m + i * width + c + kLanes, position_stride, bias1);
      for (int r = 0; r < 2; ++r)
        for (int s = 0; s < 2; ++s) {
          const i64 at = corner + r * below + s * image.channels;
          prefetch(y + at + 2 * below);
          if (residual) prefetch(residual + at + 2 * below);
          __m512 y0 = lower.y[r][s], y1 = upper.y[r][s];
          if (residual) {
            y0 += widen(residual + at);
            y1 += widen(residual + at + kLanes);
          }
          _mm512_storeu_si512(y + at, pack(y0, y1));
        }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Normalisation

// Even and odd places of 32 consecutive values, and back.
class Shuffle {
 public:
  Shuffle() {
    alignas(kAlign) std::int32_t even[kLanes], odd[kLanes], lower[kLanes], upper[kLanes];
    alignas(kAlign) std::uint16_t halves[kGroup];
    for (int i = 0; i < kLanes; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
      lower[i] = i / 2 + i % 2 * kLanes;
      upper[i] = lower[i] + kLanes / 2;
      halves[2 * i] = static_cast<std::uint16_t>(i);
      halves[2 * i + 1] = static_cast<std::uint16_t>(i + kLanes);
    }
    even_ = _mm512_load_si512(even);
    odd_ = _mm512_load_si512(odd);
    lower_ = _mm512_load_si512(lower);
    upper_ = _mm512_load_si512(upper);
    halves_ = _mm512_load_si512(halves);
  }

  Channels split(const float* from) const {
    const __m512 lower = _mm512_loadu_ps(from), upper = _mm512_loadu_ps(from + kLanes);
    return {_mm512_permutex2var_ps(lower, even_, upper), _mm512_permutex2var_ps(lower, odd_, upper)};
  }
  void join(Channels c, float* to) const {
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(c.even, lower_, c.odd));
    _mm512_storeu_ps(to + kLanes, _mm512_permutex2var_ps(c.even, upper_, c.odd));
  }
  void join(Channels c, bf16* to) const {
    _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(~__mmask32{0}, halves_, pack(c)));
  }

 private:
  __m512i even_, odd_, lower_, upper_, halves_;
};

inline Channels all(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }

inline Channels larger(Channels a, Channels b) {
  return {_mm512_maskz_max_ps(0xffff, a.even, b.even), _mm512_maskz_max_ps(0xffff, a.odd, b.odd)};
}

inline Channels leaky(Channels z, Channels slope) {
  const Channels low = z * slope;
  return larger(z, low);
}

// What comes back through the leaky unit: `gradient` where z > 0, slope * gradient elsewhere.
inline Channels leaky_backward(Channels z, Channels gradient, Channels slope) {
  const __m512 zero = _mm512_setzero_ps();
  const Channels low = gradient * slope;
  return {_mm512_mask_mov_ps(low.even, _mm512_cmp_ps_mask(z.even, zero, _CMP_GT_OQ), gradient.even),
          _mm512_mask_mov_ps(low.odd, _mm512_cmp_ps_mask(z.odd, zero, _CMP_GT_OQ), gradient.odd)};
}

// Of every `width` channels that follow each other, their mean in the place of each; `width` divides kGroup.
inline Channels averaged(const Shuffle& shuffle, Channels c, i64 width) {
  if (width == 1) return c;
  alignas(kAlign) float values[kGroup];
  shuffle.join(c, values);
  for (i64 first = 0; first < kGroup; first += width) {
    float sum = 0;
    for (i64 k = first; k < first + width; ++k) sum += values[k];
    for (i64 k = first; k < first + width; ++k) values[k] = sum / static_cast<float>(width);
  }
  return shuffle.split(values);
}

inline Channels inverse_root(Channels c) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return {one / _mm512_maskz_sqrt_ps(0xffff, c.even), one / _mm512_maskz_sqrt_ps(0xffff, c.odd)};
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------
// What kernels.py calls. Workspaces are aligned to 64 bytes.

extern "C" {

i64 raystar_conv3x3_bytes(i64 in, i64 out, i64 workers) { return ForwardPlan(in, out).bytes(workers); }

i64 raystar_conv3x3_weight_grad_bytes(i64 in, i64 out, i64 workers) {
  return GradPlan(in, out).bytes(workers);
}

// y [B,H,W,out] = conv(x [B,H,W,in], weights [out,in,3,3]) + bias [out] + residual [B,H,W,out]; the last two may be
// null. With `backward` weights are [in,out,3,3], and y is the gradient of their convolution's input.
void raystar_conv3x3(const bf16* x, const float* weights, const float* bias, const bf16* residual, bf16* y, i64 batch,
                     i64 height, i64 width, i64 in, i64 out, int backward, char* workspace, int workers) {
  const ForwardPlan plan(in, out);
  const Image input{batch, height, width, in}, output{batch, height, width, out};
  const i64 tiles = input.tiles(), blocks = (tiles + plan.tiles - 1) / plan.tiles;
  const i64 panels = (out + kPanel - 1) / kPanel;
  bf16* const u = reinterpret_cast<bf16*>(workspace);
#pragma omp parallel num_threads(workers)
  {
    const i64 worker = omp_get_thread_num(), team = omp_get_num_threads();
    for (i64 panel = share(panels, worker, team); panel < share(panels, worker + 1, team); ++panel)
      pack_filters(weights, backward != 0, in, out, panel * kPanel, std::min<i64>(kPanel, out - panel * kPanel),
                   u + panel * kPanel * kPositions * in);
#pragma omp barrier
    char* const mine = workspace + plan.u_bytes + worker * (plan.v_bytes + plan.m_bytes);
    bf16* const v = reinterpret_cast<bf16*>(mine);
    float* const m = reinterpret_cast<float*>(mine + plan.v_bytes);
    for (i64 block = share(blocks, worker, team); block < share(blocks, worker + 1, team); ++block) {
      const i64 first = block * plan.tiles, count = std::min(plan.tiles, tiles - first);
      for (i64 c = 0; c < in; c += kGroup)
        transform_input(x, input, first, count, c, [=](i64 tile, int position, __m512i value) {
          _mm512_store_si512(v + position * plan.v_position + tile * in + c, value);
        });
      for (i64 from = 0; from < out; from += kPanel) {
        const i64 panel_width = std::min<i64>(kPanel, out - from);
        for (i64 done = 0; done < count; done += kChunk) {
          const i64 rows = std::min(kChunk, count - done);
          for (i64 p = 0; p < kPositions; ++p) {
            const bf16* const a = v + p * plan.v_position + done * in;
            const bf16* const b = u + (from * kPositions + p * panel_width) * in;
            float* const c = m + p * plan.m_position;
            if (panel_width == kPanel)
              multiply_rows<kWideRows, 4>(a, in, 2, b, 2 * panel_width, in / 2, c, panel_width, rows, false);
            else
              multiply_rows<kSlimRows, 2>(a, in, 2, b, 2 * panel_width, in / 2, c, panel_width, rows, false);
          }
          transform_output(m, plan.m_position, panel_width, bias, residual, y, output, first + done, rows, from);
        }
      }
    }
  }
}

// dweights [out,in,3,3] and dbias [out] (may be null) of a convolution of x [B,H,W,in] with output gradient
// dy [B,H,W,out].
void raystar_conv3x3_weight_grad(const bf16* x, const bf16* dy, float* dweights, float* dbias, i64 batch, i64 height,
                                 i64 width, i64 in, i64 out, char* workspace, int workers) {
  const GradPlan plan(in, out);
  const Image input{batch, height, width, in}, output{batch, height, width, out};
  const i64 tiles = input.tiles(), blocks = (tiles + plan.tiles - 1) / plan.tiles;
#pragma omp parallel num_threads(workers)
  {
    const i64 worker = omp_get_thread_num(), team = omp_get_num_threads();
    const auto sums_of = [=](i64 w) {
      return reinterpret_cast<float*>(workspace + w * plan.each() + plan.v_bytes + plan.m_bytes);
    };
    char* const mine = workspace + worker * plan.each();
    bf16* const v = reinterpret_cast<bf16*>(mine);
    bf16* const m = reinterpret_cast<bf16*>(mine + plan.v_bytes);
    float* const sums = sums_of(worker);
    float* const bias = sums + kPositions * in * out;
    std::memset(sums, 0, static_cast<std::size_t>(plan.u_bytes + plan.bias_bytes));
    for (i64 block = share(blocks, worker, team); block < share(blocks, worker + 1, team); ++block) {
      const i64 first = block * plan.tiles, count = std::min(plan.tiles, tiles - first);
      const i64 pairs = (count + 1) / 2;
      for (i64 c = 0; c < in; c += kGroup) {
        Pairs to(v + c * 2 * pairs, plan.v_position, 2 * kGroup);
        transform_input(x, input, first, count, c,
                        [&](i64 tile, int position, __m512i value) { to.put(tile, position, value); });
        to.finish(count);
      }
      for (i64 c = 0; c < out; c += kGroup) {
        const i64 from = c / kPanel * kPanel, panel_width = std::min<i64>(kPanel, out - from);
        Pairs to(m + from / kPanel * kPositions * plan.m_position + (c - from) * 2, plan.m_position, 2 * panel_width);
        const Channels total =
            transform_gradient(dy, output, first, count, c,
                               [&](i64 tile, int position, __m512i value) { to.put(tile, position, value); });
        to.finish(count);
        alignas(kAlign) float even[kLanes], odd[kLanes];
        _mm512_store_ps(even, total.even);
        _mm512_store_ps(odd, total.odd);
        for (int i = 0; i < kLanes; ++i) {
          bias[c + 2 * i] += even[i];
          bias[c + 2 * i + 1] += odd[i];
        }
      }
      for (i64 p = 0; p < kPositions; ++p)
        for (i64 from = 0; from < out; from += kPanel) {
          const i64 panel_width = std::min<i64>(kPanel, out - from);
          const bf16* const b = m + (from / kPanel * kPositions + p) * plan.m_position;
          for (i64 c = 0; c < in; c += kGroup) {
            const bf16* const a = v + p * plan.v_position + c * 2 * pairs;
            float* const to = sums + (p * in + c) * out + from;
            if (panel_width == kPanel)
              multiply_rows<kWideRows, 4>(a, 2, 2 * kGroup, b, 2 * panel_width, pairs, to, out, kGroup, true);
            else
              multiply_rows<kSlimRows, 2>(a, 2, 2 * kGroup, b, 2 * panel_width, pairs, to, out, kGroup, true);
          }
        }
    }
#pragma omp barrier
    for (i64 i = share(in, worker, team); i < share(in, worker + 1, team); ++i)
      for (i64 o = 0; o < out; o += kLanes) {
        __m512 du[kPositions], dg[9];
        for (i64 p = 0; p < kPositions; ++p) {
          du[p] = _mm512_setzero_ps();
          for (i64 w = 0; w < team; ++w) du[p] += _mm512_load_ps(sums_of(w) + (p * in + i) * out + o);
        }
        transform_filter_gradient(du, dg);
        for (int k = 0; k < 9; ++k) {
          alignas(kAlign) float values[kLanes];
          _mm512_store_ps(values, dg[k]);
          for (i64 lane = 0; lane < kLanes; ++lane) dweights[((o + lane) * in + i) * 9 + k] = values[lane];
        }
      }
    if (dbias)
      for (i64 o = share(out, worker, team); o < share(out, worker + 1, team); ++o) {
        dbias[o] = 0;
        for (i64 w = 0; w < team; ++w) dbias[o] += sums_of(w)[kPositions * in * out + o];
      }
  }
}

// y = leaky(scale * (x - mean) / sqrt(var + eps) + shift) of x [B,pixels,C], with mean and (biased) variance over the
// pixels of each sample and of every `width` channels; scale, shift, mean and rstd = 1 / sqrt(var + eps) are [B,C].
void raystar_norm_leaky(const bf16* x, const float* scale, const float* shift, bf16* y, float* mean, float* rstd,
                        i64 batch, i64 pixels, i64 channels, i64 width, float eps, float slope, int workers) {
  const i64 groups = channels / kGroup, units = batch * groups, ahead = kAhead * channels;
#pragma omp parallel num_threads(workers)
  {
    const i64 worker = omp_get_thread_num(), team = omp_get_num_threads();
    const Shuffle shuffle;
    for (i64 unit = share(units, worker, team); unit < share(units, worker + 1, team); ++unit) {
      const i64 at = unit / groups * channels + unit % groups * kGroup;
      const i64 start = unit / groups * pixels * channels + unit % groups * kGroup, end = start + pixels * channels;
      // Sums of differences from the first pixel: the variance does not drown in the mean's square.
      const Channels origin = load(x + start), count = all(1.0f / static_cast<float>(pixels));
      Channels sum = all(0), squares = all(0);
      for (i64 i = start; i < end; i += channels) {
        prefetch(x + i + ahead);
        const Channels d = load(x + i) - origin;
        sum = sum + d;
        squares = squares + d * d;
      }
      const Channels offset = sum * count, own = origin + offset, centre = averaged(shuffle, own, width);
      Channels variance = squares * count - offset * offset;
      if (width > 1) variance = averaged(shuffle, variance + (own - centre) * (own - centre), width);
      const Channels inverse = inverse_root(larger(variance, all(0)) + all(eps));
      shuffle.join(centre, mean + at);
      shuffle.join(inverse, rstd + at);
      const Channels a = shuffle.split(scale + at) * inverse, c = shuffle.split(shift + at) - centre * a;
      for (i64 i = start; i < end; i += channels) {
        prefetch(x + i + ahead);
        shuffle.join(leaky(load(x + i) * a + c, all(slope)), y + i);
      }
    }
  }
}

// Gradients dx, dscale, dshift from dy; x, scale, shift, mean and rstd as above.
void raystar_norm_leaky_backward(const bf16* x, const bf16* dy, const float* scale, const float* shift,
                                 const float* mean, const float* rstd, bf16* dx, float* dscale, float* dshift,
                                 i64 batch, i64 pixels, i64 channels, i64 width, float slope, int workers) {
  const i64 groups = channels / kGroup, units = batch * groups, ahead = kAhead * channels;
#pragma omp parallel num_threads(workers)
  {
    const i64 worker = omp_get_thread_num(), team = omp_get_num_threads();
    const Shuffle shuffle;
    for (i64 unit = share(units, worker, team); unit < share(units, worker + 1, team); ++unit) {
      const i64 at = unit / groups * channels + unit % groups * kGroup;
      const i64 start = unit / groups * pixels * channels + unit % groups * kGroup, end = start + pixels * channels;
      const Channels centre = shuffle.split(mean + at), inverse = shuffle.split(rstd + at);
      const Channels a = shuffle.split(scale + at) * inverse, c = shuffle.split(shift + at) - centre * a;
      Channels sum = all(0), product = all(0);  // of dz, and of dz (x - mean)
      for (i64 i = start; i < end; i += channels) {
        prefetch(x + i + ahead);
        prefetch(dy + i + ahead);
        const Channels value = load(x + i), dz = leaky_backward(value * a + c, load(dy + i), all(slope));
        sum = sum + dz;
        product = product + dz * (value - centre);
      }
      shuffle.join(sum, dshift + at);
      shuffle.join(product * inverse, dscale + at);
      // dx = a dz - mean(a dz) - (x - mean) rstd^2 mean(a dz (x - mean)), written as a dz + x k + l.
      const Channels count = all(1.0f / static_cast<float>(pixels));
      const Channels k = all(0) - averaged(shuffle, a * inverse * inverse * product, width) * count;
      const Channels l = all(0) - averaged(shuffle, a * sum, width) * count - centre * k;
      for (i64 i = start; i < end; i += channels) {
        prefetch(x + i + ahead);
        prefetch(dy + i + ahead);
        const Channels value = load(x + i), dz = leaky_backward(value * a + c, load(dy + i), all(slope));
        shuffle.join(a * dz + value * k + l, dx + i);
      }
    }
  }
}

}  // extern "C"
