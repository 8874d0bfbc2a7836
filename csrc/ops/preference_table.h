// The preference losses, one line each, for CPUs and GPUs. In double whatever the input.
#pragma once
#include <math.h>

#include "ops/preference.h"

namespace finefuse {

// A value with its derivatives by what the chosen (w) and the rejected (l) completion scored, so
// that a loss is written once, as its formula, and cannot disagree with its gradient.
struct Dual {
  double v, w, l;
};
FF_TABLE Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.w - b.w, a.l - b.l}; }
FF_TABLE Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.w + b.w, a.l + b.l}; }
FF_TABLE Dual operator-(Dual a) { return {-a.v, -a.w, -a.l}; }
FF_TABLE Dual operator*(double s, Dual a) { return {s * a.v, s * a.w, s * a.l}; }
FF_TABLE Dual operator-(Dual a, double s) { return {a.v - s, a.w, a.l}; }
FF_TABLE Dual operator-(double s, Dual a) { return {s - a.v, -a.w, -a.l}; }
FF_TABLE Dual operator+(Dual a, double s) { return {a.v + s, a.w, a.l}; }

// A derivative that is 0 stays 0 where the other factor is infinite.
FF_TABLE double times(double a, double b) { return a == 0 || b == 0 ? 0 : a * b; }
FF_TABLE Dual chain(Dual a, double value, double slope) {
  return {value, slope * a.w, slope * a.l};
}
FF_TABLE Dual square(Dual a) { return chain(a, a.v * a.v, 2 * a.v); }
FF_TABLE Dual relu(Dual a) { return a.v <= 0 ? chain(a, 0, 0) : a; }  // NaN passes
FF_TABLE Dual log_sigmoid(Dual a) {
  const double e = exp(-fabs(a.v));  // shared by the value and its slope, sigmoid(-a)
  return chain(a, (a.v < 0 ? a.v : 0) - log1p(e), (a.v >= 0 ? e : 1) / (1 + e));
}
FF_TABLE Dual sigmoid(Dual a) {
  const double e = exp(-fabs(a.v)), s = 1 / (1 + e);  // of |a|
  return chain(a, a.v >= 0 ? s : e * s, e * s * s);
}
// At eps = 0 the second term is left out, not 0·inf.
FF_TABLE Dual mixed_sigmoid(Dual x, double first, double second) {
  const Dual loss = -(first * log_sigmoid(x));
  return second == 0 ? loss : loss - second * log_sigmoid(-x);
}
// -(1 - eps)·L(x) - eps·L(-x)
FF_TABLE Dual smoothed_sigmoid(Dual x, double eps) { return mixed_sigmoid(x, 1 - eps, eps); }
// S(x)·[L(x) - ln(1 - eps)] + S(-x)·[L(-x) - ln eps]: the KL divergence from (1 - eps, eps). Near
// its zero the two terms cancel; there, with t = ±(x - ln((1 - eps)/eps)) and the smaller
// probability s, it is s·t + ln(1 + s·(e^{-t} - 1)): rounding errors of the size of s·t, not of s.
FF_TABLE Dual exo_pair(Dual x, double eps) {
  const double e = exp(-fabs(x.v)), s = 1 / (1 + e), near = -log1p(e);  // of |x|
  const double p = x.v >= 0 ? s : e * s, q = x.v >= 0 ? e * s : s;
  const double log_p = x.v >= 0 ? near : x.v + near, log_q = x.v >= 0 ? near - x.v : near;
  const double keep = log1p(-eps), swap = log(eps), apart = x.v - keep + swap;
  if (fabs(apart) < 1) {
    const double t = x.v >= 0 ? -apart : apart, least = e * s;
    return chain(x, least * t + log1p(least * expm1(-t)), p * q * apart);
  }
  const double value = times(p, log_p - keep) + times(q, log_q - swap);
  return chain(x, x.v == x.v ? value : x.v, times(p * q, apart));
}
// (1 - m)·(-L(x)) + m·e^{-x}, m = S(x / tau); the second term as e^{L(x / tau) - x}, no inf·0
FF_TABLE Dual discopop(Dual x, double tau) {
  const double y = x.v / tau, e = exp(-fabs(y)), s = 1 / (1 + e), near = log1p(e);  // of |y|
  const double m = y >= 0 ? s : e * s, rest = y >= 0 ? e * s : s;
  const double z = exp((y >= 0 ? -x.v : times(x.v, 1 / tau - 1)) - near);
  const Dual loss = -log_sigmoid({x.v, 1, 0});
  const double slope = rest * loss.w - times(m * rest / tau, loss.v) + times(z, rest / tau - 1);
  return chain(x, times(rest, loss.v) + z, slope);
}
// S(a) + S(-b), a = beta·w, b = beta·(w - l). Its slope by w is S'(a) - S'(b), which for small beta
// is a difference of two numbers near 1/4; as a product, with p and q the smaller and the larger of
// |a| and |b|, S'(p) - S'(q) = S'(p)·S(q)^2·(1 - e^{-(q - p)})·(1 - e^{-(q + p)}). q ± p are |a +
// b| and |a - b| in some order, made of w and l themselves; nothing there overflows or cancels.
FF_TABLE Dual apo_down(double beta, Dual w, Dual l) {
  const Dual own = sigmoid(beta * w), lost = sigmoid(-(beta * (w - l)));
  const double a = fabs(beta * w.v), b = fabs(beta * (w.v - l.v));
  const double sum = beta * (2 * w.v - l.v), gap = beta * l.v;  // a + b, a - b, without the bars
  const double e = exp(-(a < b ? a : b)), s = 1 / (1 + e), far = 1 / (1 + exp(-(a < b ? b : a)));
  const double apart = e * s * s * far * far * expm1(-fabs(sum)) * expm1(-fabs(gap));
  const double slope = (sum < 0) == (gap < 0) ? -apart : apart;  // |a| is the larger: it falls
  return {own.v + lost.v, beta * slope * w.w, lost.l};
}
// o = a - ln(1 - e^a). a is at most -2^-53, where o is 36.7: completions that are certain or empty.
FF_TABLE Dual log_odds(Dual a) {
  const double least = -0x1p-53;
  const bool certain = a.v > least;
  const double x = certain ? least : a.v, rest = -expm1(x);
  return chain(a, x - (x > -0.6931471805599453 ? log(rest) : log1p(-exp(x))),
               certain ? 0 : 1 / rest);
}

