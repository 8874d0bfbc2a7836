// Preference losses, value and gradient in one visit of each pair.
//
// All arithmetic is double whatever the input: a pair costs two transcendental functions, about
// 40 ns, and there are as many pairs as sequences. One thread, pairs in order: deterministic.
#include "ops/preference.h"

#include <math.h>

namespace finefuse::FF_ISA_NS {
namespace {

// A value with its derivatives by the chosen (w) and the rejected (l) log-ratio, so that a loss is
// written once, as its formula, and cannot disagree with its gradient.
struct Dual {
  double v, w, l;
};
Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.w - b.w, a.l - b.l}; }
Dual operator-(Dual a) { return {-a.v, -a.w, -a.l}; }
Dual operator*(double s, Dual a) { return {s * a.v, s * a.w, s * a.l}; }
Dual operator-(Dual a, double s) { return {a.v - s, a.w, a.l}; }
Dual operator-(double s, Dual a) { return {s - a.v, -a.w, -a.l}; }

Dual chain(Dual a, double value, double slope) { return {value, slope * a.w, slope * a.l}; }
Dual square(Dual a) { return chain(a, a.v * a.v, 2 * a.v); }
Dual relu(Dual a) { return a.v <= 0 ? chain(a, 0, 0) : a; }  // NaN passes
Dual log_sigmoid(Dual a) {
  const double e = exp(-fabs(a.v));  // shared by the value and its slope, sigmoid(-a)
  return chain(a, (a.v < 0 ? a.v : 0) - log1p(e), (a.v >= 0 ? e : 1) / (1 + e));
}
// -(1 - eps)·L(x) - eps·L(-x); at eps = 0 the second term is left out, not 0·inf.
Dual smoothed_sigmoid(Dual x, double eps) {
  if (eps == 0) return -log_sigmoid(x);
  return -((1 - eps) * log_sigmoid(x)) - eps * log_sigmoid(-x);
}

// The table: one line a loss. w and l are the log-ratios r_w and r_l, divided by the completion's
// length where lengths are given.
Dual pair_loss(PreferenceLoss loss, Dual w, Dual l, double beta, double eps) {
  const Dual d = w - l;
  switch (loss) {
    case PreferenceLoss::sigmoid: return smoothed_sigmoid(beta * d, eps);
    case PreferenceLoss::ipo: return square(d - 1 / (2 * beta));
    case PreferenceLoss::hinge: return relu(1 - beta * d);
  }
  return {__builtin_nan(""), 0, 0};
}

// An empty completion counts as one token; its log-probability is 0.
double length(const Reals& lengths, int64_t i) {
  const double n = lengths ? lengths[i] : 1;
  return n == 0 ? 1 : n;
}

void preference(const Preference& a) {
  const double scale = a.reduction != Reduction::mean ? 1.0
                       : a.pairs == 0                 ? 0.0
                                                      : 1.0 / static_cast<double>(a.pairs);
  double total = 0;
  int64_t won = 0;
  for (int64_t i = 0; i < a.pairs; ++i) {
    const double r_w = a.chosen[i] - (a.ref_chosen ? a.ref_chosen[i] : 0);
    const double r_l = a.rejected[i] - (a.ref_rejected ? a.ref_rejected[i] : 0);
    const double n_w = length(a.chosen_lengths, i), n_l = length(a.rejected_lengths, i);
    const Dual w{r_w / n_w, 1 / n_w, 0}, l{r_l / n_l, 0, 1 / n_l};
    const Dual loss = pair_loss(a.loss, w, l, a.beta, a.label_smoothing);
    total += loss.v;
    won += r_w > r_l;
    if (a.reduction == Reduction::none) a.out.set(i, loss.v);
    a.gradient.set(i, scale * loss.w);
    a.gradient.set(a.pairs + i, scale * loss.l);
    a.chosen_rewards.set(i, a.beta * r_w);
    a.rejected_rewards.set(i, a.beta * r_l);
    a.margins.set(i, a.beta * (r_w - r_l));
  }
  if (a.reduction != Reduction::none) a.out.set(0, scale * total);
  a.accuracy.set(0, a.pairs == 0 ? 0 : static_cast<double>(won) / static_cast<double>(a.pairs));
}

}  // namespace

const PreferenceKernels& preference_kernels() {
  static constexpr PreferenceKernels kernels{preference};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
