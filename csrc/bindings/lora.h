// Low-rank updates: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "ops/lora.h"

namespace finefuse {

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
  const bool wide = is_wide(dtype);
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
  const bool wide = is_wide(dtype);
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
  const bool wide = is_wide(dtype);
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

// For a few tokens on a GPU: _CUDA alone has it.
template <class Backend>
void lora_linear(Array x, int dtype, int64_t tokens, int64_t columns, int64_t rank, Array weight,
                 int64_t rows, Array lora_a, int a_dtype, int64_t a_rank_stride,
                 int64_t a_column_stride, Array lora_b, int b_dtype, int64_t b_rank_stride,
                 int64_t b_column_stride, double scale, Array bias, Array h, Array y, Place place) {
  for (const int type : {dtype, a_dtype, b_dtype}) {
    if (is_wide(type)) {
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

}  // namespace finefuse
