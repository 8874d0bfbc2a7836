// Preference losses: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "ops/preference.h"

namespace finefuse {

// (codes, by_length, weights: lists as long as each other; beta, label_smoothing, gamma,
// sft_weight, delta, tau, desirable_weight, undesirable_weight, alpha, center; divergence,
// nll_by_length, reduction), as python/finefuse/_args/preference.py makes it.
inline PreferenceOptions preference_options(const pybind11::tuple& t) {
  if (t.size() != 16) throw pybind11::type_error("options: a tuple of 3 lists and 13 numbers");
  const auto codes = t[0].cast<std::vector<int>>();
  const auto by_length = t[1].cast<std::vector<bool>>();
  const auto weights = t[2].cast<std::vector<double>>();
  if (codes.empty() || codes.size() > kPreferenceTerms || by_length.size() != codes.size() ||
      weights.size() != codes.size()) {
    throw pybind11::value_error("loss: 1 to " + std::to_string(kPreferenceTerms) +
                                " losses, each with its weight");
  }
  PreferenceOptions o{};
  o.count = static_cast<int>(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) {
    o.terms[i] = {static_cast<PreferenceLoss>(codes[i]), by_length[i], weights[i]};
  }
  double* const numbers[] = {&o.beta, &o.label_smoothing, &o.gamma,       &o.sft_weight, &o.delta,
                             &o.tau,  &o.desirable,       &o.undesirable, &o.alpha,      &o.center};
  for (int i = 0; i < 10; ++i) *numbers[i] = t[3 + i].cast<double>();
  o.divergence = static_cast<Divergence>(t[13].cast<int>());
  o.nll_by_length = t[14].cast<bool>();
  o.reduction = static_cast<Reduction>(t[15].cast<int>());
  return o;
}

template <class Backend>
void preference(Array chosen, Array rejected, Array ref_chosen, Array ref_rejected,
                Array chosen_lengths, Array rejected_lengths, Array weights, Array chosen_nll,
                Array kl, int64_t kl_count, Array aot_order, Array aot_unpaired_order, bool wide,
                int64_t chosen_count, int64_t rejected_count, const pybind11::tuple& options,
                Array upstream, Array out, Array chosen_rewards, Array rejected_rewards,
                Array margins, Array accuracy, Array gradient, Array ref_gradient,
                Array nll_gradient, Place place) {
  const PreferenceOptions o = preference_options(options);
  const auto reals = [wide](const Array& a) { return Reals{a.data, wide}; };
  pybind11::gil_scoped_release nogil;
  need("chosen", chosen, chosen_count);
  need("rejected", rejected, rejected_count);
  need("gradient", gradient, chosen_count + rejected_count);
  for (int i = 0; i < o.count; ++i) {
    const PreferenceLoss loss = o.terms[i].loss;
    if (loss == PreferenceLoss::aot) need("aot_order", aot_order, chosen_count);
    if (loss == PreferenceLoss::aot_unpaired) {
      need("aot_unpaired_order", aot_unpaired_order, chosen_count);
    }
  }
  Backend::check_lengths("chosen_lengths", reals(chosen_lengths), chosen_count);
  Backend::check_lengths("rejected_lengths", reals(rejected_lengths), rejected_count);
  Backend::run(Preference{chosen_count,
                          rejected_count,
                          reals(chosen),
                          reals(rejected),
                          reals(ref_chosen),
                          reals(ref_rejected),
                          reals(chosen_lengths),
                          reals(rejected_lengths),
                          reals(weights),
                          reals(chosen_nll),
                          reals(kl),
                          kl_count,
                          static_cast<const int64_t*>(aot_order.data),
                          static_cast<const int64_t*>(aot_unpaired_order.data),
                          o,
                          reals(upstream),
                          reals(out),
                          reals(chosen_rewards),
                          reals(rejected_rewards),
                          reals(margins),
                          reals(accuracy),
                          reals(gradient),
                          reals(ref_gradient),
                          reals(nll_gradient),
                          place});
}

}  // namespace finefuse
