// How the forward kernels of conv_max_pool2d divide their work: K into blocks of a few vectors, pooled rows into tasks.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

#if defined(__AVX2__) || defined(__AVX512F__)
constexpr int kMaxKVectors = 3;
#else
constexpr int kMaxKVectors = 2;
#endif

constexpr int64_t kTasksPerThread = 4;  // of a small batch: evens out the load

// Vectors [first_vector, first_vector + vectors) of the output channels of a group.
struct KBlock {
  int64_t first_vector, vectors;
};

// The vectors of a group in blocks of at most kMaxKVectors, as even as possible.
struct KBlocks {
  int64_t vectors = 0, count = 0;

  explicit KBlocks(int64_t vectors_in_all) : vectors(vectors_in_all), count(ceil_div(vectors_in_all, kMaxKVectors)) {}

  int64_t widest() const { return ceil_div(vectors, count); }
  KBlock operator[](int64_t b) const {
    const int64_t base = vectors / count, extra = vectors % count;
    return {b * base + min_of(b, extra), base + (b < extra ? 1 : 0)};
  }
  // The block that holds a vector.
  KBlock of(int64_t vector) const {
    int64_t b = 0;
    while ((*this)[b].first_vector + (*this)[b].vectors <= vector) ++b;
    return (*this)[b];
  }
};

inline int64_t forward_tasks(const ConvMaxPool2dGeometry& g, int64_t pooled_rows) {
  return g.N * g.groups * ceil_div(g.PH, pooled_rows);
}

// Pooled rows of a task: at most `most`, and so few that a small batch occupies all threads.
inline int64_t pooled_rows_of_task(const ConvMaxPool2dGeometry& g, int64_t most, int64_t threads) {
  int64_t rows = most;
  while (rows > 1 && forward_tasks(g, rows) % threads != 0 && forward_tasks(g, rows) < threads * kTasksPerThread) {
    rows = ceil_div(rows, 2);
  }
  return rows;
}

// The most pooled rows that a buffer of so many convolution rows can complete at a time.
inline int64_t most_pooled_rows(const ConvMaxPool2dGeometry& g, int64_t conv_rows) {
  return min_of(g.PH, (conv_rows + g.pool_pad_h) / g.pool_stride_h + 2);
}

}  // namespace
}  // namespace pyconv::cpu
