// Distillation from logits on the CPU: student and teacher are read from memory once.
//
// clang-format off
//   pass over a row                     exponentials, logarithms an element   reads from
//   statistics                          2, 0                                  memory (sizeof student + teacher)
//   jsd: both divergences               3, 1                                  cache
//   gradient                            2; reverse 1; jsd 2, 1                cache; writes sizeof student
//   cross-entropy at T != 1, and its    1 each                                cache
//   gradient
// clang-format on
//
// The row's log-sum-exps and, for the KLs, Σ e·(difference of the logits) are found in one pass.
// The gradient follows while both rows are in the cache. Between the two nothing of a row is kept.
//
// A block of 2048 elements at a time, widened where student or teacher are of another type than
// what is accumulated (ops/distill_rows.h). float32 accumulators per block, double beyond (all
// double for a float64 student). Rows are split over threads whole, so nothing depends on their
// number; rows that do not count are never read.
//
// The gradient of jsd, of nearly equal or peaked rows, is a small difference: log(p/m) comes from
// the difference of the logits, not from p and m, and KL(p‖m) is summed with what rounding loses.
//
// Targets and the teacher's indices were checked, but another thread of the caller may write them
// meanwhile: one that is out of range now is not followed.
#include "ops/distill.h"

#include "core/parallel.h"
#include "core/softmax_row.h"
#include "ops/distill_rows.h"

namespace finefuse::FF_ISA_NS {
namespace {

using detail::kLog2e;

constexpr double kNan = __builtin_nan(""), kMinusInf = -__builtin_inf();
constexpr int kPair = 2;   // vectors of each row at a time: four exponentials in flight
constexpr int kAlone = 1;  // where logarithms of m are taken: two would not stay in registers

bool finite(double x) { return x - x == 0.0; }

// ---- statistics ----

// Σ e = 1 + excess relative to a logit `ref` near the maximum, as RowStats has it.
struct Sum {
  double ref = kMinusInf, excess = -1.0;
  double sum() const { return 1.0 + excess; }
  double log_sum() const { return log1p(excess); }
  bool good() const { return finite(ref) && finite(excess) && sum() > 0.0; }

