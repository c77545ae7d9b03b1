// Dropout, alone or behind bias and activation, forward and backward, in one pass over the data.
//
//   forward   input (rows, columns) -> + bias (columns) -> activation -> * scale or 0
//             -> output (rows, columns)
//   backward  grad_output (rows, columns) -> * scale or 0 -> * activation' -> grad_input (rows, columns);
//             its sum over the rows -> grad_bias (columns)
//
// The mask is computed again in the backward, from the seed. Elements are visited in segments: pieces of a
// row of at most kSegment elements, whose keep bits lie ready in a window over the flat index.
#include "isa_kernels.h"
#include "parallel.h"
#include "philox_simd.h"
#include "simd.h"
#include "simd_math.h"
#include "storage_simd.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kSegment = 512;
constexpr int64_t kWindow = 2048;        // elements whose keep bits are computed at once, at most; a multiple of 16
constexpr int64_t kChunk = 8 * kWindow;  // elements of one unit of parallel work

// The keep bits of a window of elements that moves forward over the flat index. A window of one segment is best where
// all segments are full: its bits are used while the next loads wait. Shorter segments do not fill such a window.
class KeepBits {
 public:
  template <class Params>
  KeepBits(const Params& params, int64_t window)
      : draw_(params.drop), draws_(), seed_(params.seed), offset_(params.offset), window_(window) {
    if (draw_) {
      draws_ = dropout_draws(params.p);
    } else {
      std::memset(bits_, params.scale == 0 ? 0 : 0xff, sizeof bits_);
    }
  }

  // Makes the bits of [first, first + count) available and returns the position of `first` among bits(). count is at
  // most kSegment, and first a multiple of 16 if the window is one segment. What follows up to `limit` will be asked
  // for next.
  int64_t seek(int64_t first, int64_t count, int64_t limit) {
    if (!draw_) return 0;
    if (first < begin_ || first + count > end_) {
      begin_ = first / 16 * 16;
      end_ = min_of(begin_ + window_, limit);
      fill_keep_bits(draws_, seed_, offset_, begin_, end_ - begin_, bits_);
    }
    return first - begin_;
  }

  const uint8_t* bits() const { return bits_; }

 private:
  bool draw_;  // otherwise all elements have the same bit
  DropoutDraws draws_;
  uint64_t seed_, offset_;
  int64_t window_, begin_ = 0, end_ = 0;
  // bits_from() reads 4 bytes, from any byte that holds a bit.
  alignas(64) uint8_t bits_[kWindow / 8 + kKeepBitsSlack + 4];
};

// ---- Derivatives of vectors ------------------------------------------------------------------------------

// gradient * activation', where `gradient` is already multiplied by the dropout factor. The saved output of a
// kept element is scale * activation(x); that of a dropped one says nothing, and its gradient stays what it
// is: 0, or NaN from a non-finite grad_output.
template <Activation activation, class A>
inline Vec<A> through_activation(Vec<A> gradient, Vec<A> saved, Vec<A> inverse_scale, Mask<A> dropped) {
  const Vec<A> one = broadcast(A(1));
  if (activation == Activation::none) return gradient;
  if (activation == Activation::relu) {
    const Mask<A> live = either(either(greater(saved, zero<A>()), is_nan(saved)), dropped);
    return select(live, gradient, zero<A>());
  }
  if (activation == Activation::sigmoid) {
    // Rounding may have carried the output past the range of the activation.
    Vec<A> y = mul(saved, inverse_scale);
    y = select(greater(y, one), one, y);
    return mul(gradient, mul(y, add(one, mul(y, broadcast(A(-1))))));
  }
  if (activation == Activation::tanh) {
    const Vec<A> y = mul(saved, inverse_scale);
    const Vec<A> square = mul(y, y);
    return mul(gradient, add(one, mul(select(greater(square, one), one, square), broadcast(A(-1)))));
  }
  return mul(gradient, activation_derivative(activation, saved));
}

