// The direct forward of conv_max_pool2d, for any way to multiply and to hold the operands:
//
//   x (N,C,H,W) -> patch (channels, rows, columns) -> conv (in registers, lanes along K) -> window max -> + bias
//   -> activation -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// A task is one image, one group and a chunk of pooled rows, for every k. Each output is computed by one task in one
// order, so results do not depend on the number of threads or on the chunking.
//
// The convolution is a register tile of (output positions) x (vectors of K): for each input channel and filter tap, a
// few vectors of weights are loaded and each position's input is broadcast. Weights are packed K-innermost. Inputs are
// read in place where a tile's positions lie side by side in memory (float or double, unit strides, no padding);
// otherwise a patch is packed first: in the form the products take, zero-padded, and split into `stride_w` phases so
// that neighbouring outputs read neighbouring elements whatever the stride.
//
// In registers: a tile is whole 2x2 windows; the convolution never leaves the registers. Where K fills the vectors
// badly (20 of 32 lanes), lanes are pairs: half as many k, each for both columns of a window. Else rows of convolution
// outputs go to a scratch buffer that stays in cache; the pooling reads them there.
#pragma once

#include "conv_max_pool2d_forward_epilogue.h"
#include "conv_max_pool2d_forward_tasks.h"
#include "conv_max_pool2d_forward_weights.h"
#include "operands.h"
#include "parallel.h"

namespace pyconv::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32 registers; weights take up to 3, inputs are broadcast from memory
#elif defined(__AVX2__)
constexpr int kAccumulators = 12;  // of 16 registers
#else
constexpr int kAccumulators = 8;
#endif

constexpr int64_t kTaskBytes = 384 * 1024;  // scratch of a task: stays in a core's L2 with room for the weights
constexpr int64_t kConvBytes = 64 * 1024;   // convolution rows that wait for their pooling

template <class T>
struct WidenedDirectOperands : WidenedOperands<T> {
  using A = Accumulator<T>;
  static constexpr int64_t kMaxTerms = 256;  // of one running sum, in whole channels: long ones lose digits

  static Vec<A> multiply_add(Vec<A> x, Vec<A> w, Vec<A> sum) { return fma(x, w, sum); }

  // Weights of output channels [first_k, first_k + count), count <= kWidth, and all input channels of their group:
  // element (c, tap) goes to out + (c * R * S + tap) * out_stride. Lane i is channel first_k + i, or first_k + i / 2
  // with `pairs`; lanes beyond `count` are zero.
  static void load_weights(const ConvMaxPool2dForwardParams& p, int64_t first_k, int64_t count, bool pairs,
                           int64_t out_stride, A* out) {
    pyconv::cpu::load_weights<T>(p, first_k, count, 0, p.geometry.C / p.geometry.groups, pairs, out_stride, out);
  }
};

template <class A>
struct Plan {
  static constexpr int64_t kLanes = kWidth<A>;

  const ConvMaxPool2dGeometry& g;
  bool in_registers;  // direct_pool2x2
  bool pairs;         // lanes 2i and 2i + 1 of a vector are the two columns of a window, for the same k
  int64_t vector_k;   // k of a vector: its lanes, or half of them
  int64_t Cg, Kg, taps;
  KBlocks k_blocks;
  int64_t block_lanes;  // lanes of the widest block of K
  int64_t channels;     // elements of the patch along the input channels
  bool in_place;        // input is read without a patch
  int64_t patch_columns, patch_row, channel_stride;  // of the patch: of a phase, of all phases, of all rows
  int64_t conv_step, conv_capacity;  // generic: convolution rows computed at a time, and kept
  int64_t chunk, chunks;  // pooled rows of a task; tasks along PH
  int64_t tasks, workers;
  // Workspace, in elements of A: weights, of each worker while they are small, and which workers have theirs; then the
  // terms' offsets (int64); then per worker: patch, conv, values, argmax, pre-activation.
  int64_t weight_elements, patch_elements, conv_elements, result_elements, worker_elements;
  Copies weight_copies;

