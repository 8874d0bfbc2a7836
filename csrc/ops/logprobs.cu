// Token log-probabilities and cross-entropy on NVIDIA GPUs: one block a row.
//
//   kernel                    reads + writes an element   bound by
//   token_logprobs            sizeof(T) + 0               memory
//   token_logprobs_backward   sizeof(T) + sizeof(T)       memory
//   cross_entropy             sizeof(T) + sizeof(T)       memory; the gradient reads the row from
//                                                         shared memory of one block or of a
//                                                         cluster (core/logit_rows.cuh), or a
//                                                         longer one again, from L2 as far as it
//                                                         stayed there
//
// float32 a thread, float64 between threads and for a row's coefficients (float64 throughout for
// float64). Fixed order of sums: the same bits every time. A target out of range is not followed:
// its row becomes NaN, its gradient 0, and a flag is set.
#include "core/cuda_utils.cuh"
#include "core/logit_rows.cuh"
#include "core/segments.cuh"
#include "ops/logprobs.h"

namespace finefuse::cuda {
namespace {

template <class T, bool kEntropy>
__global__ void FF_ROW_BOUNDS token_logprobs_kernel(const TokenLogprobs a) {
  const int64_t vocab = a.shape.vocab, r = blockIdx.x, y = a.targets[r];
  const double inverse_t = 1.0 / a.temperature;
  double lse = 0.0;
  RowLogprob row{};
  if (y == a.ignore_index) {
  } else if (y < 0 || y >= vocab) {
    row.logp = lse = row.entropy = NAN;
    raise(a.place, Flag::targets);
  } else {
    const T* z = row_of<T>(a.logits, r);
    const RowStats s =
        row_stats<T, kEntropy, false, Access::stream>(z, vocab, a.temperature, nullptr);
    if (threadIdx.x == 0) {
      row = row_logprob(s, to_accumulator(z[y]), a.temperature);
      lse = row.ref * inverse_t + row.log_sum;
    }
  }
  if (threadIdx.x == 0) put_row(a, r, row, lse);
}

template <class T, bool kEntropy>
__global__ void FF_ROW_BOUNDS token_logprobs_backward_kernel(const TokenLogprobsBackward a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab, r = blockIdx.x, y = a.targets[r];
  const bool bad = y != a.ignore_index && (y < 0 || y >= vocab);
  if (bad) raise(a.place, Flag::targets);
  const T* z = row_of<T>(a.logits, r);
  Coefficients mine{};
  if (threadIdx.x == 0) {
    const double g = a.g ? a.g[r] : 0.0, h = kEntropy && a.h ? a.h[r] : 0.0, l = a.l ? a.l[r] : 0.0;
    mine.zero = bad || y == a.ignore_index || (g == 0.0 && h == 0.0 && l == 0.0);
    if (!mine.zero) {
      const double inverse_t = 1.0 / a.temperature, ref = a.saved[r], log_sum = a.saved[rows + r];
      const double logp = (to_accumulator(z[y]) - ref) * inverse_t - log_sum;
      const double entropy = h != 0.0 ? a.saved[2 * rows + r] : 0.0;
      const auto d = logprob_gradient({ref, log_sum, logp, entropy}, a.temperature, g, h, l);
      mine.row = d.row;
      mine.at_target = d.at_target;
    }
  }
  const Coefficients shared = broadcast(mine);  // a copy: ptxas spills without
  write_gradient<T, kEntropy, Access::stream>(z, row_of<T>(a.gradient, r), vocab, y, shared);
}

__device__ bool counts(const CrossEntropy& a, int64_t r) { return a.targets[r] != a.ignore_index; }

// scratch[rows] = 1 / (rows that are not ignored), or 0 if there are none.
__global__ void FF_ROW_BOUNDS cross_entropy_count_kernel(const CrossEntropy a) {
  double count[1] = {0};
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) count[0] += counts(a, r);
  block_sum(count);
  if (threadIdx.x == 0) a.scratch[a.shape.rows] = count[0] == 0 ? 0.0 : 1.0 / count[0];
}

__device__ double share(const CrossEntropy& a) {
  return a.reduction == Reduction::mean ? a.scratch[a.shape.rows] : 1.0;
}

// kStaged: the row fits in shared memory, of one block or of a cluster of them, and the gradient
// reads it there.
template <class T, bool kSmoothing, bool kStaged>
__global__ void FF_ROW_BOUNDS cross_entropy_kernel(const CrossEntropy a) {
  const int64_t vocab = a.shape.vocab, r = row_of_block<kStaged>(), y = a.targets[r];
  const bool by_row = a.reduction == Reduction::none, want_gradient = a.gradient.data != nullptr;
  const bool ignored = y == a.ignore_index, bad = !ignored && (y < 0 || y >= vocab);
  if (bad) raise(a.place, Flag::targets);
  double loss = bad ? NAN : 0.0;
  Coefficients mine{};
  mine.zero = true;
  const T* z = row_of<T>(a.logits, r);
  const RowPart part = row_part<kStaged>(z, vocab);
  const T* own = z + part.begin;
  if (!ignored && !bad) {
    RowStats s = row_stats<T, false, kSmoothing, kStaged ? Access::stream : Access::keep>(
        own, part.count, 1.0, kStaged ? stage_of(own) : nullptr);
    // before any block of the cluster writes there
    const double z_y = threadIdx.x == 0 ? to_accumulator(z[y]) : 0.0;
    if constexpr (kStaged) s = row_stats_of_all(s, 1.0);
    if (threadIdx.x == 0) {
      const double eps = kSmoothing ? a.label_smoothing : 0.0, n = static_cast<double>(vocab);
      const double log_sum = log1p(s.excess);
      const double logp = z_y - s.ref - log_sum;  // all -inf: -inf + inf, NaN
      loss = -logp;
      if (kSmoothing) loss = (1.0 - eps) * loss + eps * (s.ref + log_sum - s.logit_sum / n);
      const double upstream = a.upstream ? a.upstream[by_row ? r : 0] : 1.0;
      const double w = upstream * share(a), offset = eps / n;
      mine.zero = w == 0.0;
      mine.row = {s.ref, 1.0, w / (1.0 + s.excess), 0.0, -w * offset};
      mine.at_target = w * (expm1(logp) + eps - offset);
    }
  }
  if (threadIdx.x == 0 && part.first) {
    if (!by_row)
      a.scratch[r] = loss;
    else if (a.loss)
      a.loss.set(r, loss);
  }
  if (!want_gradient) return;
  const Coefficients& shared = broadcast(mine);
  T* out = row_of<T>(a.gradient, r) + part.begin;
  if constexpr (kStaged) {
    write_gradient<T, false, Access::keep>(stage_of(own), out, part.count, y - part.begin, shared);
    if (!ignored && !bad) row_end();
  } else {
    write_gradient<T, false, Access::stream>(z, out, vocab, y, shared);
  }
}

__global__ void FF_ROW_BOUNDS cross_entropy_sum_kernel(const CrossEntropy a) {
  double sum[1] = {0};
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) sum[0] += a.scratch[r];
  block_sum(sum);
  if (threadIdx.x == 0) a.loss.set(0, share(a) * sum[0]);
}

