// Codebook quantisation on NVIDIA GPUs. 16-bit elements, 4-bit codes, blocks of 64:
//
// clang-format off
//   kernel                       reads + writes an element   bound by
//   quantize                     2 + 0.56                    memory, nearly by arithmetic; 256 entries by shared memory
//   dequantize                   0.56 + 2                    memory
//   codebook_linear              0.56 for all its tokens     memory, nearly by look-ups in shared memory
//   codebook_linear_transposed   0.56 for all its tokens     memory where there are columns for all multiprocessors
//
// A block of codes costs 4 bytes more, 1.02 where its absmax is itself quantised: decoded in the same pass.
//
// Quantise: a lane holds 8 elements, whole bytes of codes for any number of bits. blocksize/8 lanes find
// absmax by shuffles, and through shared memory beyond a warp, so that x is read once.
// Dequantise: a thread makes 16-byte vectors, four of them loaded before the first is looked up. The
// codebook is in shared memory, 16 entries in 16 banks.
// Linear: a warp has several rows, so that x is converted once for all of them, and several warps split
// their columns. A byte of two codes is one look-up: the table of pairs is there once for each of 16 lanes,
// which never meet in a bank. Products of a word of 8 codes are summed unscaled, then scaled.
//
// clang-format on
// SPEC section 1 promises bits: a product that a sum follows is __fmul_rn, which nvcc does not
// fuse.
// Sums of products are float32, in an order that depends on the shape alone.
#include <math.h>

#include "core/cuda_utils.cuh"
#include "ops/codebook.h"

