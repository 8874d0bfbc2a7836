// Weight-decomposed updates on NVIDIA GPUs.
//
// clang-format off
//   kernel                  reads + writes                    multiply-adds          bound by
//   dora_norm_kernel        W; A and B from L2                rows·columns·rank      memory to rank 16, issue above
//   dora_scale_kernel       z, y, y before                    tokens·columns         memory
//   dora_columns_kernel     dy, z; dz                         2·tokens·columns       memory, if columns fill the device
//   *_any_kernel            the same, A a time a row          odd shapes, float64
//
// Norm: a block owns 32 rows of W over all columns, a warp 4 of them and 256 columns at a time, 8 a lane: the update of
// these is summed over all ranks in registers, W is added, and it is squared. Nothing cancels, as in
// ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖².
// Scale: a thread has 8 columns of 4 tokens, so that the factors are read once for four.
// Columns: a block owns 32 columns over all tokens, 4 lanes a row, 128 rows at a time; dz comes of the same visit.
//
// clang-format on
// Sums are float32, of no more than columns/256 squares or tokens/128 products, then added in
// pairs; float64 where the input is. No workspace: whoever writes a sum owns all of its terms.
#include "ops/dora.h"
#include "ops/lora_tiles.cuh"

namespace finefuse::cuda {
namespace {

// ---- norm --------------------------------------------------------------------------------------

constexpr int kNormRows = 4, kNormBlock = kWarps * kNormRows;  // of a warp, of a block

template <class A> __device__ __forceinline__ A element(const Factor& f, int64_t r, int64_t c) {
  A value = 0;
  with_dtype<true>(f.dtype, [&]<class F>(F) {
    const F* p = static_cast<const F*>(f.data);
    value = static_cast<A>(to_accumulator(p[r * f.rank_stride + c * f.column_stride]));
  });
  return value;
}

// Rows of W begin at multiples of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) dora_norm_kernel(const DoraNorm a) {
  constexpr int N = Vector<T>::kSize;
  __shared__ Staged<kExpandRanks> factor;
  __shared__ Vector<float> coefficients[kNormBlock][kExpandRanks / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kNormBlock;
  const int64_t row = block + warp * kNormRows, rows = a.rows - row;
  const int left = rows < kNormRows ? static_cast<int>(rows) : kNormRows;
  const T* weight = static_cast<const T*>(a.weight) + row * a.columns;
  const float scale = static_cast<float>(a.scale);
  float square[kNormRows] = {};
  for (int64_t begin = 0; begin < a.columns; begin += kSpan) {
    Vector<T> w[kNormRows][kLane / N];
    FF_UNROLL for (int t = 0; t < kNormRows; ++t) {
      FF_UNROLL for (int i = 0; i < kLane / N; ++i) {
        const int64_t c = begin + quad_column<T>(i, lane);
        w[t][i] = t < left && c < a.columns ? load<Access::stream>(weight + t * a.columns + c)
                                            : Vector<T>{};
      }
    }
    float sum[kNormRows][kLane] = {};
    for (int64_t first_rank = 0; first_rank < a.rank; first_rank += kExpandRanks) {
      stage<T, kExpandRanks>(a.lora_a, first_rank, a.rank, begin, a.columns, factor);
#pragma unroll 1
      for (int i = threadIdx.x; i < kNormBlock * kExpandRanks; i += kThreads) {
        const int t = i / kExpandRanks, j = i % kExpandRanks;
        const bool inside = block + t < a.rows && first_rank + j < a.rank;
        coefficients[t][j / 4].x[j % 4] =
            inside ? element<float>(a.lora_b, first_rank + j, block + t) : 0.0f;
      }
      __syncthreads();
      add_products<kNormRows>(
          factor, a.rank - first_rank, left,
          [&](int t, int quad) { return coefficients[warp * kNormRows + t][quad / 4]; }, sum);
      __syncthreads();
    }
    FF_UNROLL for (int t = 0; t < kNormRows; ++t) {
      FF_UNROLL for (int k = 0; k < kLane; ++k) {
        const float v = fmaf(scale, sum[t][k], to_accumulator(w[t][k / N].x[k % N]));
        square[t] = fmaf(v, v, square[t]);
      }
    }
  }
  FF_UNROLL for (int t = 0; t < kNormRows; ++t) {
    const double total = warp_sum(static_cast<double>(square[t]));
    if (lane == 0 && t < left) a.norm.set(row + t, sqrt(total));
  }
}

// Anything else: a block a row, a thread a column.
template <class T>
__global__ void __launch_bounds__(kThreads) dora_norm_any_kernel(const DoraNorm a) {
  using A = Accumulator<T>;
  const int64_t row = blockIdx.x;
  A square = 0;
  for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
    A sum = 0;
    for (int64_t r = 0; r < a.rank; ++r) {
      sum += element<A>(a.lora_b, r, row) * element<A>(a.lora_a, r, c);
    }
    const A v = static_cast<A>(a.scale) * sum +
                to_accumulator(static_cast<const T*>(a.weight)[row * a.columns + c]);
    square += v * v;
  }
  double total[1] = {square};
  block_sum(total);
  if (threadIdx.x == 0) a.norm.set(row, sqrt(total[0]));
}

// ---- scale -------------------------------------------------------------------------------------

constexpr int kScaleTokens = 4;  // of a thread

struct ScaleCall : DoraScale {
  bool vectors;  // rows of z and y, factor and bias begin at multiples of 16 bytes
};

// Eight columns of kScaleTokens tokens a thread.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) dora_scale_kernel(const ScaleCall a) {
  using A = Accumulator<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t groups = ceil_div(a.columns, kLane), c = i % groups * kLane;
  const int64_t first = i / groups * kScaleTokens, left = a.columns - c;
  if (first >= a.tokens) return;
  A factor[kLane], bias[kLane] = {};
  load_eight(static_cast<const A*>(a.factor.data) + c, 1, left, a.vectors, factor);
  if (a.bias != nullptr) {
    load_eight(static_cast<const T*>(a.bias) + c, 1, left, a.vectors, bias);
  }
  A value[kScaleTokens][kLane];
  FF_UNROLL for (int t = 0; t < kScaleTokens; ++t) {
    const int64_t some = first + t < a.tokens ? left : 0;
    load_eight(static_cast<const T*>(a.z) + (first + t) * a.columns + c, 1, some, a.vectors,
               value[t]);
  }
  FF_UNROLL for (int t = 0; t < kScaleTokens; ++t) {
    if (first + t >= a.tokens) break;
    T* y = static_cast<T*>(a.y) + (first + t) * a.columns + c;
    FF_UNROLL for (int k = 0; k < kLane; ++k) value[t][k] = factor[k] * value[t][k] + bias[k];
    if (a.accumulate) {
      A before[kLane];
      load_eight(y, 1, left, a.vectors, before);
      FF_UNROLL for (int k = 0; k < kLane; ++k) value[t][k] += before[k];
    }
    store_eight(y, left, a.vectors, value[t]);
  }
}