  // The block's own sum, high + low, relative to `to`; how much what was before shrinks by that.
  double add(double to, double high, double low, double temperature) {
    double scale = 1.0;
    if (to != ref) {
      double before = sum();  // 0, or NaN, where there was only -inf
      if (ref != kMinusInf) before *= scale = exp((ref - to) / temperature);
      excess = before;
      ref = to;
      high -= 1.0;
    }
    excess += high + low;
    return scale;
  }
};

// One accumulator of Σ e and what its additions round away: see BlockSums in softmax_row.h.
template <class A> struct Compensated {
  Vec<A> sum = splat<Vec<A>>(4), lost = {};
  FF_INLINE void add(Vec<A> e) {
    const Vec<A> s = sum + e;
    lost += e - (s - sum);
    sum = s;
  }
  double high() const { return horizontal_sum(sum - splat<Vec<A>>(4)); }
  double low() const { return horizontal_sum(lost); }
};

struct Scale {  // of the exponent
  double temperature, c, floor;
};
template <class A> Scale scale_of(double temperature) {
  const double c = kLog2e / temperature;
  return {temperature, c, exp_floor<A>(c)};
}

// d where e is not 0, else 0: what weighs nothing adds nothing, be d infinite.
template <class V> FF_INLINE V where_positive(V e, V d) { return e > V{} ? d : V{}; }

struct PairSums {
  double top[2], high[2], low[2], dot;  // student, teacher
};

// kKind: which of Σ e_t·(t - s), Σ e_s·(s - t) comes along, relative to the refs; jsd none.
template <class A, DistillKind kKind>
void add_block(const A* s, const A* t, int64_t n, double ref_s, double ref_t, const Scale& scale,
               PairSums* sums) {
  using V = Vec<A>;
  constexpr int N = kLanes<A>;
  const V vref_s = splat<V>(ref_s), vref_t = splat<V>(ref_t), floor = splat<V>(scale.floor);
  V top_s = splat<V>(kMinusInf), top_t = top_s, dot = {};
  Compensated<A> sum_s, sum_t;
  const auto add = [&]<int K>(V(&x)[K], V(&y)[K]) FF_LAMBDA {
    V e[K], f[K], own[K], other[K];
    for (int u = 0; u < K; ++u) {
      top_s = max(x[u], top_s);
      top_t = max(y[u], top_t);
      x[u] -= vref_s;
      y[u] -= vref_t;
      other[u] = kKind == DistillKind::reverse_kl ? y[u] : x[u];
    }
    exp_scaled<Precision::exact>(x, e, scale.c, floor);
    exp_scaled<Precision::exact>(y, f, scale.c, floor);
    for (int u = 0; u < K; ++u) {
      sum_s.add(e[u]);
      sum_t.add(f[u]);
      if constexpr (kKind != DistillKind::jsd) {
        const V weight = kKind == DistillKind::reverse_kl ? e[u] : f[u];
        own[u] = kKind == DistillKind::reverse_kl ? x[u] : y[u];
        dot = fma(weight, where_positive(weight, own[u] - other[u]), dot);
      }
    }
  };
  int64_t i = 0;
  for (; i + kPair * N <= n; i += kPair * N) {
    V x[kPair], y[kPair];
    for (int u = 0; u < kPair; ++u) x[u] = load(s + i + u * N), y[u] = load(t + i + u * N);
    add(x, y);
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    V x[1] = {load_partial(s + i, k, kMinusInf)}, y[1] = {load_partial(t + i, k, kMinusInf)};
    add(x, y);
  }
  *sums = {{horizontal_max(top_s), horizontal_max(top_t)},
           {sum_s.high(), sum_t.high()},
           {sum_s.low(), sum_t.low()},
           horizontal_sum(dot)};
}

struct PairStats {
  Sum s, t;
  double dot = 0.0;
};

template <class A, DistillKind kKind>
PairStats pair_stats(const Row& student, const Row& teacher, int64_t n, const Scale& scale) {
  A buffer[2][kBlock];
  PairStats total;
  PairSums block{};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    const A* s = block_of(student, i, count, buffer[0]);
    const A* t = block_of(teacher, i, count, buffer[1]);
    double ref_s = total.s.ref, ref_t = total.t.ref;
    if (ref_s == kMinusInf) ref_s = detail::block_top(s, count);  // only -inf before
    if (ref_t == kMinusInf) ref_t = detail::block_top(t, count);
    const auto usable = [](double ref) { return ref == kMinusInf ? 0.0 : ref; };
    add_block<A, kKind>(s, t, count, usable(ref_s), usable(ref_t), scale, &block);
    const bool rises_s = block.top[0] > ref_s + scale.temperature;
    const bool rises_t = block.top[1] > ref_t + scale.temperature;
    if (rises_s || rises_t) {
      if (rises_s) ref_s = block.top[0];
      if (rises_t) ref_t = block.top[1];
      add_block<A, kKind>(s, t, count, usable(ref_s), usable(ref_t), scale, &block);
    }
    if constexpr (kKind != DistillKind::jsd) {
      // what was before, relative to the new refs: Σ e·(own - other) shifts and shrinks
      constexpr bool kReverse = kKind == DistillKind::reverse_kl;
      const double shift_s = total.s.ref == kMinusInf ? 0.0 : total.s.ref - ref_s;
      const double shift_t = total.t.ref == kMinusInf ? 0.0 : total.t.ref - ref_t;
      const double weight = kReverse ? total.s.sum() : total.t.sum();
      const double shift = kReverse ? shift_s - shift_t : shift_t - shift_s;
      if (weight != 0.0 && shift != 0.0) total.dot += shift * weight;
    }
    const double shrunk_s = total.s.add(ref_s, block.high[0], block.low[0], scale.temperature);
    const double shrunk_t = total.t.add(ref_t, block.high[1], block.low[1], scale.temperature);
    constexpr double gone = sizeof(A) == 4 ? 0x1p-127 : 0x1p-1022;
    const double shrunk = kKind == DistillKind::reverse_kl ? shrunk_s : shrunk_t;
    // what underflows beside the new ref weighs nothing, wherever in the row it stands
    total.dot = (shrunk < gone ? 0.0 : total.dot * shrunk) + block.dot;
  }
  return total;
}

// What jsd needs: log q - log p = ((t - from_t) - (s - from_s))/T + gap.
//
// `from` are the refs where they are far apart, so that only small numbers are rounded; else 0, so
// that of nearly equal logits nothing is.
struct Mixture {
  double from_s, from_t, inverse_temperature, gap, beta;
};

Mixture mixture_of(const PairStats& stats, double temperature, double beta) {
  const double apart = stats.s.ref - stats.t.ref;
  const double gap = stats.s.log_sum() - stats.t.log_sum(), inverse = 1.0 / temperature;
  if (apart > temperature || -apart > temperature) {
    return {stats.s.ref, stats.t.ref, inverse, gap, beta};
  }
  return {0.0, 0.0, inverse, gap + apart * inverse, beta};
}

// e^x and e^x - 1 of an x <= 0, which on return is at least -88 (-700 in double), as where it was
// NaN. Float: x = n·ln 2 + f, a series to degree 7, relative errors below 1.3e-7.
FF_INLINE void exp_of_negative(VecF* x, VecF* e, VecF* minus_one) {
  constexpr float kSeries[] = {0x1p-1f,        0x1.555554p-3f,  0x1.5554acp-5f,
                               0x1.111174p-7f, 0x1.6d75c8p-10f, 0x1.a051a4p-13f};
  const VecF magic = splat<VecF>(0x1.8p23);
  *x = max(*x, splat<VecF>(-88.0));
  const VecF k = fma(*x, splat<VecF>(0x1.715476p0), magic), n = k - magic;
  VecF f = fma(n, splat<VecF>(-0x1.62e4p-1), *x);  // so few bits that its product with n is exact
  f = fma(n, splat<VecF>(-0x1.7f7d1cp-20), f);
  VecF p = splat<VecF>(kSeries[5]);
  for (int i = 4; i >= 0; --i) p = fma(p, f, splat<VecF>(kSeries[i]));
  p = fma(p, f * f, f);
  const VecF power = (VecF)((VecI)((VecU)k << 23) + 0x3f800000);
  *e = fma(p, power, power);
  *minus_one = fma(p, power, power - 1.0f);
}
FF_INLINE void exp_of_negative(VecD* x, VecD* e, VecD* minus_one) {
  *x = max(*x, splat<VecD>(-700.0));
  exp_and_minus_one(*x, e, minus_one);
}

// log(p/m) and log(q/m), m = β·q + (1-β)·p. With d = log q - log p and w the weight in m of the
// smaller of the two, that of the larger is -log(1 + w·(e^-|d| - 1)): no digits are lost where p
// and q are nearly equal, and nothing overflows. Where p or q is 0 both are finite.
template <class V> struct MixtureLogs {
  V of_p, of_q;
};
template <class V> FF_INLINE MixtureLogs<V> mixture_logs(V s, V t, const Mixture& c) {
  const V apart = (t - splat<V>(c.from_t)) - (s - splat<V>(c.from_s));
  const V d = fma(apart, splat<V>(c.inverse_temperature), splat<V>(c.gap));
  const auto q_is_less = d < V{};
  V down = q_is_less ? d : -d, e, minus_one;
  exp_of_negative(&down, &e, &minus_one);
  const V beta = splat<V>(c.beta), other = splat<V>(1.0 - c.beta);
  const V less = q_is_less ? beta : other, more = q_is_less ? other : beta;
  const V m = fma(less, e, more), minus = less * minus_one;  // m - 1 with all its digits
  const V log_m = log_positive(m) + (minus - (m - splat<V>(1.0)));
  return {(q_is_less ? V{} : down) - log_m, (q_is_less ? down : V{}) - log_m};
}

// Σ q·log(q/m) and Σ p·log(p/m).
struct Divergences {
  double of_q = 0.0, of_p = 0.0;
};

template <class A>
void add_divergences(const A* s, const A* t, int64_t n, const PairStats& stats, const Scale& scale,
                     const Mixture& mixture, Divergences* total) {
  using V = Vec<A>;
  constexpr int N = kLanes<A>;
  const V ref_s = splat<V>(stats.s.ref), ref_t = splat<V>(stats.t.ref);
  const V floor = splat<V>(scale.floor);
  V of_q = {}, of_p = {}, lost = {};
  const auto add = [&]<int K>(V(&x)[K], V(&y)[K]) FF_LAMBDA {
    V e[K], f[K];
    MixtureLogs<V> logs[K];
    for (int u = 0; u < K; ++u) {
      logs[u] = mixture_logs(x[u], y[u], mixture);
      x[u] -= ref_s;
      y[u] -= ref_t;
    }
    exp_scaled<Precision::exact>(x, e, scale.c, floor);
    exp_scaled<Precision::exact>(y, f, scale.c, floor);
    for (int u = 0; u < K; ++u) {
      of_q = fma(f[u], logs[u].of_q, of_q);
      const V sum = fma(e[u], logs[u].of_p, of_p);
      lost += fma(e[u], logs[u].of_p, of_p - sum);
      of_p = sum;
    }
  };
  int64_t i = 0;
  for (; i + kAlone * N <= n; i += kAlone * N) {
    V x[kAlone], y[kAlone];
    for (int u = 0; u < kAlone; ++u) x[u] = load(s + i + u * N), y[u] = load(t + i + u * N);
    add(x, y);
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    V x[1] = {load_partial(s + i, k, kMinusInf)}, y[1] = {load_partial(t + i, k, kMinusInf)};
    add(x, y);
  }
  total->of_q += horizontal_sum(of_q);
  total->of_p += horizontal_sum(of_p) + horizontal_sum(lost);
}

template <class A>
Divergences divergences(const Row& student, const Row& teacher, int64_t n, const PairStats& stats,
                        const Scale& scale, const Mixture& mixture) {
  A buffer[2][kBlock];
  Divergences total;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    add_divergences(block_of(student, i, count, buffer[0]), block_of(teacher, i, count, buffer[1]),
                    count, stats, scale, mixture, &total);
  }
  return {total.of_q / stats.t.sum(), total.of_p / stats.s.sum()};
}

