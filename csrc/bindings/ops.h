// The functions of _C and of _CUDA: the same names and arguments on both, from arrays to the struct
// that a kernel takes. They know neither torch nor its tensors: shapes, types and strides were
// checked by the Python side (_op.py, numpy/), indices are checked by the backend: on the CPU
// before anything is written, on a GPU by the kernel, which flags them and never follows them.
//
// A backend is a struct of static functions: `run`, overloaded on the argument struct, and
// check_targets, check_offsets, check_lengths, check_segments, check_teacher.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "ops/codebook.h"
#include "ops/distill.h"
#include "ops/dora.h"
#include "ops/logprobs.h"
#include "ops/lora.h"
#include "ops/policy.h"
#include "ops/preference.h"
#include "ops/prune.h"
#include "ops/segmented.h"

namespace finefuse {

inline LogitsShape shape_of(const Layout& l) {
  return {static_cast<DType>(l.field[0]), l.field[1], l.field[2]};
}
inline LogitRows rows_of(const Array& a, const Layout& l) {
  return {a.data, l.field[3], l.field[4], l.field[5]};
}
inline bool is_wide(const Layout& l) { return static_cast<DType>(l.field[0]) == DType::f64; }
inline Indices indices(const Array& a, bool int32) {
  return {a.data, int32 ? IndexType::i32 : IndexType::i64};
}
inline double* doubles(const Array& a) { return static_cast<double*>(a.data); }
inline float* floats(const Array& a) { return static_cast<float*>(a.data); }
inline uint8_t* bytes(const Array& a) { return static_cast<uint8_t*>(a.data); }

// None or a tensor without storage where a kernel would read.
inline void need(const char* name, const Array& array, int64_t count) {
  if (count > 0 && array.data == nullptr) {
    throw pybind11::type_error(std::string(name) + ": an array with data, not None");
  }
}

template <class Backend>
void token_logprobs(Array logits, Layout layout, Array targets, bool int32, int64_t ignore_index,
                    double temperature, Array logprobs, Array entropy, Array lse, Array saved,
                    Place place) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  pybind11::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  Backend::check_targets("targets", y, shape, ignore_index);
  Backend::run(TokenLogprobs{shape,
                             rows_of(logits, layout),
                             y,
                             ignore_index,
                             temperature,
                             {logprobs.data, wide},
                             {entropy.data, wide},
                             {lse.data, wide},
                             doubles(saved),
                             place});
}

template <class Backend>
void token_logprobs_backward(Array logits, Layout layout, Array gradient, Layout gradient_layout,
                             Array targets, bool int32, int64_t ignore_index, double temperature,
                             Array saved, Array g, Array h, Array l, Place place) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  pybind11::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  need("out", gradient, shape.rows);
  need("saved", saved, shape.rows);
  Backend::check_targets("targets", y, shape, ignore_index);
  Backend::run(TokenLogprobsBackward{shape,
                                     rows_of(logits, layout),
                                     rows_of(gradient, gradient_layout),
                                     y,
                                     ignore_index,
                                     temperature,
                                     doubles(saved),
                                     {g.data, wide},
                                     {h.data, wide},
                                     {l.data, wide},
                                     place});
}

template <class Backend>
void cross_entropy(Array logits, Layout layout, Array gradient, Layout gradient_layout,
                   Array targets, bool int32, int64_t ignore_index, double label_smoothing,
                   int reduction, Array loss, Array scratch, Array upstream, Place place) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  pybind11::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  if (static_cast<Reduction>(reduction) != Reduction::none) need("scratch", scratch, 1);
  Backend::check_targets("targets", y, shape, ignore_index);
  Backend::run(CrossEntropy{shape,
                            rows_of(logits, layout),
                            rows_of(gradient, gradient_layout),
                            y,
                            ignore_index,
                            label_smoothing,
                            static_cast<Reduction>(reduction),
                            {loss.data, wide},
                            doubles(scratch),
                            {upstream.data, wide},
                            place});
}

