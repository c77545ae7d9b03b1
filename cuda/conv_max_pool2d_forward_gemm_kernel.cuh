// conv_max_pool2d forward as an implicit matrix product: tensor cores (TF32, bfloat16, float16) or float32 arithmetic.
//
//   w (K,Cg,R,S) -> packed (groups, K padded, Q padded), once per call, into the workspace
//   x (N,C,H,W) -> slabs of A (positions, Q) -+
//                  packed -> slabs of B (K, Q) -+-> accumulators (positions, K), in registers
//     -> window max -> (windows, K) in shared memory -> + bias -> activation -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// A block computes kRows convolution positions of kColumns output channels of one group. It goes along Q in slabs of
// 64 bytes per row, copied asynchronously kStages - 1 slabs ahead. Rows of shared memory are 16 bytes longer than a
// slab, which spreads the eight rows of a matrix load, and those of a scattered copy, over all banks.
//
// Q is ordered (channel block, r, s, c). A channel block is a slab's worth of channels where that divides them, else
// all: the R * S slabs of a block read the same few lines of input one after the other, from the L1 cache.
//
// How A is read (class Loader):
//   vector   16-byte copies along c, where channels lie side by side and every address is aligned
//   gather   any strides: element by element; a warp takes 8 positions x 4 words of Q, so that with NCHW the positions
//            make whole 32-byte sectors. 16-bit elements, which cannot be copied asynchronously, go through registers
// How windows are pooled:
//   in registers   2x2 windows at strides of 2 or more. Rows are ordered so that the four positions of a window meet in
//                  one thread: of 32 rows, row m is position m / 8 of window m % 8. Windows are numbered through
//                  (n, ph, pw), so that no tile is partial but the last, whatever the size of the map.
//   in shared      everything else: the rows are the rectangle of positions under a tile of windows (its halo is
//                  computed by both neighbours), of several images where maps are small
//
// A sum goes along Q in one order in one thread: results do not depend on the choice of the tile.
#pragma once

#include <type_traits>

#include "conv_max_pool2d.cuh"
#include "warp_gemm.cuh"

namespace pyconv::cuda {

// Where a block's rows and windows lie, and how far the reduction goes.
struct ForwardTiling {
  int slabs;                // of the reduction
  int reduction;            // Q: R * S * channels of a group
  int column_tiles;         // blocks along the output channels of a group
  int position_tiles;       // blocks along the positions
  int windows;              // of a block, at most
  int images, rows, columns;  // in shared: the block's windows, images * rows * columns
  int rectangle_rows, rectangle_columns;  // positions under rows and columns
  Divisor by_channel_block, by_channels, by_kernel_columns;  // reduction and channels of a channel block
  Divisor by_windows;        // windows of a block
  Divisor by_window_plane, by_window_columns;  // windows of an image's share: in registers PH * PW and PW
  Divisor by_rectangle, by_rectangle_columns;
  Divisor by_tiles_of_image, by_tile_columns;  // in shared: tiles of an image, and of a row of tiles
};

struct ForwardArguments {
  ConvMaxPool2dForwardParams params;
  ForwardTiling tiling;
};

constexpr int kSlabBytes = 64;
constexpr int kSlabPitch = kSlabBytes + 16;

template <class Math_, bool VECTOR, bool IN_REGISTERS, int MT_, int NT_, int WARP_ROWS, int WARP_COLUMNS, int STAGES,
          int BLOCKS_PER_SM>
struct ForwardTile {
  using Math = Math_;
  using Storage = typename Math::Storage;
  static constexpr bool kVector = VECTOR, kInRegisters = IN_REGISTERS;
  static constexpr int kMT = MT_, kNT = NT_, kWarpRows = WARP_ROWS, kWarpColumns = WARP_COLUMNS;
  static constexpr int kStages = STAGES, kBlocksPerSm = BLOCKS_PER_SM;
  static constexpr int kWarps = WARP_ROWS * WARP_COLUMNS, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kMT * WARP_ROWS, kColumns = 8 * kNT * WARP_COLUMNS;
  static constexpr int kElementBytes = static_cast<int>(sizeof(Storage));
  static constexpr int kSlab = kSlabBytes / kElementBytes;  // elements of a row's slab
  static constexpr int kStageBytes = (kRows + kColumns) * kSlabPitch;
  // What the epilogue puts where the slabs were: in registers the windows' maxima and their positions, in shared the
  // accumulators. An odd pitch serves threads along the channels and threads along the windows.
  static constexpr int kPitch = kColumns + 1;
  static constexpr int kWindows = kRows / 4;  // in registers
  static constexpr int kEpilogueBytes = kInRegisters ? kWindows * kPitch * 5 : kRows * kPitch * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kEpilogueBytes ? kStages * kStageBytes : kEpilogueBytes;
  static_assert(!kInRegisters || kMT % 2 == 0, "a window's positions fill two tiles of rows");
  static_assert(kSharedBytes <= static_cast<int>(kMaxSharedBytes), "the shared memory of one block");