// ---- sums of columns ---------------------------------------------------------------------------

constexpr int kStrip = 32, kStripLanes = kStrip / kLane;  // columns of a block, lanes of a row
constexpr int kStripThreads = 512, kStripWarps = kStripThreads / 32;
constexpr int kStripRows = kStripThreads / kStripLanes;

struct ColumnsCall : DoraScaleBackward {
  bool vectors;  // rows of dy, z, dz and factor begin at multiples of 16 bytes
};

// sum, and dz where it is wanted: a block a strip of columns over all tokens.
template <class T>
__global__ void __launch_bounds__(kStripThreads, 1) dora_columns_kernel(const ColumnsCall a) {
  using A = Accumulator<T>;
  constexpr int U = sizeof(T) == 8 ? 1 : 2;  // rows of a thread whose loads overlap
  __shared__ A partial[kStripWarps][kStrip];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % kStripLanes * kLane;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kStrip + at, left = a.columns - c;
  const T *dy = static_cast<const T*>(a.dy) + c, *z = static_cast<const T*>(a.z) + c;
  T* dz = static_cast<T*>(a.dz);
  A factor[kLane], sum[kLane] = {};
  if (dz != nullptr) {
    load_eight(static_cast<const A*>(a.factor.data) + c, 1, left, a.vectors, factor);
  }
  for (int64_t first = threadIdx.x / kStripLanes; first < a.tokens; first += U * kStripRows) {
    A v[U][kLane], w[U][kLane];
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t t = first + u * kStripRows, some = t < a.tokens ? left : 0;
      load_eight(dy + t * a.columns, 1, some, a.vectors, v[u]);
      load_eight(z + t * a.columns, 1, some, a.vectors, w[u]);
    }
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t t = first + u * kStripRows;
      if (t >= a.tokens) break;
      FF_UNROLL for (int k = 0; k < kLane; ++k) sum[k] += v[u][k] * w[u][k];
      if (dz != nullptr) {
        FF_UNROLL for (int k = 0; k < kLane; ++k) v[u][k] *= factor[k];
        store_eight(dz + t * a.columns + c, left, a.vectors, v[u]);
      }
    }
  }
  FF_UNROLL for (int k = 0; k < kLane; ++k) {
    const A total = lane_sum(sum[k], kStripLanes);
    if (lane < kStripLanes) partial[warp][at + k] = total;
  }
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kStrip + threadIdx.x;
  if (threadIdx.x >= kStrip || column >= a.columns) return;
  A total = 0;
  for (int w = 0; w < kStripWarps; ++w) total += partial[w][threadIdx.x];
  static_cast<A*>(a.sum.data)[column] = total;
}

// ---- launches ----------------------------------------------------------------------------------

template <class T> void norm(const DoraNorm& a) {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_vector_rows<T>(a.weight, a.columns) && a.lora_a.dtype != DType::f64) {
      launch(dora_norm_kernel<T>, ceil_div(a.rows, kNormBlock), kThreads, 0, a);
      return;
    }
  }
  launch(dora_norm_any_kernel<T>, a.rows, kThreads, 0, a);
}

}  // namespace

void run(const DoraNorm& a) {
  by_dtype(a.dtype, [&]<class T>(T) { norm<T>(a); });
}

void run(const DoraScale& a) {
  const bool vectors = a.columns % kLane == 0 && is_aligned(a.z) && is_aligned(a.y) &&
                       is_aligned(a.factor.data) && is_aligned(a.bias);
  const int64_t threads = ceil_div(a.columns, kLane) * ceil_div(a.tokens, kScaleTokens);
  by_dtype(a.dtype, [&]<class T>(T) {
    launch(dora_scale_kernel<T>, ceil_div(threads, kThreads), kThreads, 0, ScaleCall{a, vectors});
  });
}

void run(const DoraScaleBackward& a) {
  if (!a.sum) {
    if (a.dz == nullptr) return;
    return run(
        DoraScale{a.dy, a.dtype, a.tokens, a.columns, a.factor, nullptr, false, a.dz, a.place});
  }
  const bool vectors = a.columns % kLane == 0 && is_aligned(a.dy) && is_aligned(a.z) &&
                       is_aligned(a.dz) && is_aligned(a.factor.data);
  by_dtype(a.dtype, [&]<class T>(T) {
    launch(dora_columns_kernel<T>, ceil_div(a.columns, kStrip), kStripThreads, 0,
           ColumnsCall{a, vectors});
  });
}

}  // namespace finefuse::cuda
