// Winograd forward of conv_max_pool2d. Compiled once per ISA.
//
//   x (N,C,H,W) -> patch (rows, columns, Cg), channels innermost -> input transform -> V (16, tiles, depth)
//   weight -> U (16, depth, lanes of K);  M (16, tiles, lanes) = V U
//   -> output transform: 2x2 convolution outputs a tile -> window max ... as in every forward kernel
//
// F(2x2, 3x3): a tile is 2x2 outputs, computed from 4x4 inputs by 16 products where the direct sum takes 36. A larger
// filter is cut into blocks of at most 3x3 taps, each a filter of its own on a shifted input, and all of them are summed
// in the transformed domain: `depth` runs over the blocks and the channels. A block of two taps along an axis leaves the
// last of the four transformed positions of that axis empty, so 5x5 takes 49 products a tile instead of 100, 7x7 takes
// 100 instead of 196, and no transform is larger, or less accurate, than that of 3x3:
//
//   B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)    G g = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A^T m = (m0 + m1 + m2, m1 - m2 - m3)
//
// A convolution of stride s is one of stride 1 over s x s times the channels: each phase of rows and columns modulo s is a
// channel of its own, with every s-th tap of the filter in each direction. So 11x11 with stride 4 becomes 3x3.
//
// Tiles lie on a grid fixed to the convolution's output, so results do not depend on the number of threads or on the
// chunking. Differences of infinities and overflow would spread NaN over a tile: an image with any output that is not
// finite is computed again by the direct kernel.
#include "conv_max_pool2d_forward_weights.h"
#include "conv_max_pool2d_forward_winograd_plan.h"
#include "conv_max_pool2d_forward_winograd_product.h"
#include "isa_kernels.h"
#include "parallel.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kMaxStride = 8;
constexpr int64_t kMaxLoaded = 1024;  // taps of the weights transformed at a time
constexpr int64_t kMaxDepth = 128;    // of one running sum: long ones lose digits, and U stays in L1 meanwhile
// Vector operations, as many as would take the same time as multiply-adds, of a tile: of the input transform of a block
// and vector of channels, and of the output transform of a vector of K. Fitted to measurements.
constexpr int64_t kInputTransformCost = 45;
constexpr int64_t kOutputTransformCost = 35;

template <class T>
class Winograd {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  Winograd(const ConvMaxPool2dForwardParams& params, const Kernel<ConvMaxPool2dForwardParams>& direct)
      : p_(params), direct_(direct), plan_(params), g_(plan_.g), epilogue_(params) {
    not_finite_ = static_cast<uint8_t*>(params.workspace);
    weights_ = reinterpret_cast<A*>(not_finite_ + plan_.flag_bytes());
    scratch_ = weights_ + plan_.weight_copies.count() * plan_.weight_elements;
  }

  void run() {
    for (int64_t n = 0; n < g_.N; ++n) not_finite_[n] = 0;
    // U (depth, lanes of the block), zero beyond K, is made by vectors of K and parts of the input channels.
    const Copies& copies = plan_.weight_copies;
    const int64_t threads = p_.threads.num_threads, vectors = g_.groups * plan_.k_blocks.vectors;
    const int64_t loaded_at_once = ceil_div(plan_.Cg, kMaxLoaded / (g_.R * g_.S));
    const int64_t for_all_threads = copies.own() ? 1 : ceil_div(threads * kTasksPerThread, vectors);
    const int64_t parts = min_of(plan_.Cg, max_of(loaded_at_once, for_all_threads));
    const auto transform = [&](int64_t task, int64_t worker) {
      const int64_t group = task / parts / plan_.k_blocks.vectors, vector = task / parts % plan_.k_blocks.vectors;
      const int64_t part = task % parts;
      transform_weights(group, vector, plan_.Cg * part / parts, plan_.Cg * (part + 1) / parts, weights_of(worker));
    };
    uint8_t* const transformed = not_finite_ + plan_.image_flag_bytes();
    copies.clear(transformed);
    const auto convolve = [&](int64_t task, int64_t worker) {
      copies.make_once(transformed, worker, [&] {
        for (int64_t i = 0; i < vectors * parts; ++i) transform(i, worker);
      });
      run_task(task, weights_of(worker), scratch_ + worker * plan_.worker_elements);
    };
    parallel_steps(p_.threads, plan_.workers, Tasks{copies.own() ? 0 : vectors * parts, transform}, Barrier(),
                   Tasks{plan_.tasks, convolve});
    for (int64_t n = 0; n < g_.N; ++n) {
      if (not_finite_[n] != 0) run_directly(n);
    }
  }

