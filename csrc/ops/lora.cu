// Low-rank updates on NVIDIA GPUs: skinny products whose long side is read once. x, y of 16 bits:
//
// clang-format off
//   kernel              reads + writes               multiply-adds           bound by
//   shrink_kernel       x; the factor from L2        tokens·columns·rank     memory to rank 8, issue from 16 on
//   outer_kernel        x a time for 8 ranks         tokens·columns·rank     the same; x comes from L2 after the first
//   expand_kernel       y, twice if it accumulates   tokens·columns·rank     the same
//   lora_linear_kernel  W; x, A and B from L2        tokens·rows·columns     memory
//   dropout_kernel      x, y; y before               Philox                  memory
//   *_any_kernel        x, the factor a time a token                         few tokens: latency; odd shapes
//
// Plain FMA, no tensor cores: at rank 16 the multiply-adds of a pass take about as long as its bytes.
//
// Shrink: a block owns tokens over all columns. Its warps walk spans of 256 columns, 8 of them a lane, of the same
// staged rows of the factor; a lane has 64 sums (tokens × ranks), added over the warp at the end.
// Outer: a block owns 32 columns and 8 ranks over all tokens: 4 lanes a row of x, 64 rows at a time.
// Group: the blocks of all members that read the same part of x are adjacent in one launch, as those of more ranks
// of one member are; it comes from memory once.
// Expand: a block owns 64 tokens (8 if there are few) and 256 columns; sums stay in registers over all ranks.
// Linear: a block owns 32 rows of W and computes all of h again, for itself: one launch, and A stays in L2.
//
// clang-format on
// Sums are float32, in an order that depends on the shape alone; float64 where x is. No workspace:
// whoever writes a sum owns all of its terms.
#include "ops/lora_tiles.cuh"

