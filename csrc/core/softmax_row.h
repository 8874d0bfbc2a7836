// The two passes over a row of logits that every loss from logits is made of: statistics, gradient.
//
// Statistics read the row once (sizeof(T) bytes an element) and are bound by memory, or by about 14
// vector instructions a vector where the row is in cache. The gradient reads once and writes once.
// Everything is relative to a reference logit `ref` near the row's maximum, not to lse rounded to
// float32: z - ref is exact or nearly so, and the rest is folded into the row's coefficients in
// double, so probabilities keep float32's relative accuracy however large the logits are.
#pragma once
#include <math.h>

#include "core/logit_rows.h"
#include "core/memory.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {

namespace detail {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr int kUnroll = 4;
inline constexpr int64_t kBlock = 2048;  // elements; read again in the rare case that ref must rise

template <class T> FF_INLINE double block_top(const T* z, int64_t n) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const double minus_inf = -__builtin_inf();
  V top[2] = {splat<V>(minus_inf), splat<V>(minus_inf)};
  int64_t i = 0;
  for (; i + 2 * N <= n; i += 2 * N) {
    V x[2];
    load_pair(z + i, x);
    top[0] = max(x[0], top[0]);
    top[1] = max(x[1], top[1]);
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    top[0] = max(load_partial(z + i, k, minus_inf), top[0]);
  }
  return horizontal_max(max(top[0], top[1]));
}

// The sums of one block relative to `ref`. What an addition rounds away goes to a second
// accumulator; the first starts at 4, larger than any term (the block counts only if no logit is
// more than T above ref, so e <= 2.72), and so the part lost is exact: beside a term of 1 the many
// small ones survive.
struct BlockSums {
  double top, high, low, dot, logit_sum;  // Σ e = high + low
};

template <class T, bool kEntropy, bool kLogitSum>
FF_INLINE void add_block(const T* z, int64_t n, double ref, double c, double floor,
                         BlockSums* sums) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const double minus_inf = -__builtin_inf();
  const V vref = splat<V>(ref), vfloor = splat<V>(floor);
  V vtop = splat<V>(minus_inf), vsum = splat<V>(4), vlost = {}, vdot = {}, vlogits = {};
  const auto add = [&]<int K>(V(&x)[K]) FF_LAMBDA {
    V e[K];
    for (int u = 0; u < K; ++u) vtop = max(x[u], vtop);
    for (int u = 0; u < K; ++u) x[u] -= vref;
    exp_scaled<kEntropy ? Precision::exact : Precision::full>(x, e, c, vfloor);
    for (int u = 0; u < K; ++u) {
      const V sum = vsum + e[u];
      vlost += e[u] - (sum - vsum);
      vsum = sum;
    }
    if constexpr (kEntropy) {
      for (int u = 0; u < K; ++u) vdot = fma(e[u], x[u], vdot);
    }
  };
  int64_t i = 0;
  for (; i + kUnroll * N <= n; i += kUnroll * N) {
    V x[kUnroll];
    for (int u = 0; u < kUnroll; u += 2) load_pair(z + i + u * N, x + u);
    if constexpr (kLogitSum) {
      for (int u = 0; u < kUnroll; ++u) vlogits += x[u] - vref;
    }
    add(x);
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    if constexpr (kLogitSum) vlogits += load_partial(z + i, k, ref) - vref;
    V x[1] = {load_partial(z + i, k, minus_inf)};
    add(x);
  }
  sums->top = horizontal_max(vtop);
  sums->high = horizontal_sum(vsum - splat<V>(4));
  sums->low = horizontal_sum(vlost);
  sums->dot = kEntropy ? horizontal_sum(vdot) : 0.0;
  sums->logit_sum = kLogitSum ? horizontal_sum(vlogits) + ref * static_cast<double>(n) : 0.0;
}

}  // namespace detail

// One pass. `ref` is the maximum of the first block and stays there unless a later block rises more
// than T above it; only then is that block (still in cache) done again and what was summed so far
// rescaled. So ref always has a term of its own in the sum, e^0 = 1 exactly. Accumulated in float
// per block and lane, then in double (all double for double).
template <class T, bool kEntropy, bool kLogitSum>
inline RowStats row_stats(const T* z, int64_t n, double temperature) {
  using detail::kBlock;
  using A = Accumulator<T>;
  const double c = detail::kLog2e / temperature, floor = exp_floor<A>(c);
  const double minus_inf = -__builtin_inf();
  RowStats total{minus_inf, -1.0, 0.0, 0.0};  // an empty sum
  detail::BlockSums block{};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    double ref = total.ref;
    if (ref == minus_inf) ref = detail::block_top(z + i, count);  // only -inf before
    const double usable = ref == minus_inf ? 0.0 : ref;           // -inf - 0: e = 0; NaN stays NaN
    detail::add_block<T, kEntropy, kLogitSum>(z + i, count, usable, c, floor, &block);
    if (block.top > ref + temperature) {
      ref = block.top;
      detail::add_block<T, kEntropy, kLogitSum>(z + i, count, ref, c, floor, &block);
    }
    if (ref != total.ref) {
      double before = total.sum();  // 0, or NaN, where there was only -inf
      if (total.ref != minus_inf) {
        const double shift = total.ref - ref, scale = exp(shift / temperature);
        total.dot = scale * (total.dot + shift * before);
        before *= scale;
      }
      total.excess = before;
      total.ref = ref;
      block.high -= 1.0;
    }
    total.excess += block.high + block.low;
    total.dot += block.dot;
    total.logit_sum += block.logit_sum;
  }
  return total;
}

