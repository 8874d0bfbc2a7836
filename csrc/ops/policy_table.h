// The policy-gradient losses of one token, value and derivative, for CPUs and GPUs, from
// log-probabilities and from logits. In double whatever the input.
#pragma once
#include <math.h>

#include "ops/policy.h"

namespace finefuse {

// Beyond e^±60 a ratio is clamped, and no gradient goes through it.
inline constexpr double kFarthest = 60.0;

FF_TABLE double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;  // NaN passes
}

// e^x, and its derivative by x.
struct Ratio {
  double value, slope;
};
FF_TABLE Ratio ratio_of(double x) {
  const double rho = exp(clamp(x, -kFarthest, kFarthest));
  return {rho, x < -kFarthest || x > kFarthest ? 0.0 : rho};
}

// A value with its derivatives by the log-ratio x and by the log-probability of the token itself.
struct Term {
  double value, by_x, by_lp;
};

FF_TABLE Term kl_term(Kl kl, double lp, double ref) {
  const double d = ref - lp;
  switch (kl) {
    case Kl::k1: return {-d, 0, 1};
    case Kl::k2: return {0.5 * d * d, 0, -d};
    case Kl::k3: {  // e^d - d - 1, without cancellation
      const double e = expm1(d > kFarthest ? kFarthest : d);
      return {d > kFarthest ? e - kFarthest : e - d, 0, d > kFarthest ? 0 : -e};
    }
  }
  return {__builtin_nan(""), 0, 0};
}

// The table: a surrogate objective each, of the ratio rho = e^x and the advantage A.
FF_TABLE Term surrogate_term(const PolicyOptions& o, double lp, double x, Ratio rho, double A) {
  switch (o.surrogate) {
    case Surrogate::clipped: {  // -min(min(rho, delta)·A, clip(rho)·A), at most -c·A where A < 0
      const double capped = rho.value > o.delta ? o.delta : rho.value;
      const double clipped = clamp(rho.value, o.lowest, o.highest);
      const bool first = !(clipped * A < capped * A);
      const bool flat = first ? rho.value > o.delta : clipped != rho.value;
      const double value = -(first ? capped : clipped) * A;
      if (A < 0 && value > -A * o.dual_clip) return {-A * o.dual_clip, 0, 0};
      return {value, flat ? 0 : -A * rho.slope, 0};
    }
    case Surrogate::reinforce: return {A == 0 ? 0 : -A * lp, 0, -A};
    case Surrogate::cispo: {  // -sg(min(rho, cap))·A·lp
      const double c = (rho.value > o.highest ? o.highest : rho.value) * A;
      return {c == 0 ? 0 : -c * lp, 0, -c};
    }
    case Surrogate::sapo: {  // -A·S(tau·(rho - 1))·4/tau
      const double tau = A > 0 ? o.tau_pos : o.tau_neg;
      const double e = exp(-tau * (rho.value - 1)), s = 1 / (1 + e);
      return {-A * s * 4 / tau, -4 * A * s * (e * s) * rho.slope, 0};
    }
    case Surrogate::vespo: {  // -sg(e^{lambda + k·log w - lambda·w})·A·lp
      const double k = A >= 0 ? 2 : 3, lambda = A >= 0 ? 3 : 2;
      const double log_w = clamp(x, -18.420680743952367, 20);  // ln 1e-8
      const double c = exp(lambda + k * log_w - lambda * exp(log_w)) * A;
      return {c == 0 ? 0 : -c * lp, 0, -c};
    }
  }
  return {__builtin_nan(""), 0, 0};
}

// -1: the ratio was below the bounds where that changes the loss (A < 0); 1: above them.
FF_TABLE int clipped_side(const PolicyOptions& o, double rho, double A) {
  if (o.surrogate != Surrogate::clipped && o.surrogate != Surrogate::cispo) return 0;
  return A < 0 && rho < o.lowest ? -1 : A > 0 && rho > o.highest ? 1 : 0;
}

