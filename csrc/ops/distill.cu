// Distillation from logits on NVIDIA GPUs: loss and gradient of a row in one visit.
//
// clang-format off
//   kernel        reads + writes a column           bound by                          split
//   distill       sizeof(T) + sizeof(teacher's)     memory; for jsd, which takes 8    a block a row,
//                 + sizeof(T)                       exponentials and logarithms a     or a cluster
//                                                   column, those
//   distill_top   sizeof(T) + sizeof(T), and the    memory; the student's row is      a block a row
//                 teacher's K entries               read three times, from L2 as
//                                                   far as it stayed there
// clang-format on
//
// A row goes through up to three passes: the statistics of both softmaxes, the sums of the
// divergence (not for the forward KL, whose gradient does not need them), the gradient. Between
// them both rows stay in shared memory, of one block or of a cluster (core/logit_rows.cuh); what is
// too long for that, or of two types, is read again, from L2 as far as it stayed there.
//
// float32 a thread (float64 for a float64 student); between threads, and all that a row has only
// one of, double, in a fixed order: the same bits every time. The mixture of jsd is formed relative
// to the larger of p and q: neither underflow nor a -inf makes a logarithm of 0.
//
// A target out of range is not followed: its row's loss is NaN, its gradient 0, and a flag is set.
// So with a top-K teacher that has an index out of range or twice, or too much probability.
#include "core/cuda_utils.cuh"
#include "core/logit_rows.cuh"
#include "ops/distill.h"

namespace finefuse::cuda {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// ---- what a row has one of ----------------------------------------------------------------------

__device__ bool counts(const Distill& a, int64_t r) {
  return (a.mask == nullptr || a.mask[r]) &&
         (a.targets.data == nullptr || a.targets[r] != a.ignore_index);
}

// The row's share of the mean, left where its loss will be.
__global__ void __launch_bounds__(kMaxThreads) distill_count_kernel(const Distill a) {
  double count[1] = {0};
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) count[0] += counts(a, r);
  block_sum_all(count);
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) a.scratch[r] = 1 / count[0];
}

__global__ void __launch_bounds__(kMaxThreads) distill_sum_kernel(const Distill a) {
  double sum[1] = {0};
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) sum[0] += a.scratch[r];
  block_sum(sum);
  if (threadIdx.x == 0) a.loss.set(0, sum[0]);
}

// What the block remembers of its row between the passes, in shared memory: registers are short
// while thread 0 works out the gradient. z_y and t_y: the logits of the target.
template <class T, class Teacher> struct RowTask {
  const T* z;  // of the part that is this block's, where the later passes read it
  Teacher t;
  T* out;
  int64_t begin, count, y;  // y = -1: no cross-entropy
  double share, w, z_y, t_y;
  bool first;
};

__device__ void put_loss(const Distill& a, int64_t r, double share, double loss) {
  if (a.reduction != Reduction::none)
    a.scratch[r] = share * loss;
  else if (a.loss)
    a.loss.set(r, loss);
}

// The columns of the gradient's row that do not count.
template <class T> __device__ void zero_padding(const Distill& a, int64_t r) {
  row_zero(row_of<T>(a.gradient, r) + a.shape.vocab, a.width - a.shape.vocab);
}

// A row that does not count, or whose target or teacher is not to be followed.
template <class T>
__device__ void blank(const Distill& a, int64_t r, const RowPart& part, double loss) {
  if (threadIdx.x == 0 && part.first) put_loss(a, r, 1, loss);
  if (a.gradient.data == nullptr) return;
  row_zero(row_of<T>(a.gradient, r) + part.begin, part.count);
  if (part.first) zero_padding<T>(a, r);
}

// Whether the row is to be computed; if not, it is done. All threads come here.
template <class T> __device__ bool begin_row(const Distill& a, int64_t r, const RowPart& part) {
  double loss = 0.0;
  if (counts(a, r)) {
    if (a.targets.data == nullptr) return true;
    const int64_t y = a.targets[r];
    if (y >= 0 && y < a.shape.vocab) return true;
    raise(a.place, Flag::targets);
    loss = NAN;
  }
  blank<T>(a, r, part, loss);
  return false;
}

// ---- one column ---------------------------------------------------------------------------------

