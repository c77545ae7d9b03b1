// Forward of conv_max_pool2d. Compiled once per ISA.
//
//   x (N,C,H,W) -> patch (Cg, rows, columns) -> conv (in registers, lanes along K) -> window max -> + bias -> activation
//   -> y (N,K,PH,PW), argmax (N,K,PH,PW)
//
// A task is one image, one group and a chunk of pooled rows, for every k. Each output is computed by one task in one
// order, so results do not depend on the number of threads or on the chunking.
//
// The convolution is a register tile of (output positions) x (vectors of K): for each input channel and filter tap, a
// few vectors of weights are loaded and each position's input is broadcast. Weights are packed K-innermost. Inputs are
// read in place where a tile's positions lie side by side in memory (float or double, unit strides, no padding);
// otherwise a patch is packed first: widened to the accumulator type, zero-padded, and split into `stride_w` phases so
// that neighbouring outputs read neighbouring elements whatever the stride.
//
//   direct_pool2x2: a tile is whole 2x2 windows; the convolution never leaves the registers. Where K fills the vectors
//   badly (20 of 32 lanes), lanes are pairs: half as many k, each for both columns of a window.
//   generic: rows of convolution outputs go to a scratch buffer that stays in cache; the pooling reads them there.
#include "isa_kernels.h"
#include "simd.h"

namespace pyconv::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32 registers; weights take up to 3, inputs are broadcast from memory
constexpr int kMaxKVectors = 3;
#elif defined(__AVX2__)
constexpr int kAccumulators = 12;  // of 16 registers
constexpr int kMaxKVectors = 3;
#else
constexpr int kAccumulators = 8;
constexpr int kMaxKVectors = 2;
#endif

constexpr int64_t kTaskBytes = 384 * 1024;  // scratch of a task: stays in a core's L2 with room for the weights

bool is_reduced(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }

bool is_plain_2x2(const ConvMaxPool2dGeometry& g) {
  return g.pool_h == 2 && g.pool_w == 2 && (g.pool_stride_h == 2 || g.PH == 1) &&
         (g.pool_stride_w == 2 || g.PW == 1) && g.pool_pad_h == 0 && g.pool_pad_w == 0 && g.pool_dilation_h == 1 && g.pool_dilation_w == 1 && 2 * g.PH <= g.OH && 2 * g.PW <= g.OW;
}

struct KBlock {
  int64_t first_vector, vectors;
};

template <class A>
struct Plan {
  static constexpr int64_t kLanes = kWidth<A>;

  const ConvMaxPool2dGeometry& g;
  bool in_registers;  // direct_pool2x2
  bool pairs;         // lanes 2i and 2i + 1 of a vector are the two columns of a window, for the same k
  int64_t vector_k;   // k of a vector: its lanes, or half of them
  int64_t Cg, Kg, taps;
  int64_t k_vectors, k_blocks;
  int64_t block_lanes;  // lanes of the widest block of K
  bool in_place;        // input is read without a patch
  int64_t patch_columns, patch_row, max_patch_rows;
  int64_t chunk, chunks;  // pooled rows of a task; tasks along PH
  int64_t tasks, workers;
  // Workspace, in elements of A: weights, then the tap offsets (int64), then per worker: patch, conv, values,
  // argmax, pre-activation.
  int64_t weight_elements, patch_elements, conv_elements, result_elements, worker_elements;

