// The two sparse products of conv_max_pool2d's backward, over planes that hold one vector of channels a pixel.
//
//   grad_weight: sums (runs, columns) += gradient * x (pixel + run, columns), over the windows of one k
//   grad_input:  x (pixel + run, columns) += gradient * weights of k (runs, columns), over the k of one pixel, or,
//                where a k has few vectors, over the windows of one k
//
// A part is what one call sums in registers: `runs` runs of `columns` vectors side by side. A plane's pixels are
// aligned, so no load crosses a cache line.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

constexpr int kMaxColumns = 5;
constexpr int kMaxRuns = 6;
constexpr int kMaxVectors = kVectorBytes == 64 ? 25 : 12;  // of a part: leaves registers for the operands
constexpr int kMaxHeldVectors = 6;                         // of a part whose weights stay in registers

// Live windows of one k, in consecutive images: at `pixels`, relative to a band of rows, flows `gradients`.
template <class A>
struct WindowSpan {
  const int32_t* pixels;  // of the first image
  const A* gradients;
  const int64_t* begins;  // begin and end of the band in each image's list
  const A* x;             // plane of the first image, where the band begins
  int64_t images, list_stride, ends_stride, image_stride;
  bool first;  // the sums hold nothing yet
};

// The shares of one pixel's patch: up to `end` in the sorted list of a band.
struct Patch {
  int64_t pixel;
  int64_t end;
};

// A part's vectors at compile time.
template <class V, int Runs, int Columns>
struct PartShape {};

template <class V, int Runs, int Columns>
void accumulate_weights(PartShape<V, Runs, Columns>, const WindowSpan<typename VectorTraits<V>::Scalar>& span,
                        const int64_t* runs, typename VectorTraits<V>::Scalar* sums) {
  using Traits = VectorTraits<V>;
  using A = typename Traits::Scalar;
  constexpr int kLanes = Traits::kLanes, kVectors = Runs * Columns;
  constexpr int kChains = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;  // enough sums to hide the multiply-add's latency
  V acc[kChains][kVectors];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) acc[c][i] = V{};
  }
  for (int64_t image = 0; image < span.images; ++image) {
    const int32_t* pixels = span.pixels + image * span.list_stride;
    const A* gradients = span.gradients + image * span.list_stride;
    const int64_t* band = span.begins + image * span.ends_stride;
    const A* x[Runs];  // a pointer a run: nothing but the pixel is left to add
#pragma GCC unroll 32
    for (int r = 0; r < Runs; ++r) x[r] = span.x + image * span.image_stride + runs[r];
    const int64_t end = band[1];
    int64_t i = band[0];
    const auto add_window = [&](V* sum, int64_t at) {
      const V gradient = Traits::broadcast_of(gradients + at);
      const int64_t pixel = static_cast<int64_t>(pixels[at]) * kLanes;
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
        const A* run = x[r] + pixel;
#pragma GCC unroll 32
        for (int c = 0; c < Columns; ++c) {
          sum[r * Columns + c] = fma(gradient, Traits::load_from(run + c * kLanes), sum[r * Columns + c]);
        }
      }
    };
    for (; i + kChains <= end; i += kChains) {
#pragma GCC unroll 32
      for (int c = 0; c < kChains; ++c) add_window(acc[c], i + c);
    }
    for (; i < end; ++i) add_window(acc[0], i);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) {
    V sum = acc[0][i];
    if constexpr (kChains == 2) sum = add(sum, acc[1][i]);
    if constexpr (kChains == 4) sum = add(add(sum, acc[1][i]), add(acc[2][i], acc[3][i]));
    A* to = sums + i * kLanes;
    store(to, span.first ? sum : add(Traits::load_from(to), sum));
  }
}

