// Splitting work over threads. Compiled per ISA level, so everything lives in FF_ISA_NS.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace finefuse::FF_ISA_NS {

// Below this much memory traffic the 1 to 2 us (sometimes 50) of a fork and join is not earned
// back.
inline constexpr int64_t kSerialBytes = 96 << 10;
// One piece of work: large enough that two threads rarely fault in the same huge page, small enough
// that a thread whose core is stolen for a while does not hold up the others.
inline constexpr int64_t kChunkBytes = 2 << 20;

// Calls body(begin, end) over [0, items), each item moving about bytes_per_item. Chunks are handed
// out as threads come free; a result must not depend on which thread or chunk an item was in.
template <class Body>
inline void parallel_for(int64_t items, int64_t bytes_per_item, int threads, const Body& body) {
  if (items <= 0) return;
  if (bytes_per_item < 1) bytes_per_item = 1;
  if (threads < 2 || items < 2 || items * bytes_per_item < kSerialBytes) {
    body(int64_t{0}, items);
    return;
  }
  int64_t chunk = (kChunkBytes + bytes_per_item - 1) / bytes_per_item;
  const int64_t fair = (items + 4 * threads - 1) / (4 * threads);
  if (chunk > fair) chunk = fair;
  const int64_t chunks = (items + chunk - 1) / chunk;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
#endif
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * chunk;
    body(begin, begin + chunk < items ? begin + chunk : items);
  }
}

}  // namespace finefuse::FF_ISA_NS
