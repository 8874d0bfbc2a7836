// Pruning of weights and of packed codes: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "ops/prune.h"

namespace finefuse {

template <class Backend>
void prune(Array weight, int dtype, int64_t rows, int64_t columns, int scope, int64_t drop,
           int64_t group, Array norm, Array mask, bool zero, Array workspace, Place place) {
  const bool wide = is_wide(dtype);
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

}  // namespace finefuse
