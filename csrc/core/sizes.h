// What sizes are split with, in kernels, launches and the formulas of workspaces.
#pragma once
#include "core/dtype.h"

namespace finefuse {

#define FF_SIZE FF_HD static constexpr inline __attribute__((always_inline))

FF_SIZE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FF_SIZE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#undef FF_SIZE

}  // namespace finefuse
