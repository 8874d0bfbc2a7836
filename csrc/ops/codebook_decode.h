// Packed codes to numbers, on the CPU: a block's table is scaled and rounded once (16 products),
// then elements are shuffles: vpermw or vpermps on AVX-512, pshufb on the table's byte planes on
// AVX2; for 256 entries a gather. 0.5 byte read and sizeof(T) written an element of 4 bits; in
// cache the stores bound it. Products are float32, each rounded once. Compiled per ISA level
// (core/parallel.h).
#pragma once
#include "core/parallel.h"
#include "core/sizes.h"
#include "core/vec.h"
#include "ops/codebook.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr float kMaxFloat = 0x1.fffffep127f;

// x in every lane; x - 0 is x, and -0 + 0 would not be.
FF_INLINE VecF all(float x) { return x - VecF{}; }

// ---- absmax -------------------------------------------------------------------------------------

constexpr int kScaleBatch = 256;  // blocks whose absmax is decoded at a time

void decode_scales(const BlockScales& s, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t nested = (first + i) / s.blocksize;
    const int64_t stop = smaller(count, (nested + 1) * s.blocksize - first);
    const float absmax = s.absmax[nested];
    for (; i < stop; ++i) out[i] = s.code[s.codes[first + i]] * absmax + s.offset;
  }
}

// The absmax of blocks [first, first + count), count <= kScaleBatch.
FF_INLINE const float* scales_of(const BlockScales& s, int64_t first, int64_t count,
                                 float* buffer) {
  if (s.values != nullptr) return s.values + first;
  decode_scales(s, first, count, buffer);
  return buffer;
}

template <int kBits> FF_INLINE int code_at(const uint8_t* codes, int64_t i) {
  if constexpr (kBits == 8) return codes[i];
  if constexpr (kBits == 4) return codes[i >> 1] >> (i & 1 ? 0 : 4) & 15;
  if constexpr (kBits == 2) return codes[i >> 2] >> (6 - 2 * (i & 3)) & 3;
  const uint8_t* p = codes + (i >> 3) * 3;
  return (p[0] << 16 | p[1] << 8 | p[2]) >> (21 - 3 * (i & 7)) & 7;
}

// ---- tables of up to 16 entries -----------------------------------------------------------------

// Up to 16 entries, scaled and rounded to T, to be looked up one by one.
template <class T> struct Table {
  T entry[16];
  Table(const float* code16, float scale) {
    for (int i = 0; i < 16; i += kLanes<float>) {
      store(entry + i, load(code16 + i) * all(scale));
    }
  }
};

// A codebook of up to 16 entries as the shuffles want it; made once for a span of elements.
struct Code16 {
  float entry[16];
#if defined(__AVX512BF16__)
  float
      smallest;  // the least absmax for which no product is denormal: vcvtne2ps2bf16 flushes those
#elif defined(__AVX2__) && !defined(__AVX512F__)
  float low[8], high[8];  // entries 0-3, 8-11 and 4-7, 12-15: a lane each half
#endif
  Code16(const float* code, int entries) {
    if (entries > 16) entries = 0;  // looked up in memory
    for (int i = 0; i < 16; ++i) entry[i] = i < entries ? code[i] : 0.0f;
#if defined(__AVX512BF16__)
    float least = kMaxFloat;
    for (int i = 0; i < entries; ++i) {
      const float magnitude = __builtin_fabsf(code[i]);
      if (magnitude > 0 && magnitude < least) least = magnitude;
    }
    smallest = 0x1.00001p-126f / least;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    for (int i = 0; i < 4; ++i) {
      low[i] = entry[i], low[4 + i] = entry[8 + i];
      high[i] = entry[4 + i], high[4 + i] = entry[12 + i];
    }
#endif
  }
};

#if defined(__AVX512F__)

