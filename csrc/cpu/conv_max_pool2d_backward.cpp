// Backward of conv_max_pool2d. Compiled once per ISA.
//
// Only one position of each window carries a gradient, so both products are sums over the live windows alone:
//
//   grad_output, argmax (N,K,PH,PW) -> per (n, k) a list of (gradient before the activation, pixel where its patch begins)
//   grad_weight[k]     += gradient * patch of x, over the list of k   (a patch and a row of weights are R x S x Cg)
//   patch of grad_input += sum of gradient * weight[k], over the windows of all k that share the pixel
//
// Patches are read and written in channels-last scratch images, zero-padded, in the accumulator type, so that S * Cg
// neighbours (Cg where dilated) are one run of vectors; sums stay in registers while a list is walked. Images are taken
// in chunks: a first pass makes their lists and scratch images, a second one runs two kinds of tasks, grad_input of an
// image and grad_weight of a range of k. Every grad_weight row is summed by one task, span of images after span, and
// every grad_input image by one task, so results do not depend on the number of threads or on the chunking.
#include "conv_max_pool2d_backward_layout.h"
#include "isa_kernels.h"
#include "simd.h"

namespace pyconv::cpu {
namespace {

// The windows of one k in consecutive images, and the scratch images their patches lie in.
template <class A>
struct WindowSpan {
  const Window<A>* lists;  // of the first image
  const int64_t* ends;     // end of the band in each list
  const int64_t* begins;   // end of the band before; null for the first band
  const A* x;
  int64_t images, list_stride, end_stride, image_stride, pixel_stride;
};

// sums[i] += sum over windows of gradient * x[patch vector i], V vectors.
template <class A, int V>
void accumulate_weights(const WindowSpan<A>& span, const PatchVector* patch, A* sums) {
  constexpr int kChains = V <= 5 ? 2 : 1;  // enough independent sums to hide the latency of the multiply-add
  Vec<A> acc[kChains][V];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) acc[c][i] = zero<A>();
  }
  int64_t offsets[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) offsets[i] = patch[i].offset;
  for (int64_t image = 0; image < span.images; ++image) {
    const Window<A>* list = span.lists + image * span.list_stride;
    const Window<A>* window = list + (span.begins == nullptr ? 0 : span.begins[image * span.end_stride]);
    const Window<A>* const end = list + span.ends[image * span.end_stride];
    const A* x = span.x + image * span.image_stride;
    for (; window + kChains <= end; window += kChains) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) {
        const Vec<A> gradient = broadcast(window[c].gradient);
        const A* from = x + window[c].pixel * span.pixel_stride;
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) acc[c][i] = fma(gradient, load(from + offsets[i]), acc[c][i]);
      }
    }
    for (; window < end; ++window) {
      const Vec<A> gradient = broadcast(window->gradient);
      const A* from = x + window->pixel * span.pixel_stride;
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) acc[0][i] = fma(gradient, load(from + offsets[i]), acc[0][i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    if constexpr (kChains == 2) acc[0][i] = add(acc[0][i], acc[1][i]);
    A* sum = sums + i * kWidth<A>;
    store(sum, add(load(sum), acc[0][i]));
  }
}

