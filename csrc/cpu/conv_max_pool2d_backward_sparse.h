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
#include "conv_max_pool2d_backward_lists.h"
#include "conv_max_pool2d_backward_weights.h"
#include "parallel.h"
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
      : p_(params), g_(params.geometry), l_(params, params.workspace, kChannels), images_(l_, g_), rows_(params, l_), lists_(params, l_) {}

  void run() {
    lists_.make_tables();
    rows_.make_tables();
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
      for (int64_t k = task * kRowTask; k < end; ++k) rows_.pack(k, weights_of(worker), buffer);
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
        rows_.write(k);
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

  A* weights_of(int64_t worker) const {
    return l_.weights + l_.weight_copies.of(worker) * g_.K * l_.row_elements;
  }

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
    lists_.make(first + image, image, begin, end, worker);
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
  const WeightRows<Operands> rows_;
  const WindowLists<Operands> lists_;
};

}  // namespace
}  // namespace pyconv::cpu
