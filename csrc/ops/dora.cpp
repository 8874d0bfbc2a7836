// Weight-decomposed updates on the CPU.
//
//   pass             reads + writes                multiply-adds             bound by
//   norm             the weight; A in cache        rows·columns·rank         arithmetic
//   scale            z, y (and y before)           tokens·columns            memory
//   scale_backward   dy, z, dz                     2·tokens·columns          memory
//
// Norm: sums W + scale·B A of a few rows and two vectors of columns, in registers, and squares them
// there. The expansion ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² would take as many multiply-adds for W Aᵀ, and
// cancels where the update comes near -W. Squares are added in float32 over a span of columns,
// float64 beyond.
#include "ops/dora.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "ops/lora_tiles.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kNormRows = 64;  // of a task
template <int R> struct Count {};

// sums[i] += Σ (W + scale·B A)² over n columns of R rows; b is (rank, rows) from the first of them
// on.
template <int R, class T>
FF_INLINE void square_rows(const T* weight, int64_t columns, int64_t c, int64_t n,
                           const Rows<Accumulator<T>>& b, int64_t rank,
                           const Rows<Accumulator<T>>& a, double scale, double* sums) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const V s = splat<V>(scale);
  V squares[R] = {}, sum[R][2];
  for (int64_t k = 0; k < n; k += 2 * N) {
    broadcast_tile<R>(b.data, b.stride, 1, a.data + c + k, a.stride, rank, sum);
    for (int i = 0; i < R; ++i) {
      const T* w = weight + i * columns + c + k;
      for (int half = 0; half < 2 && k + half * N < n; ++half, w += N) {
        const int64_t left = n - k - half * N;
        const V before = left >= N ? load(w) : load_partial(w, static_cast<int>(left), 0.0);
        const V v = fma(sum[i][half], s, before);
        squares[i] = fma(v, v, squares[i]);
      }
    }
  }
  for (int i = 0; i < R; ++i) sums[i] += lane_sum(squares[i]);
}

template <class T> void norm_t(const DoraNorm& a) {
  using A = Accumulator<T>;
  const int64_t rank = a.rank, columns = a.columns;
  const T* const weight = static_cast<const T*>(a.weight);
  A* const memory = static_cast<A*>(a.workspace);
  const Rows<A> lora_a = rows_of(a.lora_a, rank, columns, memory, a.place.threads);
  const Rows<A> lora_b =
      rows_of(a.lora_b, rank, a.rows, memory + rank * lora_padded(columns), a.place.threads);
  parallel_for(ceil_div(a.rows, kNormRows), kNormRows * columns * static_cast<int64_t>(sizeof(T)),
               a.place.threads, [&](int64_t first, int64_t last) {
                 for (int64_t task = first; task < last; ++task) {
                   const int64_t row = task * kNormRows, end = smaller(row + kNormRows, a.rows);
                   double sums[kNormRows] = {};
                   for (int64_t c = 0; c < columns; c += kSpan) {
                     const int64_t n = smaller(kSpan, columns - c);
                     int64_t i = row;
                     const auto rows = [&]<int R>(Count<R>) {
                       for (; i + R <= end; i += R) {
                         square_rows<R>(weight + i * columns, columns, c, n,
                                        Rows<A>{lora_b.data + i, lora_b.stride}, rank, lora_a,
                                        a.scale, sums + (i - row));
                       }
                     };
                     rows(Count<kRows>{});
                     rows(Count<1>{});
                   }
                   for (int64_t i = row; i < end; ++i) {
                     a.norm.set(i, __builtin_sqrt(sums[i - row]));
                   }
                 }
               });
}

void norm(const DoraNorm& a) {
  by_dtype(a.dtype, [&]<class T>(T) { norm_t<T>(a); });
}

// ---- columns scaled -----------------------------------------------------------------------------

// body(k, how many) over n numbers, a vector at a time: Whole, or at the end an int.
struct Whole {};
template <int N, class Body> FF_INLINE void vectors(int64_t n, const Body& body) {
  int64_t k = 0;
  for (; k + N <= n; k += N) body(k, Whole{});
  if (k < n) body(k, static_cast<int>(n - k));
}

