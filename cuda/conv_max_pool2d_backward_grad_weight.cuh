// The weight gradient of conv_max_pool2d as an implicit matrix product, and the bias gradient with it.
//
//   (grad_output, argmax) (N,K,PH,PW) -> dY (positions, k) in shared memory  \  partial sums (splits, K, columns)
//   x (N,C,H,W) -> patches (positions, columns) in shared memory             /  -> dW (K,C/groups,R,S), second pass
//
//   M = k, N = columns = (c, r, s), reduction = convolution positions (n, oh, ow)
//
// A block owns a rectangle of (k, columns) and a range of positions, a few of which are a stage: dY is expanded for the
// next stage while the present one is multiplied, patches come by cp.async two stages ahead. Both operands lie with the
// positions as rows, as they are found in memory. The ranges split the positions so that every multiprocessor has two
// blocks; how many there are depends on the shape alone, so results do too. The sum of dY over the positions is the
// bias gradient: the blocks of the first columns add it up.
//
// Per position a block of 128 x 128 reads 128 * sizeof(T) bytes of patches (from L2: x itself fits there or is read in
// order) and 128 * (1 + sizeof(T)) / 4 of windows for 2 * 128 * 128 operations.
#pragma once

#include "conv_max_pool2d_backward_expand.cuh"
#include "conv_max_pool2d_backward_gemm.cuh"
#include "conv_max_pool2d_backward_sum_partials.cuh"

