// Tiles of the implicit matrix product, the choice among them, and its launch.
//
// What limits a tile is shared memory: 128 bytes per clock, against 4096 (16 bit) or 2048 (TF32) operations of the
// tensor cores of sm_90. Clocks of one slab, written once and read by every warp that needs it, beside those of its
// arithmetic:
//
//   positions x channels   warp's tile   written + read   arithmetic   registers
//   128 x 128              64 x 64       128 + 256        256          about 240, two blocks of 128 threads
//   256 x  64              64 x 64       160 + 256        256          the same
//   256 x  96              64 x 48       176 + 448        384          about 200, one block of 256 threads
//   128 x  64              64 x 32        96 + 192        128          about 170, three blocks of 128 threads
//   128 x  32, 64 x 32     32 x 32, 16   for small problems: a block for every multiprocessor
//
// The gather loader, whose addresses take more registers, has the same tiles on twice as many warps. The float32 tiles
// are small: 32 x 32 per warp takes 12 loads for 128 multiply-adds, which leaves shared memory half idle. Stages are as
// many as let two blocks share a multiprocessor of 228 KB (sm_90, sm_100), at most 4.
#pragma once

#include "conv_max_pool2d_forward_gemm.cuh"
#include "conv_max_pool2d_forward_gemm_kernel.cuh"

