// clang-format off
// Pruning on the CPU: the k-th smallest score is found, not sorted for.
//
//   scope     reads + writes an element of T          bound by
//   tensor    2 (or more) sizeof(T) + 1               memory; counting digits
//   row       sizeof(T) + 1, a row in cache           counting digits
//   group     sizeof(T) + 1                           comparisons
//
// clang-format on
// A score is compared by its bits, an integer of which the order is the score's: without the sign,
// and no NaN above the one that stands for all of them.
#include "ops/prune.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kChunk = 4096;            // elements whose bits and marks lie in the L1 cache
constexpr int64_t kStreamBytes = 16 << 20;  // masks beyond are written past the caches
constexpr int64_t kSmallGroup = 32;         // up to so many an element's place is counted
constexpr int64_t kAll = int64_t{1} << 62;
constexpr int kDigit = 11;  // bits counted at a time

FF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The bits of scores: K is int16_t for bfloat16 and float16, int32_t for float32 and for scores
// with a norm, int64_t for float64.
template <class K> inline constexpr int kKeyBits = 8 * sizeof(K) - 1;
template <class K> inline constexpr K kMagnitude = static_cast<K>((uint64_t{1} << kKeyBits<K>)-1);

template <class K> FF_INLINE K key_of(K bits, K nan) {
  const K key = bits & kMagnitude<K>;
  return key < nan ? key : nan;
}

template <class K> K nan_key(const Prune& a) {
  if constexpr (sizeof(K) == 8) return 0x7ff0000000000001;
  if constexpr (sizeof(K) == 4) return 0x7f800001;
  return a.dtype == DType::bf16 ? 0x7f81 : 0x7c01;
}

template <class T>
void products(const T* weight, const Accumulator<T>* norm, int64_t n, Accumulator<T>* out) {
  constexpr int kWide = kLanes<T>;
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(out + i, load(weight + i) * load(norm + i));
  if (i < n) {
    const int k = static_cast<int>(n - i);
    store_partial(out + i, load_partial(weight + i, k, 0) * load_partial(norm + i, k, 0), k);
  }
}

template <class T> void products_of(const Prune& a, int64_t begin, int64_t n, void* out) {
  const T* weight = static_cast<const T*>(a.weight) + begin;
  const auto* norm = static_cast<const Accumulator<T>*>(a.norm.data);
  auto* to = static_cast<Accumulator<T>*>(out);
  int64_t column = begin % a.columns;
  for (int64_t i = 0; i < n; column = 0) {
    const int64_t some = smaller(n - i, a.columns - column);
    products(weight + i, norm + column, some, to + i);
    i += some;
  }
}

// The bits of n <= kChunk scores from element `begin` on; signs are still there.
template <class K> const K* bits_of(const Prune& a, int64_t begin, int64_t n, K* buffer) {
  if (!a.norm) return static_cast<const K*>(a.weight) + begin;
  if (a.dtype == DType::f32) products_of<float>(a, begin, n, buffer);
  if (a.dtype == DType::bf16) products_of<bf16>(a, begin, n, buffer);
  if (a.dtype == DType::f16) products_of<f16>(a, begin, n, buffer);
  if (a.dtype == DType::f64) products_of<double>(a, begin, n, buffer);
  return buffer;
}

// Elements [begin, begin + count), among which one selects.
struct Span {
  int64_t begin, count;
};

// Scores below `key` go, and of the `equal` ones that have it the first `ties`.
template <class K> struct Cut {
  K key;
  int64_t ties, equal;
};

// Calls body(index) for each element whose byte is not 0, in order, until it returns false.
template <class Body> FF_INLINE void each_set(const uint8_t* bytes, int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += 8) {  // bytes are 0 or 1, and 0 up to the next multiple of 8
    uint64_t word;
    __builtin_memcpy(&word, bytes + i, 8);
    for (; word != 0; word &= word - 1) {
      if (!body(i + (__builtin_ctzll(word) >> 3))) return;
    }
  }
}

// The number of the bucket that holds element `rank` of all, and its rank there.
template <class Count> int bucket_of(const Count* counts, int buckets, int64_t* rank) {
  int b = 0;
  for (; b + 64 <= buckets; b += 64) {
    int64_t sum = 0;
    for (int i = 0; i < 64; ++i) sum += counts[b + i];
    if (*rank < sum) break;
    *rank -= sum;
  }
  for (; *rank >= counts[b]; ++b) *rank -= counts[b];
  return b;
}

