// Counter-based random numbers for host and device: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3" (SC'11), and what dropout makes of them. This file is the definition of
// a mask: every kernel, whatever its ISA, chunking, layout or device, must agree with is_dropped().
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYCONV_HOST_DEVICE __host__ __device__
#else
#define PYCONV_HOST_DEVICE
#endif

// In an anonymous namespace, because the kernels include this once per ISA and must share no symbol.
namespace pyconv {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

// The four random words of one counter.
struct PhiloxBlock {
  uint32_t word[4];
};

PYCONV_HOST_DEVICE inline PhiloxBlock philox4x32(uint32_t counter0, uint32_t counter1, uint32_t counter2,
                                                 uint32_t counter3, uint32_t key0, uint32_t key1) {
  PhiloxBlock x = {{counter0, counter1, counter2, counter3}};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x.word[2];
    x = {{static_cast<uint32_t>(product1 >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return x;
}

// Block `index` of the stream (seed, offset).
PYCONV_HOST_DEVICE inline PhiloxBlock philox_block(uint64_t seed, uint64_t offset, uint64_t index) {
  return philox4x32(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                    static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// How elements are drawn for a drop probability 0 < p < 1: an element is dropped iff its draw is below
// `threshold`. A p that is a multiple of 1/256 needs only 8 bits an element, hence a quarter of the blocks.
struct DropoutDraws {
  bool bytes;          // 8-bit draws, 16 elements a block; otherwise 32-bit draws, 4 elements a block
  uint64_t threshold;  // up to 2^8 or up to 2^32, so not always a 32-bit number
};

PYCONV_HOST_DEVICE inline DropoutDraws dropout_draws(double p) {
  const double in_256ths = p * 256.0;
  const uint64_t floor_256ths = static_cast<uint64_t>(in_256ths);
  if (static_cast<double>(floor_256ths) == in_256ths) return {true, floor_256ths};
  return {false, static_cast<uint64_t>(p * 4294967296.0 + 0.5)};
}

// Whether element `index`, in logical (row-major) order, is dropped.
PYCONV_HOST_DEVICE inline bool is_dropped(const DropoutDraws& draws, uint64_t seed, uint64_t offset,
                                          uint64_t index) {
  if (draws.bytes) {
    const PhiloxBlock block = philox_block(seed, offset, index / 16);
    return ((block.word[index % 16 / 4] >> (8 * (index % 4))) & 0xffu) < draws.threshold;
  }
  return philox_block(seed, offset, index / 4).word[index % 4] < draws.threshold;
}

}  // namespace
}  // namespace pyconv
