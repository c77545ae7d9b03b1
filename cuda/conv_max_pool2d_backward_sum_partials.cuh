// The second pass of grad_weight: the partial sums of the blocks, added in a fixed order.
#pragma once

#include "kernel_table.h"

namespace pyconv::cuda {

// Column n of a row k is filter element (c, r, s). Columns follow the input's memory, so that neighbours are read
// together: c innermost for channels_last, s innermost otherwise.
struct FilterColumns {
  int channels, R, S;
  bool channels_innermost;

  __host__ __device__ int count() const { return channels * R * S; }
  __host__ __device__ int c(int n) const { return channels_innermost ? n % channels : n / (R * S); }
  __host__ __device__ int r(int n) const { return (channels_innermost ? n / channels : n) / S % R; }
  __host__ __device__ int s(int n) const { return (channels_innermost ? n / channels : n) % S; }
};

struct PartialSums {
  float* weights;  // (splits, K, columns)
  float* bias;     // (splits, K)
  int splits;
  FilterColumns columns;
};

// Writes grad_weight, and grad_bias where it is wanted.
int sum_partials(const ConvMaxPool2dBackwardParams& params, const PartialSums& partials, Stream stream);

}  // namespace pyconv::cuda