  struct Shared {
    alignas(16) char bytes[kSharedBytes];
  };
};

// ---- Geometry of a block --------------------------------------------------------------------------------------

// What a block computes.
struct ForwardBlock {
  int group;
  int first_k;             // within the group
  int first_image;         // in registers: of the block's first window
  int first_window;        // in registers: the first window's number within that image
  int first_row, first_column;  // in shared: the first window
};

// One window of the output; valid is false beyond the output's end.
struct Window {
  int n, row, column;
  bool valid;
};

template <class Tile>
__device__ __forceinline__ ForwardBlock forward_block(const ForwardArguments& f) {
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  ForwardBlock block;
  const unsigned index = blockIdx.x;
  const unsigned tile = index / static_cast<unsigned>(t.column_tiles);
  block.first_k = static_cast<int>(index - tile * t.column_tiles) * Tile::kColumns;
  block.group = static_cast<int>(tile / static_cast<unsigned>(t.position_tiles));
  const int position = static_cast<int>(tile - static_cast<unsigned>(block.group) * t.position_tiles);
  if constexpr (Tile::kInRegisters) {
    const int64_t first = static_cast<int64_t>(position) * Tile::kWindows;
    const int64_t plane = g.PH * g.PW;
    block.first_image = static_cast<int>(first / plane);
    block.first_window = static_cast<int>(first - block.first_image * plane);
    block.first_row = block.first_column = 0;
  } else {
    const int image_tile = t.by_tiles_of_image.quotient(position);
    const int in_image = position - image_tile * t.by_tiles_of_image.divisor;
    const int tile_row = t.by_tile_columns.quotient(in_image);
    block.first_image = image_tile * t.images;
    block.first_row = tile_row * t.rows;
    block.first_column = (in_image - tile_row * t.by_tile_columns.divisor) * t.columns;
    block.first_window = 0;
  }
  return block;
}

template <class Tile>
__device__ __forceinline__ Window window_at(const ForwardArguments& f, const ForwardBlock& block, int index) {
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  const int number = block.first_window + index;
  const int image = t.by_window_plane.quotient(number);
  const int in_plane = number - image * t.by_window_plane.divisor;
  const int row = t.by_window_columns.quotient(in_plane);
  Window window;
  window.n = block.first_image + image;
  window.row = block.first_row + row;
  window.column = block.first_column + in_plane - row * t.by_window_columns.divisor;
  window.valid = window.n < g.N && window.row < g.PH && window.column < g.PW;
  return window;
}

// Row and column of the convolution output that a window begins at; negative in the padding.
__device__ __forceinline__ int window_top(const ConvMaxPool2dGeometry& g, int row) {
  return row * static_cast<int>(g.pool_stride_h) - static_cast<int>(g.pool_pad_h);
}
__device__ __forceinline__ int window_left(const ConvMaxPool2dGeometry& g, int column) {
  return column * static_cast<int>(g.pool_stride_w) - static_cast<int>(g.pool_pad_w);
}

__device__ __forceinline__ bool is_position(const ConvMaxPool2dGeometry& g, int row, int column) {
  return static_cast<unsigned>(row) < static_cast<unsigned>(g.OH) &&
         static_cast<unsigned>(column) < static_cast<unsigned>(g.OW);
}

// The input under one convolution position: the element of its first tap and the group's first channel (which may lie
// in the padding), and where that is.
struct InputRow {
  const char* base;
  int h, w;
};

constexpr int kNoRow = -(1 << 30);  // no tap makes it a row of the input

template <class Tile>
__device__ __forceinline__ InputRow input_row(const ForwardArguments& f, const ForwardBlock& block, int m) {
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  int n, row, column;
  bool valid;
  if constexpr (Tile::kInRegisters) {
    const Window window = window_at<Tile>(f, block, m / 32 * 8 + m % 8);
    const int position = m % 32 / 8;
    n = window.n;
    row = window_top(g, window.row) + position / 2 * static_cast<int>(g.pool_dilation_h);
    column = window_left(g, window.column) + position % 2 * static_cast<int>(g.pool_dilation_w);
    valid = window.valid;
  } else {
    const int image = t.by_rectangle.quotient(m);
    const int in_rectangle = m - image * t.by_rectangle.divisor;
    const int y = t.by_rectangle_columns.quotient(in_rectangle);
    n = block.first_image + image;
    row = window_top(g, block.first_row) + y;
    column = window_left(g, block.first_column) + in_rectangle - y * t.rectangle_columns;
    valid = image < t.images && n < g.N;
  }
  if (!valid || !is_position(g, row, column)) return {static_cast<const char*>(f.params.input), kNoRow, 0};
  const Strides4& st = f.params.input_strides;
  InputRow in;
  in.h = row * static_cast<int>(g.stride_h) - static_cast<int>(g.pad_top);
  in.w = column * static_cast<int>(g.stride_w) - static_cast<int>(g.pad_left);
  in.base = static_cast<const char*>(f.params.input) +
            (n * st.n + block.group * (g.C / g.groups) * st.c + in.h * st.h + in.w * st.w) * Tile::kElementBytes;
  return in;
}

// One element of the reduction: how far its input lies from the first tap's, in rows, columns and bytes.
struct Tap {
  int64_t bytes;
  int h, w;
};

template <class Tile>
__device__ __forceinline__ Tap tap_at(const ForwardArguments& f, int q) {
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  const Strides4& st = f.params.input_strides;
  const int channel_block = t.by_channel_block.quotient(q);
  const int in_block = q - channel_block * t.by_channel_block.divisor;
  const int tap = t.by_channels.quotient(in_block);
  const int c = channel_block * t.by_channels.divisor + in_block - tap * t.by_channels.divisor;
  const int r = t.by_kernel_columns.quotient(tap), s = tap - r * t.by_kernel_columns.divisor;
  Tap result;
  result.h = r * static_cast<int>(g.dilation_h);
  result.w = s * static_cast<int>(g.dilation_w);
  result.bytes = (result.h * st.h + result.w * st.w + c * st.c) * Tile::kElementBytes;
  if (q >= t.reduction) result.h = kNoRow;
  return result;
}

__device__ __forceinline__ bool is_input(const ConvMaxPool2dGeometry& g, const InputRow& row, const Tap& tap) {
  return static_cast<unsigned>(row.h + tap.h) < static_cast<unsigned>(g.H) &&
         static_cast<unsigned>(row.w + tap.w) < static_cast<unsigned>(g.W);
}

// ---- Loaders of A ---------------------------------------------------------------------------------------------

// begin(slab, a): starts to bring a slab to `a`; end(a): what is left to do for it once the arithmetic in between is
// issued. Visible after copies_wait and a barrier.

// 16 bytes along c at a time.
template <class Tile>
struct VectorLoader {
  static constexpr int kChunks = kSlabBytes / 16, kRowsPerPass = Tile::kThreads / kChunks;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(Tile::kRows % kRowsPerPass == 0, "every pass is full");
  InputRow rows[kPasses];