// The element of rank `rank` (from 0) of a few keys, which agree above their lowest `left` bits.
template <class K> Cut<K> select_few(K* keys, int64_t n, int64_t rank, int left) {
  uint32_t counts[2][1 << kDigit];
  while (left > 0 && n > 1) {
    const int digit = n >= 1024 ? kDigit : n >= 128 ? 8 : 5;
    const int width = digit < left ? digit : left, shift = left - width;
    const int buckets = 1 << width;
    const K low = static_cast<K>(buckets - 1);
    __builtin_memset(counts[0], 0, sizeof(uint32_t) * buckets);
    __builtin_memset(counts[1], 0, sizeof(uint32_t) * buckets);
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {  // two of each: an increment waits for the one before it
      ++counts[0][keys[i] >> shift & low];
      ++counts[1][keys[i + 1] >> shift & low];
    }
    if (i < n) ++counts[0][keys[i] >> shift & low];
    for (int b = 0; b < buckets; ++b) counts[0][b] += counts[1][b];
    const int found = bucket_of(counts[0], buckets, &rank);
    if (counts[0][found] < n) {
      int64_t kept = 0;
      for (i = 0; i < n; ++i) {
        keys[kept] = keys[i];
        kept += (keys[i] >> shift & low) == found;
      }
      n = kept;
    }
    left = shift;
  }
  return {keys[0], rank + 1, n};
}

// Digit after digit from the top, counted over the whole span again until those that are left fit
// into a buffer.
template <class K> Cut<K> select(const Prune& a, Span s, int64_t drop, int threads) {
  const K nan = nan_key<K>(a);
  const int64_t chunks = (s.count + kChunk - 1) / kChunk;
  alignas(64) K few[kChunk];
  int64_t rank = drop - 1, bucket = s.count;
  int left = kKeyBits<K>;
  K prefix = 0;
  while (left > 0 && bucket > kChunk) {
    const int width = kDigit < left ? kDigit : left, shift = left - width;
    int64_t counts[1 << kDigit] = {};
    parallel_for(chunks, kChunk * sizeof(K), threads, [&](int64_t first, int64_t last) {
      uint32_t local[2][1 << kDigit] = {};
      constexpr K kLow = (1 << kDigit) - 1;
      const K low = static_cast<K>((1 << width) - 1);
      int64_t seen = 0;
      const auto add = [&] {
        for (int b = 0; b < 1 << width; ++b) {
          const int64_t sum = int64_t{local[0][b]} + local[1][b];
          if (sum != 0) __atomic_fetch_add(&counts[b], sum, __ATOMIC_RELAXED);
          local[0][b] = local[1][b] = 0;
        }
        seen = 0;
      };
      for (int64_t c = first; c < last; ++c) {
        alignas(64) K buffer[kChunk];
        const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
        const K* bits = bits_of(a, s.begin + begin, n, buffer);
        if (left == kKeyBits<K>) {
          alignas(64) uint16_t digits[kChunk];
          for (int64_t i = 0; i < n; ++i) {
            digits[i] =
                static_cast<uint16_t>(key_of(bits[i], nan) >> (kKeyBits<K> - kDigit) & kLow);
          }
          int64_t i = 0;
          for (; i + 2 <= n; i += 2) {
            ++local[0][digits[i]];
            ++local[1][digits[i + 1]];
          }
          if (i < n) ++local[0][digits[i]];
        } else {
          for (int64_t i = 0; i < n; ++i) {
            const K key = key_of(bits[i], nan);
            if (key >> left == prefix) ++local[i & 1][key >> shift & low];
          }
        }
        seen += n;
        if (seen >= int64_t{1} << 31) add();
      }
      add();
    });
    const int found = bucket_of(counts, 1 << width, &rank);
    bucket = counts[found];
    prefix = static_cast<K>(prefix << width | found);
    left = shift;
  }
  if (left == 0) return {prefix, rank + 1, bucket};
  int64_t kept = 0;
  parallel_for(chunks, kChunk * sizeof(K), threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      alignas(64) K buffer[kChunk];
      const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
      const K* bits = bits_of(a, s.begin + begin, n, buffer);
      if (left == kKeyBits<K>) {  // all of them, in one chunk
        for (int64_t i = 0; i < n; ++i) few[i] = key_of(bits[i], nan);
        kept = n;
        continue;
      }
      alignas(64) uint8_t inside[kChunk + 8];
      __builtin_memset(inside + n, 0, 8);
      for (int64_t i = 0; i < n; ++i) inside[i] = key_of(bits[i], nan) >> left == prefix;
      each_set(inside, n, [&](int64_t i) {
        few[__atomic_fetch_add(&kept, 1, __ATOMIC_RELAXED)] = key_of(bits[i], nan);
        return true;
      });
    }
  });
  return select_few(few, kept, rank, left);
}

// ---- what is kept -------------------------------------------------------------------------------