// log2(p/m) and log2(q/m), given log2(q/p), which may be infinite, or NaN where p = q = 0.
template <class A> struct Mixture {
  A p, q;
};
template <class A> __device__ __forceinline__ Mixture<A> mixture(A ratio, A beta, A rest) {
  constexpr A kFar = 1e4;  // where 2^-x is 0, and a number
  ratio = max_of(-kFar, min_of(kFar, ratio));
  const A x = exp2_fast(ratio > 0 ? -ratio : ratio);  // of the smaller beside the larger
  const A log_m = log2_fast(ratio > 0 ? beta + rest * x : beta * x + rest);
  return {-max_of(ratio, A{0}) - log_m, min_of(ratio, A{0}) - log_m};
}

// Two softmaxes: exponentials relative to the row's largest logits, in powers of 2.
template <class A> struct Pair {
  A c, ref_s, ref_t, ratio;  // c = log2(e)/T; ratio: log2(q/p) where both exponents are 0
  A beta, rest;              // of the mixture
  A hard;                    // log2(e), the c of a cross-entropy at another temperature, else 0
};
template <class A> struct Column {
  A d, es, et, ratio;
};
template <class A>
__device__ __forceinline__ Column<A> column_of(const Pair<A>& pair, A x_s, A x_t) {
  const A d = x_s - pair.ref_s, t = x_t - pair.ref_t;
  return {d, exp2_fast(d * pair.c), exp2_fast(t * pair.c), (t - d) * pair.c + pair.ratio};
}

// What one thread, and then all, add up: D and KL(p‖m) in bits, relative to the softmaxes' sums,
// and the cross-entropy's sum, but for the largest logit itself and its ties.
constexpr int kSums = 4;
template <class A> struct Sums {
  A value = 0, of_p = 0, hard = 0, ties = 0;
};

template <DistillKind kKind, class A>
__device__ __forceinline__ void add_column(Sums<A>& own, const Pair<A>& pair, const Column<A>& x) {
  if constexpr (kKind == DistillKind::forward_kl) {
    if (x.et != 0) own.value += x.et * x.ratio;  // not 0·inf
  } else if constexpr (kKind == DistillKind::reverse_kl) {
    if (x.es != 0) own.of_p -= x.es * x.ratio;
  } else {
    const Mixture<A> log = mixture(x.ratio, pair.beta, pair.rest);
    own.of_p += x.es * log.p;
    own.value += x.et * log.q;
  }
  if (pair.hard != 0) {
    if (x.d == 0)
      own.ties += 1;
    else
      own.hard += exp2_fast(x.d * pair.hard);
  }
}

// dz = a·e_s + b·e_t, or e_s·(a + b·log2 of what the kind compares p with); + c·e of the
// cross-entropy.
struct PairGradient {
  double a, b, c, at_target;
  bool zero;
};
template <DistillKind kKind, class A>
__device__ __forceinline__ A gradient_at(const Pair<A>& pair, const Column<A>& x, A a, A b, A c) {
  A g;
  if constexpr (kKind == DistillKind::forward_kl) {
    g = a * x.es + b * x.et;
  } else if constexpr (kKind == DistillKind::reverse_kl) {
    g = x.es * (x.es == 0 ? a : a - b * x.ratio);  // not 0·inf, but NaN in a
  } else {
    g = x.es * (a + b * mixture(x.ratio, pair.beta, pair.rest).p);
  }
  if (pair.hard != 0) g += c * exp2_fast(x.d * pair.hard);
  return g;
}

// ---- passes over a row --------------------------------------------------------------------------

// f of what a span of n elements has before its vectors and after them.
template <class F>
__device__ __forceinline__ void outside(const Span& span, int64_t n, const F& f) {
  const int64_t inside = span.tail - span.head;
  for (int64_t i = threadIdx.x; i < n - inside; i += blockDim.x) f(i < span.head ? i : i + inside);
}

// Two rows of one type: out = f(x_s, x_t), where there is an out, which may be z.
template <class T, class F>
__device__ __forceinline__ void pair_pass(const T* z, const T* t, T* out, int64_t n, const F& f) {
  using A = Accumulator<T>;
  constexpr int N = Vector<T>::kSize;
  const auto one = [&](int64_t i) {
    const A g = f(to_accumulator(z[i]), to_accumulator(t[i]));
    if (out != nullptr) store_value(out + i, g);
  };
  Span span = vector_span(z, t, n);
  if (out != nullptr && vector_span<T>(z, out, n).head == n) span = {n, n};
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * N; i < span.tail; i += step) {
    Vector<T> v = load<Access::keep>(z + i);
    const Vector<T> w = load<Access::keep>(t + i);
    FF_UNROLL for (int k = 0; k < N; ++k) {
      const A g = f(to_accumulator(v.x[k]), to_accumulator(w.x[k]));
      if (out != nullptr) store_value(&v.x[k], g);
    }
    if (out != nullptr) store(out + i, v);
  }
  outside(span, n, one);
}

