// clang-format off
// Codebook quantisation on the CPU.
//
//   pass               reads + writes an element (4 bits)     bound by
//   dequantize         0.5 + sizeof(T)                        memory; in cache the stores
//   quantize           sizeof(T) + 0.5                        memory; 8 bits: one gather an element
//   codebook_linear    0.5 of the weight, for all tokens      decoding for one token, then multiply-adds
//
// Dequantise: the table of a block is scaled and rounded once (16 products), then elements are
// shuffles: vpermw or vpermps on AVX-512, pshufb on the table's byte planes on AVX2.
// Quantise: one visit for absmax, a second, in cache, for the codes; a binary search whose
// thresholds are in registers, or, for 256 entries, one look-up by the float's upper bits.
// Linear: from the packed bytes. A 32-bit word holds 8 codes, so that shifting it brings each of
// them in turn to where the permute looks; x is laid out to match. float32 accumulators, one per
// lane over all columns; a block's scale is applied to its partial sum.
//
// clang-format on
// Everything is split by elements, rows or columns, never by the number of threads. Bits promised
// by SPEC section 1 come from plain multiplications and additions: no fused multiply-add there.
#include "ops/codebook.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {
namespace {

// Outputs beyond this do not stay in any cache until they are read: write past the caches.
constexpr int64_t kStreamBytes = 16 << 20;
#define FF_LAMBDA __attribute__((always_inline))

constexpr float kInf = __builtin_inff();
constexpr float kMaxFloat = 0x1.fffffep127f;

FF_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// x in every lane; x - 0 is x, and -0 + 0 would not be.
FF_INLINE VecF all(float x) { return x - VecF{}; }

FF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- decoding -----------------------------------------------------------------------------------

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

template <class T> void dequantize_t(const Dequantize& a) {
  constexpr int64_t kSpan = 4096;
  T* out = static_cast<T*>(a.out);
  const Code16 code16(a.from.code, a.from.entries);
  const int64_t bytes = a.count * static_cast<int64_t>(sizeof(T));
  const bool stream = a.from.entries == 16 && bytes > kStreamBytes &&
                      reinterpret_cast<uintptr_t>(out) % kStreamAlign == 0 &&
                      a.from.blocksize * static_cast<int64_t>(sizeof(T)) % kStreamAlign == 0;
  advise_huge_pages(out, static_cast<size_t>(bytes));
  parallel_for((a.count + kSpan - 1) / kSpan, kSpan * (sizeof(T) + 1), a.place.threads,
               [&](int64_t first, int64_t last) {
                 const int64_t begin = first * kSpan, end = smaller(last * kSpan, a.count);
                 if (stream) {
                   decode_span<T, 4, true>(a.from, code16, begin, end, out + begin);
                   stream_fence();
                 } else {
                   decode_span(a.from, code16, begin, end, out + begin);
                 }
               });
}

void dequantize(const Dequantize& a) {
  switch (a.dtype) {
    case DType::f32: return dequantize_t<float>(a);
    case DType::bf16: return dequantize_t<bf16>(a);
    case DType::f16: return dequantize_t<f16>(a);
    case DType::f64: return;  // not offered
  }
}

// ---- quantising ---------------------------------------------------------------------------------

constexpr float kFp4Thresholds[7] = {.00260417f, .0859375f, .20833333f, .29166667f,
                                     .4166667f,  .583333f,  .8333333f};
constexpr uint8_t kFp4Codes[8] = {0, 1, 6, 7, 4, 5, 2, 3};  // in the order of their magnitudes

// 255 thresholds by the upper bits of x': a bucket holds at most one of them, in `entry` its lower
// bits below the number of thresholds that lie below the bucket. As integers, and with negative
// ones inverted, floats compare like their values.
struct Buckets {
  static constexpr int kMost = 8192;
  uint32_t entry[kMost];
  int shift;         // log2 of a bucket's width
  int32_t least;     // magnitudes below the first threshold's bucket count as this one
  int32_t first;     // the number of the bucket that `least` is in
  int32_t per_sign;  // buckets of positive elements, and the same number of negative ones
  uint32_t mask;     // the lower bits
  bool usable;

