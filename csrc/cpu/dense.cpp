// Fully connected layers of a compiled training step: products of few rows (the mini-batch) with a matrix that is much
// larger than they are, and its update in the same visit, so that the gradient of the matrix is never in memory.
//
//   along   sums[n, c] += x[n, r] * matrix[r, c]      vectors along c; eight rows of the matrix at a time
//   across  sums[n, r] = sum of x[n, c] * matrix[r, c]   dot products; four rows of the matrix at a time
//   step    gradient[r, c] = sum of a[n, r] * b[n, c]    eight rows at a time, then a step of SGD on the matrix
//
//                        forward    grad_input          a, b of the step
//   inputs are rows      along      across              input, grad_output
//   inputs are columns   across     along               grad_output, input
//
// Tasks are blocks of rows where the backward's product is `across`, and of columns where it is `along`; either way an
// element of a result is summed by one task in an order that the shape alone decides.
#include "isa_kernels.h"
#include "sgd_step.h"
#include "transpose.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kRows = 8;             // of the matrix whose vectors `along` and `step` hold
constexpr int64_t kDotRows = 4;          // of the matrix whose dot products `across` sums together ...
constexpr int64_t kDotN = kVectorBytes == 64 ? 6 : 2;  // ... with so many rows of the mini-batch
constexpr int64_t kTaskRows = 32;        // of a task; a multiple of kRows
constexpr int64_t kTaskColumns = 128;    // of a task; whole cache lines of any type
constexpr int64_t kMostTerms = 256;      // of one running sum: long ones lose digits

// Operands in the accumulator's type: as they are, or widened into the workspace.
template <class T>
const Accumulator<T>* widened_operand(const void* source, int64_t count, Accumulator<T>*& workspace) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    return static_cast<const A*>(source);
  } else {
    A* const target = workspace;
    workspace += round_up(count, 16);
    const T* from = static_cast<const T*>(source);
    for (int64_t i = 0; i < count; ++i) target[i] = widen(from[i]);
    return target;
  }
}

// Results likewise.
template <class T>
Accumulator<T>* sums_of(void* target, int64_t count, Accumulator<T>*& workspace) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    return static_cast<Accumulator<T>*>(target);
  } else {
    Accumulator<T>* const sums = workspace;
    workspace += round_up(count, 16);
    return sums;
  }
}

template <class T>
void narrow_columns(const Accumulator<T>* sums, void* target, int64_t N, int64_t row, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) != sizeof(Accumulator<T>)) {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t c = begin; c < end; ++c) static_cast<T*>(target)[n * row + c] = narrow<T>(sums[n * row + c]);
    }
  }
}

template <class T>
class Dense {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = kWidth<A>;

 public:
  explicit Dense(const DenseGeometry& geometry) : g_(geometry) {}

  // sums (N, columns)[:, begin:end] += x (N, rows)[:, first:first + count] * rows of the matrix; = if first is 0.
  void along(const T* matrix, const A* x, int64_t first, int64_t count, int64_t begin, int64_t end, A* sums) const {
    if (count == kRows) return along_rows<true>(matrix, x, first, count, begin, end, sums);
    along_rows<false>(matrix, x, first, count, begin, end, sums);
  }

  // sums (N, rows)[:, first:last] = x (N, columns) * rows of the matrix.
  void across(const T* matrix, const A* x, int64_t first, int64_t last, A* sums) const {
    for (int64_t r = first; r < last; r += kDotRows) {
      for (int64_t n = 0; n < g_.N; n += kDotN) {
        if (r + kDotRows <= last && n + kDotN <= g_.N) {
          dot_tile<true>(matrix, x, r, kDotRows, n, kDotN, sums);
        } else {
          dot_tile<false>(matrix, x, r, min_of(kDotRows, last - r), n, min_of(kDotN, g_.N - n), sums);
        }
      }
    }
  }

  // A step of rows [first, first + count) and columns [begin, end), by a (N, rows) and b (N, columns).
  void step(const SgdVectors<T>& sgd, T* matrix, T* buffer, const A* a, const A* b, int64_t first, int64_t count,
            int64_t begin, int64_t end, SquareSum<A>& squares) const {
    if (count == kRows) return step_rows<true>(sgd, matrix, buffer, a, b, first, count, begin, end, squares);
    step_rows<false>(sgd, matrix, buffer, a, b, first, count, begin, end, squares);
  }

