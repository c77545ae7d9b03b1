// Images in memory -> planes of conv_max_pool2d's backward (unfold), and planes of gradients -> images (fold).
//
//   plain   kLanes pixels of kLanes elements at a time are transposed, or copied where the channels are innermost
//   rows    a row of the image becomes (W, C) in a buffer; a pixel is S * C neighbours there. Back, pixels overlap: a
//           register slides along the row, and what leaves it is complete
//   blocks  stride_h rows become (C, stride_h, W) in a buffer; a pixel is stride_w neighbours of each
#pragma once

#include "conv_max_pool2d_backward_layout.h"
#include "operands.h"
#include "transpose.h"

namespace pyconv::cpu {
namespace {

template <class A>
void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = A(0);
}

template <class A>
void store_pixel(A* p, Vec<A> x, int64_t lanes) {
  if (lanes == kWidth<A>) {
    store(p, x);
  } else {
    store_partial(p, x, lanes);
  }
}

// Vectors of sums, one for each channel of an element -> `channels` neighbours.
template <class T, class A>
void store_channels(T* to, const Vec<A> (&sums)[1], int64_t channels) {
  if (channels == kWidth<A>) {
    store_narrowed(to, sums[0]);
  } else {
    store_narrowed(to, sums[0], channels);
  }
}
#if defined(__AVX512BF16__)
inline void store_channels(BFloat16* to, const Vec<float> (&sums)[2], int64_t channels) {
  const __m512i first = _mm512_cvtepu16_epi32(narrowed(sums[0], BFloat16()));
  const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(sums[1], BFloat16())), 16);
  const __mmask32 present = channels >= 32 ? 0xffffffffu : (1u << channels) - 1u;
  _mm512_mask_storeu_epi16(to, present, _mm512_or_epi32(first, second));
}
#endif

// One group of an image and its planes.
template <class Operands>
class Images {
  using T = typename Operands::Storage;
  using A = typename Operands::A;
  static constexpr int64_t kChannels = Operands::kChannels;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  Images(const Layout<A>& layout, const ConvMaxPool2dGeometry& geometry) : l_(layout), g_(geometry) {}

  // `source` (Cg, H, W) of strides st -> planes, zero-padded. Lanes beyond the channels hold anything.
  void unfold(const T* source, const Strides4& st, A* planes, A* buffer) const {
    switch (l_.unfolding) {
      case Unfolding::plain:
        return unfold_plain(source, st, planes);
      case Unfolding::rows:
        return unfold_rows(source, st, planes, buffer);
      case Unfolding::blocks:
        return unfold_blocks(source, st, planes, buffer);
    }
  }

  // The reverse, for planes [begin, end), overlaps added up; every element of these channels of `target` is written.
  void fold(const A* planes, int64_t begin, int64_t end, T* target, const Strides4& st, A* buffer) const {
    switch (l_.unfolding) {
      case Unfolding::plain:
        return fold_plain(planes, begin, end, target, st);
      case Unfolding::rows:
        return fold_rows(planes, target, st, buffer);
      case Unfolding::blocks:
        return fold_blocks(planes, target, st, buffer);
    }
  }

 private:
  int64_t lanes_of(int64_t plane) const { return l_.plane_lanes(plane); }

  // ---- plain -----------------------------------------------------------------------------------------------

  // Without padding along the rows, the rows of a plane follow each other on both sides: one long row.
  bool joined(const Strides4& st) const { return l_.columns == g_.W && st.h == g_.W && st.w == 1; }