// 1 where an element stays; the first `quota` of those with the cut's key go. Returns how many did.
template <class K>
int64_t mark(const K* bits, int64_t n, K nan, K key, int64_t quota, uint8_t* keep) {
  if (quota == kAll) {
    for (int64_t i = 0; i < n; ++i) keep[i] = key_of(bits[i], nan) > key;
    return 0;
  }
  for (int64_t i = 0; i < n; ++i) keep[i] = key_of(bits[i], nan) >= key;
  if (quota == 0) return 0;
  alignas(64) uint8_t equal[kChunk + 8];
  __builtin_memset(equal + n, 0, 8);
  for (int64_t i = 0; i < n; ++i) equal[i] = key_of(bits[i], nan) == key;
  int64_t gone = 0;
  each_set(equal, n, [&](int64_t i) {
    keep[i] = 0;
    return ++gone < quota;
  });
  return gone;
}

// What is kept stays, bits for bits; the rest becomes +0.
template <class U, class S> void zero(void* weight, const uint8_t* keep, int64_t n) {
  U* bits = static_cast<U*>(weight);
  for (int64_t i = 0; i < n; ++i) {
    bits[i] &= static_cast<U>(-static_cast<S>(keep[i]));
  }
}

void copy_past_caches(uint8_t* to, const uint8_t* from, int64_t n) {
  int64_t i = -reinterpret_cast<uintptr_t>(to) & (kStreamAlign - 1);
  if (i > n) i = n;
  __builtin_memcpy(to, from, static_cast<size_t>(i));
  for (; i + kStreamAlign <= n; i += kStreamAlign) {
    VecU v;
    __builtin_memcpy(&v, from + i, sizeof v);
    store_bytes<true>(to + i, v);
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(n - i));
}

// To the mask and the weight.
void emit(const Prune& a, int64_t begin, int64_t n, const uint8_t* keep) {
  if (a.mask != nullptr) {
    if (a.rows * a.columns >= kStreamBytes) {
      copy_past_caches(a.mask + begin, keep, n);
    } else {
      __builtin_memcpy(a.mask + begin, keep, static_cast<size_t>(n));
    }
  }
  if (!a.zero) return;
  if (a.dtype == DType::f32) {
    zero<uint32_t, int32_t>(static_cast<uint32_t*>(a.weight) + begin, keep, n);
  } else if (a.dtype == DType::f64) {
    zero<uint64_t, int64_t>(static_cast<uint64_t*>(a.weight) + begin, keep, n);
  } else {
    zero<uint16_t, int16_t>(static_cast<uint16_t*>(a.weight) + begin, keep, n);
  }
}

template <class K> void drop_in_turn(const Prune& a, Span s, Cut<K> cut) {
  const K nan = nan_key<K>(a);
  alignas(64) K buffer[kChunk];
  alignas(64) uint8_t keep[kChunk];
  int64_t quota = cut.ties == cut.equal ? kAll : cut.ties;
  for (int64_t i = 0; i < s.count; i += kChunk) {
    const int64_t n = smaller(kChunk, s.count - i);
    const int64_t gone = mark(bits_of(a, s.begin + i, n, buffer), n, nan, cut.key, quota, keep);
    quota -= gone;
    emit(a, s.begin + i, n, keep);
  }
}

template <class K> void drop_all_at_once(const Prune& a, Span s, Cut<K> cut) {
  const K nan = nan_key<K>(a);
  const int64_t chunks = (s.count + kChunk - 1) / kChunk;
  const bool some = cut.ties < cut.equal;
  auto* quotas = static_cast<int32_t*>(a.workspace);  // how many of a chunk's ties go
  if (some) {
    parallel_for(chunks, kChunk * sizeof(K), a.place.threads, [&](int64_t first, int64_t last) {
      alignas(64) K buffer[kChunk];
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
        const K* bits = bits_of(a, s.begin + begin, n, buffer);
        int32_t equal = 0;
        for (int64_t i = 0; i < n; ++i) equal += key_of(bits[i], nan) == cut.key;
        quotas[c] = equal;
      }
    });
    int64_t left = cut.ties;
    for (int64_t c = 0; c < chunks; ++c) {
      quotas[c] = static_cast<int32_t>(smaller(quotas[c], left));
      left -= quotas[c];
    }
  }
  parallel_for(chunks, kChunk * (sizeof(K) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) K buffer[kChunk];
    alignas(64) uint8_t keep[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
      const K* bits = bits_of(a, s.begin + begin, n, buffer);
      mark(bits, n, nan, cut.key, some ? quotas[c] : kAll, keep);
      emit(a, s.begin + begin, n, keep);
    }
  });
}

void keep_alike(const Prune& a, uint8_t value) {
  const int64_t count = a.rows * a.columns;
  parallel_for(count, 1 + (a.zero ? 8 : 0), a.place.threads, [&](int64_t begin, int64_t end) {
    uint8_t keep[kChunk];
    __builtin_memset(keep, value, kChunk);
    for (; begin < end; begin += kChunk) emit(a, begin, smaller(kChunk, end - begin), keep);
  });
}

