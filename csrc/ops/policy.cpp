// Policy-gradient losses, value loss and advantages on the CPU.
//
// clang-format off
//   pass              reads + writes                  bound by
//   policy            up to 6 + 1 numbers a token     an exponential or two, about 10 ns a token
//   policy_logits     sizeof(T) + sizeof(T) a logit   memory; the gradient reads the row from cache
//   value_loss        3 + 1 numbers a token           memory
//   group_advantages  1 + 1 numbers a reward          nothing: there are as many as sequences
//   gae               2 + 2 numbers a token           the latency of the recursion, 8 cycles
// clang-format on
//
// All arithmetic of a token is double (policy_table.h). Sequences, or rows, are split over threads
// whole and sums are added in order, so nothing depends on the number of threads. What is masked
// out is never read.
#include "ops/policy.h"

#include "core/parallel.h"
#include "core/segments.h"
#include "core/softmax_row.h"
#include "ops/policy_table.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kTokenBytes = 48;  // what a token costs, as memory traffic: see parallel_for

TokenRange sequence(const PolicyTokens& a, int64_t i) {
  return tokens_of(a.offsets, a.length, a.total, i);
}

double sum_of(const double* x, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i * stride];
  return sum;
}

// A vector of tokens at a time.
constexpr int N = kLanes<double>;
struct Tokens {
  using V = VecD;
  FF_INLINE static void exponential(V x, V* e, V* minus_one) { exp_and_minus_one(x, e, minus_one); }
  FF_INLINE static V exponential(V x) {
    V e, minus_one;
    exp_and_minus_one(x, &e, &minus_one);
    return e;
  }
};

// As many floats as a vector has doubles.
typedef float Half __attribute__((vector_size(FF_VECTOR_BYTES / 2)));

// Elements [t, t + k), 0 where not live.
FF_INLINE VecD load_live(const Reals& a, int64_t t, int k, VecL live) {
  VecD x;
  if (k < N) {
    x = VecD{};
    for (int i = 0; i < k; ++i) x[i] = a[t + i];
  } else if (a.wide) {
    x = load(static_cast<const double*>(a.data) + t);
  } else {
    Half half;
    __builtin_memcpy(&half, static_cast<const float*>(a.data) + t, sizeof half);
    x = __builtin_convertvector(half, VecD);
  }
  return live ? x : VecD{};
}
FF_INLINE void store_reals(const Reals& a, int64_t t, int k, VecD x) {
  if (k < N) {
    for (int i = 0; i < k; ++i) a.set(t + i, x[i]);
  } else if (a.wide) {
    store(static_cast<double*>(a.data) + t, x);
  } else {
    const Half half = __builtin_convertvector(x, Half);
    __builtin_memcpy(static_cast<float*>(a.data) + t, &half, sizeof half);
  }
}
// Which of tokens [t, t + k) count.
FF_INLINE VecL live_lanes(const uint8_t* mask, int64_t t, int k) {
  if (mask == nullptr && k == N) return VecL{} - 1;
  if (k == N) {
    return load_bytes(mask + t) != 0;
  }
  VecL live{};
  for (int i = 0; i < k; ++i) live[i] = mask == nullptr || mask[t + i] ? -1 : 0;
  return live;
}

// One sequence. The gradient of a token may depend on all of its sequence, through the ratio: then
// the tokens are gone through twice more.
void policy_sequence(const Policy& a, int64_t i, double all) {
  const PolicyTokens& tokens = a.tokens;
  const PolicyOptions& o = a.options;
  const TokenRange span = sequence(tokens, i);
  double* sums = a.scratch + i * kPolicySums;
  const double n = sums[0];
  const double share = token_share(o, n, all, tokens.sequences);
  const double side_share = clipped_share(o, n, all, tokens.sequences);
  const bool by_token = o.importance == Importance::token;
  double sequence_x = 0;
  if (!by_token) {
    for (int64_t t = span.begin; t < span.end; ++t) {
      if (a.mask == nullptr || a.mask[t]) sequence_x += log_ratio_at(tokens, o, t, a.logprobs[t]);
    }
    if (o.importance == Importance::mean) sequence_x /= n;
  }
  Token<VecD> token{{},
                    {},
                    {},
                    splat<VecD>(1),
                    splat<VecD>(tokens.by_token || n == 0 ? 0 : tokens.advantages[i]),
                    static_cast<bool>(tokens.old_logprobs),
                    tokens.ref_logprobs && o.kl_beta != 0};
  VecD loss{}, low{}, high{}, kl{}, back{};
  double by_x = 0;
  // the second time with what the whole sequence passes back to each of its tokens
  for (int turn = 0; turn < (by_token ? 1 : 2); ++turn) {
    const VecD each = splat<VecD>(o.importance == Importance::mean ? by_x / n : by_x);
    for (int64_t t = span.begin; t < span.end; t += N) {
      const int k = span.end - t < N ? static_cast<int>(span.end - t) : N;
      const VecL live = live_lanes(a.mask, t, k);
      token.lp = load_live(a.logprobs, t, k, live);
      if (token.has_old) token.old = load_live(tokens.old_logprobs, t, k, live);
      if (token.has_kl) token.ref = load_live(tokens.ref_logprobs, t, k, live);
      if (tokens.weights) token.weight = load_live(tokens.weights, t, k, live);
      if (tokens.by_token) token.advantage = load_live(tokens.advantages, t, k, live);
      const TokenLoss<VecD> x = token_loss<Tokens>(o, token, sequence_x, n);
      VecD g = splat<VecD>(share);
      if (a.upstream) g *= load_live(a.upstream, t, k, live);
      if (by_token || turn > 0) {
        const VecD gradient = by_token ? g * (x.by_lp + x.by_x) : g * x.by_lp + each;
        store_reals(a.gradient, t, k, live ? gradient : VecD{});
      }
      if (turn > 0) continue;
      const VecD value = live ? x.value : VecD{};
      if (o.reduction == PolicyReduction::none && a.out) store_reals(a.out, t, k, value);
      loss += value;
      back += live ? g * x.by_x : VecD{};
      low += live ? x.low : VecD{};
      high += live ? x.high : VecD{};
      kl += live ? x.approx_kl : VecD{};
    }
    by_x = horizontal_sum(back);
  }
  sums[1] = n == 0 ? 0 : share * horizontal_sum(loss);
  sums[2] = n == 0 ? 0 : side_share * horizontal_sum(low);
  sums[3] = n == 0 ? 0 : side_share * horizontal_sum(high);
  sums[4] = n == 0 ? 0 : horizontal_sum(kl) / all;
}

