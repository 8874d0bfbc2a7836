// The ground floor of the CUDA kernels: 16-byte vectors of logits, reductions over a block,
// launches.
//
// The kernels also compile as plain C++ against tests/cuda_on_cpu, which runs a block's threads in
// turn: then __CUDA_ARCH__ is not defined and the portable halves below are taken.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "core/place.h"
#include "core/sizes.h"

namespace finefuse::cuda {

// Arrays indexed in a loop live in registers only if the loop is unrolled.
#define FF_UNROLL _Pragma("unroll")
#define FF_ROLLED _Pragma("unroll 1")  // its body once in the code, for the compiler's time

// ---- numbers -----------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // 2 units in the last place; what underflows is 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

__device__ __forceinline__ float log2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // 2^-22 absolutely, or relatively where the result is larger
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
__device__ __forceinline__ double log2_fast(double x) { return log2(x); }

__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }  // not NaN
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float min_of(float a, float b) { return fminf(a, b); }  // not NaN
__device__ __forceinline__ double min_of(double a, double b) { return fmin(a, b); }

template <class A> constexpr A kLowest = static_cast<A>(-3.4028234663852886e38);
template <> inline constexpr double kLowest<double> = -1.7976931348623157e308;

__device__ __forceinline__ float to_accumulator(float x) { return x; }
__device__ __forceinline__ double to_accumulator(double x) { return x; }
__device__ __forceinline__ float to_accumulator(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
__device__ __forceinline__ float to_accumulator(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
#endif
}

// Rounds to the nearest, ties to even.
__device__ __forceinline__ void store_value(float* p, double x) { *p = static_cast<float>(x); }
__device__ __forceinline__ void store_value(double* p, double x) { *p = x; }
__device__ __forceinline__ void store_value(bf16* p, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>(nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
__device__ __forceinline__ void store_value(f16* p, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
  const _Float16 h = static_cast<_Float16>(x);
  memcpy(&p->bits, &h, 2);
#endif
}

// ---- memory ------------------------------------------------------------------------------------

// 16 bytes: what a thread moves at once, and what addresses must be aligned to for that.
template <class T> struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// Streaming (evict first) where nobody reads the line again.
enum class Access { keep, stream };

inline bool is_aligned(const void* p, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// A GPU faults where an address is not aligned; on a CPU the tests' header does.
template <class T> __device__ __forceinline__ auto* aligned(T* p) {
#if defined(FF_CUDA_ON_CPU)
  cuda_on_cpu::check_alignment(p, 16);
#endif
  if constexpr (std::is_const_v<T>)
    return reinterpret_cast<const uint4*>(p);
  else
    return reinterpret_cast<uint4*>(p);
}

template <Access kAccess, class T> __device__ __forceinline__ Vector<T> load(const T* p) {
  const uint4* source = aligned(p);
  const uint4 bits = kAccess == Access::stream ? __ldcs(source) : *source;
  Vector<T> v;
  memcpy(&v, &bits, 16);
  return v;
}
template <class T> __device__ __forceinline__ void store(T* p, const Vector<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, 16);
  __stcs(aligned(p), bits);
}
// As one 16-byte store, where a struct of narrow elements would become several.
template <class T> __device__ __forceinline__ void store_shared(T* p, const Vector<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, 16);
  *aligned(p) = bits;
}

// ---- one block a row ----------------------------------------------------------------------------

inline constexpr int kMaxThreads = 512;
inline constexpr int kMaxWarps = kMaxThreads / 32;
// What the kernels over rows are compiled for: two blocks a multiprocessor, 64 registers a thread
// and 64 KB of loads in flight. ptxas for sm_120 spills there, and for others where it is told
// nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
inline constexpr int kRowBlocks = 1;
#else
inline constexpr int kRowBlocks = 2;
#endif
#define FF_ROW_BOUNDS __launch_bounds__(kMaxThreads, kRowBlocks)

// Threads for a row of so many bytes: about four vectors each, so that their loads overlap.
inline int row_threads(int64_t bytes) {
  int threads = 64;
  while (threads < kMaxThreads && threads * int64_t{64} < bytes) threads *= 2;
  return threads;
}

// Elements of a row: [0, head) and [tail, n) one by one, [head, tail) in vectors. Both arrays of a
// gradient must be misaligned by the same amount for that; otherwise head is n.
struct Span {
  int64_t head, tail;
};
template <class T> __device__ inline Span vector_span(const T* p, const T* q, int64_t n) {
  const auto past = [](const T* x) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16);
  };
  if (past(p) != past(q)) return {n, n};
  constexpr int64_t size = Vector<T>::kSize;
  int64_t head = (16 - past(p)) % 16 / static_cast<int64_t>(sizeof(T));
  if (head > n) head = n;
  return {head, head + (n - head) / size * size};
}

