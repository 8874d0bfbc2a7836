// clang-format off
// Low-rank updates on NVIDIA GPUs: skinny products whose long side is read once. x, y of 16 bits:
//
//   kernel              reads + writes               multiply-adds           bound by
//   shrink_kernel       x; the factor from L2        tokens·columns·rank     memory to rank 8, issue from 16 on
//   outer_kernel        x a time for 8 ranks         tokens·columns·rank     the same; x comes from L2 after the first
//   expand_kernel       y, twice if it accumulates   tokens·columns·rank     the same
//   lora_linear_kernel  W; x, A and B from L2        tokens·rows·columns     memory
//   *_any_kernel        x, the factor a time a token                         few tokens: latency; odd shapes
//
// Plain FMA, no tensor cores: at rank 16 the multiply-adds of a pass take about as long as its bytes.
//
// Shrink: a block owns tokens over all columns. Its warps walk spans of 256 columns, 8 of them a lane, of the same
// staged rows of the factor; a lane has 64 sums (tokens × ranks), added over the warp at the end.
// Outer: a block owns 32 columns and 8 ranks over all tokens: 4 lanes a row of x, 64 rows at a time.
// Expand: a block owns 64 tokens (8 if there are few) and 256 columns; sums stay in registers over all ranks.
// Linear: a block owns 32 rows of W and computes all of h again, for itself: one launch, and A stays in L2.
//
// clang-format on
// Sums are float32, in an order that depends on the shape alone; float64 where x is. No workspace:
// whoever writes a sum owns all of its terms.
#include "core/cuda_utils.cuh"
#include "ops/lora.h"

namespace finefuse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLane = 8;                // columns of a lane
constexpr int kSpan = 32 * kLane;       // columns of a warp
constexpr int kRow = (kSpan + 4) / 4;   // of the staged factor, in vectors: rows in other banks
constexpr int64_t kTileTokens = 1024;   // fewer: a block a token (not measured yet)
constexpr int64_t kExpandTokens = 256;  // fewer: a warp a token (not measured yet)

