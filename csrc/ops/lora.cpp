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

#include "core/parallel.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kSpan = kLoraSpan;      // columns of a block in the first cache
constexpr int64_t kGroup = kLoraGroup;    // columns of a task
constexpr int64_t kTokens = kLoraTokens;  // tokens of a task
constexpr int kBlock = 8;                 // tokens of a block
constexpr int kTileTokens = 4;
#if defined(__AVX512F__)
constexpr int kTileRanks = 4;
#else
constexpr int kTileRanks = 2;
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

// (rank, columns) in the accumulator's type, rows padded with zeros to whole vectors.
template <class A> struct Rows {
  const A* data;
  int64_t stride;
};

template <class T, class A>
void pack_columns(const Factor& f, int64_t rank, int64_t begin, int64_t end, int64_t columns,
                  int64_t stride, A* out) {
  const T* p = static_cast<const T*>(f.data);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t j = 0; j < rank; ++j) {
      out[j * stride + c] =
          c < columns ? static_cast<A>(load_scalar(p + j * f.rank_stride + c * f.column_stride))
                      : A(0);
    }
  }
}

template <class A>
Rows<A> rows_of(const Factor& f, int64_t rank, int64_t columns, A* workspace, int threads) {
  const DType own = sizeof(A) == 8 ? DType::f64 : DType::f32;
  if (f.dtype == own && f.column_stride == 1 && columns % kLoraPad == 0) {
    return {static_cast<const A*>(f.data), f.rank_stride};
  }
  const int64_t stride = lora_padded(columns);
  parallel_for(ceil_div(stride, 64), 64 * rank * 8, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = first * 64, end = smaller(last * 64, stride);
    switch (f.dtype) {
      case DType::f32: return pack_columns<float>(f, rank, begin, end, columns, stride, workspace);
      case DType::bf16: return pack_columns<bf16>(f, rank, begin, end, columns, stride, workspace);
      case DType::f16: return pack_columns<f16>(f, rank, begin, end, columns, stride, workspace);
      case DType::f64: return pack_columns<double>(f, rank, begin, end, columns, stride, workspace);
    }
  });
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
template <int R, class A, class Each>
FF_INLINE void broadcast_tile(const A* left, int64_t left_t, int64_t left_i, const A* right,
                              int64_t right_stride, int64_t terms, const Each& each) {
  using V = typename Simd<A>::V;
  V sum[R][2] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const V w[2] = {load(right + t * right_stride), load(right + t * right_stride + kLanes<A>)};
    for (int i = 0; i < R; ++i) {
      const V v = V{} + left[t * left_t + i * left_i];
      sum[i][0] = fma(v, w[0], sum[i][0]);
      sum[i][1] = fma(v, w[1], sum[i][1]);
    }
  }
  for (int i = 0; i < R; ++i) each(i, sum[i]);
}

// out (rank, n) += gᵀ·x of a block of tokens.
template <class A>
void outer_block(const A* x, int64_t x_stride, int64_t tokens, const A* g, int64_t rank, int64_t n,
                 A* out, int64_t out_stride) {
  constexpr int64_t kStep = 2 * kLanes<A>;
  const auto rows = [&]<int R>(int64_t j, int64_t i) {
    broadcast_tile<R>(g + j, rank, 1, x + i, x_stride, tokens, [&](int r, const auto* sum) {
      A* to = out + (j + r) * out_stride + i;
      store(to, load(to) + sum[0]);
      store(to + kLanes<A>, load(to + kLanes<A>) + sum[1]);
    });
  };
  for (int64_t i = 0; i < n; i += kStep) {
    int64_t j = 0;
    for (; j + 4 <= rank; j += 4) rows.template operator()<4>(j, i);
    for (; j < rank; ++j) rows.template operator()<1>(j, i);
  }
}

// ---- shrink
// --------------------------------------------------------------------------------------

