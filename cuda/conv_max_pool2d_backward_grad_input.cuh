// The input gradient of conv_max_pool2d as an implicit matrix product.
//
//   (grad_output, argmax) (N,K,PH,PW) -> dY (positions + halo, 64 bytes of K) in shared memory -> dX (N,C,H,W)
//
// With convolution stride s, an input row h + pad = s * q + a has quotient q and residue a. Filter row r reaches it
// from the output row q - m where r * dilation = s * m + a: the shift m depends on the filter row alone. So all
// residues read the same dY, and the product is one of stride 1:
//
//   M = (n, q_h, q_w), N = (a_h, a_w, c), reduction = (k, m_h, m_w)
//
// Weights are packed once per call, zero where no filter row belongs to (m, a). Such a zero times a gradient that is not
// finite would spread NaN to inputs that the gradient does not reach: where there are such zeros and a result is not
// finite, a second pass computes what is not finite anew. A block takes a rectangle of quotients
// (or several whole images) and expands the dY that all its shifts need ONCE per slab of K; a shift then is a constant
// offset of the rows of A. The expansion of the next slab is spread over the shifts of the present one. Weights come by
// cp.async, 3 stages.
//
// Per slab a block reads 1 + sizeof(T) bytes per window and channel, and for each shift 64 bytes per column, for
// 2 * rows * columns * 64 / sizeof(T) operations per shift: 128 x 128 tiles do 64 (float32) operations per byte of
// weights, which L2 holds. What is written is dX alone.
#pragma once

#include "conv_max_pool2d_backward_expand.cuh"
#include "conv_max_pool2d_backward_gemm.cuh"
#include "conv_max_pool2d_backward_pack_weights.cuh"

