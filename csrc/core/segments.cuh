// Tokens of the sequences of a batch on a GPU, where nobody has looked at the offsets beforehand.
#pragma once
#include "core/cuda_utils.cuh"
#include "core/segments.h"

namespace finefuse::cuda {

// Tokens [begin, end) of segment i: of the rows of `length`, or between two offsets. Offsets that
// do not part `total` tokens are not followed: the segment is empty and bad, and a flag is set.
struct Segment {
  int64_t begin, end;
  bool bad;
};
__device__ inline Segment segment_at(const Indices& offsets, int64_t segments, int64_t length,
                                     int64_t total, int64_t i, const Place& place) {
  if (offsets.data == nullptr) return {i * length, i * length + length, false};
  const int64_t begin = offsets[i], end = offsets[i + 1];
  const bool bad = begin < 0 || begin > end || end > total || (i == 0 && begin != 0) ||
                   (i == segments - 1 && end != total);
  if (!bad) return {begin, end, false};
  raise(place, Flag::cu_seqlens);
  return {0, 0, true};
}

// The segment that token t is in, or -1 where the offsets do not say.
__device__ inline int64_t segment_or_none(const Indices& offsets, int64_t segments, int64_t length,
                                          int64_t t) {
  if (offsets.data != nullptr && segments <= 0) return -1;
  const int64_t i = segment_of(offsets, segments, length, t);
  return offsets.data == nullptr || (offsets[i] <= t && t < offsets[i + 1]) ? i : -1;
}

inline constexpr int kSegmentThreads = 128;

// NaN for all tokens, before the segments write theirs: bad offsets leave some to no segment.
struct SegmentFill {
  Reals out;
  int64_t total;
  Place place;
};
static __global__ void __launch_bounds__(kSegmentThreads)
    sequence_fill_kernel(const SegmentFill a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < a.total) a.out.set(t, NAN);
}
inline void fill_segments(const Reals& out, int64_t total, const Place& place) {
  launch(sequence_fill_kernel, ceil_div(total, kSegmentThreads), kSegmentThreads, 0,
         SegmentFill{out, total, place});
}

}  // namespace finefuse::cuda