template <class T> void shrink_t(const LoraShrink& a) {
  using A = Accumulator<T>;
  const int64_t rank = a.rank, columns = a.columns, padded = lora_padded(columns);
  const int64_t chunks = ceil_div(a.tokens, kTokens), groups = ceil_div(columns, kGroup);
  A* const h = static_cast<A*>(a.h.data);
  A* const outer = static_cast<A*>(a.outer.data);
  const A* const g = static_cast<const A*>(a.g.data);
  const T* const x = static_cast<const T*>(a.x);
  A* packed = static_cast<A*>(a.workspace);
  A* const sums = packed + rank * padded;                        // (groups, tokens, rank)
  A* const partial = sums + (h ? groups * a.tokens * rank : 0);  // (chunks, rank, padded)
  const Rows<A> p = h ? rows_of(a.factor, rank, columns, packed, a.place.threads) : Rows<A>{};
  const bool whole = __is_same(T, A) && a.dropout.seed == nullptr;

  parallel_for(
      chunks * groups, kTokens * kGroup * sizeof(T), a.place.threads,
      [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t chunk = task / groups, group = task % groups;
          const int64_t token = chunk * kTokens, token_end = smaller(token + kTokens, a.tokens);
          A* const sum = sums + (group * a.tokens + token) * rank;
          A* const out = partial + chunk * rank * padded;
          if (h) {
            __builtin_memset(sum, 0, static_cast<size_t>((token_end - token) * rank) * sizeof(A));
          }
          const int64_t group_end = smaller((group + 1) * kGroup, columns);
          for (int64_t c = group * kGroup; c < group_end; c += kSpan) {
            const int64_t n = smaller(kSpan, group_end - c), wide = lora_padded(n);
            for (int64_t j = 0; outer && j < rank; ++j) {
              __builtin_memset(out + j * padded + c, 0, static_cast<size_t>(wide) * sizeof(A));
            }
            for (int64_t t = token; t < token_end; t += kBlock) {
              const int64_t tokens = smaller(kBlock, token_end - t);
              alignas(64) A block[kBlock][kSpan];
              const A* from = &block[0][0];
              int64_t stride = kSpan;
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

template <class T> void expand_t(const LoraExpand& a) {
  using A = Accumulator<T>;
  using V = Vec<T>;
  constexpr int64_t kStep = 2 * kLanes<T>;
  const int64_t rank = a.rank, columns = a.columns;
  const int64_t chunks = ceil_div(a.tokens, kTokens), groups = ceil_div(columns, kGroup);
  const A* const h = static_cast<const A*>(a.h.data);
  const T* const bias = static_cast<const T*>(a.bias);
  T* const y = static_cast<T*>(a.y);
  const Rows<A> p = rows_of(a.factor, rank, columns, static_cast<A*>(a.workspace), a.place.threads);
  const V scale = V{} + static_cast<A>(a.scale);
  parallel_for(
      chunks * groups, kTokens * kGroup * sizeof(T), a.place.threads,
      [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t chunk = task / groups, group = task % groups;
          const int64_t token_end = smaller((chunk + 1) * kTokens, a.tokens);
          const int64_t group_end = smaller((group + 1) * kGroup, columns);
          for (int64_t c = group * kGroup; c < group_end; c += kSpan) {
            const int64_t n = smaller(kSpan, group_end - c);
            const auto rows = [&]<int R>(int64_t token) {
              A keep[R][kSpan];
              for (int t = 0; a.dropout.seed != nullptr && t < R; ++t) {
                keep_factors(a.dropout, static_cast<uint64_t>((token + t) * columns + c), n,
                             keep[t]);
              }
              for (int64_t k = 0; k < n; k += kStep) {
                const auto each = [&](int t, const V* sum) {
                  T* to = y + (token + t) * columns + c + k;
                  for (int half = 0; half < 2; ++half) {
                    const int64_t at = k + half * kLanes<T>;
                    const int left = static_cast<int>(smaller(kLanes<T>, n - at));
                    if (left <= 0) break;
                    V v = sum[half] * scale;
                    T* const place = to + half * kLanes<T>;
                    if (a.dropout.seed != nullptr) v *= load_partial(keep[t] + at, left, 0.0);
                    if (bias != nullptr) v += load_partial(bias + c + at, left, 0.0);
                    if (left == kLanes<T>) {
                      store(place, a.accumulate ? load(place) + v : v);
                    } else {
                      store_partial(place, a.accumulate ? load_partial(place, left, 0.0) + v : v,
                                    left);
                    }
                  }
                };
                broadcast_tile<R>(h + token * rank, 1, rank, p.data + c + k, p.stride, rank, each);
              }
            };
            int64_t t = chunk * kTokens;
            for (; t + 4 <= token_end; t += 4) rows.template operator()<4>(t);
            for (; t < token_end; ++t) rows.template operator()<1>(t);
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
