// Token log-probabilities and cross-entropy on the CPU.
//
//   pass                      reads + writes an element   bound by
//   token_logprobs            sizeof(T) + 0               memory
//   token_logprobs_backward   sizeof(T) + sizeof(T)       memory, first touch of a fresh gradient
//   cross_entropy             sizeof(T) + sizeof(T)       the gradient reads the row from cache
//
// Targets were checked, but another thread of the caller may write them meanwhile: each is read
// once a row, and one that is out of range now is not dereferenced.
//
// Rows are split over threads whole, so nothing depends on their number. float accumulators per
// block of 2048 elements, double beyond; ignored rows are never read.
#include "ops/logprobs.h"

#include "core/parallel.h"
#include "core/segments.h"
#include "core/softmax_row.h"

namespace finefuse::FF_ISA_NS {
namespace {

template <class T> void token_logprobs_t(const TokenLogprobs& a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab;
  const double inverse_t = 1.0 / a.temperature;
  parallel_for(rows, vocab * sizeof(T), a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = a.targets[r];
      double lse = 0.0;
      RowLogprob row{};
      if (y != a.ignore_index && (y < 0 || y >= vocab)) {
        row.logp = lse = row.entropy = __builtin_nan("");
      } else if (y != a.ignore_index) {
        const T* z = row_of<T>(a.logits, r);
        const RowStats s = a.entropy ? row_stats<T, true, false>(z, vocab, a.temperature)
                                     : row_stats<T, false, false>(z, vocab, a.temperature);
        row = row_logprob(s, load_scalar(z + y), a.temperature);
        lse = row.ref * inverse_t + row.log_sum;
      }
      put_row(a, r, row, lse);
    }
  });
}

template <class T> void token_logprobs_backward_t(const TokenLogprobsBackward& a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab;
  const double t = a.temperature, inverse_t = 1.0 / t;
  const bool stream = prepare_gradient<T>(a.gradient, a.logits, a.shape);
  parallel_for(rows, 2 * vocab * sizeof(T), a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = a.targets[r];
      T* out = row_of<T>(a.gradient, r);
      const double g = a.g ? a.g[r] : 0.0, h = a.h ? a.h[r] : 0.0, l = a.l ? a.l[r] : 0.0;
      if (y == a.ignore_index || y < 0 || y >= vocab || (g == 0.0 && h == 0.0 && l == 0.0)) {
        row_zero(out, vocab);
        continue;
      }
      const T* z = row_of<T>(a.logits, r);
      const double ref = a.saved[r], log_sum = a.saved[rows + r];
      const double logp = (load_scalar(z + y) - ref) * inverse_t - log_sum;
      const double entropy = h != 0.0 ? a.saved[2 * rows + r] : 0.0;
      const auto d = logprob_gradient({ref, log_sum, logp, entropy}, t, g, h, l);
      write_gradient<T>(z, out, vocab, d.row, h != 0.0, stream);
      store_scalar(out + y, d.at_target);
    }
    if (stream) stream_fence();
  });
}