namespace finefuse::cuda {
namespace {

constexpr float kMaxFloat = 3.4028234663852886e38f;

// The exponent of a power of two, else -1: what to shift by, or that one has to divide.
int exact_log2(int64_t n) {
  int log2 = 0;
  while (int64_t{1} << log2 < n) ++log2;
  return int64_t{1} << log2 == n ? log2 : -1;
}

// ---- decoding ----------------------------------------------------------------------------------

// A CodebookArray with what the host knows of its block sizes. kShift below: both are powers of
// two, as the kernels that are to be fast require; a division of 64 bits takes a hundred
// instructions.
struct Weights : CodebookArray {
  int log2_blocksize, log2_nested;  // -1: not a power of two
  bool shifts() const { return log2_blocksize >= 0 && log2_nested >= 0; }
};

Weights weights(const CodebookArray& a) {
  const bool nested = a.absmax.values == nullptr;
  return {a, exact_log2(a.blocksize), nested ? exact_log2(a.absmax.blocksize) : 0};
}

template <bool kShift> __device__ __forceinline__ int64_t block_of(const Weights& a, int64_t i) {
  if constexpr (kShift) return i >> a.log2_blocksize;
  return i / a.blocksize;
}

// The absmax of K blocks from `first` on, loaded together: one wait for all of them, or two where
// they are codes.
template <bool kShift, int K, class I>
__device__ __forceinline__ void load_absmax(const Weights& a, int64_t first, const I (&block)[K],
                                            float (&absmax)[K]) {
  const BlockScales& s = a.absmax;
  if (s.values != nullptr) {
    const float* values = s.values + first;
    FF_UNROLL for (int k = 0; k < K; ++k) absmax[k] = values[block[k]];
    return;
  }
  uint8_t code[K];
  FF_UNROLL for (int k = 0; k < K; ++k) {
    const int64_t i = first + block[k];
    code[k] = s.codes[i];
    absmax[k] = s.absmax[kShift ? i >> a.log2_nested : i / s.blocksize];
  }
  FF_UNROLL for (int k = 0; k < K; ++k) {
    absmax[k] = __fadd_rn(__fmul_rn(s.code[code[k]], absmax[k]), s.offset);
  }
}

__device__ int code_at(const uint8_t* codes, int entries, int64_t i) {
  switch (entries) {
    case 256: return codes[i];
    case 16: return codes[i >> 1] >> (i & 1 ? 0 : 4) & 15;
    case 4: return codes[i >> 2] >> (6 - 2 * (i & 3)) & 3;
    default: {
      const uint8_t* p = codes + (i >> 3) * 3;
      return (p[0] << 16 | p[1] << 8 | p[2]) >> (21 - 3 * (i & 7)) & 7;
    }
  }
}

// One element of any array.
template <bool kShift> __device__ float weight_at(const Weights& a, int64_t i) {
  const int64_t block[1] = {block_of<kShift>(a, i)};
  float absmax[1];
  load_absmax<kShift>(a, 0, block, absmax);
  return __fmul_rn(a.code[code_at(a.codes, a.entries, i)], absmax[0]);
}

// ---- dequantise --------------------------------------------------------------------------------

constexpr int kDequantizeThreads = 256, kDequantizeUnits = 4;

struct DequantizeCall : Dequantize {
  Weights weights;
};

// What one look-up loads and one thread stores: a vector, or, for 3 bits, what fills whole bytes.
template <class T, int kBits> constexpr int kUnit = kBits == 3 ? 8 : Vector<T>::kSize;

// The unit's codes, first element in the lowest bits.
template <int kUnits, int kBits> struct UnitCodes {
  static constexpr int kBytes = kUnits * kBits / 8;
  uint32_t word[kBytes > 4 ? 2 : 1];

  __device__ __forceinline__ void load(const uint8_t* p) {
    if constexpr (kBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      word[0] = v.x;
      word[1] = v.y;
    } else if constexpr (kBytes == 4) {
      word[0] = *reinterpret_cast<const uint32_t*>(p);
    } else if constexpr (kBytes == 3) {
      word[0] = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 8 | p[2];
    } else if constexpr (kBytes == 2) {
      word[0] = *reinterpret_cast<const uint16_t*>(p);
    } else {
      word[0] = *p;
    }
  }
  __device__ __forceinline__ uint32_t operator[](int k) const {
    constexpr uint32_t mask = (1u << kBits) - 1;
    if constexpr (kBits == 3) return word[0] >> (21 - 3 * k) & mask;
    constexpr int per_byte = 8 / kBits;
    const int bit = k / per_byte * 8 + (per_byte - 1 - k % per_byte) * kBits;
    return word[bit / 32] >> bit % 32 & mask;
  }
};

// Units are whole, aligned and in one block each, but for the last.
template <class T, int kBits>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_kernel(const DequantizeCall a) {
  constexpr int N = kUnit<T, kBits>, U = kDequantizeUnits;
  __shared__ float code[1 << kBits];
  T* out = static_cast<T*>(a.out);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (U * kDequantizeThreads) + threadIdx.x;
  UnitCodes<N, kBits> codes[U];
  int64_t block[U];
  float absmax[U];
  FF_UNROLL for (int u = 0; u < U; ++u) {
    int64_t i = (first + u * kDequantizeThreads) * N;
    i = i + N <= a.count ? i : 0;  // something that is there, and not used
    codes[u].load(a.weights.codes + i / 8 * kBits + i % 8 * kBits / 8);
    block[u] = block_of<true>(a.weights, i);
  }
  load_absmax<true>(a.weights, 0, block, absmax);
  for (int i = threadIdx.x; i < 1 << kBits; i += kDequantizeThreads) code[i] = a.weights.code[i];
  __syncthreads();
  FF_UNROLL for (int u = 0; u < U; ++u) {
    const int64_t i = (first + u * kDequantizeThreads) * N;
    if (i + N > a.count) break;
    FF_UNROLL for (int j = 0; j < N; j += Vector<T>::kSize) {
      Vector<T> v;
      FF_UNROLL for (int k = 0; k < Vector<T>::kSize; ++k) {
        store_value(&v.x[k], __fmul_rn(code[codes[u][j + k]], absmax[u]));
      }
      store(out + i + j, v);
    }
  }
  const int64_t last = a.count / N * N + threadIdx.x;
  if (blockIdx.x == 0 && last < a.count) store_value(out + last, weight_at<true>(a.weights, last));
}

// Anything else: an element a thread.
template <class T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_any_kernel(const DequantizeCall a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (i < a.count) store_value(static_cast<T*>(a.out) + i, weight_at<false>(a.weights, i));
}

template <class T, int kBits> void dequantize(const DequantizeCall& a) {
  constexpr int N = kUnit<T, kBits>;
  constexpr size_t bytes = kBits == 3 ? 1 : N * kBits / 8;
  if (is_aligned(a.out, 16) && is_aligned(a.from.codes, bytes) && a.weights.shifts() &&
      a.from.blocksize >= N && a.count >= N) {
    launch(dequantize_kernel<T, kBits>,
           ceil_div(a.count, N * kDequantizeUnits * kDequantizeThreads), kDequantizeThreads, 0, a);
  } else {
    launch(dequantize_any_kernel<T>, ceil_div(a.count, kDequantizeThreads), kDequantizeThreads, 0,
           a);
  }
}

// ---- quantise ----------------------------------------------------------------------------------

constexpr int kLane = 8;  // elements a lane
constexpr int kQuantizeThreads = 256, kMostQuantizeThreads = 512;

struct QuantizeCall : Quantize {
  int log2_group;  // of the lanes that share a block; -1: absmax is there already
  bool aligned;    // x, to 16 bytes, and codes, to what a lane writes
};

// The larger one, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Zeros beyond the end.
template <class T>
__device__ __forceinline__ void load_lane(const T* x, int64_t i, int64_t count, bool aligned,
                                          float (&v)[kLane]) {
  if (aligned && i + kLane <= count) {
    FF_UNROLL for (int j = 0; j < kLane; j += Vector<T>::kSize) {
      const Vector<T> part = load<Access::stream>(x + i + j);
      FF_UNROLL for (int k = 0; k < Vector<T>::kSize; ++k) v[j + k] = to_accumulator(part.x[k]);
    }
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      v[k] = i + k < count ? to_accumulator(x[i + k]) : 0.0f;
    }
  }
}

// x' where 1/absmax is infinite, or absmax is. SPEC divides in float64 and rounds to float32, which
// for two float32 numbers is what one division gives; 2^64 takes both out of the denormals.
__device__ float scaled_at_an_edge(float x, float absmax) {
  if (absmax == 0.0f) return 0.0f;
  if (absmax > kMaxFloat) return fabsf(x) > kMaxFloat ? x : 0.0f;
  constexpr float up = 18446744073709551616.0f;
  return __fdiv_rn(__fmul_rn(x, up), __fmul_rn(absmax, up));
}

__device__ __forceinline__ void scale_lane(float (&x)[kLane], float absmax) {
  const float reciprocal = __frcp_rn(absmax);
  if (reciprocal > kMaxFloat || absmax > kMaxFloat) {
    for (int k = 0; k < kLane; ++k) x[k] = scaled_at_an_edge(x[k], absmax);
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) x[k] = __fmul_rn(x[k], reciprocal);
  }
}

