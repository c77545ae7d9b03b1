// How the backward of conv_max_pool2d lays out its operands, what it keeps in its workspace, and how large the pieces
// of work are.
//
// Patches are read and written in planes: zero-padded images of one vector of channels a pixel, in the accumulator
// type. What counts as a pixel and its channels is chosen by shape, so that vectors are full where channels are few:
//
//   plain   (H, W)           x C         a filter has R x S taps
//   rows    (H, OW)          x (S * C)   the taps of a filter row are channels of one pixel: R taps
//   blocks  (H / sh, W / sw) x (C * sh * sw)   as large as the stride: ceil(R / sh) x ceil(S / sw) taps, step 1
//
// A lane holds an element: a channel, or with bfloat16 two (operands.h), which have a vector of sums each.
#pragma once

#include "conv_max_pool2d_backward_products.h"
#include "parallel.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kChunkBytes = 1024 * 1024;      // lists and planes of the images in flight, per thread: stay in L2
constexpr int64_t kBandBytes = 28 * 1024;         // rows of the planes of a part under a band: stay in L1
constexpr int64_t kMapBytes = 256 * 1024;         // gradients of a band by pixel and k: stay in L2
constexpr int64_t kBlockKs = 64;                  // k whose shares in a pixel grad_input sums in registers
constexpr int64_t kWeightBytes = 40 * 1024;       // their weights, of one part: stay in L1, or nearly so
constexpr int64_t kListSlack = 16;                // entries a vector of windows may write beyond the end of a list
constexpr int64_t kRangesPerThread = 4;           // grad_weight tasks per thread: evens out the load
constexpr int64_t kMinInputTasks = 8;             // a small batch is split along the channels for as many tasks
constexpr int64_t kListTask = 32;                 // lists of k that one task makes
constexpr int64_t kRowTask = 8;                   // rows of weights that one task packs, or sums up and writes
constexpr int64_t kSpanWindows = 128;             // windows summed in registers before they join a grad_weight row
constexpr int64_t kMostPartials = 8;              // of grad_weight, so that threads share neither images nor sums ...
constexpr int64_t kPartialBytes = 1024 * 1024;    // ... as far as they are small beside the work: in all ...
constexpr int64_t kPartialWindows = 64;           // ... and windows of each
constexpr double kHeldVectors = 6;                // of a k's weights: below, its windows are scattered one by one

constexpr int64_t kRowsTogether = 4;              // of overlapping pixels that are added up

enum class Unfolding { plain, rows, blocks };

// What one call of a product sums in registers: `runs` runs of `columns` taps side by side, of full or half vectors.
struct Part {
  bool half;
  int64_t columns, runs;
  const int64_t* offsets;  // (runs,): elements from a pixel's first plane of that width
  int64_t first;           // elements before this part of k = 0 ...
  int64_t step;            // ... and from one k's to the next
  int64_t split;           // of the channels: see Parts
};

// All taps of all planes in parts. The channels can be split, for tasks of their own; a part belongs to one split.
struct Parts {
  Part* list;
  int64_t count;
  int64_t* offsets;  // (vectors,): all runs' offsets
  int64_t* places;   // (planes, taps): elements before that vector of k = 0 ...
  int64_t* steps;    // (planes, taps): ... and from one k's to the next
};