// A teacher of another type than the student: element by element.
struct OtherRow {
  const void* data;
  DType dtype;
};
// Elements i, i + step, ... of n; -inf, which adds nothing to a softmax, after the last.
template <class A, int U>
__device__ __forceinline__ void load_other(const OtherRow& t, int64_t i, int64_t step, int64_t n,
                                           A (&x)[U]) {
  const auto load = [&](const auto* p) {
    FF_UNROLL for (int u = 0; u < U; ++u) {
      x[u] = i + u * step < n ? static_cast<A>(to_accumulator(p[i + u * step])) : -INFINITY;
    }
  };
  switch (t.dtype) {
    case DType::f32: return load(static_cast<const float*>(t.data));
    case DType::bf16: return load(static_cast<const bf16*>(t.data));
    case DType::f16: return load(static_cast<const f16*>(t.data));
    case DType::f64: return load(static_cast<const double*>(t.data));
  }
}
__device__ inline OtherRow other_row(const Distill& a, int64_t r) {
  switch (a.teacher_dtype) {
    case DType::f32: return {row_of<float>(a.teacher, r), a.teacher_dtype};
    case DType::f64: return {row_of<double>(a.teacher, r), a.teacher_dtype};
    default: return {row_of<bf16>(a.teacher, r), a.teacher_dtype};  // 16 bits of either kind
  }
}
// Elements that a thread loads before it uses the first; float64 is not there for speed.
template <class A> constexpr int kAhead = sizeof(A) == 8 ? 1 : 4;

template <class T, class F>
__device__ __forceinline__ void pair_pass(const T* z, const OtherRow& t, T* out, int64_t n,
                                          const F& f) {
  using A = Accumulator<T>;
  constexpr int U = kAhead<A>;
  const int64_t step = blockDim.x;
  for (int64_t i = threadIdx.x; i < n; i += U * step) {
    A x[U], y[U];
    FF_UNROLL for (int u = 0; u < U; ++u) {
      x[u] = i + u * step < n ? to_accumulator(z[i + u * step]) : A{0};
    }
    load_other(t, i, step, n, y);
    FF_UNROLL for (int u = 0; u < U; ++u) {
      if (i + u * step >= n) break;
      const A g = f(x[u], y[u]);
      if (out != nullptr) store_value(out + i + u * step, g);
    }
  }
}

template <class A, class T> __device__ A teacher_at(const T* t, int64_t i) {
  return to_accumulator(t[i]);
}
template <class A> __device__ A teacher_at(const OtherRow& t, int64_t i) {
  A x[1];
  load_other(t, i, 1, i + 1, x);
  return x[0];
}

template <class A>
__device__ RowStats other_stats(const OtherRow& t, int64_t n, double temperature) {
  const A c = static_cast<A>(kLog2e / temperature);
  constexpr int U = kAhead<A>;
  Running<A, false, false> own;
  const int64_t step = blockDim.x;
  for (int64_t i = threadIdx.x; i < n; i += U * step) {
    A x[U];
    load_other(t, i, step, n, x);
    own.add(x, c);
  }
  return stats_of_threads(own, n, c);
}

// ---- whole distributions: a block or a cluster a row --------------------------------------------

// The statistics of the student's row and of the teacher's: one loop in the code, not two.
template <class F> __device__ __forceinline__ void both_stats(RowStats (&stats)[2], const F& f) {
  __shared__ RowStats found[2];
  FF_ROLLED for (int k = 0; k < 2; ++k) {
    const RowStats x = f(k);
    if (threadIdx.x == 0) found[k] = x;
    __syncthreads();
  }
  for (int k = 0; k < 2; ++k) stats[k] = found[k];
}

// What all threads know of a row after its statistics.
struct RowPair {
  RowLogprob s, t;
  double s_sum, t_sum;
  bool bad;  // all -inf, or with a NaN or +inf
};
__device__ inline RowPair row_pair(const RowStats (&stats)[2], double temperature) {
  const auto bad = [](const RowStats& x) { return !(x.ref > -INFINITY && x.excess < INFINITY); };
  return {row_logprob(stats[0], stats[0].ref, temperature),
          row_logprob(stats[1], stats[1].ref, temperature), stats[0].sum(), stats[1].sum(),
          bad(stats[0]) || bad(stats[1])};
}
template <class A> __device__ Pair<A> pair_of(const Distill& a, const RowPair& row) {
  const double ratio = (row.s.log_sum - row.t.log_sum) * kLog2e;
  const bool hard = a.ce_weight != 0.0 && a.temperature != 1.0;
  // a beta below float32's numbers would make a logarithm of 0
  return {static_cast<A>(kLog2e / a.temperature),
          static_cast<A>(row.s.ref),
          static_cast<A>(row.t.ref),
          static_cast<A>(ratio),
          static_cast<A>(fmax(a.beta, 1e-37)),
          static_cast<A>(1.0 - a.beta),
          static_cast<A>(hard ? kLog2e : 0.0)};
}

