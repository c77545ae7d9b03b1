// Vectorised Philox4x32-10: dropout masks as bits, see philox.h for what a mask is; and pairs of 16-bit numbers.
//
//   block indices (64-bit lanes) -> ten rounds -> words in element order -> compare with the threshold -> one
//   bit an element, set where it is kept; or -> two signed numbers a word
//
// A 64-bit lane holds one block. Its four words live in the low halves of four vectors, where the widening
// multiply reads them; the high halves hold leftovers of the multiplications, so no round shuffles anything.
#pragma once

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "simd.h"

namespace pyconv::cpu {
namespace {

struct RoundKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
};

inline RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxWeyl0;
    keys.key1[round] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxWeyl1;
  }
  return keys;
}

#if defined(__AVX512F__) || defined(__AVX2__)

#if defined(__AVX512F__)

using IntVec = __m512i;
constexpr int kBlocksPerVector = 8;
constexpr int kMaxChains = 4;  // independent blocks in flight, to hide the latency of the multiplications

inline IntVec broadcast_u32(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline IntVec broadcast_u64(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline IntVec add_u64(IntVec a, IntVec b) { return _mm512_add_epi64(a, b); }
inline IntVec high_half(IntVec a) { return _mm512_srli_epi64(a, 32); }
inline IntVec multiply_low_halves(IntVec a, IntVec b) { return _mm512_mul_epu32(a, b); }
inline IntVec xor3(IntVec a, IntVec b, IntVec c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Low halves of a in the low halves, low halves of b in the high halves.
inline IntVec pair_low_halves(IntVec a, IntVec b) {
  return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CDAB);
}
inline IntVec interleave_even(IntVec a, IntVec b) { return _mm512_unpacklo_epi64(a, b); }
inline IntVec interleave_odd(IntVec a, IntVec b) { return _mm512_unpackhi_epi64(a, b); }
// Lane l works on block lane_blocks()[l], so that interleave_even gives the first half of the blocks in
// order, and interleave_odd the second.
inline IntVec lane_blocks() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline void store_kept_words(uint8_t* bits, IntVec words, IntVec threshold) {
  const uint16_t kept = _mm512_cmpge_epu32_mask(words, threshold);
  std::memcpy(bits, &kept, sizeof kept);
}
inline void store_kept_bytes(uint8_t* bits, IntVec bytes, IntVec threshold) {
  const uint64_t kept = _mm512_cmpge_epu8_mask(bytes, threshold);
  std::memcpy(bits, &kept, sizeof kept);
}
inline IntVec broadcast_u8(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline void store_halves(IntVec words, float* low, float* high) {
  const __m512 half = _mm512_set1_ps(0.5f);
  const __m512i low_halves = _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16);
  _mm512_storeu_ps(low, _mm512_add_ps(_mm512_cvtepi32_ps(low_halves), half));
  _mm512_storeu_ps(high, _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16)), half));
}

#else

using IntVec = __m256i;
constexpr int kBlocksPerVector = 4;
constexpr int kMaxChains = 2;

inline IntVec broadcast_u32(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline IntVec broadcast_u64(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline IntVec add_u64(IntVec a, IntVec b) { return _mm256_add_epi64(a, b); }
inline IntVec high_half(IntVec a) { return _mm256_srli_epi64(a, 32); }
inline IntVec multiply_low_halves(IntVec a, IntVec b) { return _mm256_mul_epu32(a, b); }
inline IntVec xor3(IntVec a, IntVec b, IntVec c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
inline IntVec pair_low_halves(IntVec a, IntVec b) {
  return _mm256_blend_epi32(a, _mm256_shuffle_epi32(b, 0xB1), 0xAA);
}
inline IntVec interleave_even(IntVec a, IntVec b) { return _mm256_unpacklo_epi64(a, b); }
inline IntVec interleave_odd(IntVec a, IntVec b) { return _mm256_unpackhi_epi64(a, b); }
inline IntVec lane_blocks() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline void store_kept_words(uint8_t* bits, IntVec words, IntVec threshold) {
  // There is no unsigned comparison: words >= threshold iff their maximum is words.
  const IntVec kept = _mm256_cmpeq_epi32(_mm256_max_epu32(words, threshold), words);
  *bits = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(kept)));
}
inline void store_kept_bytes(uint8_t* bits, IntVec bytes, IntVec threshold) {
  const IntVec kept = _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, threshold), bytes);
  const int mask = _mm256_movemask_epi8(kept);
  std::memcpy(bits, &mask, sizeof mask);
}
inline IntVec broadcast_u8(uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline void store_halves(IntVec words, float* low, float* high) {
  const __m256 half = _mm256_set1_ps(0.5f);
  const __m256i low_halves = _mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16);
  _mm256_storeu_ps(low, _mm256_add_ps(_mm256_cvtepi32_ps(low_halves), half));
  _mm256_storeu_ps(high, _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16)), half));
}

