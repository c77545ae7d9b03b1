// What the backward of conv_max_pool2d keeps in its workspace, and how large the pieces of work are.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kChunkBytes = 4 * 1024 * 1024;  // lists and scratch images of the images in flight
constexpr int64_t kBandBytes = 24 * 1024;         // input rows under a band of pooled rows: stays in L1
constexpr int kMaxRegisters = 8;                  // vectors of a weight row accumulated at once
constexpr int64_t kListSlack = 8;                 // entries a vector of windows may write beyond the end of a list
constexpr int64_t kRangesPerThread = 4;           // grad_weight tasks per thread: evens out the load
constexpr int64_t kMinInputTasks = 8;             // a small batch is split along the channels for as many tasks
constexpr int64_t kMinBlockChannels = 16;         // of such a split
constexpr int64_t kSpanWindows = 128;             // windows summed in registers before they join a grad_weight row
constexpr int64_t kSpanBytes = 24 * 1024;         // scratch images under them: stay in L1

// A live window: the pixel of the padded image where its patch begins, and the gradient there.
template <class A>
struct Window {
  int64_t pixel;
  A gradient;
};

// One k's share in the gradient of a patch.
template <class A>
struct Share {
  int64_t weights;  // offset of the k's row of weights
  A gradient;
};

// The shares of one patch: up to `end` in the sorted list of a band.
struct Patch {
  int64_t pixel;
  int64_t end;
};

// A run of at most one vector of a patch.
struct PatchVector {
  int64_t offset;  // from the patch's first element
  int64_t lanes;   // how many of its lanes belong to the patch
};

// Input channels [begin, begin + count) of every group: the share of one grad_input task.
template <class A>
struct ChannelBlock {
  int64_t begin, count;
  int64_t vectors;
  PatchVector* patch;  // (vectors,)
  int32_t* indices;    // (vectors, lanes): where in a row of weights in memory
  A* weights;          // (K, vectors, lanes)
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
  int64_t rows, columns;       // of the padded image, as far as any patch reaches
  int64_t image_elements;      // of one group of it, with room for a vector to run over the end
  int64_t windows;             // per (n, k)
  int64_t list_stride;         // entries of the list of one (n, k)
  int64_t band_rows, bands;    // pooled rows of a band
  int64_t span;                // images that a grad_weight row sums in registers
  int64_t images;              // of a chunk: a multiple of span
  int64_t band_pixels;         // where patches of a band can begin
  int64_t range, ranges;       // of k, per group: grad_weight tasks
  int64_t channel_blocks;
  int64_t workers;
  ChannelBlock<A> whole;       // all channels: for grad_weight
  ChannelBlock<A>* blocks;     // for grad_input
  A* weight_sums;              // (K, vectors of `whole`, lanes)
  double* bias_sums;           // (K,)
  A* packed_input;             // (images, groups, image_elements)
  int32_t* weight_indices;     // (Cg*R*S,): where the sums of a weight row hold the element at that place in memory
  int64_t* position_pixels;    // (pool_h * pool_w,): pixels from a window's first patch to a position's
  Window<A>* lists;            // (images, K, list_stride)
  int64_t* list_ends;          // (images, K, bands): end of each band in its list
  double* bias_parts;          // (images, K)
  A* grad_images;              // (workers, image_elements)
  int64_t* pixel_counts;       // (workers, band_pixels)
  Patch* patches;              // (workers, band_pixels)
  Share<A>* shares;            // (workers, Kg * windows of a band)
  int64_t bytes;

