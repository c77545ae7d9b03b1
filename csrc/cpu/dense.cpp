// Fully connected layers of a compiled training step: products of few rows (the mini-batch) with a matrix that is much
// larger than they are, and its update in the same visit, so that the gradient of the matrix is never in memory.
//
//   along   sums[n, c] += x[n, r] * matrix[r, c]       for the rows r where x[n, r] is not 0
//   across  sums[n, r] = sum of x[n, c] * matrix[r, c]
//   visit   of a row r: gradient[c] = sum of a[n, r] * b[n, c] over the n where a[n, r] is not 0, a step of SGD on the
//           row and, where asked for, sums[n, r] = sum of b[n, c] * matrix[r, c] with the row as it was before
//
//                        forward    backward
//   inputs are rows      along      visit with sums, a = input, b = grad_output
//   inputs are columns   across     along, then visit, a = grad_output, b = input
//
// Behind ReLU and dropout most inputs and their gradients are 0, which is why `along` and `visit` go by lists. Tasks are
// blocks of columns in `along`, and of rows elsewhere; where the blocks of columns are few, `along` takes the rows in
// parts, each thread those that it updates in the backward, and adds the parts up. An element of a result is summed in an
// order that shapes and operands alone decide.
#include "isa_kernels.h"
#include "parallel.h"
#include "sgd_step.h"

namespace pyconv::cpu {
namespace {

constexpr int64_t kBlockRows = 32;     // of the matrix, that stay in the first-level cache for the whole mini-batch
constexpr int kBlockVectors = 8;       // of columns, whose sums `along` holds in registers
constexpr int64_t kCopyUses = 10;       // of a row of the matrix, from which a copy of it that is aligned pays
constexpr int64_t kFewTasks = 4;       // of `along`: then the rows are taken in as many parts
constexpr int kDotRows = 4;            // of the matrix whose dot products `across` sums together ...
constexpr int kDotN = kVectorBytes == 64 ? 6 : 2;   // ... with at most so many rows of the mini-batch
constexpr int kVisitN = kVectorBytes == 64 ? 10 : 4;  // rows of the mini-batch whose sums a visit holds in registers

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

// The rows (N, columns) of an operand of products along its rows, which are to be whole vectors: as they are, or followed
// by zeros in the workspace.
template <class T>
struct Rows {
  using A = Accumulator<T>;
  const A* data;
  int64_t stride;

  static bool as_they_are(int64_t columns) { return sizeof(T) == sizeof(A) && columns % kWidth<A> == 0; }
  static int64_t stride_of(int64_t columns) { return round_up(columns, kWidth<A>); }
  static int64_t bytes(int64_t N, int64_t columns) {
    return as_they_are(columns) ? 0 : round_up(N * stride_of(columns), 16) * int64_t(sizeof(A));
  }

  Rows(const void* source, int64_t N, int64_t columns, A*& workspace)
      : data(static_cast<const A*>(source)), stride(stride_of(columns)) {
    if (as_they_are(columns)) return;
    data = workspace;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t c = 0; c < stride; c += kWidth<A>) {
        const T* from = static_cast<const T*>(source) + n * columns + c;
        store(workspace + n * stride + c, SgdVectors<T>::load_lanes(from, min_of(kWidth<A>, columns - c)));
      }
    }
    workspace += round_up(N * stride, 16);
  }
};

// Results in the accumulator's type, to be narrowed by narrow_part.
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
void narrow_part(const Accumulator<T>* sums, void* target, int64_t row, int64_t first_n, int64_t last_n, int64_t begin,
                 int64_t end) {
  if constexpr (sizeof(T) != sizeof(Accumulator<T>)) {
    for (int64_t n = first_n; n < last_n; ++n) {
      for (int64_t c = begin; c < end; ++c) static_cast<T*>(target)[n * row + c] = narrow<T>(sums[n * row + c]);
    }
  }
}

// The positions of the elements of x (N, count) that are not 0: row by row, in blocks of kBlockRows.
struct Positions {
  int32_t* entries;  // (N, count)
  int32_t* starts;   // (N, blocks + 1)
  int64_t count, blocks;

  static constexpr int64_t kPadding = 16;  // a vector is written where fewer positions may be left

  static int64_t size(int64_t N, int64_t count) {
    return round_up(N * (count + ceil_div(count, kBlockRows) + 1) + kPadding, 16);
  }