template <class T> void cross_entropy_t(const CrossEntropy& a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab;
  const double eps = a.label_smoothing, offset = eps / static_cast<double>(vocab);
  const bool want_gradient = a.gradient.data != nullptr;
  const bool stream = prepare_gradient<T>(a.gradient, a.logits, a.shape);
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += a.targets[r] != a.ignore_index;
  const RowLosses<CrossEntropy> losses(a, count);
  parallel_for(rows, 2 * vocab * sizeof(T), a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = a.targets[r];
      const double w = losses.weight(r);
      double loss = 0.0;
      if (y == a.ignore_index || y < 0 || y >= vocab) {
        if (want_gradient) row_zero(row_of<T>(a.gradient, r), vocab);
        if (y != a.ignore_index) loss = __builtin_nan("");
      } else {
        const T* z = row_of<T>(a.logits, r);
        const RowStats s = eps != 0.0 ? row_stats<T, false, true>(z, vocab, 1.0)
                                      : row_stats<T, false, false>(z, vocab, 1.0);
        const double log_sum = log1p(s.excess);
        const double logp = load_scalar(z + y) - s.ref - log_sum;  // all -inf: -inf + inf, NaN
        loss = -logp;
        if (eps != 0.0) {
          loss = (1.0 - eps) * loss +
                 eps * (s.ref + log_sum - s.logit_sum / static_cast<double>(vocab));
        }
        if (want_gradient) {
          T* out = row_of<T>(a.gradient, r);
          if (w == 0.0) {
            row_zero(out, vocab);
          } else {
            const RowGradient coefficients{s.ref, 1.0, w / s.sum(), 0.0, -w * offset};
            write_gradient<T>(z, out, vocab, coefficients, false, stream);
            store_scalar(out + y, w * (expm1(logp) + eps - offset));
          }
        }
      }
      losses.put(r, loss);
    }
    if (stream) stream_fence();
  });
  losses.finish();
}

template <class T> void scale_gradient_t(const ScaleGradient& a) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const double w = a.upstream[0];
  if (w == 1.0) return;
  const int64_t vocab = a.shape.vocab;
  parallel_for(a.shape.rows, 2 * vocab * sizeof(T), a.place.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   T* g = row_of<T>(a.gradient, r);
                   if (w == 0.0 || a.targets[r] == a.ignore_index) {
                     row_zero(g, vocab);
                     continue;
                   }
                   const V factor = splat<V>(w);
                   for (int64_t i = 0; i < vocab; i += N) {
                     const int k = vocab - i < N ? static_cast<int>(vocab - i) : N;
                     store_partial(g + i, load_partial(g + i, k, 0.0) * factor, k);
                   }
                 }
               });
}

void token_logprobs(const TokenLogprobs& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) { token_logprobs_t<T>(a); });
}
void token_logprobs_backward(const TokenLogprobsBackward& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) { token_logprobs_backward_t<T>(a); });
}
void cross_entropy(const CrossEntropy& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) { cross_entropy_t<T>(a); });
}
void scale_gradient(const ScaleGradient& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) { scale_gradient_t<T>(a); });
}

int64_t first_bad_target(const Indices& targets, int64_t rows, int64_t vocab,
                         int64_t ignore_index) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = targets[r];
    if ((y < 0 || y >= vocab) && y != ignore_index) return r;
  }
  return -1;
}

void sequence_sums(const SequenceSums& a) {
  parallel_for(a.segments, 9 * a.length, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const TokenRange s = tokens_of(a.offsets, a.length, a.total, i);
      double sum = 0.0;
      int64_t kept = 0;
      for (int64_t t = s.begin; t < s.end; ++t) {
        if (a.mask != nullptr && !a.mask[t]) continue;
        sum += a.logprobs[t];
        ++kept;
      }
      a.sums.set(i, a.average && kept > 0 ? sum / static_cast<double>(kept) : sum);
    }
  });
}

void sequence_sums_backward(const SequenceSumsBackward& a) {
  parallel_for(a.segments, 9 * a.length, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const TokenRange s = tokens_of(a.offsets, a.length, a.total, i);
      double g = a.gradient[i];
      if (a.average) {
        int64_t kept = 0;
        for (int64_t t = s.begin; t < s.end; ++t) kept += a.mask == nullptr || a.mask[t];
        if (kept > 0) g /= static_cast<double>(kept);
      }
      for (int64_t t = s.begin; t < s.end; ++t) {
        a.out.set(t, a.mask != nullptr && !a.mask[t] ? 0.0 : g);
      }
    }
  });
}

}  // namespace

const LogprobsKernels& logprobs_kernels() {
  static constexpr LogprobsKernels kernels{
      first_bad_target, token_logprobs, token_logprobs_backward, cross_entropy,
      scale_gradient,   sequence_sums,  sequence_sums_backward};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