// The table as words for vpermw, twice over so that the fifth bit of an index does not matter, or
// as floats for vpermps.
template <class T> struct Lut {
  static constexpr int kStep = 64 / sizeof(T);  // codes a look-up
  __m512i words;

  // kPlain: `plain` holds for the scale.
  template <bool kPlain> static FF_INLINE Lut make(const Code16& code, float scale) {
    const VecF v = load(code.entry) * all(scale);
    if constexpr (sizeof(T) == 4) return {(__m512i)v};
#if defined(__AVX512BF16__)
    if constexpr (kPlain && __is_same(T, bf16)) {
      return {(__m512i)_mm512_cvtne2ps_pbh((__m512)v, (__m512)v)};
    }
#endif
    const VecH half = !__is_same(T, bf16) ? to_f16_bits(v)
                      : kPlain            ? __builtin_convertvector(round_to_bf16(v) >> 16, VecH)
                                          : to_bf16_bits(v);
    return {_mm512_broadcast_i64x4((__m256i)half)};
  }

  // kStep codes from kStep/2 bytes: each byte to the start of a wider field, then a rotation that
  // puts its upper and its lower half where an index belongs.
  FF_INLINE __m512i look_up(__m128i bytes) const {
    if constexpr (sizeof(T) == 4) {
      const __m512i halves = _mm512_set1_epi64(0x0000000000000004);
      const __m512i index = _mm512_multishift_epi64_epi8(halves, _mm512_cvtepu8_epi64(bytes));
      return _mm512_permutexvar_epi32(index, words);
    } else {
      const __m512i halves = _mm512_set1_epi64(0x0020002400000004);
      const __m512i index = _mm512_multishift_epi64_epi8(halves, _mm512_cvtepu8_epi32(bytes));
      return _mm512_permutexvar_epi16(index, words);
    }
  }

  // 64 codes from 32 bytes.
  template <bool kStream> FF_INLINE void look_up(const uint8_t* p, T* out) const {
    for (int i = 0; i < 64; i += kStep) {
      const __m128i* at = reinterpret_cast<const __m128i*>(p + i / 2);
      const __m128i bytes = kStep == 32 ? _mm_loadu_si128(at) : _mm_loadl_epi64(at);
      store_bytes<kStream>(out + i, (VecU)look_up(bytes));
    }
  }

  // n < 64 of them.
  FF_INLINE void look_up_some(const uint8_t* p, int64_t n, T* out) const {
    for (; n > 0; n -= kStep, p += kStep / 2, out += kStep) {
      const int k = static_cast<int>(smaller(n, kStep));
      const auto some = static_cast<__mmask16>((1u << ((k + 1) / 2)) - 1);
      const __m512i v = look_up(_mm_maskz_loadu_epi8(some, p));
      const auto mask = static_cast<__mmask32>((uint64_t{1} << k) - 1);
      if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_epi32(out, static_cast<__mmask16>(mask), v);
      else
        _mm512_mask_storeu_epi16(out, mask, v);
    }
  }
};

#elif defined(__AVX2__)