// ---- the gradient ----

// forward  g = e_s·a + e_t·b          reverse  g = e_s·(a·(s - t) + b)
// jsd      g = e_s·(a·(log(p/m) - KL(p‖m)) + b)
template <class A, DistillKind kKind>
void gradient_block(const A* s, const A* t, int64_t n, const PairStats& stats, const Scale& scale,
                    const Mixture& mixture, double of_p, double a, double b, A* g) {
  using V = Vec<A>;
  constexpr int N = kLanes<A>, kVectors = kKind == DistillKind::jsd ? kAlone : kPair;
  const V ref_s = splat<V>(stats.s.ref), ref_t = splat<V>(stats.t.ref);
  const V floor = splat<V>(scale.floor), va = splat<V>(a), vb = splat<V>(b);
  // of a peaked row log(p/m) is nearly KL(p‖m): what rounding takes off the latter goes off after
  const A high = static_cast<A>(of_p);
  const V kl = splat<V>(high), kl_rest = splat<V>(of_p - high);
  constexpr Precision kPrecision =
      kKind == DistillKind::jsd ? Precision::exact : Precision::full;  // as in KL(p‖m)
  const auto value = [&]<int K>(V(&x)[K], V(&y)[K]) FF_LAMBDA {
    V e[K], f[K];
    if constexpr (kKind == DistillKind::jsd) {
      for (int u = 0; u < K; ++u) f[u] = mixture_logs(x[u], y[u], mixture).of_p;
    }
    for (int u = 0; u < K; ++u) x[u] -= ref_s, y[u] -= ref_t;
    if constexpr (kKind == DistillKind::reverse_kl) {
      for (int u = 0; u < K; ++u) f[u] = x[u] - y[u];
    } else if constexpr (kKind == DistillKind::forward_kl) {
      exp_scaled<kPrecision>(y, f, scale.c, floor);
    }
    exp_scaled<kPrecision>(x, e, scale.c, floor);
    for (int u = 0; u < K; ++u) {
      if constexpr (kKind == DistillKind::forward_kl) {
        x[u] = fma(e[u], va, f[u] * vb);
      } else if constexpr (kKind == DistillKind::reverse_kl) {
        x[u] = e[u] * where_positive(e[u], fma(va, f[u], vb));
      } else {
        x[u] = e[u] * fma(va, (f[u] - kl) - kl_rest, vb);
      }
    }
  };
  int64_t i = 0;
  for (; i + kVectors * N <= n; i += kVectors * N) {
    V x[kVectors], y[kVectors];
    for (int u = 0; u < kVectors; ++u) x[u] = load(s + i + u * N), y[u] = load(t + i + u * N);
    value(x, y);
    for (int u = 0; u < kVectors; ++u) store(g + i + u * N, x[u]);
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    V x[1] = {load_partial(s + i, k, kMinusInf)}, y[1] = {load_partial(t + i, k, kMinusInf)};
    value(x, y);
    store_partial(g + i, x[0], k);
  }
}

