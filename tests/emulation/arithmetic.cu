// Kernels without a mistake, called from Python through C functions: what the emulated device computes.
#include <type_traits>

#include "device.cuh"
#include "warp_gemm.cuh"

namespace pyconv::cuda {

// ---- Matrix products ----------------------------------------------------------------------------------------

constexpr int kTilesOfA = 2, kTilesOfB = 4;
constexpr int kRows = 16 * kTilesOfA, kColumns = 8 * kTilesOfB, kSteps = 3;

template <class Math>
constexpr int kDepth = kSteps * kStep<Math>;

// 16 bytes more than a multiple of 128, as kernels pad rows.
template <class Math>
constexpr int kPitch = kDepth<Math> + 16 / static_cast<int>(sizeof(typename Math::Storage));
template <class Math>
constexpr int kPitchOfA = kRows + 32 / static_cast<int>(sizeof(typename Math::Storage));
template <class Math>
constexpr int kPitchOfB = kColumns + 32 / static_cast<int>(sizeof(typename Math::Storage));

template <class Math>
struct RowMajor {
  alignas(16) typename Math::Storage a[kRows][kPitch<Math>], b[kColumns][kPitch<Math>];
};
template <class Math>
struct ReductionMajor {
  alignas(16) typename Math::Storage a[kDepth<Math>][kPitchOfA<Math>], b[kDepth<Math>][kPitchOfB<Math>];
};

// d (rows, columns) = a (rows, depth) b (columns, depth) transposed, by one warp.
template <class Math, bool Transposed>
__global__ void multiply(const typename Math::Storage* a, const typename Math::Storage* b, float* d) {
  constexpr int kK = kDepth<Math>;
  using Shared = std::conditional_t<Transposed, ReductionMajor<Math>, RowMajor<Math>>;
  Shared& shared = shared_memory<Shared>();
  for (int i = threadIdx.x; i < kRows * kK; i += 32) {
    (Transposed ? shared.a[i % kK][i / kK] : shared.a[i / kK][i % kK]) = a[i];
  }
  for (int i = threadIdx.x; i < kColumns * kK; i += 32) {
    (Transposed ? shared.b[i % kK][i / kK] : shared.b[i / kK][i % kK]) = b[i];
  }
  __syncthreads();
  WarpTile<Math, kTilesOfA, kTilesOfB> tile;
  tile.clear();
  if constexpr (Transposed) {
    for (int step = 0; step < kSteps; ++step) {
      tile.multiply_transposed(shared.a[step * kStep<Math>], kPitchOfA<Math>, shared.b[step * kStep<Math>],
                               kPitchOfB<Math>);
    }
  } else {
    RowsOfA<Math, kTilesOfA> a_rows;
    a_rows.set([&](int m) { return static_cast<const void*>(shared.a[m]); });
    RowsOfB<Math, kTilesOfB> b_rows;
    b_rows.set([&](int n) { return static_cast<const void*>(shared.b[n]); });
    for (int step = 0; step < kSteps; ++step) {
      tile.multiply(a_rows, step * kStepBytes, b_rows, step * kStepBytes);
    }
  }
  for (int mt = 0; mt < kTilesOfA; ++mt) {
    for (int nt = 0; nt < kTilesOfB; ++nt) {
      for (int i = 0; i < 4; ++i) {
        d[(16 * mt + tile_row(i)) * kColumns + 8 * nt + tile_column(i)] = tile.sum[mt][nt][i];
      }
    }
  }
}

template <class Math>
int launch_multiply(bool transposed, const void* a, const void* b, float* d) {
  using Storage = typename Math::Storage;
  const auto* a_elements = static_cast<const Storage*>(a);
  const auto* b_elements = static_cast<const Storage*>(b);
  if (transposed) {
    return launch(multiply<Math, true>, 1, 32, sizeof(ReductionMajor<Math>), nullptr, a_elements, b_elements, d);
  }
  return launch(multiply<Math, false>, 1, 32, sizeof(RowMajor<Math>), nullptr, a_elements, b_elements, d);
}

// d (16, 8) = a (16, 8) b (8, 8), the operands as they are.
__global__ void multiply_unrounded(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = __float_as_uint(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) fb[i] = __float_as_uint(b[(t + 4 * i) * 8 + g]);
  float sum[4] = {};
  mma_tf32(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// ---- Threads ------------------------------------------------------------------------------------------------

// Adds one to the thread's own counter.
__global__ void count_threads(int* counters) {
  const int64_t block = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  counters[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1;
}

__global__ void nothing() {}

// to: what each lane gets from index, up, down and xor, and a vote on the operand being odd.
__global__ void shuffles(const int* values, int operand, int width, int* to) {
  const int lane = threadIdx.x;
  const int value = values[lane];
  to[lane] = __shfl_sync(0xffffffffu, value, operand, width);
  to[32 + lane] = __shfl_up_sync(0xffffffffu, value, operand, width);
  to[64 + lane] = __shfl_down_sync(0xffffffffu, value, operand, width);
  to[96 + lane] = __shfl_xor_sync(0xffffffffu, value, operand, width);
  to[128 + lane] = static_cast<int>(__ballot_sync(0xffffffffu, value & 1));
  to[160 + lane] = __any_sync(0xffffffffu, value > operand) + 2 * __all_sync(0xffffffffu, value > operand);
  to[192 + lane] = static_cast<int>(__shfl_xor_sync(0xffffffffu, static_cast<double>(value), 1));
}

}  // namespace pyconv::cuda

// ---- From Python --------------------------------------------------------------------------------------------

extern "C" {

using namespace pyconv;

enum Format { kFloat32, kTF32, kBFloat16, kFloat16 };

int matrix_rows() { return cuda::kRows; }
int matrix_columns() { return cuda::kColumns; }
int matrix_depth(Format format) {
  return format <= kTF32 ? cuda::kDepth<cuda::TF32> : cuda::kDepth<cuda::FP16>;
}

int multiply(Format format, bool transposed, const void* a, const void* b, float* d) {
  switch (format) {
    case kFloat32: return cuda::launch_multiply<cuda::Float32>(transposed, a, b, d);
    case kTF32: return cuda::launch_multiply<cuda::TF32>(transposed, a, b, d);
    case kBFloat16: return cuda::launch_multiply<cuda::BF16>(transposed, a, b, d);
    case kFloat16: return cuda::launch_multiply<cuda::FP16>(transposed, a, b, d);
  }
  return cudaErrorInvalidValue;
}

int multiply_unrounded(const float* a, const float* b, float* d) {
  return cuda::launch(cuda::multiply_unrounded, 1, 32, 0, nullptr, a, b, d);
}

void widen(Format format, const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = format == kBFloat16 ? cuda::to_float(BFloat16{from[i]}) : cuda::to_float(Float16{from[i]});
  }
}

void narrow(Format format, const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = format == kBFloat16 ? cuda::from_float<BFloat16>(from[i]).bits : cuda::from_float<Float16>(from[i]).bits;
  }
}

void round_to_tf32(const uint32_t* from, uint32_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = cuda::round_to_tf32(from[i]);
}

int count_threads(const unsigned* grid, const unsigned* block, int* counters) {
  return cuda::launch(cuda::count_threads, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                      nullptr, counters);
}

int launch_nothing(const unsigned* grid, const unsigned* block, size_t shared_bytes) {
  return cuda::launch(cuda::nothing, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes,
                      nullptr);
}

int shuffles(const int* values, int operand, int width, int* to) {
  return cuda::launch(cuda::shuffles, 1, 32, 0, nullptr, values, operand, width, to);
}
}