// The table's bytes of one significance in one register (both lanes), for pshufb.
template <class T> struct Lut {
  __m256i plane[sizeof(T)];

  template <bool kPlain> static FF_INLINE Lut make(const Code16& code, float scale) {
    Lut lut;
    const VecF factor = all(scale);
    const VecF v[2] = {load(code.low) * factor, load(code.high) * factor};
    __m256i bytes[2];  // in each lane the four bytes 0 of four entries, the four bytes 1, ...
    const __m256i transpose =
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                         13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < 2; ++i) {
      if constexpr (__is_same(T, bf16)) {
        bytes[i] = (__m256i)(kPlain ? round_to_bf16(v[i])
                                    : __builtin_convertvector(to_bf16_bits(v[i]), VecU) << 16);
      } else if constexpr (__is_same(T, f16)) {
        bytes[i] = _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)to_f16_bits(v[i])), 16);
      } else {
        bytes[i] = (__m256i)v[i];
      }
      bytes[i] = _mm256_shuffle_epi8(bytes[i], transpose);
    }
    const __m256i upper = _mm256_unpackhi_epi32(bytes[0], bytes[1]);
    lut.plane[sizeof(T) - 2] = _mm256_permute4x64_epi64(upper, 0x88);
    lut.plane[sizeof(T) - 1] = _mm256_permute4x64_epi64(upper, 0xdd);
    if constexpr (sizeof(T) == 4) {
      const __m256i lower = _mm256_unpacklo_epi32(bytes[0], bytes[1]);
      lut.plane[0] = _mm256_permute4x64_epi64(lower, 0x88);
      lut.plane[1] = _mm256_permute4x64_epi64(lower, 0xdd);
    }
    return lut;
  }

  // 64 codes from 32 bytes.
  template <bool kStream> FF_INLINE void look_up(const uint8_t* p, T* out) const {
    const __m256i low_half = _mm256_set1_epi8(15);
    if constexpr (sizeof(T) == 4) {
      // In each lane the bytes of which its four-element halves of the outputs are made.
      const __m256i pick = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                            2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
      for (int i = 0; i < 2; ++i, p += 16, out += 32) {
        const __m256i bytes = _mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            pick);
        const __m256i c =
            _mm256_unpacklo_epi8(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half),
                                 _mm256_and_si256(bytes, low_half));
        __m256i b[4];
        for (int j = 0; j < 4; ++j) b[j] = _mm256_shuffle_epi8(plane[j], c);
        const __m256i w[4] = {_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpacklo_epi8(b[2], b[3]),
                              _mm256_unpackhi_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[2], b[3])};
        store_bytes<kStream>(out, (VecU)_mm256_unpacklo_epi16(w[0], w[1]));
        store_bytes<kStream>(out + 8, (VecU)_mm256_unpackhi_epi16(w[0], w[1]));
        store_bytes<kStream>(out + 16, (VecU)_mm256_unpacklo_epi16(w[2], w[3]));
        store_bytes<kStream>(out + 24, (VecU)_mm256_unpackhi_epi16(w[2], w[3]));
      }
    } else {
      const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), order);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
      const __m256i low = _mm256_and_si256(bytes, low_half);
      const __m256i c[2] = {_mm256_unpacklo_epi8(high, low), _mm256_unpackhi_epi8(high, low)};
      for (int i = 0; i < 2; ++i, out += 32) {
        const __m256i b[2] = {_mm256_shuffle_epi8(plane[0], c[i]),
                              _mm256_shuffle_epi8(plane[1], c[i])};
        store_bytes<kStream>(out, (VecU)_mm256_unpacklo_epi8(b[0], b[1]));
        store_bytes<kStream>(out + 16, (VecU)_mm256_unpackhi_epi8(b[0], b[1]));
      }
    }
  }

  // n < 64 of them.
  FF_INLINE void look_up_some(const uint8_t* p, int64_t n, T* out) const {
    uint8_t bytes[32];
    T elements[64];
    __builtin_memcpy(bytes, p, static_cast<size_t>((n + 1) / 2));
    look_up<false>(bytes, elements);
    __builtin_memcpy(out, elements, static_cast<size_t>(n) * sizeof(T));
  }
};

#else

template <class T> struct Lut {
  Table<T> table;

  template <bool kPlain> static FF_INLINE Lut make(const Code16& code, float scale) {
    return {Table<T>(code.entry, scale)};
  }

  FF_INLINE void look_up_some(const uint8_t* p, int64_t n, T* out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = table.entry[code_at<4>(p, i)];
  }
  template <bool kStream> FF_INLINE void look_up(const uint8_t* p, T* out) const {
    for (int i = 0; i < 32; ++i) {
      out[2 * i] = table.entry[p[i] >> 4];
      out[2 * i + 1] = table.entry[p[i] & 15];
    }
  }
};

#endif

FF_INLINE VecF look_up256(const float* code, const uint8_t* codes) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return (VecF)_mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), code, 4);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return (VecF)_mm256_i32gather_ps(code, _mm256_cvtepu8_epi32(bytes), 4);
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = code[codes[i]];
  return v;
#endif
}

// ---- elements -----------------------------------------------------------------------------------