// The sums of all threads, in nats of distributions.
struct Divergence {
  double value, of_p, hard;
};
__device__ inline Divergence divergence(const Distill& a, const RowPair& row,
                                        const double (&sums)[kSums]) {
  const double q = kLn2 * sums[0] / row.t_sum, p = kLn2 * sums[1] / row.s_sum;
  double value = a.kind == DistillKind::forward_kl ? q : p;
  if (a.kind == DistillKind::jsd) value = a.beta * q + (1.0 - a.beta) * p;
  return {row.bad ? NAN : value, p, sums[2] + (sums[3] - 1.0)};
}

// log softmax(z)[y] at temperature 1.
__device__ inline double hard_logp(const Distill& a, const RowLogprob& s, double z_y, double hard) {
  return z_y - s.ref - (a.temperature == 1.0 ? s.log_sum : log1p(hard));
}

__device__ inline PairGradient pair_gradient(const Distill& a, const RowPair& row,
                                             const Divergence& d, double w, double z_y,
                                             double t_y) {
  PairGradient g{};
  const double inverse_t = 1.0 / a.temperature, k = w * a.kl_weight * inverse_t;
  const double lp = (z_y - row.s.ref) * inverse_t - row.s.log_sum, p = exp(lp);
  const double lq = (t_y - row.t.ref) * inverse_t - row.t.log_sum, q = exp(lq);
  switch (a.kind) {
    case DistillKind::forward_kl:
      g.a = k / row.s_sum;
      g.b = -k / row.t_sum;
      g.at_target = k * (p - q);
      break;
    case DistillKind::reverse_kl:
      if (!(fabs(d.value) < INFINITY)) g.a = g.b = NAN;
      g.a += -k * d.value / row.s_sum;
      g.b += k * kLn2 / row.s_sum;
      g.at_target = g.a + k * (p == 0 ? 0.0 : p * (lp - lq - d.value)) - g.a;
      break;
    case DistillKind::jsd: {
      const double side = k * (1.0 - a.beta);
      g.a = -side * d.of_p / row.s_sum;
      g.b = side * kLn2 / row.s_sum;
      const double log_p = mixture((lq - lp) * kLog2e, a.beta, 1.0 - a.beta).p * kLn2;
      g.at_target = side * p * (log_p - d.of_p);
    }
  }
  if (a.ce_weight != 0.0) {
    const double h = w * a.ce_weight;
    if (a.temperature == 1.0)
      g.a += h / row.s_sum;
    else
      g.c = h / (1.0 + d.hard);
    g.at_target += h * expm1(hard_logp(a, row.s, z_y, d.hard));
  }
  if (row.bad) g.a = g.at_target = NAN;
  return g;
}

template <class F> __device__ __forceinline__ void by_kind(DistillKind kind, const F& f) {
  switch (kind) {
    case DistillKind::forward_kl: return f.template operator()<DistillKind::forward_kl>();
    case DistillKind::reverse_kl: return f.template operator()<DistillKind::reverse_kl>();
    case DistillKind::jsd: return f.template operator()<DistillKind::jsd>();
  }
}

// A loop for each kind over rows of one type; over others one, which asks at each element.
template <class T, class F>
__device__ __forceinline__ void pass_of_kind(DistillKind kind, const T* z, const T* t, T* out,
                                             int64_t n, const F& f) {
  by_kind(kind, [&]<DistillKind kKind>() {
    pair_pass(z, t, out, n,
              [&](auto x_s, auto x_t) { return f.template operator()<kKind>(x_s, x_t); });
  });
}
template <class T, class F>
__device__ __forceinline__ void pass_of_kind(DistillKind kind, const T* z, const OtherRow& t,
                                             T* out, int64_t n, const F& f) {
  pair_pass(z, t, out, n, [&](auto x_s, auto x_t) {
    decltype(x_s) g;
    by_kind(kind, [&]<DistillKind kKind>() { g = f.template operator()<kKind>(x_s, x_t); });
    return g;
  });
}