constexpr int kFp4Ranks = 8;

template <int kRanks, bool kFp4> __device__ void fill_thresholds(const float* code, float* m) {
  if constexpr (kFp4) {
    constexpr float magnitudes[kFp4Ranks - 1] = {.00260417f, .0859375f, .20833333f, .29166667f,
                                                 .4166667f,  .583333f,  .8333333f};
    if (threadIdx.x == 0) {
      FF_UNROLL for (int k = 0; k < kFp4Ranks - 1; ++k) m[k] = magnitudes[k];
    }
  } else {
    for (int k = threadIdx.x; k < kRanks - 1; k += blockDim.x) {
      m[k] = static_cast<float>(0.5 *
                                (static_cast<double>(code[k]) + static_cast<double>(code[k + 1])));
    }
  }
}

// How many thresholds lie below x; NaN: all. The upper two levels of the search are in registers.
template <int kRanks> __device__ __forceinline__ int rank(const float* m, float x) {
  constexpr int half = kRanks / 2, quarter = kRanks / 4;
  const bool upper = !(x <= m[half - 1]);
  int rank = upper ? half : 0;
  rank += !(x <= (upper ? m[half + quarter - 1] : m[quarter - 1])) ? quarter : 0;
  FF_UNROLL for (int step = quarter / 2; step > 0; step /= 2) {
    rank += !(x <= m[rank + step - 1]) ? step : 0;
  }
  return rank;
}

