// The arithmetic of one warp of a tiled matrix product in shared memory: MT x NT tiles of 16 x 8 accumulators.
//
// One ownership of the accumulators for all number formats, that of mma.m16n8: with g = lane / 4 and t = lane % 4, a
// lane's accumulator i of tile (mt, nt) is row 16 * mt + tile_row(i), column 8 * nt + tile_column(i). So epilogues and
// the order of rows do not depend on the format. Math chooses how products are formed:
//
//   Float32    fused multiply-adds: exact float32
//   TF32       tensor cores, float32 storage, operands rounded to TF32
//   BF16, FP16 tensor cores, 16-bit storage, float32 accumulation
//
// A is (rows, reduction), B is (columns, reduction), in one of two layouts of shared memory:
//   row-major        one row of A or B is contiguous along the reduction: multiply()
//   reduction-major  one step of the reduction is contiguous along the rows of A or B: multiply_transposed()
// Both go forward by kStepBytes of the row-major form, kStep elements of the reduction.
#pragma once

#include "device.cuh"

namespace pyconv::cuda {

constexpr int kStepBytes = 32;

struct Float32 {
  using Storage = float;
  static constexpr DType kDType = DType::float32;
  static constexpr bool kTensorCore = false;
};
struct TF32 {
  using Storage = float;
  static constexpr DType kDType = DType::float32;
  static constexpr bool kTensorCore = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};
struct BF16 {
  using Storage = BFloat16;
  static constexpr DType kDType = DType::bfloat16;
  static constexpr bool kTensorCore = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bfloat16(d, a, b);
  }
};
struct FP16 {
  using Storage = Float16;
  static constexpr DType kDType = DType::float16;
  static constexpr bool kTensorCore = true;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_float16(d, a, b);
  }
};

// Elements of the reduction in one step.
template <class Math>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(typename Math::Storage));

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int tile_row(int i) { return lane_index() / 4 + 8 * (i / 2); }
__device__ __forceinline__ int tile_column(int i) { return 2 * (lane_index() % 4) + i % 2; }

// The rows of a row-major A that this lane reads, MT tiles of 16. Pitch-free: any row may lie anywhere (16-byte aligned).
template <class Math, int MT>
struct RowsOfA {
  static constexpr int kPerTile = Math::kTensorCore ? 1 : 2;
  const char* row[MT * kPerTile];

  // pointer(m): where row m of the warp's 16 * MT begins.
  template <class Pointer>
  __device__ __forceinline__ void set(Pointer pointer) {
    const int lane = lane_index();
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      if constexpr (Math::kTensorCore) {
        row[mt] = static_cast<const char*>(pointer(16 * mt + lane % 16)) + 16 * (lane / 16);
      } else {
        row[2 * mt] = static_cast<const char*>(pointer(16 * mt + lane / 4));
        row[2 * mt + 1] = static_cast<const char*>(pointer(16 * mt + lane / 4 + 8));
      }
    }
  }
};

// The same for B: NT tiles of 8 rows (columns of the product). NT is even.
template <class Math, int NT>
struct RowsOfB {
  static_assert(NT % 2 == 0, "tiles of B are loaded in pairs");
  static constexpr int kPerPair = Math::kTensorCore ? 1 : 4;
  const char* row[NT / 2 * kPerPair];

  template <class Pointer>
  __device__ __forceinline__ void set(Pointer pointer) {
    const int lane = lane_index();
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair) {
      if constexpr (Math::kTensorCore) {
        row[pair] = static_cast<const char*>(pointer(16 * pair + lane % 8 + 8 * (lane / 16))) + 16 * (lane / 8 % 2);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          row[4 * pair + i] = static_cast<const char*>(pointer(16 * pair + 8 * (i / 2) + 2 * (lane % 4) + i % 2));
        }
      }
    }
  }
};

