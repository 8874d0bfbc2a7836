// Pruning on NVIDIA GPUs: the smallest scores are found by their bits, from the highest digit on,
// and never sorted.
//
// clang-format off
//   kernel            reads + writes an element                  bound by
//   prune_histogram   the weight, for each of 2 to 6 digits      memory; atomics in shared memory at the first digit
//   prune_ties        the weight, where some of the equals go    memory
//   prune_apply       the weight + its mask, or its zeros        memory
//   prune_row         the same in one kernel                     L2, whence all but the first pass reads the row
//   prune_group       the weight + its mask, or its zeros        memory
//   prune_codes       the packed codes, the mask + the codes     memory
//
// A key is the bits of the score, whose order as an integer is that of the scores; all NaN have one key, the highest.
// A digit has 11 bits; the passes over 31 bits are 3, over the 15 of a bfloat16 and the 18 of a float16 without a norm
// 2, over 63 bits 6. After them the key of the last that goes is known, and how many of its equals go: the place of the
// last of these is searched for, and an element is kept where its key is higher, or the same and its place beyond.
// Tensor: blocks count in shared memory, then in the workspace; one block picks the digit. Row: a block a row.
// Group: a thread has 8 elements of whole groups of 4 or 8, compared with each other; a thread an element otherwise.
//
// clang-format on
// Counts are integers, whose sums do not depend on their order: the same result every time.
#include "core/cuda_utils.cuh"
#include "ops/prune.h"

namespace finefuse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLane = 8;  // elements of a thread at a time
constexpr int kSteps = 2;
static_assert(kPruneTile == kThreads * kLane * kSteps);
constexpr int kDigit = 11;
static_assert(kPruneBins == 1 << kDigit);
constexpr int64_t kCountingBlocks = 1024;  // more of them add up more histograms
constexpr int64_t kPairs = 128;            // the longest group of which all are compared with all
// Up to so many rows, where they are long, are selected from by the whole device, one after the
// other.
constexpr int64_t kFewRows = 16, kLongRow = 65536, kLongestRow = int64_t{1} << 31;

// ---- keys --------------------------------------------------------------------------------------

template <class T> struct KeyOf {
  using type = uint32_t;
  static constexpr int kBits = 31;
  static constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
};
template <> struct KeyOf<double> {
  using type = uint64_t;
  static constexpr int kBits = 63;
  static constexpr uint64_t kInfinity = 0x7ff0000000000000, kNaN = 0x7ff8000000000000;
};
template <class T> using Key = typename KeyOf<T>::type;

// The lowest bit that a key may have: 16-bit elements without a norm leave those below at 0.
template <class T> int lowest_bit(bool scaled) {
  if (scaled || sizeof(T) > 2) return 0;
  return std::is_same_v<T, bf16> ? 16 : 13;
}

template <class T> __device__ __forceinline__ Key<T> key_of(Accumulator<T> score) {
  Key<T> bits;
  memcpy(&bits, &score, sizeof(bits));
  bits &= ~Key<T>{0} >> 1;
  return bits > KeyOf<T>::kInfinity ? KeyOf<T>::kNaN : bits;
}

// ---- a range of the weight ---------------------------------------------------------------------

struct Selection {
  uint64_t key;   // of the last that goes, as far as its digits are known
  int64_t rest;   // how many of those that share these digits go
  int64_t equal;  // how many of them there are
  int64_t last;   // the place of the last of them that goes
};

// What the workspace holds: prune_workspace of python/finefuse/_args/prune.py.
struct Workspace {
  Selection selection;
  unsigned long long bins[kPruneBins];
  __device__ __forceinline__ int64_t* ties() {  // of each tile
    return reinterpret_cast<int64_t*>(this + 1);
  }
};

struct PruneCall : Prune {
  // the range that is selected from, or the first of equally long ones
  int64_t first = 0, length = 0;
  int lowest = 0;             // bit of a key
  int top = 0, shift = 0;     // the digit is between these bits
  bool aligned = false;       // lanes of the weight, to 16 bytes
  bool mask_aligned = false;  // lanes of the mask, to 8 bytes
  bool norm_aligned = false;  // lanes of the norm: in one row and aligned to 16 bytes
};