  Plan(const ConvMaxPool2dForwardParams& p, bool registers, int64_t channels_per_element)
      : g(p.geometry),
        in_registers(registers),
        // A vector of pairs does two columns at once, so that it pays where it takes fewer than twice as many.
        pairs(kHasPairs<A> && registers && ceil_div(2 * g.K / g.groups, kLanes) < 2 * ceil_div(g.K / g.groups, kLanes)),
        vector_k(pairs ? kLanes / 2 : kLanes),
        k_blocks(ceil_div(g.K / g.groups, vector_k)) {
    Cg = g.C / g.groups;
    channels = ceil_div(Cg, channels_per_element);
    Kg = g.K / g.groups;
    taps = g.R * g.S;
    block_lanes = result_lanes(k_blocks.widest());
    const bool covered = g.pad_top == 0 && g.pad_left == 0 &&
                         (g.OH - 1) * g.stride_h + (g.R - 1) * g.dilation_h < g.H &&
                         (g.OW - 1) * g.stride_w + (g.S - 1) * g.dilation_w < g.W;
    in_place = !is_reduced(p.dtype) && covered && g.stride_w == 1 && p.input_strides.w == 1;
    patch_columns = g.OW + ((g.S - 1) * g.dilation_w) / g.stride_w;
    patch_row = patch_columns * g.stride_w;
    conv_step = max_of(1, kConvBytes / (g.OW * block_lanes * static_cast<int64_t>(sizeof(A))));
    conv_step = min_of(conv_step, g.OH);
    // What is kept when a pooled row is still incomplete is less than its window.
    conv_capacity = min_of(g.OH, conv_step + (g.pool_h - 1) * g.pool_dilation_h);
    chunk = g.PH;
    while (chunk > 1 && task_bytes(chunk) > kTaskBytes) chunk = ceil_div(chunk, 2);
    chunk = pooled_rows_of_task(g, chunk, p.threads.num_threads);
    chunks = ceil_div(g.PH, chunk);
    tasks = forward_tasks(g, chunk);
    workers = max_of(1, min_of(p.threads.num_threads, tasks));
    weight_elements = g.groups * k_blocks.vectors * kLanes * channels * taps;
    weight_copies = Copies(weight_bytes(), workers);
    patch_elements = patch_size(chunk);
    channel_stride = patch_rows(conv_rows(chunk)) * patch_row;
    conv_elements = in_registers ? 0 : round_up(conv_capacity * g.OW * block_lanes, 16);
    result_elements = result_size(chunk);
    worker_elements = patch_elements + conv_elements + 3 * result_elements;
  }

  // Lanes that the results of a block of `vectors` take.
  int64_t result_lanes(int64_t vectors) const { return round_up(vectors * vector_k, kLanes); }

