// Low-rank updates of many adapters in one batch, on the CPU.
//
//   pass      reads + writes                                task
//   rows      the ids twice                                 all, on one thread
//   shrink    x once, each adapter's factor once a task     kChunk rows of an adapter
//     outer   x once                                        kSpan columns of an adapter
//   expand    y twice, each adapter's factor once a task    kGroup columns of kChunk rows
//
// Rows stay where they are and are gathered a block at a time; no adapter is padded to another's
// rows. A factor is copied a span at a time for each task: with a few rows an adapter that is the
// traffic, as it must be. Work is split by adapters, rows and columns, never by the number of
// threads.
#include "ops/segmented.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "ops/lora_tiles.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kChunk = 32;      // rows of a task
constexpr int64_t kRankBlock = 32;  // ranks whose factor is at hand
constexpr int64_t kStride = kSpan + kLoraPad;

// ---- rows by adapter ----------------------------------------------------------------------------

int64_t first_bad_adapter(const SegmentRows& a) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (a.adapter[t] < -1 || a.adapter[t] >= a.adapters) return t;
  }
  return -1;
}

// A counting sort. begins[a] holds, in turn, how many rows come before adapter a, and where its
// next row goes; the last pass moves the ends to the beginnings.
void rows(const SegmentRows& a) {
  for (int64_t i = 0; i <= a.adapters; ++i) a.begins[i] = 0;
  int64_t none = 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t id = a.adapter[t];
    if (id < 0)
      ++none;
    else
      ++a.begins[id];
  }
  int64_t at = none;
  for (int64_t i = 0; i <= a.adapters; ++i) {
    const int64_t count = a.begins[i];
    a.begins[i] = at;
    at += count;
  }
  none = 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t id = a.adapter[t];
    a.order[id < 0 ? none++ : a.begins[id]++] = t;
  }
  for (int64_t i = a.adapters; i > 0; --i) a.begins[i] = a.begins[i - 1];
  a.begins[0] = none;
}

// ---- chunks of rows -----------------------------------------------------------------------------

int64_t count_chunks(const Segments& s) {
  int64_t chunks = 0;
  for (int64_t a = 0; a < s.adapters; ++a) {
    chunks += ceil_div(s.begins[a + 1] - s.begins[a], kChunk);
  }
  return chunks;
}

// Calls body(adapter, rows, how many) for the chunks [first, last).
template <class Body>
FF_INLINE void for_chunks(const Segments& s, int64_t first, int64_t last, const Body& body) {
  int64_t before = 0;
  for (int64_t a = 0; a < s.adapters && before < last; ++a) {
    const int64_t begin = s.begins[a], count = s.begins[a + 1] - begin;
    const int64_t chunks = ceil_div(count, kChunk);
    int64_t c = first > before ? first - before : 0;
    for (; c < chunks && before + c < last; ++c) {
      body(a, s.order + begin + c * kChunk, smaller(kChunk, count - c * kChunk));
    }
    before += chunks;
  }
}

template <class A> FF_INLINE A scale_of(const Reals& scale, int64_t adapter) {
  return scale ? static_cast<A>(scale[adapter]) : A(1);
}

template <class T> FF_INLINE Factor factor_of(const Factors& f, int64_t adapter) {
  Factor own = f.first;
  own.data = static_cast<const T*>(own.data) + adapter * f.adapter_stride;
  return own;
}

FF_INLINE Factor factor_of(const Factors& f, int64_t adapter) {
  switch (f.first.dtype) {
    case DType::f32: return factor_of<float>(f, adapter);
    case DType::bf16: return factor_of<bf16>(f, adapter);
    case DType::f16: return factor_of<f16>(f, adapter);
    case DType::f64: return factor_of<double>(f, adapter);
  }
  return f.first;
}

// D(x) of `some` rows and n columns, zeros up to `wide`: in x itself, where that is it, or in
// block.
template <class T, class A>
FF_INLINE Rows<A> gather(const T* x, int64_t columns, const Dropout& d, const int64_t* rows,
                         int64_t some, int64_t c, int64_t n, int64_t wide, A (*block)[kStride]) {
  if constexpr (__is_same(T, A)) {
    if (n == wide && d.seed == nullptr && rows[some - 1] - rows[0] == some - 1) {
      return {x + rows[0] * columns + c, columns};
    }
  }
  for (int64_t i = 0; i < some; ++i) {
    widen(x + rows[i] * columns + c, n, wide, block[i]);
    if (d.seed != nullptr) {
      A keep[kSpan];
      keep_factors(d, static_cast<uint64_t>(rows[i] * columns + c), n, keep);
      for (int64_t k = 0; k < n; ++k) block[i][k] *= keep[k];
    }
  }
  return {&block[0][0], kStride};
}

// ---- shrink -------------------------------------------------------------------------------------

