// Pruning on the CPU: the cut between what goes and what stays is found, not sorted for.
//
// clang-format off
//   scope                       reads + writes an element of T   bound by
//   tensor, from 2^18 on        sizeof(T) + 1 (zeroing: 3 sizeof(T))   memory, then telling candidates
//   tensor, no cut in a sample  4 to 8 sizeof(T) + 1             counting digits
//   row                         sizeof(T) + 1, a row in cache    telling candidates
//   group of 4 or 8             sizeof(T) + 1                    memory
//
// clang-format on
// Split into chunks, rows or groups, never by the number of threads; what is found depends on no
// guess.
// A score is compared by its bits, an integer of which the order is the score's: without the sign,
// and no NaN above the one that stands for all of them.
#include "ops/prune.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "core/sizes.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int64_t kChunk = kPruneChunk;  // elements whose bits and marks lie in the L1 cache
constexpr int64_t kSmallGroup = 32;      // up to so many an element's place is counted
constexpr int64_t kGuessed = 512;        // below, a row's own digits are as quick
constexpr int64_t kPad = 32;             // zeros behind marks
constexpr int64_t kAll = int64_t{1} << 62;
constexpr int kDigit = 11;  // bits counted at a time

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
  constexpr uint64_t kGather = 0x0102040810204080;  // the low bits of 8 bytes into the top byte
  for (int64_t i = 0; i < n; i += 32) {  // bytes are 0 or 1, and 0 up to the next multiple of 32
    uint64_t w[4];
    for (int j = 0; j < 4; ++j) __builtin_memcpy(&w[j], bytes + i + 8 * j, 8);
    if ((w[0] | w[1] | w[2] | w[3]) == 0) continue;
    uint32_t set = 0;
    for (int j = 0; j < 4; ++j) set |= static_cast<uint32_t>(w[j] * kGather >> 56) << 8 * j;
    for (; set != 0; set &= set - 1) {
      if (!body(i + __builtin_ctz(set))) return;
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

FF_INLINE int bits_up_to(int64_t most) {
  return 64 - __builtin_clzll(static_cast<uint64_t>(most) | 1);
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

// Digit after digit from the top of `top` bits, above which all agree, counted over the whole span
// again until those that are left fit into a buffer.
template <class K>
Cut<K> select(const Prune& a, Span s, int64_t drop, int threads, int top = kKeyBits<K>) {
  const K nan = nan_key<K>(a);
  const int64_t chunks = prune_chunks(s.count);
  alignas(64) K few[kChunk];
  int64_t rank = drop - 1, bucket = s.count;
  int left = top;
  K prefix = 0;
  while (left > 0 && bucket > kChunk) {
    const int width = kDigit < left ? kDigit : left, shift = left - width;
    int64_t counts[1 << kDigit] = {};
    parallel_for(chunks, kChunk * sizeof(K), threads, [&](int64_t first, int64_t last) {
      uint32_t local[2][1 << kDigit] = {};
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
        if (left == top) {
          alignas(64) uint16_t digits[kChunk];
          for (int64_t i = 0; i < n; ++i) {
            digits[i] = static_cast<uint16_t>(key_of(bits[i], nan) >> shift & low);
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
      if (left == top) {  // all of them, in one chunk
        for (int64_t i = 0; i < n; ++i) few[i] = key_of(bits[i], nan);
        kept = n;
        continue;
      }
      alignas(64) uint8_t inside[kChunk + kPad];
      __builtin_memset(inside + n, 0, kPad);
      for (int64_t i = 0; i < n; ++i) inside[i] = key_of(bits[i], nan) >> left == prefix;
      each_set(inside, n, [&](int64_t i) {
        few[__atomic_fetch_add(&kept, 1, __ATOMIC_RELAXED)] = key_of(bits[i], nan);
        return true;
      });
    }
  });
  return select_few(few, kept, rank, left);
}

// How many of n <= kChunk bytes, each 0 or 1, are 1; 0 up to the next multiple of 8.
FF_INLINE int64_t count_set(const uint8_t* bytes, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n;) {
    uint64_t eight = 0;
    for (const int64_t stop = smaller(n, i + 8 * 255); i < stop; i += 8) {
      uint64_t word;
      __builtin_memcpy(&word, bytes + i, 8);
      eight += word;
    }
    for (; eight != 0; eight >>= 8) sum += eight & 255;
  }
  return sum;
}

// 1 where a score is at least `low`, and where it is in [low, high]; how many are below, how many
// inside.
struct Bracketed {
  int64_t below, inside;
};
template <class K>
Bracketed bracket(const K* bits, int64_t n, K nan, K low, K high, uint8_t* keep, uint8_t* inside) {
  for (int64_t i = 0; i < n; ++i) {
    const K key = key_of(bits[i], nan);
    keep[i] = key >= low;
    inside[i] = (key >= low) & (key <= high);
  }
  __builtin_memset(keep + n, 0, kPad);
  __builtin_memset(inside + n, 0, kPad);
  return {n - count_set(keep, n), count_set(inside, n)};
}

// ---- rows: near the cut of the row before -------------------------------------------------------

// Where the next row's cut is looked for first; what is found does not depend on it.
template <class K> struct Guess {
  static constexpr int kMantissa = sizeof(K) == 8 ? 52 : sizeof(K) == 4 ? 23 : 7;
  static constexpr int64_t kLeast = sizeof(K) == 2 ? 2 : int64_t{1} << (kMantissa - 8);
  static constexpr int64_t kMost = int64_t{1} << (kMantissa - 1);
  int64_t key = -1, width = int64_t{1} << (kMantissa - 4);

  void update(K found, bool hit) {
    const int64_t off = key < 0 ? 0 : __builtin_llabs(found - key);
    if (key >= 0) width = hit ? width - width / 8 : 2 * width;
    if (width < 3 * off) width = 3 * off;
    if (width < kLeast) width = kLeast;
    if (width > kMost) width = kMost;
    key = found;
  }
};

template <class K>
bool select_near(const Prune& a, Span s, int64_t drop, const Guess<K>& guess, Cut<K>* cut) {
  if (guess.key < 0) return false;
  const K nan = nan_key<K>(a);
  const K low = guess.key > guess.width ? static_cast<K>(guess.key - guess.width) : K{0};
  const K high = static_cast<K>(smaller(guess.key + guess.width, nan));
  alignas(64) K buffer[kChunk], few[kChunk];
  alignas(64) uint8_t keep[kChunk + kPad], inside[kChunk + kPad];
  int64_t below = 0, kept = 0;
  for (int64_t i = 0; i < s.count; i += kChunk) {
    const int64_t n = smaller(kChunk, s.count - i);
    const K* bits = bits_of(a, s.begin + i, n, buffer);
    const Bracketed found = bracket(bits, n, nan, low, high, keep, inside);
    below += found.below;
    if (kept + found.inside > kChunk || below >= drop) return false;
    each_set(inside, n, [&](int64_t at) {
      few[kept++] = static_cast<K>(key_of(bits[at], nan) - low);
      return true;
    });
  }
  const int64_t rank = drop - 1 - below;
  if (rank >= kept) return false;
  *cut = select_few(few, kept, rank, bits_up_to(high - low));
  cut->key = static_cast<K>(cut->key + low);
  return true;
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
  alignas(64) uint8_t equal[kChunk + kPad];
  __builtin_memset(equal + n, 0, kPad);
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
  stream_fence();  // another thread may put the mask right
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

// ---- large spans, all threads on each -----------------------------------------------------------

template <class K> struct Scratch {
  PruneChunk* chunks;
  K* keys;           // of candidates, and before that of a sample
  uint16_t* places;  // in their chunk
  int64_t sample, capacity;
};

template <class K> Scratch<K> scratch_of(const Prune& a, int64_t count) {
  auto* chunks = static_cast<PruneChunk*>(a.workspace);
  K* keys = reinterpret_cast<K*>(chunks + prune_chunks(count));
  const int64_t root = prune_root(count), capacity = prune_capacity(count);
  return {chunks, keys, reinterpret_cast<uint16_t*>(keys + capacity), root * root / 4 * 4,
          capacity};
}

// Keys of which one selects as of the weight.
template <class K> Prune as_weight(const Prune& a, K* keys, int64_t count) {
  Prune of = a;
  of.weight = keys;
  if (sizeof(K) == 4) of.dtype = DType::f32;
  of.rows = 1;
  of.columns = count;
  of.norm.data = nullptr;
  return of;
}

// Two scores between which the cut is, but for one span in 10^4: from a sample, four elements of
// each stretch, 4 standard deviations of its rank to either side.
template <class K> void sampled_bounds(const Prune& a, Span s, Scratch<K> w, K* low, K* high) {
  constexpr int kRun = 4;  // in one line of a cache
  const K nan = nan_key<K>(a);
  const int64_t runs = w.sample / kRun, stretch = s.count / runs;
  parallel_for(runs, 64, a.place.threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint64_t mixed = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15 >> 32;
      const int64_t at = i * stretch + static_cast<int64_t>(mixed * (stretch - kRun) >> 32);
      K buffer[kRun] = {};
      const K* bits = bits_of(a, s.begin + at, kRun, buffer);
      for (int j = 0; j < kRun; ++j) w.keys[kRun * i + j] = key_of(bits[j], nan);
    }
  });
  const double share = static_cast<double>(a.drop) / static_cast<double>(s.count);
  const double size = static_cast<double>(w.sample);
  const double spread = 4 * __builtin_sqrt(size * share * (1 - share)) + 2;
  const auto from = static_cast<int64_t>(size * share - spread);
  const auto to = static_cast<int64_t>(size * share + spread);
  K* again = w.keys + w.sample;  // selecting changes them
  __builtin_memcpy(again, w.keys, sizeof(K) * static_cast<size_t>(w.sample));
  *low = from < 1 ? K{0} : select_few(w.keys, w.sample, from - 1, kKeyBits<K>).key;
  *high = to >= w.sample ? nan : select_few(again, w.sample, to - 1, kKeyBits<K>).key;
}

// The cut from the few elements within those bounds, and how many ties of each chunk go; the mask,
// if one is wanted, as if all of them were kept. False where the cut is not there or they are too
// many.
template <class K> bool narrow(const Prune& a, Span s, Scratch<K> w, Cut<K>* cut) {
  K low, high;
  sampled_bounds(a, s, w, &low, &high);
  const K nan = nan_key<K>(a);
  const int64_t chunks = prune_chunks(s.count);
  Prune only_mask = a;
  only_mask.zero = false;
  int64_t total = 0;
  parallel_for(chunks, kChunk * (sizeof(K) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) K buffer[kChunk];
    alignas(64) uint8_t keep[kChunk + kPad], inside[kChunk + kPad];
    for (int64_t c = first; c < last; ++c) {
      if (__atomic_load_n(&total, __ATOMIC_RELAXED) > w.capacity) return;
      const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
      const K* bits = bits_of(a, s.begin + begin, n, buffer);
      const Bracketed found = bracket(bits, n, nan, low, high, keep, inside);
      const int64_t at = __atomic_fetch_add(&total, found.inside, __ATOMIC_RELAXED);
      w.chunks[c] = {at, static_cast<int32_t>(found.inside), static_cast<int32_t>(found.below)};
      if (at + found.inside > w.capacity) return;
      K* keys = w.keys + at;
      uint16_t* places = w.places + at;
      each_set(inside, n, [&](int64_t i) {
        *keys++ = static_cast<K>(key_of(bits[i], nan) - low);
        *places++ = static_cast<uint16_t>(i);
        return true;
      });
      if (a.mask != nullptr) emit(only_mask, s.begin + begin, n, keep);
    }
  });
  if (total > w.capacity) return false;
  int64_t below = 0;
  for (int64_t c = 0; c < chunks; ++c) below += w.chunks[c].quota;
  const int64_t drop = a.drop - below;
  if (drop < 1 || drop > total) return false;
  *cut = select<K>(as_weight(a, w.keys, total), {0, total}, drop, a.place.threads,
                   bits_up_to(high - low));
  const bool some = cut->ties < cut->equal;
  int64_t left = cut->ties;
  for (int64_t c = 0; c < chunks; ++c) {
    int32_t equal = kChunk;
    if (some) {
      equal = 0;
      const K* keys = w.keys + w.chunks[c].first;
      for (int32_t i = 0; i < w.chunks[c].count; ++i) equal += keys[i] == cut->key;
      equal = static_cast<int32_t>(smaller(equal, left));
      left -= equal;
    }
    w.chunks[c].quota = equal;
  }
  if (a.mask == nullptr) {
    cut->key = static_cast<K>(cut->key + low);
    return true;
  }
  parallel_for(chunks, kChunk, a.place.threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const PruneChunk found = w.chunks[c];
      uint8_t* mask = a.mask + s.begin + c * kChunk;
      int32_t quota = found.quota;
      for (int64_t i = found.first; i < found.first + found.count; ++i) {
        const K key = w.keys[i];
        if (key < cut->key || (key == cut->key && quota-- > 0)) mask[w.places[i]] = 0;
      }
    }
  });
  cut->key = static_cast<K>(cut->key + low);
  return true;
}