template <class F> void by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64: return f(double{});
  }
}
// kWide: float64 may come. It does not to the kernels that are to be fast.
template <bool kWide, class F> __device__ __forceinline__ void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64:
      if constexpr (kWide) f(double{});
  }
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class A> __device__ __forceinline__ A lane_sum(A x, int first_mask = 1) {
  for (int mask = first_mask; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// ---- dropout -----------------------------------------------------------------------------------

// The four words of a counter: what elements 4·counter to 4·counter + 3 draw.
__device__ __forceinline__ void philox(uint64_t seed, uint64_t counter, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(counter);
  c[1] = static_cast<uint32_t>(counter >> 32);
  c[2] = c[3] = 0;
  uint32_t low_key = static_cast<uint32_t>(seed), high_key = static_cast<uint32_t>(seed >> 32);
  FF_UNROLL for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xd2511f53u;
    const uint64_t b = static_cast<uint64_t>(c[2]) * 0xcd9e8d57u;
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ low_key;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ high_key;
    c[3] = static_cast<uint32_t>(a);
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
}

// What elements i to i + 3 are multiplied by; i is a multiple of 4.
__device__ __forceinline__ void keep_four(const Dropout& d, int64_t i, float (&keep)[4]) {
  uint32_t word[4];
  philox(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(i) >> 2, word);
  const float scale = static_cast<float>(d.scale);
  FF_UNROLL for (int k = 0; k < 4; ++k) keep[k] = word[k] >= d.threshold ? scale : 0.0f;
}

template <class A> __device__ A keep_one(const Dropout& d, int64_t i) {
  if (d.seed == nullptr) return A{1};
  uint32_t word[4];
  philox(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(i) >> 2, word);
  return word[i & 3] >= d.threshold ? static_cast<A>(d.scale) : A{0};
}

// ---- the factor --------------------------------------------------------------------------------

// A lane's 8 columns of a span are two quads: side by side where a vector of x holds both.
template <class T> __device__ __forceinline__ int64_t quad_column(int quad, int lane) {
  return Vector<T>::kSize == 4 ? quad * 128 + lane * 4 : lane * 8 + quad * 4;
}

template <int kRanks> using Staged = Vector<float>[kRanks][kRow];

// Rows of the factor over a span of columns as float32, 0 outside of it; quad q of lane l at
// [q·32 + l], so that a warp reads 512 bytes in a row.
template <class T, int kRanks>
__device__ __forceinline__ void stage(const Factor& f, int64_t first_rank, int64_t rank,
                                      int64_t first_column, int64_t columns, Staged<kRanks>& to) {
  static_assert(kThreads == kSpan);
  constexpr int kBatch = 4;                  // loads in flight
  const bool turned = f.column_stride != 1;  // then neighbours are ranks
  const int i = threadIdx.x, j = turned ? i % kRanks : 0, c = turned ? i / kRanks : i;
  const int step_j = turned ? 0 : 1, step_c = turned ? kSpan / kRanks : 0;
  const int ranks_left = rank - first_rank < kRanks ? static_cast<int>(rank - first_rank) : kRanks;
  const int columns_left =
      columns - first_column < kSpan ? static_cast<int>(columns - first_column) : kSpan;
  const int64_t step = step_j * f.rank_stride + step_c * f.column_stride;
  with_dtype<false>(f.dtype, [&]<class F>(F) {
    const F* p = static_cast<const F*>(f.data) + (first_rank + j) * f.rank_stride +
                 (first_column + c) * f.column_stride;
#pragma unroll 1
    for (int first = 0; first < kRanks; first += kBatch) {
      F value[kBatch];
      FF_UNROLL for (int n = 0; n < kBatch; ++n) {
        const int at = first + n;
        const bool inside = j + at * step_j < ranks_left && c + at * step_c < columns_left;
        value[n] = inside ? *p : F{};
        p += step;
      }
      FF_UNROLL for (int n = 0; n < kBatch; ++n) {
        const int to_c = c + (first + n) * step_c;
        const int at = Vector<T>::kSize == 4 ? to_c / 4 : to_c % 8 / 4 * 32 + to_c / 8;
        to[j + (first + n) * step_j][at].x[to_c % 4] = to_accumulator(value[n]);
      }
    }
  });
}

// Four of a row of float32 from `row` on, `left` of which are there.
__device__ __forceinline__ Vector<float> load_quad(const float* row, int64_t left, bool vectors) {
  if (vectors && left >= 4) return load<Access::keep>(row);
  Vector<float> v;
  FF_UNROLL for (int k = 0; k < 4; ++k) v.x[k] = k < left ? row[k] : 0.0f;
  return v;
}

// ---- shrink ------------------------------------------------------------------------------------

// Tokens of a warp: 64 sums a lane at 16 ranks. As much of float32 spills.
template <class T> constexpr int kShrinkTokens = sizeof(T) == 4 ? 2 : 4;

// Rows of x begin at multiples of 16 bytes.
template <class T, int kRanks, bool kDrops>
__global__ void __launch_bounds__(kThreads, kDrops ? 1 : 2) shrink_kernel(const LoraShrink a) {
  constexpr int N = Vector<T>::kSize, kTokens = kShrinkTokens<T>;
  __shared__ Staged<kRanks> factor;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t groups = ceil_div(a.rank, kRanks), first_rank = blockIdx.x % groups * kRanks;
  const int64_t token = (blockIdx.x / groups * kWarps + warp) * kTokens;
  const int left = a.tokens - token < kTokens ? static_cast<int>(a.tokens - token) : kTokens;
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  float sum[kTokens][kRanks] = {};
  for (int64_t begin = 0; begin < a.columns; begin += kSpan) {
    Vector<T> v[kTokens][kLane / N];
    FF_UNROLL for (int t = 0; t < kTokens; ++t) {
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        const int64_t c = begin + quad_column<T>(i, lane);
        v[t][i] =
            t < left && c < a.columns ? load<Access::keep>(x + t * a.columns + c) : Vector<T>{};
      }
    }
    stage<T, kRanks>(a.factor, first_rank, a.rank, begin, a.columns, factor);
    __syncthreads();
    FF_UNROLL for (int q = 0; q < 2; ++q) {
      float value[kTokens][4];
      FF_UNROLL for (int t = 0; t < kTokens; ++t) {
        FF_UNROLL for (int k = 0; k < 4; ++k) {
          value[t][k] = to_accumulator(v[t][q * 4 / N].x[q * 4 % N + k]);
        }
        if constexpr (kDrops) {
          float keep[4];
          keep_four(a.dropout, (token + t) * a.columns + begin + quad_column<T>(q, lane), keep);
          FF_UNROLL for (int k = 0; k < 4; ++k) value[t][k] *= keep[k];
        }
      }
      FF_UNROLL for (int j = 0; j < kRanks; ++j) {
        const Vector<float> w = factor[j][q * 32 + lane];
        FF_UNROLL for (int t = 0; t < kTokens; ++t) {
          FF_UNROLL for (int k = 0; k < 4; ++k) {
            sum[t][j] = fmaf(value[t][k], w.x[k], sum[t][j]);
          }
        }
      }
    }
    __syncthreads();
  }
  const float scale = static_cast<float>(a.h_scale);
  float* h = static_cast<float*>(a.h.data) + token * a.rank + first_rank;
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    FF_UNROLL for (int j = 0; j < kRanks; ++j) {
      const float total = lane_sum(sum[t][j]);
      if (lane == (t * kRanks + j) % 32 && t < left && first_rank + j < a.rank) {
        h[t * a.rank + j] = scale * total;
      }
    }
  }
}

