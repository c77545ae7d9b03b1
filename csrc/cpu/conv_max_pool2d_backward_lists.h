// The lists of conv_max_pool2d's backward: of each (n, k) the live windows, as the pixel where the winner's patch
// begins and the gradient before the activation, band of rows after band.
#pragma once

#include "conv_max_pool2d_backward_images.h"
#if defined(__AVX512BF16__)
#include "conv_max_pool2d_backward_products_bfloat16.h"
#endif

namespace pyconv::cpu {
namespace {

// Appends what is not 0 (NaN included) of `count` <= kLanes neighbours, numbered from `first` in steps of `step`.
template <class A>
inline int64_t append_non_zero(const A* from, int64_t count, int64_t first, int64_t step, int32_t* numbers, A* values,
                               int64_t size) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(float)) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 value = _mm512_maskz_loadu_ps(lanes16(count), from);
    const __mmask16 kept = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i number = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                            _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step))));
    const __m512i numbers_kept = _mm512_maskz_compress_epi32(kept, number);
    const __m512 values_kept = _mm512_maskz_compress_ps(kept, value);
    const int more = __builtin_popcount(kept);
    // Seldom more than half: half vectors are stored at twice the speed and seldom cross a cache line.
    if (__builtin_expect(more <= 8, 1)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + size), _mm512_castsi512_si256(numbers_kept));
      _mm256_storeu_ps(values + size, _mm512_castps512_ps256(values_kept));
    } else {
      _mm512_storeu_si512(numbers + size, numbers_kept);
      _mm512_storeu_ps(values + size, values_kept);
    }
    return size + more;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    numbers[size] = static_cast<int32_t>(first + i * step);
    values[size] = from[i];
    size += !(from[i] == A(0));
  }
  return size;
}

template <class Operands>
class WindowLists {
  using T = typename Operands::Storage;
  using A = typename Operands::A;
  static constexpr int64_t kChannels = Operands::kChannels;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  WindowLists(const ConvMaxPool2dBackwardParams& params, const Layout<A>& layout)
      : p_(params), g_(params.geometry), l_(layout) {}

  // To be merged, an origin is a place in the map of one (n, k)'s convolution outputs; else a pixel of a band.
  void make_tables() const {
    const int64_t row = l_.merges ? g_.OW : l_.row_step * l_.columns;
    const int64_t column = l_.merges ? 1 : l_.column_step;
    for (int64_t y = 0; y < g_.pool_h; ++y) {
      for (int64_t x = 0; x < g_.pool_w; ++x) {
        l_.position_pixels[y * g_.pool_w + x] =
            static_cast<int32_t>(y * g_.pool_dilation_h * row + x * g_.pool_dilation_w * column);
      }
    }
    for (int64_t i = 0; i < g_.PH; ++i) {
      const int64_t begin = l_.merges ? 0 : l_.band_begin(g_, i / l_.band_rows);
      for (int64_t j = 0; j < g_.PW; ++j) {
        l_.window_pixels[i * g_.PW + j] = static_cast<int32_t>((i * g_.pool_stride_h - g_.pool_pad_h - begin) * row +
                                                               (j * g_.pool_stride_w - g_.pool_pad_w) * column);
      }
    }
  }

  // The lists of k in [begin, end) of image n, which is `image` of its chunk.
  void make(int64_t n, int64_t image, int64_t begin, int64_t end, int64_t worker) const {
    if (argmax_is_byte(g_)) {
      list_windows<uint8_t>(n, image, begin, end, kNoGradientByte, worker);
    } else {
      list_windows<int32_t>(n, image, begin, end, kNoGradientInt32, worker);
    }
  }

