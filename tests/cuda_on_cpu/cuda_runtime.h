// Enough of CUDA to run this project's kernels on a CPU: the tests build finefuse._CUDA against it
// where there is no GPU (FINEFUSE_CUDA=ON_CPU).
//
// A block's threads are coroutines on stacks of their own, run in turn; __syncthreads and the warp
// shuffle are where they give way. Blocks run one after the other. It shows wrong indices, wrong
// arithmetic, misaligned vectors, dynamic shared memory that is too small or read before it is
// written (it starts as NaN), and a barrier that not all threads reach. It does not show races
// between threads, which a barrier too few would cause, static shared memory read before it is
// written (it keeps the block before), nor how fast a kernel is.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#define FF_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncthreads() ::cuda_on_cpu::wait(::cuda_on_cpu::State::barrier)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }

inline uint4 __ldcs(const uint4* p) { return *p; }
inline void __stcs(uint4* p, const uint4& v) { *p = v; }

inline float __fadd_rn(float a, float b) { return a + b; }  // built with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }

namespace cuda_on_cpu {

enum class State { ready, barrier, shuffle, done };

struct Thread {
  State state;
  bool started;
  ucontext_t context;  // its first entry; afterwards the cheaper jump
  jmp_buf jump;
  int shuffles;  // how many it has passed
  unsigned char slot[2][8];
};

inline constexpr size_t kStack = 64 << 10;
inline std::mutex mutex;  // one launch at a time
inline std::vector<Thread> threads;
inline std::unique_ptr<unsigned char[]> stacks;
inline size_t stacked = 0;
inline std::vector<uint4> shared;
inline jmp_buf scheduler;
inline void (*body)(void*) = nullptr;
inline void* body_args = nullptr;

inline Thread& self() { return threads[threadIdx.x]; }

inline void wait(State state) {
  self().state = state;
  if (_setjmp(self().jump) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  body(body_args);
  self().state = State::done;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned i) {
  if (_setjmp(scheduler) != 0) return;
  threadIdx.x = i;
  Thread& t = threads[i];
  t.state = State::ready;
  if (t.started) _longjmp(t.jump, 1);
  t.started = true;
  setcontext(&t.context);
}

inline void check_alignment(const volatile void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fprintf(stderr, "cuda_on_cpu: %p is not aligned to %d bytes\n", const_cast<const void*>(p),
            static_cast<int>(bytes));
    abort();
  }
}

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared.data()); }

// Runs one block to its end.
inline void run_block() {
  const unsigned n = blockDim.x;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = threads[i];
    t.started = false;
    t.state = State::ready;
    t.shuffles = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks.get() + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, entry, 0);
  }
  for (bool first = true;; first = false) {
    bool moved = false, at_barrier = true, alive = false;
    for (unsigned warp = 0; warp < n; warp += 32) {
      const unsigned end = warp + 32 < n ? warp + 32 : n;
      bool together = true;  // a shuffle waits for its whole warp
      for (unsigned i = warp; i < end; ++i) together &= threads[i].state == State::shuffle;
      if (!first && !together) continue;
      for (unsigned i = warp; i < end; ++i) resume(i);
      moved = true;
    }
    for (unsigned i = 0; i < n; ++i) {
      at_barrier &= threads[i].state == State::barrier;
      alive |= threads[i].state != State::done;
    }
    if (!alive) return;
    if (at_barrier) {
      for (unsigned i = 0; i < n; ++i) resume(i);
    } else if (!moved) {
      throw std::runtime_error("cuda_on_cpu: not all threads reach a barrier or a shuffle");
    }
  }
}

template <class Args>
void run(void (*kernel)(Args), unsigned blocks, int block, size_t dynamic, const Args& args) {
  const std::lock_guard<std::mutex> lock(mutex);
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  body = [](void* p) { static_cast<Call*>(p)->kernel(*static_cast<Call*>(p)->args); };
  body_args = &call;
  blockDim.x = static_cast<unsigned>(block);
  gridDim.x = blocks;
  threads.resize(blockDim.x);
  if (stacked < blockDim.x) {
    stacked = blockDim.x;
    stacks = std::make_unique_for_overwrite<unsigned char[]>(stacked * kStack);
  }
  const size_t size = (dynamic + 15) / 16, guard = 16;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    shared.assign(size + guard, uint4{~0u, ~0u, ~0u, ~0u});
    run_block();
    for (size_t i = size; i < size + guard; ++i) {
      if ((shared[i].x & shared[i].y & shared[i].z & shared[i].w) != ~0u) {
        throw std::runtime_error("cuda_on_cpu: written past the dynamic shared memory");
      }
    }
  }
}

// What lane `from` of the warp passes.
template <class V> V shuffle(V value, unsigned from) {
  static_assert(sizeof(V) <= 8);
  const int turn = self().shuffles++ % 2;  // a thread may be one shuffle ahead of another
  memcpy(self().slot[turn], &value, sizeof(V));
  wait(State::shuffle);
  memcpy(&value, threads[threadIdx.x / 32 * 32 + from].slot[turn], sizeof(V));
  return value;
}

}  // namespace cuda_on_cpu

template <class V> V __shfl_xor_sync(unsigned, V value, int mask) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}
template <class V> V __shfl_up_sync(unsigned, V value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::shuffle(value, lane < delta ? lane : lane - delta);
}