template <class T> FF_INLINE Vec<T> load_some(const T* p, Whole) { return load(p); }
template <class T> FF_INLINE Vec<T> load_some(const T* p, int n) { return load_partial(p, n, 0.0); }
template <class T> FF_INLINE void store_some(T* p, Vec<T> v, Whole) { store(p, v); }
template <class T> FF_INLINE void store_some(T* p, Vec<T> v, int n) { store_partial(p, v, n); }

template <class T> void scale_t(const DoraScale& a) {
  using A = Accumulator<T>;
  const int64_t columns = a.columns;
  const A* const factor = static_cast<const A*>(a.factor.data);
  const T *const z = static_cast<const T*>(a.z), *const bias = static_cast<const T*>(a.bias);
  T* const y = static_cast<T*>(a.y);
  if (!a.accumulate && y != z) {
    advise_huge_pages(y, static_cast<size_t>(a.tokens * columns) * sizeof(T));
  }
  parallel_for(a.tokens, columns * static_cast<int64_t>(3 * sizeof(T)), a.place.threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t t = first; t < last; ++t) {
                   const int64_t row = t * columns;
                   vectors<kLanes<T>>(columns, [&](int64_t k, auto n) FF_LAMBDA {
                     auto v = load_some(factor + k, n) * load_some(z + row + k, n);
                     if (bias != nullptr) v += load_some(bias + k, n);
                     if (a.accumulate) v += load_some(y + row + k, n);
                     store_some(y + row + k, v, n);
                   });
                 }
               });
}

void scale(const DoraScale& a) {
  by_dtype(a.dtype, [&]<class T>(T) { scale_t<T>(a); });
}

template <class T> void scale_backward_t(const DoraScaleBackward& a) {
  using A = Accumulator<T>;
  const int64_t columns = a.columns, chunks = ceil_div(a.tokens, kDoraTokens);
  const A* const factor = static_cast<const A*>(a.factor.data);
  const T *const dy = static_cast<const T*>(a.dy), *const z = static_cast<const T*>(a.z);
  T* const dz = static_cast<T*>(a.dz);
  A* const partial = static_cast<A*>(a.workspace);  // (chunks, columns)
  if (dz != nullptr && dz != dy) {
    advise_huge_pages(dz, static_cast<size_t>(a.tokens * columns) * sizeof(T));
  }
  parallel_for(chunks, kDoraTokens * columns * static_cast<int64_t>(3 * sizeof(T)), a.place.threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t chunk = first; chunk < last; ++chunk) {
                   A* const sum = partial + chunk * columns;
                   if (a.sum) __builtin_memset(sum, 0, static_cast<size_t>(columns) * sizeof(A));
                   const int64_t end = smaller((chunk + 1) * kDoraTokens, a.tokens);
                   for (int64_t t = chunk * kDoraTokens; t < end; ++t) {
                     const int64_t row = t * columns;
                     vectors<kLanes<T>>(columns, [&](int64_t k, auto n) FF_LAMBDA {
                       const auto v = load_some(dy + row + k, n);
                       if (a.sum) {
                         store_some(sum + k,
                                    fma(v, load_some(z + row + k, n), load_some(sum + k, n)), n);
                       }
                       if (dz != nullptr) store_some(dz + row + k, v * load_some(factor + k, n), n);
                     });
                   }
                 }
               });
  if (!a.sum) return;
  A* const out = static_cast<A*>(a.sum.data);
  for (int64_t k = 0; k < columns; ++k) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * columns + k];
    out[k] = static_cast<A>(total);
  }
}

void scale_backward(const DoraScaleBackward& a) {
  by_dtype(a.dtype, [&]<class T>(T) { scale_backward_t<T>(a); });
}

}  // namespace

const DoraKernels& dora_kernels() {
  static constexpr DoraKernels kernels{norm, scale, scale_backward};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