template <int kRanks, bool kFp4>
__device__ __forceinline__ uint32_t code_of(const float* m, float x) {
  if constexpr (kFp4) {
    const int r = rank<kRanks>(m, fabsf(x));
    return (0x32547610u >> (4 * r) & 15) + (x < 0.0f ? 8 : 0);  // SPEC: 0 1 6 7 4 5 2 3
  }
  return static_cast<uint32_t>(rank<kRanks>(m, x));
}

// A lane's codes, most significant bits first.
template <int kBits>
__device__ __forceinline__ void store_codes(uint8_t* p, const uint32_t (&code)[kLane], int bytes,
                                            bool aligned) {
  uint32_t word[kBits == 8 ? 2 : 1] = {};  // bytes in the order of memory
  if constexpr (kBits == 3) {
    uint32_t all = 0;
    FF_UNROLL for (int k = 0; k < kLane; ++k) all = all << 3 | code[k];
    word[0] = all >> 16 | (all & 0xff00) | (all & 0xff) << 16;
  } else {
    constexpr int per_byte = 8 / kBits;
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      const int bit = k / per_byte * 8 + (per_byte - 1 - k % per_byte) * kBits;
      word[bit / 32] += code[k] << bit % 32;
    }
  }
  if (kBits != 3 && aligned && bytes == kBits) {
    if constexpr (kBits == 8) *reinterpret_cast<uint2*>(p) = {word[0], word[1]};
    if constexpr (kBits == 4) *reinterpret_cast<uint32_t*>(p) = word[0];
    if constexpr (kBits == 2) *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(word[0]);
  } else {
    FF_UNROLL for (int b = 0; b < kBits; ++b) {
      if (b < bytes) p[b] = static_cast<uint8_t>(word[b / 4] >> b % 4 * 8);
    }
  }
}

template <class T, int kBits, bool kFp4>
__global__ void __launch_bounds__(kMostQuantizeThreads) quantize_kernel(const QuantizeCall a) {
  constexpr int kRanks = kFp4 ? kFp4Ranks : 1 << kBits;
  __shared__ float m[kRanks - 1];
  __shared__ float warp_absmax[kMostQuantizeThreads / 32];
  const int64_t lane = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t i = lane * kLane;
  float x[kLane];
  load_lane(static_cast<const T*>(a.x), i, a.count, a.aligned, x);
  fill_thresholds<kRanks, kFp4>(a.code, m);
  if (a.log2_group < 0) {
    __syncthreads();
    for (int k = 0; k < kLane && i + k < a.count; ++k) {
      float one[kLane] = {x[k]};
      scale_lane(one, a.absmax[(i + k) / a.blocksize]);
      x[k] = one[0];
    }
  } else {
    const int group = 1 << a.log2_group, warp = threadIdx.x / 32;
    float absmax = 0.0f;
    FF_UNROLL for (int k = 0; k < kLane; ++k) absmax = max_or_nan(absmax, fabsf(x[k]));
    for (int mask = (group < 32 ? group : 32) / 2; mask > 0; mask /= 2) {
      absmax = max_or_nan(absmax, __shfl_xor_sync(0xffffffffu, absmax, mask));
    }
    if (threadIdx.x % 32 == 0) warp_absmax[warp] = absmax;
    __syncthreads();
    const int warps = group / 32;
    for (int w = 0; w < warps; ++w) {
      absmax = max_or_nan(absmax, warp_absmax[warp / warps * warps + w]);
    }
    if ((threadIdx.x & (group - 1)) == 0 && i < a.count) {
      a.absmax[lane >> a.log2_group] = absmax == absmax ? absmax : NAN;
    }
    scale_lane(x, absmax);
  }
  if (i >= a.count) return;
  const int64_t rest = a.count - i;
  uint32_t code[kLane];
  FF_UNROLL for (int k = 0; k < kLane; ++k) {
    code[k] = code_of<kRanks, kFp4>(m, k < rest ? x[k] : 0.0f);
  }
  const int bytes = rest >= kLane || kBits == 3 ? kBits : (static_cast<int>(rest) * kBits + 7) / 8;
  store_codes<kBits>(a.codes + lane * kBits, code, bytes, a.aligned);
}