template <class V> __device__ __forceinline__ V warp_sum(V x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ inline double warp_max(double x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = max_of(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sums over the block, the same bits every time; valid in thread 0. Needs a barrier before the
// next.
template <int K> __device__ inline void block_sum(double (&x)[K]) {
  __shared__ double partial[K][kMaxWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  for (int k = 0; k < K; ++k) {
    const double sum = warp_sum(x[k]);
    if (lane == 0) partial[k][warp] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    for (int k = 0; k < K; ++k) x[k] = warp_sum(lane < warps ? partial[k][lane] : 0.0);
  }
}

// For every thread; without a barrier before the next.
template <int K> __device__ inline void block_sum_all(double (&x)[K]) {
  __shared__ double sums[K];
  block_sum(x);
  if (threadIdx.x == 0) {
    for (int k = 0; k < K; ++k) sums[k] = x[k];
  }
  __syncthreads();
  for (int k = 0; k < K; ++k) x[k] = sums[k];
}

template <class A> __device__ inline A block_max(A x) {
  __shared__ A partial[kMaxWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  for (int offset = 16; offset > 0; offset /= 2)
    x = max_of(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < warps; ++w) x = max_of(x, partial[w]);
  return x;
}

__device__ inline void raise(const Place& place, Flag flag) {
  if (threadIdx.x == 0) place.flags[static_cast<int>(flag)] = 1;
}

// ---- a cluster of blocks ------------------------------------------------------------------------
//
// Blocks that run together and see each other's shared memory: sm_90 and newer, and only where the
// launch asked for it. Otherwise a block is a cluster of its own.

__device__ __forceinline__ unsigned cluster_size() {
#if defined(FF_CUDA_ON_CPU)
  return cuda_on_cpu::cluster_size;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
#else
  return 1;
#endif
}

// All threads of all blocks of the cluster arrive before one goes on; also a barrier of the block.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(FF_CUDA_ON_CPU)
  cuda_on_cpu::wait(cuda_on_cpu::State::cluster);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same variable in shared memory of another block of the cluster.
template <class V> __device__ __forceinline__ const V* in_block(const V* p, unsigned rank) {
#if defined(FF_CUDA_ON_CPU)
  return cuda_on_cpu::in_block(p, rank);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const V* q;
  asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
  return q;
#else
  return rank == 0 ? p : nullptr;
#endif
}

// ---- launches -----------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Blocks are counted in one dimension, up to 2^31 - 1, `cluster` in a row together. No allocation,
// no synchronisation.
template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared, const Args& args,
            int cluster = 1) {
  if (blocks <= 0) return;
  if (blocks > 2147483647) throw std::runtime_error("CUDA: more than 2^31 - 1 rows");
#if defined(FF_CUDA_ON_CPU)
  cuda_on_cpu::run(kernel, static_cast<unsigned>(blocks), threads, shared, args,
                   static_cast<unsigned>(cluster));
#else
  Args copy = args;
  void* pointers[] = {&copy};
  if (cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(args.place.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), "launch");
    return;
  }
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), pointers, shared,
                         static_cast<cudaStream_t>(args.place.stream)),
        "launch");
#endif
}

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#if defined(FF_CUDA_ON_CPU)
  return cuda_on_cpu::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char ff_shared[];
  return ff_shared;
#endif
}

}  // namespace finefuse::cuda
