// Which elements dropout keeps, drawn for vectors of neighbouring elements; csrc/philox.h defines what is drawn.
#pragma once

#include "device.cuh"
#include "philox.h"

namespace pyconv::cuda {

struct DropoutMask {
  bool draws;          // false: no element is drawn, and kept_without_draws holds for all
  bool bytes;          // 8-bit draws, otherwise 32-bit ones
  uint64_t threshold;  // an element is dropped iff its draw is below; not 0
  uint32_t kept_without_draws;
  uint64_t seed, offset;
  const int64_t* state;  // (seed, offset) instead of the two above; or null
};

// In an anonymous namespace, as what it uses of philox.h is.
namespace {

template <class Params>
DropoutMask mask_of(const Params& params) {
  DropoutMask mask = {};
  mask.kept_without_draws = !params.drop && params.scale == 0 ? 0u : ~0u;
  if (params.drop) {
    const DropoutDraws draws = dropout_draws(params.p);
    mask.draws = draws.threshold > 0;
    mask.bytes = draws.bytes;
    mask.threshold = draws.threshold;
  }
  mask.seed = params.seed;
  mask.offset = params.offset;
  mask.state = params.state;
  return mask;
}

struct DropoutKey {
  uint64_t seed, offset;
};

__device__ __forceinline__ DropoutKey key_of(const DropoutMask& mask) {
  if (mask.state == nullptr) return {mask.seed, mask.offset};
  return {static_cast<uint64_t>(mask.state[0]), static_cast<uint64_t>(mask.state[1])};
}

__device__ __forceinline__ PhiloxBlock philox_round(const PhiloxBlock& x, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x.word[0];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x.word[2];
  return {{static_cast<uint32_t>(product1 >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(product0)}};
}

// block.word[i] without an array in memory.
__device__ __forceinline__ uint32_t word_of(const PhiloxBlock& block, int i) {
  const uint32_t low = (i & 1) != 0 ? block.word[1] : block.word[0];
  const uint32_t high = (i & 1) != 0 ? block.word[3] : block.word[2];
  return (i & 2) != 0 ? high : low;
}

// Several blocks of one stream at once: they share the round keys, a quarter of the instructions.
template <int Blocks>
__device__ __forceinline__ void philox_blocks(const DropoutKey& key, const uint64_t (&index)[Blocks],
                                              PhiloxBlock (&block)[Blocks]) {
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    block[b] = {{static_cast<uint32_t>(index[b]), static_cast<uint32_t>(index[b] >> 32),
                 static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32)}};
  }
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) block[b] = philox_round(block[b], key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// Bit v: whether element index + v is kept, for v < Elements. `index`, a multiple of Elements, lies in the block.
template <int Elements>
__device__ __forceinline__ uint32_t kept_by_bytes(const PhiloxBlock& block, uint32_t threshold, uint64_t index) {
  constexpr int words = Elements < 4 ? 1 : Elements / 4;
  const int first_word = static_cast<int>(index / 4 % 4);
  uint32_t kept = 0;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    uint32_t word = word_of(block, first_word + w);
    if (Elements < 4) word >>= 8 * (index % 4);
#pragma unroll
    for (int byte = 0; byte < Elements / words; ++byte) {
      if ((word >> (8 * byte) & 0xffu) >= threshold) kept |= 1u << (4 * w + byte);
    }
  }
  return kept;
}

// The same of at most four elements.
template <int Elements>
__device__ __forceinline__ uint32_t kept_by_words(const PhiloxBlock& block, uint32_t last_dropped, uint64_t index) {
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < Elements; ++i) {
    const uint32_t word = Elements < 4 ? word_of(block, static_cast<int>(index % 4) + i) : block.word[i];
    if (word > last_dropped) kept |= 1u << i;
  }
  return kept;
}

// The bits of `Vectors` vectors, the first at element `first`, the others `step` apart. All are multiples of Elements.
template <int Elements, int Vectors>
__device__ __forceinline__ void draw_kept(const DropoutMask& mask, const DropoutKey& key, int64_t first, int64_t step,
                                          uint32_t (&kept)[Vectors]) {
  const auto at = [&](int u) { return static_cast<uint64_t>(first + u * step); };
  if (!mask.draws) {
#pragma unroll
    for (int u = 0; u < Vectors; ++u) kept[u] = mask.kept_without_draws;
  } else if (mask.bytes) {
    uint64_t index[Vectors];
    PhiloxBlock block[Vectors];
#pragma unroll
    for (int u = 0; u < Vectors; ++u) index[u] = at(u) / 16;
    philox_blocks(key, index, block);
#pragma unroll
    for (int u = 0; u < Vectors; ++u) {
      kept[u] = kept_by_bytes<Elements>(block[u], static_cast<uint32_t>(mask.threshold), at(u));
    }
  } else {
    constexpr int per_vector = Elements < 4 ? 1 : Elements / 4;
    uint64_t index[Vectors * per_vector];
    PhiloxBlock block[Vectors * per_vector];
#pragma unroll
    for (int b = 0; b < Vectors * per_vector; ++b) index[b] = at(b / per_vector) / 4 + b % per_vector;
    philox_blocks(key, index, block);
#pragma unroll
    for (int u = 0; u < Vectors; ++u) {
      kept[u] = 0;
#pragma unroll
      for (int b = 0; b < per_vector; ++b) {
        kept[u] |= kept_by_words<Elements / per_vector>(block[u * per_vector + b],
                                                        static_cast<uint32_t>(mask.threshold - 1), at(u))
                   << (4 * b);
      }
    }
  }
}

// The bits of one vector at any index: slower, a Philox block for each element.
template <int Elements>
__device__ __forceinline__ uint32_t draw_kept_anywhere(const DropoutMask& mask, const DropoutKey& key, int64_t index) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int v = 0; v < Elements; ++v) {
    uint32_t bit[1];
    draw_kept<1>(mask, key, index + v, 0, bit);
    kept |= (bit[0] & 1) << v;
  }
  return kept;
}

}  // namespace
}  // namespace pyconv::cuda
