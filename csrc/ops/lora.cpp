// Low-rank updates on the CPU: skinny products whose long side is read once.
//
// clang-format off
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
#include "ops/lora_tiles.h"

namespace finefuse::FF_ISA_NS {
namespace {

// ---- shrink -------------------------------------------------------------------------------------

// Where the parts of a member's workspace are.
template <class A> struct ShrinkMember {
  Rows<A> factor;
  A* sums;     // (groups, tokens, rank)
  A* partial;  // (chunks, rank, padded)
};

template <class T> void shrink_t(const LoraShrink* members, int count) {
  using A = Accumulator<T>;
  const int64_t tokens = members->tokens, columns = members->columns;
  const int64_t padded = lora_padded(columns), each = lora_tokens(tokens);
  const int64_t chunks = ceil_div(tokens, each), groups = ceil_div(columns, kGroup);
  const int threads = members->place.threads;
  const T* const x = static_cast<const T*>(members->x);
  ShrinkMember<A> own[kLoraMembers];
  bool outer = false;
  for (int m = 0; m < count; ++m) {
    const LoraShrink& a = members[m];
    A* const packed = static_cast<A*>(a.workspace);
    own[m].factor = a.h ? rows_of(a.factor, a.rank, columns, packed, threads) : Rows<A>{};
    own[m].sums = packed + a.rank * padded;
    own[m].partial = own[m].sums + (a.h ? groups * tokens * a.rank : 0);
    outer |= static_cast<bool>(a.outer);
  }
  const bool whole = __is_same(T, A) && !outer;

  // A member's share of a block of tokens and a span of columns.
  const auto visit = [&](int m, const A* block, int64_t stride, int64_t token, int64_t t,
                         int64_t some, int64_t c, int64_t n, int64_t wide) {
    const LoraShrink& a = members[m];
    alignas(64) A dropped[kBlock][kSpan + kLoraPad];
    if (a.dropout.seed != nullptr) {
      for (int64_t i = 0; i < some; ++i) {
        A keep[kSpan];
        keep_factors(a.dropout, static_cast<uint64_t>((t + i) * columns + c), n, keep);
        for (int64_t k = 0; k < n; ++k) dropped[i][k] = block[i * stride + k] * keep[k];
        for (int64_t k = n; k < wide; ++k) dropped[i][k] = A(0);
      }
      block = &dropped[0][0];
      stride = kSpan + kLoraPad;
    }
    if (a.h) {
      const Rows<A> p{own[m].factor.data + c, own[m].factor.stride};
      A* const sum = own[m].sums + (c / kGroup * tokens + t) * a.rank;
      dot_block(block, stride, some, p, a.rank, wide, sum);
    }
    if (a.outer) {
      A* const out = own[m].partial + token / each * a.rank * padded + c;
      outer_block(block, stride, some, static_cast<const A*>(a.g.data) + t * a.rank, a.rank, wide,
                  out, padded);
    }
  };

  parallel_for(
      chunks * groups, each * kGroup * static_cast<int64_t>(sizeof(T)), threads,
      [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t chunk = task / groups, group = task % groups;
          const int64_t token = chunk * each, token_end = smaller(token + each, tokens);
          const int64_t group_end = smaller((group + 1) * kGroup, columns);
          for (int m = 0; m < count; ++m) {
            const int64_t rank = members[m].rank;
            if (members[m].h) {
              __builtin_memset(own[m].sums + (group * tokens + token) * rank, 0,
                               static_cast<size_t>((token_end - token) * rank) * sizeof(A));
            }
          }
          for (int64_t c = group * kGroup; c < group_end; c += kSpan) {
            const int64_t n = smaller(kSpan, group_end - c),
                          wide = ceil_div(n, kLoraPad) * kLoraPad;
            for (int m = 0; m < count; ++m) {
              const int64_t rank = members[m].rank;
              A* const out = own[m].partial + chunk * rank * padded + c;
              for (int64_t j = 0; members[m].outer && j < rank; ++j) {
                __builtin_memset(out + j * padded, 0, static_cast<size_t>(wide) * sizeof(A));
              }
            }
            for (int64_t t = token; t < token_end; t += kBlock) {
              const int64_t some = smaller(kBlock, token_end - t);
              alignas(64) A block[kBlock][kSpan + kLoraPad];
              const A* from = &block[0][0];
              int64_t stride = kSpan + kLoraPad;
              if (whole && n == wide) {
                from = reinterpret_cast<const A*>(x + t * columns + c);
                stride = columns;
              } else {
                for (int64_t i = 0; i < some; ++i) {
                  widen(x + (t + i) * columns + c, n, wide, block[i]);
                }
              }
              for (int m = 0; m < count; ++m) {
                visit(m, from, stride, token, t, some, c, n, wide);
              }
            }
          }
        }
      });

