// Low-rank updates of many adapters in one batch, on NVIDIA GPUs. Rows stay where they are; nothing
// is padded to another adapter's rows, and nothing of begins or order is needed on the host.
//
// clang-format off
//   kernel                    reads + writes                               bound by
//   segmented_shrink_kernel   x; a factor for 32 rows (float32: 16)        memory
//   segmented_few_kernel      x a time for 8 ranks; a factor for 2 rows    the factors: memory
//   segmented_outer_kernel    x a time for 8 ranks; outer                  memory; latency where one adapter has all rows
//   segmented_expand_kernel   y twice; a factor for 32 rows, or for 8      memory
//   segmented_any_kernel      the same, a factor for 8 rows                odd shapes, float64
//
// Tiles: a block has rows of one adapter. The adapters' begins are all that it needs to find them: rows of an adapter
// begin at tile begins/rows + adapter, which leaves room for its last, partial tile; tiles without rows end at once.
// Where there are more adapters than rows, a block stands for a row and ends unless a tile begins there. Either way
// there are at most twice as many blocks as rows or adapters ask for.
// Shrink, few rows: all threads of a block share the columns of 8 ranks, so that one row reads its factor at full
// width. Outer: a block owns 256 columns and 8 ranks of an adapter, its warps take turns at the rows.
// The rest is as in lora.cu, whose tiles (lora_tiles.cuh) these are, on rows of any order.
//
// clang-format on
// Sums are float32, in an order that depends on the shape and on the adapter's rows alone; float64
// where x is. No workspace: whoever writes a sum owns all of its terms.
#include "ops/lora_tiles.cuh"
#include "ops/segmented.h"