// What stands for the log-ratio r in d: f'(e^r), f'(1) = 0; w is its slope.
inline constexpr double kDivergenceExponent = 80;
FF_TABLE Dual divergence(const PreferenceOptions& o, double r) {
  if (o.divergence == Divergence::reverse_kl) return {r, 1, 0};
  if (o.divergence == Divergence::js) return log_sigmoid({r, 1, 0}) + 0.6931471805599453;
  const double rate = o.divergence == Divergence::forward_kl ? -1 : o.alpha - 1;
  if (rate == 0) return {r, 1, 0};
  const bool clamped = rate * r > kDivergenceExponent;  // not NaN
  const double t = clamped ? kDivergenceExponent : rate * r;
  return {expm1(t) / rate, clamped ? 0 : exp(t), 0};
}

// ---- the table: one line a loss -----------------------------------------------------------------

// Of a pair. w and l: what stands for the log-ratios r_w and r_l or, for losses without a
// reference, the log-probabilities; divided by the completion's length where that is asked for.
// Without the NLL.
FF_TABLE Dual pair_loss(const PreferenceOptions& o, PreferenceLoss loss, Dual w, Dual l) {
  const double beta = o.beta, eps = o.label_smoothing;
  const Dual d = w - l, x = beta * d;
  switch (loss) {
    case PreferenceLoss::sigmoid:
    case PreferenceLoss::aot:
    case PreferenceLoss::aot_unpaired:
    case PreferenceLoss::cpo: return smoothed_sigmoid(x, eps);
    case PreferenceLoss::ipo: return square(d - 1 / (2 * beta));
    case PreferenceLoss::hinge: return relu(1 - x);
    case PreferenceLoss::robust: {
      const double rate = 1 / (1 - 2 * eps);
      return mixed_sigmoid(x, rate * (1 - eps), -rate * eps);
    }
    case PreferenceLoss::exo_pair: return exo_pair(x, eps);
    case PreferenceLoss::nca_pair:
      return -log_sigmoid(beta * w) - 0.5 * log_sigmoid(-(beta * w)) -
             0.5 * log_sigmoid(-(beta * l));
    case PreferenceLoss::bco_pair:
      return -log_sigmoid(beta * w - o.delta) - log_sigmoid(-(beta * l - o.delta));
    case PreferenceLoss::sppo_hard: return square(w - 1 / (2 * beta)) + square(l + 1 / (2 * beta));
    case PreferenceLoss::apo_zero: return sigmoid(-(beta * w)) + sigmoid(beta * l);
    case PreferenceLoss::apo_down: return apo_down(beta, w, l);
    case PreferenceLoss::discopop: return discopop(x, o.tau);
    case PreferenceLoss::sigmoid_norm: return -log_sigmoid(x);
    case PreferenceLoss::sft: return {0, 0, 0};
    case PreferenceLoss::simpo: return smoothed_sigmoid(x - o.gamma, eps);
    case PreferenceLoss::slic: return relu(beta - d);
    case PreferenceLoss::orpo: return -(beta * log_sigmoid(log_odds(w) - log_odds(l)));
    case PreferenceLoss::reward: return -log_sigmoid(d);
    case PreferenceLoss::kto:
    case PreferenceLoss::apo_zero_unpaired: break;
  }
  return {__builtin_nan(""), 0, 0};
}

