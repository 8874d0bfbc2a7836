// Distillation from logits: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/arguments.h"
#include "ops/distill.h"

namespace finefuse {

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

}  // namespace finefuse