template <class T> void shrink_h(const SegmentedShrink& a) {
  using A = Accumulator<T>;
  const int64_t columns = a.columns, rank = a.rank;
  const T* const x = static_cast<const T*>(a.x);
  A* const h = static_cast<A*>(a.h.data);
  for (int64_t i = 0; i < a.segments.begins[0]; ++i) {
    A* const row = h + a.segments.order[i] * rank;
    for (int64_t j = 0; j < rank; ++j) row[j] = A(0);
  }
  const int64_t bytes = columns * (kChunk * static_cast<int64_t>(sizeof(T)) + rank * 4);
  parallel_for(count_chunks(a.segments), bytes, a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) A packed[kRankBlock][kStride], block[kBlock][kStride];
    A sums[kChunk * kRankBlock];
    for_chunks(a.segments, first, last, [&](int64_t adapter, const int64_t* rows, int64_t count) {
      const Factor factor = factor_of(a.factor, adapter);
      const A scale = scale_of<A>(a.h_scale, adapter);
      for (int64_t r = 0; r < rank; r += kRankBlock) {
        const int64_t ranks = smaller(kRankBlock, rank - r);
        __builtin_memset(sums, 0, static_cast<size_t>(count * ranks) * sizeof(A));
        for (int64_t c = 0; c < columns; c += kSpan) {
          const int64_t n = smaller(kSpan, columns - c);
          const int64_t wide = ceil_div(n, kLoraPad) * kLoraPad;
          pack_span(factor, r, ranks, c, n, wide, &packed[0][0], kStride);
          for (int64_t t = 0; t < count; t += kBlock) {
            const int64_t some = smaller(kBlock, count - t);
            const Rows<A> from = gather(x, columns, a.dropout, rows + t, some, c, n, wide, block);
            dot_block(from.data, from.stride, some, Rows<A>{&packed[0][0], kStride}, ranks, wide,
                      sums + t * ranks);
          }
        }
        for (int64_t t = 0; t < count; ++t) {
          A* const to = h + rows[t] * rank + r;
          for (int64_t j = 0; j < ranks; ++j) to[j] = scale * sums[t * ranks + j];
        }
      }
    });
  });
}

template <class T> void shrink_outer(const SegmentedShrink& a) {
  using A = Accumulator<T>;
  const int64_t columns = a.columns, rank = a.rank, spans = ceil_div(columns, kSpan);
  const T* const x = static_cast<const T*>(a.x);
  const A* const g = static_cast<const A*>(a.g.data);
  A* const out = static_cast<A*>(a.outer.data);
  advise_huge_pages(out, static_cast<size_t>(a.segments.adapters * rank * columns) * sizeof(A));
  const int64_t tasks = a.segments.adapters * spans;
  const int64_t bytes =
      (a.tokens * static_cast<int64_t>(sizeof(T)) + a.segments.adapters * rank * 4) * columns;
  parallel_for(
      tasks, bytes / (tasks ? tasks : 1), a.place.threads, [&](int64_t first, int64_t last) {
        alignas(64) A sum[kRankBlock][kStride], block[kBlock][kStride];
        A own_g[kBlock * kRankBlock];
        for (int64_t task = first; task < last; ++task) {
          const int64_t adapter = task / spans, c = task % spans * kSpan;
          const int64_t n = smaller(kSpan, columns - c), wide = ceil_div(n, kLoraPad) * kLoraPad;
          const int64_t* const rows = a.segments.order + a.segments.begins[adapter];
          const int64_t count = a.segments.begins[adapter + 1] - a.segments.begins[adapter];
          const A scale = scale_of<A>(a.outer_scale, adapter);
          for (int64_t r = 0; r < rank; r += kRankBlock) {
            const int64_t ranks = smaller(kRankBlock, rank - r);
            __builtin_memset(sum, 0, static_cast<size_t>(ranks) * sizeof(sum[0]));
            for (int64_t t = 0; t < count; t += kBlock) {
              const int64_t some = smaller(kBlock, count - t);
              for (int64_t i = 0; i < some; ++i) {
                const A* const from = g + rows[t + i] * rank + r;
                for (int64_t j = 0; j < ranks; ++j) own_g[i * ranks + j] = from[j];
              }
              const Rows<A> from = gather(x, columns, a.dropout, rows + t, some, c, n, wide, block);
              outer_block(from.data, from.stride, some, own_g, ranks, wide, &sum[0][0], kStride);
            }
            if (a.turned) {
              A* const to = out + (adapter * columns + c) * rank + r;
              for (int64_t k = 0; k < n; ++k) {
                for (int64_t j = 0; j < ranks; ++j) to[k * rank + j] = scale * sum[j][k];
              }
            } else {
              A* const to = out + (adapter * rank + r) * columns + c;
              for (int64_t j = 0; j < ranks; ++j) {
                for (int64_t k = 0; k < n; ++k) to[j * columns + k] = scale * sum[j][k];
              }
            }
          }
        }
      });
}