// kept: both rows fit in shared memory, of one block or of a cluster of them, and the later passes
// read them there; else they read the rows again.
struct Rows : Distill {
  bool kept;
};

// kOther: the teacher's type is not the student's; such rows are not kept.
template <class T, bool kOther> __device__ auto teacher_row(const Distill& a, int64_t r) {
  if constexpr (kOther)
    return other_row(a, r);
  else
    return static_cast<const T*>(row_of<T>(a.teacher, r));
}

// Two types at once are more than 64 registers on sm_100.
template <class T, bool kOther>
__global__ void __launch_bounds__(kMaxThreads, kOther ? 1 : kRowBlocks)
    distill_kernel(const Rows a) {
  using A = Accumulator<T>;
  using Teacher = decltype(teacher_row<T, kOther>(a, 0));
  constexpr bool kStaged = !kOther;
  __shared__ RowTask<T, Teacher> task;
  RowPair known{};
  {
    const int64_t vocab = a.shape.vocab, r = row_of_block<kStaged>();
    const T* z = row_of<T>(a.student, r);
    const RowPart part = row_part<kStaged>(z, vocab);
    if (!begin_row<T>(a, r, part)) return;
    Teacher t = teacher_row<T, kOther>(a, r);
    if (threadIdx.x == 0) {  // before any block of the cluster writes there
      task.y = -1;
      if (a.ce_weight != 0.0) {
        task.y = a.targets[r];
        task.z_y = to_accumulator(z[task.y]);
        task.t_y = teacher_at<A>(t, task.y);
      }
      task.share = a.reduction == Reduction::mean ? a.scratch[r] : 1.0;
      task.w = a.upstream ? a.upstream[a.reduction == Reduction::none ? r : 0] : 1.0;
      task.w *= task.share;
      task.out = a.gradient.data == nullptr ? nullptr : row_of<T>(a.gradient, r) + part.begin;
      task.begin = part.begin;
      task.count = part.count;
      task.first = part.first;
      task.z = z;
      task.t = t;
    }
    RowStats stats[2];
    if constexpr (kStaged) {
      __shared__ T* stage[2];
      if (threadIdx.x == 0) {
        task.z += part.begin;
        task.t += part.begin;
        stage[0] = stage[1] = nullptr;
        if (a.kept) {
          stage[0] = stage_of(task.z);
          stage[1] = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(stage_of(task.t)) +
                                          stage_bytes<T>(vocab, cluster_size(), 2));
        }
      }
      __syncthreads();
      both_stats(stats, [&](int k) {
        return row_stats<T, false, false, Access::keep>(k == 0 ? task.z : task.t, task.count,
                                                        a.temperature, stage[k]);
      });
      if (threadIdx.x == 0 && a.kept) task.z = stage[0], task.t = stage[1];
      row_stats_of_all(stats, a.temperature);
    } else {
      __syncthreads();
      both_stats(stats, [&](int k) {
        const OtherRow row{k == 0 ? task.z : task.t.data, k == 0 ? a.shape.dtype : task.t.dtype};
        return other_stats<A>(row, vocab, a.temperature);
      });
    }
    if (threadIdx.x == 0) known = row_pair(stats, a.temperature);
  }
  const RowPair& row = broadcast(known);
  Pair<A> terms{};
  if (threadIdx.x == 0) terms = pair_of<A>(a, row);
  const Pair<A>& shared_pair = broadcast(terms);
  if constexpr (kStaged) row_end();
  __shared__ double sums[kSums];  // thread 0's: not in everybody's registers
  if (threadIdx.x == 0) {
    for (int k = 0; k < kSums; ++k) sums[k] = 0;
  }
  const auto add_up = [&](const Sums<A>& own) {
    double all[kSums] = {own.value, own.of_p, own.hard, own.ties};
    __syncthreads();
    block_sum(all);
    if constexpr (kStaged) sum_of_all(all);
    if (threadIdx.x == 0) {
      for (int k = 0; k < kSums; ++k) sums[k] = all[k];
    }
  };
  // the forward KL's gradient does not wait for its value
  const bool at_once =
      a.kind == DistillKind::forward_kl && shared_pair.hard == 0 && task.out != nullptr;
  if (!at_once) {
    Sums<A> own;
    const Pair<A> pair = shared_pair;
    const auto add = [&]<DistillKind kKind>(A x_s, A x_t) {
      add_column<kKind>(own, pair, column_of(pair, x_s, x_t));
      return A{0};
    };
    pass_of_kind(a.kind, task.z, task.t, static_cast<T*>(nullptr), task.count, add);
    add_up(own);
  }
  if (task.out != nullptr) {
    PairGradient mine{};
    if (threadIdx.x == 0) {
      const Divergence d = divergence(a, row, sums);
      mine = pair_gradient(a, row, d, task.w, task.z_y, task.t_y);
      mine.zero = task.w == 0.0;
    }
    const PairGradient& g = broadcast(mine);
    {
      Sums<A> own;
      const Pair<A> pair = shared_pair;
      const A ga = static_cast<A>(g.a), gb = static_cast<A>(g.b), gc = static_cast<A>(g.c);
      const auto gradient = [&]<DistillKind kKind>(A x_s, A x_t) {
        const Column<A> x = column_of(pair, x_s, x_t);
        if constexpr (kKind == DistillKind::forward_kl) add_column<kKind>(own, pair, x);
        return gradient_at<kKind>(pair, x, ga, gb, gc);
      };
      pass_of_kind(a.kind, task.z, task.t, task.out, task.count, gradient);
      if (at_once) add_up(own);
    }
    if (task.first) zero_padding<T>(a, row_of_block<kStaged>());
    __syncthreads();
    const int64_t y = task.y - task.begin;
    if (g.zero)
      row_zero(task.out, task.count);
    else if (threadIdx.x == 0 && task.y >= 0 && y >= 0 && y < task.count)
      store_value(task.out + y, static_cast<A>(g.at_target));
  }
  if (threadIdx.x == 0 && task.first) {
    const Divergence d = divergence(a, row, sums);
    double loss = a.kl_weight * d.value;
    if (task.y >= 0) loss -= a.ce_weight * hard_logp(a, row.s, task.z_y, d.hard);
    put_loss(a, row_of_block<kStaged>(), task.share, loss);
  }
  if constexpr (kStaged) row_end();
}

