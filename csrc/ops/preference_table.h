// The preference losses, one line each, for CPUs and GPUs. In double whatever the input.
#pragma once
#include <math.h>

#include "ops/preference.h"

namespace finefuse {

// A value with its derivatives by the chosen (w) and the rejected (l) log-ratio, so that a loss is
// written once, as its formula, and cannot disagree with its gradient.
struct Dual {
  double v, w, l;
};
FF_TABLE Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.w - b.w, a.l - b.l}; }
FF_TABLE Dual operator-(Dual a) { return {-a.v, -a.w, -a.l}; }
FF_TABLE Dual operator*(double s, Dual a) { return {s * a.v, s * a.w, s * a.l}; }
FF_TABLE Dual operator-(Dual a, double s) { return {a.v - s, a.w, a.l}; }
FF_TABLE Dual operator-(double s, Dual a) { return {s - a.v, -a.w, -a.l}; }

FF_TABLE Dual chain(Dual a, double value, double slope) {
  return {value, slope * a.w, slope * a.l};
}
FF_TABLE Dual square(Dual a) { return chain(a, a.v * a.v, 2 * a.v); }
FF_TABLE Dual relu(Dual a) { return a.v <= 0 ? chain(a, 0, 0) : a; }  // NaN passes
FF_TABLE Dual log_sigmoid(Dual a) {
  const double e = exp(-fabs(a.v));  // shared by the value and its slope, sigmoid(-a)
  return chain(a, (a.v < 0 ? a.v : 0) - log1p(e), (a.v >= 0 ? e : 1) / (1 + e));
}
// -(1 - eps)·L(x) - eps·L(-x); at eps = 0 the second term is left out, not 0·inf.
FF_TABLE Dual smoothed_sigmoid(Dual x, double eps) {
  if (eps == 0) return -log_sigmoid(x);
  return -((1 - eps) * log_sigmoid(x)) - eps * log_sigmoid(-x);
}

// The table: one line a loss. w and l are the log-ratios r_w and r_l, divided by the completion's
// length where lengths are given.
FF_TABLE Dual pair_loss(PreferenceLoss loss, Dual w, Dual l, double beta, double eps) {
  const Dual d = w - l;
  switch (loss) {
    case PreferenceLoss::sigmoid: return smoothed_sigmoid(beta * d, eps);
    case PreferenceLoss::ipo: return square(d - 1 / (2 * beta));
    case PreferenceLoss::hinge: return relu(1 - beta * d);
    default: break;
  }
  return {__builtin_nan(""), 0, 0};
}

// An empty completion counts as one token; its log-probability is 0.
FF_TABLE double length(const Reals& lengths, int64_t i) {
  const double n = lengths ? lengths[i] : 1;
  return n == 0 ? 1 : n;
}

// One pair from the arrays: the log-ratios, the loss and its derivatives.
struct Pair {
  double r_w, r_l;
  Dual loss;
};
FF_TABLE Pair pair_at(const Preference& a, int64_t i) {
  const double r_w = a.chosen[i] - (a.ref_chosen ? a.ref_chosen[i] : 0);
  const double r_l = a.rejected[i] - (a.ref_rejected ? a.ref_rejected[i] : 0);
  const double n_w = length(a.chosen_lengths, i), n_l = length(a.rejected_lengths, i);
  const Dual w{r_w / n_w, 1 / n_w, 0}, l{r_l / n_l, 0, 1 / n_l};
  return {r_w, r_l, pair_loss(a.options.terms[0].loss, w, l, a.options.beta, a.options.label_smoothing)};
}

}  // namespace finefuse