// `weights` (K, runs, columns); shares are (k, gradient); what ends the patches has no pixel. Sums slide along a row of
// pixels that have shares: of those a run has in registers, the first is complete when the next pixel begins.
template <class V, int Runs, int Columns>
void accumulate_patches(PartShape<V, Runs, Columns>, const Patch* patch, const Patch* end, const int32_t* ks,
                        const typename VectorTraits<V>::Scalar* gradients,
                        const typename VectorTraits<V>::Scalar* weights, const int64_t* runs,
                        typename VectorTraits<V>::Scalar* plane) {
  using Traits = VectorTraits<V>;
  using A = typename Traits::Scalar;
  constexpr int kLanes = Traits::kLanes, kVectors = Runs * Columns;
  constexpr int kChains = kVectors >= 4 ? 1 : 2;
  const auto add_to = [](A* to, V sum) { store(to, add(Traits::load_from(to), sum)); };
  const auto add_share = [&](V* sum, int64_t at) {
    const V gradient = Traits::broadcast_of(gradients + at);
    const A* from = weights + static_cast<int64_t>(ks[at]) * (kVectors * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) sum[i] = fma(gradient, Traits::load_from(from + i * kLanes), sum[i]);
  };
  V acc[kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) acc[i] = V{};
  int64_t share = 0;
  for (; patch < end; ++patch) {
    const int64_t last = patch->end;
    if constexpr (kChains == 2) {
      V second[kVectors];
#pragma GCC unroll 32
      for (int i = 0; i < kVectors; ++i) second[i] = V{};
      for (; share + 2 <= last; share += 2) {
        add_share(acc, share);
        add_share(second, share + 1);
      }
#pragma GCC unroll 32
      for (int i = 0; i < kVectors; ++i) acc[i] = add(acc[i], second[i]);
    }
    for (; share < last; ++share) add_share(acc, share);
    A* const to = plane + patch->pixel * kLanes;
    if (Columns > 1 && patch[1].pixel == patch->pixel + 1) {
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
        V* const run = acc + r * Columns;
        add_to(to + runs[r], run[0]);
#pragma GCC unroll 32
        for (int c = 0; c + 1 < Columns; ++c) run[c] = run[c + 1];
        run[Columns - 1] = V{};
      }
    } else {
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
#pragma GCC unroll 32
        for (int c = 0; c < Columns; ++c) {
          add_to(to + runs[r] + c * kLanes, acc[r * Columns + c]);
          acc[r * Columns + c] = V{};
        }
      }
    }
  }
}

// The windows [begin, end) of one k, whose weights are (runs, columns).
template <class V, int Runs, int Columns>
void scatter_weights(PartShape<V, Runs, Columns>, const int32_t* pixels,
                     const typename VectorTraits<V>::Scalar* gradients, int64_t begin, int64_t end,
                     const typename VectorTraits<V>::Scalar* weights, const int64_t* runs,
                     typename VectorTraits<V>::Scalar* plane) {
  using Traits = VectorTraits<V>;
  using A = typename Traits::Scalar;
  constexpr int kLanes = Traits::kLanes;
  V held[Runs * Columns];
#pragma GCC unroll 32
  for (int i = 0; i < Runs * Columns; ++i) held[i] = Traits::load_from(weights + i * kLanes);
  A* x[Runs];
#pragma GCC unroll 32
  for (int r = 0; r < Runs; ++r) x[r] = plane + runs[r];
  for (int64_t i = begin; i < end; ++i) {
    const V gradient = Traits::broadcast_of(gradients + i);
    const int64_t pixel = static_cast<int64_t>(pixels[i]) * kLanes;
#pragma GCC unroll 32
    for (int r = 0; r < Runs; ++r) {
      A* run = x[r] + pixel;
#pragma GCC unroll 32
      for (int c = 0; c < Columns; ++c) {
        store(run + c * kLanes, fma(gradient, held[r * Columns + c], Traits::load_from(run + c * kLanes)));
      }
    }
  }
}

// Calls action(PartShape<V, Runs, Columns>()) with the values of `runs` and `columns`; at most `Limit` vectors.
template <class V, int Limit, int Columns = 1, int Runs = 1, class Action>
void with_part(int64_t columns, int64_t runs, const Action& action) {
  if constexpr (Columns <= kMaxColumns) {
    if (columns != Columns) return with_part<V, Limit, Columns + 1, 1>(columns, runs, action);
    if constexpr (Runs <= kMaxRuns && Runs * Columns <= Limit) {
      if (runs != Runs) return with_part<V, Limit, Columns, Runs + 1>(columns, runs, action);
      action(PartShape<V, Runs, Columns>());
    }
  }
}

}  // namespace
}  // namespace pyconv::cpu
