// Token log-probabilities, cross-entropy, sequence sums: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "ops/logprobs.h"

namespace finefuse {

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

}  // namespace finefuse
