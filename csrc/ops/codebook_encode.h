// Numbers to codes, on the CPU: absmax in one visit of a block, its codes in a second, in cache. Up
// to 16 entries a binary search whose thresholds are in registers; for 256 one look-up by the
// float's upper bits, a gather an element. sizeof(T) bytes read and 0.5 written an element of 4
// bits. float32; what SPEC section 1 divides in float64 is divided so. Compiled per ISA level
// (core/parallel.h).
#pragma once
#include "core/parallel.h"
#include "core/sizes.h"
#include "core/vec.h"
#include "ops/codebook.h"
#include "ops/codebook_decode.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr float kInf = __builtin_inff();

FF_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// ---- thresholds ---------------------------------------------------------------------------------

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

// ---- vectors of elements ------------------------------------------------------------------------

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

// ---- blocks -------------------------------------------------------------------------------------

// Bits as an integer order magnitudes, NaN above all.
template <class T> FF_INLINE float block_absmax(const T* x, int64_t n) {
  constexpr int N = kLanes<float>;
  VecI top[2] = {};
  const auto raise = [](VecI& t, VecF v) FF_LAMBDA {
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
      const auto word = [&](int64_t at) FF_LAMBDA {
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

}  // namespace
}  // namespace finefuse::FF_ISA_NS