#endif

// The words of chains * kBlocksPerVector blocks from block `first_block` on, in their order: 2 * chains vectors.
template <int chains>
inline void words_of_blocks(const RoundKeys& keys, uint64_t offset, uint64_t first_block, IntVec* words) {
  IntVec word0[chains], word1[chains], word2[chains], word3[chains];
  for (int i = 0; i < chains; ++i) {
    word0[i] =
        add_u64(broadcast_u64(first_block + static_cast<uint64_t>(i * kBlocksPerVector)), lane_blocks());
    word1[i] = high_half(word0[i]);
    word2[i] = broadcast_u64(offset);
    word3[i] = broadcast_u64(offset >> 32);
  }
  const IntVec multiplier0 = broadcast_u32(kPhiloxMultiplier0),
               multiplier1 = broadcast_u32(kPhiloxMultiplier1);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const IntVec key0 = broadcast_u32(keys.key0[round]), key1 = broadcast_u32(keys.key1[round]);
    for (int i = 0; i < chains; ++i) {
      const IntVec product0 = multiply_low_halves(word0[i], multiplier0);
      const IntVec product1 = multiply_low_halves(word2[i], multiplier1);
      word0[i] = xor3(high_half(product1), word1[i], key0);
      word1[i] = product1;
      word2[i] = xor3(high_half(product0), word3[i], key1);
      word3[i] = product0;
    }
  }
  for (int i = 0; i < chains; ++i) {
    const IntVec words01 = pair_low_halves(word0[i], word1[i]);
    const IntVec words23 = pair_low_halves(word2[i], word3[i]);
    words[2 * i] = interleave_even(words01, words23);
    words[2 * i + 1] = interleave_odd(words01, words23);
  }
}

// Keep bits of chains * kBlocksPerVector blocks from block `first_block` on.
template <int chains, bool bytes>
inline void keep_bits_of_blocks(const RoundKeys& keys, uint64_t offset, uint64_t first_block,
                                IntVec threshold, uint8_t* bits) {
  IntVec words[2 * chains];
  words_of_blocks<chains>(keys, offset, first_block, words);
  constexpr int kBitBytesPerVector = kBlocksPerVector * (bytes ? 16 : 4) / 2 / 8;
  for (int i = 0; i < 2 * chains; ++i) {
    if (bytes) {
      store_kept_bytes(bits + i * kBitBytesPerVector, words[i], threshold);
    } else {
      store_kept_words(bits + i * kBitBytesPerVector, words[i], threshold);
    }
  }
}

// How far past the last element asked for fill_keep_bits() may write, in bytes.
constexpr int kKeepBitsSlack = kMaxChains * kBlocksPerVector * 16 / 8;

template <bool bytes>
inline void fill_keep_bits_vectorised(const DropoutDraws& draws, uint64_t seed, uint64_t offset,
                                      int64_t first, int64_t count, uint8_t* bits) {
  constexpr int64_t kElementsPerBlock = bytes ? 16 : 4;
  constexpr int64_t kElementsPerVector = kElementsPerBlock * kBlocksPerVector;
  const RoundKeys keys = round_keys(seed);
  const IntVec threshold = bytes ? broadcast_u8(static_cast<uint8_t>(draws.threshold))
                                 : broadcast_u32(static_cast<uint32_t>(draws.threshold));
  const uint64_t first_block = static_cast<uint64_t>(first / kElementsPerBlock);
  int64_t done = 0;
  for (; count - done > (kMaxChains - 1) * kElementsPerVector; done += kMaxChains * kElementsPerVector) {
    keep_bits_of_blocks<kMaxChains, bytes>(keys, offset,
                                           first_block + static_cast<uint64_t>(done / kElementsPerBlock),
                                           threshold, bits + done / 8);
  }
  for (; done < count; done += kElementsPerVector) {
    keep_bits_of_blocks<1, bytes>(keys, offset, first_block + static_cast<uint64_t>(done / kElementsPerBlock),
                                  threshold, bits + done / 8);
  }
}

#else

constexpr int kKeepBitsSlack = 2;

#endif