  void unfold_plain(const T* source, const Strides4& st, A* planes) const {
    const bool join = joined(st);
    const int64_t image_rows = join ? 1 : g_.H, length = join ? g_.H * g_.W : g_.W;
    for (int64_t plane = 0; plane < l_.planes; ++plane) {
      const int64_t lanes = lanes_of(plane), channels = l_.Cg - plane * kLanes * kChannels;
      A* const to = planes + l_.plane_offset(plane);
      const T* const from = source + plane * kLanes * kChannels * st.c;
      const int64_t row = l_.columns * lanes;
      clear(to, g_.pad_top * row);
      clear(to + (g_.pad_top + g_.H) * row, (l_.rows - g_.pad_top - g_.H) * row);
      for (int64_t h = 0; h < image_rows; ++h) {
        A* pixel = to + (g_.pad_top + h) * row;
        if (!join) {
          clear(pixel, g_.pad_left * lanes);
          clear(pixel + (g_.pad_left + g_.W) * lanes, (l_.columns - g_.pad_left - g_.W) * lanes);
        }
        pixel += g_.pad_left * lanes;
        const T* x = from + h * st.h;
        if (st.w == 1) {
          for (int64_t w = 0; w < length; w += kLanes, x += kLanes, pixel += kLanes * lanes) {
            transpose_in(x, st.c, channels, min_of(kLanes, length - w), pixel, lanes);
          }
        } else if (st.c == 1) {
          for (int64_t w = 0; w < length; ++w, x += st.w, pixel += lanes) {
            store_pixel(pixel, Operands::load_pixel(x, channels), lanes);
          }
        } else {
          for (int64_t w = 0; w < length; ++w, x += st.w, pixel += lanes) {
            for (int64_t lane = 0; lane < lanes && lane * kChannels < channels; ++lane) {
              pixel[lane] = Operands::element(x + lane * kChannels * st.c, st.c, channels - lane * kChannels);
            }
          }
        }
      }
    }
  }

  // (channels, count) with rows `stride` apart -> count pixels of `lanes` elements.
  static void transpose_in(const T* from, int64_t stride, int64_t channels, int64_t count, A* to, int64_t lanes) {
    Vec<A> tile[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t c = i * kChannels;
      tile[i] = c < channels ? Operands::load_row(from + c * stride, stride, channels - c, count) : zero<A>();
    }
    transpose(tile);
    for (int64_t i = 0; i < count; ++i) store_pixel(to + i * lanes, tile[i], lanes);
  }

