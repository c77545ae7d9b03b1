// The sparse products of conv_max_pool2d's backward (conv_max_pool2d_backward_products.h) by AVX512_BF16.
//
// An element of a plane or of a row of weights is a pair of channels; a sum has a vector of first channels and one of
// second ones. vdpbf16ps wants pairs along what is summed, so two windows, or two k, go together: their elements
// (a0, a1) and (b0, b1) become (a0, b0) and (b1, a1) by a rotation and two blends. Two shuffles would do, but compete
// for the units that multiply. Gradients are floats that bfloat16 holds.
#pragma once

#include "conv_max_pool2d_backward_products.h"

namespace pyconv::cpu {
namespace {

// A vector of elements, or half of one.
template <bool Half>
struct PairVec;
template <>
struct PairVec<false> {
  using Bits = __m512i;
  using Sum = Vec<float>;
  static Bits zero_bits() { return _mm512_setzero_si512(); }
  static Bits load_from(const float* p) { return _mm512_loadu_si512(p); }
  static Bits broadcast_of(const float* p) { return _mm512_castps_si512(_mm512_set1_ps(*p)); }
  static Bits rotated(Bits x) { return _mm512_rol_epi32(x, 16); }
  // The lower halves of a and the upper ones of b.
  static Bits halves(Bits a, Bits b) { return _mm512_mask_blend_epi16(0xaaaaaaaau, a, b); }
  static Sum dot(Sum sum, Bits a, Bits b) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)}; }
};
template <>
struct PairVec<true> {
  using Bits = __m256i;
  using Sum = HalfVec;
  static Bits zero_bits() { return _mm256_setzero_si256(); }
  static Bits load_from(const float* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bits broadcast_of(const float* p) { return _mm256_castps_si256(_mm256_broadcast_ss(p)); }
  static Bits rotated(Bits x) { return _mm256_rol_epi32(x, 16); }
  static Bits halves(Bits a, Bits b) { return _mm256_mask_blend_epi16(0xaaaau, a, b); }
  static Sum dot(Sum sum, Bits a, Bits b) { return {_mm256_dpbf16_ps(sum.v, (__m256bh)a, (__m256bh)b)}; }
};

// The gradients of two windows, or of one and none.
template <bool Half>
struct GradientPair {
  using Pairs = PairVec<Half>;
  using Sum = typename Pairs::Sum;
  typename Pairs::Bits straight, swapped;

  explicit GradientPair(const float* first)
      : straight(Pairs::halves(Pairs::rotated(Pairs::broadcast_of(first)), Pairs::zero_bits())),
        swapped(Pairs::rotated(straight)) {}
  GradientPair(const float* first, const float* second)
      : straight(Pairs::halves(Pairs::rotated(Pairs::broadcast_of(first)), Pairs::broadcast_of(second))),
        swapped(Pairs::rotated(straight)) {}

  // sums += gradients * elements, of first channels and of second ones.
  void add(typename Pairs::Bits a, typename Pairs::Bits b, Sum (&sums)[2]) const {
    const auto turned = Pairs::rotated(b);
    sums[0] = Pairs::dot(sums[0], Pairs::halves(a, turned), straight);
    sums[1] = Pairs::dot(sums[1], Pairs::halves(turned, a), swapped);
  }
};

template <bool Half, int Runs, int Columns>
void accumulate_weights(PartShape<PairVec<Half>, Runs, Columns>, const WindowSpan<float>& span, const int64_t* runs,
                             float* sums) {
  using Pairs = PairVec<Half>;
  using V = typename Pairs::Sum;
  constexpr int kLanes = VectorTraits<V>::kLanes, kVectors = Runs * Columns;
  V acc[kVectors][2];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) acc[i][0] = acc[i][1] = V{};
  for (int64_t image = 0; image < span.images; ++image) {
    const int32_t* pixels = span.pixels + image * span.list_stride;
    const float* gradients = span.gradients + image * span.list_stride;
    const int64_t* band = span.begins + image * span.ends_stride;
    const float* x[Runs];
#pragma GCC unroll 32
    for (int r = 0; r < Runs; ++r) x[r] = span.x + image * span.image_stride + runs[r];
    const int64_t end = band[1];
    int64_t i = band[0];
    for (; i + 2 <= end; i += 2) {
      const GradientPair<Half> pair(gradients + i, gradients + i + 1);
      const int64_t a = static_cast<int64_t>(pixels[i]) * kLanes, b = static_cast<int64_t>(pixels[i + 1]) * kLanes;
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
#pragma GCC unroll 32
        for (int c = 0; c < Columns; ++c) {
          pair.add(Pairs::load_from(x[r] + a + c * kLanes), Pairs::load_from(x[r] + b + c * kLanes),
                   acc[r * Columns + c]);
        }
      }
    }
    if (i < end) {
      const GradientPair<Half> pair(gradients + i);
      const int64_t a = static_cast<int64_t>(pixels[i]) * kLanes;
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
#pragma GCC unroll 32
        for (int c = 0; c < Columns; ++c) {
          pair.add(Pairs::load_from(x[r] + a + c * kLanes), Pairs::zero_bits(), acc[r * Columns + c]);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* to = sums + (2 * i + j) * kLanes;
      store(to, span.first ? acc[i][j] : add(VectorTraits<V>::load_from(to), acc[i][j]));
    }
  }
}