  Plan(const ConvMaxPool2dForwardParams& p, bool registers) : g(p.geometry), in_registers(registers) {
    Cg = g.C / g.groups;
    Kg = g.K / g.groups;
    taps = g.R * g.S;
    // A vector of pairs does two columns at once, so that it pays where it takes fewer than twice as many.
    pairs = kHasPairs<A> && in_registers && ceil_div(2 * Kg, kLanes) < 2 * ceil_div(Kg, kLanes);
    vector_k = pairs ? kLanes / 2 : kLanes;
    k_vectors = ceil_div(Kg, vector_k);
    k_blocks = ceil_div(k_vectors, kMaxKVectors);
    block_lanes = result_lanes(ceil_div(k_vectors, k_blocks));
    const bool covered = g.pad_top == 0 && g.pad_left == 0 &&
                         (g.OH - 1) * g.stride_h + (g.R - 1) * g.dilation_h < g.H &&
                         (g.OW - 1) * g.stride_w + (g.S - 1) * g.dilation_w < g.W;
    in_place = !is_reduced(p.dtype) && covered && g.stride_w == 1 && p.input_strides.w == 1;
    patch_columns = g.OW + ((g.S - 1) * g.dilation_w) / g.stride_w;
    patch_row = patch_columns * g.stride_w;
    chunk = g.PH;
    while (chunk > 1 && task_bytes(chunk) > kTaskBytes) chunk = ceil_div(chunk, 2);
    while (chunk > 1 && g.N * g.groups * ceil_div(g.PH, chunk) < p.threads.num_threads) chunk = ceil_div(chunk, 2);
    chunks = ceil_div(g.PH, chunk);
    tasks = g.N * g.groups * chunks;
    workers = max_of(1, min_of(p.threads.num_threads, tasks));
    weight_elements = g.groups * k_vectors * kLanes * Cg * taps;
    patch_elements = patch_size(chunk);
    conv_elements = conv_size(chunk);
    result_elements = round_up(chunk * g.PW * block_lanes, 16);
    worker_elements = patch_elements + conv_elements + 3 * result_elements;
  }

  KBlock block(int64_t b) const {
    const int64_t base = k_vectors / k_blocks, extra = k_vectors % k_blocks;
    return {b * base + min_of(b, extra), base + (b < extra ? 1 : 0)};
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
    return in_place ? 0 : round_up(Cg * patch_rows(conv_rows(rows)) * patch_row, 16);
  }
  int64_t conv_size(int64_t rows) const {
    return in_registers ? 0 : round_up(conv_rows(rows) * g.OW * block_lanes, 16);
  }
  int64_t task_bytes(int64_t rows) const {
    return (patch_size(rows) + conv_size(rows) + 2 * rows * g.PW * block_lanes) * static_cast<int64_t>(sizeof(A));
  }
  int64_t tap_bytes() const { return round_up(taps * static_cast<int64_t>(sizeof(int64_t)), 64); }
  int64_t weight_bytes() const { return round_up(weight_elements * static_cast<int64_t>(sizeof(A)), 64); }
  int64_t workspace_bytes() const {
    return weight_bytes() + tap_bytes() + workers * worker_elements * static_cast<int64_t>(sizeof(A));
  }
};

// What a tile reads: input of the tile's first position, and how to get from there to others.
template <class A>
struct TileInput {
  int64_t channel_stride, row_step;  // next input channel; input of the next convolution row
  const int64_t* tap_offsets;
  int64_t channels, taps;
};

// acc[row][column][v] = sum over channels and taps of weight vector v times the input of position (row, column). With
// PAIRS a column stands for two: its vector holds the inputs of both in turn.
template <bool PAIRS, class A, int KV, int ROWS, int COLUMNS>
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
  const int64_t row_step = t.row_step;
  for (int64_t c = 0; c < t.channels; ++c, in += t.channel_stride) {
    for (int64_t tap = 0; tap < t.taps; ++tap, weights += KV * kWidth<A>) {
      const A* x = in + t.tap_offsets[tap];
      Vec<A> w[KV];
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) w[v] = load(weights + v * kWidth<A>);
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 32
        for (int j = 0; j < COLUMNS; ++j) {
          Vec<A> value;
          if constexpr (PAIRS) {
            value = broadcast_pair(x + i * row_step + 2 * j);
          } else {
            value = broadcast(x[i * row_step + j]);
          }
#pragma GCC unroll 32
          for (int v = 0; v < KV; ++v) acc[i][j][v] = fma(value, w[v], acc[i][j][v]);
        }
      }
    }
  }
}

// Running maximum by torch's rule: a larger value or a NaN replaces; the first maximum wins, but the last NaN.
template <class A>
inline void take_larger(Vec<A> value, int32_t position, Vec<A>& best, Vec<A>& best_position) {
  const Mask<A> better = either(greater(value, best), is_nan(value));
  best = select(better, value, best);
  best_position = select(better, broadcast(lane_from_integer<A>(position)), best_position);
}

