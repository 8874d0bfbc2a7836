// Preference losses, value and gradient in one visit of each pair.
//
// All arithmetic is double whatever the input: a pair costs two transcendental functions or a few
// more, about 40 ns, and there are as many pairs as sequences. One thread, pairs in order:
// deterministic. Sums that a pair needs of the whole batch (the NLL, kto's z) are a loop of
// additions before.
#include "ops/preference.h"

#include "ops/preference_table.h"

namespace finefuse::FF_ISA_NS {
namespace {

void preference(const Preference& a) {
  double of_batch[kBatchSums] = {}, sums[kPreferenceSums] = {};
  if (needs_sums(a)) batch_sums(a, 0, 1, of_batch);
  const Batch b = batch_of(a, of_batch);
  const int64_t most = a.chosen_count > a.rejected_count ? a.chosen_count : a.rejected_count;
  for (int64_t i = 0; i < most; ++i) visit(a, b, i, sums);
  for (int k = 0; k < a.options.count; ++k) {
    const PreferenceTerm& term = a.options.terms[k];
    if (!sorts(term.loss)) continue;
    for (int64_t i = 0; i < a.chosen_count; ++i) visit_sorted(a, b, term, i, sums);
  }
  finish(a, b, sums);
}

}  // namespace

const PreferenceKernels& preference_kernels() {
  static constexpr PreferenceKernels kernels{preference};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
