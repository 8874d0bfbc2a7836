// Weight-decomposed updates: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "bindings/lora.h"
#include "ops/dora.h"

namespace finefuse {

template <class Backend>
void dora_norm(Array weight, int dtype, int64_t rows, int64_t columns, int64_t rank, Array lora_b,
               int b_dtype, int64_t b_rank_stride, int64_t b_column_stride, Array lora_a,
               int a_dtype, int64_t a_rank_stride, int64_t a_column_stride, double scale,
               Array norm, Place place) {
  const bool wide = is_wide(dtype);
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
  const bool wide = is_wide(dtype);
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
  const bool wide = is_wide(dtype);
  pybind11::gil_scoped_release nogil;
  need("dy", dy, tokens * columns);
  if (sum.data != nullptr) need("z", z, tokens * columns);
  if (dz.data != nullptr) need("factor", factor, columns);
  Backend::run(DoraScaleBackward{dy.data, z.data, static_cast<DType>(dtype), tokens, columns,
                                 Reals{factor.data, wide}, dz.data, Reals{sum.data, wide}, nullptr,
                                 place});
}

}  // namespace finefuse