namespace finefuse::cuda {
namespace {

constexpr int64_t kTileTokens = 1024;   // fewer: a block a token (not measured yet)
constexpr int64_t kExpandTokens = 256;  // fewer: a warp a token (not measured yet)
constexpr int kAnyRanks = 8;

// ---- shrink ------------------------------------------------------------------------------------

// The shrinks of one x. Blocks of all members for the same part of x are adjacent, so that it comes
// from memory once and then from L2.
struct ShrinkCall : LoraShrinkGroup {
  int64_t groups;              // blocks of a part of x: `ends` of the last member
  int64_t ends[kLoraMembers];  // where the blocks of each member end among them
  bool vectors[kLoraMembers];  // rows of g begin at multiples of 16 bytes
  Place place;
};

// The member that this block works for, and which of its blocks it is.
struct Turn {
  int member;
  int64_t group, part;
};
__device__ __forceinline__ Turn turn_of(const ShrinkCall& a) {
  const int64_t at = blockIdx.x % a.groups;
  int member = 0;
  int64_t before = 0;
  while (at >= a.ends[member]) before = a.ends[member++];
  return {member, at - before, blockIdx.x / a.groups};
}

template <class T, int kRanks, bool kDrops>
__global__ void __launch_bounds__(kThreads, kDrops ? 1 : 2)
    shrink_kernel(const __grid_constant__ ShrinkCall call) {
  constexpr int kTokens = kShrinkTokens<T>;
  const Turn turn = turn_of(call);
  const LoraShrink& a = call.members[turn.member];
  const int64_t token = (turn.part * kWarps + threadIdx.x / 32) * kTokens;
  const int left = a.tokens - token < kTokens ? static_cast<int>(a.tokens - token) : kTokens;
  shrink_rows<T, kRanks, kDrops>(a, turn.group * kRanks, left, [=](int t) { return token + t; });
}

// Anything else: a block a token and 8 ranks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    shrink_any_kernel(const __grid_constant__ ShrinkCall call) {
  using A = Accumulator<T>;
  __shared__ A partial[kAnyRanks][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Turn turn = turn_of(call);
  const LoraShrink& a = call.members[turn.member];
  const int64_t first = turn.part * a.columns, first_rank = turn.group * kAnyRanks;
  const T* x = static_cast<const T*>(a.x) + first;
  A sum[kAnyRanks] = {};
  with_dtype<true>(a.factor.dtype, [&]<class F>(F) {
    const F* p = static_cast<const F*>(a.factor.data);
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      const A v = to_accumulator(x[c]) * keep_one<A>(a.dropout, first + c);
      FF_UNROLL for (int j = 0; j < kAnyRanks; ++j) {
        const int64_t r = first_rank + j < a.rank ? first_rank + j : first_rank;
        sum[j] += v * static_cast<A>(
                          to_accumulator(p[r * a.factor.rank_stride + c * a.factor.column_stride]));
      }
    }
  });
  FF_UNROLL for (int j = 0; j < kAnyRanks; ++j) {
    const A total = lane_sum(sum[j]);
    if (lane == 0) partial[j][warp] = total;
  }
  __syncthreads();
  const int64_t r = first_rank + threadIdx.x;
  if (threadIdx.x >= kAnyRanks || r >= a.rank) return;
  A total = 0;
  for (int w = 0; w < kWarps; ++w) total += partial[threadIdx.x][w];
  static_cast<A*>(a.h.data)[turn.part * a.rank + r] = static_cast<A>(a.h_scale) * total;
}

// ---- outer -------------------------------------------------------------------------------------

constexpr int kOuterRanks = 8, kOuterColumns = 32;

// Rows of x begin at multiples of 16 bytes.
template <class T, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2)
    outer_kernel(const __grid_constant__ ShrinkCall call) {
  constexpr int N = Vector<T>::kSize, U = kDrops ? 1 : 2, kLanes = kOuterColumns / kLane,
                kStep = kThreads / 4;
  static_assert(kLanes == 4 && kOuterRanks * kOuterColumns == kThreads);
  __shared__ float partial[kWarps][kOuterRanks][kOuterColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % kLanes * kLane;
  const Turn turn = turn_of(call);
  const LoraShrink& a = call.members[turn.member];
  const bool vectors = call.vectors[turn.member], drops = kDrops && a.dropout.seed != nullptr;
  const int64_t first_rank = turn.group * kOuterRanks;
  const int64_t first = turn.part * kOuterColumns, column = first + at;
  const T* x = static_cast<const T*>(a.x);
  const float* g = static_cast<const float*>(a.g.data);
  float sum[kOuterRanks][kLane] = {};
  for (int64_t token = threadIdx.x / kLanes; token < a.tokens; token += U * kStep) {
    Vector<T> v[U][kLane / N];
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t t = token + u * kStep;
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        const int64_t c = column + i * N;
        v[u][i] =
            t < a.tokens && c < a.columns ? load<Access::keep>(x + t * a.columns + c) : Vector<T>{};
      }
    }
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t t = token + u * kStep;
      if (t >= a.tokens) break;
      float value[kLane];
      FF_UNROLL for (int k = 0; k < kLane; ++k) value[k] = to_accumulator(v[u][k / N].x[k % N]);
      if (drops) drop_eight(a.dropout, t * a.columns + column, value);
      FF_UNROLL for (int quad = 0; quad < kOuterRanks; quad += 4) {
        const int64_t r = first_rank + quad;
        const Vector<float> w = load_quad(g + t * a.rank + r, a.rank - r, vectors);
        FF_UNROLL for (int j = 0; j < 4; ++j) {
          FF_UNROLL for (int k = 0; k < kLane; ++k) {
            sum[quad + j][k] = fmaf(w.x[j], value[k], sum[quad + j][k]);
          }
        }
      }
    }
  }
  FF_UNROLL for (int j = 0; j < kOuterRanks; ++j) {
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      const float total = lane_sum(sum[j][k], kLanes);
      if (lane < kLanes) partial[warp][j][at + k] = total;
    }
  }
  __syncthreads();
  const int64_t j = threadIdx.x / kOuterColumns, c = threadIdx.x % kOuterColumns;
  if (first_rank + j >= a.rank || first + c >= a.columns) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += partial[w][j][c];
  static_cast<float*>(a.outer.data)[(first_rank + j) * a.columns + first + c] =
      static_cast<float>(a.outer_scale) * total;
}

