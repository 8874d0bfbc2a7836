// The two passes over a row of logits, statistics and gradient, by one block: softmax_row.h on a
// GPU.
//
// Each thread walks 16-byte vectors, four of them loaded before the first is used, and keeps sums
// relative to the largest logit of its own; e^{z - max} is one ex2 an element. About 9 instructions
// an element, 10 with entropy: at bfloat16 that is near what an H200 issues while it loads, so
// memory bounds both passes. Accumulated in float32 a thread (V / 512 elements), in float64 between
// threads.
#pragma once
#include <math.h>

#include "core/cuda_utils.cuh"
#include "core/logit_rows.h"

namespace finefuse::cuda {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr int kUnroll = 4;  // vectors in flight a thread

// What one thread has seen: `top` the largest, `ties` how often, `sum` the terms of all others.
template <class A, bool kEntropy, bool kLogitSum> struct Running {
  A top = kLowest<A>, sum = 0, ties = 0, dot = 0, logits = 0, count = 0;

  template <int K> __device__ __forceinline__ void add(const A (&x)[K], A c) {
    A highest = x[0];
    FF_UNROLL for (int k = 1; k < K; ++k) highest = max_of(highest, x[k]);
    if (highest > top) rise(highest, c);
    FF_UNROLL for (int k = 0; k < K; ++k) {
      const A d = x[k] - top, e = exp2_fast(d * c);
      if (d == 0)
        ties += 1;
      else
        sum += e;  // NaN comes here
      if constexpr (kEntropy) {
        if (e != 0) dot += d * e;  // not -inf·0
      }
      if constexpr (kLogitSum) logits += d;
    }
    if constexpr (kLogitSum) count += K;
  }

  __device__ __forceinline__ void rise(A highest, A c) {
    const A shift = top - highest, before = sum + ties;
    if (before != 0) {
      const A scale = exp2_fast(shift * c);
      if constexpr (kEntropy)
        dot = scale == 0 ? A{0} : scale * (dot + shift * before);  // shift may be -inf
      sum = scale * before;
      ties = 0;
    }
    if constexpr (kLogitSum) {
      if (count != 0) logits += count * shift;
    }
    top = highest;
  }
};

// What all threads have seen of a row of n; thread 0's return value counts.
template <class A, bool kEntropy, bool kLogitSum>
__device__ RowStats stats_of_threads(const Running<A, kEntropy, kLogitSum>& own, int64_t n, A c) {
  const A top = block_max(own.top);
  const A shift = own.top - top, total = own.sum + own.ties;
  const bool highest = shift == 0;
  double sums[4] = {0, 0, 0, 0};  // ties at the top, all other terms, dot, logits
  if (total != 0) {
    const double scale = static_cast<double>(highest ? A{1} : exp2_fast(shift * c));
    sums[0] = highest ? static_cast<double>(own.ties) : 0.0;
    sums[1] = highest ? static_cast<double>(own.sum) : scale * static_cast<double>(total);
    if (scale != 0)
      sums[2] = scale * (static_cast<double>(own.dot) + static_cast<double>(shift) * total);
  }
  if (kLogitSum && own.count != 0) {
    sums[3] = static_cast<double>(own.logits) + static_cast<double>(own.count) * shift;
  }
  block_sum(sums);
  const double ref = static_cast<double>(top);
  RowStats s{ref, sums[1] + (sums[0] - 1.0), sums[2], sums[3] + ref * static_cast<double>(n)};
  if (s.excess == -1.0) s.ref = -INFINITY;  // nothing above -inf
  return s;
}

// Thread 0's return value counts. `stage`, shared memory as misaligned as `z`, gets a copy of the
// row where it is not null.
template <class T, bool kEntropy, bool kLogitSum, Access kAccess>
__device__ RowStats row_stats(const T* z, int64_t n, double temperature, T* stage) {
  using A = Accumulator<T>;
  constexpr int N = Vector<T>::kSize;
  const A c = static_cast<A>(kLog2e / temperature);
  Running<A, kEntropy, kLogitSum> own;
  const Span span = vector_span(z, z, n);
  const auto one = [&](int64_t i) {
    const A x[1] = {to_accumulator(z[i])};
    if (stage != nullptr) stage[i] = z[i];
    own.add(x, c);
  };
  const auto vectors = [&]<int U>(int64_t i, int64_t step) {
    Vector<T> v[U];
    FF_UNROLL
    for (int u = 0; u < U; ++u) v[u] = load<kAccess>(z + i + u * step);
    FF_UNROLL
    for (int u = 0; u < U; ++u) {
      if (stage != nullptr) store_shared(stage + i + u * step, v[u]);
      A x[N];
      FF_UNROLL
      for (int k = 0; k < N; ++k) x[k] = to_accumulator(v[u].x[k]);
      own.add(x, c);
    }
  };
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * N;
  for (; i + (kUnroll - 1) * step < span.tail; i += kUnroll * step) {
    vectors.template operator()<kUnroll>(i, step);
  }
  for (; i < span.tail; i += step) vectors.template operator()<1>(i, step);
  for (i = threadIdx.x; i < span.head; i += blockDim.x) one(i);
  for (i = span.tail + threadIdx.x; i < n; i += blockDim.x) one(i);
  return stats_of_threads(own, n, c);
}

// `z` may be `out` itself, or the copy in shared memory (Access::keep).
template <class T, bool kEntropy, Access kAccess>
__device__ void row_gradient(const T* z, T* out, int64_t n, const RowGradient& g) {
  using A = Accumulator<T>;
  constexpr int N = Vector<T>::kSize;
  constexpr int kAhead = kAccess == Access::keep ? 2 : kUnroll;  // shared memory answers sooner
  const A c = static_cast<A>(kLog2e / g.temperature), ref = static_cast<A>(g.ref);
  const A a = static_cast<A>(g.a), b = static_cast<A>(g.b), offset = static_cast<A>(g.offset);
  const auto value = [&](T x) {
    const A d = to_accumulator(x) - ref, e = exp2_fast(d * c);
    if constexpr (kEntropy)
      return e * (e == 0 ? a : a + b * d) + offset;  // not 0·inf, but NaN in a
    return e * a + offset;
  };
  const auto vectors = [&]<int U>(int64_t i, int64_t step) {
    Vector<T> v[U];
    FF_UNROLL for (int u = 0; u < U; ++u) v[u] = load<kAccess>(z + i + u * step);
    FF_UNROLL for (int u = 0; u < U; ++u) {
      FF_UNROLL for (int k = 0; k < N; ++k) store_value(&v[u].x[k], value(v[u].x[k]));
      store(out + i + u * step, v[u]);
    }
  };
  const Span span = vector_span<T>(z, out, n);
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * N;
  for (; i + (kAhead - 1) * step < span.tail; i += kAhead * step) {
    vectors.template operator()<kAhead>(i, step);
  }
  for (; i < span.tail; i += step) vectors.template operator()<1>(i, step);
  for (i = threadIdx.x; i < span.head; i += blockDim.x) store_value(out + i, value(z[i]));
  for (i = span.tail + threadIdx.x; i < n; i += blockDim.x) store_value(out + i, value(z[i]));
}

// out = in·factor; with factor 0 exact zeros, whatever stands in `in`, which is not read.
template <class T> __device__ void row_scale(const T* in, T* out, int64_t n, double factor) {
  using A = Accumulator<T>;
  constexpr int N = Vector<T>::kSize;
  const A w = static_cast<A>(factor);
  const bool zero = factor == 0;
  const Span span = vector_span<T>(out, out, n);
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * N; i < span.tail; i += step) {
    Vector<T> v{};
    if (!zero) {
      v = load<Access::stream>(in + i);
      FF_UNROLL for (int k = 0; k < N; ++k) store_value(&v.x[k], to_accumulator(v.x[k]) * w);
    }
    store(out + i, v);
  }
  const auto one = [&](int64_t i) {
    store_value(out + i, zero ? A{0} : to_accumulator(in[i]) * w);
  };
  for (int64_t i = threadIdx.x; i < span.head; i += blockDim.x) one(i);
  for (int64_t i = span.tail + threadIdx.x; i < n; i += blockDim.x) one(i);
}

template <class T> __device__ void row_zero(T* out, int64_t n) { row_scale<T>(out, out, n, 0.0); }

}  // namespace finefuse::cuda
