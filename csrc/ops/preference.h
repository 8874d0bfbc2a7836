// Preference losses from sequence log-probabilities: what crosses from Python to the kernel.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"

namespace finefuse {

// The numbers are the contract with python/finefuse/_args.py (PREFERENCE_LOSSES).
enum class PreferenceLoss : int { sigmoid = 0, ipo = 1, hinge = 2 };

struct Preference {
  int64_t pairs;
  Reals chosen, rejected;                  // (pairs,) sequence log-probabilities
  Reals ref_chosen, ref_rejected;          // absent: no reference, 0
  Reals chosen_lengths, rejected_lengths;  // absent: 1
  PreferenceLoss loss;
  double beta, label_smoothing;
  Reduction reduction;
  Reals out;                                        // (pairs,) for none, else one
  Reals chosen_rewards, rejected_rewards, margins;  // (pairs,)
  Reals accuracy;  // one: the share of pairs with a positive margin
  Reals gradient;  // (2, pairs): d out / d chosen, d out / d rejected
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
