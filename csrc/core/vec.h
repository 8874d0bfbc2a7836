// One vector of float and one of double per ISA level, with loads and stores of the four element
// types. Arithmetic, comparisons and selects are the compiler's vector extensions; only what those
// cannot say (fused multiply-add, maximum, half conversions, streaming stores) is an intrinsic.
//
// clang-format off
//   level        bytes   fused multiply-add                  f16 conversion   bf16 store
//   baseline     16      fmla on Arm; on x86 two roundings   by bits          by bits (to nearest even)
//   avx2         32      vfmadd                              vcvtph2ps        by bits
//   avx512       64      vfmadd                              vcvtph2ps        by bits
//   avx512bf16   64      vfmadd                              vcvtph2ps        by bits
// clang-format on
#pragma once
#include <cstdint>

#include "core/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define FF_INLINE inline __attribute__((always_inline))
#define FF_LAMBDA __attribute__((always_inline))  // after the parameters of one

namespace finefuse::FF_ISA_NS {

#if defined(__AVX512F__)
#define FF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FF_VECTOR_BYTES 32
#else
#define FF_VECTOR_BYTES 16
#endif

typedef float VecF __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(FF_VECTOR_BYTES / 2)));

template <class A> struct Simd;
template <> struct Simd<float> {
  using V = VecF;
};
template <> struct Simd<double> {
  using V = VecD;
};
template <class T> using Vec = typename Simd<Accumulator<T>>::V;
template <class T> inline constexpr int kLanes = FF_VECTOR_BYTES / sizeof(Accumulator<T>);

template <class V> FF_INLINE V splat(double x) {
  V v;
  using S = __typeof__(v[0] + v[0]);
  return V{} + static_cast<S>(x);
}

// ---- what the extensions cannot say ----

#if defined(__AVX512F__)
FF_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FF_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
FF_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FF_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
FF_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FF_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
FF_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
FF_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#endif

// max(a, b), and b where either is NaN: max(limit, x) keeps a NaN of x, max(x, running) drops it.
#if defined(__AVX512F__)
FF_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
FF_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
FF_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
FF_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
FF_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm_max_ps((__m128)a, (__m128)b); }
FF_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
FF_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
FF_INLINE VecD max(VecD a, VecD b) { return a > b ? a : b; }
#endif

// ---- loads (any alignment) ----

FF_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FF_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FF_INLINE VecF load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
FF_INLINE VecF load(const f16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  const VecU w = __builtin_convertvector(h, VecU);
  const VecU magnitude = (w & 0x7fff) << 13;
  VecU bits = (VecU)((VecF)magnitude * 0x1p112f);              // rebias; exact for denormals too
  bits |= (VecU)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // inf and NaN
  return (VecF)(bits | ((w & 0x8000) << 16));
#endif
}

// As many bytes as there are doubles in a vector, each in a lane of its own.
FF_INLINE VecL load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VecL)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return (VecL)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
#else
  VecL v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = p[i];
  return v;
#endif
}

// ---- stores, rounding to nearest even ----

