// Vectors of float or double for the ISA this file is compiled for, so that every ISA runs one loop nest.
//
// Vec<A> holds kWidth<A> lanes of A. Reduced-precision storage types are widened to float on load and rounded to
// nearest even on store. Everything is in an anonymous namespace: no ISA may share a symbol with another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../params.h"

namespace pyconv::cpu {
namespace {

// ---- counts ------------------------------------------------------------------------------------------------

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- scalar conversions ------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

inline BFloat16 narrow_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fc0)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline Float16 narrow_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 leaves the multiple of 2^-24, rounded to nearest even, in the low mantissa bits.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

// An integer carried through a lane as its bits: only moved and selected there, never computed with.
template <class A>
inline A lane_from_integer(int32_t value);
template <>
inline float lane_from_integer<float>(int32_t value) {
  return bits_to_float(static_cast<uint32_t>(value));
}
template <>
inline double lane_from_integer<double>(int32_t value) {
  const int64_t bits = value;
  double lane;
  std::memcpy(&lane, &bits, sizeof lane);
  return lane;
}
inline int32_t integer_from_lane(float lane) { return static_cast<int32_t>(float_to_bits(lane)); }
inline int32_t integer_from_lane(double lane) {
  int64_t bits;
  std::memcpy(&bits, &lane, sizeof bits);
  return static_cast<int32_t>(bits);
}

// T: storage type. Accumulator<T>: what sums are held in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <class T>
inline T narrow(Accumulator<T> x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  return narrow_bfloat16(x);
}
template <>
inline Float16 narrow<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#else
  return narrow_float16(x);
#endif
}

// Calls action(a value of the storage type).
template <class Action>
auto with_storage_type(DType dtype, const Action& action) {
  switch (dtype) {
    case DType::float64:
      return action(double());
    case DType::bfloat16:
      return action(BFloat16());
    case DType::float16:
      return action(Float16());
    case DType::float32:
      break;
  }
  return action(float());
}

// ---- vectors -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 0;  // one lane of either type
#endif

template <class A>
constexpr int kWidth = kVectorBytes == 0 ? 1 : kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
struct Vec;
template <class A>
struct Mask;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  __m512 v;
};
template <>
struct Mask<float> {
  __mmask16 m;
};
template <>
struct Vec<double> {
  __m512d v;
};
template <>
struct Mask<double> {
  __mmask8 m;
};

inline __mmask16 lanes16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
inline __mmask8 lanes8(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xffu : (1u << n) - 1u); }