  Positions(int32_t* memory, int64_t N, int64_t columns)
      : entries(memory),
        starts(memory + N * columns + kPadding),
        count(columns),
        blocks(ceil_div(columns, kBlockRows)) {}

  // Rows in order, since a row's last vector may reach into the next row's positions.
  template <class A>
  void list(const A* x, int64_t n) const {
    int32_t* const to = entries + n * count;
    int32_t found = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      starts[n * (blocks + 1) + block] = found;
      found = append(x + n * count, block * kBlockRows, min_of(count, (block + 1) * kBlockRows), to, found);
    }
    starts[n * (blocks + 1) + blocks] = found;
  }

  int64_t in_block(int64_t block, int64_t N) const {
    int64_t sum = 0;
    for (int64_t n = 0; n < N; ++n) {
      const int32_t* start = starts + n * (blocks + 1) + block;
      sum += start[1] - start[0];
    }
    return sum;
  }

 private:
#if defined(__AVX512F__)
  static int32_t append(const float* x, int64_t first, int64_t last, int32_t* to, int32_t found) {
    for (int64_t i = first; i < last; i += 16) {
      const __mmask16 kept = _mm512_cmp_ps_mask(load_partial(x + i, last - i).v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(i)),
                                               _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(kept, numbers));
      found += __builtin_popcount(kept);
    }
    return found;
  }
#endif
  template <class A>
  static int32_t append(const A* x, int64_t first, int64_t last, int32_t* to, int32_t found) {
    for (int64_t i = first; i < last; ++i) {
      to[found] = static_cast<int32_t>(i);
      found += x[i] != A(0);
    }
    return found;
  }
};

template <class T>
class Dense {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = kWidth<A>;
  static constexpr int64_t kVisitColumns = 32 * kLanes;

 public:
  static constexpr int64_t kBlockColumns = kBlockVectors * kLanes;

  explicit Dense(const DenseGeometry& geometry) : g_(geometry) {}

  // ---- along ------------------------------------------------------------------------------------------------

