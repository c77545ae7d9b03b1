// The entry of the direct kernel: which shapes it takes, and in which tiles.
#include "conv_max_pool2d_forward_direct.cuh"
#include "kernels.h"

namespace pyconv::cuda {

namespace {

// false: not even one channel's patch and weights fit.
bool make_tiling(const ConvMaxPool2dGeometry& g, int kt, DirectTiling& t, int64_t& blocks) {
  constexpr int64_t kMultiprocessors = 132;  // of the GPU it is tuned for; a constant, so that the shape alone decides
  constexpr int64_t kMostColumns = 16, kWindows = 32, kMostSplits = 8;
  const int64_t Cg = g.C / g.groups, Kg = g.K / g.groups, taps = g.R * g.S;
  const int64_t columns = ceil_div(g.PW, ceil_div(g.PW, kMostColumns));
  const int64_t fitting_rows = kWindows / columns;
  const int64_t rows = fitting_rows < g.PH ? ceil_div(g.PH, ceil_div(g.PH, fitting_rows)) : g.PH;
  const int64_t windows = rows * columns;
  const int64_t tile_rows = ceil_div(g.PH, rows), tile_columns = ceil_div(g.PW, columns);
  const auto blocks_with = [&](int64_t k_groups) {
    return g.N * g.groups * tile_rows * tile_columns * ceil_div(Kg, k_groups * kt);
  };
  int64_t k_groups = kDirectThreads / windows;
  if (k_groups > ceil_div(Kg, kt)) k_groups = ceil_div(Kg, kt);
  while (k_groups > 1 && blocks_with(k_groups) < kMultiprocessors) k_groups = ceil_div(k_groups, 2);
  k_groups = ceil_div(Kg, ceil_div(Kg, k_groups * kt) * kt);  // the last block of channels as full as the others
  const int64_t ks = k_groups * kt;

  const auto span = [](int64_t count, int64_t stride, int64_t size, int64_t dilation) {
    return (count - 1) * stride + (size - 1) * dilation + 1;
  };
  const int64_t conv_rows = span(rows, g.pool_stride_h, g.pool_h, g.pool_dilation_h);
  const int64_t conv_columns = span(columns, g.pool_stride_w, g.pool_w, g.pool_dilation_w);
  const int64_t patch_rows = span(conv_rows, g.stride_h, g.R, g.dilation_h);
  const int64_t patch_columns = span(conv_columns, g.stride_w, g.S, g.dilation_w);
  const int64_t phases = g.pool_stride_w * g.stride_w, phase_columns = ceil_div(patch_columns, phases);
  const int64_t pitch = phases * phase_columns;
  if (patch_rows > kDirectStageFloats || pitch > kDirectStageFloats || taps > kDirectStageFloats ||
      g.S * g.pool_w > kDirectMostOffsets) {
    return false;
  }
  const int64_t patch_size = patch_rows * pitch;
  const int64_t fitting_channels = (kDirectStageFloats - 4) / (patch_size + taps * ks);
  if (fitting_channels == 0) return false;
  const int64_t channels = fitting_channels < Cg ? ceil_div(Cg, ceil_div(Cg, fitting_channels)) : Cg;
  int64_t splits = kDirectThreads / (windows * k_groups);
  if (splits > kMostSplits) splits = kMostSplits;
  if (splits > channels) splits = channels;

  t.rows = static_cast<int>(rows);
  t.columns = static_cast<int>(columns);
  t.windows = static_cast<int>(windows);
  t.k_groups = static_cast<int>(k_groups);
  t.ks = static_cast<int>(ks);
  t.splits = static_cast<int>(splits);
  t.channels = static_cast<int>(channels);
  t.tile_rows = static_cast<int>(tile_rows);
  t.tile_columns = static_cast<int>(tile_columns);
  t.k_blocks = static_cast<int>(ceil_div(Kg, ks));
  t.phases = static_cast<int>(phases);
  t.phase_columns = static_cast<int>(phase_columns);
  t.patch_pitch = static_cast<int>(pitch);
  t.patch_size = static_cast<int>(patch_size);
  t.by_windows = Divisor(windows);
  t.by_k_groups = Divisor(k_groups);
  t.by_columns = Divisor(columns);
  t.by_ks = Divisor(ks);
  t.by_channels = Divisor(channels);
  t.by_taps = Divisor(taps);
  t.by_kernel_columns = Divisor(g.S);
  t.by_patch = Divisor(patch_rows * patch_columns);
  t.by_patch_columns = Divisor(patch_columns);
  t.by_phases = Divisor(phases);
  blocks = blocks_with(k_groups);
  return blocks <= kMaxGridX;
}

// Four channels per thread where that still makes blocks enough for every multiprocessor.
bool choose_tiling(const ConvMaxPool2dGeometry& g, DirectTiling& t, int64_t& blocks, int& kt) {
  constexpr int64_t kEnoughBlocks = 264;
  kt = 4;
  if (direct_has_four_channels(g) && make_tiling(g, 4, t, blocks) && blocks >= kEnoughBlocks) return true;
  kt = 2;
  return make_tiling(g, 2, t, blocks);
}

bool accepts_direct(const ConvMaxPool2dForwardParams& params) {
  constexpr int64_t kSmallReduction = 64;             // C/groups * R * S
  constexpr int64_t kSmallProblem = int64_t(1) << 25;  // multiply-adds
  constexpr int64_t kLimit = int64_t(1) << 20;         // of an extent: products of two stay within 32 bits' reach
  const ConvMaxPool2dGeometry& g = params.geometry;
  if (params.dtype == DType::float64 || g.pool_h != g.pool_w || g.pool_h > 3) return false;
  const int64_t extents[] = {g.C, g.H, g.W, g.K, g.R, g.S, g.PH, g.PW, g.OH, g.OW};
  for (const int64_t extent : extents) {
    if (extent >= kLimit) return false;
  }
  const int64_t steps[] = {g.stride_h,      g.stride_w,      g.dilation_h, g.dilation_w, g.pool_stride_h,
                           g.pool_stride_w, g.pool_dilation_h, g.pool_dilation_w, g.pad_top, g.pad_left};
  for (const int64_t step : steps) {
    if (step >= 1024) return false;
  }
  const int64_t reduction = g.C / g.groups * g.R * g.S;
  const double work = static_cast<double>(reduction) * static_cast<double>(g.N * g.K) *
                      static_cast<double>(g.PH * g.PW * g.pool_h * g.pool_w);
  if (reduction > kSmallReduction && work > static_cast<double>(kSmallProblem)) return false;
  DirectTiling tiling;
  int64_t blocks;
  int kt;
  return choose_tiling(g, tiling, blocks, kt);
}

int launch_direct(const ConvMaxPool2dForwardParams& params, Stream stream) {
  DirectArguments arguments{params, {}};
  int64_t blocks;
  int kt;
  choose_tiling(params.geometry, arguments.tiling, blocks, kt);
  switch (params.dtype) {
    case DType::bfloat16:
      return launch_direct_tile<BFloat16>(arguments, kt, blocks, stream);
    case DType::float16:
      return launch_direct_tile<Float16>(arguments, kt, blocks, stream);
    default:
      return launch_direct_tile<float>(arguments, kt, blocks, stream);
  }
}

}  // namespace

extern const Kernel<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_direct = {
    "direct",
    "square windows of 1 to 3, not float64; C/groups*R*S of at most 64, or at most 33 million multiply-adds",
    true,
    accepts_direct,
    [](const ConvMaxPool2dForwardParams&) -> int64_t { return 0; },
    launch_direct,
};

}  // namespace pyconv::cuda