inline Vec<float> broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec<double> broadcast(double x) { return {_mm512_set1_pd(x)}; }
inline Vec<float> load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec<double> load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void store(float* p, Vec<float> x) { _mm512_storeu_ps(p, x.v); }
inline void store(double* p, Vec<double> x) { _mm512_storeu_pd(p, x.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<float> add(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<double> add(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Vec<float> sub(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec<double> sub(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Vec<float> mul(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec<double> mul(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Mask<float> greater(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask<double> greater(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask<float> is_nan(Vec<float> a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask<double> is_nan(Vec<double> a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
// Where a or b is NaN; and the larger of two that are not.
inline Mask<float> unordered(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline Mask<double> unordered(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q)}; }
inline Vec<float> larger_of(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec<double> larger_of(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
inline bool any(Mask<float> m) { return m.m != 0; }
inline bool any(Mask<double> m) { return m.m != 0; }
inline Mask<float> either(Mask<float> a, Mask<float> b) { return {static_cast<__mmask16>(a.m | b.m)}; }
inline Mask<double> either(Mask<double> a, Mask<double> b) { return {static_cast<__mmask8>(a.m | b.m)}; }
// m ? a : b
inline Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return {_mm512_mask_blend_pd(m.m, b.v, a.v)};
}
template <class A>
inline Mask<A> first_lanes(int64_t n);
template <>
inline Mask<float> first_lanes<float>(int64_t n) {
  return {lanes16(n)};
}
template <>
inline Mask<double> first_lanes<double>(int64_t n) {
  return {lanes8(n)};
}
inline Vec<float> load_partial(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes16(n), p)}; }
inline Vec<double> load_partial(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(lanes8(n), p)}; }
inline void store_partial(float* p, Vec<float> x, int64_t n) { _mm512_mask_storeu_ps(p, lanes16(n), x.v); }
inline void store_partial(double* p, Vec<double> x, int64_t n) { _mm512_mask_storeu_pd(p, lanes8(n), x.v); }

// Lane i is p[i * stride].
inline Vec<float> gather(const float* p, int32_t stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_i32gather_ps(_mm512_mullo_epi32(_mm512_set1_epi32(stride), lane), p, 4)};
}
inline Vec<double> gather(const double* p, int32_t stride) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_i32gather_pd(_mm256_mullo_epi32(_mm256_set1_epi32(stride), lane), p, 8)};
}
// Lane i is p[index[i]].
inline Vec<float> gather(const float* p, const int32_t* index) {
  return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4)};
}
// Rounded towards 0; of lanes below 2^31.
inline Vec<float> truncated(Vec<float> x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
inline Vec<double> truncated(Vec<double> x) {
  return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
// Indices row * stride + column of lanes that are whole numbers.
inline void store_indices(int32_t* to, Vec<float> row, Vec<float> column, int32_t stride) {
  const __m512i begin = _mm512_mullo_epi32(_mm512_cvttps_epi32(row.v), _mm512_set1_epi32(stride));
  _mm512_storeu_si512(to, _mm512_add_epi32(begin, _mm512_cvttps_epi32(column.v)));
}
inline void store_indices(int32_t* to, Vec<double> row, Vec<double> column, int32_t stride) {
  const __m256i begin = _mm256_mullo_epi32(_mm512_cvttpd_epi32(row.v), _mm256_set1_epi32(stride));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(begin, _mm512_cvttpd_epi32(column.v)));
}
// Lanes p[0], p[1], p[0], p[1], ...
inline Vec<float> broadcast_pair(const float* p) {
  double pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_castpd_ps(_mm512_set1_pd(pair))};
}
// Exchanges the lanes of each pair.
inline Vec<float> swap_pairs(Vec<float> x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
// The even lanes of a, then those of b.
inline Vec<float> even_lanes(Vec<float> a, Vec<float> b) {
  const __m512i lane = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, lane, b.v)};
}
inline Vec<double> gather(const double* p, const int32_t* index) {
  return {_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), p, 8)};
}
// Lane i of `first` is p[index[i]], of `second` p[index[i] + 1]. A pair of floats is fetched at once: a gather costs by
// the element.
inline void gather_pairs(const float* p, const int32_t* index, Vec<float>& first, Vec<float>& second) {
  const auto* pairs = reinterpret_cast<const __m256i*>(index);
  const __m512 low = _mm512_castpd_ps(_mm512_i32gather_pd(_mm256_loadu_si256(pairs), p, 4));
  const __m512 high = _mm512_castpd_ps(_mm512_i32gather_pd(_mm256_loadu_si256(pairs + 1), p, 4));
  const __m512i lane = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  first = even_lanes(Vec<float>{low}, Vec<float>{high});
  second = {_mm512_permutex2var_ps(low, lane, high)};
}
inline void gather_pairs(const double* p, const int32_t* index, Vec<double>& first, Vec<double>& second) {
  first = gather(p, index);
  second = gather(p + 1, index);
}

// The lanes of each of four vectors added up.
inline void store_sums_of_lanes(float* to, Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  const auto halved = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
  const __m512d ab = _mm512_castps_pd(halved(a.v, b.v)), cd = _mm512_castps_pd(halved(c.v, d.v));
  // Every 128-bit part: a, b, c, d.
  const __m512 quads = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline void store_sums_of_lanes(double* to, Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
  to[0] = _mm512_reduce_add_pd(a.v);
  to[1] = _mm512_reduce_add_pd(b.v);
  to[2] = _mm512_reduce_add_pd(c.v);
  to[3] = _mm512_reduce_add_pd(d.v);
}

#elif defined(__AVX2__)

template <>
struct Vec<float> {
  __m256 v;
};
template <>
struct Mask<float> {
  __m256 m;
};
template <>
struct Vec<double> {
  __m256d v;
};
template <>
struct Mask<double> {
  __m256d m;
};

inline __m256i lanes8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes4(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline Vec<float> broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec<double> broadcast(double x) { return {_mm256_set1_pd(x)}; }
inline Vec<float> load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec<double> load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void store(float* p, Vec<float> x) { _mm256_storeu_ps(p, x.v); }
inline void store(double* p, Vec<double> x) { _mm256_storeu_pd(p, x.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<float> add(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<double> add(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Vec<float> sub(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec<double> sub(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Vec<float> mul(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec<double> mul(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Mask<float> greater(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask<double> greater(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask<float> is_nan(Vec<float> a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask<double> is_nan(Vec<double> a) { return {_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask<float> unordered(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)}; }
inline Mask<double> unordered(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q)}; }
inline Vec<float> larger_of(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec<double> larger_of(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
inline bool any(Mask<float> m) { return _mm256_movemask_ps(m.m) != 0; }
inline bool any(Mask<double> m) { return _mm256_movemask_pd(m.m) != 0; }
inline Mask<float> either(Mask<float> a, Mask<float> b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask<double> either(Mask<double> a, Mask<double> b) { return {_mm256_or_pd(a.m, b.m)}; }
inline Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) { return {_mm256_blendv_pd(b.v, a.v, m.m)}; }
template <class A>
inline Mask<A> first_lanes(int64_t n);
template <>
inline Mask<float> first_lanes<float>(int64_t n) {
  return {_mm256_castsi256_ps(lanes8(n))};
}
template <>
inline Mask<double> first_lanes<double>(int64_t n) {
  return {_mm256_castsi256_pd(lanes4(n))};
}
inline Vec<float> load_partial(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lanes8(n))}; }
inline Vec<double> load_partial(const double* p, int64_t n) { return {_mm256_maskload_pd(p, lanes4(n))}; }
inline void store_partial(float* p, Vec<float> x, int64_t n) { _mm256_maskstore_ps(p, lanes8(n), x.v); }
inline void store_partial(double* p, Vec<double> x, int64_t n) { _mm256_maskstore_pd(p, lanes4(n), x.v); }

inline Vec<float> gather(const float* p, int32_t stride) {
  const __m256i index = _mm256_mullo_epi32(_mm256_set1_epi32(stride), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return {_mm256_i32gather_ps(p, index, 4)};
}
inline Vec<double> gather(const double* p, int32_t stride) {
  return {_mm256_setr_pd(p[0], p[stride], p[2 * stride], p[3 * stride])};
}
inline Vec<float> gather(const float* p, const int32_t* index) {
  return {_mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4)};
}
inline Vec<float> truncated(Vec<float> x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
inline Vec<double> truncated(Vec<double> x) {
  return {_mm256_round_pd(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
inline void store_indices(int32_t* to, Vec<float> row, Vec<float> column, int32_t stride) {
  const __m256i begin = _mm256_mullo_epi32(_mm256_cvttps_epi32(row.v), _mm256_set1_epi32(stride));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(begin, _mm256_cvttps_epi32(column.v)));
}
inline void store_indices(int32_t* to, Vec<double> row, Vec<double> column, int32_t stride) {
  const __m128i begin = _mm_mullo_epi32(_mm256_cvttpd_epi32(row.v), _mm_set1_epi32(stride));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(begin, _mm256_cvttpd_epi32(column.v)));
}
inline Vec<float> broadcast_pair(const float* p) {
  double pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm256_castpd_ps(_mm256_set1_pd(pair))};
}
inline Vec<float> swap_pairs(Vec<float> x) { return {_mm256_permute_ps(x.v, 0xb1)}; }
inline Vec<float> even_lanes(Vec<float> a, Vec<float> b) {
  const __m256 mixed = _mm256_shuffle_ps(a.v, b.v, 0x88);  // a0 a2 b0 b2 a4 a6 b4 b6
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8))};
}
inline Vec<double> gather(const double* p, const int32_t* index) {
  return {_mm256_setr_pd(p[index[0]], p[index[1]], p[index[2]], p[index[3]])};
}
inline void gather_pairs(const float* p, const int32_t* index, Vec<float>& first, Vec<float>& second) {
  const auto pairs = [&](const int32_t* of) {
    return _mm256_castpd_ps(_mm256_i32gather_pd(reinterpret_cast<const double*>(p),
                                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(of)), 4));
  };
  const __m256 low = pairs(index), high = pairs(index + 4);
  const __m256 odd = _mm256_shuffle_ps(low, high, 0xdd);
  first = even_lanes(Vec<float>{low}, Vec<float>{high});
  second = {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8))};
}
inline void gather_pairs(const double* p, const int32_t* index, Vec<double>& first, Vec<double>& second) {
  first = gather(p, index);
  second = gather(p + 1, index);
}

// The lanes of each of four vectors added up.
inline void store_sums_of_lanes(float* to, Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
inline void store_sums_of_lanes(double* to, Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
  const __m256d ab = _mm256_hadd_pd(a.v, b.v), cd = _mm256_hadd_pd(c.v, d.v);
  _mm_storeu_pd(to, _mm_add_pd(_mm256_castpd256_pd128(ab), _mm256_extractf128_pd(ab, 1)));
  _mm_storeu_pd(to + 2, _mm_add_pd(_mm256_castpd256_pd128(cd), _mm256_extractf128_pd(cd, 1)));
}

#else

template <class A>
struct Vec {
  A v;
};
template <class A>
struct Mask {
  bool m;
};

inline Vec<float> broadcast(float x) { return {x}; }
inline Vec<double> broadcast(double x) { return {x}; }
template <class A>
inline Vec<A> load(const A* p) {
  return {*p};
}
template <class A>
inline void store(A* p, Vec<A> x) {
  *p = x.v;
}
template <class A>
inline Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {a.v * b.v + c.v};
}
template <class A>
inline Vec<A> add(Vec<A> a, Vec<A> b) {
  return {a.v + b.v};
}
template <class A>
inline Vec<A> sub(Vec<A> a, Vec<A> b) {
  return {a.v - b.v};
}
template <class A>
inline Vec<A> mul(Vec<A> a, Vec<A> b) {
  return {a.v * b.v};
}
template <class A>
inline Mask<A> greater(Vec<A> a, Vec<A> b) {
  return {a.v > b.v};
}
template <class A>
inline Mask<A> is_nan(Vec<A> a) {
  return {a.v != a.v};
}
template <class A>
inline Mask<A> unordered(Vec<A> a, Vec<A> b) {
  return {a.v != a.v || b.v != b.v};
}
template <class A>
inline Vec<A> larger_of(Vec<A> a, Vec<A> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class A>
inline bool any(Mask<A> m) {
  return m.m;
}
template <class A>
inline Mask<A> either(Mask<A> a, Mask<A> b) {
  return {a.m || b.m};
}
template <class A>
inline Vec<A> select(Mask<A> m, Vec<A> a, Vec<A> b) {
  return {m.m ? a.v : b.v};
}
template <class A>
inline Mask<A> first_lanes(int64_t n) {
  return {n > 0};
}
template <class A>
inline Vec<A> load_partial(const A* p, int64_t n) {
  return {n > 0 ? *p : A(0)};
}
template <class A>
inline void store_partial(A* p, Vec<A> x, int64_t n) {
  if (n > 0) *p = x.v;
}
template <class A>
inline Vec<A> gather(const A* p, int32_t) {
  return {*p};
}
template <class A>
inline Vec<A> gather(const A* p, const int32_t* index) {
  return {p[*index]};
}
template <class A>
inline Vec<A> truncated(Vec<A> x) {
  return {static_cast<A>(static_cast<int32_t>(x.v))};
}
template <class A>
inline void store_indices(int32_t* to, Vec<A> row, Vec<A> column, int32_t stride) {
  *to = static_cast<int32_t>(row.v) * stride + static_cast<int32_t>(column.v);
}
template <class A>
inline void gather_pairs(const A* p, const int32_t* index, Vec<A>& first, Vec<A>& second) {
  first = {p[*index]};
  second = {p[*index + 1]};
}
template <class A>
inline void store_sums_of_lanes(A* to, Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d) {
  to[0] = a.v;
  to[1] = b.v;
  to[2] = c.v;
  to[3] = d.v;
}

#endif

// Half a vector, for planes whose channels would leave more than half of a whole one idle: only where the machine does
// two halves as fast as one whole.
#if defined(__AVX512F__)
struct HalfVec {
  __m256 v;
};
inline HalfVec fma(HalfVec a, HalfVec b, HalfVec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline HalfVec add(HalfVec a, HalfVec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline void store(float* p, HalfVec x) { _mm256_storeu_ps(p, x.v); }
template <class A>
constexpr int kHalfWidth = sizeof(A) == sizeof(float) ? 8 : 0;
#else
template <class A>
constexpr int kHalfWidth = 0;  // there is none
#endif

// What a loop nest needs of a type of vector.
template <class V>
struct VectorTraits;
template <class A>
struct VectorTraits<Vec<A>> {
  using Scalar = A;
  static constexpr int kLanes = kWidth<A>;
  static Vec<A> broadcast_of(const A* p) { return broadcast(*p); }
  static Vec<A> load_from(const A* p) { return load(p); }
};
#if defined(__AVX512F__)
template <>
struct VectorTraits<HalfVec> {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static HalfVec broadcast_of(const float* p) { return {_mm256_broadcast_ss(p)}; }
  static HalfVec load_from(const float* p) { return {_mm256_loadu_ps(p)}; }
};
#endif

constexpr int64_t kMaxGatherStride = 1 << 26;  // below it, lanes times stride stays within a gather's int32

template <class A>
inline Vec<A> zero() {
  return broadcast(A(0));
}

// Whether the lanes of a vector can be used as pairs of neighbouring columns.
template <class A>
constexpr bool kHasPairs = sizeof(A) == sizeof(float) && kVectorBytes > 0;

// ---- activations -------------------------------------------------------------------------------------------

inline float exp_of(float x) { return ::expf(x); }
inline double exp_of(double x) { return ::exp(x); }
inline float tanh_of(float x) { return ::tanhf(x); }
inline double tanh_of(double x) { return ::tanh(x); }
inline float erfc_of(float x) { return ::erfcf(x); }
inline double erfc_of(double x) { return ::erfc(x); }

template <class A>
inline A sigmoid_of(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

// By erfc, which keeps its digits in the negative tail, where 1 + erf cancels.
template <class A>
inline A normal_cdf(A x) {
  return A(0.5) * erfc_of(x * A(-0.70710678118654752440));
}

// relu keeps NaN, as torch does.
template <class A>
inline A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < A(0) ? A(0) : x;
    case Activation::sigmoid:
      return sigmoid_of(x);
    case Activation::tanh:
      return tanh_of(x);
    case Activation::gelu:
      return x * normal_cdf(x);
    case Activation::silu: {
      const A e = exp_of(-std::fabs(x));  // of the negative side: exp(-x) would overflow and lose the tail
      return x < A(0) ? x * (e / (A(1) + e)) : x / (A(1) + e);
    }
  }
  return x;
}

// d activation / d pre-activation from what is saved: the output for relu, sigmoid and tanh, the pre-activation for
// gelu and silu. Not for none.
template <class A>
inline A activation_derivative(Activation activation, A saved) {
  switch (activation) {
    case Activation::relu:
      return saved <= A(0) ? A(0) : A(1);
    case Activation::sigmoid:
      return saved * (A(1) - saved);
    case Activation::tanh:
      return A(1) - saved * saved;
    case Activation::gelu: {
      const A pdf = A(0.39894228040143267794) * exp_of(A(-0.5) * saved * saved);
      return normal_cdf(saved) + saved * pdf;
    }
    case Activation::silu: {
      const A s = sigmoid_of(saved);
      return s * (A(1) + saved * (A(1) - s));
    }
    case Activation::none:
      break;
  }
  return A(1);
}

}  // namespace
}  // namespace pyconv::cpu