  // Convolution rows under `rows` pooled rows.
  int64_t conv_rows(int64_t rows) const {
    return min_of(g.OH, (rows - 1) * g.pool_stride_h + (g.pool_h - 1) * g.pool_dilation_h + 1);
  }
  int64_t patch_rows(int64_t rows_of_conv) const {
    return (rows_of_conv - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1;
  }
  int64_t patch_size(int64_t rows) const {
    return in_place ? 0 : round_up(channels * patch_rows(conv_rows(rows)) * patch_row, 16);
  }
  int64_t result_size(int64_t rows) const {
    const int64_t most = in_registers ? rows : most_pooled_rows(g, conv_capacity);
    return round_up(most * g.PW * block_lanes, 16);
  }
  int64_t task_bytes(int64_t rows) const {
    return (patch_size(rows) + 2 * result_size(rows)) * static_cast<int64_t>(sizeof(A));
  }
  int64_t offset_bytes() const { return round_up(channels * taps * static_cast<int64_t>(sizeof(int64_t)), 64); }
  int64_t weight_bytes() const { return round_up(weight_elements * static_cast<int64_t>(sizeof(A)), 64); }
  int64_t workspace_bytes() const {
    return weight_copies.count() * weight_bytes() + weight_copies.flag_bytes() + offset_bytes() +
           workers * worker_elements * static_cast<int64_t>(sizeof(A));
  }
};

// What a tile reads: input of the tile's first position, and how to get from there to others.
template <class A>
struct TileInput {
  int64_t row_step;        // input of the next convolution row
  const int64_t* offsets;  // (terms,): input of a term, a channel and a filter tap
  int64_t terms, terms_per_sum;
};

// totals = acc, or totals += acc with `more`; acc = 0.
template <class A, int KV, int ROWS, int COLUMNS>
__attribute__((always_inline)) inline void flush_sums(Vec<A> (&acc)[ROWS][COLUMNS][KV], bool more, A* totals) {
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        A* total = totals + ((i * COLUMNS + j) * KV + v) * kWidth<A>;
        if (more) acc[i][j][v] = add(load(total), acc[i][j][v]);
        store(total, acc[i][j][v]);
        acc[i][j][v] = zero<A>();
      }
    }
  }
}

template <class A, int KV, int ROWS, int COLUMNS>
__attribute__((always_inline)) inline void add_totals(const A* totals, Vec<A> (&acc)[ROWS][COLUMNS][KV]) {
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        acc[i][j][v] = add(load(totals + ((i * COLUMNS + j) * KV + v) * kWidth<A>), acc[i][j][v]);
      }
    }
  }
}

// acc[row][column][v] = sum over channels and taps of weight vector v times the input of position (row, column). With
// PAIRS a column stands for two: its vector holds the inputs of both in turn.
template <class Operands, bool PAIRS, class A, int KV, int ROWS, int COLUMNS>
__attribute__((always_inline)) inline void convolve_tile(const A* in, const A* weights, const TileInput<A>& t,
                                                         Vec<A> (&acc)[ROWS][COLUMNS][KV]) {
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) acc[i][j][v] = zero<A>();
    }
  }
  A totals[ROWS * COLUMNS * KV * kWidth<A>];
  const int64_t row_step = t.row_step;
  for (int64_t term = 0, sum_end = 0; term < t.terms;) {
    if (term > 0) flush_sums(acc, term > t.terms_per_sum, totals);
    sum_end = min_of(t.terms, sum_end + t.terms_per_sum);
    for (; term < sum_end; ++term, weights += KV * kWidth<A>) {
      const A* x = in + t.offsets[term];
      Vec<A> w[KV];
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) w[v] = load(weights + v * kWidth<A>);
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i) {
        const A* row = x + i * row_step;
        // Else the columns' distances from x are worked out ahead of the loop, more of them than there are registers.
        __asm__("" : "+r"(row));
#pragma GCC unroll 32
        for (int j = 0; j < COLUMNS; ++j) {
          Vec<A> value;
          if constexpr (PAIRS) {
            value = broadcast_pair(row + 2 * j);
          } else {
            value = broadcast(row[j]);
          }
#pragma GCC unroll 32
          for (int v = 0; v < KV; ++v) acc[i][j][v] = Operands::multiply_add(value, w[v], acc[i][j][v]);
        }
      }
    }
  }
  if (t.terms > t.terms_per_sum) add_totals(totals, acc);
}

// Everything between the packed (or in-place) input and the results of a k-block: knows accumulators only.
template <class Operands>
class BlockKernel {
  using A = typename Operands::A;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  BlockKernel(const ConvMaxPool2dForwardParams& params, const Plan<A>& plan)
      : plan_(plan), g_(plan.g), epilogue_(params) {}

  const Epilogue<A>& epilogue() const { return epilogue_; }