// g += a·e^{(s - ref)/T}, or g = that.
template <class A, bool kAdd>
void softmax_block(const A* s, int64_t n, double ref, const Scale& scale, double a, A* g) {
  using V = Vec<A>;
  constexpr int N = kLanes<A>;
  const V vref = splat<V>(ref), floor = splat<V>(scale.floor), va = splat<V>(a);
  for (int64_t i = 0; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    V x[1] = {k == N ? load(s + i) : load_partial(s + i, k, kMinusInf)}, e[1];
    x[0] -= vref;
    exp_scaled<Precision::full>(x, e, scale.c, floor);
    V sum = e[0] * va;
    if constexpr (kAdd) sum += k == N ? load(g + i) : load_partial(g + i, k, 0.0);
    if (k == N)
      store(g + i, sum);
    else
      store_partial(g + i, sum, k);
  }
}

// ---- one row by itself: cross-entropy at another temperature, and what a top-K teacher names ----

// The columns that a row of a top-K teacher names, and their log-probabilities.
struct Named {
  Indices indices;
  int64_t begin = 0, count = 0;
  Row teacher;
  int64_t column(int64_t k) const { return indices[begin + k]; }
};

// A block in which the named columns are -inf.
template <class A>
const A* hidden_block(const Row& row, int64_t i, int64_t n, const Named& named, A* buffer) {
  const A* z = block_of(row, i, n, buffer);
  if (z != buffer) __builtin_memcpy(buffer, z, static_cast<size_t>(n) * sizeof(A));
  for (int64_t k = 0; k < named.count; ++k) {
    const int64_t j = named.column(k) - i;
    if (j >= 0 && j < n) buffer[j] = static_cast<A>(kMinusInf);
  }
  return buffer;
}