  // |x'| is at most 1 and a few units in the last place.
  bool build(const float* m, int count, int log2_width) {
    shift = log2_width;
    mask = (1u << shift) - 1;
    uint32_t smallest = 0x3f800000;
    int below_zero = 0;
    for (int i = 0; i < count; ++i) {
      const uint32_t magnitude = bits_of(m[i]) & 0x7fffffff;
      if (magnitude == 0) return false;  // would share a bucket with what is next to 0
      if (magnitude < smallest) smallest = magnitude;
      below_zero += m[i] < 0;
    }
    if (smallest >> shift == 0) return false;
    first = static_cast<int32_t>(smallest >> shift) - 1;
    least = first << shift;
    per_sign = (0x3f800000 >> shift) + 1 - first;
    if (2 * per_sign > kMost) return false;
    int next = below_zero;
    for (int j = 0; j < per_sign; ++j) {
      const uint32_t base = static_cast<uint32_t>(next);
      const uint32_t key = static_cast<uint32_t>(first + j);
      uint32_t low = mask;  // never exceeded
      if (next < count && bits_of(m[next]) >> shift == key) low = bits_of(m[next++]) & mask;
      if (next < count && bits_of(m[next]) >> shift == key) return false;
      entry[j] = base << 24 | low;
    }
    next = below_zero - 1;
    for (int j = 0; j < per_sign; ++j) {
      const uint32_t key = static_cast<uint32_t>(first + j);
      const auto bucket = [&](int i) { return (bits_of(m[i]) & 0x7fffffff) >> shift; };
      uint32_t low = mask;
      if (next >= 0 && bucket(next) == key) low = ~bits_of(m[next--]) & mask;
      if (next >= 0 && bucket(next) == key) return false;
      entry[per_sign + j] = static_cast<uint32_t>(next + 1) << 24 | low;
    }
    return true;
  }
};

// What a call quantises with; read by all threads.
struct Coder {
  CodeRule rule;
  int bits, top;    // top: the code of NaN and +inf
  int count;        // of thresholds
  float m[256];     // thresholds, then +inf
  uint8_t zero;     // the code of 0
  Buckets buckets;  // for 256 entries
#if defined(__AVX512F__)
  float second[16], third[16],
      fourth[16];  // the threshold to compare with next, by the code so far
  int32_t fp4[16];
#elif defined(__AVX2__)
  float third[8], fourth[2][8];  // as Rank16 reads them
#endif

  explicit Coder(const Quantize& a) : rule(a.rule), bits(code_bits(a.entries)) {
    count = rule == CodeRule::fp4 ? 7 : a.entries - 1;
    for (int i = 0; i < 256; ++i) m[i] = kInf;
    for (int i = 0; i < count; ++i) {
      const double middle = 0.5 * (static_cast<double>(a.code[i]) + a.code[i + 1]);
      // + 0: a threshold of -0 would lie above 0 in the order of the bits
      m[i] = rule == CodeRule::fp4 ? kFp4Thresholds[i] : static_cast<float>(middle) + 0.0f;
    }
    buckets.usable = false;
    for (int width = 17; bits == 8 && width >= 15 && !buckets.usable; --width) {
      buckets.usable = buckets.build(m, count, width);
    }
    top = rule == CodeRule::fp4 ? kFp4Codes[7] : a.entries - 1;
    zero = code_of(0.0f);
#if defined(__AVX512F__)
    for (int i = 0; i < 16; ++i) {
      second[i] = m[i < 12 ? i + 3 : 15];
      third[i] = m[i < 14 ? i + 1 : 15];
      fourth[i] = m[i];
      fp4[i] = kFp4Codes[i & 7];
    }
#elif defined(__AVX2__)
    for (int i = 0; i < 8; ++i) {
      const int k = -i & 3;
      third[i] = m[4 * k + 1];
      fourth[0][i] = m[2 * k];
      fourth[1][i] = m[8 + 2 * k];
    }
#endif
  }

