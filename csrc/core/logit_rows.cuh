// What the kernels over rows of logits share: what thread 0 knows of a row's gradient, and a row
// that stays in shared memory between its two passes.
#pragma once
#include "core/cuda_utils.cuh"
#include "core/logit_rows.h"
#include "core/softmax_row.cuh"

namespace finefuse::cuda {

// ---- the gradient of a row ----------------------------------------------------------------------

struct Coefficients {
  RowGradient row;
  double at_target;
  bool zero;
};

// What thread 0 knows of the row; here all of the block do. Also a barrier: whatever was read
// before may be overwritten after. Read where it is used: kept in registers, it would push others
// out.
template <class V> __device__ const V& broadcast(const V& mine) {
  __shared__ V shared;
  if (threadIdx.x == 0) shared = mine;
  __syncthreads();
  return shared;
}

// Of a part of a row (in shared memory: Access::keep) y is counted from where that begins.
template <class T, bool kEntropy, Access kAccess>
__device__ void write_gradient(const T* z, T* out, int64_t vocab, int64_t y,
                               const Coefficients& g) {
  if (g.zero) {
    row_zero(out, vocab);
    return;
  }
  row_gradient<T, kEntropy, kAccess>(z, out, vocab, g.row);
  __syncthreads();
  const bool here = kAccess == Access::stream || (y >= 0 && y < vocab);
  if (threadIdx.x == 0 && here) store_value(out + y, static_cast<Accumulator<T>>(g.at_target));
}

// ---- a row in shared memory ---------------------------------------------------------------------
//
// One block keeps the row, or, where it is too long for that, a cluster of blocks, each a part:
// they tell each other what they found in theirs. A kernel over rows asks row_part() which row is
// its own, combines what row_stats() left with row_stats_of_all(), and calls row_end() at its end.

// As misaligned as the row itself, so that both are read in the same vectors.
template <class T> __device__ T* stage_of(const T* z) {
  return reinterpret_cast<T*>(dynamic_shared() + reinterpret_cast<uintptr_t>(z) % 16);
}

// Elements of a part, but for what comes before the row's first aligned vector.
template <class T> FF_HD int64_t part_size(int64_t vocab, unsigned blocks) {
  constexpr int64_t size = 16 / sizeof(T);
  if (blocks == 1) return vocab;
  return (vocab + size * blocks - 1) / (size * blocks) * size;
}

template <bool kStaged> __device__ int64_t row_of_block() {
  return kStaged ? blockIdx.x / cluster_size() : blockIdx.x;
}

// What this block has of the row z: elements [begin, begin + count). `first`: it writes what there
// is one of.
struct RowPart {
  int64_t begin, count;
  bool first;
};
template <bool kStaged, class T> __device__ RowPart row_part(const T* z, int64_t vocab) {
  const unsigned blocks = kStaged ? cluster_size() : 1, rank = blockIdx.x % blocks;
  if (blocks == 1) return {0, vocab, true};
  const int64_t head = vector_span(z, z, vocab).head, size = part_size<T>(vocab, blocks);
  const int64_t begin = head + rank * size, end = begin + size;
  const int64_t from = rank == 0 ? 0 : begin < vocab ? begin : vocab;
  return {from, (end < vocab ? end : vocab) - from, rank == 0};
}

// From the statistics of the parts those of K rows. All threads come here; thread 0's values count.
template <int K> __device__ inline void row_stats_of_all(RowStats (&rows)[K], double temperature) {
  const unsigned blocks = cluster_size();
  if (blocks == 1) return;
  __shared__ RowStats part[K];
  if (threadIdx.x == 0) {
    for (int k = 0; k < K; ++k) part[k] = rows[k];
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    const bool there = threadIdx.x < blocks;
    FF_UNROLL for (int k = 0; k < K; ++k) {
      RowStats &s = rows[k], x{-INFINITY, -1, 0, 0};
      if (there) x = *in_block(&part[k], threadIdx.x);
      s.ref = warp_max(x.ref);
      const bool highest = there && x.ref == s.ref, lower = x.ref > -INFINITY && !highest;
      const double shift = lower ? x.ref - s.ref : 0.0;
      const double scale = lower ? exp(shift / temperature) : 0.0;
      // one of the 1s that `excess` leaves out stays out
      const double ones = warp_sum(highest ? 1.0 : 0.0) - 1.0;
      s.excess = warp_sum(highest ? x.excess : lower ? scale * x.sum() : 0.0) + ones;
      s.dot = warp_sum(highest ? x.dot : lower ? scale * (x.dot + shift * x.sum()) : 0.0);
      s.logit_sum = warp_sum(x.logit_sum);
    }
  }
  cluster_arrive();
}
__device__ inline RowStats row_stats_of_all(const RowStats& own, double temperature) {
  RowStats rows[1] = {own};
  row_stats_of_all(rows, temperature);
  return rows[0];
}

// Sums over the blocks' threads 0; the second time a kernel asks all of them, row_end() before.
template <int K> __device__ inline void sum_of_all(double (&x)[K]) {
  const unsigned blocks = cluster_size();
  if (blocks == 1) return;
  __shared__ double part[K];
  if (threadIdx.x == 0) {
    for (int k = 0; k < K; ++k) part[k] = x[k];
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    FF_UNROLL for (int k = 0; k < K; ++k) {
      x[k] = warp_sum(threadIdx.x < blocks ? *in_block(&part[k], threadIdx.x) : 0.0);
    }
  }
  cluster_arrive();
}

// Nobody reads the shared memory of a block that has ended.
__device__ inline void row_end() {
  if (cluster_size() > 1) cluster_wait();
}

template <class T, class Args> int threads_for(const Args& a) {
  return row_threads(a.shape.vocab * static_cast<int64_t>(sizeof(T)));
}

// Half of what a multiprocessor has: two blocks a multiprocessor, so that one loads while the other
// computes.
inline int64_t stage_limit() {
#if defined(FF_CUDA_ON_CPU)
  return 2 << 10;  // the tests have rows for one block, for clusters, and longer ones
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

// The most blocks that may keep a row together: 8 run on every device that has clusters at all, if
// the kernel was compiled for one.
template <class Args> int cluster_limit(void (*kernel)(Args)) {
#if defined(FF_CUDA_ON_CPU)
  (void)kernel;
  return 8;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "kernel");
  return attributes.ptxVersion >= 90 ? 8 : 1;
#endif
}

// What a block keeps of so many rows (logits, and what goes with them, of one type), each of them
// as misaligned as it is. Two are not misaligned alike.
template <class T> FF_HD int64_t stage_bytes(int64_t vocab, unsigned blocks, int rows) {
  const int64_t size = part_size<T>(vocab, blocks) * static_cast<int64_t>(sizeof(T));
  return (size + (rows == 1 ? 31 : 47)) / 16 * 16;
}

// `staged` where a row, or `rows` rows that go together, fit in the shared memory of a block, or of
// a cluster of them, else `twice`, which reads them again and may have arguments of its own.
template <class T, class Args>
void launch_rows(void (*staged)(Args), void (*twice)(Args), const Args& a, int rows,
                 const Args& of_twice) {
  const int64_t limit = stage_limit();
  const auto bytes = [&](int blocks) {
    return rows * stage_bytes<T>(a.shape.vocab, static_cast<unsigned>(blocks), rows);
  };
  int blocks = 1;
  if (bytes(1) > limit) {
    const int most = cluster_limit(staged);
    while (blocks < most && bytes(blocks) > limit) blocks *= 2;
  }
  if (bytes(blocks) > limit) {
    launch(twice, a.shape.rows, threads_for<T>(a), 0, of_twice);
    return;
  }
#if !defined(FF_CUDA_ON_CPU)
  // the same for every call: another thread may be launching the same kernel
  check(cudaFuncSetAttribute(staged, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limit)),
        "shared memory");
#endif
  launch(staged, a.shape.rows * blocks, row_threads(bytes(blocks)),
         static_cast<size_t>(bytes(blocks)), a, blocks);
}
template <class T, class Args>
void launch_rows(void (*staged)(Args), void (*twice)(Args), const Args& a) {
  launch_rows<T>(staged, twice, a, 1, a);
}

}  // namespace finefuse::cuda
