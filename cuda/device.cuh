// What the kernels use of the device: launching, shared memory, asynchronous copies, matrix instructions and 16-bit
// formats. Every PTX instruction of the project is here, behind a function: the tests compile the same kernels for the
// CPU with PYCONV_EMULATION, where tests/emulation/emulation.h supplies these functions and CUDA's own names.
//
// Rules that the emulation relies on: kernels reach shared memory through shared_memory<T>() alone, and global memory
// through pointers in their params; every thread of a warp calls the warp-wide functions (load_matrices, mma_*, shuffles).
#pragma once

#include <cstdint>

#include "params.h"

#if defined(PYCONV_EMULATION)
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pyconv::cuda {

// ---- Launching ----------------------------------------------------------------------------------------------

// Shared memory of a block beyond this must be asked for, once per kernel and device.
constexpr size_t kDefaultSharedBytes = 48 * 1024;
// What every supported architecture can give one block (sm_86, sm_89 and sm_120 have the least).
constexpr size_t kMaxSharedBytes = 99 * 1024;

// The only launch in the project. Gives back the launch's error.
template <class... KernelArguments, class... Arguments>
int launch(void (*kernel)(KernelArguments...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// ---- Shared memory ------------------------------------------------------------------------------------------

// The block's shared memory as one T; the launcher passes sizeof(T).
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(128) unsigned char pyconv_shared_memory[];
  return *reinterpret_cast<T*>(pyconv_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Asynchronous copies, global to shared ------------------------------------------------------------------

// Copies `Bytes` (4, 8 or 16; both sides aligned to it), or writes zeros where !valid; `from` is not read then. Visible
// to the thread after copies_wait, to the others after a barrier too. 16 bytes pass the L1 cache by unless KEEP_IN_L1,
// which pays where the block reads them again soon; fewer never do.
template <int Bytes, bool KEEP_IN_L1 = false>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16 && !KEEP_IN_L1) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
                 "r"(valid ? Bytes : 0)
                 : "memory");
  }
}

// Ends a group of copies.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `Groups` of the latest groups are under way.
template <int Groups>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Groups) : "memory");
}

// ---- Matrix instructions ------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones) from shared memory: `row` is the 16-byte row that this
// lane names, row lane % 8 of matrix lane / 8. This lane gets 4 bytes of each: row lane / 4, bytes 4 * (lane % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: this lane gets rows 2 * (lane % 4) and one more, column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8) += a (16xk) * b (kx8), float32 accumulation. With g = lane / 4 and t = lane % 4 a lane holds
//   d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//   k = 8, TF32:    a: (g, t), (g+8, t), (g, t+4), (g+8, t+4)                        b: (t, g), (t+4, g)
//   k = 16, 16 bit: a: (g, 2t..2t+1), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)        b: (2t..2t+1, g), (2t+8.., g)
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of a float32 rounded to TF32 (to nearest, ties away from zero), as a float32's bits.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t float_bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(float_bits)));
  return rounded;
}

// ---- 16-bit formats -----------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

}  // namespace pyconv::cuda

#endif  // PYCONV_EMULATION