template <class Backend>
void scale_gradient(Array gradient, Layout layout, Array targets, bool int32, int64_t ignore_index,
                    Array upstream, Place place) {
  const LogitsShape shape = shape_of(layout);
  pybind11::gil_scoped_release nogil;
  need("gradient", gradient, shape.rows);
  need("targets", targets, shape.rows);
  need("upstream", upstream, 1);
  Backend::run(ScaleGradient{shape,
                             rows_of(gradient, layout),
                             indices(targets, int32),
                             ignore_index,
                             {upstream.data, is_wide(layout)},
                             place});
}

template <class Backend>
void sequence_sums(Array logprobs, bool wide, Array mask, Array offsets, bool int32,
                   int64_t segments, int64_t length, int64_t total, bool average, Array sums,
                   Place place) {
  const Indices ends = indices(offsets, int32);
  pybind11::gil_scoped_release nogil;
  need("token_lp", logprobs, total);
  if (ends.data != nullptr) Backend::check_offsets(ends, segments, total);
  Backend::run(SequenceSums{{logprobs.data, wide},
                            bytes(mask),
                            ends,
                            segments,
                            length,
                            total,
                            average,
                            {sums.data, wide},
                            place});
}

template <class Backend>
void sequence_sums_backward(Array gradient, bool wide, Array mask, Array offsets, bool int32,
                            int64_t segments, int64_t length, int64_t total, bool average,
                            Array out, Place place) {
  const Indices ends = indices(offsets, int32);
  pybind11::gil_scoped_release nogil;
  need("g", gradient, segments);
  if (ends.data != nullptr) Backend::check_offsets(ends, segments, total);
  Backend::run(SequenceSumsBackward{{gradient.data, wide},
                                    bytes(mask),
                                    ends,
                                    segments,
                                    length,
                                    total,
                                    average,
                                    {out.data, wide},
                                    place});
}

// (codes, by_length, weights: lists as long as each other; beta, label_smoothing, gamma,
// sft_weight, delta, tau, desirable_weight, undesirable_weight, alpha, center; divergence,
// nll_by_length, reduction), as python/finefuse/_args.py makes it.
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

