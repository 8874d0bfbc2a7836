// clang-format off
// Low-rank updates on the CPU: skinny products whose long side is read once.
//
//   pass        reads + writes                      multiply-adds              bound by
//   shrink      x; rank·columns in cache            tokens·columns·rank        arithmetic (rank 8 and above)
//     + outer   the same                            twice that
//   expand      y once or twice; factor in cache    tokens·columns·rank        memory at small ranks
//
// Shrink: tiles of kTileTokens × kTileRanks sums, one vector each, over a span of columns that stays in the first
// cache; outer products of the same span follow before it leaves. Expand and outer are one loop: sums of
// two vectors of columns for a few rows, a broadcast each multiply-add.
// Dropout draws Philox words a vector of counters at a time and multiplies x as it is widened.
//
// clang-format on
// Work is split by tokens and columns, never by the number of threads; partial sums are added in
// order.
#include "ops/lora.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "core/vec.h"

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

FF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// ---- dropout
// -------------------------------------------------------------------------------------

constexpr int kCounters = kLanes<float>;

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
  for (int i = 0; i < kCounters; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

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

// ---- operands
// ------------------------------------------------------------------------------------

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

template <class T, class A>
void pack_columns(const Factor& f, int64_t rank, int64_t begin, int64_t end, A* out,
                  int64_t stride) {
  const T* p = static_cast<const T*>(f.data);
  constexpr int64_t kColumns = 16;  // their lines stay for all ranks
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t n = smaller(kColumns, end - c);
    for (int64_t j = 0; j < rank; ++j) {
      const T* from = p + j * f.rank_stride + c * f.column_stride;
      A* to = out + j * stride + c;
      for (int64_t i = 0; i < n; ++i) to[i] = element<A>(from + i * f.column_stride);
    }
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
    switch (f.dtype) {
      case DType::f32: return pack_columns<float>(f, rank, begin, end, workspace, stride);
      case DType::bf16: return pack_columns<bf16>(f, rank, begin, end, workspace, stride);
      case DType::f16: return pack_columns<f16>(f, rank, begin, end, workspace, stride);
      case DType::f64: return pack_columns<double>(f, rank, begin, end, workspace, stride);
    }
  });
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t c = columns; c < stride; ++c) workspace[j * stride + c] = A(0);
  }
  return {workspace, stride};
}

// ---- tiles
// ---------------------------------------------------------------------------------------