// ---- the teacher's K most likely columns, and all others as one: a block a row ------------------

// A bucket's term of D, and p·dD/dp.
struct Bucket {
  double value, weighted;
};
__device__ __noinline__ Bucket bucket(DistillKind kind, double beta, double log_p, double log_q) {
  const double p = exp(log_p), q = exp(log_q);
  const auto times = [](double x, double y) { return x == 0 ? 0.0 : x * y; };  // not 0·inf
  switch (kind) {
    case DistillKind::forward_kl: return {times(q, log_q - log_p), -q};
    case DistillKind::reverse_kl: {
      const double term = times(p, log_p - log_q);
      return {term, term + p};
    }
    case DistillKind::jsd: break;
  }
  const auto log = mixture((log_q - log_p) * kLog2e, beta, 1.0 - beta);
  const double of_p = (1.0 - beta) * times(p, kLn2 * log.p);
  return {beta * times(q, kLn2 * log.q) + of_p, of_p};
}

// By how much rounding may take the teacher's probabilities above 1.
__device__ inline double mass_tolerance(DType dtype) {
  return dtype == DType::bf16 ? 5e-2 : dtype == DType::f16 ? 1e-2 : 1e-3;
}

// out = f(i, z_i), where there is an out, which may be z.
template <class T, class F>
__device__ __forceinline__ void row_pass(const T* z, T* out, int64_t n, const F& f) {
  constexpr int N = Vector<T>::kSize;
  Span span = out == nullptr ? vector_span(z, z, n) : vector_span<T>(z, out, n);
  if constexpr (sizeof(T) == 8) span = {n, n};  // float64 is not there for speed
  const auto one = [&](int64_t i) {
    const auto g = f(i, to_accumulator(z[i]));
    if (out != nullptr) store_value(out + i, g);
  };
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t i = span.head + static_cast<int64_t>(threadIdx.x) * N; i < span.tail; i += step) {
    Vector<T> v = load<Access::keep>(z + i);
    FF_UNROLL for (int k = 0; k < N; ++k) {
      const auto g = f(i + k, to_accumulator(v.x[k]));
      if (out != nullptr) store_value(&v.x[k], g);
    }
    if (out != nullptr) store(out + i, v);
  }
  outside(span, n, one);
}

// What all threads know of the row before its gradient.
struct TopRow {
  RowLogprob s;
  double inverse_sum, rest, hard, weighted, z_y, share, w;
  bool nan;
};

