// What follows the convolution in every forward kernel of conv_max_pool2d:
//
//   conv (rows, columns, lanes of k) -> window max -> + bias -> activation -> results (positions, lanes of k)
//   -> y (N,K,PH,PW), argmax (N,K,PH,PW), pre-activation (N,K,PH,PW)
#pragma once

#include "simd.h"
#include "simd_math.h"
#include "storage_simd.h"
#include "transpose.h"

namespace pyconv::cpu {
namespace {

inline bool is_reduced(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }

inline bool is_plain_2x2(const ConvMaxPool2dGeometry& g) {
  return g.pool_h == 2 && g.pool_w == 2 && (g.pool_stride_h == 2 || g.PH == 1) &&
         (g.pool_stride_w == 2 || g.PW == 1) && g.pool_pad_h == 0 && g.pool_pad_w == 0 && g.pool_dilation_h == 1 &&
         g.pool_dilation_w == 1 && 2 * g.PH <= g.OH && 2 * g.PW <= g.OW;
}

// Running maximum by torch's rule: a larger value or a NaN replaces; the first maximum wins, but the last NaN.
// Without NAN_TOO no operand is a NaN.
template <bool NAN_TOO = true, class A>
inline void take_larger(Vec<A> value, int32_t position, Vec<A>& best, Vec<A>& best_position) {
  const Mask<A> larger = greater(value, best), better = NAN_TOO ? either(larger, is_nan(value)) : larger;
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

// The first n lanes, n > 0, as integers in memory: the argmax travels as an integer's bits.
template <class A>
inline void store_integers(int32_t* p, Vec<A> x, int64_t n) {
  A lanes[kWidth<A>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = integer_from_lane(lanes[i]);
}
template <class A>
inline void store_integers(uint8_t* p, Vec<A> x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(float)) {
    _mm512_mask_cvtepi32_storeu_epi8(p, lanes16(n), _mm512_castps_si512(x.v));
    return;
  }
#endif
  A lanes[kWidth<A>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(integer_from_lane(lanes[i]));
}

// Results of a block of k: [position][lane], the argmax as an integer's bits.
template <class A>
struct Results {
  A *values, *argmax, *pre_activation;  // the last two null where not wanted
  int64_t lanes;
};

template <class A>
class Epilogue {
  static constexpr int64_t kLanes = kWidth<A>;
  static constexpr int64_t kPoolColumns = 32;  // whose maxima are kept for windows that share them

 public:
  explicit Epilogue(const ConvMaxPool2dForwardParams& params)
      : p_(params),
        g_(params.geometry),
        no_gradient_(lane_from_integer<A>(argmax_is_byte(g_) ? kNoGradientByte : kNoGradientInt32)) {}

  // Bias, activation and the argmax's mark of dead windows, for one vector of maxima.
  void finish(Vec<A> best, Vec<A> best_position, Vec<A> bias, const Results<A>& out, int64_t index) const {
    Vec<A> y = add(best, bias);
    if (g_.activation == Activation::relu) {
      y = round_to_storage(y, p_.dtype);  // dead or live is decided on what the caller will see
      y = select(greater(zero<A>(), y), zero<A>(), y);
      if (out.argmax != nullptr) {
        const Mask<A> live = either(greater(y, zero<A>()), is_nan(y));
        best_position = select(live, best_position, broadcast(no_gradient_));
      }
    } else if (g_.activation != Activation::none) {
      if (out.pre_activation != nullptr) store(out.pre_activation + index, y);
      y = smooth_activation(y);
    }
    store(out.values + index, y);
    if (out.argmax != nullptr) store(out.argmax + index, best_position);
  }

  // A plain 2x2 window whose four convolution outputs are at hand, row by row.
  template <bool NAN_TOO>
  void finish_2x2(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, Vec<A> bias, const Results<A>& out, int64_t index) const {
    Vec<A> best = a, position = zero<A>();
    take_larger<NAN_TOO>(b, 1, best, position);
    take_larger<NAN_TOO>(c, 2, best, position);
    take_larger<NAN_TOO>(d, 3, best, position);
    finish(best, position, bias, out, index);
  }

  // How many pooled rows need nothing but convolution rows before `conv_end`.
  int64_t complete_rows(int64_t conv_end) const {
    if (conv_end >= g_.OH) return g_.PH;
    const int64_t last_start = conv_end - 1 - (g_.pool_h - 1) * g_.pool_dilation_h + g_.pool_pad_h;
    return last_start < 0 ? 0 : min_of(g_.PH, last_start / g_.pool_stride_h + 1);
  }
  // The first convolution row of pooled row i.
  int64_t first_conv_row(int64_t i) const { return max_of(0, i * g_.pool_stride_h - g_.pool_pad_h); }

  // Pooled rows [first_row, first_row + rows) from `conv`: rows of (columns, KV vectors), the first of which is
  // convolution row conv_begin.
  template <int KV>
  void pool_rows(const A* conv, int64_t row_elements, const Vec<A> (&bias)[KV], int64_t first_row, int64_t rows,
                 int64_t conv_begin, const Results<A>& out) const {
    const int64_t span = (g_.pool_w - 1) * g_.pool_dilation_w + 1;
    const bool by_columns = out.argmax == nullptr && g_.pool_h > 1 && g_.pool_w > 1 && span <= kPoolColumns;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t top = (first_row + i) * g_.pool_stride_h - g_.pool_pad_h;
      if (by_columns && top >= 0 && top + (g_.pool_h - 1) * g_.pool_dilation_h < g_.OH &&
          pool_row_by_columns<KV>(conv + (top - conv_begin) * row_elements, row_elements, bias, i, out)) {
        continue;
      }
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
            const A* source = conv + (row - conv_begin) * row_elements + column * KV * kLanes;
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

  // Pooled row i of `out`, whose windows begin in row `conv`: values alone, for which the maximum of each column serves
  // all windows that hold it. False, and nothing of use written, if there is a NaN.
  template <int KV>
  bool pool_row_by_columns(const A* conv, int64_t row_elements, const Vec<A> (&bias)[KV], int64_t i,
                           const Results<A>& out) const {
    const int64_t span = (g_.pool_w - 1) * g_.pool_dilation_w + 1;
    const int64_t together = (kPoolColumns - span) / g_.pool_stride_w + 1;  // windows
    const int64_t row_step = g_.pool_dilation_h * row_elements;
    A columns[kPoolColumns * KV * kLanes];
    for (int64_t j = 0; j < g_.PW; j += together) {
      const int64_t end = min_of(g_.PW, j + together), left = j * g_.pool_stride_w - g_.pool_pad_w;
      const int64_t first = max_of(0, left), last = min_of(g_.OW, left + (end - 1 - j) * g_.pool_stride_w + span);
      Mask<A> nan = unordered(zero<A>(), zero<A>());
      for (int64_t c = first * KV; c < last * KV; ++c) {
        const A* source = conv + c * kLanes;
        Vec<A> best = load(source);
        nan = either(nan, unordered(best, load(source + row_step)));
        best = larger_of(best, load(source + row_step));
        for (int64_t y = 2; y < g_.pool_h; ++y) {
          const Vec<A> value = load(source + y * row_step);
          nan = either(nan, unordered(value, value));
          best = larger_of(best, value);
        }
        store(columns + (c - first * KV) * kLanes, best);
      }
      if (any(nan)) return false;
      for (int64_t window = j; window < end; ++window) {
        int64_t begin = window * g_.pool_stride_w - g_.pool_pad_w;
        const int64_t stop = min_of(last, begin + span);
        while (begin < first) begin += g_.pool_dilation_w;
        for (int v = 0; v < KV; ++v) {
          Vec<A> best = broadcast(-A(INFINITY));
          for (int64_t c = begin; c < stop; c += g_.pool_dilation_w) {
            best = larger_of(best, load(columns + ((c - first) * KV + v) * kLanes));
          }
          finish(best, zero<A>(), bias[v], out, ((i * g_.PW + window) * KV + v) * kLanes);
        }
      }
    }
    return true;
  }

  // The bias of channels [first_k, first_k + k_count) in `lanes` lanes, zero beyond.
  void load_bias(int64_t first_k, int64_t k_count, int64_t lanes, A* bias) const {
    with_storage_type(p_.dtype, [&](auto storage) {
      const auto* source = static_cast<const decltype(storage)*>(p_.bias);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        bias[lane] = source != nullptr && lane < k_count
                         ? static_cast<A>(widen(source[(first_k + lane) * p_.bias_stride]))
                         : A(0);
      }
      return 0;
    });
  }

  // Results -> output, argmax and pre-activation of image n, in their layout.
  void write_results(int64_t n, int64_t first_k, int64_t k_count, int64_t first_row, int64_t rows,
                     const Results<A>& in) const {
    const Strides4 st = p_.output_strides;
    const int64_t base = n * st.n + first_k * st.c + first_row * st.h;
    with_storage_type(p_.dtype, [&](auto storage) {
      using T = decltype(storage);
      if constexpr (sizeof(Accumulator<T>) == sizeof(A)) {
        const auto narrow_lanes = [](T* to, Vec<A> x, int64_t n) { store_narrowed(to, x, n); };
        write_plane(static_cast<T*>(p_.output) + base, in.values, in.lanes, k_count, rows, narrow_lanes);
        if (in.pre_activation != nullptr) {
          write_plane(static_cast<T*>(p_.pre_activation) + base, in.pre_activation, in.lanes, k_count, rows,
                      narrow_lanes);
        }
      }
      return 0;
    });
    if (in.argmax == nullptr) return;
    if (argmax_is_byte(g_)) {
      write_plane(static_cast<uint8_t*>(p_.argmax) + base, in.argmax, in.lanes, k_count, rows,
                  [](uint8_t* to, Vec<A> x, int64_t n) { store_integers(to, x, n); });
    } else {
      write_plane(static_cast<int32_t*>(p_.argmax) + base, in.argmax, in.lanes, k_count, rows,
                  [](int32_t* to, Vec<A> x, int64_t n) { store_integers(to, x, n); });
    }
  }

 private:
  __attribute__((noinline)) Vec<A> smooth_activation(Vec<A> y) const {
    return activate(g_.activation, y);
  }

  // store_some(to, vector, n): the first n lanes to memory.
  template <class Out, class Store>
  void write_plane(Out* target, const A* values, int64_t lanes, int64_t k_count, int64_t rows,
                   const Store& store_some) const {
    const Strides4 st = p_.output_strides;
    const int64_t positions = rows * g_.PW;
    if (st.c == 1) {  // NHWC: lanes are neighbours
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < g_.PW; ++j, values += lanes) {
          Out* pixel = target + i * st.h + j * st.w;
          for (int64_t k = 0; k < k_count; k += kLanes) store_some(pixel + k, load(values + k), min_of(kLanes, k_count - k));
        }
      }
      return;
    }
    for (int64_t k = 0; k < k_count; k += kLanes) {  // NCHW: whole rows of the plane are neighbours
      const int64_t ks = min_of(kLanes, k_count - k);
      for (int64_t position = 0; position < positions; position += kLanes) {
        const int64_t count = min_of(kLanes, positions - position);
        Vec<A> block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] = i < count ? load(values + (position + i) * lanes + k) : zero<A>();
        }
        transpose(block);
        for (int64_t i = 0; i < ks; ++i) store_some(target + (k + i) * st.c + position, block[i], count);
      }
    }
  }

  const ConvMaxPool2dForwardParams& p_;
  const ConvMaxPool2dGeometry& g_;
  A no_gradient_;
};

}  // namespace
}  // namespace pyconv::cpu
