// The sparse backward of conv_max_pool2d, for any way to hold the operands (operands.h).
//
// Only one position of each window carries a gradient, so both products are sums over the live windows alone:
//
//   grad_output, argmax (N,K,PH,PW) -> per (n, k) a list of (pixel where a patch begins, gradient before activation)
//   grad_weight[k]      += gradient * patch of x, over the list of k   (a patch, a row of weights: taps x channels)
//   patch of grad_input += sum of gradient * weight[k], over the windows of all k that share the pixel
//
// Where windows overlap, those that share a winner become one entry if that pays. Images are taken in chunks: a first
// pass makes their lists and planes (conv_max_pool2d_backward_layout.h says what a plane is), a second one runs two
// kinds of tasks, grad_input of an image and grad_weight of a range of k over some of the images: a partial, of which
// there are as many as the shape says. A row of a partial is summed by one task after the other, span of images after
// span, and every grad_input image by one task, so results do not depend on the number of threads or on the chunking.
#pragma once

#include "conv_max_pool2d_backward_images.h"
#if defined(__AVX512BF16__)
#include "conv_max_pool2d_backward_products_bfloat16.h"
#endif

namespace pyconv::cpu {
namespace {

// The vectors of a part.
template <class Operands, bool Half>
struct PartVectorOf {
  using type = Vec<typename Operands::A>;
};
#if defined(__AVX512F__)
template <class T>
struct PartVectorOf<WidenedOperands<T>, true> {
  using type = HalfVec;
};
template <>
struct PartVectorOf<WidenedOperands<double>, true> {
  using type = Vec<double>;
};
#endif
#if defined(__AVX512BF16__)
template <bool Half>
struct PartVectorOf<BFloat16Pairs, Half> {
  using type = PairVec<Half>;
};
#endif

// Calls action(PartShape<V, Runs, Columns>()) with what the part has.
template <class Operands, int Limit, class Action>
void with_part(const Part& part, const Action& action) {
  if (kHalfWidth<typename Operands::A> > 0 && part.half) {
    with_part<typename PartVectorOf<Operands, true>::type, Limit>(part.columns, part.runs, action);
  } else {
    with_part<typename PartVectorOf<Operands, false>::type, Limit>(part.columns, part.runs, action);
  }
}

template <class Operands>
class SparseBackward {
  using T = typename Operands::Storage;
  using A = typename Operands::A;
  static constexpr int64_t kChannels = Operands::kChannels;
  static constexpr int64_t kLanes = kWidth<A>;
  static constexpr int kMostVectors = kMaxVectors / static_cast<int>(kChannels);

 public:
  explicit SparseBackward(const ConvMaxPool2dBackwardParams& params)
      : p_(params), g_(params.geometry), l_(params, params.workspace, kChannels), images_(l_, g_) {}

  void run() {
    make_tables();
    if (!(taps_innermost(p_.weight_strides) || channels_innermost(p_.weight_strides)) ||
        !(taps_innermost(p_.grad_weight_strides) || channels_innermost(p_.grad_weight_strides))) {
      make_weight_tables();
    }
    if (p_.grad_input != nullptr && !l_.scatters) clear(l_.map, l_.workers * l_.map_elements);
    for (int64_t k = 0; k < g_.K; ++k) l_.bias_sums[k] = 0;
    l_.weight_copies.clear(l_.weights_packed);
    for (int64_t first = 0; first < g_.N; first += l_.images) {
      const int64_t count = min_of(l_.images, g_.N - first);
      run_chunk(first, count);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < g_.K; ++k) l_.bias_sums[k] += l_.bias_parts[i * g_.K + k];
      }
    }
    if (p_.grad_bias != nullptr) {
      for (int64_t k = 0; k < g_.K; ++k) {
        static_cast<T*>(p_.grad_bias)[k] = narrow<T>(static_cast<A>(l_.bias_sums[k]));
      }
    }
  }