namespace pyconv::cuda {

constexpr int kGradWeightStages = 3;
constexpr int kStageSteps = 4;

template <class MATH, int MT, int NT, int WM, int WN, int BLOCKS>
struct GradWeightTile {
  using Math = MATH;
  static constexpr int kMt = MT, kNt = NT, kWarpsM = WM, kWarpsN = WN;
  static constexpr int kRows = 16 * MT * WM, kColumns = 8 * NT * WN, kThreads = 32 * WM * WN;
  static constexpr int kPositions = kStageSteps * kStep<MATH>;  // of one stage
  static constexpr int kRowsPitch = kRows + 8, kColumnsPitch = kColumns + 8;  // for the banks: see warp_gemm.cuh
  static constexpr int kBlocks = BLOCKS;                                      // per multiprocessor
};

// Where the patch of a position begins; a row beyond every image where there is no such position.
struct PatchOrigin {
  int64_t offset;
  int row, column;
};

template <class T>
struct GradWeightProblem {
  ConvMaxPool2dBackwardParams params;
  WindowSource windows;
  PartialSums partials;
  int row_blocks, column_blocks;
  int positions, stages_per_split;
  Divisor map_rows, map_columns;  // of the convolution's output
  bool vectors;                   // kChunk columns from a multiple of it on are 16 aligned bytes of x
};

template <class Tile>
struct GradWeightMemory {
  using T = typename Tile::Math::Storage;
  alignas(16) T gradients[2][Tile::kPositions][Tile::kRowsPitch];
  alignas(16) T patches[kGradWeightStages][Tile::kPositions][Tile::kColumnsPitch];
  PositionWindows windows[kGradWeightStages][Tile::kPositions];
  PatchOrigin origins[kGradWeightStages][Tile::kPositions];
};

// kernels

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_max_pool2d_backward_grad_weight_kernel(GradWeightProblem<typename Tile::Math::Storage> a) {
  using Math = typename Tile::Math;
  using T = typename Math::Storage;
  constexpr int kStages = kGradWeightStages, kPositions = Tile::kPositions;
  auto& memory = shared_memory<GradWeightMemory<Tile>>();
  const ConvMaxPool2dBackwardParams& p = a.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.input_strides;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int warp_m = warp % Tile::kWarpsM, warp_n = warp / Tile::kWarpsM;
  const int Kg = static_cast<int>(g.K / g.groups);

  int block = static_cast<int>(blockIdx.x);
  const int first_n = block % a.column_blocks * Tile::kColumns;
  block /= a.column_blocks;
  const int first_k = block % a.row_blocks * Tile::kRows;
  block /= a.row_blocks;
  const int group = block % static_cast<int>(g.groups), split = block / static_cast<int>(g.groups);
  const int first_position = split * a.stages_per_split * kPositions;
  const int last_position = min(a.positions, first_position + a.stages_per_split * kPositions);
  const int stages = (last_position - first_position + kPositions - 1) / kPositions;

  const auto find_positions = [&](int stage) {
    if (thread >= kPositions) return;
    const int position = first_position + stage * kPositions + thread;
    auto& windows = memory.windows[stage % kStages][thread];
    auto& origin = memory.origins[stage % kStages][thread];
    if (position >= last_position) {
      windows = no_windows();
      origin = {0, kBeyondEveryImage, 0};
      return;
    }
    const int line = a.map_columns.quotient(position), n = a.map_rows.quotient(line);
    const int column = position - line * a.map_columns.divisor, row = line - n * a.map_rows.divisor;
    windows = windows_at(p, n, row, column);
    const int top = row * static_cast<int>(g.stride_h) - static_cast<int>(g.pad_top);
    const int left = column * static_cast<int>(g.stride_w) - static_cast<int>(g.pad_left);
    origin = {n * st.n + top * st.h + left * st.w, top, left};
  };
  const auto expand_stage = [&](int stage) {
    constexpr int kPieces = Tile::kRows / kChunk<T>;
    expand<T>(a.windows, thread, kPositions * kPieces, Tile::kThreads, [&](int i) -> ExpandItem<T> {
      const int position = a.windows.channel == 1 ? i / kPieces : i % kPositions;
      const int piece = a.windows.channel == 1 ? i % kPieces : i / kPositions;
      const int k = first_k + piece * kChunk<T>;
      return {memory.windows[stage % kStages][position], static_cast<int64_t>(group) * Kg + k, Kg - k,
              *reinterpret_cast<Chunk<T>*>(&memory.gradients[stage % 2][position][piece * kChunk<T>])};
    });
  };

  // Every thread copies the same columns of all its positions: one, or a chunk of them.
  const int width = a.vectors ? kChunk<T> : 1, per_position = Tile::kColumns / width;
  const int own_column = thread % per_position * width;
  const FilterColumns& columns = a.partials.columns;
  const bool column_is_inside = first_n + own_column < columns.count();
  const int n = column_is_inside ? first_n + own_column : 0;
  const int row_reach = columns.r(n) * static_cast<int>(g.dilation_h);
  const int column_reach = columns.s(n) * static_cast<int>(g.dilation_w);
  const T* const input = static_cast<const T*>(p.input);
  const int64_t input_offset =
      (static_cast<int64_t>(group) * columns.channels + columns.c(n)) * st.c + row_reach * st.h + column_reach * st.w;
  const auto load_patches = [&](int stage) {
#pragma unroll 4
    for (int position = thread / per_position; position < kPositions; position += Tile::kThreads / per_position) {
      const PatchOrigin origin = memory.origins[stage % kStages][position];
      const int row = origin.row + row_reach, column = origin.column + column_reach;
      const bool inside = column_is_inside && row >= 0 && row < g.H && column >= 0 && column < g.W;
      const T* const from = inside ? input + (origin.offset + input_offset) : input;
      T* const to = &memory.patches[stage % kStages][position][own_column];
      if (a.vectors) {
        copy_async<16, true>(to, from, inside);  // neighbouring taps read it again soon
      } else if constexpr (sizeof(T) == 4) {
        copy_async<4>(to, from, inside);
      } else {
        *to = inside ? *from : from_float<T>(0.f);
      }
    }
  };

  for (int stage = 0; stage < kStages; ++stage) find_positions(stage);
  __syncthreads();
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < stages) load_patches(stage);
    copies_commit();
  }
  expand_stage(0);

  WarpTile<Math, Tile::kMt, Tile::kNt> tile;
  tile.clear();
  const bool sums_bias = p.grad_bias != nullptr && first_n == 0 && thread < Tile::kRows && first_k + thread < Kg;
  float bias = 0.f;
  for (int stage = 0; stage < stages; ++stage) {
    copies_wait<kStages - 2>();
    __syncthreads();
    if (stage + kStages - 1 < stages) load_patches(stage + kStages - 1);
    copies_commit();
    if (stage + 1 < stages) expand_stage(stage + 1);
    if (stage + kStages < stages) find_positions(stage + kStages);
    if (sums_bias) {
      float sum = 0.f;
      for (int i = 0; i < kPositions; ++i) sum += to_float(memory.gradients[stage % 2][i][thread]);
      bias += sum;
    }
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      tile.multiply_transposed(&memory.gradients[stage % 2][step * kStep<Math>][warp_m * 16 * Tile::kMt],
                               Tile::kRowsPitch,
                               &memory.patches[stage % kStages][step * kStep<Math>][warp_n * 8 * Tile::kNt],
                               Tile::kColumnsPitch);
    }
  }

  const int64_t first_row = static_cast<int64_t>(split) * g.K + static_cast<int64_t>(group) * Kg + first_k;
  if (sums_bias) a.partials.bias[first_row + thread] = bias;