  // direct_pool2x2: pooled rows, the first of which reads from `in` on.
  template <int KV>
  void pooled_rows(const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV], int64_t rows,
                   const Results<A>& out) const {
    for (int64_t i = 0; i < rows; ++i) {
      const A* row = in + 2 * i * tile.row_step;
      if constexpr (kHasPairs<A>) {
        if (plan_.pairs) {
          pooled_row<true, KV, max_windows(kAccumulators / (2 * KV))>(row, weights, tile, bias, i * g_.PW, out);
          continue;
        }
      }
      pooled_row<false, KV, max_windows(kAccumulators / (4 * KV))>(row, weights, tile, bias, i * g_.PW, out);
    }
  }

  // One row of convolution outputs (OW, lanes) in tiles of at most kAccumulators / KV columns, as even as possible.
  template <int KV>
  void convolve_row(const A* in, const A* weights, const TileInput<A>& tile, A* row) const {
    constexpr int kColumns = kAccumulators / KV;
    const int64_t tiles = ceil_div(g_.OW, kColumns);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = g_.OW * t / tiles, count = g_.OW * (t + 1) / tiles - first;
      convolve_columns<KV, kColumns>(count, in + first, weights, tile, row + first * KV * kLanes);
    }
  }

 private:
  // More windows than these gain nothing: twelve accumulators hide the latency of the multiply-add.
  static constexpr int max_windows(int fit) { return fit < 1 ? 1 : fit > 6 ? 6 : fit; }

  // A pooled row of 2x2 windows in tiles of at most MAX windows, as even as possible; row_index: its first window's
  // place in the results.
  template <bool PAIRS, int KV, int MAX>
  void pooled_row(const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV], int64_t row_index,
                  const Results<A>& out) const {
    const int64_t tiles = ceil_div(g_.PW, MAX);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = g_.PW * t / tiles, count = g_.PW * (t + 1) / tiles - first;
      pooled_tile<PAIRS, KV, MAX>(count, in + 2 * first, weights, tile, bias, row_index + first, out);
    }
  }

  template <bool PAIRS, int KV, int WINDOWS>
  void pooled_tile(int64_t count, const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV],
                   int64_t index, const Results<A>& out) const {
    if constexpr (WINDOWS > 1) {
      if (count < WINDOWS) return pooled_tile<PAIRS, KV, WINDOWS - 1>(count, in, weights, tile, bias, index, out);
    }
    tile_2x2<PAIRS, KV, WINDOWS>(in, weights, tile, bias, index, out);
  }

  // Sums have a NaN where an output has one (or infinities of both signs): then maxima are found by the longer rule.
  template <bool PAIRS, int KV, int WINDOWS>
  void tile_2x2(const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV], int64_t index,
                const Results<A>& out) const {
    constexpr int kColumns = PAIRS ? WINDOWS : 2 * WINDOWS;
    Vec<A> acc[2][kColumns][KV];
    convolve_tile<Operands, PAIRS, A, KV, 2, kColumns>(in, weights, tile, acc);
    if (any(is_nan(sum_of(acc)))) {
      pool_tile<PAIRS, true>(acc, bias, index, out);
    } else {
      pool_tile<PAIRS, false>(acc, bias, index, out);
    }
  }

  template <bool PAIRS, bool NAN_TOO, int KV, int COLUMNS>
  void pool_tile(const Vec<A> (&acc)[2][COLUMNS][KV], const Vec<A> (&bias)[KV], int64_t index,
                 const Results<A>& out) const {
    if constexpr (PAIRS) {
      pool_2x2_pairs<NAN_TOO>(acc, bias, index, out);
    } else {
      pool_2x2<NAN_TOO>(acc, bias, index, out);
    }
  }

  template <bool NAN_TOO, int KV, int COLUMNS>
  void pool_2x2(const Vec<A> (&acc)[2][COLUMNS][KV], const Vec<A> (&bias)[KV], int64_t index,
                const Results<A>& out) const {
#pragma GCC unroll 32
    for (int w = 0; w < COLUMNS / 2; ++w) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        epilogue_.template finish_2x2<NAN_TOO>(acc[0][2 * w][v], acc[0][2 * w + 1][v], acc[1][2 * w][v],
                                               acc[1][2 * w + 1][v], bias[v], out,
                                               (index + w) * out.lanes + v * kLanes);
      }
    }
  }

  // With vectors of pairs the even lanes end up with the results, and two vectors' are joined.
  template <bool NAN_TOO, int KV, int WINDOWS>
  void pool_2x2_pairs(const Vec<A> (&acc)[2][WINDOWS][KV], const Vec<A> (&bias)[KV], int64_t index,
                      const Results<A>& out) const {
#pragma GCC unroll 32
    for (int w = 0; w < WINDOWS; ++w) {
      Vec<A> best[KV + 1], position[KV + 1];
      best[KV] = position[KV] = zero<A>();
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        best[v] = acc[0][w][v];
        position[v] = zero<A>();
        take_larger<NAN_TOO>(swap_pairs(acc[0][w][v]), 1, best[v], position[v]);
        take_larger<NAN_TOO>(acc[1][w][v], 2, best[v], position[v]);
        take_larger<NAN_TOO>(swap_pairs(acc[1][w][v]), 3, best[v], position[v]);
      }
#pragma GCC unroll 32
      for (int v = 0; v < KV; v += 2) {
        epilogue_.finish(even_lanes(best[v], best[v + 1]), even_lanes(position[v], position[v + 1]), bias[v / 2], out,
                         (index + w) * out.lanes + v / 2 * kLanes);
      }
    }
  }

  template <int COLUMNS, int KV>
  static Vec<A> sum_of(const Vec<A> (&acc)[2][COLUMNS][KV]) {
    Vec<A> sum = zero<A>();
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 32
      for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
        for (int v = 0; v < KV; ++v) sum = add(sum, acc[i][j][v]);
      }
    }
    return sum;
  }

  template <int KV, int COLUMNS>
  void convolve_columns(int64_t count, const A* in, const A* weights, const TileInput<A>& tile, A* target) const {
    if constexpr (COLUMNS > 1) {
      if (count < COLUMNS) return convolve_columns<KV, COLUMNS - 1>(count, in, weights, tile, target);
    }
    Vec<A> acc[1][COLUMNS][KV];
    convolve_tile<Operands, false, A, KV, 1, COLUMNS>(in, weights, tile, acc);
#pragma GCC unroll 32
    for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) store(target + (j * KV + v) * kLanes, acc[0][j][v]);
    }
  }

  const Plan<A>& plan_;
  const ConvMaxPool2dGeometry& g_;
  const Epilogue<A> epilogue_;
};

