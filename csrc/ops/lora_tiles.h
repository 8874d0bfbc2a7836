// What the low-rank stems share on the CPU: dropout, factors as rows, tiles of skinny products.
// Compiled per ISA level (core/parallel.h).
#pragma once
#include "core/parallel.h"
#include "core/philox.h"
#include "core/sizes.h"
#include "core/vec.h"
#include "ops/lora.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kSpan = kLoraSpan;      // columns of a block in the first cache
constexpr int64_t kGroup = kLoraGroup;    // columns of a task
constexpr int64_t kTokens = kLoraTokens;  // tokens of a task
constexpr int kBlock = 16;                // tokens of a block
// Tiles of sums that fit the registers: tokens × ranks of one vector, rows × two vectors.
constexpr int kTileTokens = 4;
#if defined(__AVX512F__)
constexpr int kTileRanks = 4, kRows = 8;
#else
constexpr int kTileRanks = 2, kRows = 4;
#endif

// In pairs: as exact as it gets, and no chain.
template <class V> FF_INLINE auto lane_sum(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  __typeof__(v[0] + v[0]) a[n];
  __builtin_memcpy(a, &v, sizeof v);
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  }
  return a[0];
}

// ---- dropout ------------------------------------------------------------------------------------

constexpr int kCounters = kLanes<float>;

// The words of counters first, first + 1, ...: words[4·i + k] is word k of counter first + i.
FF_INLINE void philox(uint64_t seed, uint64_t first, uint32_t* words) {
  uint32_t low[kCounters], high[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    low[i] = static_cast<uint32_t>(first + static_cast<uint64_t>(i));
    high[i] = static_cast<uint32_t>((first + static_cast<uint64_t>(i)) >> 32);
  }
  VecU c[4] = {};
  __builtin_memcpy(&c[0], low, sizeof low);
  __builtin_memcpy(&c[1], high, sizeof high);
  philox4x32(seed, c);
  uint32_t by_word[4][kCounters];
  __builtin_memcpy(by_word, c, sizeof by_word);
  for (int i = 0; i < kCounters; ++i) {
    for (int k = 0; k < 4; ++k) words[4 * i + k] = by_word[k][i];
  }
}

// What elements [first, first + n) are multiplied by.
template <class A>
FF_INLINE void keep_factors(const Dropout& d, uint64_t first, int64_t n, A* keep) {
  const auto scale = static_cast<A>(d.scale);
  const uint64_t seed = static_cast<uint64_t>(*d.seed);
  uint32_t words[4 * kCounters];
  auto skip = static_cast<int64_t>(first & 3);
  for (uint64_t counter = first >> 2; n > 0; counter += kCounters) {
    philox(seed, counter, words);
    const int64_t count = smaller(4 * kCounters - skip, n);
    for (int64_t i = 0; i < count; ++i) keep[i] = words[skip + i] >= d.threshold ? scale : A(0);
    keep += count;
    n -= count;
    skip = 0;
  }
}

// ---- operands -----------------------------------------------------------------------------------

// (rank, columns) in the accumulator's type, rows padded with zeros to whole vectors. Rows must not
// be a multiple of a page apart: several are read at once and would share the sets of a cache.
template <class A> struct Rows {
  const A* data;
  int64_t stride;
};

template <class A, class T> FF_INLINE A element(const T* p) {
  if constexpr (__is_same(A, T)) return *p;
  return static_cast<A>(load_scalar(p));
}

// n numbers of any type, widened, and zeros up to `wide`.
template <class T, class A> FF_INLINE void widen(const T* from, int64_t n, int64_t wide, A* to) {
  int64_t k = 0;
  if constexpr (__is_same(Accumulator<T>, A)) {
    for (; k + kLanes<T> <= n; k += kLanes<T>) store(to + k, load(from + k));
  }
  for (; k < n; ++k) to[k] = element<A>(from + k);
  for (; k < wide; ++k) to[k] = A(0);
}

// Columns [begin, begin + n) of `rank` rows of a factor, zeros up to `wide`.
template <class T, class A>
void pack_span(const T* p, const Factor& f, int64_t rank, int64_t begin, int64_t n, int64_t wide,
               A* out, int64_t stride) {
  p += begin * f.column_stride;
  if (f.column_stride == 1) {
    for (int64_t j = 0; j < rank; ++j) widen(p + j * f.rank_stride, n, wide, out + j * stride);
    return;
  }
  constexpr int64_t kColumns = 16;  // their lines stay for all ranks
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t some = smaller(kColumns, n - c);
    for (int64_t j = 0; j < rank; ++j) {
      const T* from = p + j * f.rank_stride + c * f.column_stride;
      for (int64_t i = 0; i < some; ++i)
        out[j * stride + c + i] = element<A>(from + i * f.column_stride);
    }
  }
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t c = n; c < wide; ++c) out[j * stride + c] = A(0);
  }
}

template <class A>
void pack_span(const Factor& f, int64_t first, int64_t rank, int64_t begin, int64_t n, int64_t wide,
               A* out, int64_t stride) {
  const int64_t skip = first * f.rank_stride;
  switch (f.dtype) {
    case DType::f32:
      return pack_span(static_cast<const float*>(f.data) + skip, f, rank, begin, n, wide, out,
                       stride);
    case DType::bf16:
      return pack_span(static_cast<const bf16*>(f.data) + skip, f, rank, begin, n, wide, out,
                       stride);
    case DType::f16:
      return pack_span(static_cast<const f16*>(f.data) + skip, f, rank, begin, n, wide, out,
                       stride);
    case DType::f64:
      return pack_span(static_cast<const double*>(f.data) + skip, f, rank, begin, n, wide, out,
                       stride);
  }
}