 private:
  template <class Index>
  void list_windows(int64_t n, int64_t image, int64_t begin, int64_t end, Index no_gradient, int64_t worker) const {
    const Strides4 st = p_.output_strides;
    const int64_t base = n * st.n + begin * st.c;
    const Index* argmax = static_cast<const Index*>(p_.argmax) + base;
    const T* grad = static_cast<const T*>(p_.grad_output) + base;
    const T* saved = p_.saved == nullptr ? nullptr : static_cast<const T*>(p_.saved) + base;
    A* gradients = l_.window_gradients + worker * kListTask * l_.list_stride;
    int32_t* positions = l_.window_positions + worker * kListTask * l_.list_stride;
    // Dense and of these two layouts only: the windows of a k are side by side, or the k of a window.
    const bool windows_innermost = st.w == 1 && st.h == g_.PW;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k - begin;
      A* const to = gradients + i * l_.list_stride;
      int32_t* const at = positions + i * l_.list_stride;
      if (windows_innermost) {
        read_windows(argmax + i * st.c, grad + i * st.c, no_gradient, to, at);
      } else if (i % kLanes == 0) {
        read_columns(argmax + i, grad + i, min_of(kLanes, end - k), no_gradient, to, at);
      }
      if (saved != nullptr) {
        const T* from = saved + i * st.c;
        for (int64_t w = 0; w < l_.windows; ++w) {
          to[w] *= activation_derivative(g_.activation, widen(from[w / g_.PW * st.h + w % g_.PW * st.w]));
        }
      }
      make_list(to, at, image, k, worker);
    }
  }

  // Gradients and positions (-1: no gradient) of one k, windows side by side in memory.
  template <class Index>
  void read_windows(const Index* argmax, const T* grad, Index no_gradient, A* gradients, int32_t* positions) const {
    for (int64_t w = 0; w < l_.windows; ++w) {
      positions[w] = argmax[w] == no_gradient ? -1 : static_cast<int32_t>(argmax[w]);
    }
    int64_t w = 0;
    for (; w + kLanes <= l_.windows; w += kLanes) store(gradients + w, load_widened(grad + w));
    for (; w < l_.windows; ++w) gradients[w] = widen(grad[w]);
  }

  // The same of `count` <= kLanes consecutive k, which are side by side in memory.
  template <class Index>
  void read_columns(const Index* argmax, const T* grad, int64_t count, Index no_gradient, A* gradients,
                    int32_t* positions) const {
    const int64_t step = p_.output_strides.w, stride = l_.list_stride;
    for (int64_t first = 0; first < l_.windows; first += kLanes) {
      const int64_t present = min_of(kLanes, l_.windows - first);
      Vec<A> tile[kLanes];
      for (int64_t w = 0; w < kLanes; ++w) {
        tile[w] = w < present ? load_widened(grad + (first + w) * step, count) : zero<A>();
      }
      transpose(tile);
      for (int64_t k = 0; k < count; ++k) store_partial(gradients + k * stride + first, tile[k], present);
      for (int64_t w = 0; w < present; ++w) {
        for (int64_t k = 0; k < count; ++k) {
          const Index position = argmax[(first + w) * step + k];
          positions[k * stride + first + w] = position == no_gradient ? -1 : static_cast<int32_t>(position);
        }
      }
    }
  }

  // The list of one k, whose windows' gradients and positions may be overwritten.
  void make_list(A* gradients, int32_t* positions, int64_t image, int64_t k, int64_t worker) const {
    const int64_t list = image * g_.K + k;
    int32_t* const pixels = l_.pixels + list * l_.list_stride;
    A* const values = l_.gradients + list * l_.list_stride;
    int64_t* const ends = l_.list_ends + list * (l_.bands + 1);
    ends[0] = 0;
    if (!l_.merges) {
      double bias = 0;
      int64_t size = 0;
      for (int64_t band = 0; band < l_.bands; ++band) {
        const int64_t begin = band * l_.band_rows * g_.PW;
        const int64_t end = min_of(l_.windows, begin + l_.band_rows * g_.PW);
        size = append_live(gradients, positions, begin, end, pixels, values, size, bias);
        ends[band + 1] = size;
      }
      l_.bias_parts[list] = bias;
      return;
    }
    A* const outputs = l_.outputs + worker * l_.outputs_stride(g_);
    clear(outputs, g_.OH * g_.OW);
    double bias = 0;
    const int64_t live = append_live(gradients, positions, 0, l_.windows, positions, gradients, 0, bias);
    // Neighbours often share a winner. Far apart they do not wait for each other's sum.
    constexpr int64_t kStreams = 8;
    const int64_t length = live / kStreams;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t j = 0; j < kStreams; ++j) outputs[positions[j * length + i]] += gradients[j * length + i];
    }
    for (int64_t i = kStreams * length; i < live; ++i) outputs[positions[i]] += gradients[i];
    l_.bias_parts[list] = bias;
    int64_t size = 0;
    for (int64_t band = 0; band < l_.bands; ++band) {
      const int64_t begin = l_.band_begin(g_, band), end = l_.band_end(g_, band);
      for (int64_t oh = begin; oh < end; ++oh) {
        const int64_t pixel = (oh - begin) * l_.row_step * l_.columns;
        for (int64_t ow = 0; ow < g_.OW; ow += kLanes) {
          size = append_non_zero(outputs + oh * g_.OW + ow, min_of(kLanes, g_.OW - ow), pixel + ow * l_.column_step,
                                 l_.column_step, pixels, values, size);
        }
      }
      if constexpr (kChannels > 1) size = split_sums(pixels, values, ends[band], size);
      ends[band + 1] = size;
    }
  }

  // Appends the live windows of [begin, end) to a list of `size`, which may be the same arrays; its new size.
  int64_t append_live(const A* gradients, const int32_t* positions, int64_t begin, int64_t end, int32_t* pixels,
                      A* values, int64_t size, double& bias) const {
    int64_t w = begin;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == sizeof(float)) {
      const bool small_window = g_.pool_h * g_.pool_w <= 16;
      const __m512i shifts = _mm512_loadu_si512(l_.position_pixels);
      __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
      for (; w < end; w += 16) {
        const __mmask16 present = lanes16(end - w);
        const __m512i position = _mm512_maskz_loadu_epi32(present, positions + w);
        const __mmask16 live = _mm512_mask_cmpge_epi32_mask(present, position, _mm512_setzero_si512());
        const __m512i shift =
            small_window ? _mm512_permutexvar_epi32(position, shifts)
                         : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, position, l_.position_pixels, 4);
        const __m512i pixel = _mm512_add_epi32(shift, _mm512_maskz_loadu_epi32(present, l_.window_pixels + w));
        const __m512 gradient = _mm512_maskz_loadu_ps(live, gradients + w);
        _mm512_storeu_si512(pixels + size, _mm512_maskz_compress_epi32(live, pixel));
        _mm512_storeu_ps(values + size, _mm512_maskz_compress_ps(live, gradient));
        size += __builtin_popcount(live);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(gradient)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(gradient, 1)));
      }
      bias += _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
#endif
    for (; w < end; ++w) {
      // Whether a window is live is as good as random: written always, kept if live, it costs no mispredictions.
      const bool live = positions[w] >= 0;
      pixels[size] = l_.window_pixels[w] + l_.position_pixels[live ? positions[w] : 0];
      values[size] = gradients[w];
      size += live;
      bias += live ? static_cast<double>(gradients[w]) : 0.0;
    }
    return size;
  }

  const ConvMaxPool2dBackwardParams& p_;
  const ConvMaxPool2dGeometry& g_;
  const Layout<A>& l_;
};

}  // namespace
}  // namespace pyconv::cpu
