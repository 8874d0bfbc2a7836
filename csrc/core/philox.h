// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): random words
// as a function of a key and a counter, so that they do not depend on who draws them or when. A
// counter in each 32-bit lane. Compiled per ISA level (core/parallel.h).
#pragma once
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {

// Upper and lower halves of 32-bit lanes times m.
FF_INLINE void multiply(VecU a, uint32_t m, VecU* high, VecU* low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  *low = (VecU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = (VecU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, y);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  *low = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// c: the four words of each lane's counter, replaced by the four random words.
FF_INLINE void philox4x32(uint64_t seed, VecU (&c)[4]) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    VecU high0, low0, high1, low1;
    multiply(c[0], 0xd2511f53u, &high0, &low0);
    multiply(c[2], 0xcd9e8d57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ (VecU{} + key[0]);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ (VecU{} + key[1]);
    c[3] = low0;
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
}

}  // namespace finefuse::FF_ISA_NS