  // One element, whatever it is.
  uint8_t code_of(float x) const {
    if (x != x) return static_cast<uint8_t>(top);
    const float y = rule == CodeRule::fp4 ? __builtin_fabsf(x) : x;
    int rank = 0;
    for (int step = bits == 8 ? 128 : 8; step > 0; step >>= 1) {
      rank += y > m[rank + step - 1] ? step : 0;
    }
    if (rule == CodeRule::sorted) return static_cast<uint8_t>(rank);
    return static_cast<uint8_t>(kFp4Codes[rank] + (x < 0 ? 8 : 0));
  }
};

// The codes of vectors of finite x', up to 4 bits, for pack_bytes. Thresholds in registers.
template <bool kFp4> struct Rank16 {
#if defined(__AVX512F__)
  VecF m[4];
  VecI fp4;

  explicit FF_INLINE Rank16(const Coder& c)
      : m{all(c.m[7]), load(c.second), load(c.third), load(c.fourth)} {
    __builtin_memcpy(&fp4, c.fp4, sizeof fp4);
  }
  FF_INLINE VecI operator()(VecF x) const {
    const VecF y = kFp4 ? (VecF)((VecU)x & 0x7fffffff) : x;
    VecI rank = {};
    for (int i = 0; i < 4; ++i) {
      const __m512 table =
          i == 0 ? (__m512)m[0] : _mm512_permutexvar_ps((__m512i)rank, (__m512)m[i]);
      rank = (VecI)_mm512_mask_add_epi32((__m512i)rank,
                                         _mm512_cmp_ps_mask((__m512)y, table, _CMP_GT_OQ),
                                         (__m512i)rank, _mm512_set1_epi32(8 >> i));
    }
    if constexpr (!kFp4) return rank;
    return (VecI)_mm512_permutexvar_epi32((__m512i)rank, (__m512i)fp4) - 8 * (VecI)(x < VecF{});
  }
#elif defined(__AVX2__)
  // A comparison is -1, so codes count downwards, and tables are read by the lowest two bits of a
  // negative number. In the lanes: vpermps, across them, takes Zen 3 twice the time.
  VecF first, second[2], third, fourth[2];
  __m256i fp4;

  explicit FF_INLINE Rank16(const Coder& c) : first(all(c.m[7])) {
    second[0] = all(c.m[3]), second[1] = all(c.m[11]);
    third = load(c.third), fourth[0] = load(c.fourth[0]), fourth[1] = load(c.fourth[1]);
    fp4 = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFp4Codes)));
  }
  FF_INLINE VecI operator()(VecF x) const {
    const VecF y = kFp4 ? (VecF)((VecU)x & 0x7fffffff) : x;
    const auto entry = [](VecF table, VecI at)
                           FF_LAMBDA { return _mm256_permutevar_ps((__m256)table, (__m256i)at); };
    const VecI upper = (VecI)(y > first);
    __m256 m = _mm256_blendv_ps((__m256)second[0], (__m256)second[1], (__m256)upper);
    VecI rank = upper + upper + (VecI)(y > (VecF)m);
    rank = rank + rank + (VecI)(y > (VecF)entry(third, rank));
    m = _mm256_blendv_ps(entry(fourth[0], rank), entry(fourth[1], rank), (__m256)upper);
    rank = rank + rank + (VecI)(y > (VecF)m);
    if constexpr (!kFp4) return rank;
    return (VecI)_mm256_shuffle_epi8(fp4, _mm256_abs_epi32((__m256i)rank)) -
           ((VecI)(x < VecF{}) << 3);
  }
#else
  const Coder& c;

  explicit FF_INLINE Rank16(const Coder& coder) : c(coder) {}
  FF_INLINE VecI operator()(VecF x) const {
    const VecF y = kFp4 ? (VecF)((VecU)x & 0x7fffffff) : x;
    VecI rank = {};
    for (int i = 0; i < c.count; ++i) rank -= (VecI)(y > all(c.m[i]));
    if constexpr (!kFp4) return rank;
    for (int i = 0; i < kLanes<float>; ++i) rank[i] = kFp4Codes[rank[i]];
    return rank - 8 * (VecI)(x < VecF{});
  }
#endif
};

FF_INLINE VecI rank256(const Buckets& b, VecF x) {
  const VecI bits = (VecI)x, sign = bits >> 31, magnitude = bits & 0x7fffffff;
  const VecI least = VecI{} + b.least;
  const VecI at =
      ((magnitude > least ? magnitude : least) >> b.shift) - b.first + (sign & b.per_sign);
#if defined(__AVX512F__)
  const VecU entry = (VecU)_mm512_i32gather_epi32((__m512i)at, b.entry, 4);
#elif defined(__AVX2__)
  // Eight loads by hand: vpgatherdd takes Zen 3 longer.
  const __m128i low = _mm256_castsi256_si128((__m256i)at);
  const __m128i high = _mm256_extracti128_si256((__m256i)at, 1);
  const auto two = [&](__m128i pair, int n) FF_LAMBDA {
    const uint64_t both =
        static_cast<uint64_t>(n == 0 ? _mm_cvtsi128_si64(pair) : _mm_extract_epi64(pair, 1));
    return _mm_insert_epi32(
        _mm_cvtsi32_si128(static_cast<int>(b.entry[static_cast<uint32_t>(both)])),
        static_cast<int>(b.entry[both >> 32]), 1);
  };
  const __m128i four[2] = {_mm_unpacklo_epi64(two(low, 0), two(low, 1)),
                           _mm_unpacklo_epi64(two(high, 0), two(high, 1))};
  const VecU entry = (VecU)_mm256_set_m128i(four[1], four[0]);
#else
  VecU entry;
  for (int i = 0; i < kLanes<float>; ++i) entry[i] = b.entry[at[i]];
#endif
  const VecI mask = VecI{} + static_cast<int32_t>(b.mask);
  return (VecI)(entry >> 24) - (VecI)(((bits ^ sign) & mask) > ((VecI)entry & mask));
}

// Four vectors of codes (AVX2: their negatives, too) to bytes.
constexpr int kCodes = 4 * kLanes<float>;
FF_INLINE void pack_bytes(const VecI* c, uint8_t* out) {
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtepi32_epi8((__m512i)c[i]));
  }