// Sets bit i of `bits` (bit i % 8 of byte i / 8) iff element first + i is kept, for i in [0, count). `first`
// is a multiple of 16; `bits` has room for count / 8 + kKeepBitsSlack bytes. Not inlined, because it is long
// and every combination of type and activation calls it.
__attribute__((noinline)) void fill_keep_bits(const DropoutDraws& draws, uint64_t seed, uint64_t offset,
                                              int64_t first, int64_t count, uint8_t* bits) {
#if defined(__AVX512F__) || defined(__AVX2__)
  if (draws.bytes) {
    fill_keep_bits_vectorised<true>(draws, seed, offset, first, count, bits);
  } else if (draws.threshold >> 32 != 0) {  // a p that rounds to 1: no word reaches the threshold
    std::memset(bits, 0, static_cast<size_t>(ceil_div(count, 8)));
  } else {
    fill_keep_bits_vectorised<false>(draws, seed, offset, first, count, bits);
  }
#else
  const int64_t elements_per_block = draws.bytes ? 16 : 4;
  std::memset(bits, 0, static_cast<size_t>(count / 8 + kKeepBitsSlack));
  for (int64_t done = 0; done < count; done += elements_per_block) {
    const PhiloxBlock block =
        philox_block(seed, offset, static_cast<uint64_t>((first + done) / elements_per_block));
    uint32_t kept = 0;
    for (int i = 0; i < elements_per_block; ++i) {
      const uint32_t draw = draws.bytes ? (block.word[i / 4] >> (8 * (i % 4))) & 0xffu : block.word[i];
      kept |= static_cast<uint32_t>(draw >= draws.threshold) << i;
    }
    kept <<= done % 8;
    bits[done / 8] |= static_cast<uint8_t>(kept);
    if (draws.bytes) bits[done / 8 + 1] |= static_cast<uint8_t>(kept >> 8);
  }
#endif
}

// ---- pairs of 16-bit numbers ----------------------------------------------------------------------------

// How many floats past the last one asked for fill_signed_halves() may write.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int64_t kSignedHalvesSlack = kMaxChains * kBlocksPerVector * 4;
#else
constexpr int64_t kSignedHalvesSlack = 4;
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
template <int chains>
inline void store_halves_of_blocks(const RoundKeys& keys, uint64_t offset, uint64_t first_block, float* low,
                                   float* high) {
  IntVec words[2 * chains];
  words_of_blocks<chains>(keys, offset, first_block, words);
  for (int i = 0; i < 2 * chains; ++i) {
    store_halves(words[i], low + i * kBlocksPerVector * 2, high + i * kBlocksPerVector * 2);
  }
}
#endif

// Of word i of the blocks from `first_block` on, for i in [0, count): low[i] is the low half as a signed number, plus 0.5;
// high[i] the high half. So they lie symmetrically about 0, from -32767.5 to 32767.5.
inline void fill_signed_halves(uint64_t seed, uint64_t offset, uint64_t first_block, int64_t count, float* low,
                               float* high) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const RoundKeys keys = round_keys(seed);
  constexpr int64_t kWordsPerChain = kBlocksPerVector * 4;
  int64_t done = 0;
  for (; count - done > (kMaxChains - 1) * kWordsPerChain; done += kMaxChains * kWordsPerChain) {
    store_halves_of_blocks<kMaxChains>(keys, offset, first_block + static_cast<uint64_t>(done / 4), low + done,
                                       high + done);
  }
  for (; done < count; done += kWordsPerChain) {
    store_halves_of_blocks<1>(keys, offset, first_block + static_cast<uint64_t>(done / 4), low + done, high + done);
  }
#else
  for (int64_t done = 0; done < count; done += 4) {
    const PhiloxBlock block = philox_block(seed, offset, first_block + static_cast<uint64_t>(done / 4));
    for (int i = 0; i < 4; ++i) {
      low[done + i] = static_cast<float>(static_cast<int16_t>(block.word[i])) + 0.5f;
      high[done + i] = static_cast<float>(static_cast<int16_t>(block.word[i] >> 16)) + 0.5f;
    }
  }
#endif
}

// ---- bits as lane masks ---------------------------------------------------------------------------------

// The bits from `index` on, at least 25 of them; reads 4 bytes.
inline uint32_t bits_from(const uint8_t* bits, int64_t index) {
  uint32_t word;
  std::memcpy(&word, bits + index / 8, sizeof word);
  return word >> (index % 8);
}

template <class A>
inline Mask<A> mask_from_bits(uint32_t bits);

#if defined(__AVX512F__)
template <>
inline Mask<float> mask_from_bits<float>(uint32_t bits) {
  return {static_cast<__mmask16>(bits)};
}
template <>
inline Mask<double> mask_from_bits<double>(uint32_t bits) {
  return {static_cast<__mmask8>(bits)};
}
#elif defined(__AVX2__)
template <>
inline Mask<float> mask_from_bits<float>(uint32_t bits) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i selected = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(selected, lane_bit))};
}
template <>
inline Mask<double> mask_from_bits<double>(uint32_t bits) {
  const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i selected = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), lane_bit);
  return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(selected, lane_bit))};
}
#else
template <>
inline Mask<float> mask_from_bits<float>(uint32_t bits) {
  return {(bits & 1u) != 0};
}
template <>
inline Mask<double> mask_from_bits<double>(uint32_t bits) {
  return {(bits & 1u) != 0};
}
#endif

}  // namespace
}  // namespace pyconv::cpu