// absmax alone, of blocks of any size: a warp each.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) absmax_kernel(const QuantizeCall a) {
  const int64_t block =
      static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / 32) + threadIdx.x / 32;
  const int64_t begin = block * a.blocksize;
  const int64_t end = begin + a.blocksize < a.count ? begin + a.blocksize : a.count;
  const T* x = static_cast<const T*>(a.x);
  float absmax = 0.0f;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
    absmax = max_or_nan(absmax, fabsf(to_accumulator(x[i])));
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    absmax = max_or_nan(absmax, __shfl_xor_sync(0xffffffffu, absmax, mask));
  }
  if (threadIdx.x % 32 == 0 && begin < a.count) a.absmax[block] = absmax == absmax ? absmax : NAN;
}

template <class T, int kBits, bool kFp4> void quantize(QuantizeCall a) {
  a.aligned = is_aligned(a.x, 16) && is_aligned(a.codes, kBits == 3 ? 1 : kBits);
  const int log2 = exact_log2(a.blocksize);
  if (log2 >= 3 && a.blocksize <= kLane * kMostQuantizeThreads) {
    a.log2_group = log2 - 3;
  } else {
    a.log2_group = -1;
    launch(absmax_kernel<T>, ceil_div(ceil_div(a.count, a.blocksize), kQuantizeThreads / 32),
           kQuantizeThreads, 0, a);
  }
  const int threads = a.log2_group > 8 ? kMostQuantizeThreads : kQuantizeThreads;
  launch(quantize_kernel<T, kBits, kFp4>, ceil_div(a.count, kLane * threads), threads, 0, a);
}

// ---- linear ------------------------------------------------------------------------------------

constexpr int kLinearThreads = 512, kLinearWarps = kLinearThreads / 32;
constexpr int kWord = 8;                       // codes in 32 bits: what a lane loads at once
constexpr int kChunk = 32 * kWord;             // columns of a warp's load
constexpr int kTransposedColumns = 8 * kWord;  // of a block; 32 bytes of each row

struct LinearCall : CodebookLinear {
  Weights weights;
  int64_t token;   // the first of a launch
  int log2_split;  // warps that share a row
};

// The two entries of a byte, sixteen times: a copy for each lane of half a warp, in its own banks.
constexpr int kPairs = 256, kCopies = 16;
struct Pairs {
  float2 entry[kPairs * kCopies];

  __device__ void fill(const float* code) {
    for (int i = threadIdx.x; i < kPairs * kCopies; i += kLinearThreads) {
      const int byte = i / kCopies;
      entry[i] = {code[byte >> 4], code[byte & 15]};
    }
  }
  // Of byte `j` of a word. Shifted to where it counts entries, so that one more instruction masks
  // it and adds the lane's copy.
  __device__ __forceinline__ float2 at(uint32_t word, int j, uint32_t copy) const {
    constexpr uint32_t bytes = kCopies * sizeof(float2);
    static_assert(bytes == 128);
    const uint32_t shifted = j == 0 ? word << 7 : word >> (8 * j - 7);
    const uint32_t offset = (shifted & (255 * bytes)) | copy;
    return *reinterpret_cast<const float2*>(reinterpret_cast<const unsigned char*>(entry) + offset);
  }
  static __device__ uint32_t copy() { return threadIdx.x % kCopies * sizeof(float2); }
};

// One output from weights that are rounded before they are multiplied: columns first, first + step,
// ...
template <bool kShift, class T>
__device__ float dot(const LinearCall& a, int64_t row, int64_t token, int64_t first, int64_t step) {
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  float sum = 0.0f;
  for (int64_t c = first; c < a.columns; c += step) {
    sum = fmaf(weight_at<kShift>(a.weights, row * a.columns + c), to_accumulator(x[c]), sum);
  }
  return sum;
}

// The same of dx: rows first, first + step, ...
template <bool kShift, class T>
__device__ float dot_column(const LinearCall& a, int64_t column, int64_t token, int64_t first,
                            int64_t step) {
  const T* dy = static_cast<const T*>(a.x) + token * a.rows;
  float sum = 0.0f;
  for (int64_t r = first; r < a.rows; r += step) {
    sum = fmaf(weight_at<kShift>(a.weights, r * a.columns + column), to_accumulator(dy[r]), sum);
  }
  return sum;
}