// sums[t·ld + j] += x[t]·p[j] over n columns, a multiple of the lanes. Small tiles have several
// sums each: they would wait for one another, and long chains lose accuracy.
template <int T, int J, class A>
FF_INLINE void dot_tile(const A* x, int64_t x_stride, const A* p, int64_t p_stride, int64_t n,
                        A* sums, int64_t ld) {
  using V = typename Simd<A>::V;
  constexpr int kSets = T * J < 8 ? 8 / (T * J) : 1;
  V sum[kSets][T][J] = {};
  const auto add = [&](int set, int64_t i) __attribute__((always_inline)) {
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

// ---- shrink
// --------------------------------------------------------------------------------------

template <class T> void shrink_t(const LoraShrink& a) {
  using A = Accumulator<T>;
  const int64_t rank = a.rank, columns = a.columns, padded = lora_padded(columns);
  const int64_t each = lora_tokens(a.tokens);
  const int64_t chunks = ceil_div(a.tokens, each), groups = ceil_div(columns, kGroup);
  A* const h = static_cast<A*>(a.h.data);
  A* const outer = static_cast<A*>(a.outer.data);
  const A* const g = static_cast<const A*>(a.g.data);
  const T* const x = static_cast<const T*>(a.x);
  A* packed = static_cast<A*>(a.workspace);
  A* const sums = packed + rank * padded;                        // (groups, tokens, rank)
  A* const partial = sums + (h ? groups * a.tokens * rank : 0);  // (chunks, rank, padded)
  const Rows<A> p = h ? rows_of(a.factor, rank, columns, packed, a.place.threads) : Rows<A>{};
  const bool whole = __is_same(T, A) && a.dropout.seed == nullptr && outer == nullptr;

  parallel_for(
      chunks * groups, each * kGroup * static_cast<int64_t>(sizeof(T)), a.place.threads,
      [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t chunk = task / groups, group = task % groups;
          const int64_t token = chunk * each, token_end = smaller(token + each, a.tokens);
          A* const sum = sums + (group * a.tokens + token) * rank;
          A* const out = partial + chunk * rank * padded;
          if (h) {
            __builtin_memset(sum, 0, static_cast<size_t>((token_end - token) * rank) * sizeof(A));
          }
          const int64_t group_end = smaller((group + 1) * kGroup, columns);
          for (int64_t c = group * kGroup; c < group_end; c += kSpan) {
            const int64_t n = smaller(kSpan, group_end - c),
                          wide = ceil_div(n, kLoraPad) * kLoraPad;
            for (int64_t j = 0; outer && j < rank; ++j) {
              __builtin_memset(out + j * padded + c, 0, static_cast<size_t>(wide) * sizeof(A));
            }
            for (int64_t t = token; t < token_end; t += kBlock) {
              const int64_t tokens = smaller(kBlock, token_end - t);
              alignas(64) A block[kBlock][kSpan + kLoraPad];
              const A* from = &block[0][0];
              int64_t stride = kSpan + kLoraPad;
              if (whole && n == wide) {
                from = reinterpret_cast<const A*>(x + t * columns + c);
                stride = columns;
              } else {
                for (int64_t i = 0; i < tokens; ++i) {
                  const T* row = x + (t + i) * columns + c;
                  int64_t k = 0;
                  for (; k + kLanes<T> <= n; k += kLanes<T>) store(block[i] + k, load(row + k));
                  for (; k < wide; ++k) {
                    block[i][k] = k < n ? static_cast<A>(load_scalar(row + k)) : A(0);
                  }
                  if (a.dropout.seed != nullptr) {
                    A keep[kSpan];
                    keep_factors(a.dropout, static_cast<uint64_t>((t + i) * columns + c), n, keep);
                    for (k = 0; k < n; ++k) block[i][k] *= keep[k];
                  }
                }
              }
              if (h) {
                dot_block(from, stride, tokens, Rows<A>{p.data + c, p.stride}, rank, wide,
                          sum + (t - token) * rank);
              }
              if (outer) {
                outer_block(from, stride, tokens, g + t * rank, rank, wide, out + c, padded);
              }
            }
          }
        }
      });

  if (h) {
    const auto scale = static_cast<A>(a.h_scale);
    parallel_for(a.tokens * rank, groups * 4, a.place.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        A total = 0;
        for (int64_t s = 0; s < groups; ++s) total += sums[s * a.tokens * rank + i];
        h[i] = scale * total;
      }
    });
  }
  if (outer) {
    const auto scale = static_cast<A>(a.outer_scale);
    parallel_for(rank, columns * (chunks + 1) * 4, a.place.threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t j = begin; j < end; ++j) {
                     for (int64_t k = 0; k < columns; ++k) {
                       A total = 0;
                       for (int64_t c = 0; c < chunks; ++c)
                         total += partial[(c * rank + j) * padded + k];
                       outer[j * columns + k] = scale * total;
                     }
                   }
                 });
  }
}

void shrink(const LoraShrink& a) {
  switch (a.dtype) {
    case DType::f32: return shrink_t<float>(a);
    case DType::bf16: return shrink_t<bf16>(a);
    case DType::f16: return shrink_t<f16>(a);
    case DType::f64: return shrink_t<double>(a);
  }
}

// ---- expand
// --------------------------------------------------------------------------------------