// The same as `quota` above, from the whole span.
template <class K> void count_ties(const Prune& a, Span s, Scratch<K> w, Cut<K> cut) {
  const K nan = nan_key<K>(a);
  const int64_t chunks = prune_chunks(s.count);
  parallel_for(chunks, kChunk * sizeof(K), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) K buffer[kChunk];
    alignas(64) uint8_t equal[kChunk + kPad];
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
      const K* bits = bits_of(a, s.begin + begin, n, buffer);
      for (int64_t i = 0; i < n; ++i) equal[i] = key_of(bits[i], nan) == cut.key;
      __builtin_memset(equal + n, 0, kPad);
      w.chunks[c].quota = static_cast<int32_t>(count_set(equal, n));
    }
  });
  int64_t left = cut.ties;
  for (int64_t c = 0; c < chunks; ++c) {
    w.chunks[c].quota = static_cast<int32_t>(smaller(w.chunks[c].quota, left));
    left -= w.chunks[c].quota;
  }
}

template <class K> void drop_at_once(const Prune& a, Span s) {
  const K nan = nan_key<K>(a);
  const Scratch<K> w = scratch_of<K>(a, s.count);
  const int64_t chunks = prune_chunks(s.count);
  Prune rest = a;
  Cut<K> cut;
  if (w.sample > 0 && narrow(a, s, w, &cut)) {
    if (!a.zero) return;
    rest.mask = nullptr;
  } else {
    cut = select<K>(a, s, a.drop, a.place.threads);
    if (cut.ties < cut.equal) count_ties(a, s, w, cut);
  }
  const bool some = cut.ties < cut.equal;
  parallel_for(chunks, kChunk * (sizeof(K) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) K buffer[kChunk];
    alignas(64) uint8_t keep[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kChunk, n = smaller(kChunk, s.count - begin);
      const K* bits = bits_of(a, s.begin + begin, n, buffer);
      mark(bits, n, nan, cut.key, some ? w.chunks[c].quota : kAll, keep);
      emit(rest, s.begin + begin, n, keep);
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
      drop_at_once<K>(a, s);
    }
    return;
  }
  parallel_for(count, length * sizeof(K), threads, [&](int64_t first, int64_t last) {
    Guess<K> guess;
    for (int64_t i = first; i < last; ++i) {
      const Span s{i * length, length};
      Cut<K> cut;
      const bool hit = length >= kGuessed && select_near(a, s, a.drop, guess, &cut);
      if (!hit) cut = select<K>(a, s, a.drop, 1);
      guess.update(cut.key, hit);
      drop_in_turn(a, s, cut);
    }
  });
}