// Anything else: a lane a column, tokens split over the warps.
template <class T>
__global__ void __launch_bounds__(kThreads)
    outer_any_kernel(const __grid_constant__ ShrinkCall call) {
  using A = Accumulator<T>;
  __shared__ A partial[kWarps][kOuterRanks][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Turn turn = turn_of(call);
  const LoraShrink& a = call.members[turn.member];
  const int64_t first_rank = turn.group * kOuterRanks, column = turn.part * 32 + lane;
  const A* g = static_cast<const A*>(a.g.data);
  A sum[kOuterRanks] = {};
  for (int64_t t = warp; t < a.tokens && column < a.columns; t += kWarps) {
    const int64_t i = t * a.columns + column;
    const A v = to_accumulator(static_cast<const T*>(a.x)[i]) * keep_one<A>(a.dropout, i);
    FF_UNROLL for (int j = 0; j < kOuterRanks; ++j) {
      const int64_t r = first_rank + j < a.rank ? first_rank + j : first_rank;
      sum[j] += v * g[t * a.rank + r];
    }
  }
  FF_UNROLL for (int j = 0; j < kOuterRanks; ++j) partial[warp][j][lane] = sum[j];
  __syncthreads();
  const int64_t r = first_rank + warp;  // a warp a rank
  if (r >= a.rank || column >= a.columns) return;
  A total = 0;
  for (int w = 0; w < kWarps; ++w) total += partial[w][warp][lane];
  static_cast<A*>(a.outer.data)[r * a.columns + column] = static_cast<A>(a.outer_scale) * total;
}
static_assert(kWarps == kOuterRanks);

// ---- expand ------------------------------------------------------------------------------------

template <class T, int kTokens, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(const ExpandCall a) {
  const int64_t groups = ceil_div(a.columns, kSpan), begin = blockIdx.x % groups * kSpan;
  const int64_t token = (blockIdx.x / groups * kWarps + threadIdx.x / 32) * kTokens;
  const int left = a.tokens - token < kTokens ? static_cast<int>(a.tokens - token) : kTokens;
  expand_rows<T, kTokens, kDrops>(a, begin, left, [=](int t) { return token + t; });
}

// Anything else: a thread an element.
template <class T>
__global__ void __launch_bounds__(kThreads) expand_any_kernel(const LoraExpand a) {
  using A = Accumulator<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.tokens * a.columns) return;
  const int64_t token = i / a.columns, column = i % a.columns;
  const A* h = static_cast<const A*>(a.h.data) + token * a.rank;
  A sum = 0;
  with_dtype<true>(a.factor.dtype, [&]<class F>(F) {
    const F* p = static_cast<const F*>(a.factor.data) + column * a.factor.column_stride;
    for (int64_t j = 0; j < a.rank; ++j) {
      sum += h[j] * static_cast<A>(to_accumulator(p[j * a.factor.rank_stride]));
    }
  });
  T* y = static_cast<T*>(a.y) + i;
  A value = sum * static_cast<A>(a.scale) * keep_one<A>(a.dropout, i);
  if (a.bias != nullptr) value += to_accumulator(static_cast<const T*>(a.bias)[column]);
  if (a.accumulate) value += to_accumulator(*y);
  store_value(y, value);
}

// ---- a few tokens ------------------------------------------------------------------------------

// Of a block: 32 rows. Many tokens give a warp more sums instead of more warps to a block: they
// wait for arithmetic rather than for memory.
constexpr int kLinearBlock = 32;
template <class T, int kTokens> constexpr int kLinearRows = kTokens * sizeof(T) < 16 ? 2 : 4;
template <class T, int kTokens>
constexpr int kLinearThreads = kLinearBlock / kLinearRows<T, kTokens> * 32;

struct LinearCall : LoraLinear {
  bool weight_vectors, factor_vectors;  // rows of x and of the other begin at multiples of 16 bytes
};