template <class T>
__device__ void store_output(const LinearCall& a, int64_t row, int64_t token, float sum) {
  if (a.bias != nullptr) sum += to_accumulator(static_cast<const T*>(a.bias)[row]);
  store_value(static_cast<T*>(a.y) + token * a.rows + row, sum);
}

// Rows of a warp: they share what x costs, as far as registers go.
template <class T, int kTokens> constexpr int kLinearRows = kTokens == 1 && sizeof(T) == 2 ? 4 : 2;

template <class T, int kTokens>
__global__ void __launch_bounds__(kLinearThreads, kTokens <= 2 ? 2 : 1)
    codebook_linear_kernel(const LinearCall a) {
  constexpr int R = kLinearRows<T, kTokens>, U = 2, N = Vector<T>::kSize;
  __shared__ Pairs pairs;
  __shared__ float partial[kLinearWarps][R * kTokens];
  pairs.fill(a.weights.code);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = 1 << a.log2_split;
  const uint32_t copy = Pairs::copy();
  const int64_t group =
      static_cast<int64_t>(blockIdx.x) * (kLinearWarps >> a.log2_split) + (warp >> a.log2_split);
  const bool some = group * R < a.rows;
  // The last group moves up to be whole: what two of them have, they have the same.
  const int64_t first = group * R + R <= a.rows ? group * R : a.rows - R;
  const T* x = static_cast<const T*>(a.x) + a.token * a.columns;
  // 32 bits from the first of the warp's rows on.
  const int64_t start = first * a.columns, first_block = block_of<true>(a.weights, start);
  const auto columns = static_cast<uint32_t>(a.columns);
  const auto before = static_cast<uint32_t>(start - (first_block << a.weights.log2_blocksize));
  const uint8_t* codes = a.weights.codes + start / 2;
  float sum[R][kTokens] = {};
  const uint32_t step = kChunk << a.log2_split;
  const uint32_t end = some ? columns : 0;
  for (uint32_t c = (warp & (split - 1)) * kChunk + lane * kWord; c < end; c += U * step) {
    uint32_t word[U][R], block[U * R];
    float absmax[U * R];
    FF_UNROLL for (int u = 0; u < U; ++u) {
      uint32_t i = c + u * step < columns ? c + u * step : c;  // beyond: there, and not used
      FF_UNROLL for (int r = 0; r < R; ++r, i += columns) {
        word[u][r] = *reinterpret_cast<const uint32_t*>(codes + i / 2);
        block[u * R + r] = (before + i) >> a.weights.log2_blocksize;
      }
    }
    load_absmax<true>(a.weights, first_block, block, absmax);
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const uint32_t column = c + u * step;
      if (column >= columns) break;
      Vector<T> v[kTokens][kWord / N];
      FF_UNROLL for (int t = 0; t < kTokens; ++t) {
        FF_UNROLL for (int k = 0; k < kWord / N; ++k) {
          v[t][k] = load<Access::keep>(x + t * a.columns + column + k * N);
        }
      }
      float product[R][kTokens] = {};
      FF_UNROLL for (int j = 0; j < kWord / 2; ++j) {
        float2 w[R];
        FF_UNROLL for (int r = 0; r < R; ++r) w[r] = pairs.at(word[u][r], j, copy);
        FF_UNROLL for (int t = 0; t < kTokens; ++t) {
          const float x0 = to_accumulator(v[t][2 * j / N].x[2 * j % N]);
          const float x1 = to_accumulator(v[t][2 * j / N].x[2 * j % N + 1]);
          FF_UNROLL for (int r = 0; r < R; ++r) {
            product[r][t] = fmaf(w[r].y, x1, fmaf(w[r].x, x0, product[r][t]));
          }
        }
      }
      FF_UNROLL for (int r = 0; r < R; ++r) {
        FF_UNROLL for (int t = 0; t < kTokens; ++t) {
          sum[r][t] = fmaf(product[r][t], absmax[u * R + r], sum[r][t]);
        }
      }
    }
  }
  FF_UNROLL for (int r = 0; r < R; ++r) {
    FF_UNROLL for (int t = 0; t < kTokens; ++t) {
      sum[r][t] = warp_sum(sum[r][t]);
      if (lane == 0) partial[warp][r * kTokens + t] = sum[r][t];
    }
  }
  __syncthreads();
  const int64_t row = first + lane / kTokens, token = a.token + lane % kTokens;
  if ((warp & (split - 1)) != 0 || lane >= R * kTokens || !some) return;
  float total = partial[warp][lane];
  for (int w = 1; w < split; ++w) total += partial[warp + w][lane];
  // Sums that are not scaled yet may overflow where the product does not; and an infinite absmax
  // makes NaN of a code of 0, which its block's sum of products hides.
  if (!(fabsf(total) <= kMaxFloat)) total = dot<true, T>(a, row, token, 0, 1);
  store_output<T>(a, row, token, total);
}