  void fold_plain(const A* planes, int64_t begin, int64_t end, T* target, const Strides4& st) const {
    const bool join = joined(st);
    const int64_t image_rows = join ? 1 : g_.H, length = join ? g_.H * g_.W : g_.W;
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t lanes = lanes_of(plane), pitch = lanes * kChannels;
      const int64_t channels = min_of(pitch, l_.Cg - plane * kLanes * kChannels);
      const A* const from = planes + l_.plane_offset(plane) * kChannels;
      T* const to = target + plane * kLanes * kChannels * st.c;
      for (int64_t h = 0; h < image_rows; ++h) {
        const A* pixel = from + ((g_.pad_top + h) * l_.columns + g_.pad_left) * pitch;
        T* x = to + h * st.h;
        if (st.w == 1) {
          for (int64_t w = 0; w < length; w += kLanes, x += kLanes, pixel += kLanes * pitch) {
            for (int64_t c = 0; c < min_of(kChannels, channels); ++c) {
              transpose_out(pixel + c * lanes, lanes, ceil_div(channels - c, kChannels), min_of(kLanes, length - w),
                            x + c * st.c, kChannels * st.c);
            }
          }
        } else {  // dense, so the channels are innermost
          for (int64_t w = 0; w < length; ++w, x += st.w, pixel += pitch) {
            Vec<A> sums[kChannels];
            for (int64_t c = 0; c < kChannels; ++c) sums[c] = load_partial(pixel + c * lanes, lanes);
            store_channels(x, sums, channels);
          }
        }
      }
    }
  }

  // One channel of every element of count pixels -> (channels, count) with rows `stride` apart.
  static void transpose_out(const A* from, int64_t lanes, int64_t channels, int64_t count, T* to, int64_t stride) {
    Vec<A> tile[kLanes];
    if (lanes == kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = i < count ? load(from + i * kLanes * kChannels) : zero<A>();
    } else {
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = i < count ? load_partial(from + i * lanes * kChannels, lanes) : zero<A>();
    }
    transpose(tile);
    if (count == kLanes) {
      for (int64_t c = 0; c < channels; ++c) store_narrowed(to + c * stride, tile[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) store_narrowed(to + c * stride, tile[c], count);
    }
  }

  // ---- rows of all channels --------------------------------------------------------------------------------

  // Row `padded_row` of the padded image -> (padded_columns, Cg).
  void load_row(const T* source, const Strides4& st, int64_t padded_row, A* row) const {
    const int64_t h = padded_row - g_.pad_top, Cg = l_.Cg;
    if (h < 0 || h >= g_.H) return clear(row, l_.padded_columns * Cg);
    clear(row, g_.pad_left * Cg);
    clear(row + (g_.pad_left + g_.W) * Cg, (l_.padded_columns - g_.pad_left - g_.W) * Cg);
    const T* from = source + h * st.h;
    A* to = row + g_.pad_left * Cg;
    if (st.w == Cg && (Cg == 1 || st.c == 1)) return copy_in(from, g_.W * Cg, to);
    for (int64_t c = 0; c < Cg; ++c) {
      const T* x = from + c * st.c;
      if (st.w == 1) {
        for (int64_t w = 0; w < g_.W; ++w) to[w * Cg + c] = widen(x[w]);
      } else {
        for (int64_t w = 0; w < g_.W; ++w) to[w * Cg + c] = widen(x[w * st.w]);
      }
    }
  }

  // The same of one channel, whose plane `source` is -> (padded_columns,).
  void load_channel_row(const T* source, const Strides4& st, int64_t padded_row, A* row) const {
    const int64_t h = padded_row - g_.pad_top;
    if (h < 0 || h >= g_.H) return clear(row, l_.padded_columns);
    clear(row, g_.pad_left);
    clear(row + g_.pad_left + g_.W, l_.padded_columns - g_.pad_left - g_.W);
    const T* from = source + h * st.h;
    A* to = row + g_.pad_left;
    if (st.w == 1) return copy_in(from, g_.W, to);
    for (int64_t w = 0; w < g_.W; ++w) to[w] = widen(from[w * st.w]);
  }

  static void copy_in(const T* from, int64_t count, A* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_widened(from + i));
    if (i < count) store_partial(to + i, load_widened(from + i, count - i), count - i);
  }

  static void copy_out(const A* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_narrowed(to + i, load(from + i));
    if (i < count) store_narrowed(to + i, load_partial(from + i, count - i), count - i);
  }

  // Row h of the image <- (padded_columns, Cg).
  void store_row(const A* row, int64_t h, T* target, const Strides4& st) const {
    const int64_t Cg = l_.Cg;
    const A* from = row + g_.pad_left * Cg;
    T* to = target + h * st.h;
    if (st.w == Cg && (Cg == 1 || st.c == 1)) return copy_out(from, g_.W * Cg, to);
    if (st.w == 1 && Cg < kMaxGatherStride) {
      for (int64_t c = 0; c < Cg; ++c) {
        T* x = to + c * st.c;
        int64_t w = 0;
        for (; w + kLanes <= g_.W; w += kLanes) {
          store_narrowed(x + w, gather(from + w * Cg + c, static_cast<int32_t>(Cg)));
        }
        for (; w < g_.W; ++w) x[w] = narrow<T>(from[w * Cg + c]);
      }
      return;
    }
    for (int64_t w = 0; w < g_.W; ++w) {
      for (int64_t c = 0; c < Cg; ++c) to[w * st.w + c * st.c] = narrow<T>(from[w * Cg + c]);
    }
  }

  // Row h of one channel <- (padded_columns,).
  void store_channel_row(const A* row, int64_t h, T* target, const Strides4& st) const {
    const A* from = row + g_.pad_left;
    T* to = target + h * st.h;
    if (st.w == 1) return copy_out(from, g_.W, to);
    for (int64_t w = 0; w < g_.W; ++w) to[w * st.w] = narrow<T>(from[w]);
  }

  void unfold_rows(const T* source, const Strides4& st, A* planes, A* row) const {
    const int64_t step = g_.stride_w * l_.Cg;
    clear(row + l_.padded_columns * l_.Cg, kLanes);
    for (int64_t r = 0; r < l_.rows; ++r) {
      load_row(source, st, r, row);
      for (int64_t plane = 0; plane < l_.planes; ++plane) {
        const int64_t lanes = lanes_of(plane);
        A* pixel = planes + l_.plane_offset(plane) + r * l_.columns * lanes;
        const A* from = row + plane * kLanes;
        for (int64_t w = 0; w < l_.columns; ++w, pixel += lanes, from += step) store_pixel(pixel, load(from), lanes);
      }
    }
  }

  void fold_rows(const A* planes, T* target, const Strides4& st, A* buffer) const {
    const int64_t step = g_.stride_w * l_.Cg, elements = l_.padded_columns * l_.Cg;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == sizeof(float)) {
      if (l_.planes == 1 && step < kLanes) {
        for (int64_t h = 0; h < g_.H; h += kRowsTogether) {
          slide_rows(planes, h, buffer);
          const int64_t count = min_of(kRowsTogether, g_.H - h);
          for (int64_t i = 0; i < count; ++i) store_row(buffer + i * buffer_row(), h + i, target, st);
        }
        return;
      }
    }