// A bit a column, in shared memory, says which the teacher names: it finds a column that is named
// twice, parts the rest's sum from theirs, and leaves the logits where they are in a gradient
// that is written over them until those columns get their own.
template <class T> __global__ void FF_ROW_BOUNDS distill_top_kernel(const Distill a) {
  using A = Accumulator<T>;
  const int64_t vocab = a.shape.vocab, top = a.top, r = blockIdx.x;
  const RowPart all{0, vocab, true};
  if (!begin_row<T>(a, r, all)) return;
  const T* z = row_of<T>(a.student, r);
  T* out = a.gradient.data == nullptr ? nullptr : row_of<T>(a.gradient, r);
  const OtherRow t = other_row(a, r);
  unsigned* named = reinterpret_cast<unsigned*>(dynamic_shared());
  for (int64_t i = threadIdx.x; i < (vocab + 31) / 32; i += blockDim.x) named[i] = 0;
  __syncthreads();
  double known[2] = {0, 0};  // the teacher's probabilities; what is wrong with its indices
  for (int64_t k = threadIdx.x; k < top; k += blockDim.x) {
    const int64_t i = a.teacher_indices[r * top + k];
    known[0] += exp(static_cast<double>(teacher_at<A>(t, k)));
    if (i < 0 || i >= vocab) {
      known[1] += 1;
      continue;
    }
    const unsigned bit = 1u << (i % 32);
    if ((atomicOr(named + i / 32, bit) & bit) != 0) known[1] += 1;
  }
  block_sum_all(known);
  if (known[1] > 0 || known[0] > 1.0 + mass_tolerance(a.teacher_dtype)) {
    raise(a.place, Flag::teacher);
    blank<T>(a, r, all, NAN);
    return;
  }
  const auto is_named = [&](int64_t i) { return (named[i / 32] >> (i % 32) & 1) != 0; };
  RowStats stats;
  if constexpr (sizeof(T) == 8)
    stats = other_stats<A>({z, a.shape.dtype}, vocab, a.temperature);
  else
    stats = row_stats<T, false, false, Access::keep>(z, vocab, a.temperature, nullptr);
  TopRow mine{};
  if (threadIdx.x == 0) {
    mine.s = row_logprob(stats, stats.ref, a.temperature);
    mine.inverse_sum = 1.0 / stats.sum();
    mine.nan = !(stats.ref > -INFINITY && stats.excess < INFINITY);
    mine.z_y = a.ce_weight != 0.0 ? to_accumulator(z[a.targets[r]]) : 0.0;
    mine.share = a.reduction == Reduction::mean ? a.scratch[r] : 1.0;
    mine.w = a.upstream ? a.upstream[a.reduction == Reduction::none ? r : 0] : 1.0;
    mine.w *= mine.share;
  }
  const RowLogprob s = broadcast(mine).s;
  const double inverse_t = 1.0 / a.temperature;
  const A c = static_cast<A>(kLog2e / a.temperature), ref = static_cast<A>(s.ref);
  const A hard_c = static_cast<A>(a.ce_weight != 0.0 && a.temperature != 1.0 ? kLog2e : 0.0);
  // the rest's exponentials, the cross-entropy's and its ties, D, Σ p·dD/dp
  double sums[5] = {0, 0, 0, 0, 0};
  {
    A rest = 0, hard = 0, ties = 0;
    row_pass(z, static_cast<T*>(nullptr), vocab, [&](int64_t i, A x) {
      const A d = x - ref;
      if (!is_named(i)) rest += exp2_fast(d * c);
      if (hard_c != 0) {
        if (d == 0)
          ties += 1;
        else
          hard += exp2_fast(d * hard_c);
      }
      return A{0};
    });
    sums[0] = rest;
    sums[1] = hard;
    sums[2] = ties;
  }
  const auto log_p_of = [&](A x) { return (x - s.ref) * inverse_t - s.log_sum; };
  for (int64_t k = threadIdx.x; k < top; k += blockDim.x) {
    const A x = to_accumulator(z[a.teacher_indices[r * top + k]]);
    const Bucket b = bucket(a.kind, a.beta, log_p_of(x), teacher_at<A>(t, k));
    sums[3] += b.value;
    sums[4] += b.weighted;
  }
  __syncthreads();
  block_sum(sums);
  if (threadIdx.x == 0) {
    double value = sums[3], others = 0;
    mine.weighted = sums[4];
    mine.hard = sums[1] + (sums[2] - 1.0);
    if (top < vocab) {
      const Bucket b = bucket(a.kind, a.beta, log(sums[0] * mine.inverse_sum),
                              log(known[0] < 1.0 ? 1.0 - known[0] : 0.0));
      value += b.value;
      mine.weighted += b.weighted;
      if (sums[0] > 0) others = b.weighted / sums[0];
    }
    if (mine.nan) value = NAN;
    mine.nan = value != value || (value == INFINITY && a.kind != DistillKind::forward_kl);
    mine.rest = others - mine.weighted * mine.inverse_sum;
    double loss = a.kl_weight * value;
    if (a.ce_weight != 0.0) loss -= a.ce_weight * hard_logp(a, mine.s, mine.z_y, mine.hard);
    put_loss(a, r, mine.share, loss);
  }
  if (out == nullptr) return;
  const TopRow& row = broadcast(mine);
  zero_padding<T>(a, r);
  if (row.w == 0.0) {
    row_zero(out, vocab);
    return;
  }
  const double kl = row.nan ? NAN : row.w * a.kl_weight * inverse_t, ce = row.w * a.ce_weight;
  const bool one_t = a.temperature == 1.0;
  const double hard_scale = one_t ? row.inverse_sum : 1.0 / (1.0 + row.hard);
  {
    const A g = static_cast<A>(kl * row.rest + (one_t ? ce * hard_scale : 0.0));
    const A h = static_cast<A>(ce * hard_scale);
    row_pass(z, out, vocab, [&](int64_t i, A x) {
      const A d = x - ref, e = exp2_fast(d * c);
      if (is_named(i)) return x;
      return hard_c != 0 ? g * e + h * exp2_fast(d * hard_c) : g * e;
    });
  }
  __syncthreads();
  const int64_t y = a.ce_weight != 0.0 ? a.targets[r] : -1;
  const auto hard_part = [&](double x, bool target) {
    if (ce == 0.0) return 0.0;
    const double logp = hard_logp(a, s, x, row.hard);
    return ce * (target ? expm1(logp) : exp(logp));
  };
  for (int64_t k = threadIdx.x; k < top; k += blockDim.x) {
    const int64_t i = a.teacher_indices[r * top + k];
    const A x = to_accumulator(out[i]);
    const double lp = log_p_of(x);
    const double g =
        bucket(a.kind, a.beta, lp, teacher_at<A>(t, k)).weighted - row.weighted * exp(lp);
    store_value(out + i, static_cast<A>(kl * g + hard_part(x, i == y)));
  }
  if (threadIdx.x == 0 && y >= 0 && !is_named(y)) {
    const double e = exp((row.z_y - s.ref) * inverse_t);
    store_value(out + y, static_cast<A>(kl * row.rest * e + hard_part(row.z_y, true)));
  }
}

