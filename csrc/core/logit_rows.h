// Rows of logits as every loss from logits walks them, and what a row's gradient is made of.
#pragma once
#include <math.h>

#include "core/dtype.h"

namespace finefuse {

// Rows of `vocab` contiguous elements; row r starts at
// (r / inner)·outer_stride + (r % inner)·inner_stride elements, so that logits[:, :-1] needs no
// copy.
struct LogitRows {
  void* data;
  int64_t inner, outer_stride, inner_stride;
};

struct LogitsShape {
  DType dtype;
  int64_t rows, vocab;
};

template <class T> FF_TABLE T* row_of(const LogitRows& rows, int64_t r) {
  const int64_t outer = rows.inner == 0 ? 0 : r / rows.inner;
  return static_cast<T*>(rows.data) + outer * rows.outer_stride +
         (r - outer * rows.inner) * rows.inner_stride;
}

// What one pass over a row of logits z leaves.
//
// clang-format off
// ref        a logit at most T below the row's maximum (on GPUs the maximum itself)
// excess     Σ e^{(z - ref)/T} - 1, so that lse(z/T) = ref/T + log1p(excess); without the 1 of ref's own
//            term, log-probabilities and entropies near 0 keep all their digits
// dot        Σ (z - ref) e^{(z - ref)/T}  (kEntropy), so that H = log1p(excess) - dot/(sum·T)
// logit_sum  Σ z                          (kLogitSum), for label smoothing
// clang-format on
struct RowStats {
  double ref, excess, dot, logit_sum;
  FF_HD double sum() const { return 1.0 + excess; }
};

// What that comes to for the logit z_y of the target: lse(z/T) = ref/T + log_sum. A row that is all
// -inf: -inf + inf, NaN.
struct RowLogprob {
  double ref, log_sum, logp, entropy;
};
FF_TABLE RowLogprob row_logprob(const RowStats& s, double z_y, double temperature) {
  const double log_sum = log1p(s.excess), inverse_t = 1.0 / temperature;
  return {s.ref, log_sum, (z_y - s.ref) * inverse_t - log_sum,
          log_sum - s.dot * inverse_t / s.sum()};
}

// dz = e·(a + b·d) + offset with d = z - ref, e = e^{d/T}; `b` is used where there is an entropy.
struct RowGradient {
  double ref, temperature, a, b, offset;
};

// dz = (1/T)·[g·(1[y] - p) - h·p·(log p + H) + l·p]: all of the row but its target, and the target.
struct LogprobGradient {
  RowGradient row;
  double at_target;
};
FF_TABLE LogprobGradient logprob_gradient(const RowLogprob& s, double temperature, double g,
                                          double h, double l) {
  const double inverse_t = 1.0 / temperature, p_scale = exp(-s.log_sum) * inverse_t;
  const double p = exp(s.logp), plogp = p == 0.0 ? 0.0 : p * (s.logp + s.entropy);
  const double entropy = h == 0.0 ? 0.0 : h * (s.entropy - s.log_sum);
  return {{s.ref, temperature, p_scale * (l - g - entropy), -h * p_scale * inverse_t, 0.0},
          inverse_t * (-g * expm1(s.logp) - (h == 0.0 ? 0.0 : h * plogp) + l * p)};
}

}  // namespace finefuse