template <class T> __global__ void FF_ROW_BOUNDS scale_gradient_kernel(const ScaleGradient a) {
  const double w = a.upstream[0];
  if (w == 1.0) return;
  T* g = row_of<T>(a.gradient, blockIdx.x);
  const bool ignored = a.targets[blockIdx.x] == a.ignore_index;  // 0·inf would not be 0
  row_scale<T>(g, g, a.shape.vocab, ignored ? 0.0 : w);
}

// ---- sequences: one block a segment ------------------------------------------------------------

template <class Args> __device__ Segment segment(const Args& a, int64_t i) {
  return segment_at(a.offsets, a.segments, a.length, a.total, i, a.place);
}

__global__ void __launch_bounds__(kSegmentThreads) sequence_sums_kernel(const SequenceSums a) {
  const int64_t i = blockIdx.x;
  const Segment s = segment(a, i);
  double sums[2] = {0, 0};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) {
    if (a.mask != nullptr && !a.mask[t]) continue;
    sums[0] += a.logprobs[t];
    sums[1] += 1;
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  if (s.bad) sums[0] = NAN;
  a.sums.set(i, a.average && sums[1] > 0 ? sums[0] / sums[1] : sums[0]);
}

__global__ void __launch_bounds__(kSegmentThreads)
    sequence_sums_backward_kernel(const SequenceSumsBackward a) {
  __shared__ double divisor;
  const int64_t i = blockIdx.x;
  const Segment s = segment(a, i);
  if (a.average) {
    double kept[1] = {0};
    for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) {
      kept[0] += a.mask == nullptr || a.mask[t];
    }
    block_sum(kept);
    if (threadIdx.x == 0) divisor = kept[0] > 0 ? kept[0] : 1;
    __syncthreads();
  }
  const double g = a.average ? a.gradient[i] / divisor : a.gradient[i];
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) {
    a.out.set(t, a.mask != nullptr && !a.mask[t] ? 0.0 : g);
  }
}

// ---- launches -----------------------------------------------------------------------------------

template <class T, bool kSmoothing> void launch_cross_entropy(const CrossEntropy& a) {
  const auto twice = cross_entropy_kernel<T, kSmoothing, false>;
  if (a.gradient.data == nullptr)  // which nobody reads again
    launch(twice, a.shape.rows, threads_for<T>(a), 0, a);
  else
    launch_rows<T>(cross_entropy_kernel<T, kSmoothing, true>, twice, a);
}

}  // namespace

void run(const TokenLogprobs& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    const auto kernel =
        a.entropy ? token_logprobs_kernel<T, true> : token_logprobs_kernel<T, false>;
    launch(kernel, a.shape.rows, threads_for<T>(a), 0, a);
  });
}

void run(const TokenLogprobsBackward& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    const auto kernel =
        a.h ? token_logprobs_backward_kernel<T, true> : token_logprobs_backward_kernel<T, false>;
    launch(kernel, a.shape.rows, threads_for<T>(a), 0, a);
  });
}

void run(const CrossEntropy& a) {
  if (a.reduction == Reduction::mean) launch(cross_entropy_count_kernel, 1, kMaxThreads, 0, a);
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    if (a.label_smoothing != 0.0)
      launch_cross_entropy<T, true>(a);
    else
      launch_cross_entropy<T, false>(a);
  });
  if (a.reduction != Reduction::none && a.loss) {
    launch(cross_entropy_sum_kernel, 1, kMaxThreads, 0, a);
  }
}

void run(const ScaleGradient& a) {
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    launch(scale_gradient_kernel<T>, a.shape.rows, threads_for<T>(a), 0, a);
  });
}

void run(const SequenceSums& a) { launch(sequence_sums_kernel, a.segments, kSegmentThreads, 0, a); }

void run(const SequenceSumsBackward& a) {
  if (a.offsets.data != nullptr) fill_segments(a.out, a.total, a.place);
  launch(sequence_sums_backward_kernel, a.segments, kSegmentThreads, 0, a);
}

}  // namespace finefuse::cuda
