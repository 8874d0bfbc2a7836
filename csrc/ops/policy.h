// Policy-gradient losses, from log-probabilities and from logits, value loss, advantages: what
// crosses from Python to the kernels.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/logit_rows.h"
#include "core/place.h"

namespace finefuse {

// The numbers are the contract with python/finefuse/_args/policy.py (SURROGATES, IMPORTANCE, KL,
// POLICY_REDUCTIONS); ops/policy_table.h has the formulas.
enum class Surrogate : int { clipped = 0, reinforce = 1, cispo = 2, sapo = 3, vespo = 4 };

// What the ratio of a token is: its own; of the mean (gspo) or the sum (vespo) of its sequence's
// log-ratios; the sum, and the surrogate is the sequence's, of which a token has 1/n (rloo).
enum class Importance : int { token = 0, mean = 1, sum = 2, whole = 3 };

enum class Kl : int { k1 = 0, k2 = 1, k3 = 2 };

// What a token's loss is multiplied by, with n tokens in its sequence and N in all, that count:
// 1; 1; 1/N; 1/(n·sequences); 1/sequences; 1/divisor.
enum class PolicyReduction : int {
  none = 0,
  sum = 1,
  tokens = 2,
  sequences = 3,
  sequence_sums = 4,
  divisor = 5
};

struct PolicyOptions {
  Surrogate surrogate;
  Importance importance;
  Kl kl;
  bool kl_times_ratio;
  PolicyReduction reduction;
  double lowest, highest;   // bounds of the ratio: 1 - clip_low, 1 + clip_high; cispo: 0, the cap
  double dual_clip, delta;  // infinity where there is none
  double kl_beta;
  double tau_pos, tau_neg;
  double divisor;
};

// Sequences are the rows of a (sequences, length) array, or [offsets[i], offsets[i + 1]).
struct PolicyTokens {
  Indices offsets;                            // data null: rows of `length`
  int64_t sequences, length, total;           // total: tokens in all
  Reals old_logprobs, ref_logprobs, weights;  // (total,), each may be absent
  Reals advantages;                           // (total,) or (sequences,)
  bool by_token;                              // advantages are (total,)
};

// Tokens that are masked out are not read, and pass 0 back.
struct Policy {
  Reals logprobs;       // (total,)
  const uint8_t* mask;  // bool (total,), may be absent
  PolicyTokens tokens;
  PolicyOptions options;
  Reals upstream;   // (total,) for none, may be absent: 1
  Reals out;        // (total,) for none, else one; may be absent
  Reals metrics;    // (3,): shares of tokens clipped low and high, approximate KL; may be absent
  Reals gradient;   // (total,): of the reduced loss, for none of Σ upstream·loss, by logprobs
  double* scratch;  // (sequences, kPolicySums)
  Place place;
};
inline constexpr int kPolicySums = 5;  // of a sequence: tokens, loss, low, high, approximate KL

// Importance::token only; no reduction `none`. The gradient is written in the same visit of a row.
struct PolicyLogits {
  LogitsShape shape;
  LogitRows logits, gradient;  // may be the same rows
  Indices actions;             // of a token that is masked out: ignore_index
  int64_t ignore_index;
  double temperature, entropy_coef;
  PolicyTokens tokens;
  PolicyOptions options;
  Reals upstream;   // one, may be absent: 1
  Reals out;        // one, may be absent
  Reals metrics;    // (4,): as above, and the entropy; may be absent
  double* scratch;  // (sequences + kPolicyRowSums·rows)
  Place place;
};
inline constexpr int kPolicyRowSums = 4;  // of a row: loss, clipped, approximate KL, entropy

// ½·max((v - R)², (clip(v, old ± c) - R)²), its mean over the tokens that count.
struct ValueLoss {
  int64_t total;
  Reals values, returns, old_values;  // old_values absent: not clipped
  const uint8_t* mask;                // may be absent
  double clip;
  Reals out;        // one
  Reals gradient;   // (total,), by values; may be absent
  double* scratch;  // (2, value_loss_blocks(total))
  Place place;
};
inline constexpr int64_t kValueBlock = 4096;  // tokens a partial sum is over
FF_HD inline int64_t value_loss_blocks(int64_t total) {
  return (total + kValueBlock - 1) / kValueBlock;
}

enum class AdvantageScale : int { none = 0, group = 1, batch = 2 };

// (r - baseline) / (standard deviation + 1e-4) in each group of group_size rewards in a row; NaN is
// left out and gives 0.
struct GroupAdvantages {
  int64_t groups, group_size;
  Reals rewards;  // (groups, group_size)
  AdvantageScale scale;
  bool leave_one_out;
  Reals out;
  Place place;
};

// δ_t = r_t + γ·v_{t+1} - v_t, A_t = δ_t + γλ·A_{t+1}, over the tokens that count; return = A + v.
struct Gae {
  int64_t sequences, length;
  Reals rewards;   // (sequences, length)
  Reals values;    // (sequences, length) or, with the value after the end, (sequences, length + 1)
  bool bootstrap;  // the latter
  const uint8_t* mask;  // (sequences, length), may be absent
  double gamma, lam;
  Reals advantages, returns;  // (sequences, length), 0 where masked
  Place place;
};

struct PolicyKernels {
  void (*policy)(const Policy&);
  void (*policy_logits)(const PolicyLogits&);
  void (*value_loss)(const ValueLoss&);
  void (*group_advantages)(const GroupAdvantages&);
  void (*gae)(const Gae&);
};

namespace cuda {  // policy.cu
void run(const Policy&);
void run(const PolicyLogits&);
void run(const ValueLoss&);
void run(const GroupAdvantages&);
void run(const Gae&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(PolicyKernels, policy_kernels)