#endif
    for (int64_t h = 0; h < g_.H; ++h) {
      const int64_t r = g_.pad_top + h;
      clear(buffer, elements);
      for (int64_t w = 0; w < l_.columns; ++w) {
        for (int64_t plane = 0; plane < l_.planes; ++plane) {
          const int64_t lanes = lanes_of(plane), channels = min_of(lanes, l_.depth - plane * kLanes);
          const A* pixel = planes + l_.plane_offset(plane) + (r * l_.columns + w) * lanes;
          A* to = buffer + w * step + plane * kLanes;
          for (int64_t c = 0; c < channels; ++c) to[c] += pixel[c];
        }
      }
      store_row(buffer, h, target, st);
    }
  }

  int64_t buffer_row() const { return l_.padded_columns * l_.Cg + kLanes; }

#if defined(__AVX512F__)
  // Rows h, h + 1, ... of the buffer: [w * step + lane] += pixel w's lane, in the order of w. Every store holds `step`
  // complete sums and the begin of others, which later ones replace. A row waits for its own sums: hence several.
  void slide_rows(const A* planes, int64_t h, A* buffer) const {
    const int64_t lanes = lanes_of(0), step = g_.stride_w * l_.Cg, row = buffer_row();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i moved = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
    const __mmask16 kept = lanes16(kLanes - step), used = lanes16(l_.depth);
    const int64_t written = (l_.columns - 1) * step + kLanes;
    const A* pixels[kRowsTogether];
    __m512 sums[kRowsTogether];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRowsTogether; ++i) {
      pixels[i] = planes + (g_.pad_top + min_of(h + i, g_.H - 1)) * l_.columns * lanes;
      sums[i] = _mm512_setzero_ps();
      if (written < row) clear(buffer + i * row + written, row - written);
    }
    for (int64_t w = 0; w < l_.columns; ++w) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRowsTogether; ++i) {
        sums[i] = _mm512_add_ps(_mm512_maskz_permutexvar_ps(kept, moved, sums[i]),
                                _mm512_maskz_loadu_ps(used, pixels[i] + w * lanes));
        _mm512_storeu_ps(buffer + i * row + w * step, sums[i]);
      }
    }
  }
