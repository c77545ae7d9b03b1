// Vectors of the accumulator type from and to memory of any storage type: reduced-precision types are widened
// to float on load and rounded to nearest even on store.
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

// float and double are their own accumulator.
inline Vec<float> load_widened(const float* p) { return load(p); }
inline Vec<double> load_widened(const double* p) { return load(p); }
inline Vec<float> load_widened(const float* p, int64_t n) { return load_partial(p, n); }
inline Vec<double> load_widened(const double* p, int64_t n) { return load_partial(p, n); }
inline void store_narrowed(float* p, Vec<float> x) { store(p, x); }
inline void store_narrowed(double* p, Vec<double> x) { store(p, x); }
inline void store_narrowed(float* p, Vec<float> x, int64_t n) { store_partial(p, x, n); }
inline void store_narrowed(double* p, Vec<double> x, int64_t n) { store_partial(p, x, n); }

#if defined(__AVX512F__)

using HalfBits = __m256i;  // kWidth<float> values of 16 bits

inline HalfBits load_16bit(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline HalfBits load_16bit(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(lanes16(n), p); }
inline void store_16bit(void* p, HalfBits x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store_16bit(void* p, HalfBits x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes16(n), x); }

inline Vec<float> widened(HalfBits x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline Vec<float> widened(HalfBits x, Float16) { return {_mm512_cvtph_ps(x)}; }
inline HalfBits narrowed(Vec<float> x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan(x).m, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(result);
}
inline HalfBits narrowed(Vec<float> x, Float16) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__)

using HalfBits = __m128i;

inline HalfBits load_16bit(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline HalfBits load_16bit(const void* p, int64_t n) {
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, p, static_cast<size_t>(2 * n));
  return x;
}
inline void store_16bit(void* p, HalfBits x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline void store_16bit(void* p, HalfBits x, int64_t n) { std::memcpy(p, &x, static_cast<size_t>(2 * n)); }

inline Vec<float> widened(HalfBits x, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec<float> widened(HalfBits x, Float16) { return {_mm256_cvtph_ps(x)}; }
inline HalfBits narrowed(Vec<float> x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i result =
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(is_nan(x).m));
  const __m256i packed = _mm256_packus_epi32(result, result);  // within each 128-bit half
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline HalfBits narrowed(Vec<float> x, Float16) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#endif

#if defined(__AVX512F__) || defined(__AVX2__)

template <class T>
inline Vec<float> load_widened(const T* p) {
  return widened(load_16bit(p), T{});
}
template <class T>
inline Vec<float> load_widened(const T* p, int64_t n) {
  return widened(load_16bit(p, n), T{});
}
template <class T>
inline void store_narrowed(T* p, Vec<float> x) {
  store_16bit(p, narrowed(x, T{}));
}
template <class T>
inline void store_narrowed(T* p, Vec<float> x, int64_t n) {
  store_16bit(p, narrowed(x, T{}), n);
}

#else

template <class T>
inline Vec<float> load_widened(const T* p) {
  return {widen(*p)};
}
template <class T>
inline Vec<float> load_widened(const T* p, int64_t n) {
  return {n > 0 ? widen(*p) : 0.0f};
}
template <class T>
inline void store_narrowed(T* p, Vec<float> x) {
  *p = narrow<T>(x.v);
}
template <class T>
inline void store_narrowed(T* p, Vec<float> x, int64_t n) {
  if (n > 0) *p = narrow<T>(x.v);
}

#endif

}  // namespace
}  // namespace pyconv::cpu