// Σ e over a row, without the named columns.
template <class A>
Sum row_sum(const Row& row, int64_t n, const Named* without, const Scale& scale) {
  A buffer[kBlock];
  Sum total;
  detail::BlockSums block{};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    const A* z =
        without ? hidden_block(row, i, count, *without, buffer) : block_of(row, i, count, buffer);
    double ref = total.ref;
    if (ref == kMinusInf) ref = detail::block_top(z, count);
    const double usable = ref == kMinusInf ? 0.0 : ref;
    detail::add_block<A, false, false>(z, count, usable, scale.c, scale.floor, &block);
    if (block.top > ref + scale.temperature) {
      ref = block.top;
      detail::add_block<A, false, false>(z, count, ref, scale.c, scale.floor, &block);
    }
    total.add(ref, block.high, block.low, scale.temperature);
  }
  return total;
}

// A column's or the rest's part of D, and p·∂D/∂p.
struct Bucket {
  double value, weighted;
};
Bucket bucket(DistillKind kind, double log_p, double log_q, double beta) {
  const double p = exp(log_p), q = exp(log_q);
  if (kind == DistillKind::forward_kl) return {q == 0.0 ? 0.0 : q * (log_q - log_p), -q};
  if (kind == DistillKind::reverse_kl) {
    const double value = p == 0.0 ? 0.0 : p * (log_p - log_q);
    return {value, value + p};
  }
  const double top = log_p > log_q ? log_p : log_q;
  const double log_m = top + log(beta * exp(log_q - top) + (1.0 - beta) * exp(log_p - top));
  const double of_p = p == 0.0 ? 0.0 : (1.0 - beta) * p * (log_p - log_m);
  return {(q == 0.0 ? 0.0 : beta * q * (log_q - log_m)) + of_p, of_p};
}

// The divergence over K + 1 buckets. The rest is summed by itself, so that its probability keeps
// its digits however small it is: 1 - Σ p_k would not.
struct TopStats {
  Sum rest;
  double lse = 0.0, value = 0.0;  // lse: of z/T
  double mean = 0.0;              // Σ p·∂D/∂p over the buckets
  double of_rest = 0.0;           // p_r·∂D/∂p_r - mean·p_r
};