template <class Operands>
class DirectForward {
  using T = typename Operands::Storage;
  using A = typename Operands::A;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  DirectForward(const ConvMaxPool2dForwardParams& params, bool in_registers)
      : p_(params), plan_(params, in_registers, Operands::kChannels), g_(plan_.g), kernel_(params, plan_) {
    char* workspace = static_cast<char*>(params.workspace);
    weights_ = workspace;
    workspace += plan_.weight_copies.count() * plan_.weight_bytes();
    packed_ = reinterpret_cast<uint8_t*>(workspace);
    offsets_ = reinterpret_cast<int64_t*>(workspace + plan_.weight_copies.flag_bytes());
    scratch_ = reinterpret_cast<A*>(workspace + plan_.weight_copies.flag_bytes() + plan_.offset_bytes());
  }

  void run() {
    fill_offsets();
    const Copies& copies = plan_.weight_copies;
    const int64_t vectors = g_.groups * plan_.k_blocks.vectors;
    const auto pack = [&](int64_t task, int64_t worker) { pack_weights(task, weights_of(worker)); };
    copies.clear(packed_);
    const auto convolve = [&](int64_t task, int64_t worker) {
      copies.make_once(packed_, worker, [&] {
        for (int64_t vector = 0; vector < vectors; ++vector) pack(vector, worker);
      });
      run_task(task, weights_of(worker), scratch_ + worker * plan_.worker_elements);
    };
    parallel_steps(p_.threads, plan_.workers, Tasks{copies.own() ? 0 : vectors, pack}, Barrier(),
                   Tasks{plan_.tasks, convolve});
  }