// patch vectors [0, V) of target += sum over shares of gradient * weights.
template <class A, int V>
void accumulate_patch(const Share<A>* begin, const Share<A>* end, const A* weights, const PatchVector* patch,
                      A* target) {
  Vec<A> acc[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) acc[i] = zero<A>();
  for (const Share<A>* share = begin; share < end; ++share) {
    const Vec<A> gradient = broadcast(share->gradient);
    const A* from = weights + share->weights;
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) acc[i] = fma(gradient, load(from + i * kWidth<A>), acc[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    A* to = target + patch[i].offset;
    const Vec<A> old = load(to);
    Vec<A> sum = add(old, acc[i]);
    // Lanes beyond the run belong to other pixels: there even gradient * 0 could make a NaN.
    if (patch[i].lanes < kWidth<A>) sum = select(first_lanes<A>(patch[i].lanes), sum, old);
    store(to, sum);
  }
}

template <class A, int V>
void accumulate_patches(const Patch* begin, const Patch* end, const Share<A>* shares, const A* weights,
                        const PatchVector* patch, int64_t pixel_stride, A* image) {
  int64_t first = 0;
  for (const Patch* p = begin; p < end; ++p) {
    accumulate_patch<A, V>(shares + first, shares + p->end, weights, patch, image + p->pixel * pixel_stride);
    first = p->end;
  }
}

// Calls action<V>(first vector) for parts of at most kMaxRegisters of `vectors`, as even as possible.
template <class Action>
void in_register_parts(int64_t vectors, const Action& action) {
  const int64_t parts = ceil_div(vectors, kMaxRegisters);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
    switch (count) {
      case 1:
        action.template operator()<1>(first);
        break;
      case 2:
        action.template operator()<2>(first);
        break;
      case 3:
        action.template operator()<3>(first);
        break;
      case 4:
        action.template operator()<4>(first);
        break;
      case 5:
        action.template operator()<5>(first);
        break;
      case 6:
        action.template operator()<6>(first);
        break;
      case 7:
        action.template operator()<7>(first);
        break;
      default:
        action.template operator()<kMaxRegisters>(first);
    }
  }
}

template <class A>
struct WeightPart {
  const WindowSpan<A>& span;
  const PatchVector* patch;
  A* sums;
  template <int V>
  void operator()(int64_t first) const {
    accumulate_weights<A, V>(span, patch + first, sums + first * kWidth<A>);
  }
};

template <class A>
struct PatchPart {
  const Patch *begin, *end;
  const Share<A>* shares;
  const ChannelBlock<A>& block;
  A* image;
  template <int V>
  void operator()(int64_t first) const {
    accumulate_patches<A, V>(begin, end, shares, block.weights + first * kWidth<A>, block.patch + first, block.count,
                             image);
  }
};

#if defined(__AVX512F__)
// Appends the live ones of `count` <= 8 windows side by side, the first of which has its first patch at `first_pixel`.
// Always writes 8 entries; lists have room for that.
inline Window<float>* append_live(const uint8_t* argmax, const float* gradients, int64_t count, int64_t first_pixel,
                                  int64_t pixel_step, const int64_t* position_pixels, bool small_window,
                                  Window<float>* end, __m512d& bias) {
  const __mmask8 present = lanes8(count);
  const __m128i bytes = _mm_mask_loadu_epi8(_mm_set1_epi8(static_cast<char>(kNoGradientByte)), present, argmax);
  const __m256 gradient = _mm256_maskz_loadu_ps(present, gradients);
  const __m512i position = _mm512_cvtepu8_epi64(bytes);
  const __mmask8 live = _mm512_cmpneq_epi64_mask(position, _mm512_set1_epi64(kNoGradientByte));
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i base = _mm512_add_epi64(_mm512_set1_epi64(first_pixel),
                                        _mm512_mullo_epi64(lane, _mm512_set1_epi64(pixel_step)));
  const __m512i shift = small_window
                            ? _mm512_permutexvar_epi64(position, _mm512_loadu_si512(position_pixels))
                            : _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), live, position, position_pixels, 8);
  const __m512i pixel = _mm512_maskz_compress_epi64(live, _mm512_add_epi64(base, shift));
  const __m512i value =
      _mm512_cvtepu32_epi64(_mm256_castps_si256(_mm256_maskz_compress_ps(live, gradient)));
  static_assert(sizeof(Window<float>) == 16, "a window is two 64-bit words");
  _mm512_storeu_si512(end, _mm512_permutex2var_epi64(pixel, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), value));
  _mm512_storeu_si512(end + 4, _mm512_permutex2var_epi64(pixel, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), value));
  bias = _mm512_mask_add_pd(bias, live, bias, _mm512_cvtps_pd(gradient));
  return end + __builtin_popcount(live);
}
#endif