// The bits must fit in a block's shared memory.
template <class T> void launch_top(const Distill& a) {
  const int64_t bytes = (a.shape.vocab + 31) / 32 * 4;
  int64_t limit = 48 << 10;
#if !defined(FF_CUDA_ON_CPU)
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
  limit = most - 4096;  // what the block itself takes
  check(cudaFuncSetAttribute(distill_top_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limit)),
        "shared memory");
#endif
  if (bytes > limit) {
    throw std::invalid_argument("teacher_indices: for rows of up to " + std::to_string(8 * limit) +
                                " columns on this device, not of " + std::to_string(a.shape.vocab));
  }
  launch(distill_top_kernel<T>, a.shape.rows, threads_for<T>(a), static_cast<size_t>(bytes), a);
}

}  // namespace

void run(const Distill& given) {
  Distill a = given;
  if (a.kl_weight == 0.0) {  // the teacher is not looked at: the student's divergence from itself
    a.teacher = a.student;
    a.teacher_dtype = a.shape.dtype;
    a.teacher_indices.data = nullptr;
    a.kind = DistillKind::forward_kl;
  }
  if (a.reduction == Reduction::mean) launch(distill_count_kernel, 1, kMaxThreads, 0, a);
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    // float64 is not there for speed
    if (a.teacher_indices.data != nullptr)
      launch_top<T>(a);
    else if (a.teacher_dtype != a.shape.dtype || sizeof(T) == 8)
      launch(distill_kernel<T, true>, a.shape.rows, threads_for<T>(a), 0, Rows{a, false});
    else if constexpr (sizeof(T) < 8)
      launch_rows<T>(distill_kernel<T, false>, distill_kernel<T, false>, Rows{a, true}, 2,
                     Rows{a, false});
  });
  if (a.reduction != Reduction::none && a.loss) launch(distill_sum_kernel, 1, kMaxThreads, 0, a);
}

}  // namespace finefuse::cuda