// As accumulate_patches; a plane has two vectors a pixel.
template <bool Half, int Runs, int Columns>
void accumulate_patches(PartShape<PairVec<Half>, Runs, Columns>, const Patch* patch, const Patch* end,
                        const int32_t* ks, const float* gradients, const float* weights, const int64_t* runs,
                        float* plane) {
  using Pairs = PairVec<Half>;
  using V = typename Pairs::Sum;
  constexpr int kLanes = VectorTraits<V>::kLanes, kVectors = Runs * Columns;
  const auto add_to = [](float* to, const V(&sums)[2]) {
    store(to, add(VectorTraits<V>::load_from(to), sums[0]));
    store(to + kLanes, add(VectorTraits<V>::load_from(to + kLanes), sums[1]));
  };
  V acc[kVectors][2];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) acc[i][0] = acc[i][1] = V{};
  int64_t share = 0;
  for (; patch < end; ++patch) {
    const int64_t last = patch->end;
    for (; share + 2 <= last; share += 2) {
      const GradientPair<Half> pair(gradients + share, gradients + share + 1);
      const float* a = weights + static_cast<int64_t>(ks[share]) * (kVectors * kLanes);
      const float* b = weights + static_cast<int64_t>(ks[share + 1]) * (kVectors * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < kVectors; ++i) {
        pair.add(Pairs::load_from(a + i * kLanes), Pairs::load_from(b + i * kLanes), acc[i]);
      }
    }
    if (share < last) {
      const GradientPair<Half> pair(gradients + share);
      const float* a = weights + static_cast<int64_t>(ks[share++]) * (kVectors * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < kVectors; ++i) pair.add(Pairs::load_from(a + i * kLanes), Pairs::zero_bits(), acc[i]);
    }
    float* const to = plane + patch->pixel * (2 * kLanes);
    if (Columns > 1 && patch[1].pixel == patch->pixel + 1) {
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
        V(*const run)[2] = acc + r * Columns;
        add_to(to + 2 * runs[r], run[0]);
#pragma GCC unroll 32
        for (int c = 0; c + 1 < Columns; ++c) {
          run[c][0] = run[c + 1][0];
          run[c][1] = run[c + 1][1];
        }
        run[Columns - 1][0] = run[Columns - 1][1] = V{};
      }
    } else {
#pragma GCC unroll 32
      for (int r = 0; r < Runs; ++r) {
#pragma GCC unroll 32
        for (int c = 0; c < Columns; ++c) {
          add_to(to + 2 * (runs[r] + c * kLanes), acc[r * Columns + c]);
          acc[r * Columns + c][0] = acc[r * Columns + c][1] = V{};
        }
      }
    }
  }
}

// Sums of gradients [begin, size) of a list -> what bfloat16 holds of them; what is left over is appended under the same
// numbers. The list's new size.
inline int64_t split_sums(int32_t* numbers, float* values, int64_t begin, int64_t size) {
  constexpr int64_t kLanes = kWidth<float>;
  for (int piece = 1; piece < 3; ++piece) {  // 24 bits, 8 at a time
    const int64_t end = size;
    for (int64_t i = begin; i < end; i += kLanes) {
      const __mmask16 present = lanes16(end - i);
      const __m512 sum = _mm512_maskz_loadu_ps(present, values + i);
      const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      const __m512 held = _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(sum), upper_half));
      const __m512 rest = _mm512_sub_ps(sum, held);
      const __mmask16 left = _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_NEQ_OQ);  // infinities leave NaN
      const __m512i number = _mm512_maskz_loadu_epi32(present, numbers + i);
      _mm512_mask_storeu_ps(values + i, present, held);
      _mm512_storeu_ps(values + size, _mm512_maskz_compress_ps(left, rest));
      _mm512_storeu_si512(numbers + size, _mm512_maskz_compress_epi32(left, number));
      size += __builtin_popcount(left);
    }
    begin = end;
  }
  return size;
}

}  // namespace
}  // namespace pyconv::cpu