// Lane-wise: what the storage type can hold of x.
inline Vec<float> round_to_storage(Vec<float> x, DType dtype) {
  if (!is_reduced(dtype)) return x;
  float lanes[kWidth<float>];
  store(lanes, x);
  for (float& lane : lanes) lane = dtype == DType::bfloat16 ? widen(narrow<BFloat16>(lane)) : widen(narrow<Float16>(lane));
  return load(lanes);
}
inline Vec<double> round_to_storage(Vec<double> x, DType) { return x; }

// One k-block's results of a task: [position][lane], the argmax as an integer's bits.
template <class A>
struct Results {
  A *values, *argmax, *pre_activation;
  int64_t lanes;
};

// Everything between the packed (or in-place) input and the results of a k-block: knows accumulators only.
template <class A>
class BlockKernel {
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  BlockKernel(const ConvMaxPool2dForwardParams& params, const Plan<A>& plan)
      : plan_(plan),
        g_(plan.g),
        dtype_(params.dtype),
        no_gradient_(lane_from_integer<A>(argmax_is_byte(g_) ? kNoGradientByte : kNoGradientInt32)) {}

  template <int KV>
  void compute_block(const A* in, const A* weights, const TileInput<A>& tile, const A* bias_lanes, int64_t first_row,
                     int64_t rows, int64_t conv_begin, int64_t conv_rows, A* conv, const Results<A>& out) const {
    Vec<A> bias[KV];
    for (int v = 0; v < KV; ++v) bias[v] = load(bias_lanes + v * kLanes);
    if (plan_.in_registers) {
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
      return;
    }
    for (int64_t i = 0; i < conv_rows; ++i) {
      convolve_row<KV, kAccumulators / KV>(in + i * tile.row_step, weights, tile, 0, conv + i * g_.OW * KV * kLanes);
    }
    pool_rows<KV>(conv, bias, first_row, rows, conv_begin, out);
  }

 private:
  void finish(Vec<A> best, Vec<A> best_position, Vec<A> bias, const Results<A>& out, int64_t index) const {
    Vec<A> y = add(best, bias);
    if (g_.activation == Activation::relu) {
      y = round_to_storage(y, dtype_);  // dead or live is decided on what the caller will see
      y = select(greater(zero<A>(), y), zero<A>(), y);
      const Mask<A> live = either(greater(y, zero<A>()), is_nan(y));
      best_position = select(live, best_position, broadcast(no_gradient_));
    } else if (g_.activation != Activation::none) {
      if (out.pre_activation != nullptr) store(out.pre_activation + index, y);
      y = smooth_activation(y);
    }
    store(out.values + index, y);
    if (out.argmax != nullptr) store(out.argmax + index, best_position);
  }