#elif defined(__AVX2__)
  const __m256i a = _mm256_abs_epi16(_mm256_packs_epi32((__m256i)c[0], (__m256i)c[1]));
  const __m256i b = _mm256_abs_epi16(_mm256_packs_epi32((__m256i)c[2], (__m256i)c[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
#else
  for (int i = 0; i < kCodes; ++i) {
    out[i] = static_cast<uint8_t>(c[i / kLanes<float>][i % kLanes<float>]);
  }
#endif
}

// Bits as an integer order magnitudes, NaN above all.
template <class T> FF_INLINE float block_absmax(const T* x, int64_t n) {
  constexpr int N = kLanes<float>;
  VecI top[2] = {};
  const auto raise = [](VecI& t, VecF v) __attribute__((always_inline)) {
    const VecI magnitude = (VecI)v & 0x7fffffff;
    t = magnitude > t ? magnitude : t;
  };
  int64_t i = 0;
  for (; i + 2 * N <= n; i += 2 * N) {
    raise(top[0], load(x + i));
    raise(top[1], load(x + i + N));
  }
  for (; i + N <= n; i += N) raise(top[0], load(x + i));
  if (i < n) raise(top[1], load_partial(x + i, static_cast<int>(n - i), 0.0));
  const VecI t = top[0] > top[1] ? top[0] : top[1];
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i u = _mm256_max_epi32(_mm512_castsi512_si256((__m512i)t),
                                     _mm512_extracti64x4_epi64((__m512i)t, 1));
#else
  const __m256i u = (__m256i)t;
#endif
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  int32_t bits = _mm_cvtsi128_si32(v);
#else
  int32_t bits = 0;
  for (int j = 0; j < N; ++j) bits = t[j] > bits ? t[j] : bits;
#endif
  if (bits > 0x7f800000) bits = 0x7fc00000;
  float absmax;
  __builtin_memcpy(&absmax, &bits, sizeof absmax);
  return absmax;
}

// rank(x·factor) of n elements, as bytes, and rubbish up to a multiple of kCodes.
template <class T, class Rank>
FF_INLINE void encode_vectors(const T* x, int64_t n, float factor, uint8_t* out, const Rank& rank) {
  constexpr int N = kLanes<float>;
  const VecF by = all(factor);
  for (int64_t i = 0; i < n; i += kCodes) {
    const T* at = x + i;
    T rest[kCodes];
    if (n - i < kCodes) {
      __builtin_memset(rest, 0, sizeof rest);
      __builtin_memcpy(rest, at, static_cast<size_t>(n - i) * sizeof(T));
      at = rest;
    }
    VecI code[4];
    for (int j = 0; j < 4; ++j) code[j] = rank(load(at + j * N) * by);
    pack_bytes(code, out + i);
  }
}

// The codes of n elements of one block, as encode_vectors writes them.
template <class T> void encode(const Coder& c, const T* x, int64_t n, float absmax, uint8_t* out) {
  const float reciprocal = 1.0f / absmax;
  if (!(reciprocal <= kMaxFloat && reciprocal > 0.0f)) {  // 0, denormal, inf, NaN
    if (absmax == 0.0f || absmax != absmax) {
      __builtin_memset(out, absmax == 0.0f ? c.zero : c.top, static_cast<size_t>(n));
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const double element = load_scalar(x + i);
      if (absmax == kInf)
        out[i] = __builtin_isinf(element) ? c.code_of(static_cast<float>(element)) : c.zero;
      else
        out[i] = c.code_of(static_cast<float>(element / static_cast<double>(absmax)));
    }
    return;
  }
  if (c.bits == 8) {
    if (c.buckets.usable) {
      const Buckets& b = c.buckets;
      encode_vectors(x, n, reciprocal, out, [&](VecF v) FF_LAMBDA { return rank256(b, v); });
    } else {
      encode_vectors(x, n, reciprocal, out, [&](VecF v) FF_LAMBDA {
        VecI code;
        for (int i = 0; i < kLanes<float>; ++i) code[i] = c.code_of(v[i]);
        return code;
      });
    }
  } else if (c.rule == CodeRule::fp4) {
    const Rank16<true> rank(c);
    encode_vectors(x, n, reciprocal, out, [&](VecF v) FF_LAMBDA { return rank(v); });
  } else {
    const Rank16<false> rank(c);
    encode_vectors(x, n, reciprocal, out, [&](VecF v) FF_LAMBDA { return rank(v); });
  }
}

// n codes, a byte each, to their bits; n a multiple of what fills whole bytes (3 bits: groups).
void pack_bits(const uint8_t* c, int64_t n, int bits, uint8_t* out) {
  if (bits == 8) {
    __builtin_memcpy(out, c, static_cast<size_t>(n));
  } else if (bits == 4) {
    int64_t i = 0;
#if defined(__AVX2__)
    const __m256i weights = _mm256_set1_epi16(0x0110);  // 16·even + odd
    for (; i + 64 <= n; i += 64) {
      const auto word = [&](int64_t at) __attribute__((always_inline)) {
        return _mm256_maddubs_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + at)),
                                    weights);
      };
      const __m256i packed = _mm256_packus_epi16(word(i), word(i + 32));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2),
                          _mm256_permute4x64_epi64(packed, 0xd8));
    }
