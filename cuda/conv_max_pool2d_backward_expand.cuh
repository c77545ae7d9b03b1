// (grad_output, argmax) -> the dense gradient of the convolution's output, a few channels of one position at a time. It
// never exists in memory as a whole: the matrix products build the part they need in shared memory.
//
// A position gathers from the windows that cover it, in a fixed order, so that overlapping windows which chose the same
// position add up the same way every time, and no thread writes where another does.
#pragma once

#include "conv_max_pool2d_backward.cuh"
#include "warp_gemm.cuh"

namespace pyconv::cuda {

// Of the GPU that tiles are tuned for; a constant, so that the shape alone decides.
constexpr int64_t kMultiprocessors = 132;

// A row that lies beyond every image, also with a filter's or a stride's reach added.
constexpr int kBeyondEveryImage = 1 << 30;

// Whether the kernels that expand in tiles serve the shape: indices of 32 bits, an argmax of one byte, no dilated pool.
inline bool tiles_can_index(const ConvMaxPool2dGeometry& g) {
  constexpr int64_t kLimit = kBeyondEveryImage;
  const int64_t limited[] = {g.H + g.pad_top,
                             g.W + g.pad_left,
                             (g.OH + g.pool_pad_h) * g.stride_h + g.R * g.dilation_h,
                             (g.OW + g.pool_pad_w) * g.stride_w + g.S * g.dilation_w,
                             g.N * g.OH * g.OW,
                             g.K,
                             g.R * g.S * (g.C / g.groups),
                             g.stride_h * g.stride_w * (g.C / g.groups),
                             g.pool_stride_h * g.pool_w,
                             g.pool_stride_w};
  for (const int64_t value : limited) {
    if (value >= kLimit) return false;
  }
  return argmax_is_byte(g) && g.pool_dilation_h == 1 && g.pool_dilation_w == 1;
}

// 16 bytes of T.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
struct alignas(16) Chunk {
  T value[kChunk<T>];
};
// The argmax bytes of as many channels.
template <class T>
struct alignas(kChunk<T>) ArgmaxChunk {
  uint8_t value[kChunk<T>];
};

// Window gradients before the activation and argmax, as the kernels read them: pools without dilation, one byte of
// argmax. The activation's derivative is in the gradients already: see scale_grad_output().
struct WindowSource {
  const void* grad_output;
  const uint8_t* argmax;
  int64_t channel, row, column;  // strides from one window to the next
  int row_step, column_step;     // what they change in the window-relative index of a fixed position
  bool vectors;                  // the channels of a window lie in aligned chunks