  __device__ __forceinline__ VectorLoader(const ForwardArguments& f, const ForwardBlock& block) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      rows[i] = input_row<Tile>(f, block, static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass);
    }
  }

  __device__ __forceinline__ void begin(const ForwardArguments& f, int slab, char* a) {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const Tap tap = tap_at<Tile>(f, slab * Tile::kSlab + chunk * (16 / Tile::kElementBytes));
    char* to = a + static_cast<int>(threadIdx.x) / kChunks * kSlabPitch + chunk * 16;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_async<16, /*KEEP_IN_L1=*/true>(to + i * kRowsPerPass * kSlabPitch, rows[i].base + tap.bytes,
                                          is_input(f.params.geometry, rows[i], tap));
    }
  }

  __device__ __forceinline__ void end(char*) {}
};

// 4 bytes of the reduction at a time: one float, or two 16-bit elements.
template <class Tile>
struct GatherLoader {
  using Storage = typename Tile::Storage;
  static constexpr bool kAsync = sizeof(Storage) == 4;
  static constexpr int kRowsPerPass = 8 * Tile::kWarps, kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kWords = kSlabBytes / 16;  // 4-byte words of a row that a thread brings
  static_assert(Tile::kRows % kRowsPerPass == 0, "every pass is full");
  InputRow rows[kPasses];
  uint32_t pairs[kAsync ? 1 : kPasses][kWords];

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 * 8 + lane_index() % 8;
  }
  static __device__ __forceinline__ int word(int j) { return 4 * j + lane_index() / 8; }

  __device__ __forceinline__ GatherLoader(const ForwardArguments& f, const ForwardBlock& block) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = input_row<Tile>(f, block, first_row() + i * kRowsPerPass);
  }

  __device__ __forceinline__ void begin(const ForwardArguments& f, int slab, char* a) {
    const ConvMaxPool2dGeometry& g = f.params.geometry;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if constexpr (kAsync) {
        const Tap tap = tap_at<Tile>(f, slab * Tile::kSlab + word(j));
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          copy_async<4>(a + (first_row() + i * kRowsPerPass) * kSlabPitch + 4 * word(j), rows[i].base + tap.bytes,
                        is_input(g, rows[i], tap));
        }
      } else {
        const int q = slab * Tile::kSlab + 2 * word(j);
        const Tap low = tap_at<Tile>(f, q), high = tap_at<Tile>(f, q + 1);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          pairs[i][j] = element(g, rows[i], low) | element(g, rows[i], high) << 16;
        }
      }
    }
  }

  __device__ __forceinline__ void end(char* a) {
    if constexpr (!kAsync) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          *reinterpret_cast<uint32_t*>(a + (first_row() + i * kRowsPerPass) * kSlabPitch + 4 * word(j)) = pairs[i][j];
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t element(const ConvMaxPool2dGeometry& g, const InputRow& row,
                                                     const Tap& tap) {
    return is_input(g, row, tap) ? *reinterpret_cast<const uint16_t*>(row.base + tap.bytes) : 0u;
  }
};

