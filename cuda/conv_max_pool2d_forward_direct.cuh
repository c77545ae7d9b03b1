// conv_max_pool2d forward for first layers and small problems: plain float32 arithmetic from shared memory.
//
//   x (N,C,H,W) -> patch (channels, rows, columns) -+
//   w (K,Cg,R,S) -> weights (channels, R, S, ks) ---+-> W x W positions x KT channels, in a thread's registers
//     -> window max -> (windows, ks) in shared memory -> + bias -> activation -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// A block takes one image, one group, a tile of windows and `ks` output channels; a thread one window and KT channels.
// A few channels of input and weights are staged at a time. Where C*R*S is small (25 for the first layer of LeNet) a
// matrix product would copy each input R*S times for little arithmetic; here it is copied once. Where the whole problem
// is small what counts is the number of multiprocessors at work and the length of a thread's chain of multiply-adds:
// tiles are small, and spare threads split the input channels of a window among them (their sums are added in a fixed
// order).
//
// Columns of the patch are kept by phases, column % P, where P is how far apart the windows of neighbouring threads
// begin: so these always read neighbouring words. With KT = 4 a 5-wide filter does 80 multiply-adds on 17 loads.
#pragma once

#include "conv_max_pool2d.cuh"
#include "kernel_table.h"

namespace pyconv::cuda {

constexpr int kDirectThreads = 128;
constexpr int kDirectBlocksPerSm = 4;     // at least; 128 registers for a thread
constexpr int kDirectStageFloats = 8192;  // 32 KB: 6 blocks on a multiprocessor of 228 KB, where registers allow
constexpr int kDirectMostOffsets = 512;   // columns of the filter times columns of the window

struct DirectShared {
  alignas(16) float stage[kDirectStageFloats];  // patch, weights; then partial sums; then results
  int column_offset[kDirectMostOffsets];      // of window column j under filter column s, in a row of the patch
};

struct DirectTiling {
  int rows, columns, windows;  // of a tile
  int k_groups, ks;            // ks = k_groups * KT
  int splits;                  // threads that share a window's input channels
  int channels;                // staged at a time
  int tile_rows, tile_columns, k_blocks;  // blocks
  int phases, phase_columns;              // P; columns of one phase
  int patch_pitch, patch_size;            // floats of a row, of a channel
  Divisor by_windows, by_k_groups, by_columns, by_ks, by_channels, by_taps, by_kernel_columns;
  Divisor by_patch, by_patch_columns, by_phases;  // the patch as it lies in the input
};

struct DirectArguments {
  ConvMaxPool2dForwardParams params;
  DirectTiling tiling;
};

struct DirectBlock {
  int64_t n;
  int group, first_k, first_row, first_column;  // first_k within the group; the first window
};

__device__ __forceinline__ DirectBlock direct_block(const DirectArguments& a) {
  const DirectTiling& t = a.tiling;
  unsigned index = blockIdx.x;
  const auto next = [&](int extent) {
    const unsigned rest = index / static_cast<unsigned>(extent);
    const int digit = static_cast<int>(index - rest * extent);
    index = rest;
    return digit;
  };
  DirectBlock block;
  block.first_k = next(t.k_blocks) * t.ks;
  block.first_column = next(t.tile_columns) * t.columns;
  block.first_row = next(t.tile_rows) * t.rows;
  block.group = next(static_cast<int>(a.params.geometry.groups));
  block.n = index;
  return block;
}

// Copies that are not asynchronous are issued a few at a time, to wait for memory together.
template <class T>
constexpr int kDirectUnroll = sizeof(T) == sizeof(float) ? 1 : 4;

// Brings one element, widened; complete after copies_wait and a barrier.
__device__ __forceinline__ void stage_element(float* to, const float* from, bool valid) {
  copy_async<4>(to, from, valid);
}
template <class T>
__device__ __forceinline__ void stage_element(float* to, const T* from, bool valid) {
  *to = valid ? widen(*from) : 0.f;
}

template <class T>
__device__ __forceinline__ void stage_patch(const DirectArguments& a, const DirectBlock& block, int first_channel,
                                            float* patch) {
  const DirectTiling& t = a.tiling;
  const ConvMaxPool2dForwardParams& p = a.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.input_strides;
  const int Cg = static_cast<int>(g.C / g.groups);
  const int top = (block.first_row * static_cast<int>(g.pool_stride_h) - static_cast<int>(g.pool_pad_h)) *
                      static_cast<int>(g.stride_h) - static_cast<int>(g.pad_top);
  const int left = (block.first_column * static_cast<int>(g.pool_stride_w) - static_cast<int>(g.pool_pad_w)) *
                       static_cast<int>(g.stride_w) - static_cast<int>(g.pad_left);
  const T* input = static_cast<const T*>(p.input);
  const int64_t image = block.n * st.n + static_cast<int64_t>(block.group) * Cg * st.c;
#pragma unroll kDirectUnroll<T>
  for (int i = static_cast<int>(threadIdx.x); i < t.channels * t.by_patch.divisor; i += kDirectThreads) {
    int c, pixel;
    if (st.c == 1) {
      pixel = t.by_channels.quotient(i);
      c = i - pixel * t.channels;
    } else {
      c = t.by_patch.quotient(i);
      pixel = i - c * t.by_patch.divisor;
    }
    const int row = t.by_patch_columns.quotient(pixel), column = pixel - row * t.by_patch_columns.divisor;
    const int h = top + row, w = left + column;
    const bool valid = first_channel + c < Cg && static_cast<unsigned>(h) < static_cast<unsigned>(g.H) &&
                       static_cast<unsigned>(w) < static_cast<unsigned>(g.W);
    const int in_phase = t.by_phases.quotient(column), phase = column - in_phase * t.phases;
    stage_element(patch + c * t.patch_size + row * t.patch_pitch + phase * t.phase_columns + in_phase,
                  input + (valid ? image + (first_channel + c) * st.c + h * st.h + w * st.w : 0), valid);
  }
}

// weights[(c * R + r) * S + s][k], zero beyond the group's channels.
template <class T>
__device__ __forceinline__ void stage_weights(const DirectArguments& a, const DirectBlock& block, int first_channel,
                                              float* weights) {
  const DirectTiling& t = a.tiling;
  const ConvMaxPool2dForwardParams& p = a.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4& st = p.weight_strides;
  const int Cg = static_cast<int>(g.C / g.groups), Kg = static_cast<int>(g.K / g.groups);
  const T* from = static_cast<const T*>(p.weight);
  const int reduction = t.channels * t.by_taps.divisor;
#pragma unroll 1
  for (int k = 0; k < t.ks; ++k) {
#pragma unroll kDirectUnroll<T>
    for (int q = static_cast<int>(threadIdx.x); q < reduction; q += kDirectThreads) {
      const int c = t.by_taps.quotient(q), tap = q - c * t.by_taps.divisor;
      const int r = t.by_kernel_columns.quotient(tap), s = tap - r * t.by_kernel_columns.divisor;
      const bool valid = first_channel + c < Cg && block.first_k + k < Kg;
      const int64_t channel = static_cast<int64_t>(block.group) * Kg + block.first_k + k;
      stage_element(weights + q * t.ks + k,
                    from + (valid ? channel * st.n + (first_channel + c) * st.c + r * st.h + s * st.w : 0), valid);
    }
  }
}

// The weights of this thread's KT channels.
template <int KT>
__device__ __forceinline__ void load_weights(float (&to)[KT], const float* from) {
  static_assert(KT == 2 || KT == 4, "one vector load");
  if constexpr (KT == 2) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    to[0] = both.x;
    to[1] = both.y;
  } else {
    const float4 all = *reinterpret_cast<const float4*>(from);
    to[0] = all.x;
    to[1] = all.y;
    to[2] = all.z;
    to[3] = all.w;
  }
}

