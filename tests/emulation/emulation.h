// The emulated device behind cuda/device.cuh: the same functions with the same signatures, without a GPU. Compile the
// kernels with `g++ -x c++ -DPYCONV_EMULATION -Itests/emulation -Icsrc -Icuda`; what they mean is said in device.cuh.
#pragma once

#include <tuple>

#include "cuda_names.h"
#include "params.h"
#include "runtime.h"

namespace pyconv::cuda {

// ---- Launching ----------------------------------------------------------------------------------------------

constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr size_t kMaxSharedBytes = emulation::kMaxSharedBytes;

// What all architectures accept as parameters of a kernel.
constexpr size_t kMaxParameterBytes = 4096;

template <class... KernelArguments, class... Arguments>
int launch(void (*kernel)(KernelArguments...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
           const Arguments&... arguments) {
  static_assert((size_t(0) + ... + sizeof(KernelArguments)) <= kMaxParameterBytes, "too many bytes of parameters");
  struct Call {
    void (*kernel)(KernelArguments...);
    std::tuple<KernelArguments...> arguments;
  };
  const Call call{kernel, std::tuple<KernelArguments...>(arguments...)};
  const auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  return emulation::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call});
}

// ---- Shared memory ------------------------------------------------------------------------------------------

template <class T>
inline T& shared_memory() {
  return *static_cast<T*>(emulation::shared_memory(sizeof(T)));
}

// ---- Asynchronous copies, global to shared ------------------------------------------------------------------

template <int Bytes, bool KEEP_IN_L1 = false>
inline void copy_async(void* to, const void* from, bool valid, PYCONV_EMULATION_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulation::copy_async(to, from, Bytes, valid, site);
}

inline void copies_commit() { emulation::copies_commit(); }

template <int Groups>
inline void copies_wait(PYCONV_EMULATION_SITE) {
  emulation::copies_wait(Groups, site);
}

// ---- Matrix instructions ------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&to)[4], const void* row, PYCONV_EMULATION_SITE) {
  emulation::load_matrices(to, row, /*transposed=*/false, site);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row, PYCONV_EMULATION_SITE) {
  emulation::load_matrices(to, row, /*transposed=*/true, site);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYCONV_EMULATION_SITE) {
  emulation::multiply_matrices(emulation::MatrixFormat::tf32, d, a, b, site);
}
inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYCONV_EMULATION_SITE) {
  emulation::multiply_matrices(emulation::MatrixFormat::bfloat16, d, a, b, site);
}
inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYCONV_EMULATION_SITE) {
  emulation::multiply_matrices(emulation::MatrixFormat::float16, d, a, b, site);
}

inline uint32_t round_to_tf32(uint32_t float_bits) { return emulation::round_to_tf32(float_bits); }

// ---- 16-bit formats -----------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return emulation::bfloat16_to_float(x.bits); }
inline float to_float(Float16 x) { return emulation::float16_to_float(x.bits); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {emulation::float_to_bfloat16(x)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  return {emulation::float_to_float16(x)};
}

}  // namespace pyconv::cuda
