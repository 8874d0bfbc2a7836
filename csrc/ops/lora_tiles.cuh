// What the low-rank stems share on NVIDIA GPUs: dropout, the factor in shared memory, tiles of
// skinny products over rows that the caller names.
#pragma once
#include "core/cuda_utils.cuh"
#include "ops/lora.h"

namespace finefuse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLane = 8;               // columns of a lane
constexpr int kSpan = 32 * kLane;      // columns of a warp
constexpr int kRow = (kSpan + 4) / 4;  // of the staged factor, in vectors: rows in other banks

// by_dtype of a kernel. kWide: float64 may come. It does not to the kernels that are to be fast.
template <bool kWide, class F> __device__ __forceinline__ void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64:
      if constexpr (kWide) f(double{});
  }
}

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
template <class A> __device__ __forceinline__ void keep_four(const Dropout& d, int64_t i, A* keep) {
  uint32_t word[4];
  philox(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(i) >> 2, word);
  const A scale = static_cast<A>(d.scale);
  FF_UNROLL for (int k = 0; k < 4; ++k) keep[k] = word[k] >= d.threshold ? scale : A{0};
}

template <class A> __device__ A keep_one(const Dropout& d, int64_t i) {
  if (d.seed == nullptr) return A{1};
  A keep[4], value = 0;
  keep_four(d, i & ~int64_t{3}, keep);
  FF_UNROLL for (int k = 0; k < 4; ++k) value = (i & 3) == k ? keep[k] : value;
  return value;
}

// ---- eight columns of a lane -------------------------------------------------------------------

// Hides that x is the same in every turn of a loop: ptxas would keep all that follows from it in
// registers that are not there.
__device__ __forceinline__ void forget(int64_t& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#else
  static_cast<void>(x);
#endif
}

// `left` numbers from p on, `step` apart, and zeros. Vectors: they are adjacent, p is aligned to
// 16 bytes.
template <class A, class T>
__device__ __forceinline__ void load_eight(const T* p, int64_t step, int64_t left, bool vectors,
                                           A (&v)[kLane]) {
  if constexpr (!std::is_same_v<T, double>) {
    if (vectors && left >= kLane) {
      constexpr int N = Vector<T>::kSize;
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        const Vector<T> some = load<Access::keep>(p + i * N);
        FF_UNROLL for (int k = 0; k < N; ++k) v[i * N + k] = to_accumulator(some.x[k]);
      }
      return;
    }
  }
  FF_UNROLL for (int k = 0; k < kLane; ++k) {
    v[k] = k < left ? static_cast<A>(to_accumulator(p[k * step])) : A{0};
  }
}

template <class A, class T>
__device__ __forceinline__ void store_eight(T* p, int64_t left, bool vectors, const A (&v)[kLane]) {
  if constexpr (!std::is_same_v<T, double>) {
    if (vectors && left >= kLane) {
      constexpr int N = Vector<T>::kSize;
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        Vector<T> some;
        FF_UNROLL for (int k = 0; k < N; ++k) store_value(&some.x[k], v[i * N + k]);
        store(p + i * N, some);
      }
      return;
    }
  }
  FF_UNROLL for (int k = 0; k < kLane; ++k) {
    if (k < left) store_value(p + k, v[k]);
  }
}

// D of elements i to i + 7.
template <class A>
__device__ __forceinline__ void drop_eight(const Dropout& d, int64_t i, A (&v)[kLane]) {
  if (d.seed == nullptr) return;
  const int past = static_cast<int>(i & 3);  // of the first counter, which may have begun before
  A keep[12] = {};
  keep_four(d, i - past, keep);
  keep_four(d, i - past + 4, keep + 4);
  if (past != 0) {
    keep_four(d, i - past + 8, keep + 8);
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      keep[k] = past == 1 ? keep[k + 1] : past == 2 ? keep[k + 2] : keep[k + 3];
    }
  }
  FF_UNROLL for (int k = 0; k < kLane; ++k) v[k] *= keep[k];
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