void policy(const Policy& a) {
  const PolicyTokens& tokens = a.tokens;
  const int64_t sequences = tokens.sequences;
  for (int64_t i = 0; i < sequences; ++i) {
    const TokenRange span = sequence(tokens, i);
    int64_t count = a.mask == nullptr ? span.end - span.begin : 0;
    if (a.mask != nullptr) {
      for (int64_t t = span.begin; t < span.end; ++t) count += a.mask[t] != 0;
    }
    a.scratch[i * kPolicySums] = static_cast<double>(count);
  }
  const double all = sum_of(a.scratch, sequences, kPolicySums);
  const int64_t mean = sequences == 0 ? 0 : tokens.total / sequences;
  parallel_for(sequences, kTokenBytes * (mean + 1), a.place.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) policy_sequence(a, i, all);
               });
  if (a.options.reduction != PolicyReduction::none && a.out) {
    a.out.set(0, sum_of(a.scratch + 1, sequences, kPolicySums));
  }
  for (int k = 0; a.metrics && k < 3; ++k) {
    a.metrics.set(k, sum_of(a.scratch + 2 + k, sequences, kPolicySums));
  }
}

template <class T> void policy_logits_t(const PolicyLogits& a) {
  const PolicyTokens& tokens = a.tokens;
  const PolicyOptions& o = a.options;
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab, sequences = tokens.sequences;
  double *counts = a.scratch, *sums = a.scratch + sequences;
  for (int64_t i = 0; i < sequences; ++i) {
    const TokenRange span = sequence(tokens, i);
    int64_t count = 0;
    for (int64_t t = span.begin; t < span.end; ++t) count += a.actions[t] != a.ignore_index;
    counts[i] = static_cast<double>(count);
  }
  const double all = sum_of(counts, sequences, 1);
  const double upstream = a.upstream ? a.upstream[0] : 1.0;
  const bool stream = prepare_gradient<T>(a.gradient, a.logits, a.shape);
  parallel_for(rows, 2 * vocab * sizeof(T), a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = a.actions[r];
      T* out = row_of<T>(a.gradient, r);
      double* row = sums + r * kPolicyRowSums;
      row[0] = row[1] = row[2] = row[3] = 0;
      if (y == a.ignore_index || y < 0 || y >= vocab) {
        row_zero(out, vocab);
        if (y != a.ignore_index) row[0] = __builtin_nan("");
        continue;
      }
      const T* z = row_of<T>(a.logits, r);
      const RowStats stats = row_stats<T, true, false>(z, vocab, a.temperature);
      const RowLogprob s = row_logprob(stats, load_scalar(z + y), a.temperature);
      const int64_t i = segment_of(tokens.offsets, sequences, tokens.length, r);
      const double share = token_share(o, counts[i], all, sequences);
      const double A = tokens.advantages[tokens.by_token ? r : i];
      const Token<double> token = token_at(tokens, o, r, s.logp, A);
      const TokenLoss<double> term = token_loss<OneToken>(o, token, 0, counts[i]);
      row[0] = share * term.value;
      row[1] = term.high - term.low;
      row[2] = term.approx_kl;
      row[3] = s.entropy;
      const double g = upstream * share * (term.by_lp + term.by_x);
      const double h = -upstream * a.entropy_coef / all;
      if (g == 0.0 && h == 0.0) {
        row_zero(out, vocab);
        continue;
      }
      const auto d = logprob_gradient(s, a.temperature, g, h, 0.0);
      write_gradient<T>(z, out, vocab, d.row, h != 0.0, stream);
      store_scalar(out + y, d.at_target);
    }
    if (stream) stream_fence();
  });
  double low = 0, high = 0;
  for (int64_t r = 0; r < rows; ++r) {
    low += sums[r * kPolicyRowSums + 1] < 0;
    high += sums[r * kPolicyRowSums + 1] > 0;
  }
  const double each = all == 0 ? 0 : 1 / all;
  const double entropy = each * sum_of(sums + 3, rows, kPolicyRowSums);
  if (a.out) {
    const double loss = sum_of(sums, rows, kPolicyRowSums);
    a.out.set(0, a.entropy_coef == 0 ? loss : loss - a.entropy_coef * entropy);
  }
  if (!a.metrics) return;
  a.metrics.set(0, each * low);
  a.metrics.set(1, each * high);
  a.metrics.set(2, each * sum_of(sums + 2, rows, kPolicyRowSums));
  a.metrics.set(3, entropy);
}

