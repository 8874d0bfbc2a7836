// Token log-probabilities and cross-entropy from logits: what crosses from Python to the kernels.
#pragma once
#include "core/dispatch.h"
#include "core/logit_rows.h"
#include "core/place.h"

namespace finefuse {

// lp = z[y]/T - lse, and with stats H and lse. lse64 (and entropy64) are kept for the backward.
struct TokenLogprobs {
  LogitsShape shape;
  LogitRows logits;
  Indices targets;
  int64_t ignore_index;
  double temperature;
  Reals logprobs, entropy, lse;  // (rows,); entropy and lse may be absent
  double*
      saved;  // (2, rows): ref and log-sum for the backward; (3, rows) with entropy; may be absent
  Place place;
};

// What row r leaves.
FF_TABLE void put_row(const TokenLogprobs& a, int64_t r, const RowLogprob& row, double lse) {
  a.logprobs.set(r, row.logp);
  if (a.lse) a.lse.set(r, lse);
  if (a.entropy) a.entropy.set(r, row.entropy);
  if (a.saved == nullptr) return;
  a.saved[r] = row.ref;
  a.saved[a.shape.rows + r] = row.log_sum;
  if (a.entropy) a.saved[2 * a.shape.rows + r] = row.entropy;
}

// dz = (1/T)·[g·(1[y] - p) - h·p·(log p + H) + l·p]
struct TokenLogprobsBackward {
  LogitsShape shape;
  LogitRows logits, gradient;  // may be the same rows
  Indices targets;
  int64_t ignore_index;
  double temperature;
  const double* saved;  // what the forward left; (3, rows) where h is there
  Reals g, h, l;        // (rows,), each may be absent
  Place place;
};

// loss = (1 - eps)·(lse - z[y]) + eps·(lse - mean z), and in the same visit of the row
// dz = w·(p - (1 - eps)·1[y] - eps/V), w the upstream gradient of the row's loss.
struct CrossEntropy {
  LogitsShape shape;
  LogitRows logits, gradient;  // gradient.data may be null (not wanted) or logits.data (in place)
  Indices targets;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;
  Reals loss;       // (rows,) or one; may be absent
  double* scratch;  // (rows + 1,), for sum and mean
  Reals upstream;   // (rows,) for none, else one; absent: 1
  Place place;
};

// sums[i] = Σ lp[t] over the kept t of segment i; average divides by the number kept (0 if none).
// Segments are the rows of a (segments, length) array, or [offsets[i], offsets[i + 1]).
struct SequenceSums {
  Reals logprobs;
  const uint8_t* mask;              // bool, may be absent
  Indices offsets;                  // data null: rows of `length`
  int64_t segments, length, total;  // total: tokens in all
  bool average;
  Reals sums;
  Place place;
};

struct SequenceSumsBackward {
  Reals gradient;  // (segments,)
  const uint8_t* mask;
  Indices offsets;
  int64_t segments, length, total;  // total: tokens in all
  bool average;
  Reals out;
  Place place;
};

// gradient *= upstream, in place, left as it is where upstream is 1; ignored rows stay 0.
struct ScaleGradient {
  LogitsShape shape;
  LogitRows gradient;
  Indices targets;
  int64_t ignore_index;
  Reals upstream;  // one
  Place place;
};

struct LogprobsKernels {
  // The first position whose target is neither in [0, vocab) nor ignore_index, or -1.
  int64_t (*first_bad_target)(const Indices&, int64_t rows, int64_t vocab, int64_t ignore_index);
  void (*token_logprobs)(const TokenLogprobs&);
  void (*token_logprobs_backward)(const TokenLogprobsBackward&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*scale_gradient)(const ScaleGradient&);
  void (*sequence_sums)(const SequenceSums&);
  void (*sequence_sums_backward)(const SequenceSumsBackward&);
};

namespace cuda {  // logprobs.cu
void run(const TokenLogprobs&);
void run(const TokenLogprobsBackward&);
void run(const CrossEntropy&);
void run(const ScaleGradient&);
void run(const SequenceSums&);
void run(const SequenceSumsBackward&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(LogprobsKernels, logprobs_kernels)
