// Low-rank updates of many adapters in one batch: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "bindings/lora.h"
#include "ops/segmented.h"

namespace finefuse {

template <class Backend>
void segmented_shrink(Array x, int dtype, int64_t tokens, int64_t columns, int64_t rank,
                      Array order, Array begins, int64_t adapters, Array factor, int factor_dtype,
                      int64_t adapter_stride, int64_t rank_stride, int64_t column_stride, Array h,
                      Array h_scale, Array g, Array outer, Array outer_scale, bool turned,
                      Array seed, int64_t threshold, double keep_scale, Place place) {
  const bool wide = is_wide(dtype);
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
  const bool wide = is_wide(dtype);
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

}  // namespace finefuse