namespace pyconv::cuda {

constexpr int kGradInputStages = 3;
constexpr int kSlabPitch = kSlabBytes + 16;  // rows of 8 consecutive positions fall into different banks

// A block's share of the product. WR groups of warps take every WR-th shift and add up at the end: blocks of few rows
// and columns with work for four warps, where a larger tile would leave multiprocessors idle.
template <class MATH, int MT, int NT, int WM, int WN, int WR, int POSITIONS, int BLOCKS>
struct GradInputTile {
  using Math = MATH;
  static constexpr int kMt = MT, kNt = NT, kWarpsM = WM, kWarpsN = WN, kSplits = WR;
  static constexpr int kRows = 16 * MT * WM, kColumns = 8 * NT * WN, kThreads = 32 * WM * WN * WR;
  static constexpr int kPositions = POSITIONS;  // of dY, halo included
  static constexpr int kBlocks = BLOCKS;        // per multiprocessor, as far as registers decide
};

// The tile's rectangle of quotients and where it lies.
struct GradInputGrid {
  int images, rows, columns;  // of one tile
  int image_tiles, row_tiles, column_tiles;
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
struct GradInputProblem {
  ConvMaxPool2dBackwardParams params;
  WindowSource windows;
  const T* weights;  // packed
  PackedWeights packed;
  GradInputGrid grid;
  int column_blocks;
  int first_row, first_column;  // quotients of the first input row and column
  bool pairs;                   // two neighbouring channels of grad_input are one aligned store
  int* not_finite;              // is set where a result is not finite; null where that may stay
};

template <class Tile>
struct GradInputMemory {
  alignas(16) unsigned char gradients[2][Tile::kPositions][kSlabPitch];
  alignas(16) unsigned char weights[kGradInputStages][Tile::kSplits][Tile::kColumns][kSlabPitch];
  PositionWindows windows[Tile::kPositions];
  struct {
    int64_t offset;
    int row, column;  // residues; a row beyond every image where the column is padding
  } targets[Tile::kColumns];
};

// kernels

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_max_pool2d_backward_grad_input_kernel(GradInputProblem<typename Tile::Math::Storage> a) {
  using Math = typename Tile::Math;
  using T = typename Math::Storage;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kPieces = kSlabBytes / 16;
  auto& memory = shared_memory<GradInputMemory<Tile>>();
  const ConvMaxPool2dBackwardParams& p = a.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.grad_input_strides;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = lane_index();
  const int warp_m = warp % Tile::kWarpsM, warp_n = warp / Tile::kWarpsM % Tile::kWarpsN;
  const int split = warp / (Tile::kWarpsM * Tile::kWarpsN);

  int block = static_cast<int>(blockIdx.x);
  const int first_n = block % a.column_blocks * Tile::kColumns;
  block /= a.column_blocks;
  const int first_column = a.first_column + block % a.grid.column_tiles * a.grid.columns;
  block /= a.grid.column_tiles;
  const int first_row = a.first_row + block % a.grid.row_tiles * a.grid.rows;
  block /= a.grid.row_tiles;
  const int64_t first_image = static_cast<int64_t>(block % a.grid.image_tiles) * a.grid.images;
  const int group = block / a.grid.image_tiles;

  const int last_row_shift = a.packed.rows.last(), last_column_shift = a.packed.columns.last();
  const int halo_rows = a.grid.rows + last_row_shift, halo_columns = a.grid.columns + last_column_shift;
  const int positions = a.grid.images * halo_rows * halo_columns;
  const int Kg = static_cast<int>(g.K / g.groups), Cg = static_cast<int>(g.C / g.groups);

  for (int i = thread; i < positions; i += Tile::kThreads) {
    const int64_t n = first_image + i / (halo_rows * halo_columns);
    const int row = first_row - last_row_shift + i / halo_columns % halo_rows;
    const int column = first_column - last_column_shift + i % halo_columns;
    const bool inside = n < g.N && row >= 0 && row < g.OH && column >= 0 && column < g.OW;
    memory.windows[i] = inside ? windows_at(p, n, row, column) : no_windows();
  }
  for (int i = thread; i < Tile::kColumns; i += Tile::kThreads) {
    const int stride_w = static_cast<int>(g.stride_w), n = first_n + i, c = n % Cg, residue = n / Cg;
    const int row = residue / stride_w, column = residue % stride_w;
    memory.targets[i] = {(static_cast<int64_t>(group) * Cg + c) * st.c + row * st.h + column * st.w,
                         n < a.packed.n ? row : kBeyondEveryImage, column};
  }
  __syncthreads();

  // Items [begin, end) of a slab's dY, an item being 16 bytes of one position.
  const auto expand_slab = [&](int slab, int begin, int end) {
    expand<T>(a.windows, begin + thread, end, Tile::kThreads, [&](int i) -> ExpandItem<T> {
      const int position = a.windows.channel == 1 ? i / kPieces : i % positions;
      const int piece = a.windows.channel == 1 ? i % kPieces : i / positions;
      const int channel = slab * kSlab + piece * kChunk<T>;
      return {memory.windows[position], static_cast<int64_t>(group) * Kg + channel, Kg - channel,
              *reinterpret_cast<Chunk<T>*>(memory.gradients[slab % 2][position] + 16 * piece)};
    });
  };
  const int shifts = a.packed.shifts, slabs = a.packed.slabs;
  const auto load_weights = [&](int stage, int slab, int step) {
    constexpr int kCopies = Tile::kSplits * Tile::kColumns * kPieces;
    static_assert(kCopies % Tile::kThreads == 0, "every thread copies as much");
#pragma unroll
    for (int i = 0; i < kCopies / Tile::kThreads; ++i) {
      const int copy = i * Tile::kThreads + thread, piece = copy % kPieces, column = copy / kPieces % Tile::kColumns;
      const int shift = step * Tile::kSplits + copy / (kPieces * Tile::kColumns);
      const int64_t row = a.packed.row(group, slab, shift, first_n + column);
      copy_async<16>(memory.weights[stage][copy / (kPieces * Tile::kColumns)][column] + 16 * piece,
                     a.weights + row * kSlab + piece * kChunk<T>, shift < shifts);
    }
  };

  const int steps = (shifts + Tile::kSplits - 1) / Tile::kSplits;
  const int items = positions * kPieces;
  const int share = ((items + steps - 1) / steps + Tile::kThreads - 1) / Tile::kThreads * Tile::kThreads;
  int load_slab = 0, load_step = 0;
  const auto load_next = [&](int stage) {
    if (load_slab < slabs) {
      load_weights(stage, load_slab, load_step);
      if (++load_step == steps) {
        load_step = 0;
        ++load_slab;
      }
    }
    copies_commit();
  };
  for (int stage = 0; stage < kGradInputStages - 1; ++stage) load_next(stage);
  expand_slab(0, 0, items);

  RowsOfA<Math, Tile::kMt> a_rows;
  a_rows.set([&](int m) -> const void* {
    const int row = warp_m * 16 * Tile::kMt + m, per_image = a.grid.rows * a.grid.columns;
    const int inside = row < a.grid.images * per_image ? row : 0;
    const int y = inside / a.grid.columns % a.grid.rows, x = inside % a.grid.columns;
    return memory.gradients[0][(inside / per_image * halo_rows + y) * halo_columns + x];
  });
  RowsOfB<Math, Tile::kNt> b_rows;
  b_rows.set([&](int n) -> const void* { return memory.weights[0][split][warp_n * 8 * Tile::kNt + n]; });
  WarpTile<Math, Tile::kMt, Tile::kNt> tile;
  tile.clear();

  int stage = 0, slab = 0, step = 0;
  while (slab < slabs) {
    copies_wait<kGradInputStages - 2>();
    __syncthreads();
    load_next((stage + kGradInputStages - 1) % kGradInputStages);
    if (slab + 1 < slabs) expand_slab(slab + 1, step * share, min(items, (step + 1) * share));
    const int shift = step * Tile::kSplits + split;
    if (shift < shifts) {
      const int row_shift = a.packed.rows.at(shift / a.packed.columns.count);
      const int column_shift = a.packed.columns.at(shift % a.packed.columns.count);
      const int position = (last_row_shift - row_shift) * halo_columns + last_column_shift - column_shift;
      const int a_offset = slab % 2 * static_cast<int>(sizeof(memory.gradients[0])) + position * kSlabPitch;
      const int b_offset = stage * static_cast<int>(sizeof(memory.weights[0]));
#pragma unroll
      for (int i = 0; i < kSlabBytes; i += kStepBytes) tile.multiply(a_rows, a_offset + i, b_rows, b_offset + i);
    }
    stage = (stage + 1) % kGradInputStages;
    if (++step == steps) {
      step = 0;
      ++slab;
    }
  }

  if constexpr (Tile::kSplits > 1) {
    constexpr int kSums = Tile::kMt * Tile::kNt * 4, kOwners = Tile::kThreads / Tile::kSplits;
    static_assert((Tile::kSplits - 1) * kSums * kOwners * sizeof(float) <= sizeof(memory.weights), "sums fit");
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(memory.weights) + thread % kOwners;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (split > 0) sums[((split - 1) * kSums + i) * kOwners] = tile.sum[i / 4 / Tile::kNt][i / 4 % Tile::kNt][i % 4];
    }
    __syncthreads();
    if (split > 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = tile.sum[i / 4 / Tile::kNt][i / 4 % Tile::kNt][i % 4];
#pragma unroll
      for (int s = 0; s < Tile::kSplits - 1; ++s) sum += sums[(s * kSums + i) * kOwners];
    }
  }