namespace finefuse::cuda {
namespace {

// Rows an adapter, on average, from which on tiles of many rows are taken (not measured yet).
constexpr int64_t kManyRows = 16;

// ---- tiles of rows -----------------------------------------------------------------------------

// Segments: -1, the rows without an adapter; the adapters'; `adapters`, rows whose adapter is not
// there.
__device__ __forceinline__ int64_t begin_of(const Segments& s, int64_t tokens, int64_t segment) {
  if (segment < 0) return 0;
  return segment > s.adapters ? tokens : s.begins[segment];
}

struct Tiles {
  Segments segments;
  int64_t tokens, count;
  int rows;   // of a tile, at most
  bool each;  // a tile for each row, of which those count that begin one
};

Tiles tiles_of(const Segments& s, int64_t tokens, int rows) {
  const int64_t some = tokens / rows + s.adapters + 2;
  return {s, tokens, tokens < some ? tokens : some, rows, tokens < some};
}

struct Tile {
  int64_t adapter, first;  // its segment, and where its rows begin in order
  int count;               // 0: nothing to do
};

// The last segment that begins at the tile or before, searched for by the whole block.
__device__ __forceinline__ Tile tile_of(const Tiles& a, int64_t tile) {
  __shared__ int64_t found;
  const auto first_tile = [&](int64_t segment) {
    const int64_t begin = begin_of(a.segments, a.tokens, segment);
    return a.each ? begin : begin / a.rows + segment + 1;
  };
  const int64_t end = a.segments.adapters + 1;
  int64_t low = -1, high = end;
  while (high - low > 1) {
    const int64_t step = ceil_div(high - low, kThreads);
    const int64_t segment = low + threadIdx.x * step;
    const int64_t next = segment + step < high ? segment + step : high;
    if (segment < high && first_tile(segment) <= tile && (next == end || first_tile(next) > tile)) {
      found = segment;
    }
    __syncthreads();
    low = found;
    high = low + step < high ? low + step : high;
    __syncthreads();
  }
  const int64_t begin = begin_of(a.segments, a.tokens, low);
  const int64_t past = (tile - first_tile(low)) * (a.each ? 1 : a.rows);
  const int64_t left = begin_of(a.segments, a.tokens, low + 1) - begin - past;
  const bool there = left > 0 && (!a.each || past % a.rows == 0);
  return {low, begin + past, !there ? 0 : left < a.rows ? static_cast<int>(left) : a.rows};
}

__device__ __forceinline__ bool has_adapter(const Tiles& a, const Tile& tile) {
  return tile.adapter >= 0 && tile.adapter < a.segments.adapters;
}

// The rows of a tile, for all threads.
template <int kRows>
__device__ __forceinline__ void rows_of(const Tiles& a, const Tile& tile, int64_t (&rows)[kRows]) {
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    rows[i] = a.segments.order[tile.first + i];
  }
  __syncthreads();
}

__device__ __forceinline__ Factor factor_of(const Factors& f, int64_t adapter) {
  Factor own = f.first;
  const int64_t bytes = own.dtype == DType::f64 ? 8 : own.dtype == DType::f32 ? 4 : 2;
  own.data = static_cast<const char*>(own.data) + adapter * f.adapter_stride * bytes;
  return own;
}

__device__ __forceinline__ double scale_of(const Reals& scale, int64_t adapter) {
  return scale ? scale[adapter] : 1.0;
}

// Rows of the warp among those of a tile.
__device__ __forceinline__ int warp_rows(const Tile& tile, int first, int most) {
  return tile.count - first < most ? tile.count - first : most;
}

// ---- shrink ------------------------------------------------------------------------------------

struct ShrinkCall : SegmentedShrink {
  Tiles tiles;
  bool vectors, factor_vectors;  // rows of x, of the factors begin at multiples of 16 bytes
};

template <class A>
__device__ __forceinline__ void zero_rows(const SegmentedShrink& a, const int64_t* rows, int count,
                                          int64_t first_rank, int64_t ranks) {
  const int64_t left = a.rank - first_rank, each = left < ranks ? left : ranks;
  for (int64_t i = threadIdx.x; i < count * each; i += kThreads) {
    static_cast<A*>(a.h.data)[rows[i / each] * a.rank + first_rank + i % each] = A{0};
  }
}

// Rows of x begin at multiples of 16 bytes.
template <class T, int kRanks, bool kDrops>
__global__ void __launch_bounds__(kThreads, 1) segmented_shrink_kernel(const ShrinkCall a) {
  constexpr int kTokens = kShrinkTokens<T>;
  __shared__ int64_t rows[kWarps * kTokens];
  const int64_t groups = ceil_div(a.rank, kRanks), first_rank = blockIdx.x % groups * kRanks;
  const Tile tile = tile_of(a.tiles, blockIdx.x / groups);
  rows_of(a.tiles, tile, rows);
  if (tile.count == 0) return;
  if (!has_adapter(a.tiles, tile)) return zero_rows<float>(a, rows, tile.count, first_rank, kRanks);
  const LoraShrink own{a.x,      a.dtype,
                       a.tokens, a.columns,
                       a.rank,   factor_of(a.factor, tile.adapter),
                       a.h,      scale_of(a.h_scale, tile.adapter),
                       {},       {},
                       1.0,      a.dropout,
                       nullptr,  {}};
  const int first = static_cast<int>(threadIdx.x / 32) * kTokens;
  shrink_rows<T, kRanks, kDrops>(own, first_rank, warp_rows(tile, first, kTokens),
                                 [&](int t) { return rows[first + t]; });
}

constexpr int kFewRows = 2, kFewRanks = 8;

// Sums over the warp of 2·N sums, which leave in each lane that of its number modulo 2·N.
template <int N, class A> __device__ __forceinline__ A lane_sums(const A* sum) {
  if constexpr (N == 0) {
    return sum[0];
  } else {
    const bool upper = (threadIdx.x & N) != 0;
    A half[N];
    FF_UNROLL for (int i = 0; i < N; ++i) {
      const A other = __shfl_xor_sync(0xffffffffu, upper ? sum[i] : sum[i + N], N);
      half[i] = (upper ? sum[i + N] : sum[i]) + other;
    }
    return lane_sums<N / 2>(half);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) segmented_few_kernel(const ShrinkCall a) {
  using A = Accumulator<T>;
  constexpr int kBatch = 4;  // ranks whose loads overlap
  constexpr int kSums = kFewRows * kFewRanks;
  __shared__ int64_t rows[kFewRows];
  __shared__ A partial[kWarps][kSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t groups = ceil_div(a.rank, kFewRanks), first_rank = blockIdx.x % groups * kFewRanks;
  const Tile tile = tile_of(a.tiles, blockIdx.x / groups);
  rows_of(a.tiles, tile, rows);
  if (tile.count == 0) return;
  if (!has_adapter(a.tiles, tile)) return zero_rows<A>(a, rows, tile.count, first_rank, kFewRanks);
  Factor factor = factor_of(a.factor, tile.adapter);
  A sum[kSums] = {};
  with_dtype<true>(factor.dtype, [&]<class F>(F) {
#pragma unroll 1
    for (int64_t c = threadIdx.x * kLane; c < a.columns; c += kThreads * kLane) {
      forget(factor.rank_stride);
      forget(factor.column_stride);
      const int64_t left = a.columns - c;
      A v[kFewRows][kLane];
      FF_UNROLL for (int t = 0; t < kFewRows; ++t) {
        const int64_t at = t < tile.count ? rows[t] * a.columns + c : 0;
        load_eight(static_cast<const T*>(a.x) + at, 1, t < tile.count ? left : 0, a.vectors, v[t]);
        if (t < tile.count) drop_eight(a.dropout, at, v[t]);
      }
      FF_UNROLL for (int j = 0; j < kFewRanks; j += kBatch) {
        A w[kBatch][kLane];
        FF_UNROLL for (int i = 0; i < kBatch; ++i) {
          const int64_t r = first_rank + j + i;
          load_eight(static_cast<const F*>(factor.data) + r * factor.rank_stride +
                         c * factor.column_stride,
                     factor.column_stride, r < a.rank ? left : 0, a.factor_vectors, w[i]);
        }
        FF_UNROLL for (int t = 0; t < kFewRows; ++t) {
          if (t >= tile.count) break;
          FF_UNROLL for (int i = 0; i < kBatch; ++i) {
            FF_UNROLL for (int k = 0; k < kLane; ++k) {
              sum[t * kFewRanks + j + i] += v[t][k] * w[i][k];
            }
          }
        }
      }
    }
  });
  const A own = lane_sum(lane_sums<kSums / 2>(sum), kSums);
  if (lane < kSums) partial[warp][lane] = own;
  __syncthreads();
  const int t = threadIdx.x / kFewRanks;
  const int64_t r = first_rank + threadIdx.x % kFewRanks;
  if (t >= tile.count || r >= a.rank) return;
  A total = 0;
  for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
  static_cast<A*>(a.h.data)[rows[t] * a.rank + r] =
      static_cast<A>(scale_of(a.h_scale, tile.adapter)) * total;
}

// ---- outer -------------------------------------------------------------------------------------

constexpr int kOuterRanks = 8, kOuterRound = 2;  // of a block, of a round of its last sum
constexpr int kLaneRow = 36;                     // 32 lanes, in other banks than the next column's

// A block an adapter, kSpan columns and kOuterRanks ranks: zeros where it has no rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) segmented_outer_kernel(const ShrinkCall a) {
  using A = Accumulator<T>;
  __shared__ A partial[kWarps][kOuterRound][kLane * kLaneRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t groups = ceil_div(a.rank, kOuterRanks), spans = ceil_div(a.columns, kSpan);
  const int64_t first_rank = blockIdx.x % groups * kOuterRanks;
  const int64_t span = blockIdx.x / groups % spans * kSpan;
  const int64_t adapter = blockIdx.x / groups / spans, c = span + lane * kLane;
  const int64_t left = a.columns - c;
  const int ranks =
      a.rank - first_rank < kOuterRanks ? static_cast<int>(a.rank - first_rank) : kOuterRanks;
  const int64_t begin = a.segments.begins[adapter], end = a.segments.begins[adapter + 1];
  A sum[kOuterRanks][kLane] = {};
#pragma unroll 1
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    const int64_t row = a.segments.order[i], at = row * a.columns + c;
    A v[kLane];
    load_eight(static_cast<const T*>(a.x) + at, 1, left, a.vectors, v);
    if (left > 0) drop_eight(a.dropout, at, v);
    const A* g = static_cast<const A*>(a.g.data) + row * a.rank + first_rank;
    FF_UNROLL for (int j = 0; j < kOuterRanks; ++j) {
      const A w = j < ranks ? g[j] : A{0};
      FF_UNROLL for (int k = 0; k < kLane; ++k) sum[j][k] += w * v[k];
    }
  }
  const A scale = static_cast<A>(scale_of(a.outer_scale, adapter));
  const int warps = end - begin < kWarps ? static_cast<int>(end - begin) : kWarps;
  const int64_t column = span + threadIdx.x;
  const int slot = threadIdx.x % kLane * kLaneRow + threadIdx.x / kLane;
  FF_UNROLL for (int first = 0; first < kOuterRanks; first += kOuterRound) {
    FF_UNROLL for (int j = 0; j < kOuterRound; ++j) {
      FF_UNROLL for (int k = 0; k < kLane; ++k) {
        partial[warp][j][k * kLaneRow + lane] = sum[first + j][k];
      }
    }
    __syncthreads();
    for (int j = 0; j < kOuterRound && first + j < ranks && column < a.columns; ++j) {
      A total = 0;
      for (int w = 0; w < warps; ++w) total += partial[w][j][slot];
      const int64_t r = first_rank + first + j;
      const int64_t at = a.turned ? column * a.rank + r : r * a.columns + column;
      static_cast<A*>(a.outer.data)[adapter * a.rank * a.columns + at] = scale * total;
    }
    __syncthreads();
  }
}
static_assert(kThreads == kSpan);

// ---- expand ------------------------------------------------------------------------------------

struct SegmentedExpandCall : SegmentedExpand {
  Tiles tiles;
  bool vectors;  // rows of h begin at multiples of 16 bytes
};

// NaN, for rows whose adapter is not there: kSpan columns from `begin` on.
template <class T>
__device__ __forceinline__ void spoil_rows(const SegmentedExpand& a, const int64_t* rows, int count,
                                           int64_t begin) {
  raise(a.place, Flag::adapter);
  const int64_t c = begin + threadIdx.x;
  for (int i = 0; i < count && c < a.columns; ++i) {
    store_value(static_cast<T*>(a.y) + rows[i] * a.columns + c, Accumulator<T>{NAN});
  }
}

// Rows of y begin at multiples of 16 bytes.
template <class T, int kTokens, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2)
    segmented_expand_kernel(const SegmentedExpandCall a) {
  __shared__ int64_t rows[kWarps * kTokens];
  const int64_t groups = ceil_div(a.columns, kSpan), begin = blockIdx.x % groups * kSpan;
  const Tile tile = tile_of(a.tiles, blockIdx.x / groups);
  if (tile.count == 0 || tile.adapter < 0) return;
  rows_of(a.tiles, tile, rows);
  if (!has_adapter(a.tiles, tile)) return spoil_rows<T>(a, rows, tile.count, begin);
  const ExpandCall own{{a.h,
                        a.tokens,
                        a.columns,
                        a.rank,
                        factor_of(a.factor, tile.adapter),
                        scale_of(a.scale, tile.adapter),
                        nullptr,
                        true,
                        a.y,
                        a.dtype,
                        a.dropout,
                        nullptr,
                        {}},
                       a.vectors};
  const int first = static_cast<int>(threadIdx.x / 32) * kTokens;
  expand_rows<T, kTokens, kDrops>(own, begin, warp_rows(tile, first, kTokens),
                                  [&](int t) { return rows[first + t]; });
}

// Anything else: a thread a column.
template <class T>
__global__ void __launch_bounds__(kThreads) segmented_any_kernel(const SegmentedExpandCall a) {
  using A = Accumulator<T>;
  __shared__ int64_t rows[kWarps];
  const int64_t groups = ceil_div(a.columns, kSpan), begin = blockIdx.x % groups * kSpan;
  const Tile tile = tile_of(a.tiles, blockIdx.x / groups);
  if (tile.count == 0 || tile.adapter < 0) return;
  rows_of(a.tiles, tile, rows);
  if (!has_adapter(a.tiles, tile)) return spoil_rows<T>(a, rows, tile.count, begin);
  const Factor factor = factor_of(a.factor, tile.adapter);
  const A scale = static_cast<A>(scale_of(a.scale, tile.adapter));
  const int64_t c = begin + threadIdx.x;
  if (c >= a.columns) return;
  with_dtype<true>(factor.dtype, [&]<class F>(F) {
    const F* p = static_cast<const F*>(factor.data) + c * factor.column_stride;
    A sum[kWarps] = {};
    for (int64_t r = 0; r < a.rank; ++r) {
      const A w = static_cast<A>(to_accumulator(p[r * factor.rank_stride]));
      FF_UNROLL for (int t = 0; t < kWarps; ++t) {
        if (t < tile.count) sum[t] += static_cast<const A*>(a.h.data)[rows[t] * a.rank + r] * w;
      }
    }
    FF_UNROLL for (int t = 0; t < kWarps; ++t) {
      if (t >= tile.count) break;
      const int64_t i = rows[t] * a.columns + c;
      T* y = static_cast<T*>(a.y) + i;
      const A update = scale * sum[t] * keep_one<A>(a.dropout, i);
      store_value(y, update + to_accumulator(*y));
    }
  });
}

// ---- launches ----------------------------------------------------------------------------------

// Every factor's rows begin at multiples of 16 bytes, and hold whole lanes.
bool has_vector_factors(const Factors& f, int64_t rank, int64_t adapters) {
  return f.first.column_stride == 1 && is_aligned(f.first.data) &&
         (rank == 1 || f.first.rank_stride % kLane == 0) &&
         (adapters == 1 || f.adapter_stride % kLane == 0);
}

template <class T, int kRanks> void shrink_tiles(ShrinkCall a) {
  a.tiles = tiles_of(a.segments, a.tokens, kWarps * kShrinkTokens<T>);
  launch(a.dropout.seed != nullptr ? segmented_shrink_kernel<T, kRanks, true>
                                   : segmented_shrink_kernel<T, kRanks, false>,
         a.tiles.count * ceil_div(a.rank, kRanks), kThreads, 0, a);
}

template <class T> void shrink(const SegmentedShrink& args) {
  ShrinkCall a{args,
               {},
               args.columns % kLane == 0 && is_aligned(args.x),
               has_vector_factors(args.factor, args.rank, args.segments.adapters)};
  if (a.outer) {
    launch(segmented_outer_kernel<T>,
           a.segments.adapters * ceil_div(a.columns, kSpan) * ceil_div(a.rank, kOuterRanks),
           kThreads, 0, a);
  }
  if (!a.h) return;
  if constexpr (!std::is_same_v<T, double>) {
    if (a.tokens >= kManyRows * a.segments.adapters && a.tokens > kFewRows * kWarps &&
        has_vector_rows<T>(a.x, a.columns) && a.factor.first.dtype != DType::f64) {
      return a.rank <= 8 ? shrink_tiles<T, 8>(a) : shrink_tiles<T, 16>(a);
    }
  }
  a.tiles = tiles_of(a.segments, a.tokens, kFewRows);
  launch(segmented_few_kernel<T>, a.tiles.count * ceil_div(a.rank, kFewRanks), kThreads, 0, a);
}

template <class T, int kTokens> void expand_tiles(SegmentedExpandCall a) {
  a.tiles = tiles_of(a.segments, a.tokens, kWarps * kTokens);
  launch(a.dropout.seed != nullptr ? segmented_expand_kernel<T, kTokens, true>
                                   : segmented_expand_kernel<T, kTokens, false>,
         a.tiles.count * ceil_div(a.columns, kSpan), kThreads, 0, a);
}

template <class T> void expand(const SegmentedExpand& args) {
  SegmentedExpandCall a{args, {}, is_aligned(args.h.data) && args.rank % 4 == 0};
  if constexpr (!std::is_same_v<T, double>) {
    if (has_vector_rows<T>(a.y, a.columns) && a.factor.first.dtype != DType::f64) {
      const bool many = a.tokens >= kManyRows * a.segments.adapters && a.tokens > 4 * kWarps;
      return many ? expand_tiles<T, 4>(a) : expand_tiles<T, 1>(a);
    }
  }
  a.tiles = tiles_of(a.segments, a.tokens, kWarps);
  launch(segmented_any_kernel<T>, a.tiles.count * ceil_div(a.columns, kSpan), kThreads, 0, a);
}

}  // namespace

void run(const SegmentedShrink& a) {
  by_dtype(a.dtype, [&]<class T>(T) { shrink<T>(a); });
}

void run(const SegmentedExpand& a) {
  by_dtype(a.dtype, [&]<class T>(T) { expand<T>(a); });
}

}  // namespace finefuse::cuda