// Of one example, by its log-ratio (w); z is kto's.
FF_TABLE Dual example_loss(const PreferenceOptions& o, PreferenceLoss loss, Dual r, double z,
                           bool desirable) {
  const Dual x = o.beta * (loss == PreferenceLoss::kto ? r - z : r);
  const double weight = loss != PreferenceLoss::kto ? 1 : desirable ? o.desirable : o.undesirable;
  return weight * sigmoid(desirable ? -x : x);
}

FF_TABLE bool of_examples(PreferenceLoss loss) {
  return loss == PreferenceLoss::kto || loss == PreferenceLoss::apo_zero_unpaired;
}
FF_TABLE bool sorts(PreferenceLoss loss) {
  return loss == PreferenceLoss::aot || loss == PreferenceLoss::aot_unpaired;
}
FF_TABLE bool has_reference(PreferenceLoss loss) {
  return loss != PreferenceLoss::sft && loss != PreferenceLoss::cpo &&
         loss != PreferenceLoss::simpo && loss != PreferenceLoss::slic &&
         loss != PreferenceLoss::orpo;
}
// The factor of the NLL.
FF_TABLE double nll_weight(const PreferenceOptions& o, PreferenceLoss loss) {
  if (loss == PreferenceLoss::sft || loss == PreferenceLoss::orpo) return 1;
  return loss == PreferenceLoss::cpo || loss == PreferenceLoss::simpo ||
                 loss == PreferenceLoss::slic
             ? o.sft_weight
             : 0;
}

// ---- the whole batch ----------------------------------------------------------------------------

struct Batch {
  double pair_scale, example_scale;  // 1/n where the loss is a mean
  double nll, nll_slope, lp_slope;   // the loss's derivative by it, and through it by each lp_w
  double z;                          // kto
};

FF_TABLE double or_one(const Reals& x, int64_t i) { return x ? x[i] : 1; }
// An empty completion counts as one token; a negative length, which CPUs refuse, as NaN.
FF_TABLE double length(const Reals& lengths, int64_t i) {
  const double n = or_one(lengths, i);
  return n > 0 ? n : n == 0 ? 1 : __builtin_nan("");
}

FF_TABLE bool needs_sums(const Preference& a) {
  bool nll = false;
  for (int k = 0; k < a.options.count; ++k)
    nll |= nll_weight(a.options, a.options.terms[k].loss) != 0;
  return nll || a.kl;
}
// Σ lp_w, Σ n_w, Σ of what the elements count, Σ kl: pair i's part, by every `step`-th.
inline constexpr int kBatchSums = 4;
FF_TABLE void batch_sums(const Preference& a, int64_t first, int64_t step,
                         double (&sums)[kBatchSums]) {
  for (int64_t i = first; i < a.chosen_count; i += step) {
    sums[0] += a.chosen[i];
    sums[1] += a.options.nll_by_length ? length(a.chosen_lengths, i) : 1;
    sums[2] += or_one(a.weights, i) * or_one(a.upstream, i);
  }
  for (int64_t i = first; i < a.kl_count; i += step) sums[3] += a.kl[i];
}
FF_TABLE Batch batch_of(const Preference& a, const double (&sums)[kBatchSums]) {
  const PreferenceOptions& o = a.options;
  const auto scale = [&](int64_t n) {
    return o.reduction != Reduction::mean ? 1.0 : n == 0 ? 0.0 : 1 / static_cast<double>(n);
  };
  Batch b{scale(a.chosen_count), scale(a.chosen_count + a.rejected_count), 0, 0, 0, 0};
  for (int k = 0; k < o.count; ++k)
    b.nll_slope += o.terms[k].weight * nll_weight(o, o.terms[k].loss);
  b.nll_slope = times(b.nll_slope * b.pair_scale, sums[2]);
  if (a.chosen_nll) {
    b.nll = a.chosen_nll[0];
  } else if (a.chosen_count > 0) {
    b.nll = -sums[0] / sums[1];
    b.lp_slope = b.nll_slope == 0 ? 0 : -b.nll_slope / sums[1];
  }
  const double z = a.kl_count == 0 ? 0 : sums[3] / static_cast<double>(a.kl_count);
  b.z = z <= 0 ? 0 : z;  // NaN passes
  return b;
}