// numbers: (beta, temperature, kl_weight, ce_weight)
template <class Backend>
void distill(Array student, Layout layout, int64_t width, Array gradient, Layout gradient_layout,
             Array teacher, Layout teacher_layout, Array teacher_indices, bool indices_int32,
             int kind, std::array<double, 4> numbers, Array mask, Array targets, bool int32,
             int64_t ignore_index, int reduction, Array loss, Array scratch, Array upstream,
             Place place) {
  const LogitsShape shape = shape_of(layout), teacher_shape = shape_of(teacher_layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  pybind11::gil_scoped_release nogil;
  need("student_logits", student, shape.rows);
  need("teacher_logits", teacher, shape.rows);
  if (static_cast<Reduction>(reduction) != Reduction::none) need("scratch", scratch, 1);
  const Distill args{shape,
                     width,
                     rows_of(student, layout),
                     rows_of(gradient, gradient_layout),
                     rows_of(teacher, teacher_layout),
                     teacher_shape.dtype,
                     indices(teacher_indices, indices_int32),
                     teacher_indices.data == nullptr ? 0 : teacher_shape.vocab,
                     static_cast<DistillKind>(kind),
                     numbers[0],
                     numbers[1],
                     numbers[2],
                     numbers[3],
                     bytes(mask),
                     y,
                     ignore_index,
                     static_cast<Reduction>(reduction),
                     {loss.data, wide},
                     doubles(scratch),
                     {upstream.data, wide},
                     place};
  if (y.data != nullptr) Backend::check_targets("targets", y, shape, ignore_index);
  if (teacher_indices.data != nullptr) Backend::check_teacher(args);
  Backend::run(args);
}

template <class Backend>
void prune(Array weight, int dtype, int64_t rows, int64_t columns, int scope, int64_t drop,
           int64_t group, Array norm, Array mask, bool zero, Array workspace, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("weight", weight, rows * columns);
  Backend::run(Prune{weight.data,
                     static_cast<DType>(dtype),
                     rows,
                     columns,
                     static_cast<PruneScope>(scope),
                     drop,
                     group,
                     {norm.data, wide},
                     bytes(mask),
                     zero,
                     workspace.data,
                     place});
}

template <class Backend>
void prune_codes(Array codes, int64_t count, int bits, int zero, Array mask, Place place) {
  pybind11::gil_scoped_release nogil;
  need("codes", codes, count);
  need("mask", mask, count);
  Backend::run(PruneCodes{bytes(codes), count, bits, zero, bytes(mask), place});
}

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

inline void check_blocksize(const char* name, int64_t blocksize) {
  if (blocksize < 1) {
    throw pybind11::value_error(std::string(name) + ": " + std::to_string(blocksize) +
                                "; positive");
  }
}

inline void check_code(int entries, int64_t blocksize) {
  if (code_bits(entries) == 0) {
    throw pybind11::value_error("code: " + std::to_string(entries) +
                                " entries; allowed are 4, 8, 16 and 256");
  }
  check_blocksize("blocksize", blocksize);
}

template <class Backend>
void quantize(Array x, int dtype, int64_t count, Array code, int entries, int rule,
              int64_t blocksize, Array codes, Array absmax, Place place) {
  check_code(entries, blocksize);
  if (static_cast<DType>(dtype) == DType::f64) {
    throw pybind11::type_error("x: float32, bfloat16 or float16, not float64");
  }
  pybind11::gil_scoped_release nogil;
  need("x", x, count);
  need("code", code, entries);
  need("codes", codes, count);
  need("absmax", absmax, count);
  Backend::run(Quantize{x.data, static_cast<DType>(dtype), count, floats(code), entries,
                        static_cast<CodeRule>(rule), blocksize, bytes(codes), floats(absmax),
                        place});
}

// The argument lists of dequantize and codebook_linear name the same array of codes.
inline CodebookArray codebook_array(int64_t count, const Array& codes, const Array& code,
                                    int entries, const Array& absmax, const Array& absmax_codes,
                                    const Array& nested_code, const Array& nested_absmax,
                                    int64_t nested_blocksize, double offset, int64_t blocksize) {
  check_code(entries, blocksize);
  need("codes", codes, count);
  need("code", code, entries);
  if (absmax.data == nullptr && count > 0) {
    need("absmax_codes", absmax_codes, count);
    need("nested_code", nested_code, count);
    need("nested_absmax", nested_absmax, count);
    check_blocksize("nested_blocksize", nested_blocksize);
  }
  return {bytes(codes),
          floats(code),
          entries,
          {floats(absmax), bytes(absmax_codes), floats(nested_code), floats(nested_absmax),
           nested_blocksize, static_cast<float>(offset)},
          blocksize};
}

inline Dropout dropout_of(const Array& seed, int64_t threshold, double scale) {
  return {static_cast<const int64_t*>(seed.data), static_cast<uint64_t>(threshold), scale};
}

inline Factor factor_of(const Array& data, int dtype, int64_t rank_stride, int64_t column_stride) {
  return {data.data, static_cast<DType>(dtype), rank_stride, column_stride};
}

template <class Backend>
void lora_shrink(Array x, int dtype, int64_t tokens, int64_t columns, int64_t rank, Array factor,
                 int factor_dtype, int64_t rank_stride, int64_t column_stride, Array h,
                 double h_scale, Array g, Array outer, double outer_scale, Array seed,
                 int64_t threshold, double keep_scale, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("x", x, tokens * columns);
  if (h.data != nullptr) need("factor", factor, rank * columns);
  if (outer.data != nullptr) need("g", g, tokens * rank);
  Backend::run(LoraShrink{x.data, static_cast<DType>(dtype), tokens, columns, rank,
                          factor_of(factor, factor_dtype, rank_stride, column_stride),
                          Reals{h.data, wide}, h_scale, Reals{g.data, wide},
                          Reals{outer.data, wide}, outer_scale,
                          dropout_of(seed, threshold, keep_scale), nullptr, place});
}

template <class Backend>
void lora_expand(Array h, int64_t tokens, int64_t columns, int64_t rank, Array factor,
                 int factor_dtype, int64_t rank_stride, int64_t column_stride, double scale,
                 Array bias, bool accumulate, Array y, int dtype, Array seed, int64_t threshold,
                 double keep_scale, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("h", h, tokens * rank);
  need("factor", factor, rank * columns);
  need("y", y, tokens * columns);
  Backend::run(LoraExpand{Reals{h.data, wide}, tokens, columns, rank,
                          factor_of(factor, factor_dtype, rank_stride, column_stride), scale,
                          bias.data, accumulate, y.data, static_cast<DType>(dtype),
                          dropout_of(seed, threshold, keep_scale), nullptr, place});
}

// One member of a group: what lora_shrink takes beside x, as a tuple in the same order.
inline LoraShrink shrink_member(const Array& x, int dtype, int64_t tokens, int64_t columns,
                                const pybind11::tuple& m, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  const auto array = [&m](size_t i) { return m[i].cast<Array>(); };
  const auto rank = m[0].cast<int64_t>();
  const Array factor = array(1), h = array(5), g = array(7), outer = array(8);
  if (h.data != nullptr) need("factor", factor, rank * columns);
  if (outer.data != nullptr) need("g", g, tokens * rank);
  return {x.data,
          static_cast<DType>(dtype),
          tokens,
          columns,
          rank,
          factor_of(factor, m[2].cast<int>(), m[3].cast<int64_t>(), m[4].cast<int64_t>()),
          Reals{h.data, wide},
          m[6].cast<double>(),
          Reals{g.data, wide},
          Reals{outer.data, wide},
          m[9].cast<double>(),
          dropout_of(array(10), m[11].cast<int64_t>(), m[12].cast<double>()),
          nullptr,
          place};
}

template <class Backend>
void lora_shrink_group(Array x, int dtype, int64_t tokens, int64_t columns,
                       const std::vector<pybind11::tuple>& members, Place place) {
  if (members.empty() || members.size() > kLoraMembers) {
    throw pybind11::value_error("members: " + std::to_string(members.size()) + "; allowed: 1 to " +
                                std::to_string(kLoraMembers));
  }
  need("x", x, tokens * columns);
  LoraShrinkGroup group{};
  for (const pybind11::tuple& member : members) {
    group.members[group.count++] = shrink_member(x, dtype, tokens, columns, member, place);
  }
  pybind11::gil_scoped_release nogil;
  Backend::run(group);
}

template <class Backend>
void lora_dropout(Array x, int dtype, int64_t count, bool accumulate, Array y, Array seed,
                  int64_t threshold, double keep_scale, Place place) {
  pybind11::gil_scoped_release nogil;
  need("x", x, count);
  need("y", y, count);
  need("seed", seed, count);
  Backend::run(LoraDropout{x.data, static_cast<DType>(dtype), count, accumulate, y.data,
                           dropout_of(seed, threshold, keep_scale), place});
}

template <class Backend>
void segmented_shrink(Array x, int dtype, int64_t tokens, int64_t columns, int64_t rank,
                      Array order, Array begins, int64_t adapters, Array factor, int factor_dtype,
                      int64_t adapter_stride, int64_t rank_stride, int64_t column_stride, Array h,
                      Array h_scale, Array g, Array outer, Array outer_scale, bool turned,
                      Array seed, int64_t threshold, double keep_scale, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("x", x, tokens * columns);
  need("order", order, tokens);
  need("begins", begins, 1);
  if (h.data != nullptr) need("factor", factor, adapters * rank * columns);
  if (outer.data != nullptr) need("g", g, tokens * rank);
  const Segments segments{static_cast<int64_t*>(order.data), static_cast<int64_t*>(begins.data),
                          adapters};
  Backend::check_segments(segments, tokens);
  Backend::run(
      SegmentedShrink{x.data,
                      static_cast<DType>(dtype),
                      tokens,
                      columns,
                      rank,
                      segments,
                      {factor_of(factor, factor_dtype, rank_stride, column_stride), adapter_stride},
                      {h.data, wide},
                      {h_scale.data, wide},
                      {g.data, wide},
                      {outer.data, wide},
                      {outer_scale.data, wide},
                      turned,
                      dropout_of(seed, threshold, keep_scale),
                      place});
}

template <class Backend>
void segmented_expand(Array h, int64_t tokens, int64_t columns, int64_t rank, Array order,
                      Array begins, int64_t adapters, Array factor, int factor_dtype,
                      int64_t adapter_stride, int64_t rank_stride, int64_t column_stride,
                      Array scale, Array y, int dtype, Array seed, int64_t threshold,
                      double keep_scale, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("h", h, tokens * rank);
  need("order", order, tokens);
  need("begins", begins, 1);
  need("factor", factor, adapters * rank * columns);
  need("y", y, tokens * columns);
  const Segments segments{static_cast<int64_t*>(order.data), static_cast<int64_t*>(begins.data),
                          adapters};
  Backend::check_segments(segments, tokens);
  Backend::run(
      SegmentedExpand{{h.data, wide},
                      tokens,
                      columns,
                      rank,
                      segments,
                      {factor_of(factor, factor_dtype, rank_stride, column_stride), adapter_stride},
                      {scale.data, wide},
                      y.data,
                      static_cast<DType>(dtype),
                      dropout_of(seed, threshold, keep_scale),
                      place});
}

template <class Backend>
void dora_norm(Array weight, int dtype, int64_t rows, int64_t columns, int64_t rank, Array lora_b,
               int b_dtype, int64_t b_rank_stride, int64_t b_column_stride, Array lora_a,
               int a_dtype, int64_t a_rank_stride, int64_t a_column_stride, double scale,
               Array norm, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("weight", weight, rows * columns);
  need("lora_b", lora_b, rank * rows);
  need("lora_a", lora_a, rank * columns);
  need("norm", norm, rows);
  Backend::run(DoraNorm{weight.data, static_cast<DType>(dtype), rows, columns, rank,
                        factor_of(lora_b, b_dtype, b_rank_stride, b_column_stride),
                        factor_of(lora_a, a_dtype, a_rank_stride, a_column_stride), scale,
                        Reals{norm.data, wide}, nullptr, place});
}

template <class Backend>
void dora_scale(Array z, int dtype, int64_t tokens, int64_t columns, Array factor, Array bias,
                bool accumulate, Array y, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("z", z, tokens * columns);
  need("factor", factor, columns);
  need("y", y, tokens * columns);
  Backend::run(DoraScale{z.data, static_cast<DType>(dtype), tokens, columns,
                         Reals{factor.data, wide}, bias.data, accumulate, y.data, place});
}

template <class Backend>
void dora_scale_backward(Array dy, Array z, int dtype, int64_t tokens, int64_t columns,
                         Array factor, Array dz, Array sum, Place place) {
  const bool wide = static_cast<DType>(dtype) == DType::f64;
  pybind11::gil_scoped_release nogil;
  need("dy", dy, tokens * columns);
  if (sum.data != nullptr) need("z", z, tokens * columns);
  if (dz.data != nullptr) need("factor", factor, columns);
  Backend::run(DoraScaleBackward{dy.data, z.data, static_cast<DType>(dtype), tokens, columns,
                                 Reals{factor.data, wide}, dz.data, Reals{sum.data, wide}, nullptr,
                                 place});
}

// For a few tokens on a GPU: _CUDA alone has it.
template <class Backend>
void lora_linear(Array x, int dtype, int64_t tokens, int64_t columns, int64_t rank, Array weight,
                 int64_t rows, Array lora_a, int a_dtype, int64_t a_rank_stride,
                 int64_t a_column_stride, Array lora_b, int b_dtype, int64_t b_rank_stride,
                 int64_t b_column_stride, double scale, Array bias, Array h, Array y, Place place) {
  for (const int type : {dtype, a_dtype, b_dtype}) {
    if (static_cast<DType>(type) == DType::f64) {
      throw pybind11::type_error("x, lora_a, lora_b: float32, bfloat16 or float16, not float64");
    }
  }
  if (rank > kLoraLinearRank) {
    throw pybind11::value_error("rank: " + std::to_string(rank) + "; at most " +
                                std::to_string(kLoraLinearRank));
  }
  need("x", x, tokens * columns);
  need("weight", weight, rows * columns);
  need("lora_a", lora_a, rank * columns);
  need("lora_b", lora_b, rank * rows);
  need("h", h, tokens * rank);
  need("y", y, tokens * rows);
  pybind11::gil_scoped_release nogil;
  Backend::run(LoraLinear{x.data, static_cast<DType>(dtype), tokens, columns, rank, weight.data,
                          rows, factor_of(lora_a, a_dtype, a_rank_stride, a_column_stride),
                          factor_of(lora_b, b_dtype, b_rank_stride, b_column_stride), scale,
                          bias.data, Reals{h.data, false}, y.data, place});
}

template <class Backend>
void dequantize(Array codes, int64_t count, Array code, int entries, Array absmax,
                Array absmax_codes, Array nested_code, Array nested_absmax,
                int64_t nested_blocksize, double offset, int64_t blocksize, Array out, int dtype,
                Place place) {
  if (static_cast<DType>(dtype) == DType::f64) {
    throw pybind11::type_error("out: float32, bfloat16 or float16, not float64");
  }
  const CodebookArray from =
      codebook_array(count, codes, code, entries, absmax, absmax_codes, nested_code, nested_absmax,
                     nested_blocksize, offset, blocksize);
  pybind11::gil_scoped_release nogil;
  need("out", out, count);
  Backend::run(Dequantize{from, count, out.data, static_cast<DType>(dtype), place});
}

template <class Backend>
void codebook_linear(Array x, int dtype, int64_t tokens, Array codes, Array code, int entries,
                     Array absmax, Array absmax_codes, Array nested_code, Array nested_absmax,
                     int64_t nested_blocksize, double offset, int64_t blocksize, int64_t rows,
                     int64_t columns, bool transposed, Array bias, Array y, Place place) {
  if (static_cast<DType>(dtype) == DType::f64) {
    throw pybind11::type_error("x: float32, bfloat16 or float16, not float64");
  }
  const CodebookArray weight =
      codebook_array(rows * columns, codes, code, entries, absmax, absmax_codes, nested_code,
                     nested_absmax, nested_blocksize, offset, blocksize);
  pybind11::gil_scoped_release nogil;
  need("x", x, tokens * (transposed ? rows : columns));
  need("y", y, tokens * (transposed ? columns : rows));
  Backend::run(CodebookLinear{x.data, static_cast<DType>(dtype), tokens, weight, rows, columns,
                              transposed, bias.data, y.data, nullptr, place});
}

template <class Backend> void define_ops(pybind11::module_& m) {
  m.def("token_logprobs", token_logprobs<Backend>);
  m.def("token_logprobs_backward", token_logprobs_backward<Backend>);
  m.def("cross_entropy", cross_entropy<Backend>);
  m.def("scale_gradient", scale_gradient<Backend>);
  m.def("sequence_sums", sequence_sums<Backend>);
  m.def("sequence_sums_backward", sequence_sums_backward<Backend>);
  m.def("preference", preference<Backend>);
  m.def("distill", distill<Backend>);
  m.def("prune", prune<Backend>);
  m.def("prune_codes", prune_codes<Backend>);
  m.def("policy", policy<Backend>);
  m.def("policy_logits", policy_logits<Backend>);
  m.def("value_loss", value_loss<Backend>);
  m.def("group_advantages", group_advantages<Backend>);
  m.def("gae", gae<Backend>);
  m.def("quantize", quantize<Backend>);
  m.def("dequantize", dequantize<Backend>);
  m.def("codebook_linear", codebook_linear<Backend>);
  m.def("lora_shrink", lora_shrink<Backend>);
  m.def("lora_shrink_group", lora_shrink_group<Backend>);
  m.def("lora_expand", lora_expand<Backend>);
  m.def("lora_dropout", lora_dropout<Backend>);
  m.def("segmented_shrink", segmented_shrink<Backend>);
  m.def("segmented_expand", segmented_expand<Backend>);
  m.def("dora_norm", dora_norm<Backend>);
  m.def("dora_scale", dora_scale<Backend>);
  m.def("dora_scale_backward", dora_scale_backward<Backend>);
}

}  // namespace finefuse