  // sums (N, columns)[:, begin:end] += x (N, rows)[:, block] * rows of the matrix; = if fresh.
  void along(const T* matrix, const A* x, const Positions& positions, int64_t block, bool fresh, int64_t begin,
             int64_t end, A* sums) const {
    const int64_t first = block * kBlockRows, rows = min_of(kBlockRows, g_.rows - first);
    const T* const origin = matrix + begin;
    if (Rows<T>::as_they_are(g_.columns) ||
        (sizeof(T) == sizeof(A) && positions.in_block(block, g_.N) < kCopyUses * rows)) {
      along_block({reinterpret_cast<const A*>(origin), g_.columns, origin}, x, positions, block, fresh, begin, end, sums);
    } else {
      alignas(64) A widened[kBlockRows * kBlockColumns];
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = begin; c < end; c += kLanes) {
          const int64_t lanes = min_of(kLanes, end - c);
          store(widened + i * kBlockColumns + c - begin,
                SgdVectors<T>::load_lanes(matrix + (first + i) * g_.columns + c, lanes));
        }
      }
      along_block({widened - first * kBlockColumns, kBlockColumns, origin}, x, positions, block, fresh, begin, end, sums);
    }
  }

  // ---- across -----------------------------------------------------------------------------------------------

  // sums (N, rows)[:, first:last] = x (N, columns) * rows of the matrix.
  void across(const T* matrix, const Rows<T>& x, int64_t first, int64_t last, A* sums) const {
    const int64_t tiles = ceil_div(g_.N, kDotN);
    for (int64_t r = first; r < last;) {
      const bool four = last - r >= kDotRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = g_.N * tile / tiles, count = g_.N * (tile + 1) / tiles - n;
        if (four) {
          dot_tile<kDotRows>(matrix, x, r, n, count, sums);
        } else {
          dot_tile<1>(matrix, x, r, n, count, sums);
        }
      }
      r += four ? kDotRows : 1;
    }
  }

  // ---- visit ------------------------------------------------------------------------------------------------

  struct Visit {
    const SgdVectors<T>& sgd;
    bool update, wants_squares;
    bool idle;  // a gradient of 0 changes nothing
    T *matrix, *momentum_buffer;
    const A* a;                  // (N, rows)
    Rows<T> b;                   // (N, columns)
    A* sums = nullptr;           // (N, rows), zeros; or null
    bool all_sums = false;       // also where a is 0
    int32_t* listed = nullptr;   // (kBlockRows, N)
  };

  // Rows [first, last) of a block, columns [begin, end).
  void visit(const Visit& v, int64_t first, int64_t last, int64_t begin, int64_t end, SquareSum<A>& squares) const {
    int32_t counts[kBlockRows] = {};
    for (int64_t n = 0; n < g_.N; ++n) {
      for (int64_t r = first; r < last; ++r) {
        int32_t& count = counts[r - first];
        v.listed[(r - first) * g_.N + count] = static_cast<int32_t>(n);
        count += v.all_sums | (v.a[n * g_.rows + r] != A(0));
      }
    }
    if (g_.N <= kVisitN) {
      for (int64_t r = first; r < last; ++r) {
        visit_last(v, r, v.listed + (r - first) * g_.N, counts[r - first], begin, end, nullptr, false, squares);
      }
    } else {
      // Part by part for all rows, so that what a part reads of b stays in the first-level cache.
      alignas(64) A partial[kBlockRows * kVisitColumns];
      int64_t most = 1;
      for (int64_t r = first; r < last; ++r) most = max_of(most, counts[r - first]);
      for (int64_t c = begin; c < end; c += kVisitColumns) {
        const int64_t stop = min_of(end, c + kVisitColumns);
        for (int64_t done = 0; done < most; done += kVisitN) {
          for (int64_t r = first; r < last; ++r) {
            const int64_t left = counts[r - first] - done;
            const int32_t* listed = v.listed + (r - first) * g_.N + done;
            A* const of_row = partial + (r - first) * kVisitColumns;
            if (left > kVisitN) {
              visit_part<kVisitN, false>(v, r, listed, kVisitN, c, stop, of_row, done > 0, squares);
            } else if (left > 0 || done == 0) {
              visit_last(v, r, listed, left, c, stop, of_row, done > 0, squares);
            }
          }
        }
      }
    }
    squares.flush();
  }

 private:
  struct Block {
    const A* rows;  // row 0 of the matrix, or where it would be
    int64_t stride;
    const T* in_matrix;
  };

  void along_block(const Block& w, const A* x, const Positions& positions, int64_t block, bool fresh, int64_t begin,
                   int64_t end, A* sums) const {
    static_assert(kBlockVectors == 8);
    switch (ceil_div(end - begin, kLanes)) {
      case 1:
        return along_vectors<1>(w, x, positions, block, fresh, begin, end, sums);
      case 2:
        return along_vectors<2>(w, x, positions, block, fresh, begin, end, sums);
      case 3:
        return along_vectors<3>(w, x, positions, block, fresh, begin, end, sums);
      case 4:
        return along_vectors<4>(w, x, positions, block, fresh, begin, end, sums);
      case 5:
        return along_vectors<5>(w, x, positions, block, fresh, begin, end, sums);
      case 6:
        return along_vectors<6>(w, x, positions, block, fresh, begin, end, sums);
      case 7:
        return along_vectors<7>(w, x, positions, block, fresh, begin, end, sums);
      default:
        return along_vectors<8>(w, x, positions, block, fresh, begin, end, sums);
    }
  }

  template <int vectors>
  void along_vectors(const Block& w, const A* x, const Positions& positions, int64_t block, bool fresh, int64_t begin,
                     int64_t end, A* sums) const {
    const int64_t lanes = end - begin - (vectors - 1) * kLanes;  // of the last vector
    if (lanes == kLanes) {
      along_lanes<vectors, true>(w, x, positions, block, fresh, begin, lanes, sums);
    } else {
      along_lanes<vectors, false>(w, x, positions, block, fresh, begin, lanes, sums);
    }
  }

  template <int vectors, bool whole>
  void along_lanes(const Block& w, const A* x, const Positions& positions, int64_t block, bool fresh, int64_t begin,
                   int64_t lanes, A* sums) const {
    const auto loaded = [&](const A* p, int i) {
      return whole || i < vectors - 1 ? load(p + i * kLanes) : load_partial(p + i * kLanes, lanes);
    };
    const int64_t first = block * kBlockRows, rows = min_of(kBlockRows, g_.rows - first);
    // The rows of the next block are on their way while this one is worked on.
    int64_t next = first + rows;
    const int64_t share = ceil_div(kBlockRows, g_.N);
    const auto prefetch_for = [&](int64_t count) {
      for (const int64_t stop = min_of(next + count * share, min_of(first + 2 * kBlockRows, g_.rows)); next < stop;
           ++next) {
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) __builtin_prefetch(w.in_matrix + next * g_.columns + i * kLanes);
      }
    };
    const auto stored = [&](A* p, int i, Vec<A> sum) {
      if (whole || i < vectors - 1) {
        store(p + i * kLanes, sum);
      } else {
        store_partial(p + i * kLanes, sum, lanes);
      }
    };
    for (int64_t n = 0; n < g_.N; ++n) {
      const int32_t* starts = positions.starts + n * (positions.blocks + 1) + block;
      const A* factors = x + n * g_.rows;
      A* const to = sums + n * g_.columns + begin;
      // Two rows of the mini-batch without a 0 share what is loaded of the matrix.
      if (kVectorBytes == 64 && n + 1 < g_.N && starts[1] - starts[0] == rows &&
          starts[positions.blocks + 2] - starts[positions.blocks + 1] == rows) {
        prefetch_for(2);
        Vec<A> acc[vectors], other[vectors];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
          acc[i] = fresh ? zero<A>() : loaded(to, i);
          other[i] = fresh ? zero<A>() : loaded(to + g_.columns, i);
        }
        for (int64_t r = first; r < first + rows; ++r) {
          const Vec<A> factor = broadcast(factors[r]), other_factor = broadcast(factors[g_.rows + r]);
#pragma GCC unroll 8
          for (int i = 0; i < vectors; ++i) {
            const Vec<A> row = loaded(w.rows + r * w.stride, i);
            acc[i] = fma(factor, row, acc[i]);
            other[i] = fma(other_factor, row, other[i]);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
          stored(to, i, acc[i]);
          stored(to + g_.columns, i, other[i]);
        }
        ++n;
        continue;
      }
      prefetch_for(1);
      const int32_t* listed = positions.entries + n * positions.count;
      Vec<A> acc[vectors];
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) acc[i] = fresh ? zero<A>() : loaded(to, i);
      for (int32_t at = starts[0]; at < starts[1]; ++at) {
        const Vec<A> factor = broadcast(factors[listed[at]]);
        const A* row = w.rows + listed[at] * w.stride;
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) acc[i] = fma(factor, loaded(row, i), acc[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) stored(to, i, acc[i]);
    }
  }

  template <int rows>
  void dot_tile(const T* matrix, const Rows<T>& x, int64_t r, int64_t n, int64_t count, A* sums) const {
    static_assert(kDotN <= 6);
    switch (count) {
      case 1:
        return dots<rows, 1>(matrix, x, r, n, sums);
      case 2:
        return dots<rows, min_of(2, kDotN)>(matrix, x, r, n, sums);
      case 3:
        return dots<rows, min_of(3, kDotN)>(matrix, x, r, n, sums);
      case 4:
        return dots<rows, min_of(4, kDotN)>(matrix, x, r, n, sums);
      case 5:
        return dots<rows, min_of(5, kDotN)>(matrix, x, r, n, sums);
      default:
        return dots<rows, kDotN>(matrix, x, r, n, sums);
    }
  }

  template <int rows, int count>
  void dots(const T* matrix, const Rows<T>& x, int64_t first_row, int64_t first_n, A* sums) const {
    Vec<A> acc[count * rows];
#pragma GCC unroll 24
    for (int i = 0; i < count * rows; ++i) acc[i] = zero<A>();
    const T* const m = matrix + first_row * g_.columns;
    const A* const factors = x.data + first_n * x.stride;
    const auto add_products = [&](int64_t c, auto load_m) {
      Vec<A> row[rows];
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) row[i] = load_m(m + i * g_.columns + c);
#pragma GCC unroll 6
      for (int n = 0; n < count; ++n) {
        const Vec<A> factor = load(factors + n * x.stride + c);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) acc[n * rows + i] = fma(factor, row[i], acc[n * rows + i]);
      }
    };
    const int64_t whole = g_.columns / kLanes * kLanes, lanes = g_.columns - whole;
    for (int64_t c = 0; c < whole; c += kLanes) add_products(c, [](const T* p) { return load_widened(p); });
    if (lanes > 0) add_products(whole, [&](const T* p) { return load_widened(p, lanes); });
    A totals[count * rows + 3];
    sums_of_lanes<count * rows>(acc, totals);
    for (int n = 0; n < count; ++n) {
      for (int i = 0; i < rows; ++i) sums[(first_n + n) * g_.rows + first_row + i] = totals[n * rows + i];
    }
  }

  // totals[i]: the lanes of acc[i] added up.
  template <int count>
  static void sums_of_lanes(const Vec<A>* acc, A* totals) {
    const auto vector = [&](int i) { return i < count ? acc[i] : zero<A>(); };
#pragma GCC unroll 6
    for (int i = 0; i < count; i += 4) {
      store_sums_of_lanes(totals + i, vector(i), vector(i + 1), vector(i + 2), vector(i + 3));
    }
  }

  void visit_last(const Visit& v, int64_t r, const int32_t* listed, int64_t count, int64_t begin, int64_t end,
                  A* partial, bool continued, SquareSum<A>& squares) const {
    static_assert(kVisitN <= 10);
    switch ((count + 1) / 2) {
      case 0:
        if (!v.idle) visit_part<0, true>(v, r, listed, count, begin, end, partial, continued, squares);
        return;
      case 1:
        return visit_part<2, true>(v, r, listed, count, begin, end, partial, continued, squares);
      case 2:
        return visit_part<4, true>(v, r, listed, count, begin, end, partial, continued, squares);
      case 3:
        return visit_part<min_of(6, kVisitN), true>(v, r, listed, count, begin, end, partial, continued, squares);
      case 4:
        return visit_part<min_of(8, kVisitN), true>(v, r, listed, count, begin, end, partial, continued, squares);
      default:
        return visit_part<kVisitN, true>(v, r, listed, count, begin, end, partial, continued, squares);
    }
  }

  // `count` <= room of the rows listed: their part of the gradient, added to `partial` (its columns from `begin`) if
  // continued, which is where it goes unless it is the last.
  template <int room, bool last>
  void visit_part(const Visit& v, int64_t r, const int32_t* listed, int64_t count, int64_t begin, int64_t end, A* partial,
                  bool continued, SquareSum<A>& squares) const {
    if (v.sums != nullptr) {
      visit_columns<room, last, true>(v, r, listed, count, begin, end, partial, continued, squares);
    } else {
      visit_columns<room, last, false>(v, r, listed, count, begin, end, partial, continued, squares);
    }
    if (last) squares.flush_if_long((end - begin) / kLanes + 1);
  }

  template <int room, bool last, bool with_sums>
  void visit_columns(const Visit& v, int64_t r, const int32_t* listed, int64_t count, int64_t begin, int64_t end,
                     A* partial, bool continued, SquareSum<A>& squares) const {
    constexpr int kSlots = max_of(room, 1);
    Vec<A> factor[kSlots], acc[kSlots];
    const A* b[kSlots];
#pragma GCC unroll 10
    for (int i = 0; i < room; ++i) {
      const int64_t n = i < count ? listed[i] : listed[0];
      factor[i] = broadcast(i < count ? v.a[n * g_.rows + r] : A(0));
      acc[i] = zero<A>();
      b[i] = v.b.data + n * v.b.stride;
    }
    T* const row = v.matrix + r * g_.columns;
    T* const buffer = v.momentum_buffer == nullptr ? nullptr : v.momentum_buffer + r * g_.columns;
    const auto column = [&](int64_t c, auto lanes_of) {
      const auto lanes = lanes_of();
      const Vec<A> old = SgdVectors<T>::load_lanes(row + c, lanes);
      Vec<A> gradient = continued ? load(partial + c - begin) : zero<A>();
#pragma GCC unroll 10
      for (int i = 0; i < room; ++i) {
        const Vec<A> x = load(b[i] + c);
        if constexpr (with_sums) acc[i] = fma(x, old, acc[i]);
        gradient = fma(factor[i], x, gradient);
      }
      if constexpr (last) {
        if (!v.update) return;
        const Vec<A> updated = v.sgd.update(old, gradient, row + c, buffer == nullptr ? nullptr : buffer + c, lanes);
        if (v.wants_squares) squares.add_squares(updated);
      } else {
        store(partial + c - begin, gradient);
      }
    };
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    for (int64_t c = begin; c < whole; c += kLanes) column(c, [] { return std::integral_constant<int64_t, kLanes>(); });
    if (whole < end) column(whole, [&] { return end - whole; });
    if constexpr (with_sums && room > 0) {
      A totals[kSlots + 3];
      sums_of_lanes<kSlots>(acc, totals);
      for (int64_t i = 0; i < count; ++i) v.sums[listed[i] * g_.rows + r] += totals[i];
    }
  }

  const DenseGeometry& g_;
};