  explicit WindowSource(const ConvMaxPool2dBackwardParams& p)
      : grad_output(p.grad_output),
        argmax(static_cast<const uint8_t*>(p.argmax)),
        channel(p.output_strides.c),
        row(p.output_strides.h),
        column(p.output_strides.w),
        row_step(static_cast<int>(p.geometry.pool_stride_h * p.geometry.pool_w)),
        column_step(static_cast<int>(p.geometry.pool_stride_w)) {
    const int64_t chunk = p.dtype == DType::float32 ? kChunk<float> : kChunk<BFloat16>;
    const bool aligned = reinterpret_cast<uintptr_t>(p.grad_output) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(p.argmax) % static_cast<uintptr_t>(chunk) == 0;
    vectors = channel == 1 && p.geometry.K / p.geometry.groups % chunk == 0 && aligned;
  }
};

// The windows that cover one position, the same ones for every channel. `index` is what argmax holds where the first of
// them chose the position.
struct alignas(16) PositionWindows {
  int64_t offset;  // of the first window, channel 0
  int index;
  uint16_t rows, columns;
};

__device__ __forceinline__ PositionWindows no_windows() { return {0, 0, 0, 0}; }

__device__ __forceinline__ PositionWindows windows_at(const ConvMaxPool2dBackwardParams& p, int64_t n, int row,
                                                      int column) {
  const ConvMaxPool2dGeometry& g = p.geometry;
  const int y = row + static_cast<int>(g.pool_pad_h), x = column + static_cast<int>(g.pool_pad_w);
  const int stride_h = static_cast<int>(g.pool_stride_h), stride_w = static_cast<int>(g.pool_stride_w);
  const int pool_w = static_cast<int>(g.pool_w);
  const CoveringWindows<int> rows(y, static_cast<int>(g.pool_h), 1, stride_h, static_cast<int>(g.PH));
  const CoveringWindows<int> columns(x, pool_w, 1, stride_w, static_cast<int>(g.PW));
  if (rows.last < rows.first || columns.last < columns.first) return no_windows();
  const Strides4& st = p.output_strides;
  return {n * st.n + rows.first * st.h + columns.first * st.w,
          (y - rows.first * stride_h) * pool_w + x - columns.first * stride_w,
          static_cast<uint16_t>(rows.last - rows.first + 1), static_cast<uint16_t>(columns.last - columns.first + 1)};
}

// How many items a thread expands at once: what their first windows (most positions have no other) hold is on its way
// before the first of them is needed.
constexpr int kExpandBatch = 2;

// One chunk of channels of one position.
template <class T>
struct ExpandItem {
  const PositionWindows& at;
  int64_t k;     // first channel
  int channels;  // that exist from there on
  Chunk<T>& to;
};

template <class T>
struct WindowChunk {
  ArgmaxChunk<T> chosen;
  Chunk<T> gradient;

  // `offset`: from the position's first window, in elements.
  __device__ __forceinline__ void load(const WindowSource& source, const ExpandItem<T>& item, int64_t offset) {
    const int64_t first = item.at.offset + item.k * source.channel + offset;
    const T* const gradients = static_cast<const T*>(source.grad_output) + first;
    const uint8_t* const argmax = source.argmax + first;
    if (source.vectors) {
      chosen = *reinterpret_cast<const ArgmaxChunk<T>*>(argmax);
      gradient = *reinterpret_cast<const Chunk<T>*>(gradients);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const bool exists = e < item.channels;
        chosen.value[e] = exists ? argmax[e * source.channel] : kNoGradientByte;
        gradient.value[e] = exists ? gradients[e * source.channel] : from_float<T>(0.f);
      }
    }
  }
};

// Expands item(i) for i = first, first + threads, ... below count.
template <class T, class Item>
__device__ __forceinline__ void expand(const WindowSource& source, int first, int count, int threads,
                                       const Item& item) {
  for (int i = first; i < count; i += kExpandBatch * threads) {
    WindowChunk<T> windows[kExpandBatch];
#pragma unroll
    for (int b = 0; b < kExpandBatch; ++b) {
      if (i + b * threads >= count) continue;
      const ExpandItem<T> mine = item(i + b * threads);
      if (mine.at.rows > 0 && mine.channels > 0) windows[b].load(source, mine, 0);
    }
#pragma unroll
    for (int b = 0; b < kExpandBatch; ++b) {
      if (i + b * threads >= count) continue;
      const ExpandItem<T> mine = item(i + b * threads);
      float sums[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sums[e] = 0.f;
      const int many = mine.channels > 0 ? mine.at.rows * mine.at.columns : 0;
      for (int w = 0, y = 0, x = 0; w < many; ++w) {
        if (w > 0) windows[b].load(source, mine, y * source.row + x * source.column);
        const int index = mine.at.index - y * source.row_step - x * source.column_step;
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e) {
          sums[e] += windows[b].chosen.value[e] == index ? to_float(windows[b].gradient.value[e]) : 0.f;
        }
        if (++x == mine.at.columns) {
          x = 0;
          ++y;
        }
      }
      Chunk<T> rounded;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) rounded.value[e] = from_float<T>(sums[e]);
      mine.to = rounded;
    }
  }
}

}  // namespace pyconv::cuda
