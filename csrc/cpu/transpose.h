// Square blocks of vectors, transposed in registers: between rows of pixels (NCHW) and rows of channels (NHWC).
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

// Lane j of rows[i] becomes lane i of rows[j].
#if defined(__AVX512F__)

inline void transpose(Vec<float> (&rows)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  // b[4q + j], 128-bit part p: column 4p + j of rows 4q to 4q + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pair = [&](int k) { return _mm512_castps_pd(a[i + k]); };
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), high01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88),
                 high23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[12 + j].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
}

inline void transpose(Vec<double> (&rows)[8]) {
  __m512d a[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_pd(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_pd(rows[i].v, rows[i + 1].v);
  }
  // a[2q + j], 128-bit part p: column 2p + j of rows 2q and 2q + 1.
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m512d low01 = _mm512_shuffle_f64x2(a[j], a[2 + j], 0x88), high01 = _mm512_shuffle_f64x2(a[j], a[2 + j], 0xdd);
    const __m512d low23 = _mm512_shuffle_f64x2(a[4 + j], a[6 + j], 0x88),
                  high23 = _mm512_shuffle_f64x2(a[4 + j], a[6 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f64x2(low01, low23, 0x88);
    rows[2 + j].v = _mm512_shuffle_f64x2(high01, high23, 0x88);
    rows[4 + j].v = _mm512_shuffle_f64x2(low01, low23, 0xdd);
    rows[6 + j].v = _mm512_shuffle_f64x2(high01, high23, 0xdd);
  }
}

#elif defined(__AVX2__)

inline void transpose(Vec<float> (&rows)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}

inline void transpose(Vec<double> (&rows)[4]) {
  const __m256d low0 = _mm256_unpacklo_pd(rows[0].v, rows[1].v), high0 = _mm256_unpackhi_pd(rows[0].v, rows[1].v);
  const __m256d low1 = _mm256_unpacklo_pd(rows[2].v, rows[3].v), high1 = _mm256_unpackhi_pd(rows[2].v, rows[3].v);
  rows[0].v = _mm256_permute2f128_pd(low0, low1, 0x20);
  rows[1].v = _mm256_permute2f128_pd(high0, high1, 0x20);
  rows[2].v = _mm256_permute2f128_pd(low0, low1, 0x31);
  rows[3].v = _mm256_permute2f128_pd(high0, high1, 0x31);
}

#else

template <class A>
inline void transpose(Vec<A> (&)[1]) {}

#endif

}  // namespace
}  // namespace pyconv::cpu