// Slabs of the packed weights: always aligned, always inside.
template <class Tile>
__device__ __forceinline__ void copy_weights(const ForwardArguments& f, const ForwardBlock& block, int slab, char* b) {
  constexpr int kChunks = kSlabBytes / 16;
  const int64_t row_bytes = static_cast<int64_t>(f.tiling.slabs) * kSlabBytes;
  const int64_t first = static_cast<int64_t>(block.group) * f.tiling.column_tiles * Tile::kColumns + block.first_k;
  const char* from = static_cast<const char*>(f.params.workspace) + first * row_bytes + slab * kSlabBytes;
#pragma unroll
  for (int begin = 0; begin < Tile::kColumns * kChunks; begin += Tile::kThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    if (Tile::kColumns * kChunks % Tile::kThreads == 0 || i < Tile::kColumns * kChunks) {
      copy_async<16>(b + i / kChunks * kSlabPitch + i % kChunks * 16, from + i / kChunks * row_bytes + i % kChunks * 16,
                     true);
    }
  }
}

// ---- Epilogue -------------------------------------------------------------------------------------------------

// action(row, column, accumulator) for each accumulator of this thread.
template <class Tile, class Sums, class Action>
__device__ __forceinline__ void for_each_sum(const Sums& sums, int warp_row, int warp_column, const Action& action) {
#pragma unroll
  for (int mt = 0; mt < Tile::kMT; ++mt) {
#pragma unroll
    for (int nt = 0; nt < Tile::kNT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        action(warp_row + 16 * mt + tile_row(i), warp_column + 8 * nt + tile_column(i), sums.sum[mt][nt][i]);
      }
    }
  }
}

