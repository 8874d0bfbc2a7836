// The policy-gradient losses of one token, value and derivative, for CPUs and GPUs, from
// log-probabilities and from logits. In double whatever the input.
//
// Written once for one token and for a vector of them: V is a double or a vector of doubles, in
// which comparisons are masks and a ? b : c chooses lane by lane, so that there are no branches on
// what differs between tokens. Math says what V is and has its exponentials.
#pragma once
#include <math.h>

#include "ops/policy.h"

namespace finefuse {

// Beyond e^±60 a ratio is clamped, and no gradient goes through it.
inline constexpr double kFarthest = 60.0;

struct OneToken {
  using V = double;
  FF_TABLE V exponential(V x) { return exp(x); }
  FF_TABLE void exponential(V x, V* e, V* minus_one) { *e = exp(x), *minus_one = expm1(x); }
};

template <class V> FF_TABLE V all_lanes(double x) { return V{} + x; }
template <class V> FF_TABLE V clamp(V x, double low, double high) {
  const V lowest = all_lanes<V>(low), highest = all_lanes<V>(high);
  const V raised = x < lowest ? lowest : x;  // NaN passes
  return raised > highest ? highest : raised;
}

// e^x, its derivative by x, and e^x - 1.
template <class V> struct Ratio {
  V value, slope, minus_one;
};
template <class Math> FF_TABLE Ratio<typename Math::V> ratio_of(typename Math::V x) {
  using V = typename Math::V;
  const V near = clamp(x, -kFarthest, kFarthest);
  V rho, minus_one;
  Math::exponential(near, &rho, &minus_one);
  return {rho, near < x ? V{} : near > x ? V{} : rho, minus_one};
}

// A value with its derivatives by the log-ratio x and by the log-probability of the token itself.
template <class V> struct Term {
  V value, by_x, by_lp;
};

template <class Math>
FF_TABLE Term<typename Math::V> kl_term(Kl kl, typename Math::V lp, typename Math::V ref) {
  using V = typename Math::V;
  const V d = ref - lp, highest = all_lanes<V>(kFarthest);
  switch (kl) {
    case Kl::k1: return {-d, V{}, all_lanes<V>(1)};
    case Kl::k2: return {0.5 * d * d, V{}, -d};
    case Kl::k3: {  // e^d - 1 - d, d at most 60
      const V minus_one = ratio_of<Math>(d).minus_one;
      return {minus_one - (d > highest ? highest : d), V{}, d > highest ? V{} : -minus_one};
    }
  }
  return {all_lanes<V>(__builtin_nan("")), V{}, V{}};
}

// The table: a surrogate objective each, of the ratio rho = e^x and the advantage A.
template <class Math>
FF_TABLE Term<typename Math::V> surrogate_term(const PolicyOptions& o, typename Math::V lp,
                                               typename Math::V x, Ratio<typename Math::V> rho,
                                               typename Math::V A) {
  using V = typename Math::V;
  const V zero{};
  switch (o.surrogate) {
    case Surrogate::clipped: {  // -min(min(rho, delta)·A, clip(rho)·A), at most -c·A where A < 0
      const V delta = all_lanes<V>(o.delta), limit = -A * o.dual_clip;
      const V capped = rho.value > delta ? delta : rho.value;
      const V clipped = clamp(rho.value, o.lowest, o.highest);
      const V by_capped = rho.value > delta ? zero : rho.slope;
      const V by_clipped = clipped != rho.value ? zero : rho.slope;  // NaN is in `capped`
      const auto second = clipped * A < capped * A;
      const V value = -(second ? clipped : capped) * A;
      const auto held = (A < zero) & (value > limit);
      return {held ? limit : value, held ? zero : -A * (second ? by_clipped : by_capped), zero};
    }
    case Surrogate::reinforce: return {A == zero ? zero : -A * lp, zero, -A};
    case Surrogate::cispo: {  // -sg(min(rho, cap))·A·lp
      const V cap = all_lanes<V>(o.highest), c = (rho.value > cap ? cap : rho.value) * A;
      return {c == zero ? zero : -c * lp, zero, -c};
    }
    case Surrogate::sapo: {  // -A·S(tau·(rho - 1))·4/tau
      const V tau = A > zero ? all_lanes<V>(o.tau_pos) : all_lanes<V>(o.tau_neg);
      const V e = Math::exponential(clamp(-tau * (rho.value - 1.0), -700, 700));
      const V s = 1.0 / (1.0 + e);
      return {-A * s * 4.0 / tau, -4.0 * A * s * (e * s) * rho.slope, zero};
    }
    case Surrogate::vespo: {  // -sg(e^{lambda + k·log w - lambda·w})·A·lp
      const auto up = A >= zero;
      const V k = up ? all_lanes<V>(2) : all_lanes<V>(3);
      const V lambda = up ? all_lanes<V>(3) : all_lanes<V>(2);
      const V log_w = clamp(x, -18.420680743952367, 20);  // ln 1e-8
      const V exponent = lambda + k * log_w - lambda * Math::exponential(log_w);
      const V c = Math::exponential(clamp(exponent, -700, 700)) * A;
      return {c == zero ? zero : -c * lp, zero, -c};
    }
  }
  return {all_lanes<V>(__builtin_nan("")), zero, zero};
}

// ---- one token, or a vector of them ----

template <class V> struct Token {
  V lp, old, ref, weight, advantage;
  bool has_old, has_kl;  // without old log-probabilities those of now stand for them
};

// The loss of a token and its derivatives; 1 where its ratio was below the bounds and that changes
// the loss (A < 0), or above them (A > 0); k3 of (lp, old).
template <class V> struct TokenLoss {
  V value, by_x, by_lp, low, high, approx_kl;
};

// The log-ratio in force is the token's own (Importance::token) or `sequence_x`, of a sequence with
// n tokens that count.
template <class Math>
FF_TABLE TokenLoss<typename Math::V> token_loss(const PolicyOptions& o,
                                                const Token<typename Math::V>& t, double sequence_x,
                                                double n) {
  using V = typename Math::V;
  const V zero{}, one = all_lanes<V>(1);
  const bool by_token = o.importance == Importance::token;
  const bool w = o.importance == Importance::sum;  // vespo's: a KL goes by the token's own ratio
  // no structs are copied from here on: gcc would send vectors in them through memory
  V own_x = zero, own_rho = one, own_slope = one, approx_kl = zero;
  if (t.has_old) {
    own_x = t.lp - t.old;
    const Ratio<V> own = ratio_of<Math>(own_x);
    own_rho = own.value;
    own_slope = own.slope;
    // k3 of (lp, old): e^-x - 1 + x, -x at most 60
    const V lowest = all_lanes<V>(-kFarthest);
    approx_kl = (own_x < lowest ? lowest : own_x) - own.minus_one / own.value;
  }
  V x = own_x;
  Ratio<V> rho{own_rho, own_slope, zero};
  if (!by_token) {
    x = all_lanes<V>(sequence_x);
    const double near = clamp(sequence_x, -kFarthest, kFarthest), e = exp(near);
    rho.value = all_lanes<V>(e);
    rho.slope = all_lanes<V>(near < sequence_x || near > sequence_x ? 0 : e);
  }
  const V A = t.advantage;

  Term<V> term = surrogate_term<Math>(o, t.lp, x, rho, A);
  const V weight = o.importance == Importance::whole ? t.weight / n : t.weight;
  term.value = weight == zero ? zero : weight * term.value;
  term.by_x = weight == zero ? zero : weight * term.by_x;
  term.by_lp = weight == zero ? zero : weight * term.by_lp;
  if (t.has_kl) {
    const Term<V> kl = kl_term<Math>(o.kl, t.lp, t.ref);
    if (!o.kl_times_ratio) {
      term.value += o.kl_beta * kl.value;
      term.by_lp += o.kl_beta * kl.by_lp;
    } else {
      const V by = w ? own_rho : rho.value;
      const V slope = o.kl_beta * kl.value * (w ? own_slope : rho.slope);
      term.value += o.kl_beta * kl.value * by;
      term.by_lp += o.kl_beta * kl.by_lp * by;
      if (w)
        term.by_lp += slope;
      else
        term.by_x += slope;
    }
  }
  V low = zero, high = zero;
  if (o.surrogate == Surrogate::clipped || o.surrogate == Surrogate::cispo) {
    const V lowest = all_lanes<V>(o.lowest), highest = all_lanes<V>(o.highest);
    low = (A < zero) & (rho.value < lowest) ? one : zero;
    high = (A > zero) & (rho.value > highest) ? one : zero;
  }
  return {term.value, term.by_x, term.by_lp, low, high, approx_kl};
}

// ---- what a sequence and a batch make of it ----

// Token t from the arrays.
FF_TABLE Token<double> token_at(const PolicyTokens& a, const PolicyOptions& o, int64_t t, double lp,
                                double advantage) {
  Token<double> token{
      lp, 0, 0, 1, advantage, static_cast<bool>(a.old_logprobs), a.ref_logprobs && o.kl_beta != 0};
  if (a.old_logprobs) token.old = a.old_logprobs[t];
  if (token.has_kl) token.ref = a.ref_logprobs[t];
  if (a.weights) token.weight = a.weights[t];
  return token;
}

// What token t adds to the log-ratio of its sequence.
FF_TABLE double log_ratio_at(const PolicyTokens& a, const PolicyOptions& o, int64_t t, double lp) {
  if (!a.old_logprobs) return 0.0;
  const double x = lp - a.old_logprobs[t];
  return o.surrogate == Surrogate::vespo ? clamp(x, -20, 20) : x;
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

// ½·max((v - R)², (clip(v, old ± c) - R)²) and its derivative by v.
template <class V> struct ValueTerm {
  V value, slope;
};
template <class V>
FF_TABLE ValueTerm<V> value_term(V v, V target, V old, double clip, bool clipped) {
  const V free = v - target;
  if (!clipped) return {0.5 * free * free, free};
  const V low = old - clip, high = old + clip, raised = v < low ? low : v;
  const V inside = (raised > high ? high : raised) + (old - old);  // NaN where old is
  const V held = inside - target;
  const auto nearer = held * held <= free * free;
  const V used = nearer ? free : held;
  return {0.5 * used * used, nearer ? free : inside == v ? held : held - held};
}

}  // namespace finefuse