#endif
    for (; i < n; i += 2) out[i / 2] = static_cast<uint8_t>(c[i] << 4 | c[i + 1]);
  } else if (bits == 2) {
    for (int64_t i = 0; i < n; i += 4) {
      out[i / 4] = static_cast<uint8_t>(c[i] << 6 | c[i + 1] << 4 | c[i + 2] << 2 | c[i + 3]);
    }
  } else {
    for (int64_t i = 0; i < n; i += 8, out += 3) {
      uint32_t word = 0;
      for (int j = 0; j < 8; ++j) word = word << 3 | c[i + j];
      out[0] = static_cast<uint8_t>(word >> 16);
      out[1] = static_cast<uint8_t>(word >> 8);
      out[2] = static_cast<uint8_t>(word);
    }
  }
}

template <class T> void quantize_t(const Quantize& a) {
  constexpr int64_t kStage = 512;   // codes between encoding and packing; a multiple of 8
  constexpr int64_t kBatch = 2048;  // elements that stay in the first-level cache
  const T* x = static_cast<const T*>(a.x);
  const Coder coder(a);
  // As many blocks as fill whole bytes are one item.
  int64_t blocks = 1;
  while (blocks * a.blocksize % 8 != 0) blocks *= 2;
  const int64_t item = blocks * a.blocksize, items = (a.count + item - 1) / item;
  // Blocks whose absmax is found before the first of them is encoded: one block after the other
  // would wait for each division.
  const int64_t batch = a.blocksize < kBatch ? kBatch / a.blocksize : 1;
  parallel_for(items, item * (sizeof(T) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) uint8_t stage[kStage + kCodes];
    int64_t staged = 0;
    uint8_t* out = a.codes + packed_bytes(first * item, a.entries);
    const int64_t stop = smaller(last * item, a.count), block_end = (stop - 1) / a.blocksize + 1;
    for (int64_t b = first * blocks; b < block_end; b += batch) {
      const int64_t batch_end = smaller(b + batch, block_end);
      for (int64_t k = b; k < batch_end; ++k) {
        const int64_t begin = k * a.blocksize;
        a.absmax[k] = block_absmax(x + begin, smaller(a.blocksize, stop - begin));
      }
      for (int64_t k = b; k < batch_end; ++k) {
        const int64_t end = smaller((k + 1) * a.blocksize, stop);
        // The next batch: the memory would stand idle meanwhile.
        const char* ahead = reinterpret_cast<const char*>(x + (k + batch) * a.blocksize);
        for (int64_t i = 0; i < a.blocksize * static_cast<int64_t>(sizeof(T)); i += 64) {
          __builtin_prefetch(ahead + i);
        }
        for (int64_t i = k * a.blocksize; i < end;) {
          const int64_t n = smaller(end - i, kStage - staged);
          encode(coder, x + i, n, a.absmax[k], stage + staged);
          staged += n;
          i += n;
          if (staged == kStage) {
            pack_bits(stage, kStage, coder.bits, out);
            out += packed_bytes(kStage, a.entries);
            staged = 0;
          }
        }
      }
    }
    const int unit = coder.bits == 3 ? 8 : 8 / coder.bits;
    while (staged % unit != 0) stage[staged++] = coder.zero;
    pack_bits(stage, staged, coder.bits, out);
  });
}

void quantize(const Quantize& a) {
  switch (a.dtype) {
    case DType::f32: return quantize_t<float>(a);
    case DType::bf16: return quantize_t<bf16>(a);
    case DType::f16: return quantize_t<f16>(a);
    case DType::f64: return;  // Python converts it
  }
}

// ---- linear -------------------------------------------------------------------------------------

constexpr int kN = kLanes<float>;
constexpr int64_t kGroup = 8 * kN;  // columns that one vector of packed 4-bit codes holds
static_assert(kCodebookPad % kGroup == 0);
constexpr int64_t kColumns = 4096;  // float32 elements of x at a time, over all tokens
constexpr int64_t kPanel = 16;      // rows that share them
#if defined(__AVX512F__)
constexpr int kMostGrouped = 8;  // tokens for which codes are decoded in registers; for more, into
constexpr int kLeastBlock = 16;  // a buffer
#else
constexpr int kMostGrouped = 2;
constexpr int kLeastBlock = 32;
#endif

// The place in a group of the element that dot_codes has in this lane of its vector e of 8.
//   AVX-512: codes are read as 16 words of 8; vector e is element e of all words.
//   AVX2: bytes of one nibble, 16 a lane, widened by unpacking: even elements, then odd ones.
constexpr int element_of(int e, int lane) {
#if defined(__AVX512F__)
  return 8 * lane + e;
#else
  return 2 * (4 * (e & 3) + (lane & 3) + 16 * (lane >> 2)) + (e >> 2);
#endif
}