  __attribute__((noinline)) Vec<A> smooth_activation(Vec<A> y) const {
    A lanes[kLanes];
    store(lanes, y);
    for (A& lane : lanes) lane = activate(g_.activation, lane);
    return load(lanes);
  }

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
    if constexpr (PAIRS) {
      tile_2x2_pairs<KV, WINDOWS>(in, weights, tile, bias, index, out);
    } else {
      tile_2x2<KV, WINDOWS>(in, weights, tile, bias, index, out);
    }
  }

  template <int KV, int WINDOWS>
  void tile_2x2(const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV], int64_t index,
                const Results<A>& out) const {
    Vec<A> acc[2][2 * WINDOWS][KV];
    convolve_tile<false, A, KV, 2, 2 * WINDOWS>(in, weights, tile, acc);
#pragma GCC unroll 32
    for (int w = 0; w < WINDOWS; ++w) {
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        Vec<A> best = acc[0][2 * w][v], position = zero<A>();
        take_larger(acc[0][2 * w + 1][v], 1, best, position);
        take_larger(acc[1][2 * w][v], 2, best, position);
        take_larger(acc[1][2 * w + 1][v], 3, best, position);
        finish(best, position, bias[v], out, (index + w) * out.lanes + v * kLanes);
      }
    }
  }

  // With vectors of pairs the even lanes end up with the results, and two vectors' are joined.
  template <int KV, int WINDOWS>
  void tile_2x2_pairs(const A* in, const A* weights, const TileInput<A>& tile, const Vec<A> (&bias)[KV], int64_t index,
                      const Results<A>& out) const {
    Vec<A> acc[2][WINDOWS][KV];
    convolve_tile<true, A, KV, 2, WINDOWS>(in, weights, tile, acc);
#pragma GCC unroll 32
    for (int w = 0; w < WINDOWS; ++w) {
      Vec<A> best[KV + 1], position[KV + 1];
      best[KV] = position[KV] = zero<A>();
#pragma GCC unroll 32
      for (int v = 0; v < KV; ++v) {
        best[v] = acc[0][w][v];
        position[v] = zero<A>();
        take_larger(swap_pairs(acc[0][w][v]), 1, best[v], position[v]);
        take_larger(acc[1][w][v], 2, best[v], position[v]);
        take_larger(swap_pairs(acc[1][w][v]), 3, best[v], position[v]);
      }
#pragma GCC unroll 32
      for (int v = 0; v < KV; v += 2) {
        finish(even_lanes(best[v], best[v + 1]), even_lanes(position[v], position[v + 1]), bias[v / 2], out,
               (index + w) * out.lanes + v / 2 * kLanes);
      }
    }
  }

  // One row of convolution outputs (OW, lanes) from column `first` on.
  template <int KV, int COLUMNS>
  void convolve_row(const A* in, const A* weights, const TileInput<A>& tile, int64_t first, A* row) const {
    int64_t column = first;
    for (; column + COLUMNS <= g_.OW; column += COLUMNS) {
      Vec<A> acc[1][COLUMNS][KV];
      convolve_tile<false, A, KV, 1, COLUMNS>(in + column, weights, tile, acc);
#pragma GCC unroll 32
      for (int j = 0; j < COLUMNS; ++j) {
#pragma GCC unroll 32
        for (int v = 0; v < KV; ++v) store(row + ((column + j) * KV + v) * kLanes, acc[0][j][v]);
      }
    }
    if constexpr (COLUMNS > 1) {
      if (column < g_.OW) convolve_row<KV, COLUMNS / 2>(in, weights, tile, column, row);
    }
  }

  template <int KV>
  void pool_rows(const A* conv, const Vec<A> (&bias)[KV], int64_t first_row, int64_t rows, int64_t conv_begin,
                 const Results<A>& out) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t top = (first_row + i) * g_.pool_stride_h - g_.pool_pad_h;
      for (int64_t j = 0; j < g_.PW; ++j) {
        const int64_t left = j * g_.pool_stride_w - g_.pool_pad_w;
        Vec<A> best[KV], position[KV];
        for (int v = 0; v < KV; ++v) {
          best[v] = broadcast(-A(INFINITY));
          position[v] = broadcast(no_gradient_);
        }
        bool found = false;
        for (int64_t y = 0; y < g_.pool_h; ++y) {
          const int64_t row = top + y * g_.pool_dilation_h;
          if (row < 0 || row >= g_.OH) continue;
          for (int64_t x = 0; x < g_.pool_w; ++x) {
            const int64_t column = left + x * g_.pool_dilation_w;
            if (column < 0 || column >= g_.OW) continue;
            const A* source = conv + ((row - conv_begin) * g_.OW + column) * KV * kLanes;
            const int32_t index = static_cast<int32_t>(y * g_.pool_w + x);
            for (int v = 0; v < KV; ++v) {
              const Vec<A> value = load(source + v * kLanes);
              if (found) {
                take_larger(value, index, best[v], position[v]);
              } else {  // the first position holds even where it is -inf
                best[v] = value;
                position[v] = broadcast(lane_from_integer<A>(index));
              }
            }
            found = true;
          }
        }
        for (int v = 0; v < KV; ++v) {
          finish(best[v], position[v], bias[v], out, ((i * g_.PW + j) * KV + v) * kLanes);
        }
      }
    }
  }

  const Plan<A>& plan_;
  const ConvMaxPool2dGeometry& g_;
  DType dtype_;
  A no_gradient_;
};

template <class T>
class Forward {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  Forward(const ConvMaxPool2dForwardParams& params, bool in_registers)
      : p_(params), plan_(params, in_registers), g_(plan_.g), kernel_(params, plan_) {
    char* workspace = static_cast<char*>(params.workspace);
    weights_ = reinterpret_cast<A*>(workspace);
    tap_offsets_ = reinterpret_cast<int64_t*>(workspace + plan_.weight_bytes());
    scratch_ = reinterpret_cast<A*>(workspace + plan_.weight_bytes() + plan_.tap_bytes());
  }