// Rows of w (rows, columns) times rows of x (tokens, columns), added over the warp. What is not
// there gives the sums of row 0 or of the last token.
template <int R, int kTokens, class T, class F>
__device__ __forceinline__ void dots(const T* x, int64_t tokens, int64_t columns, const F* w,
                                     int64_t rows, int64_t row_stride, int64_t column_stride,
                                     bool vectors, float (&sum)[R][kTokens]) {
  constexpr int N = Vector<T>::kSize, M = Vector<F>::kSize;
  constexpr int U = R == 2 ? 2 : 1;
  const int64_t lane = threadIdx.x % 32;
  FF_UNROLL for (int r = 0; r < R; ++r) {
    FF_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = 0.0f;
  }
  if (vectors) {
    for (int64_t begin = lane * kLane; begin < columns; begin += U * kSpan) {
      Vector<F> v[U][R][kLane / M];
      FF_UNROLL for (int u = 0; u < U; ++u) {
        const int64_t c = begin + u * kSpan;
        FF_UNROLL for (int r = 0; r < R; ++r) {
          FF_UNROLL for (int i = 0; i < kLane / M; ++i) {
            const F* p = w + (r < rows ? r : 0) * row_stride + c + i * M;
            v[u][r][i] = c < columns ? load<Access::keep>(p) : Vector<F>{};
          }
        }
      }
      FF_UNROLL for (int u = 0; u < U; ++u) {
        const int64_t c = begin + u * kSpan;
        if (c >= columns) break;
        const T* p = x + c;
        FF_UNROLL for (int t = 0; t < kTokens; ++t, p += t < tokens ? columns : 0) {
          FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
            const Vector<T> a = load<Access::keep>(p + i * N);
            FF_UNROLL for (int k = 0; k < N; ++k) {
              const int at = i * N + k;
              FF_UNROLL for (int r = 0; r < R; ++r) {
                sum[r][t] = fmaf(to_accumulator(v[u][r][at / M].x[at % M]), to_accumulator(a.x[k]),
                                 sum[r][t]);
              }
            }
          }
        }
      }
    }
  } else {
    for (int64_t c = lane; c < columns; c += 32) {
      FF_UNROLL for (int r = 0; r < R; ++r) {
        const float v = to_accumulator(w[(r < rows ? r : 0) * row_stride + c * column_stride]);
        const T* p = x + c;
        FF_UNROLL for (int t = 0; t < kTokens; ++t, p += t < tokens ? columns : 0) {
          sum[r][t] = fmaf(v, to_accumulator(*p), sum[r][t]);
        }
      }
    }
  }
  FF_UNROLL for (int r = 0; r < R; ++r) {
    FF_UNROLL for (int t = 0; t < kTokens; ++t) sum[r][t] = lane_sum(sum[r][t]);
  }
}