void policy_logits(const PolicyLogits& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) { policy_logits_t<T>(a); });
}

// The tokens that count first, so that one more visit makes both the loss and its gradient.
void value_loss(const ValueLoss& a) {
  const int64_t blocks = value_loss_blocks(a.total);
  int64_t count = a.mask == nullptr ? a.total : 0;
  for (int64_t t = 0; a.mask != nullptr && t < a.total; ++t) count += a.mask[t] != 0;
  const double share = count == 0 ? 0 : 1 / static_cast<double>(count);
  const bool clipped = static_cast<bool>(a.old_values);
  parallel_for(blocks, 16 * kValueBlock, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kValueBlock;
      const int64_t last = first + kValueBlock < a.total ? first + kValueBlock : a.total;
      VecD sum{};
      for (int64_t t = first; t < last; t += N) {
        const int k = last - t < N ? static_cast<int>(last - t) : N;
        const VecL live = live_lanes(a.mask, t, k);
        const VecD v = load_live(a.values, t, k, live), target = load_live(a.returns, t, k, live);
        const VecD old = clipped ? load_live(a.old_values, t, k, live) : VecD{};
        const ValueTerm<VecD> term = value_term(v, target, old, a.clip, clipped);
        sum += live ? term.value : VecD{};
        if (a.gradient) store_reals(a.gradient, t, k, live ? share * term.slope : VecD{});
      }
      a.scratch[b] = horizontal_sum(sum);
    }
  });
  a.out.set(0, share * sum_of(a.scratch, blocks, 1));
}

// Mean and Σ (r - mean)² of what is not NaN.
struct Moments {
  double count, mean, squares;
};
Moments moments(const Reals& r, int64_t begin, int64_t end) {
  Moments m{0, 0, 0};
  for (int64_t i = begin; i < end; ++i) {
    const double x = r[i];
    if (x != x) continue;
    m.count += 1;
    m.mean += x;
  }
  if (m.count > 0) m.mean /= m.count;
  for (int64_t i = begin; i < end; ++i) {
    const double x = r[i];
    if (x == x) m.squares += (x - m.mean) * (x - m.mean);
  }
  return m;
}

void group_advantages(const GroupAdvantages& a) {
  const auto deviation = [](const Moments& m) {
    return m.count > 1 ? sqrt(m.squares / (m.count - 1)) : 0.0;
  };
  const bool by_batch = a.scale == AdvantageScale::batch;
  const double batch = by_batch ? deviation(moments(a.rewards, 0, a.groups * a.group_size)) : 0.0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t begin = g * a.group_size, end = begin + a.group_size;
    const Moments m = moments(a.rewards, begin, end);
    double factor = 1;
    if (a.scale != AdvantageScale::none) factor = 1 / ((by_batch ? batch : deviation(m)) + 1e-4);
    // r - the mean of the n - 1 others = (r - mean)·n/(n - 1)
    if (a.leave_one_out) factor *= m.count > 1 ? m.count / (m.count - 1) : 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const double r = a.rewards[i];
      a.out.set(i, r != r ? 0.0 : factor * (r - m.mean));
    }
  }
}

void gae(const Gae& a) {
  const int64_t stride = a.length + (a.bootstrap ? 1 : 0);
  parallel_for(a.sequences, 24 * a.length, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double next = a.bootstrap ? a.values[i * stride + a.length] : 0.0, advantage = 0;
      for (int64_t t = a.length - 1; t >= 0; --t) {
        const int64_t at = i * a.length + t;
        if (a.mask != nullptr && !a.mask[at]) {
          a.advantages.set(at, 0);
          a.returns.set(at, 0);
          continue;
        }
        const double v = a.values[i * stride + t];
        advantage = a.rewards[at] + a.gamma * next - v + a.gamma * a.lam * advantage;
        next = v;
        a.advantages.set(at, advantage);
        a.returns.set(at, advantage + v);
      }
    }
  });
}

}  // namespace

const PolicyKernels& policy_kernels() {
  static constexpr PolicyKernels kernels{policy, policy_logits, value_loss, group_advantages, gae};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