// Elements [begin, end), all in one block.
template <class T, int kBits, bool kStream>
FF_INLINE void decode_block(const uint8_t* codes, const float* code, const Code16& code16,
                            int64_t begin, int64_t end, float scale, T* out) {
  if constexpr (kBits == 8) {
    constexpr int N = kLanes<float>;
    const VecF factor = all(scale);
    int64_t i = begin;
    for (; i + N <= end; i += N, out += N) store(out, look_up256(code, codes + i) * factor);
    if (i < end) {
      const int n = static_cast<int>(end - i);
      uint8_t bytes[N] = {};
      __builtin_memcpy(bytes, codes + i, static_cast<size_t>(n));
      store_partial(out, look_up256(code, bytes) * factor, n);
    }
  } else if constexpr (kBits == 4) {
    if (begin & 1) {
      *out++ = Table<T>(code16.entry, scale).entry[codes[begin >> 1] & 15];
      ++begin;
    }
    const Lut<T> lut = Lut<T>::template make<false>(code16, scale);
    for (; begin + 64 <= end; begin += 64, out += 64) {
      lut.template look_up<kStream>(codes + (begin >> 1), out);
    }
    if (begin < end) lut.look_up_some(codes + (begin >> 1), end - begin, out);
  } else {
    const Table<T> table(code16.entry, scale);
    for (int64_t i = begin; i < end; ++i) *out++ = table.entry[code_at<kBits>(codes, i)];
  }
}

// Whole 4-bit blocks of `size` elements, a multiple of 64.
template <class T, bool kStream, bool kPlain>
FF_INLINE void decode_blocks(const uint8_t* p, const float* scales, int64_t count, int64_t size,
                             const Code16& code, T* out) {
  const Code16 local = code;  // stores to `out` leave it alone
  for (int64_t b = 0; b < count; ++b) {
    const Lut<T> lut = Lut<T>::template make<kPlain>(local, scales[b]);
    for (int64_t i = 0; i < size; i += 64, p += 32, out += 64) {
      lut.template look_up<kStream>(p, out);
    }
  }
}

// No product of these scales is NaN, nor, where the instructions flush them, denormal.
FF_INLINE bool plain(const Code16& code, const float* scales, int64_t count) {
#if defined(__AVX512BF16__)
  const float least = code.smallest;
#else
  const float least = -kMaxFloat;
  (void)code;
#endif
  bool ok = true;
  for (int64_t b = 0; b < count; ++b) ok &= scales[b] >= least && scales[b] <= kMaxFloat;
  return ok;
}

// Elements [begin, end) of the flattened array. kStream: `out` and every block's share of it are
// multiples of kStreamAlign.
template <class T, int kBits, bool kStream>
void decode_span(const CodebookArray& a, const Code16& code16, int64_t begin, int64_t end, T* out) {
  float buffer[kScaleBatch];
  for (int64_t i = begin; i < end;) {
    const int64_t first = i / a.blocksize;
    const int64_t count = smaller((end - 1) / a.blocksize - first + 1, kScaleBatch);
    const float* scales = scales_of(a.absmax, first, count, buffer);
    int64_t b = 0;
    if (kBits == 4 && a.blocksize % 64 == 0 && i % a.blocksize == 0) {
      const int64_t whole = smaller(count, (end - i) / a.blocksize);
      const uint8_t* p = a.codes + i / 2;
      T* o = out + (i - begin);
      if (!plain(code16, scales, whole))
        decode_blocks<T, kStream, false>(p, scales, whole, a.blocksize, code16, o);
      else if (a.blocksize == 64)
        decode_blocks<T, kStream, true>(p, scales, whole, 64, code16, o);
      else
        decode_blocks<T, kStream, true>(p, scales, whole, a.blocksize, code16, o);
      i += whole * a.blocksize;
      b = whole;
    }
    for (; b < count; ++b) {
      const int64_t stop = smaller((first + b + 1) * a.blocksize, end);
      decode_block<T, kBits, kStream>(a.codes, a.code, code16, i, stop, scales[b],
                                      out + (i - begin));
      i = stop;
    }
  }
}

template <class T>
void decode_span(const CodebookArray& a, const Code16& code16, int64_t begin, int64_t end, T* out) {
  switch (code_bits(a.entries)) {
    case 2: return decode_span<T, 2, false>(a, code16, begin, end, out);
    case 3: return decode_span<T, 3, false>(a, code16, begin, end, out);
    case 4: return decode_span<T, 4, false>(a, code16, begin, end, out);
    case 8: return decode_span<T, 8, false>(a, code16, begin, end, out);
  }
}

}  // namespace
}  // namespace finefuse::FF_ISA_NS