// The upper 16 bits of each lane hold the rounded value; what is below them is rubbish. Not for
// NaN.
FF_INLINE VecU round_to_bf16(VecF v) {
  const VecU bits = (VecU)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

FF_INLINE VecH to_bf16_bits(VecF v) {
  const VecU nan = ((VecU)v >> 16) | 0x40;
  return __builtin_convertvector((VecU)(v != v) ? nan : round_to_bf16(v) >> 16, VecH);
}

FF_INLINE uint16_t to_f16_bits_scalar(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) {  // 65536 and above, inf, NaN
    return static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  }
  if (magnitude < 0x38800000) {  // below 2^-14: let the adder round at the denormal's last place
    float a;
    __builtin_memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t r;
    __builtin_memcpy(&r, &a, 4);
    return static_cast<uint16_t>(sign | (r - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

FF_INLINE VecH to_f16_bits(VecF v) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  VecH h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = to_f16_bits_scalar(v[i]);
  return h;
#endif
}

FF_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
FF_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }
FF_INLINE void store(bf16* p, VecF v) {
  const VecH h = to_bf16_bits(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FF_INLINE void store(f16* p, VecF v) {
  const VecH h = to_f16_bits(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// ---- pairs of vectors, for element-wise passes ----
//
// load_pair and store_pair agree on which of 2·lanes consecutive elements goes where, and that is
// all: bf16 puts the even elements in one vector and the odd ones in the other, two instructions
// for both instead of four. store_pair_finite expects no NaN. With kStream the store goes past the
// caches, without reading the line; p must be aligned to kStreamAlign.

inline constexpr int kStreamAlign = FF_VECTOR_BYTES;
// Outputs beyond this do not stay in any cache until they are read: write past the caches.
inline constexpr int64_t kStreamBytes = 16 << 20;

template <bool kStream> FF_INLINE void store_bytes(void* p, VecU v) {
#if defined(__AVX512F__)
  if constexpr (kStream) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (kStream) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}
FF_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T> FF_INLINE void load_pair(const T* p, Vec<T>* x) {
  if constexpr (__is_same(T, bf16)) {
    VecU w;
    __builtin_memcpy(&w, p, sizeof w);
    x[0] = (VecF)(w << 16);
    x[1] = (VecF)(w & 0xffff0000u);
  } else {
    x[0] = load(p);
    x[1] = load(p + kLanes<T>);
  }
}

template <bool kStream, class T> FF_INLINE void store_pair_finite(T* p, const Vec<T>* x) {
  if constexpr (__is_same(T, bf16)) {
    store_bytes<kStream>(p, (round_to_bf16(x[0]) >> 16) | (round_to_bf16(x[1]) & 0xffff0000u));
  } else if constexpr (__is_same(T, f16)) {
    const VecH h[2] = {to_f16_bits(x[0]), to_f16_bits(x[1])};
    VecU w;
    __builtin_memcpy(&w, h, sizeof w);
    store_bytes<kStream>(p, w);
  } else {
    store_bytes<kStream>(p, (VecU)x[0]);
    store_bytes<kStream>(p + kLanes<T>, (VecU)x[1]);
  }
}

// ---- partial vectors and single elements ----

// k < lanes elements from p, `fill` in the other lanes.
template <class T> FF_INLINE Vec<T> load_partial(const T* p, int k, double fill) {
  T buffer[kLanes<T>] = {};
  __builtin_memcpy(buffer, p, k * sizeof(T));
  Vec<T> v = load(buffer);
  for (int i = k; i < kLanes<T>; ++i) v[i] = static_cast<Accumulator<T>>(fill);
  return v;
}

template <class T> FF_INLINE void store_partial(T* p, Vec<T> v, int k) {
  T buffer[kLanes<T>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, k * sizeof(T));
}

FF_INLINE double load_scalar(const float* p) { return *p; }
FF_INLINE double load_scalar(const double* p) { return *p; }
template <class T> FF_INLINE double load_scalar(const T* p) { return load_partial(p, 1, 0.0)[0]; }
template <class T> FF_INLINE void store_scalar(T* p, double x) {
  store_partial(p, splat<Vec<T>>(x), 1);
}

// ---- reductions (lanes in a fixed order) ----

template <class V> FF_INLINE double horizontal_sum(V v) {
  double s = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) s += v[i];
  return s;
}
template <class V> FF_INLINE double horizontal_max(V v) {
  double m = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// ---- exponential ----
//
// 2^(x·c) for x·c <= 120, where c = log2(e)/T. With a table of 2^(j/8) in one register (2^(j/16) in
// 64 bytes) x·c = n + j/8 + f/8, |f| <= 1/2: a short polynomial in f, the table entry by a permute,
// 2^n by exponent bits. Without a register permute (baseline): n + f and a longer polynomial. Value
// at x = 0 exactly 1. `floor` is the x at which n = -127: there and below the result is exactly 0
// and x counts as `floor`, so that 0·x stays 0 for x = -inf. NaN stays NaN. On return x is clamped.
//
//   precision                       relative error: largest, RMS   (table 8; table 16; none)
//   full: float32, all statistics   1.6e-7, 4.3e-8;   1.6e-7, 4.4e-8;   7.9e-8, 2.7e-8
//   half: 16-bit gradients          3.6e-6, 2.3e-6;   5.6e-7, 3.0e-7;   2.9e-6, 1.8e-6
//   exact: full without the rounding of c, 3e-8·|x·c| more; entropies of peaked rows need it
// (baseline on x86 has no fused multiply-add and rounds x·c: up to 4.1e-6 at |x·c| = 120, 1e-7 near
// 0)
enum class Precision { half, full, exact };

template <Precision kPrecision, int K>
FF_INLINE void exp_scaled(VecF (&x)[K], VecF (&e)[K], double scale, VecF floor) {
  const VecF magic = splat<VecF>(0x1.8p23);
#if defined(__AVX2__)
#if defined(__AVX512F__)
  constexpr int kBits = 4;
  constexpr float kFull[] = {0x1.62e430p-5f, 0x1.ebfff4p-11f, 0x1.c6ac6ap-17f};
  constexpr float kHalf[] = {0x1.62e980p-5f, 0x1.ebfbd6p-11f};
  const VecF table = {0x1p+0,        0x1.0b5586p+0, 0x1.172b84p+0, 0x1.2387a6p+0,
                      0x1.306fe0p+0, 0x1.3dea64p+0, 0x1.4bfdaep+0, 0x1.5ab07ep+0,
                      0x1.6a09e6p+0, 0x1.7a1148p+0, 0x1.8ace54p+0, 0x1.9c4918p+0,
                      0x1.ae89fap+0, 0x1.c199bep+0, 0x1.d5818ep+0, 0x1.ea4afap+0};
#else
  constexpr int kBits = 3;
  constexpr float kFull[] = {0x1.62e432p-4f, 0x1.ec0c32p-9f, 0x1.c6a004p-14f};
  constexpr float kHalf[] = {0x1.62f962p-4f, 0x1.ebfb8cp-9f};
  const VecF table = {0x1p+0,        0x1.172b84p+0, 0x1.306fe0p+0, 0x1.4bfdaep+0,
                      0x1.6a09e6p+0, 0x1.8ace54p+0, 0x1.ae89fap+0, 0x1.d5818ep+0};
#endif
  const float c_float = static_cast<float>(scale * (1 << kBits));
  const VecF c = splat<VecF>(c_float), c_rest = splat<VecF>(scale * (1 << kBits) - c_float);
  for (int i = 0; i < K; ++i) {
    x[i] = max(floor, x[i]);
    const VecF k = fma(x[i], c, magic);  // its low bits hold n·2^kBits + j
    VecF f = fma(x[i], c, magic - k);
    if constexpr (kPrecision == Precision::exact) f = fma(x[i], c_rest, f);
#if defined(__AVX512F__)
    const VecU entry = (VecU)_mm512_permutexvar_ps((__m512i)k, (__m512)table);
#else
    const VecU entry = (VecU)_mm256_permutevar8x32_ps((__m256)table, (__m256i)k);
#endif
    const VecF power = (VecF)((((VecU)k << (23 - kBits)) & 0xff800000u) + entry);
    VecF p;
    if constexpr (kPrecision != Precision::half) {
      p = fma(splat<VecF>(kFull[2]), f, splat<VecF>(kFull[1]));
      p = fma(p, f, splat<VecF>(kFull[0]));
    } else {
      p = fma(splat<VecF>(kHalf[1]), f, splat<VecF>(kHalf[0]));
    }
    e[i] = fma(p, f, splat<VecF>(1)) * power;
  }
#else
  constexpr float kFull[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                             0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbcp-13f};
  constexpr float kHalf[] = {0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f, 0x1.3a02ccp-7f};
  const VecF c = splat<VecF>(scale);
  for (int i = 0; i < K; ++i) {
    x[i] = max(floor, x[i]);
    const VecF k = fma(x[i], c, magic);  // its low bits hold n
    const VecF f = fma(x[i], c, magic - k);
    constexpr bool kLong = kPrecision != Precision::half;
    VecF p = splat<VecF>(kLong ? kFull[5] : kHalf[3]);
    for (int j = kLong ? 4 : 2; j >= 0; --j)
      p = fma(p, f, splat<VecF>(kLong ? kFull[j] : kHalf[j]));
    e[i] = fma(p, f, splat<VecF>(1)) * (VecF)((VecI)((VecU)k << 23) + 0x3f800000);
  }
#endif
}

// The same in double: the series of 2^f to degree 13, relative error below 1e-15.
template <Precision kPrecision, int K>
FF_INLINE void exp_scaled(VecD (&x)[K], VecD (&e)[K], double scale, VecD floor) {
  const VecD c = splat<VecD>(scale);
  const VecD magic = splat<VecD>(0x1.8p52);
  constexpr double kSeries[] = {// ln(2)^i / i!
                                0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,
                                0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13,
                                0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20, 0x1.b5253d395e7c4p-24,
                                0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
                                0x1.816193166d0f9p-40};
  for (int i = 0; i < K; ++i) {
    x[i] = max(floor, x[i]);
    const VecD k = fma(x[i], c, magic), f = fma(x[i], c, magic - k);
    VecD p = splat<VecD>(kSeries[12]);
    for (int j = 11; j >= 0; --j) p = fma(p, f, splat<VecD>(kSeries[j]));
    p = fma(p, f, splat<VecD>(1));
    e[i] = p * (VecD)(((VecL)k << 52) + 0x3ff0000000000000);
  }
}

// e^x and, without cancellation, e^x - 1 for |x| <= 700: x = n·ln 2 + f, the series of e^f - 1 to
// degree 13. Relative errors below 4e-16 but for what n·ln 2 rounds away, 1e-16·|x|. NaN stays NaN.
FF_INLINE void exp_and_minus_one(VecD x, VecD* e, VecD* minus_one) {
  constexpr double kSeries[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const VecD magic = splat<VecD>(0x1.8p52);
  const VecD k = fma(x, splat<VecD>(0x1.71547652b82fep0), magic), n = k - magic;
  VecD f = fma(n, splat<VecD>(-0x1.62e42fefa39efp-1), x);
  f = fma(n, splat<VecD>(-0x1.abc9e3b39803fp-56), f);
  // Estrin's scheme: a third of Horner's latency, and here nothing else to do meanwhile
  const VecD f2 = f * f, f4 = f2 * f2, f8 = f4 * f4;
  const auto pair = [&](int j) {
    return fma(splat<VecD>(kSeries[j + 1]), f, splat<VecD>(kSeries[j]));
  };
  const VecD low = fma(pair(2), f2, pair(0)), middle = fma(pair(6), f2, pair(4));
  const VecD high = fma(pair(10), f2, pair(8));
  const VecD p = fma(fma(high, f8, fma(middle, f4, low)), f2, f);
  const VecD power = (VecD)(((VecL)k << 52) + 0x3ff0000000000000);
  *e = fma(p, power, power);
  *minus_one = fma(p, power, power - 1.0);
}

// ---- logarithm ----
//
// x = 2^n·(1 + f), 2/3 <= 1 + f < 4/3, log(1 + f) = f - f²/2 + f³·P(f): relative error 1.0e-7,
// RMS 3.5e-8 (beside n·ln 2 in float, 3e-8·|n|), also near x = 1. For finite x > 0 that is not
// subnormal; at 0 and in subnormal numbers some finite number, for NaN and infinity rubbish.
FF_INLINE VecF log_positive(VecF x) {
  constexpr float kSeries[] = {0x1.555528p-2f, -0x1.000b1cp-2f, 0x1.99c31ep-3f, -0x1.515a6ap-3f,
                               0x1.1f964cp-3f, -0x1.35b3e0p-3f, 0x1.1b0902p-3f};
  const VecI n = ((VecI)x - 0x3f2aaaab) >> 23;
  const VecF f = (VecF)((VecI)x - (VecI)((VecU)n << 23)) - 1.0f, f2 = f * f;
  VecF p = splat<VecF>(kSeries[6]);
  for (int i = 5; i >= 0; --i) p = fma(p, f, splat<VecF>(kSeries[i]));
  const VecF q = fma(p, f, splat<VecF>(-0.5));
  return fma(__builtin_convertvector(n, VecF), splat<VecF>(0x1.62e430p-1), fma(q, f2, f));
}
// In double libm's, element by element; 0 at 0.
FF_INLINE VecD log_positive(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = x[i] == 0.0 ? 0.0 : __builtin_log(x[i]);
  return x;
}

// `floor` above, in units of x: n = -127 (-1023) at x·c.
template <class A> FF_INLINE double exp_floor(double c) {
  return (sizeof(A) == 4 ? -127.0 : -1023.0) / c;
}

}  // namespace finefuse::FF_ISA_NS