 private:
  // Images first .. first + count: planes and lists, and before the first ones the weights; then the products.
  void run_chunk(int64_t first, int64_t count) const {
    const bool last = first + count == g_.N;
    const int64_t row_tasks = ceil_div(g_.K, kRowTask);
    order_images(count);
    const auto pack = [&](int64_t task, int64_t worker) {
      const int64_t end = min_of(g_.K, (task + 1) * kRowTask);
      A* const buffer = l_.row_buffer + worker * l_.row_buffer_elements;
      for (int64_t k = task * kRowTask; k < end; ++k) pack_weights(k, weights_of(worker), buffer);
    };
    const auto unfold_image = [&](int64_t task, int64_t worker) {
      unfold(first, l_.order[task / g_.groups], task % g_.groups, worker);
    };
    const auto list_image = [&](int64_t task, int64_t worker) {
      const int64_t of_image = g_.groups * l_.list_tasks;
      list(first, l_.order[task / of_image], task % of_image, worker);
    };
    const auto image_gradient = [&](int64_t task, int64_t worker) {
      l_.weight_copies.make_once(l_.weights_packed, worker, [&] {
        for (int64_t i = 0; i < row_tasks; ++i) pack(i, worker);
      });
      const int64_t image = l_.order[task / l_.splits / g_.groups];
      grad_input(first + image, image, task / l_.splits % g_.groups, task % l_.splits, worker);
    };
    const auto weight_gradient = [&](int64_t task, int64_t) {
      const int64_t of_partial = g_.groups * l_.ranges;
      grad_weight(first, count, task / of_partial, task % of_partial / l_.ranges, task % l_.ranges);
    };
    const auto add_partials = [&](int64_t task, int64_t) {
      const int64_t end = min_of(g_.K, (task + 1) * kRowTask);
      for (int64_t k = task * kRowTask; k < end; ++k) {
        add_rows(k);
        write_row(k);
      }
    };
    const bool weights = p_.grad_weight != nullptr, inputs = p_.grad_input != nullptr;
    const bool pack_together = inputs && first == 0 && !l_.weight_copies.own();
    parallel_steps(p_.threads, l_.workers, Tasks{pack_together ? row_tasks : 0, pack},
                   Tasks{weights ? count * g_.groups : 0, unfold_image},
                   Tasks{count * g_.groups * l_.list_tasks, list_image}, Barrier(),
                   Tasks{count * g_.groups * l_.splits, image_gradient},
                   Tasks{weights ? l_.partials * g_.groups * l_.ranges : 0, weight_gradient}, Barrier(),
                   Tasks{weights && last ? row_tasks : 0, add_partials});
  }