template <class A>
TopStats top_stats(const Row& student, int64_t n, const Named& named, DistillKind kind, double beta,
                   const Scale& scale) {
  TopStats s;
  s.rest = row_sum<A>(student, n, &named, scale);
  const double inverse = 1.0 / scale.temperature;
  const double log_rest = s.rest.sum() == 0.0 ? kMinusInf : s.rest.ref * inverse + s.rest.log_sum();
  double top = log_rest;
  int64_t first = -1;  // whose term is 1, and left out: -1 the rest's
  // one that is out of range now makes all of it NaN
  const auto z_of = [&](int64_t k) {
    const int64_t column = named.column(k);
    return column < 0 || column >= n ? kNan : element(student, column) * inverse;
  };
  for (int64_t k = 0; k < named.count; ++k) {
    const double z = z_of(k);
    if (z > top) top = z, first = k;
  }
  double excess = first < 0 ? 0.0 : exp(log_rest - top), mass = 0.0;
  for (int64_t k = 0; k < named.count; ++k) {
    if (k != first) excess += exp(z_of(k) - top);
    mass += exp(element(named.teacher, k));
  }
  s.lse = top + log1p(excess);
  for (int64_t k = 0; k < named.count; ++k) {
    const Bucket b = bucket(kind, z_of(k) - s.lse, element(named.teacher, k), beta);
    s.value += b.value;
    s.mean += b.weighted;
  }
  if (named.count < n) {
    const double below = mass < 1.0 ? 1.0 - mass : 0.0, log_p = log_rest - s.lse;
    const Bucket b = bucket(kind, log_p, below > 0.0 ? log(below) : kMinusInf, beta);
    s.value += b.value;
    s.mean += b.weighted;
    s.of_rest = b.weighted - s.mean * exp(log_p);
  }
  if (!(s.lse - s.lse == 0.0)) s.value = kNan;
  return s;
}

// The gradient of one block: the rest by one coefficient, then the named columns by their own.
template <class A>
void top_block(const Row& student, int64_t i, int64_t n, const Named& named, const TopStats& stats,
               DistillKind kind, double beta, const Scale& scale, double weight, A* g) {
  A buffer[kBlock];
  const double inverse = 1.0 / scale.temperature, sum = stats.rest.sum();
  const double a = sum > 0.0 ? weight * inverse * stats.of_rest / sum : 0.0;
  const double ref = sum > 0.0 ? stats.rest.ref : 0.0;
  softmax_block<A, false>(hidden_block(student, i, n, named, buffer), n, ref, scale, a, g);
  for (int64_t k = 0; k < named.count; ++k) {
    const int64_t column = named.column(k);
    if (column < i || column >= i + n) continue;
    const double log_p = element(student, column) * inverse - stats.lse;
    const Bucket b = bucket(kind, log_p, element(named.teacher, k), beta);
    g[column - i] = static_cast<A>(weight * inverse * (b.weighted - stats.mean * exp(log_p)));
  }
}

// ---- rows ----

