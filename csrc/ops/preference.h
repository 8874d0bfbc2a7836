// Preference losses from sequence log-probabilities: what crosses from Python to the kernel.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"

namespace finefuse {

// The numbers are the contract with python/finefuse/_args/preference.py (PREFERENCE_LOSSES,
// DIVERGENCES).
enum class PreferenceLoss : int {
  sigmoid = 0,  // spin, too
  ipo = 1,
  hinge = 2,
  robust = 3,
  exo_pair = 4,
  nca_pair = 5,
  bco_pair = 6,
  sppo_hard = 7,
  aot = 8,
  aot_unpaired = 9,
  apo_zero = 10,
  apo_down = 11,
  discopop = 12,
  sigmoid_norm = 13,
  sft = 14,
  cpo = 15,
  simpo = 16,
  slic = 17,
  orpo = 18,
  kto = 19,                // an example at a time, as the next:
  apo_zero_unpaired = 20,  // the numbers of chosen and rejected may differ
  reward = 21,             // reward_loss: ref_chosen is the margin
};
enum class Divergence : int { reverse_kl = 0, forward_kl = 1, js = 2, alpha = 3 };

// One loss of a weighted sum.
struct PreferenceTerm {
  PreferenceLoss loss;
  bool by_length;  // log-ratios (for orpo, simpo log-probabilities) are divided by their lengths
  double weight;
};
inline constexpr int kPreferenceTerms = 32;

struct PreferenceOptions {
  PreferenceTerm terms[kPreferenceTerms];
  int count;
  double beta, label_smoothing, gamma, sft_weight, delta, tau, desirable, undesirable, alpha,
      center;
  Divergence divergence;
  bool nll_by_length;  // the NLL is by token, else by sequence
  Reduction reduction;
};

struct Preference {
  int64_t chosen_count, rejected_count;    // the same but for losses of an example at a time
  Reals chosen, rejected;                  // sequence log-probabilities
  Reals ref_chosen, ref_rejected;          // absent: no reference, 0
  Reals chosen_lengths, rejected_lengths;  // absent: 1
  Reals weights;                           // one an element of the unreduced loss; absent: 1
  Reals chosen_nll;  // one number: stands for the NLL of the chosen; or absent
  Reals kl;          // kto: any number of log-ratios of mismatched pairs; or absent
  int64_t kl_count;
  // (2, pairs), what sorts chosen - rejected, then ref_chosen - ref_rejected (aot); r_w, then r_l
  // (aot_unpaired). Null where the loss is not among the terms.
  const int64_t* aot_order;
  const int64_t* aot_unpaired_order;
  PreferenceOptions options;
  Reals upstream;  // none alone, one an element of out: gradients are of Σ upstream·out; absent: 1
  // (pairs,) or, for losses of an example at a time, (chosen + rejected,) for none, else one.
  Reals out;
  Reals chosen_rewards, rejected_rewards;  // (chosen,), (rejected,)
  Reals margins;  // (pairs,); one, the difference of the mean rewards, where the numbers differ
  Reals
      accuracy;  // one: the share of pairs with a positive margin, or of rewards of the right sign
  Reals gradient;      // (chosen + rejected,): by chosen, by rejected
  Reals ref_gradient;  // the same by the reference, or absent
  Reals nll_gradient;  // one, by chosen_nll, or absent
  Place place;
};

struct PreferenceKernels {
  void (*preference)(const Preference&);
};

namespace cuda {  // preference.cu
void run(const Preference&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(PreferenceKernels, preference_kernels)