// ---- What the workspace holds ---------------------------------------------------------------------------------

template <class T>
int64_t operand_bytes(int64_t count) {
  return sizeof(T) == sizeof(Accumulator<T>) ? 0 : round_up(count, 16) * int64_t(sizeof(Accumulator<T>));
}

template <class T>
int64_t backward_tasks(const DenseGeometry& g) {
  return g.inputs_are_rows ? ceil_div(g.rows, kBlockRows) : ceil_div(g.columns, Dense<T>::kBlockColumns);
}

// Of the rows, where `along` has few blocks of columns.
template <class T>
int64_t forward_parts(const DenseGeometry& g) {
  const int64_t blocks = ceil_div(g.columns, Dense<T>::kBlockColumns);
  return blocks < kFewTasks ? min_of(ceil_div(kFewTasks, blocks), ceil_div(g.rows, kBlockRows)) : 1;
}

int64_t part_size(const DenseGeometry& g) { return round_up(g.N * g.columns, 32); }

// Of a task of the backward: its lists.
int64_t listed_size(const DenseGeometry& g) { return round_up(kBlockRows * g.N, 32); }

// ---- The layers -----------------------------------------------------------------------------------------------

template <class T>
void forward(const DenseForwardParams& p) {
  using A = Accumulator<T>;
  const DenseGeometry& g = p.geometry;
  const Dense<T> dense(g);
  auto* workspace = static_cast<A*>(p.workspace);
  const auto* matrix = static_cast<const T*>(p.matrix);
  A* const sums = sums_of<T>(p.output, g.N * g.outputs(), workspace);
  if (g.inputs_are_rows) {
    const A* x = widened_operand<T>(p.input, g.N * g.inputs(), workspace);
    const Positions positions(reinterpret_cast<int32_t*>(workspace), g.N, g.rows);
    for (int64_t n = 0; n < g.N; ++n) positions.list(x, n);
    workspace = reinterpret_cast<A*>(reinterpret_cast<int32_t*>(workspace) + Positions::size(g.N, g.rows));
    const int64_t blocks = ceil_div(g.columns, Dense<T>::kBlockColumns), parts = forward_parts<T>(g);
    parallel(p.threads, parts * blocks, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / blocks, begin = task % blocks * Dense<T>::kBlockColumns;
        const int64_t end = min_of(begin + Dense<T>::kBlockColumns, g.columns);
        const int64_t first_block = positions.blocks * part / parts, last_block = positions.blocks * (part + 1) / parts;
        A* const part_sums = part == 0 ? sums : workspace + (part - 1) * part_size(g);
        for (int64_t block = first_block; block < last_block; ++block) {
          dense.along(matrix, x, positions, block, block == first_block, begin, end, part_sums);
        }
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      const A* from = workspace + (part - 1) * part_size(g);
      for (int64_t i = 0; i < g.N * g.columns; ++i) sums[i] += from[i];
    }
    narrow_part<T>(sums, p.output, g.columns, 0, g.N, 0, g.columns);
  } else {
    const Rows<T> x(p.input, g.N, g.columns, workspace);
    parallel(p.threads, ceil_div(g.rows, kBlockRows), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kBlockRows, end = min_of(last * kBlockRows, g.rows);
      dense.across(matrix, x, begin, end, sums);
      narrow_part<T>(sums, p.output, g.rows, 0, g.N, begin, end);
    });
  }
}

