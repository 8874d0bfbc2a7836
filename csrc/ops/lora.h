// Low-rank updates (LoRA, SPEC section 2): the narrow products beside a base product, and dropout.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"

namespace finefuse {

// D(x): which elements of an array survive, and what they are multiplied by. Element i of the
// flattened array survives where word i % 4 of Philox4x32-10 (counter i / 4, key *seed, lower
// halves first) is `threshold` or more. Nothing is stored: the same seed draws the same mask.
struct Dropout {
  const int64_t* seed;  // one number; null: D(x) = x
  uint64_t threshold;   // p·2^32, rounded; 2^32: nothing survives
  double scale;         // 1/(1 - p); 0 where p = 1
};

// (rank, columns) of any type and strides, in elements: lora_a, or lora_b turned.
struct Factor {
  const void* data;
  DType dtype;
  int64_t rank_stride, column_stride;
};

// One visit of x: h = h_scale·D(x)·factorᵀ and outer = outer_scale·gᵀ·D(x), either or both.
// h, g and outer are float32 (float64 where x is), contiguous.
struct LoraShrink {
  const void* x;  // (tokens, columns)
  DType dtype;
  int64_t tokens, columns, rank;
  Factor factor;  // data null: no h
  Reals h;        // (tokens, rank)
  double h_scale;
  Reals g;      // (tokens, rank)
  Reals outer;  // (rank, columns), may be absent; zeros where there are no tokens
  double outer_scale;
  Dropout dropout;
  void* workspace;  // CPU: lora_workspace(*this) numbers of h's type
  Place place;
};

// Shrinks of one x in one visit: projections that share their input. Members differ in factor,
// rank, h, g, outer, scales and dropout.
inline constexpr int kLoraMembers = 4;
struct LoraShrinkGroup {
  LoraShrink members[kLoraMembers];
  int count;  // at least 1
};

// y = [y +] D(x).
struct LoraDropout {
  const void* x;
  DType dtype;
  int64_t count;
  bool accumulate;
  void* y;  // may be x, if it is not read
  Dropout dropout;
  Place place;
};

// y = [y +] [bias +] D(scale·h·factor).
struct LoraExpand {
  Reals h;  // (tokens, rank), float32 (float64 where y is)
  int64_t tokens, columns, rank;
  Factor factor;
  double scale;
  const void* bias;  // (columns,) of y's type, may be absent
  bool accumulate;   // whether y is read
  void* y;           // (tokens, columns)
  DType dtype;
  Dropout dropout;
  void* workspace;  // CPU: lora_workspace(*this) numbers of h's type
  Place place;
};

// ---- on NVIDIA GPUs alone: a few tokens in one launch ------------------------------------------

inline constexpr int64_t kLoraLinearRank = 256;  // the most it takes

// y = x·weightᵀ + bias + scale·h·lora_b with h = x·lora_aᵀ. Nothing is float64.
struct LoraLinear {
  const void* x;  // (tokens, columns)
  DType dtype;
  int64_t tokens, columns, rank;
  const void* weight;  // (rows, columns) of x's type, contiguous
  int64_t rows;
  Factor lora_a, lora_b;  // (rank, columns), (rank, rows)
  double scale;
  const void* bias;  // (rows,) of x's type, may be absent
  Reals h;           // (tokens, rank), float32
  void* y;           // (tokens, rows)
  Place place;
};

// ---- workspaces of the CPU ---------------------------------------------------------------------

// On the CPU: tokens and columns of a task, columns of a block, whole vectors.
inline constexpr int64_t kLoraTokens = 256, kLoraGroup = 1024, kLoraSpan = 512, kLoraPad = 32;
// To an odd multiple: rows must not be a multiple of a page apart.
constexpr int64_t lora_padded(int64_t columns) {
  return (columns / kLoraPad + 1) * kLoraPad | kLoraPad;
}
// Tokens of a task of shrink: outer products have a partial sum a task, of which there are
// kLoraChunks at most.
inline constexpr int64_t kLoraChunks = 16;
constexpr int64_t lora_tokens(int64_t tokens) {
  const int64_t least = ((tokens + kLoraChunks - 1) / kLoraChunks + 15) / 16 * 16;
  return least > kLoraTokens ? least : kLoraTokens;
}
inline int64_t lora_workspace(const LoraShrink& a) {
  const int64_t each = lora_tokens(a.tokens), chunks = (a.tokens + each - 1) / each;
  const int64_t groups = (a.columns + kLoraGroup - 1) / kLoraGroup;
  return a.rank *
         (lora_padded(a.columns) * (1 + (a.outer ? chunks : 0)) + (a.h ? groups * a.tokens : 0));
}
inline int64_t lora_workspace(const LoraExpand& a) { return a.rank * lora_padded(a.columns); }

struct LoraKernels {
  void (*shrink)(const LoraShrink* members, int count);
  void (*expand)(const LoraExpand&);
  void (*dropout)(const LoraDropout&);
};

namespace cuda {  // lora.cu
void run(const LoraShrink&);
void run(const LoraShrinkGroup&);
void run(const LoraExpand&);
void run(const LoraDropout&);
void run(const LoraLinear&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(LoraKernels, lora_kernels)