// Anything else: a block a token, 8 ranks at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) shrink_any_kernel(const LoraShrink a) {
  using A = Accumulator<T>;
  constexpr int kRanks = 8;
  __shared__ A partial[kRanks][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.columns;
  const T* x = static_cast<const T*>(a.x) + first;
  A* h = static_cast<A*>(a.h.data) + static_cast<int64_t>(blockIdx.x) * a.rank;
  for (int64_t first_rank = 0; first_rank < a.rank; first_rank += kRanks) {
    A sum[kRanks] = {};
    with_dtype<true>(a.factor.dtype, [&]<class F>(F) {
      const F* p = static_cast<const F*>(a.factor.data);
      for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
        const A v = to_accumulator(x[c]) * keep_one<A>(a.dropout, first + c);
        FF_UNROLL for (int j = 0; j < kRanks; ++j) {
          const int64_t r = first_rank + j < a.rank ? first_rank + j : first_rank;
          sum[j] += v * static_cast<A>(to_accumulator(
                            p[r * a.factor.rank_stride + c * a.factor.column_stride]));
        }
      }
    });
    FF_UNROLL for (int j = 0; j < kRanks; ++j) {
      const A total = lane_sum(sum[j]);
      if (lane == 0) partial[j][warp] = total;
    }
    __syncthreads();
    if (threadIdx.x < kRanks && first_rank + threadIdx.x < a.rank) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += partial[threadIdx.x][w];
      h[first_rank + threadIdx.x] = static_cast<A>(a.h_scale) * total;
    }
    __syncthreads();
  }
}

// ---- outer -------------------------------------------------------------------------------------

constexpr int kOuterRanks = 8, kOuterColumns = 32;

struct OuterCall : LoraShrink {
  bool vectors;  // rows of g begin at multiples of 16 bytes
};

