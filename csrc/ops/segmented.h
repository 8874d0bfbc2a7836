// Low-rank updates of many adapters in one batch: each row of x has an adapter of its own, or none.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"
#include "ops/lora.h"

namespace finefuse {

// Rows by adapter, none moved: those of adapter a are order[begins[a]] to order[begins[a + 1] - 1],
// rising. Rows before begins[0] have no adapter. On a GPU, where ids cannot be refused, rows from
// begins[adapters] on had one that is not there.
struct Segments {
  const int64_t* order;   // (tokens,)
  const int64_t* begins;  // (adapters + 1,)
  int64_t adapters;
};

// (adapters, rank, columns) of any type and strides.
struct Factors {
  Factor first;
  int64_t adapter_stride;
};

// On the CPU alone: order and begins from ids, -1 for none, all in [-1, adapters).
struct SegmentRows {
  Indices adapter;  // (tokens,)
  int64_t tokens, adapters;
  int64_t *order, *begins;
};

// For each row t, of adapter a: h[t] = h_scale[a]·D(x[t])·factor[a]ᵀ, and
// outer[a] = outer_scale[a]·Σ g[t]ᵀ·D(x[t]) over its rows; either or both. Rows without an adapter:
// h = 0. h, g, outer and the scales are float32 (float64 where x is), contiguous.
struct SegmentedShrink {
  const void* x;  // (tokens, columns)
  DType dtype;
  int64_t tokens, columns, rank;
  Segments segments;
  Factors factor;  // data null: no h
  Reals h;         // (tokens, rank)
  Reals h_scale;   // (adapters,), absent: 1
  Reals g;         // (tokens, rank)
  Reals outer;     // (adapters, rank, columns), may be absent; zeros of an adapter without rows
  Reals outer_scale;
  bool turned;  // outer is (adapters, columns, rank), as lora_b is
  Dropout dropout;
  Place place;
};

// y[t] += D(scale[a]·h[t]·factor[a]). Rows without an adapter stay as they are; on a GPU those
// whose adapter is not there become NaN, and are flagged.
struct SegmentedExpand {
  Reals h;  // (tokens, rank)
  int64_t tokens, columns, rank;
  Segments segments;
  Factors factor;
  Reals scale;  // (adapters,), absent: 1
  void* y;      // (tokens, columns)
  DType dtype;
  Dropout dropout;
  Place place;
};

struct SegmentedKernels {
  // The first id that is not in [-1, adapters), -1 if there is none.
  int64_t (*first_bad_adapter)(const SegmentRows&);
  void (*rows)(const SegmentRows&);
  void (*shrink)(const SegmentedShrink&);
  void (*expand)(const SegmentedExpand&);
};

namespace cuda {  // segmented.cu
void run(const SegmentedShrink&);
void run(const SegmentedExpand&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(SegmentedKernels, segmented_kernels)