namespace pyconv::cuda {

template <class... Tiles>
struct TileList {};

// MT, NT, warps along the rows and the columns, stages, blocks per multiprocessor.
template <class Math, bool VECTOR>
struct ForwardTiles {
  using InRegisters = TileList<ForwardTile<Math, VECTOR, true, 4, 4, 2, 4, 3, 2>,
                               ForwardTile<Math, VECTOR, true, 4, 4, 4, 2, 3, 1>,
                               ForwardTile<Math, VECTOR, true, 4, 4, 2, 2, 4, 3>,
                               ForwardTile<Math, VECTOR, true, 2, 2, 2, 2, 4, 5>>;
  using InShared = TileList<ForwardTile<Math, VECTOR, false, 4, 6, 4, 2, 3, 1>,
                            ForwardTile<Math, VECTOR, false, 4, 4, 4, 2, 3, 1>,
                            ForwardTile<Math, VECTOR, false, 2, 4, 4, 1, 4, 4>>;
};
template <class Math>
struct ForwardTiles<Math, true> {
  using InRegisters = TileList<ForwardTile<Math, true, true, 4, 8, 2, 2, 3, 2>,
                               ForwardTile<Math, true, true, 4, 8, 4, 1, 3, 2>,
                               ForwardTile<Math, true, true, 4, 4, 2, 2, 4, 3>,
                               ForwardTile<Math, true, true, 2, 2, 2, 2, 4, 5>>;
  using InShared = TileList<ForwardTile<Math, true, false, 4, 6, 4, 2, 3, 1>,
                            ForwardTile<Math, true, false, 4, 8, 4, 1, 3, 2>,
                            ForwardTile<Math, true, false, 2, 4, 4, 1, 4, 4>>;
};
template <bool VECTOR>
struct Float32Tiles {
  using InRegisters = TileList<ForwardTile<Float32, VECTOR, true, 2, 4, 4, 2, 3, 2>,
                               ForwardTile<Float32, VECTOR, true, 2, 2, 2, 2, 4, 4>>;
  using InShared = TileList<ForwardTile<Float32, VECTOR, false, 2, 4, 8, 1, 3, 2>,
                            ForwardTile<Float32, VECTOR, false, 2, 4, 4, 1, 4, 3>>;
};
template <>
struct ForwardTiles<Float32, true> : Float32Tiles<true> {};
template <>
struct ForwardTiles<Float32, false> : Float32Tiles<false> {};

// Whether the four positions of a window are four rows of the product.
inline bool pools_in_registers(const ConvMaxPool2dGeometry& g) {
  return g.pool_h == 2 && g.pool_w == 2 && (g.pool_stride_h >= 2 || g.PH == 1) && (g.pool_stride_w >= 2 || g.PW == 1);
}

struct WindowTile {
  int64_t images, rows, columns;  // windows; 0 images: not even one window fits
  int64_t blocks;
};

// The tile of windows over at most `positions` convolution positions that takes the fewest blocks.
inline WindowTile best_window_tile(const ConvMaxPool2dGeometry& g, int64_t positions) {
  const auto extent = [](int64_t windows, int64_t stride, int64_t size, int64_t dilation) {
    return (windows - 1) * stride + (size - 1) * dilation + 1;
  };
  WindowTile best{};
  for (int64_t columns = 1; columns <= g.PW; ++columns) {
    const int64_t width = extent(columns, g.pool_stride_w, g.pool_w, g.pool_dilation_w);
    const int64_t spare = positions / width - extent(1, g.pool_stride_h, g.pool_h, g.pool_dilation_h);
    if (spare < 0) break;
    int64_t rows = spare / g.pool_stride_h + 1;
    rows = rows < g.PH ? ceil_div(g.PH, ceil_div(g.PH, rows)) : g.PH;
    int64_t images = 1;
    if (rows == g.PH && columns == g.PW) {
      images = positions / (width * extent(rows, g.pool_stride_h, g.pool_h, g.pool_dilation_h));
      if (images > g.N) images = g.N;
    }
    const int64_t blocks = ceil_div(g.N, images) * ceil_div(g.PH, rows) * ceil_div(g.PW, columns);
    if (best.images == 0 || blocks <= best.blocks) best = {images, rows, columns, blocks};
  }
  return best;
}

inline void set_window_tile(const ConvMaxPool2dGeometry& g, const WindowTile& tile, ForwardTiling& t) {
  const int64_t height = (tile.rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h + 1;
  const int64_t width = (tile.columns - 1) * g.pool_stride_w + (g.pool_w - 1) * g.pool_dilation_w + 1;
  t.images = static_cast<int>(tile.images);
  t.rows = static_cast<int>(tile.rows);
  t.columns = static_cast<int>(tile.columns);
  t.windows = t.images * t.rows * t.columns;
  t.rectangle_rows = static_cast<int>(height);
  t.rectangle_columns = static_cast<int>(width);
  t.by_windows = Divisor(t.windows);
  t.by_window_plane = Divisor(tile.rows * tile.columns);
  t.by_window_columns = Divisor(tile.columns);
  t.by_rectangle = Divisor(height * width);
  t.by_rectangle_columns = Divisor(width);
  t.by_tile_columns = Divisor(ceil_div(g.PW, tile.columns));
  t.by_tiles_of_image = Divisor(ceil_div(g.PW, tile.columns) * ceil_div(g.PH, tile.rows));
}

struct TileChoice {
  int64_t blocks;  // 0: the tile does not serve this shape
  int64_t padded_k;
  double cost;
};

template <class Tile>
TileChoice rate_tile(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kMultiprocessors = 132;  // of the GPU it is tuned for; a constant, so that the shape alone decides
  constexpr int64_t kTrafficWeight = 64;     // a row or column brought, in multiply-adds of one reduction step
  const int64_t column_tiles = ceil_div(g.K / g.groups, Tile::kColumns);
  const int64_t position_tiles = Tile::kInRegisters ? ceil_div(g.N * g.PH * g.PW, Tile::kWindows)
                                                    : best_window_tile(g, Tile::kRows).blocks;
  const int64_t blocks = g.groups * column_tiles * position_tiles;
  const double block_cost = Tile::kRows * Tile::kColumns + kTrafficWeight * (Tile::kRows + Tile::kColumns);
  return {blocks <= kMaxGridX ? blocks : 0, column_tiles * Tile::kColumns,
          static_cast<double>(ceil_div(blocks, kMultiprocessors)) * block_cost};
}

// The index of the list's cheapest tile, or -1; `choice` is that tile's.
template <class... Tiles>
int choose_tile(const ConvMaxPool2dGeometry& g, TileList<Tiles...>, TileChoice& choice) {
  const TileChoice choices[] = {rate_tile<Tiles>(g)...};
  int best = -1;
  for (int i = 0; i < static_cast<int>(sizeof...(Tiles)); ++i) {
    if (choices[i].blocks == 0 || (best >= 0 && choices[i].cost >= choices[best].cost)) continue;
    best = i;
    choice = choices[i];
  }
  return best;
}

template <class... Tiles, class... Others>
constexpr bool have_same_shapes(TileList<Tiles...>, TileList<Others...>) {
  return ((Tiles::kRows == Others::kRows && Tiles::kColumns == Others::kColumns) && ...);
}

// The choice depends on the geometry alone, so it is the same for both loaders.
template <class Math>
int choose_tile(const ConvMaxPool2dGeometry& g, TileChoice& choice) {
  using Tiles = ForwardTiles<Math, false>;
  using Others = ForwardTiles<Math, true>;
  static_assert(have_same_shapes(typename Tiles::InRegisters(), typename Others::InRegisters()) &&
                    have_same_shapes(typename Tiles::InShared(), typename Others::InShared()),
                "a tile of one loader stands at the same place in the other's list");
  return pools_in_registers(g) ? choose_tile(g, typename Tiles::InRegisters(), choice)
                               : choose_tile(g, typename Tiles::InShared(), choice);
}

template <class Math>
int64_t padded_reduction(const ConvMaxPool2dGeometry& g) {
  return round_up(g.R * g.S * (g.C / g.groups), kSlabBytes / static_cast<int64_t>(sizeof(typename Math::Storage)));
}

template <class Tile>
int launch_tile(const ConvMaxPool2dForwardParams& params, Stream stream) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const TileChoice choice = rate_tile<Tile>(g);
  ForwardArguments f{params, {}};
  ForwardTiling& t = f.tiling;
  const int64_t Cg = g.C / g.groups;
  const int64_t padded_q = padded_reduction<typename Tile::Math>(g);
  t.slabs = static_cast<int>(padded_q / Tile::kSlab);
  t.reduction = static_cast<int>(g.R * g.S * Cg);
  t.column_tiles = static_cast<int>(choice.padded_k / Tile::kColumns);
  t.position_tiles = static_cast<int>(choice.blocks / g.groups / t.column_tiles);
  const int64_t channel_block = Cg % Tile::kSlab == 0 ? Tile::kSlab : Cg;
  t.by_channel_block = Divisor(g.R * g.S * channel_block);
  t.by_channels = Divisor(channel_block);
  t.by_kernel_columns = Divisor(g.S);
  if constexpr (Tile::kInRegisters) {
    t.windows = Tile::kWindows;
    t.by_windows = Divisor(t.windows);
    t.by_window_plane = Divisor(g.PH * g.PW);
    t.by_window_columns = Divisor(g.PW);
  } else {
    set_window_tile(g, best_window_tile(g, Tile::kRows), t);
  }
  const int error = pack_forward_weights(params, choice.padded_k, padded_q, channel_block, stream);
  if (error != 0) return error;
  return launch(conv_max_pool2d_forward_gemm_kernel<Tile>, dim3(static_cast<unsigned>(choice.blocks)),
                dim3(Tile::kThreads), sizeof(typename Tile::Shared), stream, f);
}

template <class... Tiles>
int launch_tile_at(int index, const ConvMaxPool2dForwardParams& params, Stream stream, TileList<Tiles...>) {
  using Launcher = int (*)(const ConvMaxPool2dForwardParams&, Stream);
  static constexpr Launcher launchers[] = {launch_tile<Tiles>...};
  return launchers[index](params, stream);
}

// Whether every 16 bytes of the reduction are 16 aligned bytes of the input.
inline bool is_vector_input(const ConvMaxPool2dForwardParams& p, int64_t element_bytes) {
  const Strides4& st = p.input_strides;
  const int64_t Cg = p.geometry.C / p.geometry.groups;
  const auto aligned = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  return st.c == 1 && aligned(Cg) && aligned(st.n) && aligned(st.h) && aligned(st.w) &&
         reinterpret_cast<uintptr_t>(p.input) % 16 == 0;
}

// Coordinates are 32-bit in the kernel; only offsets in memory are 64-bit.
inline bool has_32_bit_coordinates(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kLimit = int64_t(1) << 30;
  const int64_t extents[] = {g.N,
                             g.C,
                             g.H + 2 * g.pad_top,
                             g.W + 2 * g.pad_left,
                             g.K,
                             g.R * g.dilation_h,
                             g.S * g.dilation_w,
                             g.OH + (g.pool_h + 1) * g.pool_dilation_h + g.pool_stride_h + 2 * g.pool_pad_h,
                             g.OW + (g.pool_w + 1) * g.pool_dilation_w + g.pool_stride_w + 2 * g.pool_pad_w,
                             g.PH * g.PW,
                             g.PH * g.pool_stride_h,
                             g.PW * g.pool_stride_w,
                             g.OH * g.stride_h,
                             g.OW * g.stride_w,
                             g.C / g.groups * g.R * g.S};
  for (const int64_t extent : extents) {
    if (extent >= kLimit) return false;
  }
  return true;
}

template <class Math>
bool ForwardGemm<Math>::accepts(const ConvMaxPool2dForwardParams& params) {
  constexpr int64_t kFewestColumns = 8;  // fewer leave most of the narrowest tile idle
  const ConvMaxPool2dGeometry& g = params.geometry;
  TileChoice choice;
  return params.dtype == Math::kDType && g.K / g.groups >= kFewestColumns && argmax_is_byte(g) &&
         has_32_bit_coordinates(g) && choose_tile<Math>(g, choice) >= 0;
}

template <class Math>
int64_t ForwardGemm<Math>::workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  TileChoice choice{};
  choose_tile<Math>(g, choice);
  return g.groups * choice.padded_k * padded_reduction<Math>(g) * static_cast<int64_t>(sizeof(typename Math::Storage));
}

template <class Math, bool VECTOR>
int launch_loader(const ConvMaxPool2dForwardParams& params, Stream stream) {
  using Tiles = ForwardTiles<Math, VECTOR>;
  TileChoice choice;
  const int index = choose_tile<Math>(params.geometry, choice);
  return pools_in_registers(params.geometry) ? launch_tile_at(index, params, stream, typename Tiles::InRegisters())
                                             : launch_tile_at(index, params, stream, typename Tiles::InShared());
}

template <class Math>
int ForwardGemm<Math>::launch(const ConvMaxPool2dForwardParams& params, Stream stream) {
  return is_vector_input(params, sizeof(typename Math::Storage)) ? launch_loader<Math, true>(params, stream)
                                                                 : launch_gather<Math>(params, stream);
}

}  // namespace pyconv::cuda
