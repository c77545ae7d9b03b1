// Weights for the forward kernels of conv_max_pool2d: (K, Cg, R, S) in any layout -> vectors with lanes along K.
#pragma once

#include "storage_simd.h"
#include "transpose.h"

namespace pyconv::cpu {
namespace {

// Each of the first lanes twice.
#if defined(__AVX512F__)
inline Vec<float> doubled_lanes(Vec<float> x) {
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), x.v)};
}
#elif defined(__AVX2__)
inline Vec<float> doubled_lanes(Vec<float> x) {
  return {_mm256_permutevar8x32_ps(x.v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))};
}
#else
inline Vec<float> doubled_lanes(Vec<float> x) { return x; }
#endif
inline Vec<double> doubled_lanes(Vec<double> x) { return x; }

// Weights of output channels [first_k, first_k + count), count <= kWidth, and input channels [first_c, last_c) of
// their group: vector (c, tap) goes to out + ((c - first_c) * R * S + tap) * out_stride. Lane i is channel
// first_k + i, or first_k + i / 2 with `pairs`; lanes beyond `count` are zero.
template <class T>
void load_weights(const ConvMaxPool2dForwardParams& p, int64_t first_k, int64_t count, int64_t first_c, int64_t last_c,
                  bool pairs, int64_t out_stride, Accumulator<T>* out) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = kWidth<A>;
  const ConvMaxPool2dGeometry& g = p.geometry;
  const Strides4 st = p.weight_strides;
  const int64_t taps = g.R * g.S;
  const T* weight = static_cast<const T*>(p.weight) + first_k * st.n + first_c * st.c;
  // Columns [0, columns) of the channels' rows, which are contiguous; column i goes to `to` + i * step.
  const auto transpose_columns = [&](const T* from, int64_t columns, A* to, int64_t step) {
    for (int64_t first = 0; first < columns; first += kLanes) {
      const int64_t some = min_of(kLanes, columns - first);
      Vec<A> block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = i < count ? load_widened(from + i * st.n + first, some) : zero<A>();
      }
      transpose(block);
      for (int64_t i = 0; i < some; ++i) store(to + (first + i) * step, pairs ? doubled_lanes(block[i]) : block[i]);
    }
  };
  if (st.w == 1 && st.h == g.S && st.c == taps) {
    transpose_columns(weight, (last_c - first_c) * taps, out, out_stride);
  } else if (st.c == 1) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      transpose_columns(weight + tap / g.S * st.h + tap % g.S * st.w, last_c - first_c, out + tap * out_stride,
                        taps * out_stride);
    }
  } else {
    for (int64_t c = 0; c < last_c - first_c; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* from = weight + c * st.c + tap / g.S * st.h + tap % g.S * st.w;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t i = pairs ? lane / 2 : lane;
          out[(c * taps + tap) * out_stride + lane] = i < count ? widen(from[i * st.n]) : A(0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyconv::cpu