// Hands out consecutive pieces of a buffer; with a null buffer it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class E>
  E* take(int64_t count) {
    const int64_t begin = used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return base_ == nullptr ? nullptr : reinterpret_cast<E*>(base_ + begin);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class A>
struct Layout {
  static constexpr int64_t kLanes = kWidth<A>;

  int64_t Cg, Kg;
  int64_t element_channels;
  Unfolding unfolding;
  int64_t depth;                      // elements of a pixel
  int64_t tap_rows, tap_columns;      // of the filter in pixels
  int64_t tap_row_step, tap_column_step;
  int64_t row_step, column_step;      // pixels from one convolution output to the next
  int64_t rows, columns;              // pixels of a plane
  int64_t padded_columns;             // of the input, as far as the pixels reach
  int64_t full_planes, half_planes;   // a last half plane where no more than half a vector is left
  int64_t planes, taps;
  int64_t row_elements;               // of a k's weights: (planes, taps) vectors
  int64_t image_elements;             // the planes of one group of an image
  bool merges;                        // a convolution output can win several windows, which are made one entry
  bool scatters;                      // grad_input goes window by window
  int64_t windows;                    // per (n, k)
  int64_t list_stride;                // entries of the list of one (n, k)
  int64_t band_rows, bands;           // pooled rows of a band
  int64_t band_pixels;                // from a band's first pixel to one past the last
  int64_t k_block, k_blocks;          // of a group, whose shares grad_input sorts together; k_block in whole vectors
  int64_t span;                       // images that a grad_weight row sums in registers, at most
  int64_t partials;                   // of grad_weight: each has its share of the images of every block
  int64_t block;                      // images that are divided among the partials, whatever the number of threads
  int64_t images;                     // of a chunk: a multiple of block
  int64_t range, ranges;              // of k, per group and partial: grad_weight tasks
  int64_t splits;                     // of the channels: grad_input tasks
  int64_t list_tasks;                 // per group and image
  int64_t workers;
  Parts weight_parts, input_parts;    // of grad_weight and of grad_input
  Copies weight_copies;
  A* weights;                         // (copies, parts of (K, vectors))
  uint8_t* weights_packed;            // which copies are made
  A* weight_sums;                     // (partials, K, row_elements * element_channels)
  double* bias_sums;                  // (K,)
  int32_t* order;                     // (images,): of a chunk, partial after partial
  int32_t* weight_elements;           // (planes, taps, lanes): where in a row of weights an element is
  int32_t* sum_elements;              // (Cg*R*S,): and where in a row of sums
  A* packed_input;                    // (images, groups, image_elements)
  int32_t* window_pixels;             // (windows,): the window's origin, relative to its band or in the map of outputs
  int32_t* position_pixels;           // (pool_h * pool_w,): from the origin to a position
  int32_t* pixels;                    // (images, K, list_stride)
  A* gradients;                       // (images, K, list_stride)
  int64_t* list_ends;                 // (images, K, bands + 1): begin and end of each band in its list
  double* bias_parts;                 // (images, K)
  A* outputs;                         // (workers, OH * OW): gradients of one (n, k), for merging
  A* window_gradients;                // (workers, kLanes, windows): of a block of k whose lists are made together
  int32_t* window_positions;          // (workers, kLanes, windows)
  A* row_buffer;                      // (workers, row_buffer_elements): input rows, a weight row
  int64_t row_buffer_elements;
  A* grad_images;                     // (workers, image_elements * element_channels)
  A* map;                             // (workers, band_pixels, k_block): zero outside of grad_input's sorting
  Patch* patches;                     // (workers, band_pixels + 1)
  int32_t* share_ks;                  // (workers, shares): of a band and a block of k
  A* share_gradients;
  int64_t map_elements, shares;
  int64_t bytes;

  Layout(const ConvMaxPool2dBackwardParams& p, void* base, int64_t channels_of_element)
      : element_channels(channels_of_element) {
    const ConvMaxPool2dGeometry& g = p.geometry;
    Cg = g.C / g.groups;
    Kg = g.K / g.groups;
    choose_unfolding(g);
    windows = g.PH * g.PW;
    scatters = (static_cast<double>(full_planes) + 0.5 * static_cast<double>(half_planes)) *
                   static_cast<double>(taps) <= kHeldVectors;
    // Merging costs as much as a few vectors of every window.
    merges = !scatters && ((g.pool_h - 1) * g.pool_dilation_h >= g.pool_stride_h ||
                           (g.pool_w - 1) * g.pool_dilation_w >= g.pool_stride_w);
    // Merged gradients can be too long for bfloat16: then up to three pieces, of at least two windows.
    const int64_t pieces = merges && element_channels > 1 ? 3 : 1;
    list_stride = (pieces > 1 ? ceil_div(3 * windows, 2) : windows) + kListSlack;
    k_blocks = ceil_div(Kg, kBlockKs);
    k_block = round_up(ceil_div(Kg, k_blocks), kLanes);
    k_blocks = ceil_div(Kg, k_block);

    const int64_t part_planes = planes_together(min_of(tap_columns, kMaxColumns), most_vectors(), planes);
    const int64_t plane_row_bytes = columns * kLanes * int64_t(sizeof(A));
    const auto too_large = [&](int64_t pooled_rows) {
      const int64_t pixel_rows = (conv_rows(g, pooled_rows) - 1) * row_step;
      const int64_t part = (pixel_rows + (tap_rows - 1) * tap_row_step + 1) * plane_row_bytes * part_planes;
      const int64_t map_bytes = pixel_rows * columns * k_block * int64_t(sizeof(A));
      return part > kBandBytes || (p.grad_input != nullptr && map_bytes > kMapBytes);
    };
    band_rows = g.PH;
    while (band_rows > 1 && too_large(band_rows)) band_rows = ceil_div(band_rows, 2);
    bands = ceil_div(g.PH, band_rows);
    band_pixels = ((min_of(g.OH, conv_rows(g, band_rows)) - 1) * row_step + 1) * columns;

    const int64_t threads = max_of(1, p.threads.num_threads);
    const int64_t per_image = (p.grad_weight != nullptr ? g.groups * image_elements * int64_t(sizeof(A)) : 0) +
                              g.K * (list_stride * int64_t(sizeof(A) + sizeof(int32_t)) +
                                     (bands + 1) * int64_t(sizeof(int64_t)));
    const int64_t part_bytes = rows * plane_row_bytes * part_planes;
    span = min_of(ceil_div(kSpanWindows, windows), max_of(1, kBandBytes / part_bytes));
    block = min_of(g.N, max_of(1, kChunkBytes / per_image));
    images = min_of(g.N, threads * block);
    const int64_t most_partials =
        min_of(min_of(kMostPartials, kPartialBytes / (g.K * row_elements * element_channels * int64_t(sizeof(A)))),
               min_of(block, block * windows / kPartialWindows));
    for (partials = 1; 2 * partials <= most_partials;) partials *= 2;
    const int64_t weight_tasks = threads > 1 ? threads * kRangesPerThread : 1;
    range = max_of(1, ceil_div(Kg, max_of(1, ceil_div(weight_tasks, g.groups * partials))));
    ranges = ceil_div(Kg, range);
    // By shape, not by threads.
    splits = p.grad_input == nullptr ? 0
             : unfolding != Unfolding::plain
                 ? 1
                 : max_of(1, min_of(planes, ceil_div(kMinInputTasks, g.N * g.groups)));
    list_tasks = ceil_div(Kg, kListTask);
    workers = threads;

    Carver carver(base);
    const auto carve_parts = [&](Parts& parts, int64_t part_splits, int64_t part_rows, const auto& limit) {
      parts.list = carver.take<Part>(planes * taps);
      parts.offsets = carver.take<int64_t>(planes * taps);
      parts.places = carver.take<int64_t>(planes * taps);
      parts.steps = carver.take<int64_t>(planes * taps);
      if (base != nullptr) make_parts(parts, part_splits, part_rows, limit);
    };
    if (p.grad_weight != nullptr) {
      carve_parts(weight_parts, 1, 1, [&](int64_t) { return most_vectors(); });
    }
    if (p.grad_input != nullptr) {
      carve_parts(input_parts, splits, g.K, [&](int64_t lanes) {
        if (scatters) return int64_t(kMaxHeldVectors);
        const int64_t vectors = kWeightBytes / (min_of(k_block, Kg) * lanes * int64_t(sizeof(A)));
        return max_of(4, min_of(most_vectors(), vectors));
      });
    }
    // Tasks for a part of the channels need only theirs.
    weight_copies = Copies(splits > 1 ? INT64_MAX : g.K * row_elements * int64_t(sizeof(A)), workers);
    weights = carver.take<A>(p.grad_input != nullptr ? weight_copies.count() * g.K * row_elements : 0);
    weights_packed = carver.take<uint8_t>(weight_copies.flag_bytes());
    weight_sums = carver.take<A>(p.grad_weight != nullptr ? partials * g.K * row_elements * element_channels : 0);
    bias_sums = carver.take<double>(g.K);
    order = carver.take<int32_t>(images);
    weight_elements = carver.take<int32_t>(planes * taps * kLanes);
    sum_elements = carver.take<int32_t>(Cg * g.R * g.S);
    packed_input = carver.take<A>(p.grad_weight != nullptr ? images * g.groups * image_elements : 0);
    window_pixels = carver.take<int32_t>(windows + kListSlack);
    position_pixels = carver.take<int32_t>(max_of(16, g.pool_h * g.pool_w));
    pixels = carver.take<int32_t>(images * g.K * list_stride);
    gradients = carver.take<A>(images * g.K * list_stride);
    list_ends = carver.take<int64_t>(images * g.K * (bands + 1));
    bias_parts = carver.take<double>(images * g.K);
    outputs = carver.take<A>(merges ? workers * outputs_stride(g) : 0);
    window_gradients = carver.take<A>(workers * kListTask * list_stride);
    window_positions = carver.take<int32_t>(workers * kListTask * list_stride);
    row_buffer_elements = round_up(
        max_of(Cg * g.R * g.S + 1, unfolding == Unfolding::blocks ? Cg * g.stride_h * block_row()
                                                                  : kRowsTogether * (padded_columns * Cg + kLanes)),
        16);
    row_buffer = carver.take<A>(workers * row_buffer_elements);
    const int64_t inputs = p.grad_input != nullptr ? workers : 0, sorters = scatters ? 0 : inputs;
    grad_images = carver.take<A>(inputs * image_elements * element_channels);
    map_elements = band_pixels * k_block;
    shares = pieces * k_block * min_of(windows, merges ? conv_rows(g, band_rows) * g.OW : band_rows * g.PW) + kListSlack;
    map = carver.take<A>(sorters * map_elements);
    patches = carver.take<Patch>(sorters * (band_pixels + 1));
    share_ks = carver.take<int32_t>(sorters * shares);
    share_gradients = carver.take<A>(sorters * shares);
    // Lists count pixels in 32 bits. A band beyond that (64 GB of planes) asks for more memory than there is.
    bytes = max_of(band_pixels, merges ? g.OH * g.OW : 0) > INT32_MAX ? INT64_MAX : carver.used();
  }

  // The first of `count` images of a block that belongs to a partial; the one after the last for `partials`.
  int64_t partial_begin(int64_t count, int64_t partial) const { return count * partial / partials; }

  int64_t outputs_stride(const ConvMaxPool2dGeometry& g) const { return round_up(g.OH * g.OW, 16); }

  // Output rows [begin, end) of the convolution where a band's winners can be.
  int64_t band_begin(const ConvMaxPool2dGeometry& g, int64_t band) const {
    return band == 0 ? 0 : max_of(0, min_of(g.OH, band * band_rows * g.pool_stride_h - g.pool_pad_h));
  }
  int64_t band_end(const ConvMaxPool2dGeometry& g, int64_t band) const {
    const int64_t next = band + 1 < bands ? band_begin(g, band + 1) : g.OH;
    return min_of(next, band_begin(g, band) + conv_rows(g, band_rows));
  }

  // Elements of a row of one channel in the buffer of blocks, aligned.
  int64_t block_row() const { return round_up(padded_columns, 16) + 16; }

  int64_t plane_lanes(int64_t plane) const { return plane < full_planes ? kLanes : kHalfWidth<A>; }
  // Elements from an image's first plane to `plane`, the only half plane being the last.
  int64_t plane_offset(int64_t plane) const { return plane * rows * columns * kLanes; }

  // action(plane, tap, lane, c, r, s) for the elements of a filter.
  template <class Action>
  void for_each_element(const ConvMaxPool2dGeometry& g, const Action& action) const {
    for (int64_t c = 0; c < Cg; ++c) {
      for (int64_t r = 0; r < g.R; ++r) {
        for (int64_t s = 0; s < g.S; ++s) {
          int64_t tap = r * g.S + s, channel = c;
          if (unfolding == Unfolding::rows) {
            tap = r;
            channel = s * Cg + c;
          } else if (unfolding == Unfolding::blocks) {
            tap = r / g.stride_h * tap_columns + s / g.stride_w;
            channel = (c * g.stride_h + r % g.stride_h) * g.stride_w + s % g.stride_w;
          }
          action(channel / kLanes, tap, channel % kLanes, c, r, s);
        }
      }
    }
  }

 private:
  int64_t most_vectors() const { return kMaxVectors / element_channels; }

  static int64_t conv_rows(const ConvMaxPool2dGeometry& g, int64_t pooled_rows) {
    return (pooled_rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h + 1;
  }

  // Vectors a patch takes, in whole ones.
  static double vectors_of(int64_t elements, int64_t filter_taps) {
    const int64_t rest = elements % kLanes;
    const double part = rest == 0 ? 0.0 : rest <= kHalfWidth<A> ? 0.5 : 1.0;
    return (static_cast<double>(elements / kLanes) + part) * static_cast<double>(filter_taps);
  }

  void choose_unfolding(const ConvMaxPool2dGeometry& g) {
    const int64_t padded_rows = max_of(g.pad_top + g.H, (g.OH - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1);
    padded_columns = max_of(g.pad_left + g.W, (g.OW - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1);
    unfolding = Unfolding::plain;
    double least = vectors_of(ceil_div(Cg, element_channels), g.R * g.S);
    // The others copy or add up pixels once more, which must pay; they know one channel an element.
    constexpr double kWorthwhile = 0.75;
    const int64_t block_rows = ceil_div(g.R, g.stride_h), block_columns = ceil_div(g.S, g.stride_w);
    if (element_channels == 1 && g.dilation_h == 1 && g.dilation_w == 1 && g.stride_h * g.stride_w > 1) {
      const double vectors = vectors_of(g.stride_h * g.stride_w * Cg, block_rows * block_columns);
      if (vectors < kWorthwhile * least) {
        least = vectors;
        unfolding = Unfolding::blocks;
      }
    }
    if (element_channels == 1 && g.dilation_w == 1 && g.S > 1) {
      const double vectors = vectors_of(g.S * Cg, g.R);
      if (vectors < kWorthwhile * least) unfolding = Unfolding::rows;
    }
    switch (unfolding) {
      case Unfolding::plain:
        depth = ceil_div(Cg, element_channels);
        tap_rows = g.R;
        tap_columns = g.S;
        tap_row_step = g.dilation_h;
        tap_column_step = g.dilation_w;
        row_step = g.stride_h;
        column_step = g.stride_w;
        rows = padded_rows;
        columns = padded_columns;
        break;
      case Unfolding::rows:
        depth = g.S * Cg;
        tap_rows = g.R;
        tap_columns = 1;
        tap_row_step = g.dilation_h;
        tap_column_step = 1;
        row_step = g.stride_h;
        column_step = 1;
        rows = padded_rows;
        columns = g.OW;
        break;
      case Unfolding::blocks:
        depth = g.stride_h * g.stride_w * Cg;
        tap_rows = block_rows;
        tap_columns = block_columns;
        tap_row_step = tap_column_step = row_step = column_step = 1;
        rows = max_of(ceil_div(padded_rows, g.stride_h), g.OH - 1 + tap_rows);
        columns = max_of(ceil_div(padded_columns, g.stride_w), g.OW - 1 + tap_columns);
        padded_columns = columns * g.stride_w;
        break;
    }
    taps = tap_rows * tap_columns;
    const int64_t rest = depth % kLanes;
    half_planes = rest > 0 && rest <= kHalfWidth<A> ? 1 : 0;
    full_planes = ceil_div(depth, kLanes) - half_planes;
    planes = full_planes + half_planes;
    row_elements = (full_planes * kLanes + half_planes * kHalfWidth<A>)*taps;
    image_elements = round_up((full_planes * kLanes + half_planes * kHalfWidth<A>)*rows * columns, 16);
  }

  // Planes in one part: several only where one alone would leave the registers empty.
  int64_t planes_together(int64_t width, int64_t most_vectors, int64_t present) const {
    const int64_t most_runs = min_of(kMaxRuns, max_of(1, most_vectors / width));
    return tap_rows * width >= 8 ? 1 : max_of(1, min_of(present, most_runs / tap_rows));
  }

  // limit(lanes): how many vectors a part may have. With `part_rows` = K a part's vectors of all k are together, as
  // grad_input reads them; with 1, all of a k's.
  template <class Limit>
  void make_parts(Parts& parts, int64_t part_splits, int64_t part_rows, const Limit& limit) {
    parts.count = 0;
    int64_t used_offsets = 0, first = 0;
    for (int64_t split = 0; split < part_splits; ++split) {
      const int64_t split_begin = planes * split / part_splits, split_end = planes * (split + 1) / part_splits;
      for (const bool half : {false, true}) {
        const int64_t begin = half ? max_of(split_begin, full_planes) : split_begin;
        const int64_t end = half ? split_end : min_of(split_end, full_planes);
        const int64_t lanes = half ? kHalfWidth<A> : kLanes;
        if (begin >= end) continue;
        const int64_t most = limit(lanes);
        const int64_t chunks =
            ceil_div(tap_columns, tap_column_step == 1 ? min_of(most, kMaxColumns) : 1);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const int64_t s = tap_columns * chunk / chunks, width = tap_columns * (chunk + 1) / chunks - s;
          const int64_t most_runs = min_of(kMaxRuns, max_of(1, most / width));
          const int64_t together = planes_together(width, most, end - begin);
          for (int64_t plane = begin; plane < end; plane += together) {
            const int64_t runs = min_of(together, end - plane) * tap_rows, pieces = ceil_div(runs, most_runs);
            for (int64_t piece = 0; piece < pieces; ++piece) {
              const int64_t piece_begin = runs * piece / pieces, piece_end = runs * (piece + 1) / pieces;
              int64_t* offsets = parts.offsets + used_offsets;
              const int64_t elements_of_part = (piece_end - piece_begin) * width * lanes;
              const int64_t step = part_rows > 1 ? elements_of_part : row_elements;
              int64_t place = first;
              parts.list[parts.count++] = {half, width, piece_end - piece_begin, offsets, first, step, split};
              for (int64_t run = piece_begin; run < piece_end; ++run) {
                const int64_t p = plane + run / tap_rows, r = run % tap_rows;
                const int64_t pixel = r * tap_row_step * columns + s * tap_column_step;
                parts.offsets[used_offsets++] =
                    (half ? 0 : plane_offset(p)) + pixel * lanes;
                for (int64_t i = 0; i < width; ++i, place += lanes) {
                  parts.places[p * taps + r * tap_columns + s + i] = place;
                  parts.steps[p * taps + r * tap_columns + s + i] = step;
                }
              }
              first += elements_of_part * part_rows;
            }
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace pyconv::cpu