  for (int m = 0; m < count; ++m) {
    const LoraShrink& a = members[m];
    const int64_t rank = a.rank;
    const A *const sums = own[m].sums, *const partial = own[m].partial;
    if (a.h) {
      A* const h = static_cast<A*>(a.h.data);
      const auto scale = static_cast<A>(a.h_scale);
      parallel_for(tokens * rank, groups * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          A total = 0;
          for (int64_t s = 0; s < groups; ++s) total += sums[s * tokens * rank + i];
          h[i] = scale * total;
        }
      });
    }
    if (a.outer) {
      A* const out = static_cast<A*>(a.outer.data);
      const auto scale = static_cast<A>(a.outer_scale);
      parallel_for(rank, columns * (chunks + 1) * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          for (int64_t k = 0; k < columns; ++k) {
            A total = 0;
            for (int64_t c = 0; c < chunks; ++c) total += partial[(c * rank + j) * padded + k];
            out[j * columns + k] = scale * total;
          }
        }
      });
    }
  }
}

void shrink(const LoraShrink* members, int count) {
  by_dtype(members->dtype, [&]<class T>(T) { shrink_t<T>(members, count); });
}

// ---- expand -------------------------------------------------------------------------------------

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
  by_dtype(a.dtype, [&]<class T>(T) { expand_t<T>(a); });
}

// ---- dropout ------------------------------------------------------------------------------------

template <class T> void dropout_t(const LoraDropout& a) {
  using A = Accumulator<T>;
  constexpr int N = kLanes<T>;
  const T* const x = static_cast<const T*>(a.x);
  T* const y = static_cast<T*>(a.y);
  if (!a.accumulate && y != x) advise_huge_pages(y, static_cast<size_t>(a.count) * sizeof(T));
  parallel_for(ceil_div(a.count, kSpan), kSpan * static_cast<int64_t>(3 * sizeof(T)),
               a.place.threads, [&](int64_t first, int64_t last) {
                 for (int64_t i = first * kSpan; i < smaller(last * kSpan, a.count); i += kSpan) {
                   const int64_t n = smaller(kSpan, a.count - i);
                   alignas(64) A keep[kSpan];
                   keep_factors(a.dropout, static_cast<uint64_t>(i), n, keep);
                   int64_t k = 0;
                   for (; k + N <= n; k += N) {
                     auto v = load(x + i + k) * load(keep + k);
                     if (a.accumulate) v += load(y + i + k);
                     store(y + i + k, v);
                   }
                   if (k == n) continue;
                   const int left = static_cast<int>(n - k);
                   auto v = load_partial(x + i + k, left, 0.0) * load_partial(keep + k, left, 0.0);
                   if (a.accumulate) v += load_partial(y + i + k, left, 0.0);
                   store_partial(y + i + k, v, left);
                 }
               });
}

void dropout(const LoraDropout& a) {
  by_dtype(a.dtype, [&]<class T>(T) { dropout_t<T>(a); });
}

}  // namespace

const LoraKernels& lora_kernels() {
  static constexpr LoraKernels kernels{shrink, expand, dropout};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