// ---- a pair, or the i-th chosen and the i-th rejected -------------------------------------------

struct Completion {
  double lp, r, n;
};
FF_TABLE Completion completion(const Reals& lp, const Reals& ref, const Reals& lengths, int64_t i) {
  return {lp[i], lp[i] - (ref ? ref[i] : 0), length(lengths, i)};
}

// All terms but those that sort. sums: loss, pairs won (or rewards of the right sign), Σ r_w, Σ
// r_l.
inline constexpr int kPreferenceSums = 4;
FF_TABLE void visit(const Preference& a, const Batch& b, int64_t i,
                    double (&sums)[kPreferenceSums]) {
  const PreferenceOptions& o = a.options;
  const bool is_w = i < a.chosen_count, is_l = i < a.rejected_count;
  const bool same = a.chosen_count == a.rejected_count;
  const int64_t other = a.chosen_count + i;
  Completion w{}, l{};
  if (is_w) w = completion(a.chosen, a.ref_chosen, a.chosen_lengths, i);
  if (is_l) l = completion(a.rejected, a.ref_rejected, a.rejected_lengths, i);
  double out = 0, out_l = 0;           // of the pair or of the chosen; of the rejected
  double by_w = b.lp_slope, by_l = 0;  // by lp alone
  double by_r_w = 0, by_r_l = 0;       // through the reference, too
  bool one_by_one = false;
  for (int k = 0; k < o.count; ++k) {
    const auto [kind, by_length, weight] = o.terms[k];
    const double n_w = by_length ? w.n : 1, n_l = by_length ? l.n : 1;
    if (sorts(kind)) continue;
    if (of_examples(kind)) {
      one_by_one = true;
      const double factor = weight * b.example_scale;
      if (is_w) {
        const Dual loss = example_loss(o, kind, {w.r / n_w, 1 / n_w, 0}, b.z, true);
        const double share = factor * or_one(a.weights, i);
        out += share * loss.v;
        by_r_w += share * or_one(a.upstream, i) * loss.w;
      }
      if (is_l) {
        const Dual loss = example_loss(o, kind, {l.r / n_l, 1 / n_l, 0}, b.z, false);
        const double share = factor * or_one(a.weights, other);
        out_l += share * loss.v;
        by_r_l += share * or_one(a.upstream, other) * loss.w;
      }
      continue;
    }
    const bool reference = has_reference(kind);
    const Dual f = reference ? divergence(o, w.r) : Dual{w.lp, 1, 0};
    const Dual g = reference ? divergence(o, l.r) : Dual{l.lp, 1, 0};
    Dual loss = pair_loss(o, kind, {f.v / n_w, f.w / n_w, 0}, {g.v / n_l, 0, g.w / n_l});
    const double share = weight * b.pair_scale * or_one(a.weights, i);
    const double counts = share * or_one(a.upstream, i);
    const double nll = nll_weight(o, kind);
    if (nll != 0) loss.v += nll * b.nll;
    if (reference) {
      by_r_w += counts * loss.w;
      by_r_l += counts * loss.l;
    } else {
      by_w += counts * loss.w;
      by_l += counts * loss.l;
    }
    if (kind == PreferenceLoss::reward && o.center != 0) {
      const double sum = w.lp + l.lp;
      loss.v += o.center * sum * sum;
      by_w += counts * 2 * o.center * sum;
      by_l += counts * 2 * o.center * sum;
    }
    out += share * loss.v;
  }
  sums[0] += out + out_l;
  sums[1] += same ? w.r > l.r : (is_w && w.r > 0) + (is_l && l.r < 0);
  sums[2] += w.r;
  sums[3] += l.r;
  if (is_w) {
    a.gradient.set(i, by_w + by_r_w);
    if (a.ref_gradient) a.ref_gradient.set(i, -by_r_w);
  }
  if (is_l) {
    a.gradient.set(other, by_l + by_r_l);
    if (a.ref_gradient) a.ref_gradient.set(other, -by_r_l);
  }
  if (!a.accuracy) return;  // gradients alone
  if (o.reduction == Reduction::none) {
    if (is_w) a.out.set(i, out);
    if (is_l && one_by_one) a.out.set(other, out_l);
  }
  if (is_w) a.chosen_rewards.set(i, o.beta * w.r);
  if (is_l) a.rejected_rewards.set(i, o.beta * l.r);
  if (same) a.margins.set(i, o.beta * (w.r - l.r));
}