// Accumulators -> maxima[window][column] and positions[window][column].
template <class Tile, class Sums>
__device__ __forceinline__ void pool_in_registers(const ForwardArguments& f, const ForwardBlock& block,
                                                  const Sums& sums, int warp_row, int warp_column, float* maxima,
                                                  uint8_t* positions) {
  const ConvMaxPool2dGeometry& g = f.params.geometry;
#pragma unroll
  for (int pair = 0; pair < Tile::kMT / 2; ++pair) {
    const int index = warp_row / 4 + 8 * pair + lane_index() / 4;
    const Window window = window_at<Tile>(f, block, index);
    const int top = window_top(g, window.row), left = window_left(g, window.column);
    bool valid[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      valid[i] = is_position(g, top + i / 2 * static_cast<int>(g.pool_dilation_h),
                             left + i % 2 * static_cast<int>(g.pool_dilation_w));
    }
#pragma unroll
    for (int nt = 0; nt < Tile::kNT; ++nt) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        WindowMax<float> best;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (valid[i]) best.take(sums.sum[2 * pair + i / 2][nt][2 * (i % 2) + column], i);
        }
        const int at = index * Tile::kPitch + warp_column + 8 * nt + tile_column(column);
        maxima[at] = best.value;
        positions[at] = static_cast<uint8_t>(best.position);
      }
    }
  }
}

// The maximum of one window over the accumulators sums[position of the rectangle][column].
template <class Tile>
__device__ __forceinline__ WindowMax<float> pool_in_shared(const ForwardArguments& f, const ForwardBlock& block,
                                                           const Window& window, const float* sums) {
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  const int top = window_top(g, window.row), left = window_left(g, window.column);
  const int first_row = window_top(g, block.first_row), first_column = window_left(g, block.first_column);
  const int pool_h = static_cast<int>(g.pool_h), pool_w = static_cast<int>(g.pool_w);
  const int image = (window.n - block.first_image) * t.rectangle_rows;
  WindowMax<float> best;
  for (int y = 0; y < pool_h; ++y) {
    const int row = top + y * static_cast<int>(g.pool_dilation_h);
    for (int x = 0; x < pool_w; ++x) {
      const int column = left + x * static_cast<int>(g.pool_dilation_w);
      if (!is_position(g, row, column)) continue;
      const int m = (image + row - first_row) * t.rectangle_columns + column - first_column;
      best.take(sums[m * Tile::kPitch], y * pool_w + x);
    }
  }
  return best;
}

