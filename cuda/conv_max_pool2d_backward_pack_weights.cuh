// The weights of conv_max_pool2d as the product for the input gradient reads them.
#pragma once

#include "conv_max_pool2d.cuh"
#include "kernel_table.h"

namespace pyconv::cuda {

// One step of the reduction over output channels: what a block holds of dY and of the weights at a time.
constexpr int kSlabBytes = 64;

// Which filter taps of one axis meet which residue of the input, seen from output `shift` before the input's quotient:
// tap * dilation = stride * shift + residue. Shifts without any tap are left out.
struct TapShifts {
  int count, taps, dilation, stride;

  TapShifts(int64_t taps, int64_t dilation, int64_t stride)
      : count(static_cast<int>(dilation >= stride ? taps : (taps - 1) * dilation / stride + 1)),
        taps(static_cast<int>(taps)),
        dilation(static_cast<int>(dilation)),
        stride(static_cast<int>(stride)) {}
  __host__ __device__ int at(int i) const { return dilation >= stride ? i * dilation / stride : i; }
  __host__ __device__ int last() const { return at(count - 1); }
  // -1: none
  __host__ __device__ int tap(int i, int residue) const {
    const int reach = stride * at(i) + residue;
    return reach % dilation == 0 && reach / dilation < taps ? reach / dilation : -1;
  }
  // Whether some residue has no tap at one of the shifts.
  bool has_gaps() const {
    for (int i = 0; i < count; ++i) {
      for (int residue = 0; residue < stride; ++residue) {
        if (tap(i, residue) < 0) return true;
      }
    }
    return false;
  }
};

// (groups, slabs, shifts, padded_n, kSlabBytes of K), n = (residue_h, residue_w, c); zero beyond K and n.
struct PackedWeights {
  TapShifts rows, columns;
  int shifts, slabs;
  int n, padded_n;
  int64_t groups;

  PackedWeights(const ConvMaxPool2dGeometry& g, int slab, int n_multiple)
      : rows(g.R, g.dilation_h, g.stride_h),
        columns(g.S, g.dilation_w, g.stride_w),
        shifts(rows.count * columns.count),
        slabs(static_cast<int>(ceil_div(g.K / g.groups, slab))),
        n(static_cast<int>(g.stride_h * g.stride_w * (g.C / g.groups))),
        padded_n(static_cast<int>(round_up(n, n_multiple))),
        groups(g.groups) {}
  __host__ __device__ int64_t row(int64_t group, int slab, int shift, int column) const {
    return ((group * slabs + slab) * shifts + shift) * padded_n + column;
  }
  int64_t bytes() const { return row(groups, 0, 0, 0) * kSlabBytes; }
  // Whether zeros stand where there is no weight, for columns that are of use: times a gradient that is not finite they
  // give NaN.
  bool has_gaps() const { return rows.has_gaps() || columns.has_gaps(); }
};

// Into params.workspace; where `flag` is not null, 0 into it.
int pack_backward_weights(const ConvMaxPool2dBackwardParams& params, const PackedWeights& packed, int* flag,
                          Stream stream);

}  // namespace pyconv::cuda