// ---- spans and groups ---------------------------------------------------------------------------

template <class K> void spans(const Prune& a, int64_t length) {
  const int64_t count = a.rows * a.columns / length;
  const int threads = a.place.threads;
  if (count < 4 * threads && length >= kChunk) {  // one after another, all threads on each
    for (int64_t i = 0; i < count; ++i) {
      const Span s{i * length, length};
      drop_all_at_once(a, s, select<K>(a, s, a.drop, threads));
    }
    return;
  }
  parallel_for(count, length * sizeof(K), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Span s{i * length, length};
      drop_in_turn(a, s, select<K>(a, s, a.drop, 1));
    }
  });
}

// Of each `size` neighbours the place among them is counted: how many are smaller or, at a lower
// index, equal.
template <class K> void groups(const Prune& a, int64_t size) {
  const K nan = nan_key<K>(a);
  const int64_t step = kChunk / size * size, total = a.rows * a.columns;
  parallel_for((total + step - 1) / step, step * (sizeof(K) + 1), a.place.threads,
               [&](int64_t first, int64_t last) {
                 alignas(64) K buffer[kChunk];
                 alignas(64) uint8_t keep[kChunk];
                 for (int64_t c = first; c < last; ++c) {
                   const int64_t begin = c * step, n = smaller(step, total - begin);
                   const K* bits = bits_of(a, begin, n, buffer);
                   for (int64_t g = 0; g < n; g += size) {
                     K keys[kSmallGroup];
                     for (int64_t i = 0; i < size; ++i) keys[i] = key_of(bits[g + i], nan);
                     for (int64_t i = 0; i < size; ++i) {
                       int place = 0;
                       for (int64_t j = 0; j < size; ++j) {
                         place += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
                       }
                       keep[g + i] = place >= a.drop;
                     }
                   }
                   emit(a, begin, n, keep);
                 }
               });
}

template <class K> void run(const Prune& a) {
  const int64_t length = a.scope == PruneScope::tensor ? a.rows * a.columns
                         : a.scope == PruneScope::row  ? a.columns
                                                       : a.group;
  if (a.drop <= 0 || a.drop >= length) return keep_alike(a, a.drop <= 0);
  if (length <= kSmallGroup) return groups<K>(a, length);
  spans<K>(a, length);
}

void prune(const Prune& a) {
  const int64_t count = a.rows * a.columns;
  if (count == 0) return;
  if (a.mask != nullptr) advise_huge_pages(a.mask, static_cast<size_t>(count));
  if (a.dtype == DType::f64) return run<int64_t>(a);
  if (a.dtype == DType::f32 || a.norm) return run<int32_t>(a);
  run<int16_t>(a);
}

// ---- packed codes -------------------------------------------------------------------------------

// Codes of which `mask` is 0, most significant bits first, in groups of whole bytes.
template <int kBits> void zero_codes(const PruneCodes& a) {
  constexpr int kCodes = kBits == 3 ? 8 : 8 / kBits, kBytes = kBits == 3 ? 3 : 1;
  uint32_t zeros = 0;
  for (int i = 0; i < kCodes; ++i) zeros = zeros << kBits | static_cast<uint32_t>(a.zero);
  const auto group = [&](uint8_t* codes, const uint8_t* mask, int n) {
    uint32_t word = 0, gone = 0;
    for (int i = 0; i < kBytes; ++i) word = word << 8 | codes[i];
    for (int i = 0; i < n; ++i) {
      const uint32_t one = ((1u << kBits) - 1) << kBits * (kCodes - 1 - i);
      gone |= mask[i] ? 0 : one;
    }
    word = (word & ~gone) | (zeros & gone);
    for (int i = 0; i < kBytes; ++i) codes[i] = static_cast<uint8_t>(word >> 8 * (kBytes - 1 - i));
  };
  const int64_t whole = a.count / kCodes, rest = a.count % kCodes;
  parallel_for(whole, kCodes + 2 * kBytes, a.place.threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) group(a.codes + g * kBytes, a.mask + g * kCodes, kCodes);
  });
  if (rest != 0) group(a.codes + whole * kBytes, a.mask + whole * kCodes, static_cast<int>(rest));
}

void prune_codes(const PruneCodes& a) {
  if (a.bits == 2) zero_codes<2>(a);
  if (a.bits == 3) zero_codes<3>(a);
  if (a.bits == 4) zero_codes<4>(a);
  if (a.bits == 8) zero_codes<8>(a);
}

}  // namespace

const PruneKernels& prune_kernels() {
  static constexpr PruneKernels kernels{prune, prune_codes};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