template <class Math, int MT, int NT>
struct WarpTile {
  float sum[MT][NT][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[mt][nt][i] = 0.f;
      }
    }
  }

  // One step; a_offset and b_offset are bytes from the rows' beginnings (multiples of 16).
  __device__ __forceinline__ void multiply(const RowsOfA<Math, MT>& a_rows, int a_offset,
                                           const RowsOfB<Math, NT>& b_rows, int b_offset) {
    if constexpr (Math::kTensorCore) {
      uint32_t a[MT][4], b[NT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        load_matrices(a[mt], a_rows.row[mt] + a_offset);
        round_operands(a[mt]);
      }
      load_rows_of_b(b, b_rows, b_offset);
      multiply_fragments(a, b);
    } else {
#pragma unroll
      for (int half = 0; half < kStepBytes; half += 16) {
        float4 a[2 * MT], b[2 * NT];
#pragma unroll
        for (int r = 0; r < 2 * MT; ++r) a[r] = *reinterpret_cast<const float4*>(a_rows.row[r] + a_offset + half);
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) b[c] = *reinterpret_cast<const float4*>(b_rows.row[c] + b_offset + half);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float4& x = a[2 * mt + i / 2];
              const float4& y = b[2 * nt + i % 2];
              float& s = sum[mt][nt][i];
              s = fmaf(x.x, y.x, s);
              s = fmaf(x.y, y.y, s);
              s = fmaf(x.z, y.z, s);
              s = fmaf(x.w, y.w, s);
            }
          }
        }
      }
    }
  }

  // One step with an A that lies anywhere, TF32: element(mt, half, k_half) is A's element of row 16 * mt + lane / 4 +
  // 8 * half and step element lane % 4 + 4 * k_half.
  template <class Element>
  __device__ __forceinline__ void multiply_gathered(const Element& element, const RowsOfB<Math, NT>& b_rows,
                                                    int b_offset) {
    static_assert(Math::kTensorCore && sizeof(typename Math::Storage) == 4, "one element of A fills a register");
    uint32_t a[MT][4], b[NT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[mt][i] = float_bits(element(mt, i % 2, i / 2));
      round_operands(a[mt]);
    }
    load_rows_of_b(b, b_rows, b_offset);
    multiply_fragments(a, b);
  }

  // One step of the reduction-major layouts: a[k * a_pitch + m], b[k * b_pitch + n], kStep values of k. For the 16-bit
  // formats rows of both must be 16-byte aligned. Pitches of 8 more than a multiple of 32 (float) or 64 (16 bit)
  // elements keep the banks apart.
  __device__ __forceinline__ void multiply_transposed(const typename Math::Storage* a, int a_pitch,
                                                      const typename Math::Storage* b, int b_pitch) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    if constexpr (Math::kTensorCore && sizeof(typename Math::Storage) == 2) {
      uint32_t fa[MT][4], fb[NT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        load_matrices_transposed(fa[mt], a + (lane % 8 + 8 * (lane / 16)) * a_pitch + 16 * mt + 8 * (lane / 8 % 2));
      }
#pragma unroll
      for (int pair = 0; pair < NT / 2; ++pair) {
        uint32_t both[4];
        load_matrices_transposed(both, b + lane % 16 * b_pitch + 16 * pair + 8 * (lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) fb[2 * pair + i / 2][i % 2] = both[i];
      }
      multiply_fragments(fa, fb);
    } else if constexpr (Math::kTensorCore) {
      uint32_t fa[MT][4], fb[NT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          fa[mt][i] = float_bits(a[(t + 4 * (i / 2)) * a_pitch + 16 * mt + g + 8 * (i % 2)]);
        }
        round_operands(fa[mt]);
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i) fb[nt][i] = float_bits(b[(t + 4 * i) * b_pitch + 8 * nt + g]);
        round_operands(fb[nt]);
      }
      multiply_fragments(fa, fb);
    } else {
#pragma unroll
      for (int k = 0; k < kStep<Math>; ++k) {
        float x[2 * MT], y[2 * NT];
#pragma unroll
        for (int r = 0; r < 2 * MT; ++r) x[r] = a[k * a_pitch + 8 * r + g];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          y[2 * nt] = b[k * b_pitch + 8 * nt + 2 * t];
          y[2 * nt + 1] = b[k * b_pitch + 8 * nt + 2 * t + 1];
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[mt][nt][i] = fmaf(x[2 * mt + i / 2], y[2 * nt + i % 2], sum[mt][nt][i]);
            }
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }

  template <int Count>
  static __device__ __forceinline__ void round_operands(uint32_t (&words)[Count]) {
    if constexpr (sizeof(typename Math::Storage) == 4) {
#pragma unroll
      for (int i = 0; i < Count; ++i) words[i] = round_to_tf32(words[i]);
    }
  }

  static __device__ __forceinline__ void load_rows_of_b(uint32_t (&b)[NT][2], const RowsOfB<Math, NT>& rows,
                                                        int offset) {
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair) {
      uint32_t both[4];
      load_matrices(both, rows.row[pair] + offset);
      round_operands(both);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[2 * pair + i / 2][i % 2] = both[i];
    }
  }

  __device__ __forceinline__ void multiply_fragments(const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) Math::mma(sum[mt][nt], a[mt], b[nt]);
    }
  }
};

}  // namespace pyconv::cuda