// Sum l of a lane l, in the order of h: rows fastest.
template <int R, int kTokens>
__device__ __forceinline__ float own(const float (&sum)[R][kTokens], int lane) {
  float value = 0.0f;
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    FF_UNROLL for (int r = 0; r < R; ++r) {
      if (lane == t * R + r) value = sum[r][t];
    }
  }
  return value;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kLinearThreads<T, kTokens>, 1)
    lora_linear_kernel(const LinearCall a) {
  constexpr int R = kLinearRows<T, kTokens>;
  float* h = reinterpret_cast<float*>(dynamic_shared());  // (kTokens, rank)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_token = lane / R, own_row = lane % R;
  const int64_t blocks = ceil_div(a.rows, kLinearBlock), block = blockIdx.x % blocks;
  const int64_t row = block * kLinearBlock + warp * R, token = blockIdx.x / blocks * kTokens;
  const int64_t tokens = a.tokens - token < kTokens ? a.tokens - token : kTokens;
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  float sum[R][kTokens] = {};
  with_dtype<false>(a.lora_a.dtype, [&]<class F>(F) {
    const Factor& f = a.lora_a;
    for (int64_t j = warp * R; j < a.rank; j += kLinearBlock) {
      dots<R, kTokens>(x, tokens, a.columns, static_cast<const F*>(f.data) + j * f.rank_stride,
                       a.rank - j, f.rank_stride, f.column_stride, a.factor_vectors, sum);
      const float value = own(sum, lane);
      if (own_token < tokens && j + own_row < a.rank) {
        h[own_token * a.rank + j + own_row] = value;
        if (block == 0) {
          static_cast<float*>(a.h.data)[(token + own_token) * a.rank + j + own_row] = value;
        }
      }
    }
  });
  if (row < a.rows) {
    dots<R, kTokens>(x, tokens, a.columns, static_cast<const T*>(a.weight) + row * a.columns,
                     a.rows - row, a.columns, 1, a.weight_vectors, sum);
  }
  const float base = own(sum, lane);
  __syncthreads();
  if (own_token >= tokens || row + own_row >= a.rows) return;
  float update = 0.0f;
  with_dtype<false>(a.lora_b.dtype, [&]<class F>(F) {
    const Factor& f = a.lora_b;
    const F* p = static_cast<const F*>(f.data) + (row + own_row) * f.column_stride;
    for (int64_t j = 0; j < a.rank; ++j) {
      update = fmaf(h[own_token * a.rank + j], to_accumulator(p[j * f.rank_stride]), update);
    }
  });
  float y = fmaf(static_cast<float>(a.scale), update, base);
  if (a.bias != nullptr) y += to_accumulator(static_cast<const T*>(a.bias)[row + own_row]);
  store_value(static_cast<T*>(a.y) + (token + own_token) * a.rows + row + own_row, y);
}

// ---- dropout -----------------------------------------------------------------------------------

struct DropoutCall : LoraDropout {
  bool vectors;  // x and y are aligned to 16 bytes
};

// Eight elements a thread.
template <class T> __global__ void __launch_bounds__(kThreads) dropout_kernel(const DropoutCall a) {
  using A = Accumulator<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kLane;
  const int64_t left = a.count - i;
  if (left <= 0) return;
  A value[kLane];
  load_eight(static_cast<const T*>(a.x) + i, 1, left, a.vectors, value);
  drop_eight(a.dropout, i, value);
  T* y = static_cast<T*>(a.y) + i;
  if (a.accumulate) {
    A before[kLane];
    load_eight(y, 1, left, a.vectors, before);
    FF_UNROLL for (int k = 0; k < kLane; ++k) value[k] += before[k];
  }
  store_eight(y, left, a.vectors, value);
}

// ---- launches ----------------------------------------------------------------------------------

// Of the members for which `takes` holds, a block each for so many ranks.
template <class Takes>
ShrinkCall call_of(const LoraShrinkGroup& group, int64_t ranks, Takes takes) {
  ShrinkCall call{group, 0, {}, {}, group.members[0].place};
  for (int i = 0; i < group.count; ++i) {
    const LoraShrink& a = group.members[i];
    if (takes(a)) call.groups += ceil_div(a.rank, ranks);
    call.ends[i] = call.groups;
    call.vectors[i] = is_aligned(a.g.data) && a.rank % 4 == 0;
  }
  return call;
}