template <class T>
class Backward {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  explicit Backward(const ConvMaxPool2dBackwardParams& params)
      : p_(params), g_(params.geometry), layout_(params, params.workspace) {}

  void run() {
    layout_.patch_vectors(g_, layout_.Cg, layout_.whole.patch);
    if (p_.grad_input != nullptr) pack_weights();
    if (p_.grad_weight != nullptr) {
      const int64_t count = g_.K * layout_.whole.vectors * kLanes;
      for (int64_t i = 0; i < count; ++i) layout_.weight_sums[i] = A(0);
    }
    for (int64_t k = 0; k < g_.K; ++k) layout_.bias_sums[k] = 0;
    for (int64_t y = 0; y < g_.pool_h; ++y) {
      for (int64_t x = 0; x < g_.pool_w; ++x) {
        layout_.position_pixels[y * g_.pool_w + x] =
            y * g_.pool_dilation_h * g_.stride_h * layout_.columns + x * g_.pool_dilation_w * g_.stride_w;
      }
    }

    for (int64_t first = 0; first < g_.N; first += layout_.images) {
      const int64_t count = min_of(layout_.images, g_.N - first);
      parallel(p_.threads, count * g_.groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / g_.groups, group = task % g_.groups;
          if (p_.grad_weight != nullptr) pack_input(first + image, group, image);
          for (int64_t k = group * layout_.Kg; k < (group + 1) * layout_.Kg; ++k) list_windows(first + image, k, image);
        }
      });
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < g_.K; ++k) layout_.bias_sums[k] += layout_.bias_parts[i * g_.K + k];
      }
      run_products(first, count);
    }
    if (p_.grad_weight != nullptr) write_grad_weight();
    if (p_.grad_bias != nullptr) {
      for (int64_t k = 0; k < g_.K; ++k) {
        static_cast<T*>(p_.grad_bias)[k] = narrow<T>(static_cast<A>(layout_.bias_sums[k]));
      }
    }
  }

 private:
  // weight (K, Cg, R, S) -> per channel block: (K, R, S, channels) in vectors. What lies beyond a run is never used.
  void pack_weights() {
    const Strides4 st = p_.weight_strides;
    // A view of a huge tensor can put more between two elements than a gather's 32-bit index holds.
    const bool gathers = (layout_.Cg - 1) * st.c + (g_.R - 1) * st.h + (g_.S - 1) * st.w <= INT32_MAX;
    for (int64_t b = 0; b < layout_.channel_blocks; ++b) {
      const ChannelBlock<A>& block = layout_.blocks[b];
      layout_.patch_vectors(g_, block.count, block.patch);
      if (!gathers) continue;
      for (int64_t i = 0; i < block.vectors * kLanes; ++i) block.indices[i] = 0;
      for_each_patch_element(block.count, [&](int64_t at, int64_t c, int64_t r, int64_t s) {
        block.indices[at] = static_cast<int32_t>(c * st.c + r * st.h + s * st.w);
      });
    }
    Threads threads = p_.threads;
    if (g_.K * layout_.Cg * g_.R * g_.S < 4096) threads.num_threads = 1;
    parallel(threads, layout_.channel_blocks * g_.K, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const ChannelBlock<A>& block = layout_.blocks[task / g_.K];
        const int64_t k = task % g_.K;
        const T* source = static_cast<const T*>(p_.weight) + k * st.n + block.begin * st.c;
        A* target = block.weights + k * block.vectors * kLanes;
        if (!gathers) {
          for (int64_t i = 0; i < block.vectors * kLanes; ++i) target[i] = A(0);
          for_each_patch_element(block.count, [&](int64_t at, int64_t c, int64_t r, int64_t s) {
            target[at] = widen(source[c * st.c + r * st.h + s * st.w]);
          });
          continue;
        }
        for (int64_t i = 0; i < block.vectors * kLanes; i += kLanes) {
          if constexpr (sizeof(T) == sizeof(A)) {
            store(target + i, gather(source, block.indices + i));
          } else {
            for (int64_t lane = 0; lane < kLanes; ++lane) target[i + lane] = widen(source[block.indices[i + lane]]);
          }
        }
      }
    });
  }

  // action(lane, c, r, s) for the elements of a patch of `channels` channels.
  template <class Action>
  void for_each_patch_element(int64_t channels, const Action& action) const {
    const bool joined = g_.dilation_w == 1;
    const int64_t run_lanes = round_up(joined ? g_.S * channels : channels, kLanes);
    for (int64_t r = 0; r < g_.R; ++r) {
      for (int64_t s = 0; s < g_.S; ++s) {
        const int64_t first = joined ? r * run_lanes + s * channels : (r * g_.S + s) * run_lanes;
        for (int64_t c = 0; c < channels; ++c) action(first + c, c, r, s);
      }
    }
  }

  // One group of input n -> (rows, columns, Cg), widened and zero-padded.
  void pack_input(int64_t n, int64_t group, int64_t image) const {
    const Strides4 st = p_.input_strides;
    const T* source = static_cast<const T*>(p_.input) + n * st.n + group * layout_.Cg * st.c;
    const int64_t Cg = layout_.Cg, row_elements = layout_.columns * Cg;
    A* target = layout_.packed_input + (image * g_.groups + group) * layout_.image_elements;
    for (int64_t row = 0; row < layout_.rows; ++row, target += row_elements) {
      const int64_t h = row - g_.pad_top;
      if (h < 0 || h >= g_.H) {
        for (int64_t i = 0; i < row_elements; ++i) target[i] = A(0);
        continue;
      }
      for (int64_t i = 0; i < g_.pad_left * Cg; ++i) target[i] = A(0);
      for (int64_t i = (g_.pad_left + g_.W) * Cg; i < row_elements; ++i) target[i] = A(0);
      A* pixels = target + g_.pad_left * Cg;
      if (Cg == 1 && st.w == 1) {
        for (int64_t w = 0; w < g_.W; ++w) pixels[w] = widen(source[h * st.h + w]);
      } else if (st.c == 1) {
        for (int64_t w = 0; w < g_.W; ++w) {
          for (int64_t c = 0; c < Cg; ++c) pixels[w * Cg + c] = widen(source[h * st.h + w * st.w + c]);
        }
      } else {
        for (int64_t c = 0; c < Cg; ++c) {
          const T* from = source + c * st.c + h * st.h;
          for (int64_t w = 0; w < g_.W; ++w) pixels[w * Cg + c] = widen(from[w * st.w]);
        }
      }
    }
  }

  template <class Index>
  void list_windows_of(const Index* argmax, Index no_gradient, const T* grad, const T* saved, int64_t image, int64_t k) {
    Window<A>* const list = layout_.lists + (image * g_.K + k) * layout_.list_stride;
    Window<A>* end = list;
    int64_t* ends = layout_.list_ends + (image * g_.K + k) * layout_.bands;
    const Strides4 st = p_.output_strides;
    double bias = 0;
#if defined(__AVX512F__)
    __m512d bias_lanes = _mm512_setzero_pd();
#endif
    for (int64_t band = 0; band < layout_.bands; ++band) {
      const int64_t last_row = min_of(g_.PH, (band + 1) * layout_.band_rows);
      for (int64_t i = band * layout_.band_rows; i < last_row; ++i) {
        const int64_t first_pixel = (i * g_.pool_stride_h - g_.pool_pad_h) * g_.stride_h * layout_.columns -
                                    g_.pool_pad_w * g_.stride_w;
        int64_t j = 0;
#if defined(__AVX512F__)
        if constexpr (sizeof(Index) == 1 && sizeof(T) == sizeof(float)) {
          if (st.w == 1 && saved == nullptr && g_.PW >= 4) {
            const int64_t step = g_.pool_stride_w * g_.stride_w;
            for (; j < g_.PW; j += 8) {
              end = append_live(argmax + i * st.h + j, grad + i * st.h + j, min_of(8, g_.PW - j),
                                first_pixel + j * step, step, layout_.position_pixels, g_.pool_h * g_.pool_w <= 8, end,
                                bias_lanes);
            }
          }
        }
#endif
        for (; j < g_.PW; ++j) {
          const int64_t at = i * st.h + j * st.w;
          const Index position = argmax[at];
          // Whether a window is live is as good as random: written always, kept if live, it costs no mispredictions.
          const bool live = position != no_gradient;
          A gradient = widen(grad[at]);
          if (saved != nullptr) gradient *= activation_derivative(g_.activation, widen(saved[at]));
          const int64_t index = live ? static_cast<int64_t>(position) : 0;
          *end = {first_pixel + j * g_.pool_stride_w * g_.stride_w + layout_.position_pixels[index], gradient};
          end += live;
          bias += live ? static_cast<double>(gradient) : 0.0;
        }
      }
      ends[band] = end - list;
    }
#if defined(__AVX512F__)
    bias += _mm512_reduce_add_pd(bias_lanes);
#endif
    layout_.bias_parts[image * g_.K + k] = bias;
  }

  void list_windows(int64_t n, int64_t k, int64_t image) {
    const int64_t base = n * p_.output_strides.n + k * p_.output_strides.c;
    const T* grad = static_cast<const T*>(p_.grad_output) + base;
    const T* saved = p_.saved == nullptr ? nullptr : static_cast<const T*>(p_.saved) + base;
    if (argmax_is_byte(g_)) {
      list_windows_of<uint8_t>(static_cast<const uint8_t*>(p_.argmax) + base, kNoGradientByte, grad, saved, image, k);
    } else {
      list_windows_of<int32_t>(static_cast<const int32_t*>(p_.argmax) + base, kNoGradientInt32, grad, saved, image, k);
    }
  }

  const Window<A>* list(int64_t image, int64_t k) const {
    return layout_.lists + (image * g_.K + k) * layout_.list_stride;
  }
  const int64_t* list_ends(int64_t image, int64_t k) const {
    return layout_.list_ends + (image * g_.K + k) * layout_.bands;
  }

  // Tasks are taken from a common counter, long ones first; which thread runs one does not matter to its result.
  void run_products(int64_t first, int64_t count) {
    const int64_t input_tasks = count * g_.groups * layout_.channel_blocks;
    const int64_t tasks = input_tasks + (p_.grad_weight != nullptr ? g_.groups * layout_.ranges : 0);
    if (tasks == 0) return;
    int64_t next = 0;
    parallel(p_.threads, min_of(layout_.workers, tasks), [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (;;) {
          const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (task >= tasks) break;
          if (task < input_tasks) {
            const int64_t block = task % layout_.channel_blocks;
            const int64_t image = task / layout_.channel_blocks / g_.groups;
            const int64_t group = task / layout_.channel_blocks % g_.groups;
            grad_input(first + image, image, group, layout_.blocks[block], worker);
          } else {
            grad_weight(count, (task - input_tasks) / layout_.ranges, (task - input_tasks) % layout_.ranges);
          }
        }
      }
    });
  }

  void grad_weight(int64_t count, int64_t group, int64_t range) {
    const int64_t first_k = group * layout_.Kg + range * layout_.range;
    const int64_t last_k = min_of(first_k + layout_.range, (group + 1) * layout_.Kg);
    WindowSpan<A> span{};
    span.list_stride = g_.K * layout_.list_stride;
    span.end_stride = g_.K * layout_.bands;
    span.image_stride = g_.groups * layout_.image_elements;
    span.pixel_stride = layout_.Cg;
    for (int64_t image = 0; image < count; image += layout_.span) {
      span.images = min_of(layout_.span, count - image);
      span.x = layout_.packed_input + (image * g_.groups + group) * layout_.image_elements;
      for (int64_t band = 0; band < layout_.bands; ++band) {
        for (int64_t k = first_k; k < last_k; ++k) {
          span.lists = list(image, k);
          span.ends = list_ends(image, k) + band;
          span.begins = band == 0 ? nullptr : span.ends - 1;
          in_register_parts(layout_.whole.vectors,
                            WeightPart<A>{span, layout_.whole.patch,
                                          layout_.weight_sums + k * layout_.whole.vectors * kLanes});
        }
      }
    }
  }

  // Sorts a band's windows of all k by pixel, k ascending within one; the number of pixels that have any.
  int64_t sort_band(int64_t image, int64_t group, int64_t band, const ChannelBlock<A>& block, int64_t worker) {
    int64_t* counts = layout_.pixel_counts + worker * layout_.band_pixels;
    Patch* patches = layout_.patches + worker * layout_.band_pixels;
    Share<A>* shares = layout_.shares + worker * layout_.Kg * layout_.band_rows * g_.PW;
    const int64_t first_pixel =
        max_of(0, band * layout_.band_rows * g_.pool_stride_h - g_.pool_pad_h) * g_.stride_h * layout_.columns;
    const int64_t first_k = group * layout_.Kg, last_k = first_k + layout_.Kg;
    const auto for_each_window = [&](const auto& action) {
      for (int64_t k = first_k; k < last_k; ++k) {
        const int64_t* ends = list_ends(image, k);
        const Window<A>* windows = list(image, k);
        for (int64_t i = band == 0 ? 0 : ends[band - 1]; i < ends[band]; ++i) action(k, windows[i]);
      }
    };
    for (int64_t i = 0; i < layout_.band_pixels; ++i) counts[i] = 0;
    for_each_window([&](int64_t, const Window<A>& window) { ++counts[window.pixel - first_pixel]; });
    int64_t total = 0;
    Patch* end = patches;
    for (int64_t i = 0; i < layout_.band_pixels; ++i) {
      const int64_t count = counts[i];
      counts[i] = total;
      total += count;
      *end = {first_pixel + i, total};
      end += count > 0;
    }
    const int64_t row_elements = block.vectors * kLanes;
    for_each_window([&](int64_t k, const Window<A>& window) {
      shares[counts[window.pixel - first_pixel]++] = {k * row_elements, window.gradient};
    });
    return end - patches;
  }

  void grad_input(int64_t n, int64_t image, int64_t group, const ChannelBlock<A>& block, int64_t worker) {
    A* scratch = layout_.grad_images + worker * layout_.image_elements;
    const int64_t elements = layout_.rows * layout_.columns * block.count;
    for (int64_t i = 0; i < elements + kLanes; ++i) scratch[i] = A(0);
    const Patch* patches = layout_.patches + worker * layout_.band_pixels;
    const Share<A>* shares = layout_.shares + worker * layout_.Kg * layout_.band_rows * g_.PW;
    for (int64_t band = 0; band < layout_.bands; ++band) {
      const int64_t count = sort_band(image, group, band, block, worker);
      in_register_parts(block.vectors, PatchPart<A>{patches, patches + count, shares, block, scratch});
    }
    const Strides4 st = p_.grad_input_strides;
    T* target = static_cast<T*>(p_.grad_input) + n * st.n + (group * layout_.Cg + block.begin) * st.c;
    const A* origin = scratch + (g_.pad_top * layout_.columns + g_.pad_left) * block.count;
    if (st.c == 1) {
      for (int64_t h = 0; h < g_.H; ++h) {
        for (int64_t w = 0; w < g_.W; ++w) {
          const A* pixel = origin + (h * layout_.columns + w) * block.count;
          for (int64_t c = 0; c < block.count; ++c) target[h * st.h + w * st.w + c] = narrow<T>(pixel[c]);
        }
      }
    } else {
      // Without padding the rows of a plane follow each other on both sides: one long row.
      const bool joined = layout_.columns == g_.W;
      const int64_t rows = joined ? 1 : g_.H, length = joined ? g_.H * g_.W : g_.W;
      for (int64_t c = 0; c < block.count; ++c) {
        for (int64_t h = 0; h < rows; ++h) {
          const A* row = origin + h * layout_.columns * block.count + c;
          T* to = target + c * st.c + h * st.h;
          int64_t w = 0;
          for (; w + kLanes <= length && block.count < kMaxGatherStride; w += kLanes) {
            A lanes[kLanes];
            store(lanes, gather(row + w * block.count, static_cast<int32_t>(block.count)));
            for (int64_t lane = 0; lane < kLanes; ++lane) to[w + lane] = narrow<T>(lanes[lane]);
          }
          for (; w < length; ++w) to[w] = narrow<T>(row[w * block.count]);
        }
      }
    }
  }

  // Sums (K, R, S, Cg) in vectors -> grad_weight (K, Cg, R, S).
  void write_grad_weight() const {
    const Strides4 st = p_.grad_weight_strides;
    const int64_t row = layout_.Cg * g_.R * g_.S, sums_row = layout_.whole.vectors * kLanes;
    const bool row_is_dense =
        (layout_.Cg - 1) * st.c + (g_.R - 1) * st.h + (g_.S - 1) * st.w == row - 1 && sums_row <= INT32_MAX;
    if (!row_is_dense) {  // K is not the outermost dimension in memory
      for (int64_t k = 0; k < g_.K; ++k) {
        T* target = static_cast<T*>(p_.grad_weight) + k * st.n;
        for_each_patch_element(layout_.Cg, [&](int64_t at, int64_t c, int64_t r, int64_t s) {
          target[c * st.c + r * st.h + s * st.w] = narrow<T>(layout_.weight_sums[k * sums_row + at]);
        });
      }
      return;
    }
    int32_t* indices = layout_.weight_indices;
    for_each_patch_element(layout_.Cg, [&](int64_t at, int64_t c, int64_t r, int64_t s) {
      indices[c * st.c + r * st.h + s * st.w] = static_cast<int32_t>(at);
    });
    for (int64_t k = 0; k < g_.K; ++k) {
      const A* sums = layout_.weight_sums + k * sums_row;
      T* target = static_cast<T*>(p_.grad_weight) + k * st.n;
      int64_t i = 0;
      for (; i + kLanes <= row; i += kLanes) {
        A lanes[kLanes];
        store(lanes, gather(sums, indices + i));
        for (int64_t lane = 0; lane < kLanes; ++lane) target[i + lane] = narrow<T>(lanes[lane]);
      }
      for (; i < row; ++i) target[i] = narrow<T>(sums[indices[i]]);
    }
  }

  const ConvMaxPool2dBackwardParams& p_;
  const ConvMaxPool2dGeometry& g_;
  const Layout<A> layout_;
};

int64_t workspace_bytes(const ConvMaxPool2dBackwardParams& params) {
  return params.dtype == DType::float64 ? Layout<double>(params, nullptr).bytes : Layout<float>(params, nullptr).bytes;
}

void run(const ConvMaxPool2dBackwardParams& params) {
  switch (params.dtype) {
    case DType::float32:
      return Backward<float>(params).run();
    case DType::float64:
      return Backward<double>(params).run();
    case DType::bfloat16:
      return Backward<BFloat16>(params).run();
    case DType::float16:
      return Backward<Float16>(params).run();
  }
}

const Kernel<ConvMaxPool2dBackwardParams> kKernels[] = {
    {"sparse", "every shape", true, [](const ConvMaxPool2dBackwardParams&) { return true; }, workspace_bytes, run},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dBackwardParams> conv_max_pool2d_backward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
