// Weight-decomposed updates (DoRA, SPEC section 2): the norms of an adapted weight's rows, and
// columns scaled by what was learned over them.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"
#include "ops/lora.h"

namespace finefuse {

// norm_j = ‖W_j + scale·(B A)_j‖. Neither B A nor the sum is stored.
struct DoraNorm {
  const void* weight;  // (rows, columns), contiguous
  DType dtype;
  int64_t rows, columns, rank;
  Factor lora_b;  // (rank, rows)
  Factor lora_a;  // (rank, columns)
  double scale;
  Reals norm;       // (rows,), float32 (float64 where the weight is); sums are float64
  void* workspace;  // CPU: dora_workspace(*this) numbers of norm's type
  Place place;
};

// y = [y +] [bias +] factor_j·z, a factor for each column. y may be z, if it is not read.
struct DoraScale {
  const void* z;  // (tokens, columns)
  DType dtype;
  int64_t tokens, columns;
  Reals factor;      // (columns,), float32 (float64 where z is)
  const void* bias;  // (columns,) of z's type, may be absent
  bool accumulate;   // whether y is read
  void* y;           // (tokens, columns)
  Place place;
};

// dz = factor_j·dy and sum_j = Σ over tokens of dy·z; either or both.
struct DoraScaleBackward {
  const void* dy;  // (tokens, columns)
  const void* z;   // (tokens, columns)
  DType dtype;
  int64_t tokens, columns;
  Reals factor;     // (columns,)
  void* dz;         // (tokens, columns), may be absent, and may be dy
  Reals sum;        // (columns,), may be absent; zeros where there are no tokens
  void* workspace;  // CPU: dora_workspace(*this) numbers of sum's type
  Place place;
};

// On the CPU: tokens of a partial sum, of which there are as many as it takes.
inline constexpr int64_t kDoraTokens = 64;
inline int64_t dora_workspace(const DoraNorm& a) {
  return a.rank * (lora_padded(a.columns) + lora_padded(a.rows));
}
inline int64_t dora_workspace(const DoraScaleBackward& a) {
  return a.sum ? (a.tokens + kDoraTokens - 1) / kDoraTokens * a.columns : 0;
}

struct DoraKernels {
  void (*norm)(const DoraNorm&);
  void (*scale)(const DoraScale&);
  void (*scale_backward)(const DoraScaleBackward&);
};

namespace cuda {  // dora.cu
void run(const DoraNorm&);
void run(const DoraScale&);
void run(const DoraScaleBackward&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(DoraKernels, dora_kernels)