// ---- Segments -------------------------------------------------------------------------------------------

// All lanes of a vector or the first n, from and to memory: one loop body serves full and partial vectors.
template <bool full, class T>
inline Vec<Accumulator<T>> load_lanes(const T* p, int64_t n) {
  return full ? load_widened(p) : load_widened(p, n);
}
template <bool full, class T>
inline void store_lanes(T* p, Vec<Accumulator<T>> x, int64_t n) {
  if (full) {
    store_narrowed(p, x);
  } else {
    store_narrowed(p, x, n);
  }
}

template <class T>
struct ForwardSegment {
  const T* input;
  const T* bias;  // or null
  T* output;
  T* pre_activation;  // or null
};

template <Activation activation, bool full, class T>
inline void forward_vector(const ForwardSegment<T>& s, int64_t i, int64_t n, uint32_t kept,
                           Accumulator<T> scale) {
  using A = Accumulator<T>;
  Vec<A> x = load_lanes<full>(s.input + i, n);
  if (s.bias != nullptr) x = add(x, load_lanes<full>(s.bias + i, n));
  if (s.pre_activation != nullptr) store_lanes<full>(s.pre_activation + i, x, n);
  const Vec<A> factor = select(mask_from_bits<A>(kept), broadcast(scale), zero<A>());
  store_lanes<full>(s.output + i, mul(activate(activation, x), factor), n);
}

template <Activation activation, class T>
inline void forward_segment(const ForwardSegment<T>& s, int64_t count, const uint8_t* bits, int64_t position,
                            Accumulator<T> scale) {
  constexpr int64_t width = kWidth<Accumulator<T>>;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    forward_vector<activation, true>(s, i, width, bits_from(bits, position + i), scale);
  }
  if (i < count) forward_vector<activation, false>(s, i, count - i, bits_from(bits, position + i), scale);
}

template <class T>
struct BackwardSegment {
  const T* grad_output;
  const T* saved;  // or null
  T* grad_input;
  Accumulator<T>* sums;  // the segment's gradients are added to these; or null
};

template <Activation activation, bool full, class T>
inline void backward_vector(const BackwardSegment<T>& s, int64_t i, int64_t n, uint32_t kept,
                            Accumulator<T> scale, Accumulator<T> inverse_scale) {
  using A = Accumulator<T>;
  const Vec<A> factor = select(mask_from_bits<A>(kept), broadcast(scale), zero<A>());
  Vec<A> gradient = mul(load_lanes<full>(s.grad_output + i, n), factor);
  if (activation != Activation::none) {
    gradient = through_activation<activation>(gradient, load_lanes<full>(s.saved + i, n),
                                              broadcast(inverse_scale), mask_from_bits<A>(~kept));
  }
  store_lanes<full>(s.grad_input + i, gradient, n);
  if (s.sums != nullptr) {
    store_lanes<full>(s.sums + i, add(load_lanes<full>(s.sums + i, n), gradient), n);
  }
}

template <Activation activation, class T>
inline void backward_segment(const BackwardSegment<T>& s, int64_t count, const uint8_t* bits,
                             int64_t position, Accumulator<T> scale, Accumulator<T> inverse_scale) {
  constexpr int64_t width = kWidth<Accumulator<T>>;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    backward_vector<activation, true>(s, i, width, bits_from(bits, position + i), scale, inverse_scale);
  }
  if (i < count) {
    backward_vector<activation, false>(s, i, count - i, bits_from(bits, position + i), scale, inverse_scale);
  }
}

// ---- Whole tensors --------------------------------------------------------------------------------------