// Tokens are taken eight, four, two or one at a time.
constexpr int pass_tokens(int64_t left) {
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// x as float32 for a pass of `tokens`, padded with zeros. Columns come in chunks of
// kColumns / tokens; in a chunk the tokens follow one another, since a whole row apart they would
// share the sets of the first-level cache. `grouped`: each group in the order of dot_codes.
template <class T> void widen(const T* x, int64_t columns, int tokens, bool grouped, float* out) {
  const int64_t stride = codebook_workspace(1, columns);
  for (int64_t column = 0; column < stride; column += kColumns / tokens) {
    const int64_t chunk_end = smaller(column + kColumns / tokens, stride);
    for (int t = 0; t < tokens; ++t) {
      for (int64_t g = column; g < chunk_end; g += kGroup, out += kGroup) {
        float natural[kGroup] = {};
        const int64_t n = smaller(columns - g, kGroup);
        for (int64_t i = 0; i < n; i += kN) {
          const int k = static_cast<int>(smaller(n - i, kN));
          store_partial(natural + i, load_partial(x + t * columns + g + i, k, 0.0), k);
        }
        for (int i = 0; i < kGroup; ++i) {
          out[i] = natural[grouped ? element_of(i / kN, i % kN) : i];
        }
      }
    }
  }
}

// Whether dot_codes serves: its vectors lie in one row, and each lane of a vector in one block.
bool fits_groups(const CodebookLinear& a) {
#if defined(__AVX2__)
  const int64_t size = a.weight.blocksize;
  return a.weight.entries == 16 && a.columns % kGroup == 0 &&
         (kMostGrouped == 8 || a.tokens <= kMostGrouped) && size >= kLeastBlock &&
         (size & (size - 1)) == 0;
#else
  (void)a;
  return false;
#endif
}

// sums[t] += w·x[t] over n decoded weights (a multiple of kN).
template <int kTokens>
FF_INLINE void dot_floats(const float* w, const float* x, int64_t stride, int64_t n, VecF* sums) {
  // Two multiply-adds a cycle, four cycles each: eight sums that do not wait for one another.
  constexpr int kSets = kTokens < 8 ? 8 / kTokens : 1;
  VecF sum[kSets][kTokens] = {};
  const auto add = [&](int set, int64_t i) FF_LAMBDA {
    const VecF v = load(w + i);
    for (int t = 0; t < kTokens; ++t) sum[set][t] = fma(v, load(x + t * stride + i), sum[set][t]);
  };
  int64_t i = 0;
  for (; i + kSets * kN <= n; i += kSets * kN) {
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add(set, i + set * kN);
  }
  for (; i < n; i += kN) add(0, i);
  for (int set = 0; set < kSets; ++set) {
    for (int t = 0; t < kTokens; ++t) sums[t] += sum[set][t];
  }
}

#if defined(__AVX2__)

#if defined(__AVX512F__)
// Element e of the 8 in a 32-bit word of packed codes starts at this bit.
constexpr int kCodeBit[8] = {4, 0, 12, 8, 20, 16, 28, 24};
#endif

// The same from packed codes that begin `skip` elements into the block of scales[0].
template <int kTokens>
FF_INLINE void dot_codes(const uint8_t* codes, const float* scales, int log2_block, int64_t skip,
                         const Code16& code, const float* x, int64_t stride, int64_t n,
                         VecF* sums) {
  VecI scale_at;  // the block of each lane of a vector, from that of the first
  for (int i = 0; i < kN; ++i) scale_at[i] = (element_of(0, i) & -8) >> log2_block;
#if defined(__AVX512F__)
  const __m512 table = (__m512)load(code.entry);
#else
  const Lut<float> lut = Lut<float>::make<true>(code, 1.0f);
  const __m256i low_half = _mm256_set1_epi8(15);
#endif
  VecF sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = sums[t];
  for (int64_t i = 0; i < n; i += kGroup) {
    VecU words;
    __builtin_memcpy(&words, codes + i / 2, sizeof words);
    VecF part[kTokens];
    const auto add = [&](int e, VecF w) FF_LAMBDA {
      for (int t = 0; t < kTokens; ++t) {
        const VecF v = load(x + t * stride + i + e * kN);
        part[t] = e == 0 ? w * v : fma(w, v, part[t]);
      }
    };
#if defined(__AVX512F__)
#pragma GCC unroll 8
    for (int e = 0; e < 8; ++e) {  // the permute looks at the lowest four bits
      add(e, (VecF)_mm512_permutexvar_ps((__m512i)(words >> kCodeBit[e]), table));
    }
#else
#pragma GCC unroll 2
    for (int e = 0; e < 8; e += 4) {
      const __m256i c = (__m256i)(e == 0 ? words >> 4 : words) & low_half;
      __m256i b[4];
      for (int k = 0; k < 4; ++k) b[k] = _mm256_shuffle_epi8(lut.plane[k], c);
      const __m256i w[4] = {_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpacklo_epi8(b[2], b[3]),
                            _mm256_unpackhi_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[2], b[3])};
      add(e, (VecF)_mm256_unpacklo_epi16(w[0], w[1]));
      add(e + 1, (VecF)_mm256_unpackhi_epi16(w[0], w[1]));
      add(e + 2, (VecF)_mm256_unpacklo_epi16(w[2], w[3]));
      add(e + 3, (VecF)_mm256_unpackhi_epi16(w[2], w[3]));
    }
#endif
    const float* first = scales + ((skip + i) >> log2_block);
#if defined(__AVX512F__)
    const VecF scale = (VecF)_mm512_permutexvar_ps((__m512i)scale_at, (__m512)load(first));
#else
    const VecF scale = (VecF)_mm256_permutevar8x32_ps((__m256)load(first), (__m256i)scale_at);
#endif
    for (int t = 0; t < kTokens; ++t) sum[t] = fma(part[t], scale, sum[t]);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = sum[t];
}

#endif

// The same from the decoded weights [at, at + n).
template <int kTokens>
void dot_decoded(const CodebookLinear& a, const Code16& code16, bool grouped, int64_t at,
                 const float* x, int64_t stride, int64_t n, VecF* sums) {
  alignas(64) float w[kColumns];
  decode_span(a.weight, code16, at, at + n, w);
  int64_t padded = n;
  while (padded % kN != 0) w[padded++] = 0.0f;
  if (grouped) {
    for (int64_t g = 0; g < n; g += kGroup) {
      float natural[kGroup];
      __builtin_memcpy(natural, w + g, sizeof natural);
      for (int i = 0; i < kGroup; ++i) w[g + i] = natural[element_of(i / kN, i % kN)];
    }
  }
  dot_floats<kTokens>(w, x, stride, padded, sums);
}

// Rows [begin, end) of the weight for a pass of kTokens tokens from `token` on.
template <class T, int kTokens>
void linear_rows(const CodebookLinear& a, bool grouped, int64_t token, int64_t begin, int64_t end) {
  const int64_t columns = codebook_workspace(1, a.columns);  // as widen padded them
  const Code16 code16(a.weight.code, a.weight.entries);
  const int64_t chunk = kColumns / kTokens;
  const bool from_codes = grouped && kTokens <= kMostGrouped;
  const auto x_at = [&](int64_t column)
                        FF_LAMBDA { return a.workspace + token * columns + column * kTokens; };
  const auto stride_at = [&](int64_t column) FF_LAMBDA { return smaller(chunk, columns - column); };
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t rows = smaller(kPanel, end - panel);
    VecF sums[kPanel][kTokens] = {};
    for (int64_t column = 0; column < a.columns; column += chunk) {
      const int64_t n = smaller(chunk, a.columns - column);
      const float* x = x_at(column);
      const int64_t stride = stride_at(column);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (panel + r) * a.columns + column;
#if defined(__AVX2__)
        if (from_codes) {
          const int log2_block = 63 - __builtin_clzll(static_cast<uint64_t>(a.weight.blocksize));
          float scales[kScaleBatch + kN];  // a vector is read from any of them on
          const int64_t first = at >> log2_block, count = ((at + n - 1) >> log2_block) - first + 1;
          if (a.weight.absmax.values != nullptr)
            __builtin_memcpy(scales, a.weight.absmax.values + first,
                             static_cast<size_t>(count) * sizeof(float));
          else
            decode_scales(a.weight.absmax, first, count, scales);
          store(scales + count, VecF{});
          dot_codes<kTokens <= kMostGrouped ? kTokens : 1>(
              a.weight.codes + at / 2, scales, log2_block, at & (a.weight.blocksize - 1), code16, x,
              stride, n, sums[r]);
          continue;
        }
#endif
        dot_decoded<kTokens>(a, code16, grouped, at, x, stride, n, sums[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      // Sums that are not scaled yet may overflow where the product does not; and an infinite
      // absmax makes NaN of a code of 0, which its block's partial sum hides.
      bool finite = true;
      for (int t = 0; t < kTokens; ++t) {
        finite &= __builtin_fabs(static_cast<double>(horizontal_sum(sums[r][t]))) <= kMaxFloat;
      }
      if (from_codes && !finite) {
        for (int t = 0; t < kTokens; ++t) sums[r][t] = VecF{};
        for (int64_t column = 0; column < a.columns; column += chunk) {
          dot_decoded<kTokens>(a, code16, grouped, (panel + r) * a.columns + column, x_at(column),
                               stride_at(column), smaller(chunk, a.columns - column), sums[r]);
        }
      }
      const double b = bias == nullptr ? 0.0 : load_scalar(bias + panel + r);
      for (int t = 0; t < kTokens; ++t) {
        store_scalar(y + (token + t) * a.rows + panel + r, horizontal_sum(sums[r][t]) + b);
      }
    }
  }
}

template <class T> void linear_t(const CodebookLinear& a) {
  const int64_t columns = codebook_workspace(1, a.columns);
  const bool grouped = fits_groups(a);
  for (int64_t t = 0; t < a.tokens; t += pass_tokens(a.tokens - t)) {
    widen(static_cast<const T*>(a.x) + t * a.columns, a.columns, pass_tokens(a.tokens - t), grouped,
          a.workspace + t * columns);
  }
  parallel_for(a.rows, a.columns * (a.tokens + 1) / 2, a.place.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = 0; t < a.tokens; t += pass_tokens(a.tokens - t)) {
                   switch (pass_tokens(a.tokens - t)) {
                     case 8: linear_rows<T, 8>(a, grouped, t, begin, end); break;
                     case 4: linear_rows<T, 4>(a, grouped, t, begin, end); break;
                     case 2: linear_rows<T, 2>(a, grouped, t, begin, end); break;
                     default: linear_rows<T, 1>(a, grouped, t, begin, end);
                   }
                 }
               });
}