__device__ __forceinline__ Workspace& workspace_of(const PruneCall& a) {
  return *static_cast<Workspace*>(a.workspace);
}

template <class T> using Lane = T[kLane];

// Zeros beyond the end.
template <class T>
__device__ __forceinline__ void load_lane(const T* p, int64_t left, bool vectors, Lane<T>& w) {
  if (vectors && left >= kLane) {
    FF_UNROLL for (int j = 0; j < kLane; j += Vector<T>::kSize) {
      const Vector<T> part = load<Access::keep>(p + j);
      FF_UNROLL for (int k = 0; k < Vector<T>::kSize; ++k) w[j + k] = part.x[k];
    }
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) w[k] = k < left ? p[k] : T{};
  }
}

// Of a lane that begins at an element of the whole weight.
template <class T>
__device__ __forceinline__ void lane_keys(const PruneCall& a, int64_t at, const Lane<T>& w,
                                          Lane<Key<T>>& key) {
  using A = Accumulator<T>;
  if (!a.norm) {
    FF_UNROLL for (int k = 0; k < kLane; ++k) key[k] = key_of<T>(to_accumulator(w[k]));
    return;
  }
  const A* norm = static_cast<const A*>(a.norm.data);
  int64_t column = at % a.columns;
  Lane<A> scale;
  if (a.norm_aligned) {
    load_lane(norm + column, kLane, true, scale);
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      scale[k] = norm[column];
      column = column + 1 == a.columns ? 0 : column + 1;
    }
  }
  FF_UNROLL for (int k = 0; k < kLane; ++k) key[k] = key_of<T>(to_accumulator(w[k]) * scale[k]);
}

template <class T> __device__ __forceinline__ Key<T> key_at(const PruneCall& a, int64_t at) {
  Accumulator<T> score = to_accumulator(static_cast<const T*>(a.weight)[at]);
  if (a.norm) score *= static_cast<const Accumulator<T>*>(a.norm.data)[at % a.columns];
  return key_of<T>(score);
}

// f(place in the range, elements of a lane, their keys) for the tile that begins at a place of the
// range, whose first element is `first`. A thread's loads are all under way before it looks at one.
template <class T, class F>
__device__ __forceinline__ void walk_tile(const PruneCall& a, int64_t first, int64_t begin, F f) {
  const T* p = static_cast<const T*>(a.weight) + first;
  T w[kSteps][kLane];
  const int64_t place = begin + static_cast<int64_t>(threadIdx.x) * kLane;
  FF_UNROLL for (int s = 0; s < kSteps; ++s) {
    const int64_t i = place + s * kThreads * kLane;
    load_lane(p + i, a.length - i, a.aligned, w[s]);
  }
  FF_UNROLL for (int s = 0; s < kSteps; ++s) {
    const int64_t i = place + s * kThreads * kLane;
    if (i >= a.length) break;
    Lane<Key<T>> key;
    lane_keys<T>(a, first + i, w[s], key);
    f(i, w[s], key);
  }
}

// What is kept of a lane, a bit an element, goes to the mask and to the weight.
template <class T>
__device__ __forceinline__ void write_lane(const PruneCall& a, int64_t at, int64_t left,
                                           uint32_t kept, Lane<T>& w) {
  if (a.mask != nullptr) {
    uint8_t* mask = a.mask + at;
    if (a.mask_aligned && left >= kLane) {
      // a bit to the lowest of each byte
      const auto spread = [](uint32_t bits) { return (bits * 0x00204081u) & 0x01010101u; };
      *reinterpret_cast<uint2*>(mask) = {spread(kept & 15), spread(kept >> 4 & 15)};
    } else {
      FF_UNROLL for (int k = 0; k < kLane; ++k) {
        if (k < left) mask[k] = static_cast<uint8_t>(kept >> k & 1);
      }
    }
  }
  if (!a.zero || kept == (1u << kLane) - 1) return;
  T* p = static_cast<T*>(a.weight) + at;
  if (a.aligned && left >= kLane) {
    FF_UNROLL for (int j = 0; j < kLane; j += Vector<T>::kSize) {
      Vector<T> part;
      FF_UNROLL for (int k = 0; k < Vector<T>::kSize; ++k) {
        part.x[k] = kept >> (j + k) & 1 ? w[j + k] : T{};
      }
      store(p + j, part);
    }
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      if (k < left && !(kept >> k & 1)) p[k] = T{};
    }
  }
}

