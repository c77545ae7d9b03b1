// Rows of weights in conv_max_pool2d's backward: from memory to the vectors that grad_input reads, and from sums to
// grad_weight.
#pragma once

#include "conv_max_pool2d_backward_images.h"

namespace pyconv::cpu {
namespace {

template <class Operands>
class WeightRows {
  using T = typename Operands::Storage;
  using A = typename Operands::A;
  static constexpr int64_t kChannels = Operands::kChannels;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  WeightRows(const ConvMaxPool2dBackwardParams& params, const Layout<A>& layout)
      : p_(params), g_(params.geometry), l_(layout) {}

  // What pack() and write() need where they cannot move whole vectors.
  void make_tables() const {
    const auto by_vectors = [&](const Strides4& st) { return taps_innermost(st) || channels_innermost(st); };
    if (by_vectors(p_.weight_strides) && by_vectors(p_.grad_weight_strides)) return;
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

  // Row k of weight -> its vectors, of which lanes beyond the channels hold anything.
  void pack(int64_t k, A* weights, A* buffer) const {
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
  void write(int64_t k) const {
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

 private:
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

  const ConvMaxPool2dBackwardParams& p_;
  const ConvMaxPool2dGeometry& g_;
  const Layout<A>& l_;
};

}  // namespace
}  // namespace pyconv::cpu