// Rows of x begin at multiples of 16 bytes.
template <class T, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) outer_kernel(const OuterCall a) {
  constexpr int N = Vector<T>::kSize, U = kDrops ? 1 : 2, kLanes = kOuterColumns / kLane,
                kStep = kThreads / 4;
  static_assert(kLanes == 4 && kOuterRanks * kOuterColumns == kThreads);
  __shared__ float partial[kWarps][kOuterRanks][kOuterColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % kLanes * kLane;
  const int64_t groups = ceil_div(a.rank, kOuterRanks);
  const int64_t first_rank = blockIdx.x % groups * kOuterRanks;
  const int64_t first = blockIdx.x / groups * kOuterColumns, column = first + at;
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
      if constexpr (kDrops) {
        FF_UNROLL for (int k = 0; k < kLane; k += 4) {
          float keep[4];
          keep_four(a.dropout, t * a.columns + column + k, keep);
          FF_UNROLL for (int i = 0; i < 4; ++i) value[k + i] *= keep[i];
        }
      }
      FF_UNROLL for (int quad = 0; quad < kOuterRanks; quad += 4) {
        const int64_t r = first_rank + quad;
        const Vector<float> w = load_quad(g + t * a.rank + r, a.rank - r, a.vectors);
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
__global__ void __launch_bounds__(kThreads) outer_any_kernel(const LoraShrink a) {
  using A = Accumulator<T>;
  __shared__ A partial[kWarps][kOuterRanks][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t groups = ceil_div(a.rank, kOuterRanks);
  const int64_t first_rank = blockIdx.x % groups * kOuterRanks;
  const int64_t column = blockIdx.x / groups * 32 + lane;
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

constexpr int kExpandRanks = 16;

struct ExpandCall : LoraExpand {
  bool vectors;  // rows of h begin at multiples of 16 bytes
};

// Rows of y, and bias, begin at multiples of 16 bytes.
template <class T, int kTokens, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(const ExpandCall a) {
  constexpr int N = Vector<T>::kSize;
  __shared__ Staged<kExpandRanks> factor;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t groups = ceil_div(a.columns, kSpan), begin = blockIdx.x % groups * kSpan;
  const int64_t token = (blockIdx.x / groups * kWarps + warp) * kTokens;
  const float* h = static_cast<const float*>(a.h.data) + token * a.rank;
  float sum[kTokens][kLane] = {};
  for (int64_t first_rank = 0; first_rank < a.rank; first_rank += kExpandRanks) {
    stage<T, kExpandRanks>(a.factor, first_rank, a.rank, begin, a.columns, factor);
    __syncthreads();
#pragma unroll 1
    for (int quad = 0; quad < kExpandRanks && first_rank + quad < a.rank; quad += 4) {
      const int64_t r = first_rank + quad;
      Vector<float> w[4][2];
      FF_UNROLL for (int j = 0; j < 4; ++j) {
        FF_UNROLL for (int q = 0; q < 2; ++q) w[j][q] = factor[quad + j][q * 32 + lane];
      }
      FF_UNROLL for (int t = 0; t < kTokens; ++t) {
        if (token + t >= a.tokens) break;
        const Vector<float> v = load_quad(h + t * a.rank + r, a.rank - r, a.vectors);
        FF_UNROLL for (int j = 0; j < 4; ++j) {
          FF_UNROLL for (int k = 0; k < kLane; ++k) {
            sum[t][k] = fmaf(v.x[j], w[j][k / 4].x[k % 4], sum[t][k]);
          }
        }
      }
    }
    __syncthreads();
  }
  const float scale = static_cast<float>(a.scale);
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    if (token + t >= a.tokens) break;
    FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
      const int64_t c = begin + quad_column<T>(i, lane);
      if (c >= a.columns) continue;
      const int64_t at = (token + t) * a.columns + c;
      T* y = static_cast<T*>(a.y) + at;
      float value[N];
      FF_UNROLL for (int k = 0; k < N; ++k) value[k] = sum[t][i * N + k] * scale;
      if constexpr (kDrops) {
        FF_UNROLL for (int k = 0; k < N; k += 4) {
          float keep[4];
          keep_four(a.dropout, at + k, keep);
          FF_UNROLL for (int n = 0; n < 4; ++n) value[k + n] *= keep[n];
        }
      }
      if (a.bias != nullptr) {
        const Vector<T> b = load<Access::keep>(static_cast<const T*>(a.bias) + c);
        FF_UNROLL for (int k = 0; k < N; ++k) value[k] += to_accumulator(b.x[k]);
      }
      if (a.accumulate) {
        const Vector<T> before = load<Access::stream>(y);
        FF_UNROLL for (int k = 0; k < N; ++k) value[k] += to_accumulator(before.x[k]);
      }
      Vector<T> v;
      FF_UNROLL for (int k = 0; k < N; ++k) store_value(&v.x[k], value[k]);
      store(y, v);
    }
  }
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

// ---- launches ----------------------------------------------------------------------------------

template <class T> bool has_vector_rows(const void* p, int64_t columns) {
  return is_aligned(p) && columns % Vector<T>::kSize == 0;
}

template <class T, bool kDrops> void shrink_tiles(const LoraShrink& a) {
  const auto blocks = [&](int ranks) {
    return ceil_div(a.tokens, kWarps * kShrinkTokens<T>) * ceil_div(a.rank, ranks);
  };
  if (a.rank <= 8) return launch(shrink_kernel<T, 8, kDrops>, blocks(8), kThreads, 0, a);
  launch(shrink_kernel<T, 16, kDrops>, blocks(16), kThreads, 0, a);
}

template <class T> void shrink(const LoraShrink& a) {
  bool vectors = false;
  if constexpr (!std::is_same_v<T, double>) vectors = has_vector_rows<T>(a.x, a.columns);
  const bool drops = a.dropout.seed != nullptr;
  const int64_t groups = ceil_div(a.rank, kOuterRanks);
  if constexpr (!std::is_same_v<T, double>) {
    if (a.h && vectors && a.tokens >= kTileTokens && a.factor.dtype != DType::f64) {
      drops ? shrink_tiles<T, true>(a) : shrink_tiles<T, false>(a);
    } else if (a.h) {
      launch(shrink_any_kernel<T>, a.tokens, kThreads, 0, a);
    }
    if (a.outer && vectors) {
      const OuterCall call{a, is_aligned(a.g.data) && a.rank % 4 == 0};
      launch(drops ? outer_kernel<T, true> : outer_kernel<T, false>,
             ceil_div(a.columns, kOuterColumns) * groups, kThreads, 0, call);
      return;
    }
  } else if (a.h) {
    launch(shrink_any_kernel<T>, a.tokens, kThreads, 0, a);
  }
  if (a.outer) launch(outer_any_kernel<T>, ceil_div(a.columns, 32) * groups, kThreads, 0, a);
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

void run(const LoraShrink& a) {
  by_dtype(a.dtype, [&]<class T>(T) { shrink<T>(a); });
}

void run(const LoraExpand& a) {
  by_dtype(a.dtype, [&]<class T>(T) { expand<T>(a); });
}

void run(const LoraLinear& a) {
  by_dtype(a.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) linear<T>(a);
  });
}

}  // namespace finefuse::cuda
