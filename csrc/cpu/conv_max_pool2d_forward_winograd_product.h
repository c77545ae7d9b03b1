// The products of the Winograd forward of conv_max_pool2d, one of the 16 transformed positions at a time:
//
//   V (tiles, depth), U (depth, KV vectors of K) -> M (tiles, KV vectors)
#pragma once

#include "simd.h"

namespace pyconv::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTiles = 8;  // with 3 vectors of K: 24 of 32 registers hold sums
#else
constexpr int kTiles = 4;
#endif

// The lower half of a vector: where K ends in the first half of its last vector, multiply-adds of halves take half the
// time.
#if defined(__AVX512F__)
template <class A>
constexpr bool kHasHalves = sizeof(A) == sizeof(float);
struct Half {
  __m256 v;
};
inline Half load_half(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Half broadcast_half(float x) { return {_mm256_set1_ps(x)}; }
inline Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> extended(Half x) { return {_mm512_zextps256_ps512(x.v)}; }
#else
template <class A>
constexpr bool kHasHalves = false;
#endif

// M (T tiles, KV vectors) = V (T, depth) U (depth, KV vectors), added to what is there if `more`. A row of V is `stride`.
// With HALF the upper half of the last vector is zero.
template <int KV, bool HALF, int T, class A>
void multiply_tiles(const A* v, int64_t stride, int64_t depth, const A* u, bool more, A* m) {
  Vec<A> acc[T][KV];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) acc[t][k] = zero<A>();
  }
#if defined(__AVX512F__)
  if constexpr (HALF) {
    constexpr int kWhole = KV - 1;
    Half halves[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) halves[t] = broadcast_half(0);
    for (int64_t d = 0; d < depth; ++d, u += KV * kWidth<A>) {
      Vec<A> w[KV];
#pragma GCC unroll 4
      for (int k = 0; k < kWhole; ++k) w[k] = load(u + k * kWidth<A>);
      const Half half = load_half(u + kWhole * kWidth<A>);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const Vec<A> value = broadcast(v[t * stride + d]);
#pragma GCC unroll 4
        for (int k = 0; k < kWhole; ++k) acc[t][k] = fma(value, w[k], acc[t][k]);
        halves[t] = fma(Half{_mm512_castps512_ps256(value.v)}, half, halves[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t][kWhole] = extended(halves[t]);
  }
#endif
  if constexpr (!HALF) {
    for (int64_t d = 0; d < depth; ++d, u += KV * kWidth<A>) {
      Vec<A> w[KV];
#pragma GCC unroll 4
      for (int k = 0; k < KV; ++k) w[k] = load(u + k * kWidth<A>);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const Vec<A> value = broadcast(v[t * stride + d]);
#pragma GCC unroll 4
        for (int k = 0; k < KV; ++k) acc[t][k] = fma(value, w[k], acc[t][k]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) {
      A* to = m + (t * KV + k) * kWidth<A>;
      store(to, more ? add(load(to), acc[t][k]) : acc[t][k]);
    }
  }
}

template <int KV, bool HALF, int T, class A>
void multiply_some_tiles(int64_t count, const A* v, int64_t stride, int64_t depth, const A* u, bool more, A* m) {
  if constexpr (T > 1) {
    if (count < T) return multiply_some_tiles<KV, HALF, T - 1>(count, v, stride, depth, u, more, m);
  }
  multiply_tiles<KV, HALF, T>(v, stride, depth, u, more, m);
}

}  // namespace
}  // namespace pyconv::cpu