// sums += one channel's contribution to a window. x: the window's first element in the channel's patch.
template <int W, int S, int KT>
__device__ __forceinline__ void convolve_channel(const DirectArguments& a, const DirectShared& shared, const float* x,
                                                 const float* weights, float (&sums)[W * W][KT]) {
  const DirectTiling& t = a.tiling;
  const ConvMaxPool2dGeometry& g = a.params.geometry;
  const int R = static_cast<int>(g.R);
  if constexpr (S > 0) {  // unit strides and dilations, windows W apart
    for (int r = 0; r < R; ++r) {
      float in[W][S + W - 1];
#pragma unroll
      for (int i = 0; i < W; ++i) {
#pragma unroll
        for (int o = 0; o < S + W - 1; ++o) {
          in[i][o] = x[(r + i) * t.patch_pitch + o % W * t.phase_columns + o / W];
        }
      }
#pragma unroll
      for (int s = 0; s < S; ++s, weights += t.ks) {
        float w[KT];
        load_weights(w, weights);
#pragma unroll
        for (int at = 0; at < W * W; ++at) {
#pragma unroll
          for (int k = 0; k < KT; ++k) sums[at][k] = fmaf(in[at / W][at % W + s], w[k], sums[at][k]);
        }
      }
    }
  } else {
    const int columns = static_cast<int>(g.S);
    const int row_step = static_cast<int>(g.dilation_h) * t.patch_pitch;
    const int window_row_step = static_cast<int>(g.pool_dilation_h * g.stride_h) * t.patch_pitch;
    for (int r = 0; r < R; ++r, x += row_step) {
      for (int s = 0; s < columns; ++s, weights += t.ks) {
        float w[KT];
        load_weights(w, weights);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float* column = x + shared.column_offset[s * W + j];
#pragma unroll
          for (int i = 0; i < W; ++i) {
            const float in = column[i * window_row_step];
#pragma unroll
            for (int k = 0; k < KT; ++k) sums[i * W + j][k] = fmaf(in, w[k], sums[i * W + j][k]);
          }
        }
      }
    }
  }
}