// dx = dy·W by spans of columns, each summed over the rows in order, kBlockRows at a time: one
// chain over thousands of rows would lose a digit.
template <class T> void linear_transposed_t(const CodebookLinear& a) {
  constexpr int64_t kSpan = 512, kRows = 4, kBlockRows = 128;
  const Code16 code16(a.weight.code, a.weight.entries);
  const T* dy = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.y);
  parallel_for((a.columns + kSpan - 1) / kSpan, a.rows * kSpan, a.place.threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t span = first; span < last; ++span) {
                   const int64_t column = span * kSpan, n = smaller(kSpan, a.columns - column);
                   const int64_t padded = (n + kN - 1) / kN * kN;
                   float* totals = a.workspace + column * a.tokens;  // (tokens, padded)
                   float* sums = totals + codebook_workspace(a.tokens, a.columns);
                   const auto size = static_cast<size_t>(a.tokens * padded) * sizeof *sums;
                   const auto add = [&] {
                     for (int64_t i = 0; i < a.tokens * padded; i += kN) {
                       store(totals + i, load(totals + i) + load(sums + i));
                     }
                   };
                   __builtin_memset(totals, 0, size);
                   __builtin_memset(sums, 0, size);
                   for (int64_t r = 0; r < a.rows; r += kRows) {
                     if (r > 0 && r % kBlockRows == 0) {
                       add();
                       __builtin_memset(sums, 0, size);
                     }
                     const int64_t rows = smaller(kRows, a.rows - r);
                     alignas(64) float w[kRows][kSpan];
                     if (rows < kRows || n < padded) __builtin_memset(w, 0, sizeof w);
                     for (int64_t j = 0; j < rows; ++j) {
                       const int64_t at = (r + j) * a.columns + column;
                       decode_span(a.weight, code16, at, at + n, w[j]);
                     }
                     for (int64_t t = 0; t < a.tokens; ++t) {
                       VecF g[kRows];
                       for (int64_t j = 0; j < kRows; ++j) {
                         g[j] = splat<VecF>(j < rows ? load_scalar(dy + t * a.rows + r + j) : 0.0);
                       }
                       for (int64_t i = 0; i < padded; i += kN) {
                         VecF sum = load(sums + t * padded + i);
                         for (int64_t j = 0; j < kRows; ++j) sum = fma(g[j], load(w[j] + i), sum);
                         store(sums + t * padded + i, sum);
                       }
                     }
                   }
                   add();
                   for (int64_t t = 0; t < a.tokens; ++t) {
                     for (int64_t i = 0; i < n; i += kN) {
                       store_partial(dx + t * a.columns + column + i, load(totals + t * padded + i),
                                     static_cast<int>(smaller(kN, n - i)));
                     }
                   }
                 }
               });
}

template <class T> void codebook_linear_t(const CodebookLinear& a) {
  if (a.transposed)
    linear_transposed_t<T>(a);
  else
    linear_t<T>(a);
}

void codebook_linear(const CodebookLinear& a) {
  switch (a.dtype) {
    case DType::f32: return codebook_linear_t<float>(a);
    case DType::bf16: return codebook_linear_t<bf16>(a);
    case DType::f16: return codebook_linear_t<f16>(a);
    case DType::f64: return;  // not offered
  }
}

}  // namespace

const CodebookKernels& codebook_kernels() {
  static constexpr CodebookKernels kernels{quantize, dequantize, codebook_linear};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
