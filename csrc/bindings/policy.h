// Policy-gradient losses, value loss, advantages: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "ops/policy.h"

namespace finefuse {

// (surrogate, importance, kl, kl_times_ratio, reduction, clip_low, clip_high, dual_clip, delta,
// kl_beta, tau_pos, tau_neg, divisor), as python/finefuse/policy.py makes it.
inline PolicyOptions policy_options(const pybind11::tuple& t) {
  if (t.size() != 13) throw pybind11::type_error("options: a tuple of 13 numbers");
  PolicyOptions o{};
  o.surrogate = static_cast<Surrogate>(t[0].cast<int>());
  o.importance = static_cast<Importance>(t[1].cast<int>());
  o.kl = static_cast<Kl>(t[2].cast<int>());
  o.kl_times_ratio = t[3].cast<bool>();
  o.reduction = static_cast<PolicyReduction>(t[4].cast<int>());
  const double clip_low = t[5].cast<double>(), clip_high = t[6].cast<double>();
  const bool cispo =
      o.surrogate == Surrogate::cispo;  // capped from above alone, by clip_high itself
  o.lowest = cispo ? 0.0 : 1.0 - clip_low;
  o.highest = cispo ? clip_high : 1.0 + clip_high;
  o.dual_clip = t[7].cast<double>();
  o.delta = t[8].cast<double>();
  o.kl_beta = t[9].cast<double>();
  o.tau_pos = t[10].cast<double>();
  o.tau_neg = t[11].cast<double>();
  o.divisor = t[12].cast<double>();
  return o;
}

inline PolicyTokens policy_tokens(const Array& offsets, bool int32, int64_t sequences,
                                  int64_t length, int64_t total, const Array& old_logprobs,
                                  const Array& ref_logprobs, const Array& weights,
                                  const Array& advantages, bool by_token, bool wide) {
  need("advantages", advantages, by_token ? total : sequences);
  return {indices(offsets, int32),
          sequences,
          length,
          total,
          {old_logprobs.data, wide},
          {ref_logprobs.data, wide},
          {weights.data, wide},
          {advantages.data, wide},
          by_token};
}

template <class Backend>
void policy(Array logprobs, bool wide, Array mask, Array offsets, bool int32, int64_t sequences,
            int64_t length, int64_t total, Array old_logprobs, Array ref_logprobs, Array weights,
            Array advantages, bool by_token, const pybind11::tuple& options, Array upstream,
            Array out, Array metrics, Array gradient, Array scratch, Place place) {
  const PolicyOptions o = policy_options(options);
  const PolicyTokens tokens = policy_tokens(offsets, int32, sequences, length, total, old_logprobs,
                                            ref_logprobs, weights, advantages, by_token, wide);
  pybind11::gil_scoped_release nogil;
  need("logprobs", logprobs, total);
  need("gradient", gradient, total);
  need("scratch", scratch, sequences);
  if (tokens.offsets.data != nullptr) Backend::check_offsets(tokens.offsets, sequences, total);
  Backend::run(Policy{{logprobs.data, wide},
                      bytes(mask),
                      tokens,
                      o,
                      {upstream.data, wide},
                      {out.data, wide},
                      {metrics.data, wide},
                      {gradient.data, wide},
                      doubles(scratch),
                      place});
}

template <class Backend>
void policy_logits(Array logits, Layout layout, Array gradient, Layout gradient_layout,
                   Array actions, bool int32, int64_t ignore_index, double temperature,
                   double entropy_coef, Array offsets, bool offsets_int32, int64_t sequences,
                   int64_t length, Array old_logprobs, Array ref_logprobs, Array weights,
                   Array advantages, bool by_token, const pybind11::tuple& options, Array upstream,
                   Array out, Array metrics, Array scratch, Place place) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(actions, int32);
  const PolicyOptions o = policy_options(options);
  const PolicyTokens tokens =
      policy_tokens(offsets, offsets_int32, sequences, length, shape.rows, old_logprobs,
                    ref_logprobs, weights, advantages, by_token, wide);
  pybind11::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("actions", actions, shape.rows);
  need("out", gradient, shape.rows);
  need("scratch", scratch, shape.rows);
  if (tokens.offsets.data != nullptr) Backend::check_offsets(tokens.offsets, sequences, shape.rows);
  Backend::check_targets("actions", y, shape, ignore_index);
  Backend::run(PolicyLogits{shape,
                            rows_of(logits, layout),
                            rows_of(gradient, gradient_layout),
                            y,
                            ignore_index,
                            temperature,
                            entropy_coef,
                            tokens,
                            o,
                            {upstream.data, wide},
                            {out.data, wide},
                            {metrics.data, wide},
                            doubles(scratch),
                            place});
}

template <class Backend>
void value_loss(Array values, bool wide, int64_t total, Array returns, Array old_values, Array mask,
                double clip, Array out, Array gradient, Array scratch, Place place) {
  pybind11::gil_scoped_release nogil;
  need("values", values, total);
  need("returns", returns, total);
  need("scratch", scratch, total);
  Backend::run(ValueLoss{total,
                         {values.data, wide},
                         {returns.data, wide},
                         {old_values.data, wide},
                         bytes(mask),
                         clip,
                         {out.data, wide},
                         {gradient.data, wide},
                         doubles(scratch),
                         place});
}

template <class Backend>
void group_advantages(Array rewards, bool wide, int64_t groups, int64_t group_size, int scale,
                      bool leave_one_out, Array out, Place place) {
  pybind11::gil_scoped_release nogil;
  need("rewards", rewards, groups * group_size);
  need("out", out, groups * group_size);
  Backend::run(GroupAdvantages{groups,
                               group_size,
                               {rewards.data, wide},
                               static_cast<AdvantageScale>(scale),
                               leave_one_out,
                               {out.data, wide},
                               place});
}

template <class Backend>
void gae(Array rewards, bool wide, int64_t sequences, int64_t length, Array values, bool bootstrap,
         Array mask, double gamma, double lam, Array advantages, Array returns, Place place) {
  const int64_t total = sequences * length;
  pybind11::gil_scoped_release nogil;
  need("rewards", rewards, total);
  need("values", values, total);
  need("advantages", advantages, total);
  need("returns", returns, total);
  Backend::run(Gae{sequences,
                   length,
                   {rewards.data, wide},
                   {values.data, wide},
                   bootstrap,
                   bytes(mask),
                   gamma,
                   lam,
                   {advantages.data, wide},
                   {returns.data, wide},
                   place});
}

}  // namespace finefuse