// R tokens and n columns of y, from (token, column) on.
template <int R, class T>
FF_INLINE void expand_rows(const LoraExpand& a, const Rows<Accumulator<T>>& p, int64_t token,
                           int64_t column, int64_t n) {
  using A = Accumulator<T>;
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const A* h = static_cast<const A*>(a.h.data) + token * a.rank;
  const T* bias = a.bias == nullptr ? nullptr : static_cast<const T*>(a.bias) + column;
  T* y = static_cast<T*>(a.y) + token * a.columns + column;
  const V scale = V{} + static_cast<A>(a.scale);
  alignas(64) A keep[R][kSpan];
  const bool drops = a.dropout.seed != nullptr;
  for (int t = 0; drops && t < R; ++t) {
    const auto first = static_cast<uint64_t>((token + t) * a.columns + column);
    keep_factors(a.dropout, first, n, keep[t]);
  }
  V sum[R][2];
  int64_t k = 0;
  for (; k + 2 * N <= n; k += 2 * N) {
    broadcast_tile<R>(h, 1, a.rank, p.data + column + k, p.stride, a.rank, sum);
    for (int t = 0; t < R; ++t) {
      T* to = y + t * a.columns + k;
      for (int half = 0; half < 2; ++half, to += N) {
        V v = sum[t][half] * scale;
        if (__builtin_expect(drops, 0)) v *= load(keep[t] + k + half * N);
        if (__builtin_expect(bias != nullptr, 0)) v += load(bias + k + half * N);
        if (a.accumulate) v += load(to);
        store(to, v);
      }
    }
  }
  if (k == n) return;
  broadcast_tile<R>(h, 1, a.rank, p.data + column + k, p.stride, a.rank, sum);
  for (int t = 0; t < R; ++t) {
    for (int half = 0; half < 2 && k + half * N < n; ++half) {
      const int64_t at = k + half * N;
      const int left = static_cast<int>(smaller(N, n - at));
      T* to = y + t * a.columns + at;
      V v = sum[t][half] * scale;
      if (drops) v *= load_partial(keep[t] + at, left, 0.0);
      if (bias != nullptr) v += load_partial(bias + at, left, 0.0);
      if (a.accumulate) v += load_partial(to, left, 0.0);
      store_partial(to, v, left);
    }
  }
}

template <class T> void expand_t(const LoraExpand& a) {
  using A = Accumulator<T>;
  const int64_t chunks = ceil_div(a.tokens, kTokens), groups = ceil_div(a.columns, kGroup);
  if (!a.accumulate) {  // y may be fresh memory, and what comes onto it does not touch it first
    advise_huge_pages(a.y, static_cast<size_t>(a.tokens * a.columns) * sizeof(T));
  }
  const Rows<A> p =
      rows_of(a.factor, a.rank, a.columns, static_cast<A*>(a.workspace), a.place.threads);
  parallel_for(chunks * groups, kTokens * kGroup * static_cast<int64_t>(sizeof(T)), a.place.threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t task = first; task < last; ++task) {
                   const int64_t chunk = task / groups, group = task % groups;
                   const int64_t token_end = smaller((chunk + 1) * kTokens, a.tokens);
                   const int64_t group_end = smaller((group + 1) * kGroup, a.columns);
                   for (int64_t c = group * kGroup; c < group_end; c += kSpan) {
                     const int64_t n = smaller(kSpan, group_end - c);
                     int64_t t = chunk * kTokens;
                     for (; t + kRows <= token_end; t += kRows)
                       expand_rows<kRows, T>(a, p, t, c, n);
                     for (; t < token_end; ++t) expand_rows<1, T>(a, p, t, c, n);
                   }
                 }
               });
}

void expand(const LoraExpand& a) {
  switch (a.dtype) {
    case DType::f32: return expand_t<float>(a);
    case DType::bf16: return expand_t<bf16>(a);
    case DType::f16: return expand_t<f16>(a);
    case DType::f64: return expand_t<double>(a);
  }
}

}  // namespace

const LoraKernels& lora_kernels() {
  static constexpr LoraKernels kernels{shrink, expand};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