 private:
  struct Scratch {
    A *u, *patch, *vertical, *v, *m, *conv, *results;
  };

  void run_directly(int64_t n) const {
    ConvMaxPool2dForwardParams image = one_image(p_, n);
    image.workspace = not_finite_ + plan_.flag_bytes();
    direct_.run(image);
  }

 public:
  static ConvMaxPool2dForwardParams one_image(const ConvMaxPool2dForwardParams& p, int64_t n) {
    ConvMaxPool2dForwardParams image = p;
    image.geometry.N = 1;
    image.input = static_cast<const T*>(p.input) + n * p.input_strides.n;
    const int64_t at = n * p.output_strides.n;
    image.output = static_cast<T*>(p.output) + at;
    if (p.argmax != nullptr) {
      image.argmax = argmax_is_byte(p.geometry) ? static_cast<void*>(static_cast<uint8_t*>(p.argmax) + at)
                                                : static_cast<void*>(static_cast<int32_t*>(p.argmax) + at);
    }
    if (p.pre_activation != nullptr) image.pre_activation = static_cast<T*>(p.pre_activation) + at;
    return image;
  }

 private:
  A* weights_of(int64_t worker) const { return weights_ + plan_.weight_copies.of(worker) * plan_.weight_elements; }
  A* weights_of(int64_t group, const KBlock& block, int64_t position, A* weights) const {
    return weights + (group * plan_.k_blocks.vectors + block.first_vector) * kLanes * plan_.total_depth +
           plan_.u_offset[position] * block.vectors * kLanes;
  }

  // weight (K, Cg, R, S) -> one vector of K of channels [first_c, last_c), which have at most kMaxLoaded taps, in U.
  void transform_weights(int64_t group, int64_t vector, int64_t first_c, int64_t last_c, A* weights) const {
    const KBlock block = plan_.k_blocks.of(vector);
    A* targets[16];
    for (int64_t position = 0; position < 16; ++position) {
      targets[position] = weights_of(group, block, position, weights) + (vector - block.first_vector) * kLanes;
    }
    const int64_t taps = g_.R * g_.S, first_k = vector * kLanes;
    A loaded[kMaxLoaded * kLanes];
    load_weights<T>(p_, group * plan_.Kg + first_k, min_of(kLanes, plan_.Kg - first_k), first_c, last_c, false, kLanes,
                    loaded);
    for (int64_t c = first_c; c < last_c; ++c) {
      for (int64_t phase = 0; phase < g_.stride_h * g_.stride_w; ++phase) {
        const int64_t channel = (phase / g_.stride_w * plan_.Cg + c) * g_.stride_w + phase % g_.stride_w;
        transform_filters(loaded + (c - first_c) * taps * kLanes, phase, channel, block.vectors * kLanes, targets);
      }
    }
  }