#endif

  // ---- blocks ----------------------------------------------------------------------------------------------

  // Row (c, i) of the buffer: row i of a block of channel c.
  int64_t block_row() const { return l_.block_row(); }

  void unfold_blocks(const T* source, const Strides4& st, A* planes, A* buffer) const {
    for (int64_t r = 0; r < l_.rows; ++r) {
      A* row = buffer;
      for (int64_t c = 0; c < l_.Cg; ++c) {
        for (int64_t i = 0; i < g_.stride_h; ++i, row += block_row()) {
          load_channel_row(source + c * st.c, st, r * g_.stride_h + i, row);
        }
      }
#if defined(__AVX512F__)
      if constexpr (sizeof(A) == sizeof(float)) {
        if (g_.stride_w == 4 && l_.half_planes == 0) {
          const int64_t rows = l_.Cg * g_.stride_h;
          for (int64_t i = 0; i < rows; i += 4) {
            A* pixel = planes + l_.plane_offset(i / 4) + r * l_.columns * kLanes;
            for (int64_t w = 0; w < l_.columns; w += 4) {
              __m512 quarters[4];
              for (int64_t j = 0; j < 4; ++j) {
                quarters[j] = i + j < rows ? _mm512_maskz_loadu_ps(lanes16((l_.columns - w) * 4),
                                                                   buffer + (i + j) * block_row() + w * 4)
                                           : _mm512_setzero_ps();
              }
              transpose_quarters(quarters);
              const int64_t count = min_of(4, l_.columns - w);
              for (int64_t j = 0; j < count; ++j) _mm512_storeu_ps(pixel + (w + j) * kLanes, quarters[j]);
            }
          }
          continue;
        }
      }
#endif
      for_each_block_lane(r, [&](int64_t place, int64_t step, int64_t in_buffer) {
        for (int64_t w = 0; w < l_.columns; ++w) planes[place + w * step] = buffer[in_buffer + w * g_.stride_w];
      });
    }
  }

  void fold_blocks(const A* planes, T* target, const Strides4& st, A* buffer) const {
    for (int64_t r = 0; r < l_.rows; ++r) {
      bool in_registers = false;
#if defined(__AVX512F__)
      if constexpr (sizeof(A) == sizeof(float)) {
        const int64_t rows = l_.Cg * g_.stride_h;
        in_registers = g_.stride_w == 4 && l_.half_planes == 0;
        for (int64_t i = 0; in_registers && i < rows; i += 4) {
          const A* pixel = planes + l_.plane_offset(i / 4) + r * l_.columns * kLanes;
          for (int64_t w = 0; w < l_.columns; w += 4) {
            __m512 quarters[4];
            for (int64_t j = 0; j < 4; ++j) {
              quarters[j] = _mm512_loadu_ps(pixel + min_of(w + j, l_.columns - 1) * kLanes);
            }
            transpose_quarters(quarters);
            const int64_t count = min_of(4, rows - i);
            for (int64_t j = 0; j < count; ++j) _mm512_storeu_ps(buffer + (i + j) * block_row() + w * 4, quarters[j]);
          }
        }
      }
#endif
      if (!in_registers) {
        for_each_block_lane(r, [&](int64_t place, int64_t step, int64_t in_buffer) {
          for (int64_t w = 0; w < l_.columns; ++w) buffer[in_buffer + w * g_.stride_w] = planes[place + w * step];
        });
      }
      const A* row = buffer;
      for (int64_t c = 0; c < l_.Cg; ++c) {
        for (int64_t i = 0; i < g_.stride_h; ++i, row += block_row()) {
          const int64_t h = r * g_.stride_h + i - g_.pad_top;
          if (h >= 0 && h < g_.H) store_channel_row(row, h, target + c * st.c, st);
        }
      }
    }
  }

  // For all channels, action(place of row r's first pixel in the planes, elements to the next one, place in the buffer).
  template <class Action>
  void for_each_block_lane(int64_t r, const Action& action) const {
    for (int64_t channel = 0; channel < l_.depth; ++channel) {
      const int64_t plane = channel / kLanes, lanes = lanes_of(plane);
      action(l_.plane_offset(plane) + r * l_.columns * lanes + channel % kLanes, lanes,
             channel / g_.stride_w * block_row() + channel % g_.stride_w);
    }
  }

#if defined(__AVX512F__)
  // quarters[i] quarter j <-> quarters[j] quarter i
  static void transpose_quarters(__m512* quarters) {
    const __m512 a = _mm512_shuffle_f32x4(quarters[0], quarters[1], 0x44);  // 00 01 | 10 11
    const __m512 b = _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xee);  // 02 03 | 12 13
    const __m512 c = _mm512_shuffle_f32x4(quarters[2], quarters[3], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xee);
    quarters[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    quarters[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    quarters[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    quarters[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#endif

  const Layout<A>& l_;
  const ConvMaxPool2dGeometry& g_;
};

}  // namespace
}  // namespace pyconv::cpu
