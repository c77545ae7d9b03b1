// ldmatrix and mma: each lane brings its part, the last one to come works for all.
#include <cstring>

#include "block.h"
#include "races.h"
#include "runtime.h"

namespace pyconv::emulation {
namespace {

// ---- ldmatrix -----------------------------------------------------------------------------------------------

constexpr int kMatrices = 4, kMatrixRows = 8, kRowBytes = 16;

struct LoadSlot {
  const unsigned char* row;
  uint32_t (*to)[kMatrices];
};

template <bool Transposed>
void complete_load(const Meeting& meeting) {
  const auto slot = [&](int lane) -> LoadSlot& { return *static_cast<LoadSlot*>(meeting.slots[lane]); };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint32_t& word = (*slot(lane).to)[matrix];
      if constexpr (Transposed) {
        uint16_t elements[2];
        for (int i = 0; i < 2; ++i) {
          std::memcpy(&elements[i], slot(kMatrixRows * matrix + 2 * t + i).row + 2 * g, sizeof(uint16_t));
        }
        word = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
      } else {
        std::memcpy(&word, slot(kMatrixRows * matrix + g).row + 4 * t, sizeof(word));
      }
    }
  }
}

// ---- mma ----------------------------------------------------------------------------------------------------

constexpr int kRows = 16, kColumns = 8, kMaxDepth = 16;

struct MultiplySlot {
  float* d;
  const uint32_t *a, *b;
};

using Vector = float __attribute__((vector_size(16)));

template <MatrixFormat Format>
float operand(uint32_t word, int half) {
  // The tensor cores read 19 bits of a float32: an operand that was not rounded is truncated.
  if constexpr (Format == MatrixFormat::tf32) return bits_float(word & 0xffffe000u);
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return Format == MatrixFormat::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

template <MatrixFormat Format>
void complete_multiply(const Meeting& meeting) {
  constexpr int kPerWord = Format == MatrixFormat::tf32 ? 1 : 2;
  constexpr int kDepth = 8 * kPerWord;
  float a[kRows][kMaxDepth];
  alignas(Vector) float b[kMaxDepth][kColumns], d[kRows][kColumns];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& slot = *static_cast<const MultiplySlot*>(meeting.slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kPerWord; ++half) {
      const int k = kPerWord * t + half;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][k + kDepth / 2 * (i / 2)] = operand<Format>(slot.a[i], half);
      for (int i = 0; i < 2; ++i) b[k + kDepth / 2 * i][g] = operand<Format>(slot.b[i], half);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = slot.d[i];
  }
  // Each product is exact in float32; the sums go along the reduction, one after the other.
  for (int row = 0; row < kRows; ++row) {
    Vector sums[2];
    std::memcpy(sums, d[row], sizeof(sums));
    for (int k = 0; k < kDepth; ++k) {
      Vector columns[2];
      std::memcpy(columns, b[k], sizeof(columns));
      for (int i = 0; i < 2; ++i) sums[i] += a[row][k] * columns[i];
    }
    std::memcpy(d[row], sums, sizeof(sums));
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* to = static_cast<const MultiplySlot*>(meeting.slots[lane])->d;
    for (int i = 0; i < 4; ++i) to[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Site site) {
  Device& device = Device::current();
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
    fail_at(site, "ldmatrix: expected a row at a multiple of %d bytes, but got %p", kRowBytes, row);
  }
  if (!device.shared().contains(row, kRowBytes)) {
    fail_at(site, "ldmatrix: expected a row in the block's shared memory of %zu bytes, but got offset %td",
            device.shared().bytes(), static_cast<const char*>(row) - device.shared().begin());
  }
  record_read(row, kRowBytes, site);
  LoadSlot slot{static_cast<const unsigned char*>(row), &to};
  device.meet(kAllLanes, site, transposed ? complete_load<true> : complete_load<false>, &slot, /*all=*/true);
}

void multiply_matrices(MatrixFormat format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MultiplySlot slot{d, a, b};
  Complete complete = nullptr;
  switch (format) {
    case MatrixFormat::tf32: complete = complete_multiply<MatrixFormat::tf32>; break;
    case MatrixFormat::bfloat16: complete = complete_multiply<MatrixFormat::bfloat16>; break;
    case MatrixFormat::float16: complete = complete_multiply<MatrixFormat::float16>; break;
  }
  Device::current().meet(kAllLanes, site, complete, &slot, /*all=*/true);
}

}  // namespace pyconv::emulation