template <class T> void shrink(const LoraShrinkGroup& group) {
  const LoraShrink& first = group.members[0];
  const int64_t tokens = first.tokens, columns = first.columns;
  const auto has_outer = [](const LoraShrink& a) { return static_cast<bool>(a.outer); };
  bool drops = false, vectors = false, tiles = false;
  int64_t rank = 0;
  for (int i = 0; i < group.count; ++i) {
    drops |= group.members[i].dropout.seed != nullptr;
    if (group.members[i].h && group.members[i].rank > rank) rank = group.members[i].rank;
  }
  if constexpr (!std::is_same_v<T, double>) {
    vectors = has_vector_rows<T>(first.x, columns);
    tiles = vectors && tokens >= kTileTokens;
    if (tiles) {
      const int ranks = rank <= 8 ? 8 : 16;
      const ShrinkCall call = call_of(
          group, ranks, [](const LoraShrink& a) { return a.h && a.factor.dtype != DType::f64; });
      const int64_t blocks = ceil_div(tokens, kWarps * kShrinkTokens<T>) * call.groups;
      launch(ranks == 8 ? drops ? shrink_kernel<T, 8, true> : shrink_kernel<T, 8, false>
             : drops    ? shrink_kernel<T, 16, true>
                        : shrink_kernel<T, 16, false>,
             blocks, kThreads, 0, call);
    }
    if (vectors) {
      const ShrinkCall call = call_of(group, kOuterRanks, has_outer);
      launch(drops ? outer_kernel<T, true> : outer_kernel<T, false>,
             ceil_div(columns, kOuterColumns) * call.groups, kThreads, 0, call);
    }
  }
  ShrinkCall call = call_of(group, kAnyRanks, [&](const LoraShrink& a) {
    return a.h && !(tiles && a.factor.dtype != DType::f64);
  });
  launch(shrink_any_kernel<T>, tokens * call.groups, kThreads, 0, call);
  if (vectors) return;
  call = call_of(group, kOuterRanks, has_outer);
  launch(outer_any_kernel<T>, ceil_div(columns, 32) * call.groups, kThreads, 0, call);
}

template <class T, int kTokens> void expand_tiles(const ExpandCall& a) {
  launch(a.dropout.seed != nullptr ? expand_kernel<T, kTokens, true>
                                   : expand_kernel<T, kTokens, false>,
         ceil_div(a.tokens, kWarps * kTokens) * ceil_div(a.columns, kSpan), kThreads, 0, a);
}

template <class T> void expand(const LoraExpand& a) {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_vector_rows<T>(a.y, a.columns) && is_aligned(a.bias) && a.factor.dtype != DType::f64) {
      const ExpandCall call{a, is_aligned(a.h.data) && a.rank % 4 == 0};
      if (a.tokens < kExpandTokens) return expand_tiles<T, 1>(call);
      return expand_tiles<T, 8>(call);
    }
  }
  launch(expand_any_kernel<T>, ceil_div(a.tokens * a.columns, kThreads), kThreads, 0, a);
}

template <class T, int kTokens> void linear_tokens(const LinearCall& a) {
  launch(lora_linear_kernel<T, kTokens>,
         ceil_div(a.rows, kLinearBlock) * ceil_div(a.tokens, kTokens), kLinearThreads<T, kTokens>,
         static_cast<size_t>(a.rank) * kTokens * sizeof(float), a);
}

template <class T> void linear(const LoraLinear& a) {
  const bool x = is_aligned(a.x) && a.columns % kLane == 0;
  const bool factor = a.lora_a.column_stride == 1 && is_aligned(a.lora_a.data) &&
                      (a.lora_a.rank_stride % kLane == 0 || a.rank == 1);
  const LinearCall call{a, x && is_aligned(a.weight), x && factor};
  if (a.tokens == 1) return linear_tokens<T, 1>(call);
  if (a.tokens == 2) return linear_tokens<T, 2>(call);
  if (a.tokens <= 4) return linear_tokens<T, 4>(call);
  linear_tokens<T, 8>(call);
}

}  // namespace

void run(const LoraShrink& a) { run(LoraShrinkGroup{{a}, 1}); }

void run(const LoraShrinkGroup& group) {
  by_dtype(group.members[0].dtype, [&]<class T>(T) { shrink<T>(group); });
}

void run(const LoraExpand& a) {
  by_dtype(a.dtype, [&]<class T>(T) { expand<T>(a); });
}

void run(const LoraDropout& a) {
  by_dtype(a.dtype, [&]<class T>(T) {
    launch(dropout_kernel<T>, ceil_div(a.count, kThreads * kLane), kThreads, 0,
           DropoutCall{a, is_aligned(a.x) && is_aligned(a.y)});
  });
}

void run(const LoraLinear& a) {
  by_dtype(a.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) linear<T>(a);
  });
}

}  // namespace finefuse::cuda
