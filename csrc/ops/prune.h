// Pruning by magnitude or by Wanda's score: what crosses from Python to the kernel.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"

namespace finefuse {

// The numbers are the contract with python/finefuse/_args/prune.py (PRUNE_SCOPES).
enum class PruneScope : int { tensor = 0, row = 1, group = 2 };

// Drops the `drop` elements of smallest score |w|·norm of the tensor, of each row, or of each group
// of `group` neighbours in a row; of equal scores the lower index goes first. Scores are float32
// (float64 for float64); NaN is the largest of all.
struct Prune {
  void* weight;  // (rows, columns), contiguous
  DType dtype;
  int64_t rows, columns;
  PruneScope scope;
  int64_t drop, group;
  Reals norm;       // (columns,), of the scores' type; absent: 1
  uint8_t* mask;    // (rows, columns), 1 = kept; absent: not wanted
  bool zero;        // set what is dropped to 0 in `weight`
  void* workspace;  // on GPUs, prune_workspace bytes; on the CPU prune_cpu_workspace(*this)
  Place place;
};

// ---- the CPU's workspace ------------------------------------------------------------------------

// Of a span of so many elements, split into chunks: a sample of prune_root(count)² elements says
// between which scores the cut is; up to prune_capacity(count) candidates are there, twice what is
// expected.
inline constexpr int64_t kPruneChunk = 4096, kPruneSampled = int64_t{1} << 18;
struct PruneChunk {
  int64_t first;         // of its candidates
  int32_t count, quota;  // how many; how many of those with the cut's score go
};
constexpr int64_t prune_chunks(int64_t count) { return (count + kPruneChunk - 1) / kPruneChunk; }
constexpr int64_t prune_root(int64_t count) {
  if (count < kPruneSampled) return 0;
  int64_t root = 64;
  while ((root + 1) * (root + 1) * (root + 1) <= 4 * count) ++root;
  return root;
}
constexpr int64_t prune_capacity(int64_t count) {
  return count < kPruneSampled ? 0 : 8 * count / prune_root(count);
}
// In bytes: 2% of a float32 weight of 10^8 elements.
inline int64_t prune_cpu_workspace(const Prune& a) {
  const int64_t count = a.scope == PruneScope::tensor ? a.rows * a.columns
                        : a.scope == PruneScope::row  ? a.columns
                                                      : a.group;
  const int64_t size = a.dtype == DType::f64                             ? 8
                       : a.dtype == DType::f32 || a.norm.data != nullptr ? 4
                                                                         : 2;
  return prune_chunks(count) * static_cast<int64_t>(sizeof(PruneChunk)) +
         prune_capacity(count) * (size + 2);
}

// The workspace on a GPU: four numbers, so many counts, one for each tile of so many elements; 8
// bytes each. The contract with prune_workspace of python/finefuse/_args/prune.py.
inline constexpr int kPruneBins = 2048;
inline constexpr int64_t kPruneTile = 4096;

// Sets the packed codes of elements that are not kept to the code of 0.
struct PruneCodes {
  uint8_t* codes;  // packed as in ops/codebook.h
  int64_t count;   // elements
  int bits;        // 2, 3, 4 or 8
  int zero;        // the code of 0
  const uint8_t* mask;
  Place place;
};

struct PruneKernels {
  void (*prune)(const Prune&);
  void (*prune_codes)(const PruneCodes&);
};

namespace cuda {  // prune.cu
void run(const Prune&);
void run(const PruneCodes&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(PruneKernels, prune_kernels)
