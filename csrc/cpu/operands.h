// What kernels multiply: an element of their packed images and weights is one value, widened to the accumulator type,
// or a pair of bfloat16 values of neighbouring channels.
//
//   kChannels   of an element
//   element     the one that begins at a channel of a pixel, of which `channels` follow, itself included
//   load_row    those of n neighbouring pixels, at most a vector
//   load_pixel  those of one pixel, at most a vector, whose channels are neighbours
#pragma once

#include "storage_simd.h"

namespace pyconv::cpu {
namespace {

template <class T>
struct WidenedOperands {
  using Storage = T;
  using A = Accumulator<T>;
  static constexpr int64_t kChannels = 1;

  static A element(const T* p, int64_t, int64_t) { return widen(*p); }
  static Vec<A> load_row(const T* p, int64_t, int64_t, int64_t n) {
    return n == kWidth<A> ? load_widened(p) : load_widened(p, n);
  }
  static Vec<A> load_pixel(const T* p, int64_t channels) { return load_row(p, 0, 0, min_of(channels, kWidth<A>)); }
};

#if defined(__AVX512BF16__)
// A float carries the bits of a pair, the second of which is zero where there is no such channel.
struct BFloat16Pairs {
  using Storage = BFloat16;
  using A = float;
  static constexpr int64_t kChannels = 2;

  static float element(const BFloat16* p, int64_t channel_stride, int64_t channels) {
    const uint32_t second = channels > 1 ? p[channel_stride].bits : 0;
    return bits_to_float(p->bits | second << 16);
  }
  static Vec<float> load_row(const BFloat16* p, int64_t channel_stride, int64_t channels, int64_t n) {
    const __m512i first = _mm512_cvtepu16_epi32(load_16bit(p, n));
    if (channels == 1) return {_mm512_castsi512_ps(first)};
    const __m512i second = _mm512_cvtepu16_epi32(load_16bit(p + channel_stride, n));
    return {_mm512_castsi512_ps(_mm512_or_epi32(first, _mm512_slli_epi32(second, 16)))};
  }
  static Vec<float> load_pixel(const BFloat16* p, int64_t channels) {
    const __mmask32 present = channels >= 32 ? 0xffffffffu : (1u << channels) - 1u;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(present, p))};
  }
};
#endif

}  // namespace
}  // namespace pyconv::cpu
