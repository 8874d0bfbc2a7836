// Preference losses, value and gradient in one visit of each pair.
//
// All arithmetic is double whatever the input: a pair costs two transcendental functions, about
// 40 ns, and there are as many pairs as sequences. One thread, pairs in order: deterministic.
#include "ops/preference.h"

#include "ops/preference_table.h"

namespace finefuse::FF_ISA_NS {
namespace {

void preference(const Preference& a) {
  const double scale = a.options.reduction != Reduction::mean ? 1.0
                       : a.chosen_count == 0 ? 0.0
                                             : 1.0 / static_cast<double>(a.chosen_count);
  double total = 0;
  int64_t won = 0;
  for (int64_t i = 0; i < a.chosen_count; ++i) {
    const auto [r_w, r_l, loss] = pair_at(a, i);
    total += loss.v;
    won += r_w > r_l;
    if (a.options.reduction == Reduction::none) a.out.set(i, loss.v);
    a.gradient.set(i, scale * loss.w);
    a.gradient.set(a.chosen_count + i, scale * loss.l);
    a.chosen_rewards.set(i, a.options.beta * r_w);
    a.rejected_rewards.set(i, a.options.beta * r_l);
    a.margins.set(i, a.options.beta * (r_w - r_l));
  }
  if (a.options.reduction != Reduction::none) a.out.set(0, scale * total);
  a.accuracy.set(
      0, a.chosen_count == 0 ? 0 : static_cast<double>(won) / static_cast<double>(a.chosen_count));
}

}  // namespace

const PreferenceKernels& preference_kernels() {
  static constexpr PreferenceKernels kernels{preference};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