// Anything else: a warp a row, tokens one after the other.
template <class T>
__global__ void __launch_bounds__(kLinearThreads) codebook_linear_any_kernel(const LinearCall a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLinearWarps + threadIdx.x / 32;
  for (int64_t t = 0; t < a.tokens; ++t) {
    float sum = row < a.rows ? dot<false, T>(a, row, t, threadIdx.x % 32, 32) : 0.0f;
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0 && row < a.rows) store_output<T>(a, row, t, sum);
  }
}

// dx = dy·W: 8 lanes own 64 columns, 64 groups of 8 lanes take a row each.
template <class T, int kTokens>
__global__ void __launch_bounds__(kLinearThreads, 1)
    codebook_linear_transposed_kernel(const LinearCall a) {
  constexpr int U = 4, kSlots = kLinearThreads / kWord;
  __shared__ Pairs pairs;
  __shared__ float partial[kLinearWarps][kTransposedColumns];
  pairs.fill(a.weights.code);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = lane % 8 * kWord;
  const uint32_t copy = Pairs::copy();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTransposedColumns;
  const T* dy = static_cast<const T*>(a.x) + a.token * a.rows;
  float sum[kTokens][kWord] = {};
  const int64_t rows = first + at < a.columns ? a.rows : 0;
  for (int64_t row = threadIdx.x / 8; row < rows; row += U * kSlots) {
    uint32_t word[U];
    int64_t block[U];
    float absmax[U], g[U][kTokens];
    FF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t r = row + u * kSlots < rows ? row + u * kSlots : row;
      const int64_t i = r * a.columns + first + at;
      word[u] = *reinterpret_cast<const uint32_t*>(a.weights.codes + i / 2);
      block[u] = block_of<true>(a.weights, i);
      FF_UNROLL for (int t = 0; t < kTokens; ++t) g[u][t] = to_accumulator(dy[t * a.rows + r]);
    }
    load_absmax<true>(a.weights, 0, block, absmax);
    FF_UNROLL for (int u = 0; u < U; ++u) {
      if (row + u * kSlots >= rows) break;
      FF_UNROLL for (int t = 0; t < kTokens; ++t) g[u][t] *= absmax[u];
      FF_UNROLL for (int j = 0; j < kWord / 2; ++j) {
        const float2 w = pairs.at(word[u], j, copy);
        FF_UNROLL for (int t = 0; t < kTokens; ++t) {
          sum[t][2 * j] = fmaf(w.x, g[u][t], sum[t][2 * j]);
          sum[t][2 * j + 1] = fmaf(w.y, g[u][t], sum[t][2 * j + 1]);
        }
      }
    }
  }
  FF_UNROLL for (int t = 0; t < kTokens; ++t) {
    FF_UNROLL for (int k = 0; k < kWord; ++k) {
      for (int mask = 8; mask < 32; mask *= 2) {
        sum[t][k] += __shfl_xor_sync(0xffffffffu, sum[t][k], mask);
      }
      if (lane < 8) partial[warp][at + k] = sum[t][k];
    }
    __syncthreads();
    const int64_t column = first + threadIdx.x;
    if (threadIdx.x < kTransposedColumns && column < a.columns) {
      float total = 0.0f;
      for (int w = 0; w < kLinearWarps; ++w) total += partial[w][threadIdx.x];
      if (!(fabsf(total) <= kMaxFloat)) total = dot_column<true, T>(a, column, a.token + t, 0, 1);
      store_value(static_cast<T*>(a.y) + (a.token + t) * a.columns + column, total);
    }
    __syncthreads();
  }
}