  T* const grad_input = static_cast<T*>(p.grad_input);
  bool finite = true;
#pragma unroll
  for (int mt = 0; mt < Tile::kMt; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = (warp_m * Tile::kMt + mt) * 16 + lane / 4 + 8 * half;
      const int image = m / (a.grid.rows * a.grid.columns);
      if (image >= a.grid.images || first_image + image >= g.N) continue;
      const int top_quotient = first_row + m / a.grid.columns % a.grid.rows;
      const int left_quotient = first_column + m % a.grid.columns;
      const int top = top_quotient * static_cast<int>(g.stride_h) - static_cast<int>(g.pad_top);
      const int left = left_quotient * static_cast<int>(g.stride_w) - static_cast<int>(g.pad_left);
      const int64_t origin = (first_image + image) * st.n + top * st.h + left * st.w;
#pragma unroll
      for (int nt = 0; nt < Tile::kNt; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto& target = memory.targets[(warp_n * Tile::kNt + nt) * 8 + 2 * (lane % 4) + i];
          const int row = top + target.row, column = left + target.column;
          if (row < 0 || row >= g.H || column < 0 || column >= g.W) continue;
          const float value = tile.sum[mt][nt][2 * half + i];
          finite = finite && isfinite(value);
          T* const to = grad_input + origin + target.offset;
          if (!a.pairs) {
            *to = narrow<T>(value);
          } else if (i == 0) {
            *reinterpret_cast<Pair<T>*>(to) = {narrow<T>(value), narrow<T>(tile.sum[mt][nt][2 * half + 1])};
          }
        }
      }
    }
  }
  if (!finite && a.not_finite != nullptr) *a.not_finite = 1;
}

// launchers

template <class... Tiles>
struct GradInputTileList {};

