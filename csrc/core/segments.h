// Tokens of the sequences of a batch: the rows of a (segments, length) array, or what lies between
// two of `offsets` (data null: rows).
#pragma once
#include "core/dtype.h"

namespace finefuse {

struct TokenRange {
  int64_t begin, end;
};

// Those of segment i. Offsets were checked, but another thread of the caller may write them
// meanwhile: none leads out of [0, total).
FF_TABLE TokenRange tokens_of(const Indices& offsets, int64_t length, int64_t total, int64_t i) {
  if (offsets.data == nullptr) return {i * length, (i + 1) * length};
  const int64_t begin = offsets[i], end = offsets[i + 1];
  return {begin < 0 ? 0 : begin, end > total ? total : end};
}

// The segment that token t is in, if offsets rise from 0 to beyond it.
FF_TABLE int64_t segment_of(const Indices& offsets, int64_t segments, int64_t length, int64_t t) {
  if (offsets.data == nullptr) return t / length;
  int64_t low = 0, high = segments;  // offsets[low] <= t < offsets[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace finefuse