// h of kRanks ranks and `left` tokens of a warp, row(0) and on; the warps of the block have the
// same factor. Rows of x begin at multiples of 16 bytes.
template <class T, int kRanks, bool kDrops, class Row>
__device__ __forceinline__ void shrink_rows(const LoraShrink& a, int64_t first_rank, int left,
                                            Row row) {
  constexpr int N = Vector<T>::kSize, kTokens = kShrinkTokens<T>;
  __shared__ Staged<kRanks> factor;
  const int lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(a.x);
  float sum[kTokens][kRanks] = {};
  for (int64_t begin = 0; begin < a.columns; begin += kSpan) {
    Vector<T> v[kTokens][kLane / N];
    FF_UNROLL for (int t = 0; t < kTokens; ++t) {
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        const int64_t c = begin + quad_column<T>(i, lane);
        v[t][i] = t < left && c < a.columns ? load<Access::keep>(x + row(t) * a.columns + c)
                                            : Vector<T>{};
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
          if (a.dropout.seed != nullptr) {  // of a group, some may not drop
            float keep[4];
            keep_four(a.dropout, row(t) * a.columns + begin + quad_column<T>(q, lane), keep);
            FF_UNROLL for (int k = 0; k < 4; ++k) value[t][k] *= keep[k];
          }
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
  float* h = static_cast<float*>(a.h.data) + first_rank;
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    FF_UNROLL for (int j = 0; j < kRanks; ++j) {
      const float total = lane_sum(sum[t][j]);
      if (lane == (t * kRanks + j) % 32 && t < left && first_rank + j < a.rank) {
        h[row(t) * a.rank + j] = scale * total;
      }
    }
  }
}

// ---- expand ------------------------------------------------------------------------------------

constexpr int kExpandRanks = 16;

// sum += the coefficients of `left` rows times `ranks` staged rows of a factor. of(t, j): four
// coefficients of row t, of ranks j to j + 3.
template <int kTokens, class Coefficients>
__device__ __forceinline__ void add_products(const Staged<kExpandRanks>& factor, int64_t ranks,
                                             int left, Coefficients of,
                                             float (&sum)[kTokens][kLane]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int quad = 0; quad < kExpandRanks && quad < ranks; quad += 4) {
    Vector<float> w[4][2];
    FF_UNROLL for (int j = 0; j < 4; ++j) {
      FF_UNROLL for (int q = 0; q < 2; ++q) w[j][q] = factor[quad + j][q * 32 + lane];
    }
    FF_UNROLL for (int t = 0; t < kTokens; ++t) {
      if (t >= left) break;
      const Vector<float> v = of(t, quad);
      FF_UNROLL for (int j = 0; j < 4; ++j) {
        FF_UNROLL for (int k = 0; k < kLane; ++k) {
          sum[t][k] = fmaf(v.x[j], w[j][k / 4].x[k % 4], sum[t][k]);
        }
      }
    }
  }
}

struct ExpandCall : LoraExpand {
  bool vectors;  // rows of h begin at multiples of 16 bytes
};

// y of a span of columns from `begin` on and `left` tokens of a warp, row(0) and on; the warps of
// the block have the same factor. Rows of y, and bias, begin at multiples of 16 bytes.
template <class T, int kTokens, bool kDrops, class Row>
__device__ __forceinline__ void expand_rows(const ExpandCall& a, int64_t begin, int left, Row row) {
  constexpr int N = Vector<T>::kSize;
  __shared__ Staged<kExpandRanks> factor;
  const int lane = threadIdx.x % 32;
  const float* h = static_cast<const float*>(a.h.data);
  float sum[kTokens][kLane] = {};
  for (int64_t first_rank = 0; first_rank < a.rank; first_rank += kExpandRanks) {
    stage<T, kExpandRanks>(a.factor, first_rank, a.rank, begin, a.columns, factor);
    __syncthreads();
    add_products<kTokens>(
        factor, a.rank - first_rank, left,
        [&](int t, int quad) {
          const int64_t r = first_rank + quad;
          return load_quad(h + row(t) * a.rank + r, a.rank - r, a.vectors);
        },
        sum);
    __syncthreads();
  }
  const float scale = static_cast<float>(a.scale);
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    if (t >= left) break;
    FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
      const int64_t c = begin + quad_column<T>(i, lane);
      if (c >= a.columns) continue;
      const int64_t at = row(t) * a.columns + c;
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

// ---- launches ----------------------------------------------------------------------------------

template <class T> bool has_vector_rows(const void* p, int64_t columns) {
  return !std::is_same_v<T, double> && is_aligned(p) && columns % Vector<T>::kSize == 0;
}

}  // namespace
}  // namespace finefuse::cuda