template <class T>
__device__ __forceinline__ void apply_tile(const PruneCall& a, int64_t first, int64_t begin,
                                           Key<T> threshold, int64_t last) {
  walk_tile<T>(a, first, begin, [&](int64_t i, Lane<T>& w, const Lane<Key<T>>& key) {
    uint32_t kept = 0;
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      const bool keep = key[k] > threshold || (key[k] == threshold && i + k > last);
      kept |= static_cast<uint32_t>(keep) << k;
    }
    write_lane<T>(a, first + i, a.length - i, kept, w);
  });
}

// ---- steps of a selection, by a block ----------------------------------------------------------

template <class T>
__device__ __forceinline__ void count_tile(const PruneCall& a, int64_t first, int64_t begin,
                                           Key<T> prefix, int top, int shift, uint32_t* bins) {
  const uint32_t digits = (1u << (top - shift)) - 1;
  walk_tile<T>(a, first, begin, [&](int64_t i, const Lane<T>&, const Lane<Key<T>>& key) {
    FF_UNROLL for (int k = 0; k < kLane; ++k) {
      if (i + k < a.length && (key[k] ^ prefix) >> top == 0) {
        atomicAdd(&bins[static_cast<uint32_t>(key[k] >> shift) & digits], 1u);
      }
    }
  });
}

// The bin that holds element number `rest`, counted from 1: its digit is added to the key, what is
// before it is taken off the rest. All threads have counted before; all know the result after.
template <class C> __device__ inline void pick(const C* bins, int shift, Selection& s) {
  constexpr int kEach = kPruneBins / kThreads;
  __shared__ int64_t totals[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rest = s.rest;
  int64_t sum = 0;
  for (int k = 0; k < kEach; ++k) sum += static_cast<int64_t>(bins[threadIdx.x * kEach + k]);
  int64_t before = sum;  // with its own, until they are taken off
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) totals[warp] = before;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += totals[w];
  if (before < rest && rest <= before + sum) {
    int bin = static_cast<int>(threadIdx.x) * kEach;
    while (before + static_cast<int64_t>(bins[bin]) < rest) {
      before += static_cast<int64_t>(bins[bin++]);
    }
    s.key |= static_cast<uint64_t>(bin) << shift;
    s.equal = static_cast<int64_t>(bins[bin]);
    s.rest = rest - before;
  }
  __syncthreads();
}