// rows x columns of the product, and what speaks for each:
//   128 x 128, 128 x 64   the least traffic from shared memory per operation
//   128 x 32              few input channels
//    32 x 32              small maps and batches; four groups of warps share the shifts
// Without tensor cores arithmetic is slower than shared memory even with smaller warp tiles.
template <class Math>
struct GradInputTiles {
  using List =
      GradInputTileList<GradInputTile<Math, 4, 8, 2, 2, 1, 256, 2>, GradInputTile<Math, 4, 4, 2, 2, 1, 256, 2>,
                        GradInputTile<Math, 2, 4, 4, 1, 1, 256, 2>, GradInputTile<Math, 2, 4, 1, 1, 4, 128, 3>>;
};
template <>
struct GradInputTiles<Float32> {
  using List =
      GradInputTileList<GradInputTile<Float32, 2, 4, 4, 2, 1, 256, 1>, GradInputTile<Float32, 2, 4, 4, 1, 1, 256, 2>,
                        GradInputTile<Float32, 2, 4, 1, 1, 4, 128, 3>>;
};

// Quotients of one axis: those that some input row or column has.
struct Quotients {
  int64_t first, count;
  Quotients(int64_t extent, int64_t padding, int64_t stride)
      : first(padding / stride), count((extent - 1 + padding) / stride - first + 1) {}
};

// The rectangle of at most `rows` quotients, and `positions` of dY with the halo, that takes the fewest tiles; 0
// images: none fits.
inline GradInputGrid best_grad_input_grid(const ConvMaxPool2dGeometry& g, const PackedWeights& packed, int64_t rows,
                                          int64_t positions) {
  constexpr int64_t kCandidates = 16;
  const int64_t images_wanted = g.N > 0 ? g.N : 1;
  const int64_t height = Quotients(g.H, g.pad_top, g.stride_h).count;
  const int64_t width = Quotients(g.W, g.pad_left, g.stride_w).count;
  const int64_t halo_rows = packed.rows.last(), halo_columns = packed.columns.last();
  GradInputGrid best{};
  int64_t fewest = 0;
  const int64_t widest = positions / (1 + halo_rows) - halo_columns;
  if (widest <= 0) return best;
  const int64_t least = ceil_div(width, widest < rows ? widest : rows);
  for (int64_t column_tiles = least; column_tiles <= width && column_tiles < least + kCandidates; ++column_tiles) {
    const int64_t tile_columns = ceil_div(width, column_tiles);
    int64_t tile_rows = positions / (tile_columns + halo_columns) - halo_rows;
    if (tile_rows > rows / tile_columns) tile_rows = rows / tile_columns;
    tile_rows = tile_rows < height ? ceil_div(height, ceil_div(height, tile_rows)) : height;
    int64_t images = 1;
    if (tile_rows == height && tile_columns == width) {
      const int64_t fitting = positions / ((height + halo_rows) * (width + halo_columns));
      images = rows / (height * width);
      if (images > fitting) images = fitting;
      if (images > images_wanted) images = images_wanted;
    }
    const int64_t image_tiles = ceil_div(images_wanted, images), row_tiles = ceil_div(height, tile_rows);
    const int64_t tiles = image_tiles * row_tiles * column_tiles;
    if (fewest != 0 && tiles >= fewest) continue;
    fewest = tiles;
    best = {static_cast<int>(images),      static_cast<int>(tile_rows), static_cast<int>(tile_columns),
            static_cast<int>(image_tiles), static_cast<int>(row_tiles), static_cast<int>(column_tiles)};
  }
  return best;
}

template <class Tile>
PackedWeights packed_weights(const ConvMaxPool2dGeometry& g) {
  return PackedWeights(g, kSlabBytes / static_cast<int>(sizeof(typename Tile::Math::Storage)), Tile::kColumns);
}