 private:
  template <bool full>
  void along_rows(const T* matrix, const A* x, int64_t first, int64_t rows, int64_t begin, int64_t end,
                  A* sums) const {
    const int64_t count = full ? kRows : rows;
    const bool fresh = first == 0;
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t lanes = min_of(kLanes, end - c);
      Vec<A> m[kRows];
#pragma GCC unroll 8
      for (int64_t i = 0; i < count; ++i) m[i] = SgdVectors<T>::load_lanes(matrix + (first + i) * g_.columns + c, lanes);
      for (int64_t n = 0; n < g_.N; ++n) {
        const A* factors = x + n * g_.rows + first;
        Vec<A> sum = mul(broadcast(factors[0]), m[0]);
#pragma GCC unroll 8
        for (int64_t i = 1; i < count; ++i) sum = fma(broadcast(factors[i]), m[i], sum);
        A* const to = sums + n * g_.columns + c;
        SgdVectors<A>::store_lanes(to, fresh ? sum : add(SgdVectors<A>::load_lanes(to, lanes), sum), lanes);
      }
    }
  }

  template <bool full>
  void dot_tile(const T* matrix, const A* x, int64_t first_row, int64_t rows, int64_t first_n, int64_t ns,
                A* sums) const {
    const int64_t row_count = full ? kDotRows : rows, n_count = full ? kDotN : ns;
    Vec<A> acc[kDotN][kDotRows];
#pragma GCC unroll 8
    for (int64_t n = 0; n < kDotN; ++n) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kDotRows; ++i) acc[n][i] = zero<A>();
    }
    for (int64_t c = 0; c < g_.columns; c += kLanes) {
      const int64_t lanes = min_of(kLanes, g_.columns - c);
      Vec<A> m[kDotRows];
#pragma GCC unroll 4
      for (int64_t i = 0; i < row_count; ++i) {
        m[i] = SgdVectors<T>::load_lanes(matrix + (first_row + i) * g_.columns + c, lanes);
      }
#pragma GCC unroll 8
      for (int64_t n = 0; n < n_count; ++n) {
        const Vec<A> factor = SgdVectors<A>::load_lanes(x + (first_n + n) * g_.columns + c, lanes);
#pragma GCC unroll 4
        for (int64_t i = 0; i < row_count; ++i) acc[n][i] = fma(factor, m[i], acc[n][i]);
      }
    }
    // Lanes are added up by transposing as many sums as a vector has lanes.
    constexpr int64_t kSums = kDotN * kDotRows;
    Vec<A>* const flat = &acc[0][0];
    for (int64_t done = 0; done < kSums; done += kLanes) {
      Vec<A> tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) tile[i] = done + i < kSums ? flat[done + i] : zero<A>();
      transpose(tile);
      for (int64_t step = 1; step < kLanes; step *= 2) {
        for (int64_t i = 0; i + step < kLanes; i += 2 * step) tile[i] = add(tile[i], tile[i + step]);
      }
      A totals[kLanes];
      store(totals, tile[0]);
      for (int64_t i = 0; i < kLanes && done + i < kSums; ++i) {
        const int64_t n = (done + i) / kDotRows, row = (done + i) % kDotRows;
        if (n < n_count && row < row_count) sums[(first_n + n) * g_.rows + first_row + row] = totals[i];
      }
    }
  }

  template <bool full>
  void step_rows(const SgdVectors<T>& sgd, T* matrix, T* buffer, const A* a, const A* b, int64_t first, int64_t rows,
                 int64_t begin, int64_t end, SquareSum<A>& squares) const {
    const int64_t count = full ? kRows : rows;
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t lanes = min_of(kLanes, end - c);
      Vec<A> gradient[kRows];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) gradient[i] = zero<A>();
      for (int64_t begin_n = 0; begin_n < g_.N; begin_n += kMostTerms) {
        Vec<A> part[kRows];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) part[i] = zero<A>();
        for (int64_t n = begin_n; n < min_of(g_.N, begin_n + kMostTerms); ++n) {
          const Vec<A> factor = SgdVectors<A>::load_lanes(b + n * g_.columns + c, lanes);
          const A* factors = a + n * g_.rows + first;
#pragma GCC unroll 8
          for (int64_t i = 0; i < count; ++i) part[i] = fma(broadcast(factors[i]), factor, part[i]);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) gradient[i] = add(gradient[i], part[i]);
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * g_.columns + c;
        const Vec<A> old = SgdVectors<T>::load_lanes(matrix + at, lanes);
        squares.add_squares(sgd.update(old, gradient[i], matrix + at, buffer == nullptr ? nullptr : buffer + at, lanes));
      }
    }
    squares.flush();
  }

  const DenseGeometry& g_;
};

template <class T>
int64_t operand_bytes(int64_t count) {
  return sizeof(T) == sizeof(Accumulator<T>) ? 0 : round_up(count, 16) * int64_t(sizeof(Accumulator<T>));
}