 private:
  void fill_offsets() {
    int64_t* offset = offsets_;
    for (int64_t c = 0; c < plan_.channels; ++c) {
      for (int64_t r = 0; r < g_.R; ++r) {
        for (int64_t s = 0; s < g_.S; ++s) {
          const int64_t row = r * g_.dilation_h, column = s * g_.dilation_w;
          *offset++ = plan_.in_place
                          ? c * p_.input_strides.c + row * p_.input_strides.h + column
                          : c * plan_.channel_stride + row * plan_.patch_row +
                                column % g_.stride_w * plan_.patch_columns + column / g_.stride_w;
        }
      }
    }
  }

  // weight (K, Cg, R, S) -> per group and k-block: (channels, R*S, lanes of the block), zero beyond K. A task is a
  // vector of K.
  void pack_weights(int64_t task, A* weights) const {
    const int64_t group = task / plan_.k_blocks.vectors, vector = task % plan_.k_blocks.vectors;
    const KBlock block = plan_.k_blocks.of(vector);
    const int64_t first_k = vector * plan_.vector_k;
    Operands::load_weights(p_, group * plan_.Kg + first_k, min_of(plan_.vector_k, plan_.Kg - first_k), plan_.pairs,
                           block.vectors * kLanes,
                           weights + block_offset(group, block) + (vector - block.first_vector) * kLanes);
  }

  A* weights_of(int64_t worker) const {
    return reinterpret_cast<A*>(weights_ + plan_.weight_copies.of(worker) * plan_.weight_bytes());
  }

  int64_t block_offset(int64_t group, const KBlock& block) const {
    return (group * plan_.k_blocks.vectors + block.first_vector) * kLanes * plan_.channels * plan_.taps;
  }

  // Input rows of convolution rows [row, row + rows) -> patch (channels, rows, phases, columns), zero-padded.
  void pack_patch(int64_t n, int64_t group, int64_t row, int64_t rows, A* patch) const {
    const Strides4 st = p_.input_strides;
    const T* image = static_cast<const T*>(p_.input) + n * st.n + group * plan_.Cg * st.c;
    const int64_t first = row * g_.stride_h - g_.pad_top, count = plan_.patch_rows(rows);
    if (st.c == 1 && g_.stride_w == 1 && plan_.channels > 1) return pack_patch_of_pixels(image, first, count, patch);
    for (int64_t phase = 0; phase < g_.stride_w; ++phase) {
      // Column j of this phase holds input column j * stride_w + shift.
      const int64_t shift = phase - g_.pad_left, columns = plan_.patch_columns, step = g_.stride_w * st.w;
      const int64_t begin = shift >= 0 ? 0 : min_of(columns, ceil_div(-shift, g_.stride_w));
      const int64_t end =
          shift >= g_.W ? begin : max_of(begin, min_of(columns, (g_.W - 1 - shift) / g_.stride_w + 1));
      for (int64_t c = 0; c < plan_.channels; ++c) {
        const T* source = image + c * Operands::kChannels * st.c + shift * st.w + begin * step;
        A* target = patch + c * plan_.channel_stride + phase * columns;
        for (int64_t h = first; h < first + count; ++h, target += plan_.patch_row) {
          if (h < 0 || h >= g_.H) {
            for (int64_t j = 0; j < columns; ++j) target[j] = A(0);
            continue;
          }
          for (int64_t j = 0; j < begin; ++j) target[j] = A(0);
          load_row(source + h * st.h, step, plan_.Cg - c * Operands::kChannels, end - begin, target + begin);
          for (int64_t j = end; j < columns; ++j) target[j] = A(0);
        }
      }
    }
  }