template <class T>
void backward(const DenseBackwardParams& p) {
  using A = Accumulator<T>;
  const DenseGeometry& g = p.geometry;
  const Dense<T> dense(g);
  const SgdVectors<T> sgd(p.step);
  const int64_t tasks = backward_tasks<T>(g);
  auto* squares_of_tasks = static_cast<double*>(p.workspace);
  auto* const lists = reinterpret_cast<int32_t*>(squares_of_tasks + round_up(tasks, 8));
  auto* workspace = reinterpret_cast<A*>(lists + tasks * listed_size(g));
  auto* const matrix = static_cast<T*>(p.matrix);
  const A* a = widened_operand<T>(g.inputs_are_rows ? p.input : p.grad_output, g.N * g.rows, workspace);
  const Rows<T> b(g.inputs_are_rows ? p.grad_output : p.input, g.N, g.columns, workspace);
  A* const sums = p.grad_input == nullptr ? nullptr : sums_of<T>(p.grad_input, g.N * g.inputs(), workspace);
  const bool idle = !p.update || (p.step.decay == 0 && p.momentum_buffer == nullptr && p.squares == nullptr);
  typename Dense<T>::Visit visit{sgd, p.update, p.squares != nullptr, idle, matrix, static_cast<T*>(p.momentum_buffer), a, b};
  if (g.inputs_are_rows) {
    visit.sums = sums;
    visit.all_sums = sums != nullptr && !p.input_zero_is_dead;
    parallel(p.threads, tasks, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        auto v = visit;
        v.listed = lists + task * listed_size(g);
        const int64_t begin = task * kBlockRows, end = min_of(begin + kBlockRows, g.rows);
        if (sums != nullptr) {
          for (int64_t n = 0; n < g.N; ++n) {
            for (int64_t r = begin; r < end; ++r) sums[n * g.rows + r] = A(0);
          }
        }
        SquareSum<A> squares;
        dense.visit(v, begin, end, 0, g.columns, squares);
        squares_of_tasks[task] = squares.total();
        if (sums != nullptr) narrow_part<T>(sums, p.grad_input, g.rows, 0, g.N, begin, end);
      }
    });
  } else {
    const Positions positions(reinterpret_cast<int32_t*>(workspace), g.N, g.rows);
    if (sums != nullptr) {
      for (int64_t n = 0; n < g.N; ++n) positions.list(a, n);
    }
    parallel(p.threads, tasks, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        auto v = visit;
        v.listed = lists + task * listed_size(g);
        const int64_t begin = task * Dense<T>::kBlockColumns;
        const int64_t end = min_of(begin + Dense<T>::kBlockColumns, g.columns);
        SquareSum<A> squares;
        for (int64_t block = 0; block < positions.blocks; ++block) {
          // Reads the rows before their step.
          if (sums != nullptr) dense.along(matrix, a, positions, block, block == 0, begin, end, sums);
          dense.visit(v, block * kBlockRows, min_of((block + 1) * kBlockRows, g.rows), begin, end, squares);
        }
        squares_of_tasks[task] = squares.total();
        if (sums != nullptr) narrow_part<T>(sums, p.grad_input, g.columns, 0, g.N, begin, end);
      }
    });
  }
  if (p.squares == nullptr) return;
  *p.squares = 0;
  for (int64_t task = 0; task < tasks; ++task) *p.squares += squares_of_tasks[task];
}

}  // namespace