// Row by row: its loss, and while it is in the cache its gradient.
template <class A> struct RowWork {
  const Distill& a;
  const bool stream;
  const Scale scale, plain;  // at the temperature, and at 1
  Mixture mixture{};

  bool counts(int64_t r, int64_t target) const {
    return (a.mask == nullptr || a.mask[r]) &&
           (a.targets.data == nullptr || target != a.ignore_index);
  }

  PairStats statistics(const Row& student, const Row& teacher) const {
    const int64_t n = a.shape.vocab;
    switch (a.kind) {
      case DistillKind::forward_kl:
        return pair_stats<A, DistillKind::forward_kl>(student, teacher, n, scale);
      case DistillKind::reverse_kl:
        return pair_stats<A, DistillKind::reverse_kl>(student, teacher, n, scale);
      case DistillKind::jsd: break;
    }
    return pair_stats<A, DistillKind::jsd>(student, teacher, n, scale);
  }

  void pair_gradient(const A* s, const A* t, int64_t n, const PairStats& stats, double of_p,
                     double ca, double cb, A* g) const {
    switch (a.kind) {
      case DistillKind::forward_kl:
        gradient_block<A, DistillKind::forward_kl>(s, t, n, stats, scale, mixture, of_p, ca, cb, g);
        break;
      case DistillKind::reverse_kl:
        gradient_block<A, DistillKind::reverse_kl>(s, t, n, stats, scale, mixture, of_p, ca, cb, g);
        break;
      case DistillKind::jsd:
        gradient_block<A, DistillKind::jsd>(s, t, n, stats, scale, mixture, of_p, ca, cb, g);
        break;
    }
  }

  // The loss of row r; with `w`, what it is multiplied by, its gradient too.
  double run(int64_t r, const double* w) {
    const int64_t n = a.shape.vocab, y = a.targets.data == nullptr ? 0 : a.targets[r];
    const Row out = w ? row_at(a.gradient, a.shape.dtype, r) : Row{};
    if (!counts(r, y)) {
      if (w) zero(out, 0, a.width);
      return 0.0;
    }
    if (w) zero(out, n, a.width);
    if (y < 0 || y >= n) {
      if (w) fill<A>(out, n, kNan);
      return kNan;
    }
    const Row student = row_at(a.student, a.shape.dtype, r);
    const Row teacher = row_at(a.teacher, a.teacher_dtype, r);
    const bool top = a.teacher_indices.data != nullptr, wants_kl = a.kl_weight != 0.0;
    const bool wants_ce = a.ce_weight != 0.0;
    const bool own = wants_ce && (top || !wants_kl || a.temperature != 1.0);
    const Named named{a.teacher_indices, r * a.top, a.top, teacher};

    PairStats pair;
    TopStats with_top;
    Divergences parts;
    double kl = 0.0, gap = 0.0, loss = 0.0;
    bool good = true;
    if (wants_kl && top) {
      with_top = top_stats<A>(student, n, named, a.kind, a.beta, scale);
      kl = with_top.value;
    } else if (wants_kl) {
      pair = statistics(student, teacher);
      good = pair.s.good() && pair.t.good();
      gap = pair.t.log_sum() - pair.s.log_sum();
      if (a.kind == DistillKind::forward_kl) {
        kl = pair.dot / (pair.t.sum() * a.temperature) - gap;
      } else if (a.kind == DistillKind::reverse_kl) {
        kl = pair.dot / (pair.s.sum() * a.temperature) + gap;
      } else if (good) {
        mixture = mixture_of(pair, a.temperature, a.beta);
        parts = divergences<A>(student, teacher, n, pair, scale, mixture);
        kl = a.beta * parts.of_q + (1.0 - a.beta) * parts.of_p;
      }
      if (!good) kl = kNan;
    }
    if (wants_kl) loss = a.kl_weight * (kl < 0.0 ? 0.0 : kl);  // what rounding leaves below 0
    Sum ce;
    if (wants_ce) {
      ce = own ? row_sum<A>(student, n, nullptr, plain) : pair.s;
      const double lse = ce.ref + ce.log_sum();
      loss -= a.ce_weight * (element(student, y) - ce.ref - ce.log_sum());
      good = good && finite(lse) && ce.good();
      if (!good) loss = kNan;
    }
    if (!w) return loss;
    if (*w == 0.0) {
      zero(out, 0, n);
      return loss;
    }

    const double weight = *w * a.kl_weight, ce_weight = *w * a.ce_weight;
    const double inverse = 1.0 / a.temperature, shared = wants_ce && !own ? ce_weight : 0.0;
    double ca = 0.0, cb = 0.0;
    if (wants_kl && top) {
      good = good && (finite(kl) || (a.kind == DistillKind::forward_kl && kl > 0.0));
    } else if (wants_kl && a.kind == DistillKind::forward_kl) {
      ca = (weight * inverse + shared) / pair.s.sum();
      cb = -weight * inverse / pair.t.sum();
    } else if (wants_kl && a.kind == DistillKind::reverse_kl) {
      ca = weight * inverse * inverse / pair.s.sum();
      cb = (weight * inverse * (gap - kl) + shared) / pair.s.sum();
    } else if (wants_kl) {
      ca = weight * inverse * (1.0 - a.beta) / pair.s.sum();
      cb = shared / pair.s.sum();
    }
    if (!good || !finite(ca) || !finite(cb) || !finite(weight) || !finite(ce_weight)) {
      fill<A>(out, n, kNan);
      return loss;
    }
    // of D without the cross-entropy that shares the first one's (forward) or the second's factor
    const double part = shared == 0.0 ? 0.0 : shared / pair.s.sum();
    const bool first_shares = a.kind == DistillKind::forward_kl;
    const double ca_alone = ca - (first_shares ? part : 0.0);
    const double cb_alone = cb - (first_shares ? 0.0 : part);
    A buffer[2][kBlock], g[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t count = n - i < kBlock ? n - i : kBlock;
      if (wants_kl && top) {
        top_block<A>(student, i, count, named, with_top, a.kind, a.beta, scale, weight, g);
      } else if (wants_kl) {
        pair_gradient(block_of(student, i, count, buffer[0]),
                      block_of(teacher, i, count, buffer[1]), count, pair, parts.of_p, ca, cb, g);
      }
      const bool has_target = wants_ce && y >= i && y < i + count;
      double at_target = has_target && wants_kl ? g[y - i] : 0.0;  // of D alone
      if (own) {
        const A* s = block_of(student, i, count, buffer[0]);
        if (wants_kl)
          softmax_block<A, true>(s, count, ce.ref, plain, ce_weight / ce.sum(), g);
        else
          softmax_block<A, false>(s, count, ce.ref, plain, ce_weight / ce.sum(), g);
      }
      if (has_target) {  // p - 1 without cancellation
        if (!own) {
          const A s = static_cast<A>(element(student, y)), t = static_cast<A>(element(teacher, y));
          A alone;
          pair_gradient(&s, &t, 1, pair, parts.of_p, ca_alone, cb_alone, &alone);
          at_target = alone;
        }
        const double logp = element(student, y) - ce.ref - ce.log_sum();
        g[y - i] = static_cast<A>(at_target + ce_weight * expm1(logp));
      }
      store_block(g, out, i, count, stream);
    }
    return loss;
  }
};

