// What the emulated device does at run time: blocks of threads, barriers, warp-wide operations, asynchronous copies.
// CUDA's names for it are in cuda_names.h, the project's in emulation.h.
//
// Every misuse that the device would answer with an undefined result or a hang ends the process with a message that
// names the kernel, the block, the thread and the file and line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pyconv::emulation {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Where a kernel calls an operation that several threads must call together.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define PYCONV_EMULATION_SITE pyconv::emulation::Site site = pyconv::emulation::Site::here()

// threadIdx, blockIdx, blockDim and gridDim of the thread that runs. __thread spares each access the question whether
// a constructor has run.
struct Position {
  uint3 thread, block, block_size, grid_size;
};
extern __thread Position position;

// ---- Launches -----------------------------------------------------------------------------------------------

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 99 * 1024;

struct Launch {
  const void* kernel;  // its address, which names it
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void* context);  // what every thread runs
  const void* context;
};
// Runs every block and gives back a cudaError_t.
int run(const Launch& launch);

// The block's shared memory; a launch with less than `bytes` of it ends the process.
void* shared_memory(size_t bytes);

// ---- Operations of several threads --------------------------------------------------------------------------

void block_barrier(Site site);
void warp_barrier(uint32_t mask, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

enum class ShuffleKind { index, up, down, exclusive_or };
uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width, Site site);

// ldmatrix: `row` is in shared memory, 16 bytes from a multiple of 16.
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Site site);

enum class MatrixFormat { tf32, bfloat16, float16 };
void multiply_matrices(MatrixFormat format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

// ---- Asynchronous copies ------------------------------------------------------------------------------------

// The bytes arrive at the wait. Until then the destination holds 0xFF, so that a read too early shows, and so does a
// copy into bytes that others still read.
void copy_async(void* to, const void* from, int bytes, bool valid, Site site);
void copies_commit();
void copies_wait(int groups_under_way, Site site);

// ---- 16-bit formats -----------------------------------------------------------------------------------------

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float bfloat16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; NaN becomes 0x7fff as on the device.
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  // A subnormal is a multiple of 2^-24. Integer to float: exact, and the same where the processor flushes subnormals.
  if (exponent == 0) return bits_float(sign | float_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To nearest, ties to even; NaN becomes 0x7fff as on the device.
inline uint16_t float_to_float16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x33000000u) return sign;            // below half of the smallest subnormal
  const uint32_t exponent = magnitude >> 23;
  // A subnormal result keeps fewer bits; the 24 bits with the leading one are shifted to its place.
  const uint32_t significand = exponent < 113 ? (magnitude & 0x7fffffu) | 0x800000u : magnitude - (112u << 23);
  const uint32_t shift = exponent < 113 ? 126 - exponent : 13;
  const uint32_t rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
  uint32_t rounded = significand >> shift;
  rounded += rest > half || (rest == half && (rounded & 1u));
  return static_cast<uint16_t>(sign | rounded);
}

// To nearest, ties away from zero; the 13 bits that the tensor cores ignore are zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace pyconv::emulation