namespace PYCONV_ISA_NAMESPACE {

int64_t dense_forward_workspace_bytes(const DenseForwardParams& params) {
  const DenseGeometry& g = params.geometry;
  return with_storage_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t input = g.inputs_are_rows ? operand_bytes<T>(g.N * g.rows) +
                                                  Positions::size(g.N, g.rows) * int64_t(sizeof(int32_t)) +
                                                  (forward_parts<T>(g) - 1) * part_size(g) * int64_t(sizeof(Accumulator<T>))
                                            : Rows<T>::bytes(g.N, g.columns);
    return operand_bytes<T>(g.N * g.outputs()) + input;
  });
}

void dense_forward(const DenseForwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { forward<decltype(storage)>(params); });
}

int64_t dense_backward_workspace_bytes(const DenseBackwardParams& params) {
  const DenseGeometry& g = params.geometry;
  return with_storage_type(params.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t tasks = backward_tasks<T>(g);
    return round_up(tasks, 8) * int64_t(sizeof(double)) +
           tasks * listed_size(g) * int64_t(sizeof(int32_t)) +
           operand_bytes<T>(g.N * g.rows) + Rows<T>::bytes(g.N, g.columns) + operand_bytes<T>(g.N * g.inputs()) +
           Positions::size(g.N, g.rows) * int64_t(sizeof(int32_t));
  });
}

void dense_backward(const DenseBackwardParams& params) {
  with_storage_type(params.dtype, [&](auto storage) { backward<decltype(storage)>(params); });
}

}  // namespace PYCONV_ISA_NAMESPACE
}  // namespace pyconv::cpu
