// Token log-probabilities and cross-entropy on NVIDIA GPUs: one block a row.
//
//   kernel                    reads + writes an element   bound by
//   token_logprobs            sizeof(T) + 0               memory
//   token_logprobs_backward   sizeof(T) + sizeof(T)       memory
//   cross_entropy             sizeof(T) + sizeof(T)       memory; the gradient reads the row from
//   shared
//                                                         memory, or a longer one again, from L2 as
//                                                         far as it stayed there
//
// float32 a thread, float64 between threads and for a row's coefficients (float64 throughout for
// float64). Fixed order of sums: the same bits every time. A target out of range is not followed:
// its row becomes NaN, its gradient 0, and a flag is set.
#include "core/cuda_utils.cuh"
#include "core/softmax_row.cuh"
#include "ops/logprobs.h"

namespace finefuse::cuda {
namespace {

// Thread 0 knows what the row's gradient is; here all of the block do. Also a barrier: whatever was
// read before may be overwritten after.
struct Shared {
  RowGradient row;
  double at_target;
  bool zero;
};
__device__ Shared broadcast(const Shared& mine) {
  __shared__ Shared shared;
  if (threadIdx.x == 0) shared = mine;
  __syncthreads();
  return shared;
}

template <class T, bool kEntropy, Access kAccess>
__device__ void write_gradient(const T* z, T* out, int64_t vocab, int64_t y, const Shared& g) {
  if (g.zero) {
    row_zero(out, vocab);
    return;
  }
  row_gradient<T, kEntropy, kAccess>(z, out, vocab, g.row);
  __syncthreads();
  if (threadIdx.x == 0) store_value(out + y, static_cast<Accumulator<T>>(g.at_target));
}

template <class T, bool kEntropy>
__global__ void FF_ROW_BOUNDS token_logprobs_kernel(const TokenLogprobs a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab, r = blockIdx.x, y = a.targets[r];
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
  if (threadIdx.x != 0) return;
  a.logprobs.set(r, row.logp);
  if (a.lse) a.lse.set(r, lse);
  if (a.entropy) a.entropy.set(r, row.entropy);
  if (a.saved != nullptr) {
    a.saved[r] = row.ref;
    a.saved[rows + r] = row.log_sum;
    if (a.entropy) a.saved[2 * rows + r] = row.entropy;
  }
}

template <class T, bool kEntropy>
__global__ void FF_ROW_BOUNDS token_logprobs_backward_kernel(const TokenLogprobsBackward a) {
  const int64_t rows = a.shape.rows, vocab = a.shape.vocab, r = blockIdx.x, y = a.targets[r];
  const bool bad = y != a.ignore_index && (y < 0 || y >= vocab);
  if (bad) raise(a.place, Flag::targets);
  const T* z = row_of<T>(a.logits, r);
  Shared mine{};
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
  const Shared shared = broadcast(mine);
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

// kStaged: the row fits in shared memory, and the gradient reads it there.
template <class T, bool kSmoothing, bool kStaged>
__global__ void FF_ROW_BOUNDS cross_entropy_kernel(const CrossEntropy a) {
  const int64_t vocab = a.shape.vocab, r = blockIdx.x, y = a.targets[r];
  const bool by_row = a.reduction == Reduction::none, want_gradient = a.gradient.data != nullptr;
  const bool ignored = y == a.ignore_index, bad = !ignored && (y < 0 || y >= vocab);
  if (bad) raise(a.place, Flag::targets);
  double loss = bad ? NAN : 0.0;
  Shared mine{};
  mine.zero = true;
  const T* z = row_of<T>(a.logits, r);
  T* stage = nullptr;
  if constexpr (kStaged) {
    stage = reinterpret_cast<T*>(dynamic_shared() + reinterpret_cast<uintptr_t>(z) % 16);
  }
  if (!ignored && !bad) {
    const RowStats s = row_stats<T, false, kSmoothing, kStaged ? Access::stream : Access::keep>(
        z, vocab, 1.0, stage);
    if (threadIdx.x == 0) {
      const double eps = kSmoothing ? a.label_smoothing : 0.0, n = static_cast<double>(vocab);
      const double log_sum = log1p(s.excess);
      const double logp = to_accumulator(z[y]) - s.ref - log_sum;  // all -inf: -inf + inf, NaN
      loss = -logp;
      if (kSmoothing) loss = (1.0 - eps) * loss + eps * (s.ref + log_sum - s.logit_sum / n);
      const double upstream = a.upstream ? a.upstream[by_row ? r : 0] : 1.0;
      const double w = upstream * share(a), offset = eps / n;
      mine.zero = w == 0.0;
      mine.row = {s.ref, 1.0, w / (1.0 + s.excess), 0.0, -w * offset};
      mine.at_target = w * (expm1(logp) + eps - offset);
    }
  }
  if (threadIdx.x == 0) {
    if (!by_row)
      a.scratch[r] = loss;
    else if (a.loss)
      a.loss.set(r, loss);
  }
  if (!want_gradient) return;
  const Shared shared = broadcast(mine);
  T* out = row_of<T>(a.gradient, r);
  if constexpr (kStaged) {
    write_gradient<T, false, Access::keep>(stage, out, vocab, y, shared);
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

constexpr int kSegmentThreads = 128;

template <class Args> struct Segment {
  int64_t begin, end;
  bool bad;
  __device__ Segment(const Args& a, int64_t i) {
    if (a.offsets.data == nullptr) {
      begin = i * a.length, end = begin + a.length, bad = false;
      return;
    }
    begin = a.offsets[i], end = a.offsets[i + 1];
    bad = begin < 0 || begin > end || end > a.total || (i == 0 && begin != 0) ||
          (i == a.segments - 1 && end != a.total);
    if (bad) begin = end = 0, raise(a.place, Flag::cu_seqlens);
  }
};

__global__ void __launch_bounds__(kSegmentThreads) sequence_sums_kernel(const SequenceSums a) {
  const int64_t i = blockIdx.x;
  const Segment s(a, i);
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

// Tokens that bad offsets leave to no segment.
__global__ void __launch_bounds__(kSegmentThreads)
    sequence_fill_kernel(const SequenceSumsBackward a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.total) a.out.set(t, NAN);
}

__global__ void __launch_bounds__(kSegmentThreads)
    sequence_sums_backward_kernel(const SequenceSumsBackward a) {
  __shared__ double divisor;
  const int64_t i = blockIdx.x;
  const Segment s(a, i);
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

// Calls f with a value of the element type.
template <class F> void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64: return f(double{});
  }
}

template <class T, class Args> int threads_for(const Args& a) {
  return row_threads(a.shape.vocab * static_cast<int64_t>(sizeof(T)));
}

// Half of what a multiprocessor has: two blocks a multiprocessor, so that one loads while the other
// computes.
int64_t stage_limit() {
#if defined(FF_CUDA_ON_CPU)
  return 16 << 10;
#else
  int device = 0, per_sm = 0, per_block = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "device");
  check(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device");
  const int half = per_sm / 2 - 4096;  // what the block itself and the driver take
  return half < per_block ? half : per_block;
#endif
}

template <class T, bool kSmoothing> void launch_cross_entropy(const CrossEntropy& a) {
  // of the row, plus as much as it is misaligned
  const int64_t bytes = (a.shape.vocab * static_cast<int64_t>(sizeof(T)) + 31) / 16 * 16;
  const int64_t limit = stage_limit();
  if (a.gradient.data != nullptr && bytes <= limit) {
    const auto kernel = cross_entropy_kernel<T, kSmoothing, true>;
#if !defined(FF_CUDA_ON_CPU)
    // the same for every call: another thread may be launching the same kernel
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(limit)),
          "shared memory");
#endif
    launch(kernel, a.shape.rows, threads_for<T>(a), static_cast<size_t>(bytes), a);
  } else {
    launch(cross_entropy_kernel<T, kSmoothing, false>, a.shape.rows, threads_for<T>(a), 0, a);
  }
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
  if (a.offsets.data != nullptr) {
    launch(sequence_fill_kernel, (a.total + kSegmentThreads - 1) / kSegmentThreads, kSegmentThreads,
           0, a);
  }
  launch(sequence_sums_backward_kernel, a.segments, kSegmentThreads, 0, a);
}

}  // namespace finefuse::cuda
