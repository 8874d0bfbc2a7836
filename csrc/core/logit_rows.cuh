// What the kernels over rows of logits share: the element type, what thread 0 knows of a row's
// gradient, and a row that stays in shared memory between its two passes.
#pragma once
#include "core/cuda_utils.cuh"
#include "core/logit_rows.h"
#include "core/softmax_row.cuh"

namespace finefuse::cuda {

// Calls f with a value of the element type.
template <class F> void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64: return f(double{});
  }
}

// ---- the gradient of a row
// -----------------------------------------------------------------------

struct Coefficients {
  RowGradient row;
  double at_target;
  bool zero;
};

// What thread 0 knows of the row; here all of the block do. Also a barrier: whatever was read before
// may be overwritten after. Read where it is used: kept in registers, it would push others out.
template <class V> __device__ const V& broadcast(const V& mine) {
  __shared__ V shared;
  if (threadIdx.x == 0) shared = mine;
  __syncthreads();
  return shared;
}

template <class T, bool kEntropy, Access kAccess>
__device__ void write_gradient(const T* z, T* out, int64_t vocab, int64_t y,
                               const Coefficients& g) {
  if (g.zero) {
    row_zero(out, vocab);
    return;
  }
  row_gradient<T, kEntropy, kAccess>(z, out, vocab, g.row);
  __syncthreads();
  if (threadIdx.x == 0) store_value(out + y, static_cast<Accumulator<T>>(g.at_target));
}

// ---- a row in shared memory
// ----------------------------------------------------------------------

// As misaligned as the row itself, so that both are read in the same vectors.
template <class T> __device__ T* stage_of(const T* z) {
  return reinterpret_cast<T*>(dynamic_shared() + reinterpret_cast<uintptr_t>(z) % 16);
}

template <class T, class Args> int threads_for(const Args& a) {
  return row_threads(a.shape.vocab * static_cast<int64_t>(sizeof(T)));
}

// Half of what a multiprocessor has: two blocks a multiprocessor, so that one loads while the other
// computes.
inline int64_t stage_limit() {
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

// `staged` where a row fits in shared memory, else `twice`, which reads it again.
template <class T, class Args>
void launch_rows(void (*staged)(Args), void (*twice)(Args), const Args& a) {
  // of the row, plus as much as it is misaligned
  const int64_t bytes = (a.shape.vocab * static_cast<int64_t>(sizeof(T)) + 31) / 16 * 16;
  const int64_t limit = stage_limit();
  if (bytes > limit) {
    launch(twice, a.shape.rows, threads_for<T>(a), 0, a);
    return;
  }
#if !defined(FF_CUDA_ON_CPU)
  // the same for every call: another thread may be launching the same kernel
  check(cudaFuncSetAttribute(staged, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limit)),
        "shared memory");
#endif
  launch(staged, a.shape.rows, threads_for<T>(a), static_cast<size_t>(bytes), a);
}

}  // namespace finefuse::cuda