FF_TABLE void add(const Reals& x, int64_t i, double value) { x.set(i, x[i] + value); }

// The i-th of a term that sorts, added to what the visits left. No two i have an index in common.
FF_TABLE void visit_sorted(const Preference& a, const Batch& b, const PreferenceTerm& term,
                           int64_t i, double (&sums)[kPreferenceSums]) {
  const bool differences = term.loss == PreferenceLoss::aot;
  const int64_t* order = differences ? a.aot_order : a.aot_unpaired_order;
  const int64_t pairs = a.chosen_count, first = order[i], second = order[pairs + i];
  const double share = term.weight * b.pair_scale * or_one(a.weights, i);
  double value = __builtin_nan("");
  if (first >= 0 && first < pairs && second >= 0 && second < pairs) {
    // lp_w, lp_l, ref_w, ref_l of d = lp_w - lp_l - (ref_w - ref_l)
    const int64_t at[4] = {first, differences ? first : second, differences ? second : first,
                           second};
    const Completion w = completion(a.chosen, {}, a.chosen_lengths, at[0]);
    const Completion l = completion(a.rejected, {}, a.rejected_lengths, at[1]);
    const double ref[2] = {a.ref_chosen ? a.ref_chosen[at[2]] : 0,
                           a.ref_rejected ? a.ref_rejected[at[3]] : 0};
    double n[4] = {1, 1, 1, 1};
    if (term.by_length) {
      n[0] = w.n, n[1] = l.n;
      n[2] = length(a.chosen_lengths, at[2]), n[3] = length(a.rejected_lengths, at[3]);
    }
    const double r_w = differences ? w.lp / n[0] - l.lp / n[1] : (w.lp - ref[0]) / n[0];
    const double r_l = differences ? ref[0] / n[2] - ref[1] / n[3] : (l.lp - ref[1]) / n[1];
    const Dual loss = pair_loss(a.options, term.loss, {r_w, 1, 0}, {r_l, 0, 1});
    value = loss.v;
    const double slope = share * or_one(a.upstream, i) * loss.w;
    add(a.gradient, at[0], slope / n[0]);
    add(a.gradient, pairs + at[1], -slope / n[1]);
    if (a.ref_gradient) {
      add(a.ref_gradient, at[2], -slope / n[2]);
      add(a.ref_gradient, pairs + at[3], slope / n[3]);
    }
  }
  sums[0] += share * value;
  if (a.out && a.options.reduction == Reduction::none) add(a.out, i, share * value);
}

FF_TABLE void finish(const Preference& a, const Batch& b, const double (&sums)[kPreferenceSums]) {
  if (a.nll_gradient) a.nll_gradient.set(0, b.nll_slope);
  if (!a.accuracy) return;  // gradients alone
  const double n_w = static_cast<double>(a.chosen_count),
               n_l = static_cast<double>(a.rejected_count);
  const bool same = a.chosen_count == a.rejected_count;
  const double count = same ? n_w : n_w + n_l;
  if (a.options.reduction != Reduction::none) a.out.set(0, sums[0]);
  a.accuracy.set(0, count == 0 ? 0 : sums[1] / count);
  if (!same)
    a.margins.set(
        0, a.options.beta * ((n_w == 0 ? 0 : sums[2] / n_w) - (n_l == 0 ? 0 : sums[3] / n_l)));
}

}  // namespace finefuse
