// conv_max_pool2d forward in TF32 for inputs of few channels, as a matrix product whose A is never written.
//
//   x (N,C,H,W) -> patch (Cg, rows, columns), once per block
//   w (K,Cg,R,S) -> packed (groups, K padded, Q padded), Q = (r, s, c) -> slabs of B
//   patch, B -> accumulators (positions, K), in registers -> shared memory -> window max -> + bias -> activation
//   -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// A first layer such as 3 channels under an 11 x 11 filter has no 16 aligned bytes side by side, and copying every
// position's 363 elements one by one would take longer than multiplying them. Here a block of 128 positions brings its
// input once (121 positions of that filter at stride 4: 31 KB, not 176 KB), and a lane picks its elements of A from
// the patch: position's place + element's offset, the offsets from a table. A warp's 64 x 48 accumulators take 16 such
// loads for 24 matrix instructions. Two blocks of four warps fit on a multiprocessor, so that one computes while the
// other brings its patch or pools.
//
// The rest - weights, rectangle of positions under a tile of windows, pooling - is that of
// conv_max_pool2d_forward_gemm_kernel.cuh.
#include "conv_max_pool2d_forward_gemm_launch.cuh"

namespace pyconv::cuda {

constexpr int kPatchFloats = 10240;
constexpr int kMostPatchReduction = 1024;
constexpr int kMostRowsPerPosition = 2;

// 128 positions, 16 * NT output channels.
template <int NT>
struct PatchTile : ForwardTile<TF32, false, false, 4, NT, 2, 2, 3, 2> {
  using Base = ForwardTile<TF32, false, false, 4, NT, 2, 2, 3, 2>;
  static constexpr int kWeightBytes = Base::kColumns * kSlabPitch;  // of a stage
  static constexpr int kBytes = Base::kStages * kWeightBytes + kPatchFloats * 4;
  static_assert(kBytes >= Base::kEpilogueBytes, "the accumulators lie where weights and patch were");

  struct Shared {
    int offsets[kMostPatchReduction];  // in the patch, of the reduction's elements
    alignas(16) char bytes[kBytes];
  };
};

struct PatchTiling {
  int pitch, plane;      // floats of a row and of a channel of the patch
  Divisor by_pixels, by_columns;  // pixels of the patch, its columns
  Divisor by_channels;
};

struct PatchArguments {
  ForwardArguments forward;
  PatchTiling patch;
};

namespace {

__device__ __forceinline__ void stage_patch(const PatchArguments& a, const ForwardBlock& block, int threads,
                                            float* patch) {
  const ConvMaxPool2dForwardParams& p = a.forward.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.input_strides;
  const PatchTiling& t = a.patch;
  const int channels = t.by_channels.divisor, pixels = t.by_pixels.divisor;
  const int top = window_top(g, block.first_row) * static_cast<int>(g.stride_h) - static_cast<int>(g.pad_top);
  const int left = window_left(g, block.first_column) * static_cast<int>(g.stride_w) - static_cast<int>(g.pad_left);
  const float* const image = static_cast<const float*>(p.input) + block.first_image * st.n +
                             static_cast<int64_t>(block.group) * channels * st.c;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < channels * pixels; i += threads) {
    int c, pixel;  // neighbouring threads read neighbouring elements
    if (st.c == 1) {
      pixel = t.by_channels.quotient(i);
      c = i - pixel * channels;
    } else {
      c = t.by_pixels.quotient(i);
      pixel = i - c * pixels;
    }
    const int row = t.by_columns.quotient(pixel), column = pixel - row * t.by_columns.divisor;
    const int h = top + row, w = left + column;
    const bool valid = static_cast<unsigned>(h) < static_cast<unsigned>(g.H) &&
                       static_cast<unsigned>(w) < static_cast<unsigned>(g.W);
    copy_async<4>(patch + c * t.plane + row * t.pitch + column, image + (valid ? c * st.c + h * st.h + w * st.w : 0),
                  valid);
  }
}

}  // namespace

