// CUDA's own names for g++: keywords, built-in variables, vector types, intrinsics, error codes; those that kernels of
// this project want, so add what a new one misses. But not __shared__: shared memory comes from shared_memory<T>().
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- Vector types -------------------------------------------------------------------------------------------

// Aligned as on the device: UBSan finds a vector access to an address that is not a multiple of its size.
#define PYCONV_EMULATION_VECTORS(scalar, name)                                         \
  struct alignas(8) name##2 { scalar x, y; };                                          \
  struct alignas(16) name##4 { scalar x, y, z, w; };                                   \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                 \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
PYCONV_EMULATION_VECTORS(int, int)
PYCONV_EMULATION_VECTORS(unsigned, uint)
PYCONV_EMULATION_VECTORS(float, float)
#undef PYCONV_EMULATION_VECTORS

using pyconv::emulation::dim3;
using pyconv::emulation::uint3;

// ---- Built-in variables -------------------------------------------------------------------------------------

#define threadIdx (pyconv::emulation::position.thread)
#define blockIdx (pyconv::emulation::position.block)
#define blockDim (pyconv::emulation::position.block_size)
#define gridDim (pyconv::emulation::position.grid_size)

// ---- Arithmetic ---------------------------------------------------------------------------------------------

#define PYCONV_EMULATION_MIN_MAX(type)                           \
  inline type min(type a, type b) { return b < a ? b : a; }      \
  inline type max(type a, type b) { return a < b ? b : a; }
PYCONV_EMULATION_MIN_MAX(int)
PYCONV_EMULATION_MIN_MAX(unsigned)
PYCONV_EMULATION_MIN_MAX(long)
PYCONV_EMULATION_MIN_MAX(unsigned long)
PYCONV_EMULATION_MIN_MAX(long long)
PYCONV_EMULATION_MIN_MAX(unsigned long long)
#undef PYCONV_EMULATION_MIN_MAX
// A NaN loses, as on the device.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

inline uint32_t __float_as_uint(float x) { return pyconv::emulation::float_bits(x); }
inline float __uint_as_float(uint32_t x) { return pyconv::emulation::bits_float(x); }

// ---- Memory -------------------------------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

// ---- Barriers, votes and shuffles ---------------------------------------------------------------------------

inline void __syncthreads(PYCONV_EMULATION_SITE) { pyconv::emulation::block_barrier(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, PYCONV_EMULATION_SITE) {
  pyconv::emulation::warp_barrier(mask, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::ballot(mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::ballot(mask, predicate == 0, site) == 0;
}

namespace pyconv::emulation {
template <class T>
inline T shuffle_value(ShuffleKind kind, uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  bits = shuffle(kind, mask, bits, operand, width, site);
  memcpy(&value, &bits, sizeof(value));
  return value;
}
}  // namespace pyconv::emulation

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::shuffle_value(pyconv::emulation::ShuffleKind::index, mask, value, lane, width, site);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::shuffle_value(pyconv::emulation::ShuffleKind::up, mask, value, static_cast<int>(delta),
                                          width, site);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::shuffle_value(pyconv::emulation::ShuffleKind::down, mask, value, static_cast<int>(delta),
                                          width, site);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, PYCONV_EMULATION_SITE) {
  return pyconv::emulation::shuffle_value(pyconv::emulation::ShuffleKind::exclusive_or, mask, value, lane_mask, width,
                                          site);
}

// ---- Errors -------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
};

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}