// Of each `size` neighbours the place among them is counted: how many are smaller or, at a lower
// index, equal.
template <class K> void places_of(const K* bits, int64_t n, K nan, int64_t size, K* places) {
  for (int64_t g = 0; g < n; g += size) {
    K keys[kSmallGroup];
    for (int64_t i = 0; i < size; ++i) keys[i] = key_of(bits[g + i], nan);
    for (int64_t i = 0; i < size; ++i) {
      int place = 0;
      for (int64_t j = 0; j < size; ++j) {
        place += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
      }
      places[g + i] = static_cast<K>(place);
    }
  }
}

template <int... kIndex> struct Lanes {};
template <int kCount, int... kIndex>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex> struct MakeLanes<0, kIndex...> {
  using type = Lanes<kIndex...>;
};

// Each group turned by kBy, and 1 where what came there has a lower index.
template <int kBy, int kSize, class V, int... kIndex>
FF_INLINE V compare_turned(V keys, Lanes<kIndex...>) {
  const V other = __builtin_shufflevector(
      keys, keys, ((kIndex & ~(kSize - 1)) | ((kIndex + kBy) & (kSize - 1)))...);
  const V lower = {(((kIndex + kBy) & (kSize - 1)) < (kIndex & (kSize - 1)))...};
  return other < keys + lower;  // -1 where it is smaller, or equal with a lower index
}