  void run() {
    fill_tap_offsets();
    pack_weights();
    parallel(p_.threads, plan_.workers, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        const int64_t first = plan_.tasks * worker / plan_.workers, last = plan_.tasks * (worker + 1) / plan_.workers;
        for (int64_t task = first; task < last; ++task) run_task(task, scratch_ + worker * plan_.worker_elements);
      }
    });
  }

 private:
  void fill_tap_offsets() {
    for (int64_t r = 0; r < g_.R; ++r) {
      for (int64_t s = 0; s < g_.S; ++s) {
        const int64_t column = s * g_.dilation_w;
        tap_offsets_[r * g_.S + s] =
            plan_.in_place ? r * g_.dilation_h * p_.input_strides.h + column
                           : r * g_.dilation_h * plan_.patch_row + (column % g_.stride_w) * plan_.patch_columns +
                                 column / g_.stride_w;
      }
    }
  }

  // weight (K, Cg, R, S) -> per group and k-block: (Cg, R*S, lanes of the block), zero beyond K.
  void pack_weights() {
    const T* weight = static_cast<const T*>(p_.weight);
    const Strides4 st = p_.weight_strides;
    Threads threads = p_.threads;
    if (plan_.weight_elements < 4096) threads.num_threads = 1;
    const int64_t per_group = plan_.k_blocks * plan_.Cg;
    parallel(threads, g_.groups * per_group, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / per_group, b = task % per_group / plan_.Cg, c = task % plan_.Cg;
        const KBlock block = plan_.block(b);
        const int64_t lanes = block.vectors * kLanes, first_k = block.first_vector * plan_.vector_k;
        const int64_t lanes_per_k = kLanes / plan_.vector_k;
        A* packed = weights_ + block_offset(group, block) + c * plan_.taps * lanes;
        int64_t lane = 0;
        if constexpr (sizeof(T) == sizeof(A)) {
          if (st.n < kMaxGatherStride) {
            int32_t index[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) index[i] = static_cast<int32_t>(i / lanes_per_k * st.n);
            for (; lane < lanes && first_k + lane / lanes_per_k + plan_.vector_k <= plan_.Kg; lane += kLanes) {
              const T* source = weight + (group * plan_.Kg + first_k + lane / lanes_per_k) * st.n + c * st.c;
              for (int64_t r = 0; r < g_.R; ++r) {
                for (int64_t s = 0; s < g_.S; ++s) {
                  store(packed + (r * g_.S + s) * lanes + lane,
                        gather(source + r * st.h + s * st.w, index));
                }
              }
            }
          }
        }
        for (; lane < lanes; ++lane) {
          const int64_t k = first_k + lane / lanes_per_k;
          if (k >= plan_.Kg) {
            for (int64_t tap = 0; tap < plan_.taps; ++tap) packed[tap * lanes + lane] = A(0);
            continue;
          }
          const T* source = weight + (group * plan_.Kg + k) * st.n + c * st.c;
          for (int64_t r = 0; r < g_.R; ++r) {
            for (int64_t s = 0; s < g_.S; ++s) {
              packed[(r * g_.S + s) * lanes + lane] = widen(source[r * st.h + s * st.w]);
            }
          }
        }
      }
    });
  }

  int64_t block_offset(int64_t group, const KBlock& block) const {
    return (group * plan_.k_vectors + block.first_vector) * kLanes * plan_.Cg * plan_.taps;
  }

  // Input rows of convolution rows [row, row + rows) -> patch (Cg, rows, phases, columns), widened and zero-padded.
  void pack_patch(int64_t n, int64_t group, int64_t row, int64_t rows, A* patch) const {
    const Strides4 st = p_.input_strides;
    const T* image = static_cast<const T*>(p_.input) + n * st.n + group * plan_.Cg * st.c;
    const int64_t first = row * g_.stride_h - g_.pad_top, count = plan_.patch_rows(rows);
    for (int64_t c = 0; c < plan_.Cg; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t h = first + i;
        A* target = patch + (c * count + i) * plan_.patch_row;
        if (h < 0 || h >= g_.H) {
          for (int64_t j = 0; j < plan_.patch_row; ++j) target[j] = A(0);
          continue;
        }
        const T* source = image + c * st.c + h * st.h;
        for (int64_t phase = 0; phase < g_.stride_w; ++phase, target += plan_.patch_columns) {
          // Column j of this phase holds input column j * stride_w + shift.
          const int64_t shift = phase - g_.pad_left;
          const int64_t begin = shift >= 0 ? 0 : min_of(plan_.patch_columns, ceil_div(-shift, g_.stride_w));
          const int64_t end = shift >= g_.W ? begin
                                            : max_of(begin, min_of(plan_.patch_columns,
                                                                   (g_.W - 1 - shift) / g_.stride_w + 1));
          for (int64_t j = 0; j < begin; ++j) target[j] = A(0);
          const T* from = source + shift * st.w;
          const int64_t step = g_.stride_w * st.w;
          if (step == 1) {
            for (int64_t j = begin; j < end; ++j) target[j] = widen(from[j]);
          } else {
            for (int64_t j = begin; j < end; ++j) target[j] = widen(from[j * step]);
          }
          for (int64_t j = end; j < plan_.patch_columns; ++j) target[j] = A(0);
        }
      }
    }
  }

  void run_task(int64_t task, A* scratch) {
    const int64_t n = task / (g_.groups * plan_.chunks), group = task / plan_.chunks % g_.groups;
    const int64_t first_row = task % plan_.chunks * plan_.chunk;
    const int64_t rows = min_of(plan_.chunk, g_.PH - first_row);
    const int64_t conv_begin = max_of(0, first_row * g_.pool_stride_h - g_.pool_pad_h);
    const int64_t conv_end = min_of(g_.OH, (first_row + rows - 1) * g_.pool_stride_h - g_.pool_pad_h +
                                               (g_.pool_h - 1) * g_.pool_dilation_h + 1);
    const int64_t conv_rows = max_of(0, conv_end - conv_begin);

    TileInput<A> tile{};
    tile.tap_offsets = tap_offsets_;
    tile.channels = plan_.Cg;
    tile.taps = plan_.taps;
    const A* in = nullptr;
    if (plan_.in_place) {
      const Strides4 st = p_.input_strides;
      in = reinterpret_cast<const A*>(p_.input) + n * st.n + group * plan_.Cg * st.c + conv_begin * g_.stride_h * st.h;
      tile.channel_stride = st.c;
      tile.row_step = g_.stride_h * st.h;
    } else if (conv_rows > 0) {
      pack_patch(n, group, conv_begin, conv_rows, scratch);
      in = scratch;
      tile.channel_stride = plan_.patch_rows(conv_rows) * plan_.patch_row;
      tile.row_step = g_.stride_h * plan_.patch_row;
    }
    A* conv = scratch + plan_.patch_elements;
    A* results = conv + plan_.conv_elements;

    for (int64_t b = 0; b < plan_.k_blocks; ++b) {
      const KBlock block = plan_.block(b);
      const A* weights = weights_ + block_offset(group, block);
      A bias_lanes[kMaxKVectors * kLanes];
      const int64_t block_k = block.first_vector * plan_.vector_k, first_k = group * plan_.Kg + block_k;
      const int64_t k_count = min_of(block.vectors * plan_.vector_k, plan_.Kg - block_k);
      for (int64_t lane = 0; lane < block.vectors * kLanes; ++lane) {
        bias_lanes[lane] = p_.bias != nullptr && lane < k_count
                               ? widen(static_cast<const T*>(p_.bias)[(first_k + lane) * p_.bias_stride])
                               : A(0);
      }
      const Results<A> out{results, p_.argmax != nullptr ? results + plan_.result_elements : nullptr,
                           p_.pre_activation != nullptr ? results + 2 * plan_.result_elements : nullptr,
                           plan_.result_lanes(block.vectors)};
      switch (block.vectors) {
        case 1:
          kernel_.template compute_block<1>(in, weights, tile, bias_lanes, first_row, rows, conv_begin, conv_rows, conv, out);
          break;
        case 2:
          kernel_.template compute_block<2>(in, weights, tile, bias_lanes, first_row, rows, conv_begin, conv_rows, conv, out);
          break;
        default:
          kernel_.template compute_block<kMaxKVectors>(in, weights, tile, bias_lanes, first_row, rows, conv_begin, conv_rows, conv, out);
      }
      write_results(n, first_k, k_count, first_row, rows, out);
    }
  }

  // Results [position][lane] -> output, argmax and pre-activation in their layout.
  void write_results(int64_t n, int64_t first_k, int64_t k_count, int64_t first_row, int64_t rows,
                     const Results<A>& in) const {
    const Strides4 st = p_.output_strides;
    const int64_t base = n * st.n + first_k * st.c + first_row * st.h;
    write_plane(static_cast<T*>(p_.output) + base, in.values, in.lanes, k_count, rows,
                [](A x) { return narrow<T>(x); });
    if (in.argmax != nullptr) {
      if (argmax_is_byte(g_)) {
        write_plane(static_cast<uint8_t*>(p_.argmax) + base, in.argmax, in.lanes, k_count, rows,
                    [](A x) { return static_cast<uint8_t>(integer_from_lane(x)); });
      } else {
        write_plane(static_cast<int32_t*>(p_.argmax) + base, in.argmax, in.lanes, k_count, rows,
                    [](A x) { return integer_from_lane(x); });
      }
    }
    if (in.pre_activation != nullptr) {
      write_plane(static_cast<T*>(p_.pre_activation) + base, in.pre_activation, in.lanes, k_count, rows,
                  [](A x) { return narrow<T>(x); });
    }
  }

  template <class Out, class Convert>
  void write_plane(Out* target, const A* values, int64_t lanes, int64_t k_count, int64_t rows,
                   const Convert& convert) const {
    const Strides4 st = p_.output_strides;
    const int64_t positions = rows * g_.PW;
    if (st.c == 1) {  // NHWC: lanes are neighbours
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < g_.PW; ++j, values += lanes) {
          Out* pixel = target + i * st.h + j * st.w;
          for (int64_t k = 0; k < k_count; ++k) pixel[k] = convert(values[k]);
        }
      }
      return;
    }
    for (int64_t k = 0; k < k_count; ++k) {  // NCHW: whole rows of the plane are neighbours
      Out* plane = target + k * st.c;
      const A* source = values + k;
      int64_t position = 0;
      for (; position + kLanes <= positions; position += kLanes) {
        A column[kLanes];
        store(column, gather(source + position * lanes, static_cast<int32_t>(lanes)));
        for (int64_t i = 0; i < kLanes; ++i) plane[position + i] = convert(column[i]);
      }
      for (; position < positions; ++position) plane[position] = convert(source[position * lanes]);
    }
  }

  const ConvMaxPool2dForwardParams& p_;
  const Plan<A> plan_;
  const ConvMaxPool2dGeometry& g_;
  A* weights_;
  int64_t* tap_offsets_;
  A* scratch_;
  const BlockKernel<A> kernel_;
};