// kStream writes past the caches: for outputs larger than they are. `out` may be `z` itself.
template <class T, bool kEntropy, bool kStream>
inline void row_gradient(const T* z, T* out, int64_t n, const RowGradient& g) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  using detail::kUnroll;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::half : Precision::full;
  const double c = detail::kLog2e / g.temperature;
  const V ref = splat<V>(g.ref), floor = splat<V>(exp_floor<Accumulator<T>>(c));
  const V a = splat<V>(g.a), b = splat<V>(g.b), offset = splat<V>(g.offset);
  const auto value = [&]<int K>(V(&x)[K]) FF_LAMBDA {
    V e[K];
    for (int u = 0; u < K; ++u) x[u] -= ref;
    exp_scaled<kPrecision>(x, e, c, floor);
    for (int u = 0; u < K; ++u) {
      if constexpr (kEntropy)
        x[u] = fma(e[u], fma(b, x[u], a), offset);
      else
        x[u] = fma(e[u], a, offset);
    }
  };
  const auto partial = [&](int64_t i, int k) FF_LAMBDA {
    V x[1] = {load_partial(z + i, k, 0.0)};
    value(x);
    store_partial(out + i, x[0], k);
  };
  int64_t i = 0;
  if (!(g.ref - g.ref + g.a - g.a + g.b - g.b + g.offset - g.offset == 0.0)) {
    for (; i < n; i += N) partial(i, n - i < N ? static_cast<int>(n - i) : N);  // a NaN in the row
    return;
  }
  if constexpr (kStream) {  // up to the first aligned element
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kStreamAlign);
    int64_t head = past == 0 ? 0 : (kStreamAlign - past) / static_cast<int64_t>(sizeof(T));
    if (head > n) head = n;
    for (; i < head; i += N) partial(i, head - i < N ? static_cast<int>(head - i) : N);
    i = head;
  }
  for (; i + kUnroll * N <= n; i += kUnroll * N) {
    V x[kUnroll];
    for (int u = 0; u < kUnroll; u += 2) load_pair(z + i + u * N, x + u);
    value(x);
    for (int u = 0; u < kUnroll; u += 2) store_pair_finite<kStream>(out + i + u * N, x + u);
  }
  for (; i < n; i += N) partial(i, n - i < N ? static_cast<int>(n - i) : N);
}

template <class T> inline void row_zero(T* out, int64_t n) {
  __builtin_memset(out, 0, static_cast<size_t>(n) * sizeof(T));
}

// ---- the gradient of a batch of rows ----

// Advises a fresh gradient to huge pages, before it is written; whether to write past the caches.
template <class T>
inline bool prepare_gradient(const LogitRows& gradient, const LogitRows& logits,
                             const LogitsShape& shape) {
  if (gradient.data == nullptr || gradient.data == logits.data) return false;
  const int64_t bytes = shape.rows * shape.vocab * static_cast<int64_t>(sizeof(T));
  advise_huge_pages(gradient.data, static_cast<size_t>(bytes));
  return bytes > kStreamBytes;
}

template <class T>
inline void write_gradient(const T* z, T* out, int64_t vocab, const RowGradient& g, bool entropy,
                           bool stream) {
  if (entropy) {
    if (stream)
      row_gradient<T, true, true>(z, out, vocab, g);
    else
      row_gradient<T, true, false>(z, out, vocab, g);
  } else {
    if (stream)
      row_gradient<T, false, true>(z, out, vocab, g);
    else
      row_gradient<T, false, false>(z, out, vocab, g);
  }
}

// ---- the losses of a batch of rows ----

// A number each (Reduction::none), or one of all: kept in `scratch` and added up in order, so that
// it does not depend on who computed which. `count`: the rows that count, in a mean.
template <class Args> struct RowLosses {
  const Args& a;
  bool by_row;
  double share, common;  // of a row in the loss, and that times an upstream gradient they share

  RowLosses(const Args& args, int64_t count) : a(args), by_row(a.reduction == Reduction::none) {
    const double mean = count == 0 ? 0.0 : 1.0 / static_cast<double>(count);
    share = a.reduction == Reduction::mean ? mean : 1.0;
    common = a.upstream && !by_row ? share * a.upstream[0] : share;
  }
  // What the gradient of row r's loss is multiplied by.
  double weight(int64_t r) const { return by_row && a.upstream ? a.upstream[r] : common; }
  void put(int64_t r, double loss) const {
    if (!by_row)
      a.scratch[r] = loss;
    else if (a.loss)
      a.loss.set(r, loss);
  }
  void finish() const {
    if (by_row || !a.loss) return;
    double sum = 0.0;
    for (int64_t r = 0; r < a.shape.rows; ++r) sum += a.scratch[r];
    a.loss.set(0, share * sum);
  }
};

}  // namespace finefuse::FF_ISA_NS