template <class T> void shrink_t(const SegmentedShrink& a) {
  if (a.h) shrink_h<T>(a);
  if (a.outer) shrink_outer<T>(a);
}

void shrink(const SegmentedShrink& a) {
  by_dtype(a.dtype, [&]<class T>(T) { shrink_t<T>(a); });
}

// ---- expand -------------------------------------------------------------------------------------

// before (R, n) += h (R, ranks)·factor; the last block of ranks goes on into y.
template <int R, class T>
FF_INLINE void expand_rows(const SegmentedExpand& a, const int64_t* rows, int64_t c, int64_t n,
                           const Accumulator<T>* h, int64_t ranks, const Rows<Accumulator<T>>& p,
                           bool first, bool last, Accumulator<T>* before) {
  using A = Accumulator<T>;
  constexpr int N = kLanes<T>;
  alignas(64) A keep[R][kSpan];
  const bool drops = last && a.dropout.seed != nullptr;
  for (int t = 0; drops && t < R; ++t) {
    keep_factors(a.dropout, static_cast<uint64_t>(rows[t] * a.columns + c), n, keep[t]);
  }
  for (int64_t k = 0; k < n; k += 2 * N) {
    typename Simd<A>::V sum[R][2];
    broadcast_tile<R>(h, 1, ranks, p.data + k, p.stride, ranks, sum);
    for (int t = 0; t < R; ++t) {
      for (int half = 0; half < 2 && k + half * N < n; ++half) {
        const int64_t at = k + half * N;
        auto v = sum[t][half];
        A* const partial = before + t * kStride + at;
        if (!first) v += load(partial);
        if (!last) {
          store(partial, v);
          continue;
        }
        T* const to = static_cast<T*>(a.y) + rows[t] * a.columns + c + at;
        if (at + N <= n) {
          if (__builtin_expect(drops, 0)) v *= load(keep[t] + at);
          store(to, v + load(to));
        } else {
          const int left = static_cast<int>(n - at);
          if (drops) v *= load_partial(keep[t] + at, left, 0.0);
          store_partial(to, v + load_partial(to, left, 0.0), left);
        }
      }
    }
  }
}

template <class T> void expand_t(const SegmentedExpand& a) {
  using A = Accumulator<T>;
  const int64_t columns = a.columns, rank = a.rank, groups = ceil_div(columns, kGroup);
  const A* const h = static_cast<const A*>(a.h.data);
  const int64_t bytes = kGroup * (kChunk * 2 * static_cast<int64_t>(sizeof(T)) + rank * 4);
  parallel_for(
      count_chunks(a.segments) * groups, bytes, a.place.threads, [&](int64_t first, int64_t last) {
        alignas(64) A packed[kRankBlock][kStride], before[kChunk][kStride];
        A own_h[kChunk * kRankBlock];
        int64_t chunk = first / groups;
        for_chunks(a.segments, chunk, ceil_div(last, groups),
                   [&](int64_t adapter, const int64_t* rows, int64_t count) {
                     const Factor factor = factor_of(a.factor, adapter);
                     const A scale = scale_of<A>(a.scale, adapter);
                     const int64_t begin = chunk * groups < first ? first - chunk * groups : 0;
                     const int64_t end = smaller(groups, last - chunk * groups);
                     ++chunk;
                     for (int64_t c = begin * kGroup; c < smaller(end * kGroup, columns);
                          c += kSpan) {
                       const int64_t n = smaller(kSpan, columns - c);
                       const int64_t wide = ceil_div(n, kLoraPad) * kLoraPad;
                       for (int64_t r = 0; r < rank; r += kRankBlock) {
                         const int64_t ranks = smaller(kRankBlock, rank - r);
                         const bool is_first = r == 0, is_last = r + kRankBlock >= rank;
                         const Rows<A> p{&packed[0][0], kStride};
                         pack_span(factor, r, ranks, c, n, wide, &packed[0][0], kStride);
                         for (int64_t t = 0; t < count; ++t) {
                           for (int64_t j = 0; j < ranks; ++j) {
                             own_h[t * ranks + j] = scale * h[rows[t] * rank + r + j];
                           }
                         }
                         int64_t t = 0;
                         for (; t + kRows <= count; t += kRows) {
                           expand_rows<kRows, T>(a, rows + t, c, n, own_h + t * ranks, ranks, p,
                                                 is_first, is_last, before[t]);
                         }
                         for (; t < count; ++t) {
                           expand_rows<1, T>(a, rows + t, c, n, own_h + t * ranks, ranks, p,
                                             is_first, is_last, before[t]);
                         }
                       }
                     }
                   });
      });
}

void expand(const SegmentedExpand& a) {
  by_dtype(a.dtype, [&]<class T>(T) { expand_t<T>(a); });
}

}  // namespace

const SegmentedKernels& segmented_kernels() {
  static constexpr SegmentedKernels kernels{first_bad_adapter, rows, shrink, expand};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