template <class A>
Rows<A> rows_of(const Factor& f, int64_t rank, int64_t columns, A* workspace, int threads) {
  const DType own = sizeof(A) == 8 ? DType::f64 : DType::f32;
  if (f.dtype == own && f.column_stride == 1 && columns % kLoraPad == 0 &&
      (f.rank_stride % 256 != 0 || rank == 1)) {
    return {static_cast<const A*>(f.data), f.rank_stride};
  }
  const int64_t stride = lora_padded(columns);
  parallel_for(ceil_div(columns, 64), 64 * rank * 8, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = first * 64, end = smaller(last * 64, columns);
    const int64_t wide = (end == columns ? stride : end) - begin;
    pack_span(f, 0, rank, begin, end - begin, wide, workspace + begin, stride);
  });
  return {workspace, stride};
}

// ---- tiles --------------------------------------------------------------------------------------

// sums[t·ld + j] += x[t]·p[j] over n columns, a multiple of the lanes. Small tiles have several
// sums each: they would wait for one another, and long chains lose accuracy.
template <int T, int J, class A>
FF_INLINE void dot_tile(const A* x, int64_t x_stride, const A* p, int64_t p_stride, int64_t n,
                        A* sums, int64_t ld) {
  using V = typename Simd<A>::V;
  constexpr int kSets = T * J < 8 ? 8 / (T * J) : 1;
  V sum[kSets][T][J] = {};
  const auto add = [&](int set, int64_t i) FF_LAMBDA {
    V w[J];
    for (int j = 0; j < J; ++j) w[j] = load(p + j * p_stride + i);
    for (int t = 0; t < T; ++t) {
      const V v = load(x + t * x_stride + i);
      for (int j = 0; j < J; ++j) sum[set][t][j] = fma(v, w[j], sum[set][t][j]);
    }
  };
  int64_t i = 0;
  for (; i + kSets * kLanes<A> <= n; i += kSets * kLanes<A>) {
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add(set, i + set * kLanes<A>);
  }
  for (; i < n; i += kLanes<A>) add(0, i);
  for (int t = 0; t < T; ++t) {
    for (int j = 0; j < J; ++j) {
      for (int set = 1; set < kSets; ++set) sum[0][t][j] += sum[set][t][j];
      sums[t * ld + j] += lane_sum(sum[0][t][j]);
    }
  }
}

template <int T, class A>
FF_INLINE void dot_ranks(const A* x, int64_t x_stride, const Rows<A>& p, int64_t rank, int64_t n,
                         A* sums) {
  int64_t j = 0;
  for (; j + kTileRanks <= rank; j += kTileRanks) {
    dot_tile<T, kTileRanks>(x, x_stride, p.data + j * p.stride, p.stride, n, sums + j, rank);
  }
  for (; j < rank; ++j)
    dot_tile<T, 1>(x, x_stride, p.data + j * p.stride, p.stride, n, sums + j, rank);
}

// sums (tokens, rank) += x (tokens, n)·pᵀ.
template <class A>
void dot_block(const A* x, int64_t x_stride, int64_t tokens, const Rows<A>& p, int64_t rank,
               int64_t n, A* sums) {
  int64_t t = 0;
  for (; t + kTileTokens <= tokens; t += kTileTokens) {
    dot_ranks<kTileTokens>(x + t * x_stride, x_stride, p, rank, n, sums + t * rank);
  }
  for (; t < tokens; ++t) dot_ranks<1>(x + t * x_stride, x_stride, p, rank, n, sums + t * rank);
}

// Sums of R rows and two vectors of columns: sum[i][k] = Σ_t left[t·left_t + i·left_i]·right[t][k].
template <int R, class A>
FF_INLINE void broadcast_tile(const A* left, int64_t left_t, int64_t left_i, const A* right,
                              int64_t right_stride, int64_t terms,
                              typename Simd<A>::V (&sum)[R][2]) {
  using V = typename Simd<A>::V;
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = V{};
  for (int64_t t = 0; t < terms; ++t) {
    const V w[2] = {load(right + t * right_stride), load(right + t * right_stride + kLanes<A>)};
    for (int i = 0; i < R; ++i) {
      const V v = V{} + left[t * left_t + i * left_i];
      sum[i][0] = fma(v, w[0], sum[i][0]);
      sum[i][1] = fma(v, w[1], sum[i][1]);
    }
  }
}

template <int R, class A>
FF_INLINE void outer_tile(const A* x, int64_t x_stride, int64_t tokens, const A* g, int64_t rank,
                          A* out, int64_t out_stride) {
  typename Simd<A>::V sum[R][2];
  broadcast_tile<R>(g, rank, 1, x, x_stride, tokens, sum);
  for (int i = 0; i < R; ++i) {
    A* to = out + i * out_stride;
    store(to, load(to) + sum[i][0]);
    store(to + kLanes<A>, load(to + kLanes<A>) + sum[i][1]);
  }
}

// out (rank, n) += gᵀ·x of a block of tokens.
template <class A>
void outer_block(const A* x, int64_t x_stride, int64_t tokens, const A* g, int64_t rank, int64_t n,
                 A* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + kRows <= rank; j += kRows) {
    for (int64_t i = 0; i < n; i += 2 * kLanes<A>) {
      outer_tile<kRows>(x + i, x_stride, tokens, g + j, rank, out + j * out_stride + i, out_stride);
    }
  }
  for (; j < rank; ++j) {
    for (int64_t i = 0; i < n; i += 2 * kLanes<A>) {
      outer_tile<1>(x + i, x_stride, tokens, g + j, rank, out + j * out_stride + i, out_stride);
    }
  }
}

}  // namespace
}  // namespace finefuse::FF_ISA_NS