  // All blocks of one channel of the patch.
  void transform_filters(const A* filter, int64_t phase, int64_t channel, int64_t depth_stride,
                         A* const (&targets)[16]) const {
    for (int64_t b = 0; b < plan_.rows.blocks * plan_.columns.blocks; ++b) {
      const int64_t br = b / plan_.columns.blocks, bs = b % plan_.columns.blocks;
      Vec<A> half[4][3];
      for (int64_t s = 0; s < 3; ++s) {
        const int64_t column_tap = (plan_.columns.first[bs] + s) * g_.stride_w + phase % g_.stride_w;
        Vec<A> column[3], transformed[4];
        for (int64_t r = 0; r < 3; ++r) {
          const int64_t row_tap = (plan_.rows.first[br] + r) * g_.stride_h + phase / g_.stride_w;
          const bool inside =
              r < plan_.rows.taps[br] && s < plan_.columns.taps[bs] && row_tap < g_.R && column_tap < g_.S;
          column[r] = inside ? load(filter + (row_tap * g_.S + column_tap) * kLanes) : zero<A>();
        }
        transform_filter(column, transformed);
        for (int i = 0; i < 4; ++i) half[i][s] = transformed[i];
      }
      for (int64_t i = 0; i < 4; ++i) {
        Vec<A> transformed[4];
        transform_filter(half[i], transformed);
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t position = 4 * i + j, slot = plan_.slot[position][b];
          if (slot >= 0) store(targets[position] + (slot * plan_.channels + channel) * depth_stride, transformed[j]);
        }
      }
    }
  }

  static void transform_filter(const Vec<A> (&g)[3], Vec<A> (&out)[4]) {
    const Vec<A> half = broadcast(A(0.5)), outer = mul(add(g[0], g[2]), half), inner = mul(g[1], half);
    out[0] = g[0];
    out[1] = add(outer, inner);
    out[2] = sub(outer, inner);
    out[3] = g[2];
  }

  // Input rows under tile rows [first, first + count) -> patch (rows, columns, channels), widened and zero-padded.
  void pack_patch(int64_t n, int64_t group, int64_t first, int64_t count, A* patch) const {
    const Strides4 st = p_.input_strides;
    const T* image = static_cast<const T*>(p_.input) + n * st.n + group * plan_.Cg * st.c;
    const int64_t rows = 2 * (count - 1) + plan_.rows.first[plan_.rows.blocks - 1] + 4;
    const int64_t row_elements = plan_.patch_columns * plan_.padded_channels;
    const int64_t phase_channels = g_.stride_w * plan_.Cg;
    for (int64_t i = 0; i < rows; ++i, patch += row_elements) {
      if (g_.stride_h == 1 && g_.stride_w == 1) {
        pack_row(image, 2 * first + i - g_.pad_top, patch);
        continue;
      }
      for (int64_t phase = 0; phase < g_.stride_h; ++phase) {
        pack_phases(image, (2 * first + i) * g_.stride_h + phase - g_.pad_top, patch + phase * phase_channels);
      }
      for (int64_t j = 0; j < row_elements; j += plan_.padded_channels) {
        for (int64_t c = plan_.channels; c < plan_.padded_channels; ++c) patch[j + c] = A(0);
      }
    }
  }

  // Row h of the image, without a stride.
  void pack_row(const T* image, int64_t h, A* patch) const {
    const Strides4 st = p_.input_strides;
    const int64_t channels = plan_.padded_channels, row_elements = plan_.patch_columns * channels;
    if (h < 0 || h >= g_.H) {
      for (int64_t j = 0; j < row_elements; ++j) patch[j] = A(0);
      return;
    }
    const int64_t begin = min_of(g_.pad_left, plan_.patch_columns);
    const int64_t end = max_of(begin, min_of(plan_.patch_columns, g_.pad_left + g_.W));
    for (int64_t j = 0; j < begin * channels; ++j) patch[j] = A(0);
    for (int64_t j = end * channels; j < row_elements; ++j) patch[j] = A(0);
    const T* source = image + h * st.h - g_.pad_left * st.w;
    for (int64_t c = 0; c < plan_.Cg; c += kLanes) {
      const int64_t some = min_of(kLanes, plan_.Cg - c);
      if (st.c == 1) {
        for (int64_t j = begin; j < end; ++j) store(patch + j * channels + c, load_widened(source + j * st.w + c, some));
      } else if (st.w == 1) {
        for (int64_t j = begin; j < end; j += kLanes) {
          const int64_t pixels = min_of(kLanes, end - j);
          Vec<A> block[kLanes];
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            block[lane] = lane < some ? load_widened(source + (c + lane) * st.c + j, pixels) : zero<A>();
          }
          transpose(block);
          for (int64_t pixel = 0; pixel < pixels; ++pixel) store(patch + (j + pixel) * channels + c, block[pixel]);
        }
      } else {
        for (int64_t j = begin; j < end; ++j) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            patch[j * channels + c + lane] = lane < some ? widen(source[(c + lane) * st.c + j * st.w]) : A(0);
          }
        }
      }
    }
  }

  // Row h of the image: the phases of its columns, as channels (c, phase), so that a pixel of the patch takes neighbours.
  void pack_phases(const T* image, int64_t h, A* patch) const {
    const Strides4 st = p_.input_strides;
    const bool inside = h >= 0 && h < g_.H;
    for (int64_t c = 0; c < plan_.Cg; ++c) {
      A* target = patch + c * g_.stride_w;
      const T* row = image + h * st.h + c * st.c;
      for (int64_t j = 0; j < plan_.patch_columns; ++j, target += plan_.padded_channels) {
        const int64_t first = j * g_.stride_w - g_.pad_left;
        if (inside && first >= 0 && first + g_.stride_w <= g_.W) {
          const T* from = row + first * st.w;
          if (g_.stride_w == 4 && st.w == 1) {  // one move instead of a loop
            for (int64_t phase = 0; phase < 4; ++phase) target[phase] = widen(from[phase]);
          } else {
            for (int64_t phase = 0; phase < g_.stride_w; ++phase) target[phase] = widen(from[phase * st.w]);
          }
          continue;
        }
        for (int64_t phase = 0; phase < g_.stride_w; ++phase) {
          const int64_t w = first + phase;
          target[phase] = inside && w >= 0 && w < g_.W ? widen(row[w * st.w]) : A(0);
        }
      }
    }
  }

  static void transform_line(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, Vec<A> (&out)[4]) {
    out[0] = sub(a, c);
    out[1] = add(b, c);
    out[2] = sub(c, b);
    out[3] = sub(b, d);
  }

  // patch -> V (16, tiles, depth). Along columns first, once for all tiles and blocks that share a column.
  void transform_input(int64_t count, const Scratch& s) const {
    const int64_t channels = plan_.padded_channels, row_elements = plan_.patch_columns * channels;
    const int64_t tiles = count * plan_.tile_columns;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t br = 0; br < plan_.rows.blocks; ++br) {
        const A* top = s.patch + (2 * row + plan_.rows.first[br]) * row_elements;
        for (int64_t c = 0; c < plan_.channels; c += kLanes) {
          for (int64_t j = 0; j < plan_.patch_columns; ++j) {
            const A* pixel = top + j * channels + c;
            Vec<A> line[4];
            transform_line(load(pixel), load(pixel + row_elements), load(pixel + 2 * row_elements),
                           load(pixel + 3 * row_elements), line);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) store(s.vertical + (i * plan_.patch_columns + j) * kLanes, line[i]);
          }
          for (int64_t bs = 0; bs < plan_.columns.blocks; ++bs) {
            transform_tiles(row * plan_.tile_columns, tiles, br, bs, c, s);
          }
        }
      }
    }
  }

  void transform_tiles(int64_t first_tile, int64_t tiles, int64_t br, int64_t bs, int64_t c, const Scratch& s) const {
    const int64_t b = br * plan_.columns.blocks + bs, some = min_of(kLanes, plan_.channels - c);
    const bool whole = some == kLanes;
    for (int64_t i = 0; i < 4; ++i) {
      if (!plan_.rows.reaches(br, i)) continue;
      const A* from = s.vertical + (i * plan_.patch_columns + plan_.columns.first[bs]) * kLanes;
      A* to[4];
      int64_t depth[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t position = 4 * i + j;
        depth[j] = plan_.depth[position];
        to[j] = s.v + plan_.v_offset[position] * tiles + first_tile * depth[j] +
                plan_.slot[position][b] * plan_.channels + c;
      }
      const bool fourth = plan_.columns.reaches(bs, 3);
      for (int64_t tile = 0; tile < plan_.tile_columns; ++tile, from += 2 * kLanes) {
        Vec<A> line[4];
        transform_line(load(from), load(from + kLanes), load(from + 2 * kLanes), load(from + 3 * kLanes), line);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (j == 3 && !fourth) continue;
          if (whole) {
            store(to[j] + tile * depth[j], line[j]);
          } else {
            store_partial(to[j] + tile * depth[j], line[j], some);
          }
        }
      }
    }
  }

  void run_task(int64_t task, A* weights, A* memory) {
    const int64_t n = task / (g_.groups * plan_.chunks), group = task / plan_.chunks % g_.groups;
    const int64_t first_row = task % plan_.chunks * plan_.chunk;
    const int64_t last_row = min_of(first_row + plan_.chunk, g_.PH);
    Scratch s;
    s.u = weights;
    s.patch = memory;
    s.vertical = s.patch + plan_.patch_elements;
    s.v = s.vertical + plan_.vertical_elements;
    s.m = s.v + plan_.v_elements;
    s.conv = s.m + plan_.m_elements;
    s.results = s.conv + plan_.conv_elements;

    const int64_t conv_begin = epilogue_.first_conv_row(first_row);
    const int64_t conv_end = min_of(plan_.plain ? 2 * g_.PH : g_.OH,
                                    max_of(conv_begin, (last_row - 1) * g_.pool_stride_h - g_.pool_pad_h +
                                                           (g_.pool_h - 1) * g_.pool_dilation_h + 1));
    // Tiles start at even rows. Rows [kept, 2 * tile_row) of the convolution are in the buffer.
    int64_t tile_row = conv_begin / 2, kept = 2 * tile_row, row = first_row;
    const int64_t last_tile_row = ceil_div(conv_end, 2);
    bool finite = true;
    while (row < last_row) {
      const int64_t count = min_of(plan_.step, last_tile_row - tile_row);
      if (count > 0) {
        pack_patch(n, group, tile_row, count, s.patch);
        transform_input(count, s);
      }
      const int64_t ready = tile_row + count >= last_tile_row ? g_.OH : 2 * (tile_row + count);
      // Not before `row`: the first rows may complete less than another task's rows above.
      const int64_t complete =
          ready >= conv_end ? last_row : max_of(row, min_of(last_row, epilogue_.complete_rows(ready)));
      const int64_t filled = 2 * (tile_row + count);
      const int64_t needed = max_of(kept, min_of(filled, epilogue_.first_conv_row(complete)));
      const Step step{n, group, tile_row, count, kept, filled, needed, row, complete};
      for (int64_t b = 0; b < plan_.k_blocks.count; ++b) {
        const KBlock block = plan_.k_blocks[b];
        finite &= run_block(step, block, s);
      }
      tile_row += count;
      kept = needed;
      row = complete;
    }
    if (!finite) __atomic_store_n(not_finite_ + n, uint8_t(1), __ATOMIC_RELAXED);
  }

  // Tile rows [tile_row, tile_row + count) of a task. Convolution rows [kept, filled) are in the buffer afterwards, those
  // from `needed` on are wanted by the next step; pooled rows [row, complete) become complete.
  struct Step {
    int64_t n, group, tile_row, count, kept, filled, needed, row, complete;
  };

  // Whether all convolution outputs are finite.
  bool run_block(const Step& step, const KBlock& block, const Scratch& s) const {
    if constexpr (kHasHalves<A>) {
      const int64_t rest = plan_.Kg - (block.first_vector + block.vectors - 1) * kLanes;
      if (2 * rest <= kLanes) return run_block_of<true>(step, block, s);
    }
    return run_block_of<false>(step, block, s);
  }

  template <bool HALF>
  bool run_block_of(const Step& step, const KBlock& block, const Scratch& s) const {
    switch (block.vectors) {
      case 1:
        return run_vectors<1, HALF>(step, block, s);
      case 2:
        return run_vectors<2, HALF>(step, block, s);
      default:
        return run_vectors<kMaxKVectors, HALF>(step, block, s);
    }
  }

  template <int KV, bool HALF>
  bool run_vectors(const Step& step, const KBlock& block, const Scratch& s) const {
    const int64_t tiles = step.count * plan_.tile_columns;
    for (int64_t position = 0; position < 16; ++position) {
      const int64_t depth = plan_.depth[position];
      const A* v = s.v + plan_.v_offset[position] * tiles;
      const A* u = weights_of(step.group, block, position, s.u);
      A* m = s.m + position * tiles * KV * kLanes;
      const int64_t parts = ceil_div(tiles, kTiles), sums = max_of(1, ceil_div(depth, kMaxDepth));
      for (int64_t sum = 0; sum < sums; ++sum) {
        const int64_t begin = depth * sum / sums, end = depth * (sum + 1) / sums;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = tiles * part / parts, count = tiles * (part + 1) / parts - first;
          multiply_some_tiles<KV, HALF, kTiles>(count, v + first * depth + begin, depth, end - begin,
                                                u + begin * KV * kLanes, sum > 0, m + first * KV * kLanes);
        }
      }
    }

    const int64_t block_k = block.first_vector * kLanes, first_k = step.group * plan_.Kg + block_k;
    const int64_t k_count = min_of(KV * kLanes, plan_.Kg - block_k);
    A bias_lanes[KV * kLanes];
    epilogue_.load_bias(first_k, k_count, KV * kLanes, bias_lanes);
    Vec<A> bias[KV];
    for (int v = 0; v < KV; ++v) bias[v] = load(bias_lanes + v * kLanes);
    const Results<A> out{s.results, p_.argmax != nullptr ? s.results + plan_.result_elements : nullptr,
                         p_.pre_activation != nullptr ? s.results + 2 * plan_.result_elements : nullptr, KV * kLanes};

    // A product with zero is zero where the output is finite, NaN elsewhere.
    Vec<A> check = zero<A>();
    if (plan_.plain) {
      for_each_output<KV>(step.count, s, [&](int64_t i, int64_t j, int v, const Vec<A> (&y)[4]) {
        for (const Vec<A>& value : y) check = fma(value, zero<A>(), check);
        // What is not finite is computed again.
        epilogue_.template finish_2x2<false>(y[0], y[1], y[2], y[3], bias[v], out, ((i * g_.PW + j) * KV + v) * kLanes);
      });
      epilogue_.write_results(step.n, first_k, k_count, step.row, step.count, out);
      return all_zero(check);
    }
    const int64_t row_elements = 2 * plan_.tile_columns * KV * kLanes;
    A* conv = s.conv + block.first_vector * kLanes * plan_.conv_capacity * 2 * plan_.tile_columns;
    A* fresh = conv + (2 * step.tile_row - step.kept) * row_elements;
    for_each_output<KV>(step.count, s, [&](int64_t i, int64_t j, int v, const Vec<A> (&y)[4]) {
      for (const Vec<A>& value : y) check = fma(value, zero<A>(), check);
      A* to = fresh + 2 * i * row_elements + (2 * j * KV + v) * kLanes;
      store(to, y[0]);
      store(to + KV * kLanes, y[1]);
      store(to + row_elements, y[2]);
      store(to + row_elements + KV * kLanes, y[3]);
    });
    if (step.complete > step.row) {
      epilogue_.template pool_rows<KV>(conv, row_elements, bias, step.row, step.complete - step.row, step.kept, out);
      epilogue_.write_results(step.n, first_k, k_count, step.row, step.complete - step.row, out);
    }
    std::memmove(conv, conv + (step.needed - step.kept) * row_elements,
                 static_cast<size_t>((step.filled - step.needed) * row_elements) * sizeof(A));
    return all_zero(check);
  }

  static bool all_zero(Vec<A> x) {
    A lanes[kLanes];
    store(lanes, x);
    for (A lane : lanes) {
      if (!(lane == A(0))) return false;
    }
    return true;
  }

  // action(tile row, tile column, vector of K, the tile's 2x2 outputs row by row).
  template <int KV, class Action>
  void for_each_output(int64_t count, const Scratch& s, const Action& action) const {
    const int64_t position_stride = count * plan_.tile_columns * KV * kLanes;
    const A* m = s.m;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < plan_.tile_columns; ++j) {
        for (int v = 0; v < KV; ++v, m += kLanes) {
          Vec<A> upper[4], lower[4], y[4];
#pragma GCC unroll 4
          for (int column = 0; column < 4; ++column) {
            const A* first = m + column * position_stride;
            const Vec<A> m1 = load(first + 4 * position_stride), m2 = load(first + 8 * position_stride);
            upper[column] = add(load(first), add(m1, m2));
            lower[column] = sub(sub(m1, m2), load(first + 12 * position_stride));
          }
          y[0] = add(upper[0], add(upper[1], upper[2]));
          y[1] = sub(sub(upper[1], upper[2]), upper[3]);
          y[2] = add(lower[0], add(lower[1], lower[2]));
          y[3] = sub(sub(lower[1], lower[2]), lower[3]);
          action(i, j, v, y);
        }
      }
    }
  }

  const ConvMaxPool2dForwardParams& p_;
  const Kernel<ConvMaxPool2dForwardParams>& direct_;
  const Plan<A> plan_;
  const ConvMaxPool2dGeometry& g_;
  const Epilogue<A> epilogue_;
  uint8_t* not_finite_;  // (N,)
  A* weights_;  // (copies, weight_elements)
  A* scratch_;  // (workers, worker_elements)
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