template <Activation activation, class T>
void forward(const BiasActDropoutForwardParams& p) {
  using A = Accumulator<T>;
  const int64_t count = p.rows * p.columns;
  const auto* input = static_cast<const T*>(p.input);
  const auto* bias = static_cast<const T*>(p.bias);
  auto* output = static_cast<T*>(p.output);
  auto* pre_activation = static_cast<T*>(p.pre_activation);
  const A scale = static_cast<A>(p.scale);
  parallel(p.threads, ceil_div(count, kChunk), [&](int64_t first_chunk, int64_t last_chunk) {
    const int64_t begin = first_chunk * kChunk, end = min_of(last_chunk * kChunk, count);
    KeepBits keep(p, bias == nullptr ? kSegment : kWindow);
    int64_t column = bias == nullptr ? 0 : begin % p.columns;
    for (int64_t i = begin; i < end;) {
      int64_t length = min_of(kSegment, end - i);
      if (bias != nullptr) length = min_of(length, p.columns - column);
      const int64_t position = keep.seek(i, length, end);
      forward_segment<activation, T>({input + i, bias == nullptr ? nullptr : bias + column, output + i,
                                      pre_activation == nullptr ? nullptr : pre_activation + i},
                                     length, keep.bits(), position, scale);
      i += length;
      column = column + length == p.columns ? 0 : column + length;
    }
  });
}

template <class A>
A inverse_or_zero(double scale) {
  return scale == 0 ? A(0) : static_cast<A>(1 / scale);
}

template <Activation activation, class T>
void backward_without_bias(const BiasActDropoutBackwardParams& p) {
  using A = Accumulator<T>;
  const int64_t count = p.rows * p.columns;
  const auto* grad_output = static_cast<const T*>(p.grad_output);
  const auto* saved = static_cast<const T*>(p.saved);
  auto* grad_input = static_cast<T*>(p.grad_input);
  const A scale = static_cast<A>(p.scale), inverse_scale = inverse_or_zero<A>(p.scale);
  parallel(p.threads, ceil_div(count, kChunk), [&](int64_t first_chunk, int64_t last_chunk) {
    const int64_t begin = first_chunk * kChunk, end = min_of(last_chunk * kChunk, count);
    KeepBits keep(p, kSegment);
    for (int64_t i = begin; i < end; i += kSegment) {
      const int64_t length = min_of(kSegment, end - i);
      const int64_t position = keep.seek(i, length, end);
      backward_segment<activation, T>(
          {grad_output + i, saved == nullptr ? nullptr : saved + i, grad_input + i, nullptr}, length,
          keep.bits(), position, scale, inverse_scale);
    }
  });
}

// The bias gradient is summed by a tree that only the shape decides: kRowsPerSum rows one after the other,
// such sums one after the other within a chunk of rows, the chunks pairwise.
constexpr int64_t kRowsPerSum = 64;
constexpr int64_t kMinRowsPerChunk = 16;
constexpr int64_t kPartialSums = 8192;  // sums of all chunks together, on the caller's stack