  Layout(const ConvMaxPool2dBackwardParams& p, void* base) {
    const ConvMaxPool2dGeometry& g = p.geometry;
    Cg = g.C / g.groups;
    Kg = g.K / g.groups;
    rows = max_of(g.pad_top + g.H, (g.OH - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1);
    columns = max_of(g.pad_left + g.W, (g.OW - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1);
    image_elements = round_up(rows * columns * Cg + kLanes, 16);
    windows = g.PH * g.PW;
    list_stride = windows + kListSlack;
    const auto band_bytes = [&](int64_t pooled_rows) {
      const int64_t conv_rows = (pooled_rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h;
      return (conv_rows * g.stride_h + (g.R - 1) * g.dilation_h + 1) * columns * Cg * static_cast<int64_t>(sizeof(A));
    };
    band_rows = g.PH;
    while (band_rows > 1 && band_bytes(band_rows) > kBandBytes) band_rows = ceil_div(band_rows, 2);
    bands = ceil_div(g.PH, band_rows);

    band_pixels =
        (((band_rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h) * g.stride_h + 1) * columns;

    const int64_t threads = max_of(1, p.threads.num_threads);
    const int64_t per_image = (p.grad_weight != nullptr ? g.groups * image_elements * int64_t(sizeof(A)) : 0) +
                              g.K * (list_stride * int64_t(sizeof(Window<A>)) + bands * int64_t(sizeof(int64_t)));
    span = min_of(ceil_div(kSpanWindows, windows), max_of(1, kSpanBytes / (image_elements * int64_t(sizeof(A)))));
    images = min_of(g.N, round_up(max_of(threads, kChunkBytes / per_image), span));
    range = max_of(1, ceil_div(Kg, max_of(1, ceil_div(threads > 1 ? threads * kRangesPerThread : 1, g.groups))));
    ranges = ceil_div(Kg, range);
    // By shape, not by threads: the blocks decide in which order a pixel's shares are added.
    channel_blocks = p.grad_input == nullptr
                         ? 0
                         : max_of(1, min_of(Cg / kMinBlockChannels, ceil_div(kMinInputTasks, g.N * g.groups)));
    const int64_t block_channels = channel_blocks == 0 ? 0 : ceil_div(Cg, channel_blocks);
    if (channel_blocks > 0) channel_blocks = ceil_div(Cg, block_channels);
    workers = threads;

    Carver carver(base);
    whole.begin = 0;
    whole.count = Cg;
    whole.vectors = patch_vectors(g, Cg, nullptr);
    whole.patch = carver.take<PatchVector>(whole.vectors);
    weight_sums = carver.take<A>(p.grad_weight != nullptr ? g.K * whole.vectors * kLanes : 0);
    blocks = carver.take<ChannelBlock<A>>(channel_blocks);
    for (int64_t b = 0; b < channel_blocks; ++b) {
      ChannelBlock<A> block;
      block.begin = b * block_channels;
      block.count = min_of(block_channels, Cg - block.begin);
      block.vectors = patch_vectors(g, block.count, nullptr);
      block.patch = carver.take<PatchVector>(block.vectors);
      block.indices = carver.take<int32_t>(block.vectors * kLanes);
      block.weights = carver.take<A>(g.K * block.vectors * kLanes);
      if (base != nullptr) blocks[b] = block;
    }
    bias_sums = carver.take<double>(g.K);
    weight_indices = carver.take<int32_t>(p.grad_weight != nullptr ? Cg * g.R * g.S + kLanes : 0);
    position_pixels = carver.take<int64_t>(max_of(8, g.pool_h * g.pool_w));
    packed_input = carver.take<A>(p.grad_weight != nullptr ? images * g.groups * image_elements : 0);
    lists = carver.take<Window<A>>(images * g.K * list_stride);
    list_ends = carver.take<int64_t>(images * g.K * bands);
    bias_parts = carver.take<double>(images * g.K);
    const int64_t scatterers = p.grad_input != nullptr ? workers : 0;
    grad_images = carver.take<A>(scatterers * image_elements);
    pixel_counts = carver.take<int64_t>(scatterers * band_pixels);
    patches = carver.take<Patch>(scatterers * band_pixels);
    shares = carver.take<Share<A>>(scatterers * Kg * band_rows * g.PW);
    bytes = carver.used();
  }

  // Splits a patch of `channels` channels into vectors; how many there are. `out` may be null.
  int64_t patch_vectors(const ConvMaxPool2dGeometry& g, int64_t channels, PatchVector* out) const {
    const bool joined = g.dilation_w == 1;  // the taps of a filter row are neighbours
    const int64_t runs = joined ? g.R : g.R * g.S, length = joined ? g.S * channels : channels;
    int64_t count = 0;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t r = joined ? run : run / g.S, s = joined ? 0 : run % g.S;
      const int64_t begin = (r * g.dilation_h * columns + s * g.dilation_w) * channels;
      for (int64_t i = 0; i < length; i += kLanes, ++count) {
        if (out != nullptr) out[count] = {begin + i, min_of(kLanes, length - i)};
      }
    }
    return count;
  }
};

}  // namespace
}  // namespace pyconv::cpu