// kernels

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    conv_max_pool2d_forward_patch_kernel(const PatchArguments a) {
  const ForwardArguments& f = a.forward;
  const ForwardTiling& t = f.tiling;
  const ConvMaxPool2dGeometry& g = f.params.geometry;
  typename Tile::Shared& shared = shared_memory<typename Tile::Shared>();
  float* const patch = reinterpret_cast<float*>(shared.bytes + Tile::kStages * Tile::kWeightBytes);
  const ForwardBlock block = forward_block<Tile>(f);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_index();
  const int warp_row = warp / Tile::kWarpColumns * 16 * Tile::kMT;
  const int warp_column = warp % Tile::kWarpColumns * 8 * Tile::kNT;

  stage_patch(a, block, Tile::kThreads, patch);
#pragma unroll 1
  for (int slab = 0; slab < Tile::kStages - 1; ++slab) {
    if (slab < t.slabs) copy_weights<Tile>(f, block, slab, shared.bytes + slab * Tile::kWeightBytes);
    copies_commit();  // the patch belongs to the first group
  }
  for (int q = static_cast<int>(threadIdx.x); q < t.reduction; q += Tile::kThreads) {
    const int tap = a.patch.by_channels.quotient(q), c = q - tap * a.patch.by_channels.divisor;
    const int r = t.by_kernel_columns.quotient(tap), s = tap - r * t.by_kernel_columns.divisor;
    shared.offsets[q] =
        c * a.patch.plane + r * static_cast<int>(g.dilation_h) * a.patch.pitch + s * static_cast<int>(g.dilation_w);
  }

  int place[Tile::kMT][2];  // of this lane's positions
#pragma unroll
  for (int i = 0; i < 2 * Tile::kMT; ++i) {
    const int m = warp_row + 8 * i + lane / 4;
    const int y = t.by_rectangle_columns.quotient(m), x = m - y * t.rectangle_columns;
    const bool inside = y < t.rectangle_rows;
    place[i / 2][i % 2] =
        inside ? y * static_cast<int>(g.stride_h) * a.patch.pitch + x * static_cast<int>(g.stride_w) : 0;
  }
  RowsOfB<TF32, Tile::kNT> b_rows;
  b_rows.set([&](int n) { return shared.bytes + (warp_column + n) * kSlabPitch; });
  WarpTile<TF32, Tile::kMT, Tile::kNT> sums;
  sums.clear();
  int stage = 0, next_stage = Tile::kStages - 1;
#pragma unroll 1
  for (int slab = 0; slab < t.slabs; ++slab) {
    copies_wait<Tile::kStages - 2>();
    __syncthreads();  // the slab has arrived, and nobody reads the one before any more: its stage is free
    const int next = slab + Tile::kStages - 1;
    if (next < t.slabs) copy_weights<Tile>(f, block, next, shared.bytes + next_stage * Tile::kWeightBytes);
    copies_commit();
#pragma unroll
    for (int step = 0; step < Tile::kSlab; step += kStep<TF32>) {
      const int q[2] = {slab * Tile::kSlab + step + lane % 4, slab * Tile::kSlab + step + lane % 4 + 4};
      const bool inside[2] = {q[0] < t.reduction, q[1] < t.reduction};
      const int offset[2] = {inside[0] ? shared.offsets[q[0]] : 0, inside[1] ? shared.offsets[q[1]] : 0};
      sums.multiply_gathered(
          [&](int mt, int half, int k_half) {
            return inside[k_half] ? patch[place[mt][half] + offset[k_half]] : 0.f;
          },
          b_rows, stage * Tile::kWeightBytes + 4 * step);
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == Tile::kStages ? 0 : next_stage + 1;
  }
  copies_wait<0>();
  __syncthreads();

  float* const values = reinterpret_cast<float*>(shared.bytes);
  for_each_sum<Tile>(sums, warp_row, warp_column,
                     [&](int row, int column, float sum) { values[row * Tile::kPitch + column] = sum; });
  __syncthreads();
  write_windows<Tile>(f, block, values, nullptr);
}

// launchers

namespace {

// The tile of windows of one image.
WindowTile patch_window_tile(const ConvMaxPool2dGeometry& g) {
  ConvMaxPool2dGeometry one = g;
  one.N = 1;
  WindowTile tile = best_window_tile(one, PatchTile<2>::kRows);
  tile.blocks *= g.N;
  return tile;
}

struct PatchShape {
  int64_t rows, columns, plane;
};

PatchShape patch_shape(const ConvMaxPool2dGeometry& g, const WindowTile& tile) {
  const int64_t height = (tile.rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h + 1;
  const int64_t width = (tile.columns - 1) * g.pool_stride_w + (g.pool_w - 1) * g.pool_dilation_w + 1;
  PatchShape shape;
  shape.rows = (height - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1;
  shape.columns = (width - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1;
  // A warp reads 8 neighbouring positions x 4 neighbouring elements of (s, c). The planes lie so that these fall on
  // different banks: with positions 4 apart, 3 modulo 4 does it for up to 4 channels; with 1 apart, 8 modulo 32.
  const int64_t modulus = g.stride_w % 4 == 0 ? 4 : 32, residue = modulus == 4 ? 3 : 8;
  const int64_t size = shape.rows * shape.columns;
  shape.plane = round_up(size > residue ? size - residue : 0, modulus) + residue;
  return shape;
}

// Output channels of a block: the fewest idle ones, then the most.
int64_t patch_columns(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kChoices[] = {PatchTile<6>::kColumns, PatchTile<4>::kColumns, PatchTile<2>::kColumns};
  int64_t best = 0;
  for (const int64_t columns : kChoices) {
    if (best == 0 || round_up(g.K / g.groups, columns) < round_up(g.K / g.groups, best)) best = columns;
  }
  return best;
}

template <int NT>
int launch_patch(const PatchArguments& arguments, int64_t blocks, Stream stream) {
  using Tile = PatchTile<NT>;
  return launch(conv_max_pool2d_forward_patch_kernel<Tile>, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
                sizeof(typename Tile::Shared), stream, arguments);
}

}  // namespace

bool ForwardPatch::accepts(const ConvMaxPool2dForwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  if (!ForwardGemm<TF32>::accepts(params) || is_vector_input(params, sizeof(float))) return false;
  const int64_t channels = g.C / g.groups;
  const WindowTile tile = patch_window_tile(g);
  if (tile.images == 0 || channels * g.R * g.S > kMostPatchReduction) return false;
  // Small maps, and windows with large halos, leave too many of the positions idle.
  if (tile.blocks * PatchTile<2>::kRows >= kMostRowsPerPosition * g.N * g.OH * g.OW) return false;
  const PatchShape shape = patch_shape(g, tile);
  return shape.rows <= kPatchFloats && shape.columns <= kPatchFloats && shape.plane * channels <= kPatchFloats &&
         tile.blocks * g.groups * ceil_div(g.K / g.groups, patch_columns(g)) <= kMaxGridX;
}

int64_t ForwardPatch::workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  return g.groups * round_up(g.K / g.groups, patch_columns(g)) * padded_reduction<TF32>(g) *
         static_cast<int64_t>(sizeof(float));
}

int ForwardPatch::launch(const ConvMaxPool2dForwardParams& params, Stream stream) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  const int64_t channels = g.C / g.groups, columns = patch_columns(g), padded_q = padded_reduction<TF32>(g);
  const WindowTile tile = patch_window_tile(g);
  const PatchShape shape = patch_shape(g, tile);
  const int64_t padded_k = round_up(g.K / g.groups, columns);
  PatchArguments arguments{{params, {}}, {}};
  ForwardTiling& t = arguments.forward.tiling;
  set_window_tile(g, tile, t);
  t.slabs = static_cast<int>(padded_q / PatchTile<2>::kSlab);
  t.reduction = static_cast<int>(g.R * g.S * channels);
  t.column_tiles = static_cast<int>(padded_k / columns);
  t.position_tiles = static_cast<int>(tile.blocks);
  t.by_kernel_columns = Divisor(g.S);
  arguments.patch.pitch = static_cast<int>(shape.columns);
  arguments.patch.plane = static_cast<int>(shape.plane);
  arguments.patch.by_pixels = Divisor(shape.rows * shape.columns);
  arguments.patch.by_columns = Divisor(shape.columns);
  arguments.patch.by_channels = Divisor(channels);
  const int error = pack_forward_weights(params, padded_k, padded_q, channels, stream);
  if (error != 0) return error;
  const int64_t blocks = tile.blocks * g.groups * t.column_tiles;
  switch (columns) {
    case PatchTile<6>::kColumns:
      return launch_patch<6>(arguments, blocks, stream);
    case PatchTile<4>::kColumns:
      return launch_patch<4>(arguments, blocks, stream);
    default:
      return launch_patch<2>(arguments, blocks, stream);
  }
}

}  // namespace pyconv::cuda