template <Activation activation, class T>
void backward_with_bias(const BiasActDropoutBackwardParams& p) {
  using A = Accumulator<T>;
  const auto* grad_output = static_cast<const T*>(p.grad_output);
  const auto* saved = static_cast<const T*>(p.saved);
  auto* grad_input = static_cast<T*>(p.grad_input);
  auto* grad_bias = static_cast<T*>(p.grad_bias);
  const A scale = static_cast<A>(p.scale), inverse_scale = inverse_or_zero<A>(p.scale);

  const int64_t chunks_wanted = min_of(kPartialSums / p.columns, ceil_div(p.rows, kMinRowsPerChunk));
  const int64_t rows_per_chunk = ceil_div(p.rows, max_of(chunks_wanted, 1));
  const int64_t row_chunks = ceil_div(p.rows, rows_per_chunk);
  const int64_t column_blocks = ceil_div(p.columns, kSegment);
  A partial[kPartialSums];  // (row_chunks, columns), unless one chunk writes the result itself

  parallel(p.threads, row_chunks * column_blocks, [&](int64_t first_task, int64_t last_task) {
    KeepBits keep(p, kWindow);
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t chunk = task / column_blocks, column = task % column_blocks * kSegment;
      const int64_t width = min_of(kSegment, p.columns - column);
      const int64_t first_row = chunk * rows_per_chunk, last_row = min_of(first_row + rows_per_chunk, p.rows);
      A total[kSegment], sums[kSegment];
      for (int64_t c = 0; c < width; ++c) total[c] = 0;
      for (int64_t row = first_row; row < last_row;) {
        for (int64_t c = 0; c < width; ++c) sums[c] = 0;
        for (const int64_t stop = min_of(row + kRowsPerSum, last_row); row < stop; ++row) {
          const int64_t i = row * p.columns + column;
          // With one block of columns the task walks through contiguous memory.
          const int64_t position = keep.seek(i, width, column_blocks == 1 ? last_row * p.columns : i + width);
          backward_segment<activation, T>(
              {grad_output + i, saved == nullptr ? nullptr : saved + i, grad_input + i, sums}, width,
              keep.bits(), position, scale, inverse_scale);
        }
        for (int64_t c = 0; c < width; ++c) total[c] += sums[c];
      }
      for (int64_t c = 0; c < width; ++c) {
        if (row_chunks == 1) {
          grad_bias[column + c] = narrow<T>(total[c]);
        } else {
          partial[chunk * p.columns + column + c] = total[c];
        }
      }
    }
  });
  if (row_chunks == 1) return;
  for (int64_t step = 1; step < row_chunks; step *= 2) {
    for (int64_t chunk = 0; chunk + step < row_chunks; chunk += 2 * step) {
      for (int64_t c = 0; c < p.columns; ++c)
        partial[chunk * p.columns + c] += partial[(chunk + step) * p.columns + c];
    }
  }
  for (int64_t c = 0; c < p.columns; ++c) grad_bias[c] = narrow<T>(partial[c]);
}

template <Activation activation, class T>
void backward(const BiasActDropoutBackwardParams& p) {
  if (p.grad_bias == nullptr) {
    backward_without_bias<activation, T>(p);
  } else if (p.rows == 0) {
    for (int64_t c = 0; c < p.columns; ++c) static_cast<T*>(p.grad_bias)[c] = narrow<T>(Accumulator<T>(0));
  } else if (p.columns > 0) {
    backward_with_bias<activation, T>(p);
  }
}

// ---- From run-time to compile-time choices --------------------------------------------------------------

template <class T, class Params, class Run>
void with_activation(const Params& params, const Run& run) {
  switch (params.activation) {
    case Activation::none:
      return run.template operator()<Activation::none, T>(params);
    case Activation::relu:
      return run.template operator()<Activation::relu, T>(params);
    case Activation::sigmoid:
      return run.template operator()<Activation::sigmoid, T>(params);
    case Activation::tanh:
      return run.template operator()<Activation::tanh, T>(params);
    case Activation::gelu:
      return run.template operator()<Activation::gelu, T>(params);
    case Activation::silu:
      return run.template operator()<Activation::silu, T>(params);
  }
}

template <class Params, class Run>
void with_types(const Params& params, const Run& run) {
  switch (params.dtype) {
    case DType::float32:
      return with_activation<float>(params, run);
    case DType::float64:
      return with_activation<double>(params, run);
    case DType::bfloat16:
      return with_activation<BFloat16>(params, run);
    case DType::float16:
      return with_activation<Float16>(params, run);
  }
}

struct Forward {
  template <Activation activation, class T>
  void operator()(const BiasActDropoutForwardParams& params) const {
    forward<activation, T>(params);
  }
};

struct Backward {
  template <Activation activation, class T>
  void operator()(const BiasActDropoutBackwardParams& params) const {
    backward<activation, T>(params);
  }
};

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

void bias_act_dropout_forward(const BiasActDropoutForwardParams& params) { with_types(params, Forward{}); }

void bias_act_dropout_backward(const BiasActDropoutBackwardParams& params) { with_types(params, Backward{}); }

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