// The first i of [begin, end) by which `rest` have been counted; what is left of the rest there.
// The warps count a part each, and all go on in the part that has it.
template <class F>
__device__ inline int64_t narrow(int64_t begin, int64_t end, int64_t& rest, F count) {
  __shared__ int64_t counted[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  while (end - begin > 1) {
    const int64_t part = (end - begin + kWarps - 1) / kWarps, from = begin + warp * part;
    const int64_t to = from + part < end ? from + part : end;
    int64_t sum = 0;
    for (int64_t i = from + lane; i < to; i += 32) sum += count(i);
    sum = warp_sum(sum);
    if (lane == 0) counted[warp] = sum;
    __syncthreads();
    int w = 0;
    for (; w < kWarps - 1 && counted[w] < rest; ++w) rest -= counted[w];
    begin += w * part;
    end = begin + part < end ? begin + part : end;
    __syncthreads();
  }
  return begin;
}

// ---- tensor ------------------------------------------------------------------------------------

// Until something is counted all are kept or, if all go, none.
__global__ void __launch_bounds__(kThreads) prune_begin_kernel(const PruneCall a) {
  Workspace& w = workspace_of(a);
  for (int i = threadIdx.x; i < kPruneBins; i += kThreads) w.bins[i] = 0;
  if (threadIdx.x == 0) w.selection = {a.drop < a.length ? 0 : ~uint64_t{0}, a.drop, 0, -1};
}

template <class T>
__global__ void __launch_bounds__(kThreads) prune_histogram_kernel(const PruneCall a) {
  __shared__ uint32_t bins[kPruneBins];
  Workspace& w = workspace_of(a);
  for (int i = threadIdx.x; i < kPruneBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Key<T> prefix = static_cast<Key<T>>(w.selection.key);
  for (int64_t begin = blockIdx.x * kPruneTile; begin < a.length; begin += gridDim.x * kPruneTile) {
    count_tile<T>(a, a.first, begin, prefix, a.top, a.shift, bins);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPruneBins; i += kThreads) {
    if (bins[i] != 0) atomicAdd(&w.bins[i], static_cast<unsigned long long>(bins[i]));
  }
}

__global__ void __launch_bounds__(kThreads) prune_pick_kernel(const PruneCall a) {
  Workspace& w = workspace_of(a);
  pick(w.bins, a.shift, w.selection);
  for (int i = threadIdx.x; i < kPruneBins; i += kThreads) w.bins[i] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads) prune_ties_kernel(const PruneCall a) {
  __shared__ int64_t counted[kWarps];
  const Selection& s = workspace_of(a).selection;
  if (s.rest == s.equal) return;
  const Key<T> threshold = static_cast<Key<T>>(s.key);
  int64_t sum = 0;
  walk_tile<T>(a, a.first, blockIdx.x * kPruneTile,
               [&](int64_t i, const Lane<T>&, const Lane<Key<T>>& key) {
                 FF_UNROLL for (int k = 0; k < kLane; ++k) {
                   sum += i + k < a.length && key[k] == threshold;
                 }
               });
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) counted[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += counted[w];
    workspace_of(a).ties()[blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) prune_last_kernel(const PruneCall a) {
  Selection& s = workspace_of(a).selection;
  int64_t last = a.length, rest = s.rest;
  if (rest != s.equal) {
    const Key<T> threshold = static_cast<Key<T>>(s.key);
    const int64_t tiles = ceil_div(a.length, kPruneTile);
    const int64_t* ties = workspace_of(a).ties();
    const int64_t begin = narrow(0, tiles, rest, [&](int64_t t) { return ties[t]; }) * kPruneTile;
    const int64_t end = begin + kPruneTile < a.length ? begin + kPruneTile : a.length;
    last = narrow(begin, end, rest, [&](int64_t i) {
      return static_cast<int64_t>(key_at<T>(a, a.first + i) == threshold);
    });
  }
  if (threadIdx.x == 0) s.last = last;
}

template <class T>
__global__ void __launch_bounds__(kThreads) prune_apply_kernel(const PruneCall a) {
  const Selection& s = workspace_of(a).selection;
  apply_tile<T>(a, a.first, blockIdx.x * kPruneTile, static_cast<Key<T>>(s.key), s.last);
}

// Of one range.
template <class T> void select(PruneCall a) {
  const int64_t tiles = ceil_div(a.length, kPruneTile);
  a.aligned = is_aligned(static_cast<const T*>(a.weight) + a.first, 16);
  a.mask_aligned = is_aligned(a.mask + a.first, 8);
  a.norm_aligned =
      a.norm_aligned && a.columns % kLane == 0 && a.first % kLane == 0 && a.length % kLane == 0;
  launch(prune_begin_kernel, 1, kThreads, 0, a);
  if (a.drop > 0 && a.drop < a.length) {
    for (a.top = KeyOf<T>::kBits; a.top > a.lowest; a.top = a.shift) {
      a.shift = a.top - kDigit > a.lowest ? a.top - kDigit : a.lowest;
      launch(prune_histogram_kernel<T>, tiles < kCountingBlocks ? tiles : kCountingBlocks, kThreads,
             0, a);
      launch(prune_pick_kernel, 1, kThreads, 0, a);
    }
    launch(prune_ties_kernel<T>, tiles, kThreads, 0, a);
    launch(prune_last_kernel<T>, 1, kThreads, 0, a);
  }
  launch(prune_apply_kernel<T>, tiles, kThreads, 0, a);
}

// ---- row ---------------------------------------------------------------------------------------

// Of ranges that follow each other: rows, or long groups.
template <class T> __global__ void __launch_bounds__(kThreads) prune_row_kernel(const PruneCall a) {
  __shared__ uint32_t bins[kPruneBins];
  __shared__ Selection s;
  const int64_t first = blockIdx.x * a.length;
  if (threadIdx.x == 0) {
    s.key = 0;
    s.rest = a.drop;
  }
  for (int top = KeyOf<T>::kBits, shift; top > a.lowest; top = shift) {
    shift = top - kDigit > a.lowest ? top - kDigit : a.lowest;
    for (int i = threadIdx.x; i < kPruneBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    const Key<T> prefix = static_cast<Key<T>>(s.key);
    for (int64_t begin = 0; begin < a.length; begin += kPruneTile) {
      count_tile<T>(a, first, begin, prefix, top, shift, bins);
    }
    __syncthreads();
    pick(bins, shift, s);
  }
  const Key<T> threshold = static_cast<Key<T>>(s.key);
  int64_t last = a.length, rest = s.rest;
  if (rest != s.equal) {
    last = narrow(0, a.length, rest, [&](int64_t i) {
      return static_cast<int64_t>(key_at<T>(a, first + i) == threshold);
    });
  }
  for (int64_t begin = 0; begin < a.length; begin += kPruneTile) {
    apply_tile<T>(a, first, begin, threshold, last);
  }
}

template <class T> void prune_rows(PruneCall a) {
  const int64_t count = a.rows * a.columns, ranges = count / a.length;
  if (ranges == 1 || a.length >= kLongestRow || (ranges <= kFewRows && a.length >= kLongRow)) {
    for (; a.first < count; a.first += a.length) select<T>(a);
    return;
  }
  const bool whole = a.length % kLane == 0;
  a.aligned = whole && is_aligned(a.weight, 16);
  a.mask_aligned = whole && is_aligned(a.mask, 8);
  a.norm_aligned = a.norm_aligned && whole;
  launch(prune_row_kernel<T>, ranges, kThreads, 0, a);
}

// ---- group -------------------------------------------------------------------------------------

// Of each pair the one goes first whose key is lower, or whose place is.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) prune_group_kernel(const PruneCall a) {
  walk_tile<T>(a, 0, blockIdx.x * kPruneTile, [&](int64_t i, Lane<T>& w, const Lane<Key<T>>& key) {
    uint32_t kept = 0;
    FF_UNROLL for (int g = 0; g < kLane; g += kGroup) {
      int before[kGroup] = {};
      FF_UNROLL for (int k = 1; k < kGroup; ++k) {
        FF_UNROLL for (int j = 0; j < k; ++j) {
          const bool swapped = key[g + k] < key[g + j];
          before[j] += swapped;
          before[k] += !swapped;
        }
      }
      FF_UNROLL for (int k = 0; k < kGroup; ++k) {
        kept |= static_cast<uint32_t>(before[k] >= a.drop) << (g + k);
      }
    }
    write_lane<T>(a, i, a.length - i, kept, w);
  });
}

// Groups of any length up to kPairs, as many as a block has threads for.
template <class T>
__global__ void __launch_bounds__(kThreads) prune_pairs_kernel(const PruneCall a) {
  __shared__ Key<T> keys[kThreads];
  const int group = static_cast<int>(a.group), together = kThreads / group * group;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * together, i = first + threadIdx.x;
  const int own = threadIdx.x;
  const bool inside = own < together && i < a.length;
  if (inside) keys[own] = key_at<T>(a, i);
  __syncthreads();
  if (!inside) return;
  const Key<T> key = keys[own];
  const int begin = own / group * group;
  int before = 0;
  for (int j = begin; j < own; ++j) before += keys[j] <= key;
  for (int j = own + 1; j < begin + group; ++j) before += keys[j] < key;
  const bool keep = before >= a.drop;
  if (a.mask != nullptr) a.mask[i] = keep;
  if (a.zero && !keep) static_cast<T*>(a.weight)[i] = T{};
}

template <class T> void prune_groups(PruneCall a) {
  a.length = a.rows * a.columns;
  a.aligned = is_aligned(a.weight, 16);
  a.mask_aligned = is_aligned(a.mask, 8);
  a.norm_aligned = a.norm_aligned && a.columns % kLane == 0;
  const int64_t tiles = ceil_div(a.length, kPruneTile), together = kThreads / a.group * a.group;
  switch (a.group) {
    case 4: return launch(prune_group_kernel<T, 4>, tiles, kThreads, 0, a);
    case 8: return launch(prune_group_kernel<T, 8>, tiles, kThreads, 0, a);
    default: launch(prune_pairs_kernel<T>, ceil_div(a.length, together), kThreads, 0, a);
  }
}

template <class T> void prune(const Prune& p) {
  PruneCall a{p};
  const int64_t count = p.rows * p.columns;
  if (count == 0 || (p.mask == nullptr && (!p.zero || p.drop == 0))) return;
  a.lowest = lowest_bit<T>(static_cast<bool>(p.norm));
  a.norm_aligned = is_aligned(p.norm.data, 16);
  a.length = p.scope == PruneScope::tensor ? count
             : p.scope == PruneScope::row  ? p.columns
                                           : p.group;
  if (p.drop == 0 || p.drop >= a.length) {  // of all ranges at once
    a.drop = p.drop == 0 ? 0 : count;
    a.length = count;
    select<T>(a);
  } else if (p.scope == PruneScope::group && p.group <= kPairs) {
    prune_groups<T>(a);
  } else {
    prune_rows<T>(a);
  }
}

// ---- packed codes ------------------------------------------------------------------------------

struct PruneCodesCall : PruneCodes {
  bool vectors;  // the mask to 8 bytes, the codes to what 8 of them take
};

// Eight codes, whole bytes of any number of bits, a thread.
template <int kBits>
__global__ void __launch_bounds__(kThreads) prune_codes_kernel(const PruneCodesCall a) {
  const int64_t lane = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t left = a.count - lane * kLane;
  if (left <= 0) return;
  const uint8_t* mask = a.mask + lane * kLane;
  Lane<uint8_t> kept;
  if (a.vectors && left >= kLane) {
    const uint2 v = *reinterpret_cast<const uint2*>(mask);
    memcpy(kept, &v, kLane);
  } else {
    FF_UNROLL for (int k = 0; k < kLane; ++k) kept[k] = k < left ? mask[k] : 1;
  }
  // the bits that change, and what they become: the first code in the highest bits
  constexpr uint64_t code = (1u << kBits) - 1;
  uint64_t changed = 0, zeros = 0;
  FF_UNROLL for (int k = 0; k < kLane; ++k) {
    changed = changed << kBits | (kept[k] == 0 ? code : 0);
    zeros = zeros << kBits | static_cast<uint64_t>(a.zero);
  }
  if (changed == 0) return;
  uint8_t* p = a.codes + lane * kBits;
  FF_UNROLL for (int b = 0; b < kBits; ++b) {
    const int shift = 8 * (kBits - 1 - b);
    const uint8_t those = static_cast<uint8_t>(changed >> shift);
    if (those != 0) p[b] = static_cast<uint8_t>((p[b] & ~those) | (zeros >> shift & those));
  }
}

template <int kBits> void prune_codes(const PruneCodes& p) {
  const PruneCodesCall a{p, is_aligned(p.mask, 8)};
  launch(prune_codes_kernel<kBits>, ceil_div(ceil_div(p.count, kLane), kThreads), kThreads, 0, a);
}

}  // namespace

void run(const Prune& a) {
  by_dtype(a.dtype, [&]<class T>(T) { prune<T>(a); });
}

void run(const PruneCodes& a) {
  switch (a.bits) {
    case 2: return prune_codes<2>(a);
    case 3: return prune_codes<3>(a);
    case 4: return prune_codes<4>(a);
    case 8: return prune_codes<8>(a);
  }
}

}  // namespace finefuse::cuda
