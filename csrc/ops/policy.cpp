// Policy-gradient losses, value loss and advantages on the CPU.
//
// clang-format off
//   pass              reads + writes                  bound by
//   policy            up to 6 + 1 numbers a token     an exponential or two a token, about 20 ns
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
#include "core/softmax_row.h"
#include "ops/policy_table.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kTokenBytes = 64;  // what a token costs, as memory traffic: see parallel_for

struct Span {
  int64_t begin, end;
};
Span sequence(const PolicyTokens& a, int64_t i) {
  if (a.offsets.data == nullptr) return {i * a.length, (i + 1) * a.length};
  const int64_t begin = a.offsets[i], end = a.offsets[i + 1];
  return {begin < 0 ? 0 : begin, end > a.total ? a.total : end};
}

// The sequence that token t is in; offsets were checked.
int64_t sequence_of(const PolicyTokens& a, int64_t t) {
  if (a.offsets.data == nullptr) return t / a.length;
  int64_t low = 0, high = a.sequences;  // offsets[low] <= t < offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (a.offsets[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

double sum_of(const double* x, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i * stride];
  return sum;
}

// One sequence. The gradient of a token may depend on all of its sequence, through the ratio: then
// the tokens are gone through twice more.
void policy_sequence(const Policy& a, int64_t i, double all) {
  const PolicyTokens& tokens = a.tokens;
  const PolicyOptions& o = a.options;
  const Span span = sequence(tokens, i);
  double* sums = a.scratch + i * kPolicySums;
  const double n = sums[0];
  const double share = token_share(o, n, all, tokens.sequences);
  const double side_share = clipped_share(o, n, all, tokens.sequences);
  const bool by_token = o.importance == Importance::token;
  const auto live = [&](int64_t t) { return a.mask == nullptr || a.mask[t]; };
  double x = 0;
  if (!by_token) {
    for (int64_t t = span.begin; t < span.end; ++t) {
      if (live(t)) x += log_ratio_at(tokens, o, t, a.logprobs[t]);
    }
    if (o.importance == Importance::mean) x /= n;
  }
  const auto token = [&](int64_t t, double lp, double A) {
    return token_term(tokens, o, t, lp, by_token ? log_ratio_at(tokens, o, t, lp) : x, A, n);
  };
  const auto advantage = [&](int64_t t) { return tokens.advantages[tokens.by_token ? t : i]; };
  const auto upstream = [&](int64_t t) { return a.upstream ? share * a.upstream[t] : share; };
  double loss = 0, low = 0, high = 0, kl = 0, by_x = 0;
  for (int64_t t = span.begin; t < span.end; ++t) {
    if (!live(t)) {
      if (o.reduction == PolicyReduction::none && a.out) a.out.set(t, 0);
      a.gradient.set(t, 0);
      continue;
    }
    const double lp = a.logprobs[t], A = advantage(t), g = upstream(t);
    const Term term = token(t, lp, A);
    if (o.reduction == PolicyReduction::none && a.out) a.out.set(t, term.value);
    loss += term.value;
    by_x += g * term.by_x;
    if (by_token) a.gradient.set(t, g * (term.by_lp + term.by_x));
    const double ratio =
        by_token ? ratio_of(log_ratio_at(tokens, o, t, lp)).value : ratio_of(x).value;
    const int side = clipped_side(o, ratio, A);
    low += side < 0;
    high += side > 0;
    kl += approx_kl_at(tokens, t, lp);
  }
  if (!by_token) {
    const double each = o.importance == Importance::mean ? by_x / n : by_x;
    for (int64_t t = span.begin; t < span.end; ++t) {
      if (!live(t)) continue;
      const double lp = a.logprobs[t];
      a.gradient.set(t, upstream(t) * token(t, lp, advantage(t)).by_lp + each);
    }
  }
  sums[1] = n == 0 ? 0 : share * loss;
  sums[2] = n == 0 ? 0 : side_share * low;
  sums[3] = n == 0 ? 0 : side_share * high;
  sums[4] = n == 0 ? 0 : kl / all;
}

void policy(const Policy& a) {
  const PolicyTokens& tokens = a.tokens;
  const int64_t sequences = tokens.sequences;
  for (int64_t i = 0; i < sequences; ++i) {
    const Span span = sequence(tokens, i);
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
    const Span span = sequence(tokens, i);
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
      const int64_t i = sequence_of(tokens, r);
      const double share = token_share(o, counts[i], all, sequences);
      const double A = tokens.advantages[tokens.by_token ? r : i];
      const double x = log_ratio_at(tokens, o, r, s.logp);
      const Term term = token_term(tokens, o, r, s.logp, x, A, counts[i]);
      row[0] = share * term.value;
      row[1] = clipped_side(o, ratio_of(x).value, A);
      row[2] = approx_kl_at(tokens, r, s.logp);
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
  by_dtype<PolicyLogits>(a, policy_logits_t<float>, policy_logits_t<bf16>, policy_logits_t<f16>,
                         policy_logits_t<double>);
}

void value_loss(const ValueLoss& a) {
  const int64_t blocks = value_loss_blocks(a.total);
  double *counts = a.scratch, *sums = a.scratch + blocks;
  const auto live = [&](int64_t t) { return a.mask == nullptr || a.mask[t]; };
  parallel_for(blocks, 24 * kValueBlock, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kValueBlock;
      const int64_t last = first + kValueBlock < a.total ? first + kValueBlock : a.total;
      double sum = 0, slope;
      int64_t count = 0;
      for (int64_t t = first; t < last; ++t) {
        if (!live(t)) continue;
        ++count;
        sum += value_loss_at(a, t, &slope);
      }
      counts[b] = static_cast<double>(count);
      sums[b] = sum;
    }
  });
  const double all = sum_of(counts, blocks, 1), share = all == 0 ? 0 : 1 / all;
  a.out.set(0, share * sum_of(sums, blocks, 1));
  if (!a.gradient) return;
  parallel_for(blocks, 32 * kValueBlock, a.place.threads, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kValueBlock < a.total ? end * kValueBlock : a.total;
    for (int64_t t = begin * kValueBlock; t < last; ++t) {
      double slope = 0;
      if (live(t)) value_loss_at(a, t, &slope);
      a.gradient.set(t, share * slope);
    }
  });
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