// ---- Kernel ---------------------------------------------------------------------------------------------------

// W: side of the window; S: columns of the filter where strides and dilations are 1 and windows do not overlap, else 0;
// KT: output channels of a thread.
template <class T, int W, int S, int KT>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocksPerSm)
    conv_max_pool2d_forward_direct_kernel(const DirectArguments a) {
  DirectShared& shared = shared_memory<DirectShared>();
  const DirectTiling& t = a.tiling;
  const ConvMaxPool2dForwardParams& p = a.params;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const DirectBlock block = direct_block(a);
  const int thread = static_cast<int>(threadIdx.x);
  const int Cg = static_cast<int>(g.C / g.groups);

  if constexpr (S == 0) {
    for (int i = thread; i < static_cast<int>(g.S) * W; i += kDirectThreads) {
      const int column =
          i / W * static_cast<int>(g.dilation_w) + i % W * static_cast<int>(g.pool_dilation_w * g.stride_w);
      const int in_phase = t.by_phases.quotient(column);
      shared.column_offset[i] = (column - in_phase * t.phases) * t.phase_columns + in_phase;
    }
  }

  const int unit = t.by_windows.quotient(thread), window = thread - unit * t.windows;
  const int split = t.by_k_groups.quotient(unit), k_group = unit - split * t.k_groups;
  const int window_row = t.by_columns.quotient(window), window_column = window - window_row * t.columns;
  const bool computes = split < t.splits;
  float* const patch = shared.stage;
  float* const weights = shared.stage + (t.channels * t.patch_size + 3) / 4 * 4;
  const int from = window_row * static_cast<int>(g.pool_stride_h * g.stride_h) * t.patch_pitch + window_column;

  float sums[W * W][KT] = {};
  for (int first = 0; first < Cg; first += t.channels) {
    stage_patch<T>(a, block, first, patch);
    stage_weights<T>(a, block, first, weights);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    if (computes) {
      const int count = Cg - first < t.channels ? Cg - first : t.channels;
      for (int c = split; c < count; c += t.splits) {
        convolve_channel<W, S, KT>(a, shared, patch + c * t.patch_size + from,
                                   weights + c * t.by_taps.divisor * t.ks + k_group * KT, sums);
      }
    }
    __syncthreads();
  }

  // Partial sums meet in the threads of the first split.
  const int sharers = t.windows * t.k_groups, place = thread - split * sharers;
  if (computes && split > 0) {
#pragma unroll
    for (int i = 0; i < W * W * KT; ++i) {
      shared.stage[((split - 1) * W * W * KT + i) * sharers + place] = sums[i / KT][i % KT];
    }
  }
  __syncthreads();
  if (split == 0) {
    for (int other = 0; other < t.splits - 1; ++other) {
#pragma unroll
      for (int i = 0; i < W * W * KT; ++i) {
        sums[i / KT][i % KT] += shared.stage[(other * W * W * KT + i) * sharers + place];
      }
    }
  }
  __syncthreads();

  const int pitch = t.ks + 1;  // odd or not, threads along the windows write at a distance of few banks
  float* const maxima = shared.stage;
  uint8_t* const positions = reinterpret_cast<uint8_t*>(maxima + t.windows * pitch);
  if (split == 0) {
    const int top = (block.first_row + window_row) * static_cast<int>(g.pool_stride_h) - static_cast<int>(g.pool_pad_h);
    const int left =
        (block.first_column + window_column) * static_cast<int>(g.pool_stride_w) - static_cast<int>(g.pool_pad_w);
    WindowMax<float> best[KT];
#pragma unroll
    for (int i = 0; i < W * W; ++i) {
      const int row = top + i / W * static_cast<int>(g.pool_dilation_h);
      const int column = left + i % W * static_cast<int>(g.pool_dilation_w);
      if (static_cast<unsigned>(row) >= static_cast<unsigned>(g.OH) ||
          static_cast<unsigned>(column) >= static_cast<unsigned>(g.OW)) {
        continue;
      }
#pragma unroll
      for (int k = 0; k < KT; ++k) best[k].take(sums[i][k], i);
    }
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      maxima[window * pitch + k_group * KT + k] = best[k].value;
      positions[window * pitch + k_group * KT + k] = static_cast<uint8_t>(best[k].position);
    }
  }
  __syncthreads();

  const Strides4& st = p.output_strides;
  const int Kg = static_cast<int>(g.K / g.groups);