// Anything else: a lane a column, rows split over the block's warps.
template <class T>
__global__ void __launch_bounds__(kLinearThreads)
    codebook_linear_transposed_any_kernel(const LinearCall a) {
  __shared__ float partial[kLinearWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  for (int64_t t = 0; t < a.tokens; ++t) {
    float sum = column < a.columns ? dot_column<false, T>(a, column, t, warp, kLinearWarps) : 0.0f;
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < a.columns) {
      for (int w = 1; w < kLinearWarps; ++w) sum += partial[w][lane];
      store_value(static_cast<T*>(a.y) + t * a.columns + column, sum);
    }
    __syncthreads();
  }
}

template <class T, int kTokens> void linear_tokens(LinearCall& a) {
  constexpr int rows = kLinearRows<T, kTokens>;
  // Warps enough for every multiprocessor, and each with a few chunks of its rows.
  a.log2_split = 0;
  while (a.log2_split < 4 && (a.rows << a.log2_split) < 4096 * rows &&
         (kChunk * 2 << a.log2_split) < a.columns) {
    ++a.log2_split;
  }
  for (; a.token + kTokens <= a.tokens; a.token += kTokens) {
    launch(codebook_linear_kernel<T, kTokens>,
           ceil_div(a.rows, int64_t{rows} * (kLinearWarps >> a.log2_split)), kLinearThreads, 0, a);
  }
}

template <class T, int kTokens> void transposed_tokens(LinearCall& a) {
  for (; a.token + kTokens <= a.tokens; a.token += kTokens) {
    launch(codebook_linear_transposed_kernel<T, kTokens>, ceil_div(a.columns, kTransposedColumns),
           kLinearThreads, 0, a);
  }
}

template <class T> void linear(LinearCall a) {
  const bool words = a.weight.entries == 16 && a.columns % kWord == 0 && a.weights.shifts() &&
                     a.weight.blocksize >= kWord && is_aligned(a.weight.codes, 4) && a.rows >= 4 &&
                     a.columns + a.weight.blocksize < 1 << 28;
  if (words && a.transposed) {  // 8 sums a token and thread: 8 tokens would spill
    transposed_tokens<T, 4>(a);
    transposed_tokens<T, 2>(a);
    transposed_tokens<T, 1>(a);
  } else if (words && is_aligned(a.x, 16)) {
    linear_tokens<T, 8>(a);
    linear_tokens<T, 4>(a);
    linear_tokens<T, 2>(a);
    linear_tokens<T, 1>(a);
  } else if (a.transposed) {
    launch(codebook_linear_transposed_any_kernel<T>, ceil_div(a.columns, 32), kLinearThreads, 0, a);
  } else {
    launch(codebook_linear_any_kernel<T>, ceil_div(a.rows, kLinearWarps), kLinearThreads, 0, a);
  }
}

}  // namespace

void run(const Quantize& a) {
  const QuantizeCall call{a, 0, false};
  by_dtype_but_f64(a.dtype, [&]<class T>(T) {
    if (a.rule == CodeRule::fp4) return quantize<T, 4, true>(call);
    switch (a.entries) {
      case 4: return quantize<T, 2, false>(call);
      case 8: return quantize<T, 3, false>(call);
      case 16: return quantize<T, 4, false>(call);
      case 256: return quantize<T, 8, false>(call);
    }
  });
}

void run(const Dequantize& a) {
  const DequantizeCall call{a, weights(a.from)};
  by_dtype_but_f64(a.dtype, [&]<class T>(T) {
    switch (a.from.entries) {
      case 4: return dequantize<T, 2>(call);
      case 8: return dequantize<T, 3>(call);
      case 16: return dequantize<T, 4>(call);
      case 256: return dequantize<T, 8>(call);
    }
  });
}

void run(const CodebookLinear& a) {
  const LinearCall call{a, weights(a.weight), 0, 0};
  by_dtype_but_f64(a.dtype, [&]<class T>(T) { linear<T>(call); });
}

}  // namespace finefuse::cuda