template <class Action>
auto with_storage_type(DType dtype, const Action& action) {
  switch (dtype) {
    case DType::float64:
      return action(double());
    case DType::bfloat16:
      return action(BFloat16());
    case DType::float16:
      return action(Float16());
    case DType::float32:
      break;
  }
  return action(float());
}

template <bool IN_REGISTERS>
int64_t workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  return with_storage_type(params.dtype, [&](auto storage) {
    return Plan<Accumulator<decltype(storage)>>(params, IN_REGISTERS).workspace_bytes();
  });
}

template <bool IN_REGISTERS>
void run(const ConvMaxPool2dForwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) {
    Forward<decltype(storage)>(params, IN_REGISTERS).run();
    return 0;
  });
}

const Kernel<ConvMaxPool2dForwardParams> kKernels[] = {
    {"direct_pool2x2", "2x2 pooling with stride 2, no pool padding, dilation or partial windows", true,
     [](const ConvMaxPool2dForwardParams& p) { return is_plain_2x2(p.geometry); }, workspace_bytes<true>, run<true>},
    {"generic", "every shape", true, [](const ConvMaxPool2dForwardParams&) { return true; }, workspace_bytes<false>,
     run<false>},
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

KernelList<ConvMaxPool2dForwardParams> conv_max_pool2d_forward_kernels() {
  return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])};
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