// By the multiply-adds and transforms of a tile of 2x2 outputs: where the direct kernel's are at least 1.25 times as many.
// Measured over filters of 2x2 to 7x7, 1 to 32 input and 8 to 64 output channels, that is where Winograd gains.
bool winograd_accepts(const ConvMaxPool2dForwardParams& params) {
  const ConvMaxPool2dGeometry& g = params.geometry;
  if (kVectorBytes == 0 || g.dilation_h != 1 || g.dilation_w != 1) return false;
  if (g.stride_h > kMaxStride || g.stride_w > kMaxStride || g.R * g.S > kMaxLoaded) return false;
  const Axis rows(ceil_div(g.R, g.stride_h)), columns(ceil_div(g.S, g.stride_w));
  if (rows.blocks > kMaxBlocks || columns.blocks > kMaxBlocks) return false;
  const int64_t lanes = params.dtype == DType::float64 ? kWidth<double> : kWidth<float>;
  const int64_t Cg = g.C / g.groups, Kg = g.K / g.groups, k_vectors = ceil_div(Kg, lanes);
  const int64_t channels = g.stride_h * g.stride_w * Cg;
  const int64_t product_half_vectors = params.dtype != DType::float64 && kHasHalves<float> ? ceil_div(2 * Kg, lanes)
                                                                                           : 2 * k_vectors;
  const int64_t transforms = rows.blocks * columns.blocks * ceil_div(channels, lanes) * kInputTransformCost +
                             k_vectors * kOutputTransformCost;
  // Halves of a vector: with 2x2 windows the direct kernel's lanes can be pairs.
  const int64_t direct_half_vectors = is_plain_2x2(g) ? ceil_div(2 * Kg, lanes) : 2 * k_vectors;
  const int64_t products = rows.positions() * columns.positions() * channels * product_half_vectors;
  return 4 * (4 * g.R * g.S * Cg * direct_half_vectors) >= 5 * (products + 2 * transforms);
}

int64_t winograd_workspace_bytes(const ConvMaxPool2dForwardParams& params) {
  return with_storage_type(params.dtype, [&](auto storage) {
    const Plan<Accumulator<decltype(storage)>> plan(params);
    const ConvMaxPool2dForwardParams image = Winograd<decltype(storage)>::one_image(params, 0);
    const auto& direct = winograd_fallback(params);
    return plan.flag_bytes() + max_of(plan.workspace_bytes(), direct.workspace_bytes(image));
  });
}

void winograd_run(const ConvMaxPool2dForwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) {
    Winograd<decltype(storage)>(params, winograd_fallback(params)).run();
    return 0;
  });
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