template <class A> void distill_t(const Distill& a) {
  const int64_t rows = a.shape.rows, size = size_of(a.shape.dtype);
  const bool want_gradient = a.gradient.data != nullptr;
  bool stream = false;
  if (want_gradient && a.gradient.data != a.student.data) {
    advise_huge_pages(a.gradient.data, static_cast<size_t>(rows * a.width * size));
    stream = rows * a.width * size > kStreamBytes;
  }
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    count += (a.mask == nullptr || a.mask[r]) &&
             (a.targets.data == nullptr || a.targets[r] != a.ignore_index);
  }
  const RowLosses<Distill> losses(a, count);
  const int64_t bytes = a.shape.vocab * (size + size_of(a.teacher_dtype)) + a.width * size;
  parallel_for(rows, bytes, a.place.threads, [&](int64_t begin, int64_t end) {
    RowWork<A> work{a, stream, scale_of<A>(a.temperature), scale_of<A>(1.0)};
    for (int64_t r = begin; r < end; ++r) {
      const double w = losses.weight(r);
      losses.put(r, work.run(r, want_gradient ? &w : nullptr));
    }
    if (stream) stream_fence();
  });
  losses.finish();
}

void distill(const Distill& a) {
  a.shape.dtype == DType::f64 ? distill_t<double>(a) : distill_t<float>(a);
}

// ---- what may be wrong with a top-K teacher ----

// How much more than 1 the rounding of log-probabilities may make of their probabilities; the same
// in eager/distill.py and the GPU kernels.
double mass_tolerance(DType dtype) {
  return dtype == DType::bf16 ? 5e-2 : dtype == DType::f16 ? 1e-2 : 1e-3;
}

constexpr int64_t kSeen = 1 << 17;  // columns at a time

TeacherFault teacher_fault(const Named& named, int64_t vocab, uint64_t* seen) {
  for (int64_t k = 0; k < named.count; ++k) {
    const int64_t column = named.column(k);
    if (column < 0 || column >= vocab) return TeacherFault::index;
  }
  bool twice = false;
  for (int64_t begin = 0; begin < vocab && !twice; begin += kSeen) {
    const auto mark = [&](int64_t k, bool set) {
      const auto j = static_cast<uint64_t>(named.column(k) - begin);
      if (j >= static_cast<uint64_t>(kSeen)) return;
      const uint64_t bit = uint64_t{1} << (j & 63);
      if (set) twice = twice || (seen[j >> 6] & bit) != 0;
      seen[j >> 6] = set ? seen[j >> 6] | bit : seen[j >> 6] & ~bit;
    };
    for (int64_t k = 0; k < named.count; ++k) mark(k, true);
    for (int64_t k = 0; k < named.count; ++k) mark(k, false);
  }
  if (twice) return TeacherFault::twice;
  double mass = 0.0;
  for (int64_t k = 0; k < named.count; ++k) mass += exp(element(named.teacher, k));
  return mass > 1.0 + mass_tolerance(named.teacher.dtype) ? TeacherFault::mass : TeacherFault::none;
}

int64_t first_bad_teacher(const Distill& a, TeacherFault* fault) {
  uint64_t seen[kSeen / 64] = {};
  for (int64_t r = 0; r < a.shape.rows; ++r) {
    if (a.mask != nullptr && !a.mask[r]) continue;
    if (a.targets.data != nullptr && a.targets[r] == a.ignore_index) continue;
    const Named named{a.teacher_indices, r * a.top, a.top, row_at(a.teacher, a.teacher_dtype, r)};
    *fault = teacher_fault(named, a.shape.vocab, seen);
    if (*fault != TeacherFault::none) return r;
  }
  return -1;
}

}  // namespace

const DistillKernels& distill_kernels() {
  static constexpr DistillKernels kernels{first_bad_teacher, distill};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