// The same for groups that divide a vector.
template <class K, int kSize, int... kBy>
void places_of(const K* bits, int64_t n, K nan, Lanes<kBy...>, K* places) {
  typedef K V __attribute__((vector_size(FF_VECTOR_BYTES)));
  constexpr int kWide = FF_VECTOR_BYTES / sizeof(K);
  using All = typename MakeLanes<kWide>::type;
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    V keys;
    __builtin_memcpy(&keys, bits + i, sizeof keys);
    keys &= kMagnitude<K>;
    keys = keys < nan ? keys : V{} + nan;
    const V place = -(compare_turned<kBy + 1, kSize>(keys, All{}) + ...);
    __builtin_memcpy(places + i, &place, sizeof place);
  }
  places_of(bits + i, n - i, nan, kSize, places + i);
}

template <class K> void groups(const Prune& a, int64_t size) {
  constexpr int kWide = FF_VECTOR_BYTES / sizeof(K);
  const K nan = nan_key<K>(a);
  const int64_t step = kChunk / size * size, total = a.rows * a.columns;
  const int64_t chunks = ceil_div(total, step);
  parallel_for(chunks, step * (sizeof(K) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) K buffer[kChunk], places[kChunk];
    alignas(64) uint8_t keep[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * step, n = smaller(step, total - begin);
      const K* bits = bits_of(a, begin, n, buffer);
      if (size == 4 && kWide >= 4) {
        places_of<K, kWide >= 4 ? 4 : 1>(bits, n, nan, Lanes<0, 1, 2>{}, places);
      } else if (size == 8 && kWide >= 8) {
        places_of<K, kWide >= 8 ? 8 : 1>(bits, n, nan, Lanes<0, 1, 2, 3, 4, 5, 6>{}, places);
      } else {
        places_of(bits, n, nan, size, places);
      }
      const K drop = static_cast<K>(a.drop);
      for (int64_t i = 0; i < n; ++i) keep[i] = places[i] >= drop;
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