  // `count` pixels, `step` apart.
  void load_row(const T* from, int64_t step, int64_t channels, int64_t count, A* target) const {
    const int64_t channel_stride = p_.input_strides.c;
    int64_t j = 0;
    if (step == 1) {
      for (; j + kLanes <= count; j += kLanes) {
        store(target + j, Operands::load_row(from + j, channel_stride, channels, kLanes));
      }
      if (j < count) {
        store_partial(target + j, Operands::load_row(from + j, channel_stride, channels, count - j), count - j);
      }
      return;
    }
    for (; j < count; ++j) target[j] = Operands::element(from + j * step, channel_stride, channels);
  }

  // The same from channels-last memory and without phases: blocks of pixels and channels are transposed.
  void pack_patch_of_pixels(const T* image, int64_t first, int64_t count, A* patch) const {
    const Strides4 st = p_.input_strides;
    const int64_t begin = min_of(g_.pad_left, plan_.patch_columns);
    const int64_t end = max_of(begin, min_of(plan_.patch_columns, g_.pad_left + g_.W));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h = first + i;
      const bool inside = h >= 0 && h < g_.H;
      for (int64_t c = 0; c < plan_.channels; ++c) {
        A* target = patch + c * plan_.channel_stride + i * plan_.patch_row;
        for (int64_t j = 0; j < (inside ? begin : plan_.patch_columns); ++j) target[j] = A(0);
        for (int64_t j = end; inside && j < plan_.patch_columns; ++j) target[j] = A(0);
      }
      if (!inside) continue;
      for (int64_t j = begin; j < end; j += kLanes) {
        const int64_t pixels = min_of(kLanes, end - j);
        const T* source = image + h * st.h + (j - g_.pad_left) * st.w;
        for (int64_t c = 0; c < plan_.channels; c += kLanes) {
          const int64_t channels = min_of(kLanes, plan_.channels - c), first_c = c * Operands::kChannels;
          Vec<A> block[kLanes];
          for (int64_t pixel = 0; pixel < kLanes; ++pixel) {
            block[pixel] = pixel < pixels ? Operands::load_pixel(source + pixel * st.w + first_c, plan_.Cg - first_c)
                                          : zero<A>();
          }
          transpose(block);
          for (int64_t channel = 0; channel < channels; ++channel) {
            A* target = patch + (c + channel) * plan_.channel_stride + i * plan_.patch_row + j;
            store_partial(target, block[channel], pixels);
          }
        }
      }
    }
  }

  void run_task(int64_t task, const A* weights, A* scratch) {
    const int64_t n = task / (g_.groups * plan_.chunks), group = task / plan_.chunks % g_.groups;
    const int64_t first_row = task % plan_.chunks * plan_.chunk;
    const int64_t rows = min_of(plan_.chunk, g_.PH - first_row);
    const int64_t conv_begin = max_of(0, first_row * g_.pool_stride_h - g_.pool_pad_h);
    const int64_t conv_end = min_of(g_.OH, (first_row + rows - 1) * g_.pool_stride_h - g_.pool_pad_h +
                                               (g_.pool_h - 1) * g_.pool_dilation_h + 1);
    const int64_t conv_rows = max_of(0, conv_end - conv_begin);

    TileInput<A> tile{};
    tile.offsets = offsets_;
    tile.terms = plan_.channels * plan_.taps;
    tile.terms_per_sum = max_of(1, Operands::kMaxTerms / plan_.taps) * plan_.taps;
    const A* in = nullptr;
    if (plan_.in_place) {
      const Strides4 st = p_.input_strides;
      in = reinterpret_cast<const A*>(p_.input) + n * st.n + group * plan_.Cg * st.c + conv_begin * g_.stride_h * st.h;
      tile.row_step = g_.stride_h * st.h;
    } else if (conv_rows > 0) {
      pack_patch(n, group, conv_begin, conv_rows, scratch);
      in = scratch;
      tile.row_step = g_.stride_h * plan_.patch_row;
    }
    A* conv = scratch + plan_.patch_elements;
    A* results = conv + plan_.conv_elements;

    for (int64_t b = 0; b < plan_.k_blocks.count; ++b) {
      const KBlock block = plan_.k_blocks[b];
      const int64_t block_k = block.first_vector * plan_.vector_k;
      Block work{n, group * plan_.Kg + block_k, min_of(block.vectors * plan_.vector_k, plan_.Kg - block_k),
                 first_row, rows, conv_begin, conv_end, weights + block_offset(group, block),
                 {results, p_.argmax != nullptr ? results + plan_.result_elements : nullptr,
                  p_.pre_activation != nullptr ? results + 2 * plan_.result_elements : nullptr,
                  plan_.result_lanes(block.vectors)}};
      switch (block.vectors) {
        case 1:
          run_block<1>(work, in, tile, conv);
          break;
        case 2:
          run_block<2>(work, in, tile, conv);
          break;
        default:
          run_block<kMaxKVectors>(work, in, tile, conv);
      }
    }
  }

  // One k-block of a task: channels [first_k, first_k + k_count) of pooled rows [first_row, first_row + rows).
  struct Block {
    int64_t n, first_k, k_count;
    int64_t first_row, rows, conv_begin, conv_end;
    const A* weights;
    Results<A> out;
  };

  template <int KV>
  void run_block(const Block& work, const A* in, const TileInput<A>& tile, A* conv) const {
    const Epilogue<A>& epilogue = kernel_.epilogue();
    A bias_lanes[KV * kLanes];
    epilogue.load_bias(work.first_k, work.k_count, KV * kLanes, bias_lanes);
    Vec<A> bias[KV];
    for (int v = 0; v < KV; ++v) bias[v] = load(bias_lanes + v * kLanes);
    if (plan_.in_registers) {
      kernel_.template pooled_rows<KV>(in, work.weights, tile, bias, work.rows, work.out);
      epilogue.write_results(work.n, work.first_k, work.k_count, work.first_row, work.rows, work.out);
      return;
    }
    // Convolution rows are pooled as soon as their windows are complete, and kept as long as one needs them.
    const int64_t row_elements = g_.OW * KV * kLanes, last_row = work.first_row + work.rows;
    int64_t kept = work.conv_begin, ready = work.conv_begin, row = work.first_row;
    while (row < last_row) {
      const int64_t stop = min_of(work.conv_end, ready + plan_.conv_step);
      for (; ready < stop; ++ready) {
        kernel_.template convolve_row<KV>(in + (ready - work.conv_begin) * tile.row_step, work.weights, tile,
                                          conv + (ready - kept) * row_elements);
      }
      const int64_t complete = ready >= work.conv_end ? last_row : min_of(last_row, epilogue.complete_rows(ready));
      if (complete > row) {
        epilogue.template pool_rows<KV>(conv, row_elements, bias, row, complete - row, kept, work.out);
        epilogue.write_results(work.n, work.first_k, work.k_count, row, complete - row, work.out);
        row = complete;
      }
      const int64_t needed = max_of(kept, min_of(ready, epilogue.first_conv_row(row)));
      std::memmove(conv, conv + (needed - kept) * row_elements,
                   static_cast<size_t>((ready - needed) * row_elements) * sizeof(A));
      kept = needed;
    }
  }

  const ConvMaxPool2dForwardParams& p_;
  const Plan<A> plan_;
  const ConvMaxPool2dGeometry& g_;
  char* weights_;    // (copies, weight_bytes)
  uint8_t* packed_;  // which copies are made
  int64_t* offsets_;
  A* scratch_;
  const BlockKernel<Operands> kernel_;
};

}  // namespace
}  // namespace pyconv::cpu
