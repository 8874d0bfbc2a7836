// Enough of CUDA to run this project's kernels on a CPU: the tests build finefuse._CUDA against it
// where there is no GPU (FINEFUSE_CUDA=ON_CPU).
//
// A block's threads are coroutines on stacks of their own, run in turn; __syncthreads and the warp
// shuffle are where they give way. Blocks run one after the other, those of a cluster side by side
// on threads of the machine, so that each has its own __shared__ variables. It shows wrong indices,
// wrong arithmetic, misaligned vectors, dynamic shared memory that is too small or read before it
// is written (it starts as NaN), and a barrier that not all threads reach. It does not show races
// between threads, which a barrier too few would cause, static shared memory read before it is
// written (it keeps the block before), nor how fast a kernel is.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define FF_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static thread_local
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
inline thread_local constinit dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }

inline uint4 __ldcs(const uint4* p) { return *p; }
inline void __stcs(uint4* p, const uint4& v) { *p = v; }

// Clusters alone run side by side, and none of theirs adds so.
template <class V> V atomicAdd(V* p, V value) {
  const V before = *p;
  *p += value;
  return before;
}
inline unsigned atomicOr(unsigned* p, unsigned bits) {
  const unsigned before = *p;
  *p |= bits;
  return before;
}

inline float __fadd_rn(float a, float b) { return a + b; }  // built with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }

namespace cuda_on_cpu {

enum class State { ready, barrier, shuffle, cluster, done };

struct Thread {
  State state;
  bool started;
  ucontext_t context;  // its first entry; afterwards the cheaper jump
  jmp_buf jump;
  int shuffles;  // how many it has passed
  unsigned char slot[2][8];
};

inline constexpr size_t kStack = 64 << 10;

// Blocks that wait for each other, and where the __shared__ variables of each begin.
struct Cluster {
  std::barrier<> barrier;
  std::vector<const char*> shared;
};

// What a thread of the machine runs blocks with.
struct Block {
  std::vector<Thread> threads;
  std::unique_ptr<unsigned char[]> stacks;
  size_t stacked = 0;
  std::vector<uint4> shared;
  jmp_buf scheduler;
  void (*body)(void*) = nullptr;
  void* body_args = nullptr;
  Cluster* cluster = nullptr;
};
inline thread_local constinit Block* block = nullptr;
inline thread_local constinit unsigned cluster_size = 1;
inline thread_local constinit char shared_origin = 0;  // all of a module's are at fixed distances

inline Thread& self() { return block->threads[threadIdx.x]; }

inline void wait(State state) {
  self().state = state;
  if (_setjmp(self().jump) == 0) _longjmp(block->scheduler, 1);
}

inline void entry() {
  block->body(block->body_args);
  self().state = State::done;
  _longjmp(block->scheduler, 1);
}

inline void resume(unsigned i) {
  if (_setjmp(block->scheduler) != 0) return;
  threadIdx.x = i;
  Thread& t = block->threads[i];
  t.state = State::ready;
  if (t.started) _longjmp(t.jump, 1);
  t.started = true;
  setcontext(&t.context);
}

template <class V> const V* in_block(const V* p, unsigned rank) {
  if (block->cluster == nullptr) return p;
  const auto distance = reinterpret_cast<const char*>(p) - &shared_origin;
  return reinterpret_cast<const V*>(block->cluster->shared[rank] + distance);
}

inline void check_alignment(const volatile void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fprintf(stderr, "cuda_on_cpu: %p is not aligned to %d bytes\n", const_cast<const void*>(p),
            static_cast<int>(bytes));
    abort();
  }
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(block->shared.data());
}

// Runs one block to its end.
inline void run_block() {
  const unsigned n = blockDim.x;
  std::vector<Thread>& threads = block->threads;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = threads[i];
    t.started = false;
    t.state = State::ready;
    t.shuffles = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = block->stacks.get() + i * kStack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, entry, 0);
  }
  for (bool first = true;; first = false) {
    bool moved = false, at_barrier = true, at_cluster = true, alive = false;
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
      at_cluster &= threads[i].state == State::cluster;
      alive |= threads[i].state != State::done;
    }
    if (!alive) return;
    if (at_cluster && block->cluster != nullptr) block->cluster->barrier.arrive_and_wait();
    if (at_barrier || at_cluster) {
      for (unsigned i = 0; i < n; ++i) resume(i);
    } else if (!moved) {
      throw std::runtime_error("cuda_on_cpu: not all threads reach a barrier or a shuffle");
    }
  }
}

// Blocks first, first + step, ... of a launch, one after the other.
inline void run_blocks(unsigned first, unsigned step, unsigned blocks, int threads, size_t dynamic,
                       void (*body)(void*), void* args, Cluster* cluster) {
  static thread_local Block own;
  block = &own;
  own.body = body;
  own.body_args = args;
  own.cluster = cluster;
  cluster_size = step;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = blocks;
  own.threads.resize(blockDim.x);
  if (own.stacked < blockDim.x) {
    own.stacked = blockDim.x;
    own.stacks = std::make_unique_for_overwrite<unsigned char[]>(own.stacked * kStack);
  }
  const size_t size = (dynamic + 15) / 16, guard = 16;
  for (blockIdx.x = first; blockIdx.x < blocks; blockIdx.x += step) {
    own.shared.assign(size + guard, uint4{~0u, ~0u, ~0u, ~0u});
    run_block();
    for (size_t i = size; i < size + guard; ++i) {
      const uint4& v = own.shared[i];
      if ((v.x & v.y & v.z & v.w) != ~0u) {
        throw std::runtime_error("cuda_on_cpu: written past the dynamic shared memory");
      }
    }
  }
}

template <class Args>
void run(void (*kernel)(Args), unsigned blocks, int threads, size_t dynamic, const Args& args,
         unsigned cluster) {
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  const auto body = [](void* p) { static_cast<Call*>(p)->kernel(*static_cast<Call*>(p)->args); };
  if (cluster == 1) {
    run_blocks(0, 1, blocks, threads, dynamic, body, &call, nullptr);
    return;
  }
  if (blocks % cluster != 0) throw std::runtime_error("cuda_on_cpu: a cluster without all blocks");
  Cluster together{std::barrier<>(cluster), std::vector<const char*>(cluster)};
  std::vector<std::exception_ptr> errors(cluster);
  std::vector<std::thread> machine;
  for (unsigned rank = 0; rank < cluster; ++rank) {
    machine.emplace_back([&, rank] {
      together.shared[rank] = &shared_origin;
      together.barrier.arrive_and_wait();
      try {
        run_blocks(rank, cluster, blocks, threads, dynamic, body, &call, &together);
      } catch (...) {
        errors[rank] = std::current_exception();
      }
      together.barrier.arrive_and_drop();
    });
  }
  for (std::thread& t : machine) t.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// What lane `from` of the warp passes.
template <class V> V shuffle(V value, unsigned from) {
  static_assert(sizeof(V) <= 8);
  const int turn = self().shuffles++ % 2;  // a thread may be one shuffle ahead of another
  memcpy(self().slot[turn], &value, sizeof(V));
  wait(State::shuffle);
  memcpy(&value, block->threads[threadIdx.x / 32 * 32 + from].slot[turn], sizeof(V));
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