#pragma unroll
  for (int mt = 0; mt < Tile::kMt; ++mt) {
#pragma unroll
    for (int nt = 0; nt < Tile::kNt; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (warp_m * Tile::kMt + mt) * 16 + tile_row(i);
        const int column = first_n + (warp_n * Tile::kNt + nt) * 8 + tile_column(i);
        if (first_k + row >= Kg || column >= columns.count()) continue;
        a.partials.weights[(first_row + row) * columns.count() + column] = tile.sum[mt][nt][i];
      }
    }
  }
}

// launchers

template <class... Tiles>
struct GradWeightTileList {};

// rows x columns of the product: the larger, the less traffic for each operation; the smaller, the less of the tile
// lies beyond K and the columns.
template <class Math>
struct GradWeightTiles {
  using List = GradWeightTileList<GradWeightTile<Math, 4, 8, 2, 2, 2>, GradWeightTile<Math, 4, 4, 1, 4, 2>,
                                  GradWeightTile<Math, 1, 2, 2, 2, 4>>;
};
template <>
struct GradWeightTiles<Float32> {
  using List = GradWeightTileList<GradWeightTile<Float32, 4, 4, 1, 4, 2>, GradWeightTile<Float32, 1, 2, 2, 2, 4>>;
};

struct GradWeightGrid {
  int64_t row_blocks, column_blocks, splits, stages_per_split;
  double cost;  // in the order of the time it should take
};

template <class Tile>
GradWeightGrid grad_weight_grid(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kBlocksWanted = 2 * kMultiprocessors, kMaxSplits = 128;
  GradWeightGrid grid{};
  const int64_t columns = g.C / g.groups * g.R * g.S;
  grid.row_blocks = ceil_div(g.K / g.groups, Tile::kRows);
  grid.column_blocks = ceil_div(columns, Tile::kColumns);
  const int64_t rectangles = grid.row_blocks * grid.column_blocks * g.groups;
  const int64_t stages = ceil_div(g.N * g.OH * g.OW, Tile::kPositions);
  int64_t splits = kBlocksWanted / rectangles;
  if (splits > kMaxSplits) splits = kMaxSplits;
  if (splits > stages) splits = stages;
  if (splits < 1) splits = 1;
  grid.stages_per_split = ceil_div(stages, splits);
  grid.splits = stages == 0 ? 0 : ceil_div(stages, grid.stages_per_split);
  const double traffic = 1 + 24.0 / (16 * Tile::kMt) + 24.0 / (8 * Tile::kNt);
  grid.cost = static_cast<double>(ceil_div(rectangles * grid.splits, kMultiprocessors)) *
              static_cast<double>(grid.stages_per_split) * Tile::kRows * Tile::kColumns * traffic;
  return grid;
}