template <class T>
void forward(const DenseForwardParams& p) {
  using A = Accumulator<T>;
  const DenseGeometry& g = p.geometry;
  const Dense<T> dense(g);
  auto* workspace = static_cast<A*>(p.workspace);
  const auto* matrix = static_cast<const T*>(p.matrix);
  const A* x = widened_operand<T>(p.input, g.N * g.inputs(), workspace);
  A* const sums = sums_of<T>(p.output, g.N * g.outputs(), workspace);
  if (g.inputs_are_rows) {
    parallel(p.threads, ceil_div(g.columns, kTaskColumns), [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * kTaskColumns, end = min_of(begin + kTaskColumns, g.columns);
        for (int64_t r = 0; r < g.rows; r += kRows) {
          dense.along(matrix, x, r, min_of(kRows, g.rows - r), begin, end, sums);
        }
        narrow_columns<T>(sums, p.output, g.N, g.columns, begin, end);
      }
    });
  } else {
    parallel(p.threads, ceil_div(g.rows, kTaskRows), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kTaskRows, end = min_of(last * kTaskRows, g.rows);
      dense.across(matrix, x, begin, end, sums);
      narrow_columns<T>(sums, p.output, g.N, g.rows, begin, end);
    });
  }
}

template <class T>
void backward(const DenseBackwardParams& p) {
  using A = Accumulator<T>;
  const DenseGeometry& g = p.geometry;
  const Dense<T> dense(g);
  const SgdVectors<T> sgd(p.step);
  auto* partials = static_cast<double*>(p.workspace);
  const int64_t tasks = g.inputs_are_rows ? ceil_div(g.rows, kTaskRows) : ceil_div(g.columns, kTaskColumns);
  auto* workspace = reinterpret_cast<A*>(partials + round_up(tasks, 8));
  auto* matrix = static_cast<T*>(p.matrix);
  auto* buffer = static_cast<T*>(p.momentum_buffer);
  const A* input = widened_operand<T>(p.input, g.N * g.inputs(), workspace);
  const A* grad = widened_operand<T>(p.grad_output, g.N * g.outputs(), workspace);
  A* const sums = p.grad_input == nullptr ? nullptr : sums_of<T>(p.grad_input, g.N * g.inputs(), workspace);
  const A* a = g.inputs_are_rows ? input : grad;
  const A* b = g.inputs_are_rows ? grad : input;
  parallel(p.threads, tasks, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      SquareSum<A> squares;
      const int64_t first_row = g.inputs_are_rows ? task * kTaskRows : 0;
      const int64_t last_row = g.inputs_are_rows ? min_of(first_row + kTaskRows, g.rows) : g.rows;
      const int64_t begin = g.inputs_are_rows ? 0 : task * kTaskColumns;
      const int64_t end = g.inputs_are_rows ? g.columns : min_of(begin + kTaskColumns, g.columns);
      for (int64_t r = first_row; r < last_row; r += kRows) {
        const int64_t count = min_of(kRows, last_row - r);
        // The product reads rows before their step.
        if (sums != nullptr) {
          if (g.inputs_are_rows) {
            dense.across(matrix, grad, r, r + count, sums);
          } else {
            dense.along(matrix, grad, r, count, begin, end, sums);
          }
        }
        if (p.update) dense.step(sgd, matrix, buffer, a, b, r, count, begin, end, squares);
      }
      if (sums != nullptr) {
        if (g.inputs_are_rows) {
          narrow_columns<T>(sums, p.grad_input, g.N, g.rows, first_row, last_row);
        } else {
          narrow_columns<T>(sums, p.grad_input, g.N, g.columns, begin, end);
        }
      }
      partials[task] = squares.total();
    }
  });
  if (p.squares == nullptr) return;
  *p.squares = 0;
  for (int64_t task = 0; task < tasks; ++task) *p.squares += partials[task];
}

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

int64_t dense_forward_workspace_bytes(const DenseForwardParams& params) {
  const DenseGeometry& g = params.geometry;
  return with_storage_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    return operand_bytes<T>(g.N * g.inputs()) + operand_bytes<T>(g.N * g.outputs());
  });
}

void dense_forward(const DenseForwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { forward<decltype(storage)>(params); });
}

int64_t dense_backward_workspace_bytes(const DenseBackwardParams& params) {
  const DenseGeometry& g = params.geometry;
  const int64_t tasks = g.inputs_are_rows ? ceil_div(g.rows, kTaskRows) : ceil_div(g.columns, kTaskColumns);
  return round_up(tasks, 8) * int64_t(sizeof(double)) + with_storage_type(params.dtype, [&](auto storage) {
           using T = decltype(storage);
           return 2 * operand_bytes<T>(g.N * g.inputs()) + operand_bytes<T>(g.N * g.outputs());
         });
}

void dense_backward(const DenseBackwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { backward<decltype(storage)>(params); });
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