#pragma unroll 1
  for (int i = thread; i < t.windows * t.ks; i += kDirectThreads) {
    int index, k;
    if (st.c == 1) {
      index = t.by_ks.quotient(i);
      k = i - index * t.ks;
    } else {
      k = t.by_windows.quotient(i);
      index = i - k * t.windows;
    }
    const int tile_row = t.by_columns.quotient(index);
    const int64_t row = block.first_row + tile_row, column = block.first_column + index - tile_row * t.columns;
    if (row >= g.PH || column >= g.PW || block.first_k + k >= Kg) continue;
    WindowMax<float> best;
    best.value = maxima[index * pitch + k];
    const uint8_t position = positions[index * pitch + k];
    best.position = position == kNoGradientByte ? -1 : position;
    const int64_t channel = static_cast<int64_t>(block.group) * Kg + block.first_k + k;
    write_window<T>(p, block.n * st.n + channel * st.c + row * st.h + column * st.w, best, bias_of<T>(p, channel));
  }
}

// Columns of the filter where there is a kernel unrolled for them, else 0.
inline int direct_unrolled_columns(const ConvMaxPool2dGeometry& g) {
  const bool unit_steps = g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 &&
                          g.pool_dilation_h == 1 && g.pool_dilation_w == 1 && g.pool_stride_h == g.pool_h &&
                          g.pool_stride_w == g.pool_w;
  return unit_steps && g.pool_h == 2 && (g.S == 3 || g.S == 5) ? static_cast<int>(g.S) : 0;
}

// Whether there are kernels with four output channels per thread: for the shapes that large first layers have.
inline bool direct_has_four_channels(const ConvMaxPool2dGeometry& g) {
  return g.pool_h == 3 || direct_unrolled_columns(g) != 0;
}

// Runs the kernel with `kt` (2 or 4) output channels per thread. Instantiated once per T, in
// conv_max_pool2d_forward_direct_{float32,bfloat16,float16}.cu.
template <class T>
int launch_direct_tile(const DirectArguments& arguments, int kt, int64_t blocks, Stream stream);

}  // namespace pyconv::cuda