// What log w adds of each token for a sequence's ratio.
FF_TABLE double log_ratio(const PolicyOptions& o, double lp, double old) {
  const double x = lp - old;
  return o.surrogate == Surrogate::vespo ? clamp(x, -20, 20) : x;
}

// ---- one token from the arrays ----

// The log-ratio of token t; without old log-probabilities those of now stand for them.
FF_TABLE double log_ratio_at(const PolicyTokens& a, const PolicyOptions& o, int64_t t, double lp) {
  return a.old_logprobs ? log_ratio(o, lp, a.old_logprobs[t]) : 0.0;
}

// The loss of token t of a sequence with n tokens that count, where x is the log-ratio in force.
FF_TABLE Term token_term(const PolicyTokens& a, const PolicyOptions& o, int64_t t, double lp,
                         double x, double A, double n) {
  const Ratio rho = ratio_of(x);
  Term term = surrogate_term(o, lp, x, rho, A);
  double weight = a.weights ? a.weights[t] : 1;
  if (o.importance == Importance::whole) weight /= n;
  if (weight == 0) term = {0, 0, 0};
  term = {weight * term.value, weight * term.by_x, weight * term.by_lp};
  if (a.ref_logprobs && o.kl_beta != 0) {
    const Term kl = kl_term(o.kl, lp, a.ref_logprobs[t]);
    if (!o.kl_times_ratio) {
      term.value += o.kl_beta * kl.value;
      term.by_lp += o.kl_beta * kl.by_lp;
    } else {  // by the token's own ratio where that of the sequence is vespo's w
      const bool own = o.importance == Importance::sum;
      const Ratio r = own && a.old_logprobs ? ratio_of(lp - a.old_logprobs[t]) : rho;
      const double slope = o.kl_beta * kl.value * r.slope;
      term.value += o.kl_beta * kl.value * r.value;
      term.by_lp += o.kl_beta * kl.by_lp * r.value + (own ? slope : 0);
      term.by_x += own ? 0 : slope;
    }
  }
  return term;
}

// k3 of (lp, old) of token t.
FF_TABLE double approx_kl_at(const PolicyTokens& a, int64_t t, double lp) {
  return a.old_logprobs ? kl_term(Kl::k3, lp, a.old_logprobs[t]).value : 0.0;
}

// What a token's loss is multiplied by: n tokens count in its sequence, `all` in the batch.
FF_TABLE double token_share(const PolicyOptions& o, double n, double all, int64_t sequences) {
  switch (o.reduction) {
    case PolicyReduction::none:
    case PolicyReduction::sum: return 1;
    case PolicyReduction::tokens: return 1 / all;
    case PolicyReduction::sequences: return 1 / (n * static_cast<double>(sequences));
    case PolicyReduction::sequence_sums: return 1 / static_cast<double>(sequences);
    case PolicyReduction::divisor: return o.divisor == 0 ? 0 : 1 / o.divisor;
  }
  return __builtin_nan("");
}

// The share of one clipped token in the metrics: a mean over the tokens or, where the ratio is a
// sequence's, over the sequences.
FF_TABLE double clipped_share(const PolicyOptions& o, double n, double all, int64_t sequences) {
  return o.importance == Importance::token ? 1 / all : 1 / (n * static_cast<double>(sequences));
}

FF_TABLE double value_loss_at(const ValueLoss& a, int64_t t, double* slope) {
  const double v = a.values[t], free = v - a.returns[t];
  double used = free;
  *slope = free;
  if (a.old_values) {
    const double old = a.old_values[t], inside = clamp(v, old - a.clip, old + a.clip);
    const double held = inside - a.returns[t];
    if (held * held > free * free) {
      used = held;
      *slope = inside == v ? held : 0;
    }
  }
  return 0.5 * used * used;
}

}  // namespace finefuse