// Pooled outputs of the block -> memory. Neighbouring threads write neighbouring outputs.
template <class Tile>
__device__ __forceinline__ void write_windows(const ForwardArguments& f, const ForwardBlock& block, const float* values,
                                              const uint8_t* positions) {
  using Storage = typename Tile::Storage;
  const ConvMaxPool2dForwardParams& p = f.params;
  const Strides4& st = p.output_strides;
  const int Kg = static_cast<int>(p.geometry.K / p.geometry.groups);
  const int windows = f.tiling.windows;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < windows * Tile::kColumns; i += Tile::kThreads) {
    int index, column;
    if (st.c == 1) {
      index = i / Tile::kColumns;
      column = i % Tile::kColumns;
    } else {
      column = f.tiling.by_windows.quotient(i);
      index = i - column * windows;
    }
    const Window window = window_at<Tile>(f, block, index);
    if (!window.valid || block.first_k + column >= Kg) continue;
    WindowMax<float> best;
    if constexpr (Tile::kInRegisters) {
      best.value = values[index * Tile::kPitch + column];
      const uint8_t position = positions[index * Tile::kPitch + column];
      best.position = position == kNoGradientByte ? -1 : position;
    } else {
      best = pool_in_shared<Tile>(f, block, window, values + column);
    }
    const int64_t k = static_cast<int64_t>(block.group) * Kg + block.first_k + column;
    write_window<Storage>(p, window.n * st.n + k * st.c + window.row * st.h + window.column * st.w, best,
                          bias_of<Storage>(p, k));
  }
}

// ---- Kernels --------------------------------------------------------------------------------------------------

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    conv_max_pool2d_forward_gemm_kernel(const ForwardArguments f) {
  using Math = typename Tile::Math;
  using Loader = std::conditional_t<Tile::kVector, VectorLoader<Tile>, GatherLoader<Tile>>;
  char* const shared = shared_memory<typename Tile::Shared>().bytes;
  const ForwardBlock block = forward_block<Tile>(f);
  const int slabs = f.tiling.slabs;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / Tile::kWarpColumns * 16 * Tile::kMT;
  const int warp_column = warp % Tile::kWarpColumns * 8 * Tile::kNT;
  constexpr int kB = Tile::kRows * kSlabPitch;  // where B begins in a stage

  Loader loader(f, block);
#pragma unroll 1
  for (int slab = 0; slab < Tile::kStages - 1; ++slab) {
    char* const stage = shared + slab * Tile::kStageBytes;
    if (slab < slabs) {
      loader.begin(f, slab, stage);
      copy_weights<Tile>(f, block, slab, stage + kB);
      loader.end(stage);
    }
    copies_commit();
  }

  RowsOfA<Math, Tile::kMT> a_rows;
  a_rows.set([&](int m) { return shared + (warp_row + m) * kSlabPitch; });
  RowsOfB<Math, Tile::kNT> b_rows;
  b_rows.set([&](int n) { return shared + kB + (warp_column + n) * kSlabPitch; });
  WarpTile<Math, Tile::kMT, Tile::kNT> sums;
  sums.clear();
  int stage = 0, next_stage = Tile::kStages - 1;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    copies_wait<Tile::kStages - 2>();
    __syncthreads();  // the slab has arrived, and nobody reads the one before any more: its stage is free
    const int next = slab + Tile::kStages - 1;
    char* const next_a = shared + next_stage * Tile::kStageBytes;
    if (next < slabs) {
      loader.begin(f, next, next_a);
      copy_weights<Tile>(f, block, next, next_a + kB);
    }
    copies_commit();
#pragma unroll
    for (int step = 0; step < kSlabBytes; step += kStepBytes) {
      sums.multiply(a_rows, stage * Tile::kStageBytes + step, b_rows, stage * Tile::kStageBytes + step);
    }
    if (next < slabs) loader.end(next_a);
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == Tile::kStages ? 0 : next_stage + 1;
  }
  copies_wait<0>();
  __syncthreads();

  float* const values = reinterpret_cast<float*>(shared);
  uint8_t* const positions = reinterpret_cast<uint8_t*>(values + Tile::kWindows * Tile::kPitch);
  if constexpr (Tile::kInRegisters) {
    pool_in_registers<Tile>(f, block, sums, warp_row, warp_column, values, positions);
  } else {
    for_each_sum<Tile>(sums, warp_row, warp_column,
                       [&](int row, int column, float sum) { values[row * Tile::kPitch + column] = sum; });
  }
  __syncthreads();
  write_windows<Tile>(f, block, values, positions);
}

}  // namespace pyconv::cuda