// action(Tile()) with the cheapest of the list.
template <class Action, class First, class... Others>
auto with_grad_weight_tile(const ConvMaxPool2dGeometry& g, GradWeightTileList<First, Others...>, const Action& action) {
  if constexpr (sizeof...(Others) == 0) {
    return action(First());
  } else {
    const double others[] = {grad_weight_grid<Others>(g).cost...};
    bool best = true;
    for (const double other : others) best = best && grad_weight_grid<First>(g).cost <= other;
    return best ? action(First()) : with_grad_weight_tile(g, GradWeightTileList<Others...>(), action);
  }
}

inline int64_t partial_sum_bytes(const ConvMaxPool2dGeometry& g, int64_t splits) {
  return splits * g.K * (g.C / g.groups * g.R * g.S + 1) * static_cast<int64_t>(sizeof(float));
}

template <class T>
bool patches_are_vectors(const ConvMaxPool2dBackwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const Strides4& st = params.input_strides;
  const auto steps_by_chunks = [](int64_t extent, int64_t stride) { return extent == 1 || stride % kChunk<T> == 0; };
  return st.c == 1 && g.C / g.groups % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(params.input) % 16 == 0 &&
         steps_by_chunks(g.N, st.n) && steps_by_chunks(g.H, st.h) && steps_by_chunks(g.W, st.w);
}

template <class Tile>
int launch_grad_weight(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  using T = typename Tile::Math::Storage;
  const ConvMaxPool2dGeometry& g = params.geometry;
  const GradWeightGrid grid = grad_weight_grid<Tile>(g);
  const FilterColumns columns{static_cast<int>(g.C / g.groups), static_cast<int>(g.R), static_cast<int>(g.S),
                              params.input_strides.c == 1};
  float* const sums = static_cast<float*>(params.workspace);
  const PartialSums partials{sums, sums + grid.splits * g.K * columns.count(), static_cast<int>(grid.splits), columns};
  if (grid.splits > 0) {
    const GradWeightProblem<T> problem{params,
                                       WindowSource(params),
                                       partials,
                                       static_cast<int>(grid.row_blocks),
                                       static_cast<int>(grid.column_blocks),
                                       static_cast<int>(g.N * g.OH * g.OW),
                                       static_cast<int>(grid.stages_per_split),
                                       Divisor(g.OH),
                                       Divisor(g.OW),
                                       patches_are_vectors<T>(params)};
    const int64_t blocks = grid.row_blocks * grid.column_blocks * g.groups * grid.splits;
    const int error = launch(conv_max_pool2d_backward_grad_weight_kernel<Tile>, dim3(static_cast<unsigned>(blocks)),
                             dim3(Tile::kThreads), sizeof(GradWeightMemory<Tile>), stream, problem);
    if (error != cudaSuccess) return error;
  }
  return sum_partials(params, partials, stream);
}

template <class Math>
bool GradWeightGemm<Math>::accepts(const ConvMaxPool2dBackwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  return tiles_can_index(g) && g.K * (g.C / g.groups * g.R * g.S) <= kMaxGridX;
}

template <class Math>
int64_t GradWeightGemm<Math>::workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return with_grad_weight_tile(params.geometry, typename GradWeightTiles<Math>::List(), [&](auto tile) {
    return partial_sum_bytes(params.geometry, grad_weight_grid<decltype(tile)>(params.geometry).splits);
  });
}

template <class Math>
int GradWeightGemm<Math>::launch(const ConvMaxPool2dBackwardParams& params, Stream stream) {
  return with_grad_weight_tile(params.geometry, typename GradWeightTiles<Math>::List(),
                               [&](auto tile) { return launch_grad_weight<decltype(tile)>(params, stream); });
}

}  // namespace pyconv::cuda
