// Where a kernel runs: how many threads on a CPU, which stream on a GPU.
#pragma once
#include <cstdint>

namespace finefuse {

struct Place {
  int threads = 1;           // CPU
  void* stream = nullptr;    // CUDA: a cudaStream_t of the current device
  int32_t* flags = nullptr;  // CUDA: (kFlags,) on that device; a kernel sets the ones it found
};

// What a GPU kernel found wrong where raising would synchronise; finefuse.check() raises it. The
// numbers are the contract with python/finefuse/_backend.py (FLAGS).
enum class Flag : int { targets = 0, cu_seqlens = 1, lengths = 2, adapter = 3, teacher = 4 };
inline constexpr int kFlags = 5;

}  // namespace finefuse