// 0: the tile does not serve the shape. In the order of the time it should take.
template <class Tile>
double grad_input_cost(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kWorstFill = 8;  // rows of a tile for each one that is of use
  const PackedWeights packed = packed_weights<Tile>(g);
  // Strides far beyond the filter would pack little else than zeros.
  constexpr int64_t kPackedBytes = int64_t(16) << 20, kPackedPerWeight = 4;
  const int64_t weights = g.K * (g.C / g.groups) * g.R * g.S;
  if (packed.bytes() > kPackedBytes + kPackedPerWeight * weights * int64_t(sizeof(typename Tile::Math::Storage))) {
    return 0;
  }
  const GradInputGrid grid = best_grad_input_grid(g, packed, Tile::kRows, Tile::kPositions);
  if (grid.images == 0 || grid.images * grid.rows * grid.columns * kWorstFill < Tile::kRows) return 0;
  const int64_t blocks = static_cast<int64_t>(grid.image_tiles) * grid.row_tiles * grid.column_tiles *
                         (packed.padded_n / Tile::kColumns) * g.groups;
  if (blocks > kMaxGridX) return 0;
  // What the tile reads of shared memory for each product, beside one of unlimited size.
  const double traffic = 1 + 24.0 / (16 * Tile::kMt) + 24.0 / (8 * Tile::kNt);
  const double steps = static_cast<double>(ceil_div(packed.shifts, Tile::kSplits));
  return static_cast<double>(ceil_div(blocks, kMultiprocessors)) * Tile::kRows * Tile::kColumns * Tile::kSplits *
         steps * traffic;
}

// action(Tile()) with the cheapest of the list; `otherwise` where none serves the shape.
template <class Result, class Action, class... Tiles>
Result with_grad_input_tile(const ConvMaxPool2dGeometry& g, GradInputTileList<Tiles...>, Result otherwise,
                            const Action& action) {
  const double costs[] = {grad_input_cost<Tiles>(g)...};
  double least = 0;
  for (const double cost : costs) {
    if (cost > 0 && (least == 0 || cost < least)) least = cost;
  }
  Result result = otherwise;
  int i = 0;
  bool found = least == 0;
  const auto consider = [&](auto tile) {
    if (!found && costs[i] == least) {
      found = true;
      result = action(tile);
    }
    ++i;
  };
  (consider(Tiles()), ...);
  return result;
}

template <class Tile>
int launch_grad_input(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  using T = typename Tile::Math::Storage;
  const ConvMaxPool2dGeometry& g = params.geometry;
  if (g.N == 0) return cudaSuccess;
  const PackedWeights packed = packed_weights<Tile>(g);
  int* const not_finite =
      packed.has_gaps() ? reinterpret_cast<int*>(static_cast<char*>(params.workspace) + packed.bytes()) : nullptr;
  int error = pack_backward_weights(params, packed, not_finite, stream);
  if (error != cudaSuccess) return error;
  GradInputProblem<T> problem{params,
                              WindowSource(params),
                              static_cast<const T*>(params.workspace),
                              packed,
                              best_grad_input_grid(g, packed, Tile::kRows, Tile::kPositions),
                              packed.padded_n / Tile::kColumns,
                              static_cast<int>(Quotients(g.H, g.pad_top, g.stride_h).first),
                              static_cast<int>(Quotients(g.W, g.pad_left, g.stride_w).first),
                              params.grad_input_strides.c == 1 && g.C / g.groups % 2 == 0 &&
                                  reinterpret_cast<uintptr_t>(params.grad_input) % (2 * sizeof(T)) == 0,
                              not_finite};
  const GradInputGrid& grid = problem.grid;
  const int64_t blocks = static_cast<int64_t>(grid.image_tiles) * grid.row_tiles * grid.column_tiles *
                         problem.column_blocks * g.groups;
  error = launch(conv_max_pool2d_backward_grad_input_kernel<Tile>, dim3(static_cast<unsigned>(blocks)),
                 dim3(Tile::kThreads), sizeof(GradInputMemory<Tile>), stream, problem);
  if (error != cudaSuccess || not_finite == nullptr) return error;
  return repair_grad_input(params, not_finite, stream);
}

template <class Math>
bool GradInputGemm<Math>::accepts(const ConvMaxPool2dBackwardParams& params) {
  return tiles_can_index(params.geometry) &&
         with_grad_input_tile(params.geometry, typename GradInputTiles<Math>::List(), false, [](auto) { return true; });
}

template <class Math>
int64_t GradInputGemm<Math>::workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return with_grad_input_tile(params.geometry, typename GradInputTiles<Math>::List(), int64_t(0), [&](auto tile) {
    const PackedWeights packed = packed_weights<decltype(tile)>(params.geometry);
    return packed.bytes() + (packed.has_gaps() ? static_cast<int64_t>(sizeof(int)) : 0);
  });
}

template <class Math>
int GradInputGemm<Math>::launch(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  return with_grad_input_tile(
      params.geometry, typename GradInputTiles<Math>::List(), static_cast<int>(cudaErrorInvalidValue),
      [&](auto tile) { return launch_grad_input<decltype(tile)>(params, stream); });
}

}  // namespace pyconv::cuda