  // A thread that begins with its share of the images finds most of what its share of the partials needs in its cache.
  void order_images(int64_t count) const {
    int32_t* to = l_.order;
    for (int64_t partial = 0; partial < l_.partials; ++partial) {
      for_each_share(count, partial, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) *to++ = static_cast<int32_t>(image);
      });
    }
  }

  // action(begin, end) for the images of a partial in each block of a chunk.
  template <class Action>
  void for_each_share(int64_t count, int64_t partial, const Action& action) const {
    for (int64_t block = 0; block < count; block += l_.block) {
      const int64_t images = min_of(l_.block, count - block);
      action(block + l_.partial_begin(images, partial), block + l_.partial_begin(images, partial + 1));
    }
  }

  // To be merged, an origin is a place in the map of one (n, k)'s convolution outputs; else a pixel of a band.
  void make_tables() {
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

  // ---- weights ---------------------------------------------------------------------------------------------

  // A row (Cg, R, S) of weights that can be moved by whole vectors: taps innermost, or channels innermost.
  bool taps_innermost(const Strides4& st) const {
    return l_.unfolding == Unfolding::plain && st.w == 1 && st.h == g_.S && (l_.Cg == 1 || st.c == l_.taps);
  }
  bool channels_innermost(const Strides4& st) const { return l_.unfolding == Unfolding::plain && st.c == 1; }
  // Else single elements are gathered, by tables of where they are: in a row of weights in memory (or, where that has
  // gaps, in (Cg, R, S)), its end for lanes that hold none; and in a row of sums.
  bool row_is_dense(const Strides4& st) const {
    return (l_.Cg - 1) * st.c + (g_.R - 1) * st.h + (g_.S - 1) * st.w == l_.Cg * g_.R * g_.S - 1;
  }
  int64_t element_of(const Strides4& st, int64_t c, int64_t r, int64_t s) const {
    return row_is_dense(st) ? c * st.c + r * st.h + s * st.w : (c * g_.R + r) * g_.S + s;
  }
  void make_weight_tables() {
    if (p_.grad_input != nullptr) {
      const int64_t count = l_.planes * l_.taps * kLanes;
      for (int64_t i = 0; i < count; ++i) l_.weight_elements[i] = static_cast<int32_t>(l_.Cg * g_.R * g_.S);
      l_.for_each_element(g_, [&](int64_t plane, int64_t tap, int64_t lane, int64_t c, int64_t r, int64_t s) {
        l_.weight_elements[(plane * l_.taps + tap) * kLanes + lane] =
            static_cast<int32_t>(element_of(p_.weight_strides, c, r, s));
      });
    }
    if (p_.grad_weight != nullptr) {
      l_.for_each_element(g_, [&](int64_t plane, int64_t tap, int64_t lane, int64_t c, int64_t r, int64_t s) {
        l_.sum_elements[element_of(p_.grad_weight_strides, c, r, s)] =
            static_cast<int32_t>(l_.weight_parts.places[plane * l_.taps + tap] + lane);
      });
    }
  }

  A* weights_of(int64_t worker) const {
    return l_.weights + l_.weight_copies.of(worker) * g_.K * l_.row_elements;
  }

  // Row k of weight -> its vectors, of which lanes beyond the channels hold anything.
  void pack_weights(int64_t k, A* weights, A* buffer) const {
    const Strides4 st = p_.weight_strides;
    const Parts& parts = l_.input_parts;
    const T* source = static_cast<const T*>(p_.weight) + k * st.n;
    const auto place = [&](int64_t plane, int64_t tap) {
      const int64_t i = plane * l_.taps + tap;
      return weights + parts.places[i] + k * parts.steps[i];
    };
    if (taps_innermost(st) || channels_innermost(st)) {
      for (int64_t plane = 0; plane < l_.planes; ++plane) {
        const int64_t lanes = l_.plane_lanes(plane), channels = l_.Cg - plane * kLanes * kChannels;
        const T* from = source + plane * kLanes * kChannels * st.c;
        for (int64_t tap = 0; tap < l_.taps; tap += kLanes) {
          const int64_t count = min_of(kLanes, l_.taps - tap);
          Vec<A> tile[kLanes];
          if (channels_innermost(st)) {
            for (int64_t i = 0; i < count; ++i) {
              const int64_t r = (tap + i) / g_.S, s = (tap + i) % g_.S;
              tile[i] = Operands::load_pixel(from + r * st.h + s * st.w, channels);
            }
          } else {
            for (int64_t i = 0; i < kLanes; ++i) {
              const int64_t c = i * kChannels;
              tile[i] = c < channels ? Operands::load_row(from + c * st.c + tap, st.c, channels - c, count) : zero<A>();
            }
            transpose(tile);
          }
          for (int64_t i = 0; i < count; ++i) store_pixel(place(plane, tap + i), tile[i], lanes);
        }
      }
      return;
    }
    const int64_t row = l_.Cg * g_.R * g_.S;
    if (row_is_dense(st)) {
      for (int64_t i = 0; i < row; ++i) buffer[i] = widen(source[i]);
    } else {
      A* to = buffer;
      for (int64_t c = 0; c < l_.Cg; ++c) {
        for (int64_t r = 0; r < g_.R; ++r) {
          for (int64_t s = 0; s < g_.S; ++s) *to++ = widen(source[c * st.c + r * st.h + s * st.w]);
        }
      }
    }
    buffer[row] = A(0);
    const int32_t* from = l_.weight_elements;
    for (int64_t plane = 0; plane < l_.planes; ++plane) {
      for (int64_t tap = 0; tap < l_.taps; ++tap, from += kLanes) {
        store_pixel(place(plane, tap), gather(buffer, from), l_.plane_lanes(plane));
      }
    }
  }

  // Sums of row k -> grad_weight.
  void write_row(int64_t k) const {
    const Strides4 st = p_.grad_weight_strides;
    const Parts& parts = l_.weight_parts;
    T* target = static_cast<T*>(p_.grad_weight) + k * st.n;
    const auto place = [&](int64_t plane, int64_t tap) {
      const int64_t i = plane * l_.taps + tap;
      return l_.weight_sums + (parts.places[i] + k * parts.steps[i]) * kChannels;
    };
    if (taps_innermost(st) || channels_innermost(st)) {
      for (int64_t plane = 0; plane < l_.planes; ++plane) {
        const int64_t lanes = l_.plane_lanes(plane);
        const int64_t channels = min_of(lanes * kChannels, l_.Cg - plane * kLanes * kChannels);
        T* to = target + plane * kLanes * kChannels * st.c;
        for (int64_t tap = 0; tap < l_.taps; tap += kLanes) {
          const int64_t count = min_of(kLanes, l_.taps - tap);
          if (channels_innermost(st)) {
            for (int64_t i = 0; i < count; ++i) {
              const int64_t r = (tap + i) / g_.S, s = (tap + i) % g_.S;
              Vec<A> sums[kChannels];
              for (int64_t c = 0; c < kChannels; ++c) sums[c] = load_partial(place(plane, tap + i) + c * lanes, lanes);
              store_channels(to + r * st.h + s * st.w, sums, channels);
            }
            continue;
          }
          for (int64_t c = 0; c < min_of(kChannels, channels); ++c) {
            Vec<A> tile[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
              tile[i] = i < count ? load_partial(place(plane, tap + i) + c * lanes, lanes) : zero<A>();
            }
            transpose(tile);
            for (int64_t i = 0; c + i * kChannels < channels; ++i) {
              store_narrowed(to + (c + i * kChannels) * st.c + tap, tile[i], count);
            }
          }
        }
      }
      return;
    }
    const A* sums = l_.weight_sums + k * l_.row_elements;
    const int32_t* from = l_.sum_elements;
    if (row_is_dense(st)) {
      const int64_t row = l_.Cg * g_.R * g_.S;
      int64_t i = 0;
      for (; i + kLanes <= row; i += kLanes) store_narrowed(target + i, gather(sums, from + i));
      for (; i < row; ++i) target[i] = narrow<T>(sums[from[i]]);
      return;
    }
    for (int64_t c = 0; c < l_.Cg; ++c) {
      for (int64_t r = 0; r < g_.R; ++r) {
        for (int64_t s = 0; s < g_.S; ++s) target[c * st.c + r * st.h + s * st.w] = narrow<T>(sums[*from++]);
      }
    }
  }

  // ---- lists -----------------------------------------------------------------------------------------------

  // Planes of one image of a chunk and one group.
  void unfold(int64_t first, int64_t image, int64_t group, int64_t worker) const {
    const Strides4 st = p_.input_strides;
    images_.unfold(static_cast<const T*>(p_.input) + (first + image) * st.n + group * l_.Cg * st.c, st,
                   l_.packed_input + (image * g_.groups + group) * l_.image_elements,
                   l_.row_buffer + worker * l_.row_buffer_elements);
  }

  // Lists of some k of one image of a chunk.
  void list(int64_t first, int64_t image, int64_t task, int64_t worker) const {
    const int64_t group = task / l_.list_tasks, part = task % l_.list_tasks;
    const int64_t begin = group * l_.Kg + part * kListTask;
    const int64_t end = min_of(begin + kListTask, (group + 1) * l_.Kg);
    if (argmax_is_byte(g_)) {
      list_windows<uint8_t>(first + image, image, begin, end, kNoGradientByte, worker);
    } else {
      list_windows<int32_t>(first + image, image, begin, end, kNoGradientInt32, worker);
    }
  }

  // The lists of k in [begin, end).
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

  // Appends what is not 0 (NaN included) of `count` <= kLanes neighbours, numbered from `first` in steps of `step`.
  static int64_t append_non_zero(const A* from, int64_t count, int64_t first, int64_t step, int32_t* numbers, A* values,
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

  // ---- products --------------------------------------------------------------------------------------------

  // Elements from the first plane of a part's width to the first pixel of a band.
  int64_t band_offset(const Part& part, int64_t band) const {
    const int64_t pixel = l_.band_begin(g_, band) * l_.row_step * l_.columns;
    return part.half ? l_.plane_offset(l_.full_planes) + pixel * kHalfWidth<A> : pixel * kLanes;
  }

  // A range of k of a partial, over its images of a chunk.
  void grad_weight(int64_t first, int64_t count, int64_t partial, int64_t group, int64_t range) const {
    const int64_t first_k = group * l_.Kg + range * l_.range;
    const int64_t last_k = min_of(first_k + l_.range, (group + 1) * l_.Kg);
    // A chunk's first block is a full one, which has images for every partial.
    bool nothing_yet = first == 0;
    for_each_share(count, partial, [&](int64_t begin, int64_t end) {
      const int64_t spans = ceil_div(end - begin, l_.span);
      for (int64_t i = 0; i < spans; ++i) {
        const int64_t image = begin + (end - begin) * i / spans;
        add_span(image, begin + (end - begin) * (i + 1) / spans - image, nothing_yet, group, first_k, last_k,
                 partial_row(partial, 0));
        nothing_yet = false;
      }
    });
  }

  // sums of [first_k, last_k) += (= if they hold nothing yet) products of a span of images.
  void add_span(int64_t image, int64_t images, bool nothing_yet, int64_t group, int64_t first_k, int64_t last_k,
                A* sums) const {
    WindowSpan<A> span{};
    span.images = images;
    span.list_stride = g_.K * l_.list_stride;
    span.ends_stride = g_.K * (l_.bands + 1);
    span.image_stride = g_.groups * l_.image_elements;
    const A* planes = l_.packed_input + (image * g_.groups + group) * l_.image_elements;
    for (int64_t i = 0; i < l_.weight_parts.count; ++i) {
      const Part& part = l_.weight_parts.list[i];
      with_part<Operands, kMostVectors>(part, [&](auto shape) {
        for (int64_t band = 0; band < l_.bands; ++band) {
          span.x = planes + band_offset(part, band);
          span.first = nothing_yet && band == 0;
          for (int64_t k = first_k; k < last_k; ++k) {
            const int64_t list = image * g_.K + k;
            span.pixels = l_.pixels + list * l_.list_stride;
            span.gradients = l_.gradients + list * l_.list_stride;
            span.begins = l_.list_ends + list * (l_.bands + 1) + band;
            accumulate_weights(shape, span, part.offsets, sums + (part.first + k * part.step) * kChannels);
          }
        }
      });
    }
  }

  A* partial_row(int64_t partial, int64_t k) const {
    return l_.weight_sums + (partial * g_.K + k) * l_.row_elements * kChannels;
  }

  // Row k of all partials -> of the first.
  void add_rows(int64_t k) const {
    A* const sums = partial_row(0, k);
    for (int64_t partial = 1; partial < l_.partials; ++partial) {
      const A* const more = partial_row(partial, k);
      for (int64_t i = 0; i < l_.row_elements * kChannels; ++i) sums[i] += more[i];
    }
  }

  // The shares of a block of k in a band's pixels, k (from the block's first on) ascending within one; how many pixels
  // have any.
  int64_t sort_band(int64_t image, int64_t first_k, int64_t k_count, int64_t band, int64_t worker) const {
    A* const map = l_.map + worker * l_.map_elements;
    Patch* const patches = l_.patches + worker * (l_.band_pixels + 1);
    int32_t* const ks = l_.share_ks + worker * l_.shares;
    A* const gradients = l_.share_gradients + worker * l_.shares;
    for (int64_t k = 0; k < k_count; ++k) {
      const int64_t list = image * g_.K + first_k + k;
      const int32_t* pixels = l_.pixels + list * l_.list_stride;
      const A* values = l_.gradients + list * l_.list_stride;
      const int64_t* ends = l_.list_ends + list * (l_.bands + 1);
      for (int64_t i = ends[band]; i < ends[band + 1]; ++i) {
        A& share = map[pixels[i] * l_.k_block + k];
        share = kChannels == 1 ? values[i] : share + values[i];  // of which there can be pieces
      }
    }
    const int64_t begin = l_.band_begin(g_, band), end = l_.band_end(g_, band);
    int64_t size = 0;
    Patch* patch = patches;
    for (int64_t oh = begin; oh < end; ++oh) {
      for (int64_t ow = 0; ow < g_.OW; ++ow) {
        const int64_t pixel = (oh - begin) * l_.row_step * l_.columns + ow * l_.column_step;
        A* const row = map + pixel * l_.k_block;
        const int64_t before = size;
        for (int64_t k = 0; k < k_count; k += kLanes) {
          size = append_non_zero(row + k, kLanes, k, 1, ks, gradients, size);
          store(row + k, zero<A>());
        }
        if constexpr (kChannels > 1) {
          if (l_.merges) size = split_sums(ks, gradients, before, size);
        }
        *patch = {pixel, size};
        patch += size > before;
      }
    }
    patch->pixel = -1;
    return patch - patches;
  }

  // planes += weights of a block of k, pixel by pixel, for the parts of a split.
  void gather_band(int64_t image, int64_t group, int64_t band, int64_t block, int64_t split, A* planes,
                   int64_t worker) const {
    const int64_t first_k = group * l_.Kg + block * l_.k_block;
    const int64_t k_count = min_of(l_.k_block, l_.Kg - block * l_.k_block);
    const int64_t count = sort_band(image, first_k, k_count, band, worker);
    const Patch* patches = l_.patches + worker * (l_.band_pixels + 1);
    for (int64_t i = 0; i < l_.input_parts.count; ++i) {
      const Part& part = l_.input_parts.list[i];
      if (part.split != split) continue;
      with_part<Operands, kMostVectors>(part, [&](auto shape) {
        accumulate_patches(shape, patches, patches + count, l_.share_ks + worker * l_.shares,
                           l_.share_gradients + worker * l_.shares,
                           weights_of(worker) + part.first + first_k * part.step,
                           part.offsets, planes + band_offset(part, band) * kChannels);
      });
    }
  }

  // planes += weights, window by window. Only one split of the channels.
  void scatter_band(int64_t image, int64_t group, int64_t band, A* planes, int64_t worker) const {
    if constexpr (kChannels == 1) {
      for (int64_t i = 0; i < l_.input_parts.count; ++i) {
        const Part& part = l_.input_parts.list[i];
        with_part<Operands, kMaxHeldVectors>(part, [&](auto shape) {
          for (int64_t k = group * l_.Kg; k < (group + 1) * l_.Kg; ++k) {
            const int64_t list = image * g_.K + k;
            const int64_t* ends = l_.list_ends + list * (l_.bands + 1) + band;
            scatter_weights(shape, l_.pixels + list * l_.list_stride, l_.gradients + list * l_.list_stride, ends[0],
                            ends[1], weights_of(worker) + part.first + k * part.step, part.offsets,
                            planes + band_offset(part, band));
          }
        });
      }
    }
  }

  bool gradients_are_finite(int64_t image, int64_t group) const {
    for (int64_t k = group * l_.Kg; k < (group + 1) * l_.Kg; ++k) {
      if (!std::isfinite(l_.bias_parts[image * g_.K + k])) return false;
    }
    return true;
  }

  // planes += weights, tap by tap. Blocks pad the filter with zeros, which times infinity or NaN would spread NaN to
  // pixels that the filter does not reach.
  void scatter_taps(int64_t image, int64_t group, int64_t band, A* planes) const {
    const Strides4 st = p_.weight_strides;
    const int64_t begin = l_.band_begin(g_, band) * l_.row_step * l_.columns;
    for (int64_t k = group * l_.Kg; k < (group + 1) * l_.Kg; ++k) {
      const int64_t list = image * g_.K + k;
      const int64_t* ends = l_.list_ends + list * (l_.bands + 1) + band;
      const T* weight = static_cast<const T*>(p_.weight) + k * st.n;
      for (int64_t i = ends[0]; i < ends[1]; ++i) {
        const A gradient = l_.gradients[list * l_.list_stride + i];
        const int64_t first = begin + l_.pixels[list * l_.list_stride + i];
        l_.for_each_element(g_, [&](int64_t plane, int64_t tap, int64_t lane, int64_t c, int64_t r, int64_t s) {
          const int64_t pixel = first + tap / l_.tap_columns * l_.columns + tap % l_.tap_columns;
          A& sum = planes[l_.plane_offset(plane) + pixel * l_.plane_lanes(plane) + lane];
          sum += gradient * widen(weight[c * st.c + r * st.h + s * st.w]);
        });
      }
    }
  }

  void grad_input(int64_t n, int64_t image, int64_t group, int64_t split, int64_t worker) const {
    A* const planes = l_.grad_images + worker * l_.image_elements * kChannels;
    const int64_t first_plane = l_.planes * split / l_.splits, last_plane = l_.planes * (split + 1) / l_.splits;
    const int64_t first_element = l_.plane_offset(first_plane);
    clear(planes + first_element * kChannels,
          ((last_plane == l_.planes ? l_.image_elements : l_.plane_offset(last_plane)) - first_element) * kChannels);
    // Elements of several channels never come in blocks.
    const bool padded_filter = l_.unfolding == Unfolding::blocks && !gradients_are_finite(image, group);
    for (int64_t band = 0; band < l_.bands; ++band) {
      if (padded_filter) {
        scatter_taps(image, group, band, planes);
      } else if (l_.scatters) {
        scatter_band(image, group, band, planes, worker);
      } else {
        for (int64_t block = 0; block < l_.k_blocks; ++block) {
          gather_band(image, group, band, block, split, planes, worker);
        }
      }
    }
    const Strides4 st = p_.grad_input_strides;
    images_.fold(planes, first_plane, last_plane, static_cast<T*>(p_.grad_input) + n * st.n + group * l_.Cg * st.c, st,
                 l_.row_buffer + worker * l_.row_buffer_elements);
  }

  const ConvMaxPool2dBackwardParams& p_;
  const ConvMaxPool2dGeometry& g_;
  const Layout<A> l_;
  const Images<Operands> images_;
};

}  // namespace
}  // namespace pyconv::cpu
