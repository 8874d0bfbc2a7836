// Preference losses on NVIDIA GPUs: one block, pairs over its threads, sums in a fixed order.
//
// A pair reads up to 8 numbers and writes up to 7; there are as many pairs as sequences, so the
// launch is what it costs. All arithmetic is double, as on the CPU.
#include "core/cuda_utils.cuh"
#include "ops/preference.h"
#include "ops/preference_table.h"

namespace finefuse::cuda {
namespace {

constexpr int kThreads = 256;

__device__ bool negative(const Reals& lengths, int64_t i, int64_t count) {
  return lengths && i < count && !(lengths[i] >= 0);
}

__global__ void __launch_bounds__(kThreads) preference_kernel(const Preference a) {
  double of_batch[kBatchSums] = {}, sums[kPreferenceSums] = {};
  if (needs_sums(a)) {
    batch_sums(a, threadIdx.x, kThreads, of_batch);
    block_sum_all(of_batch);
    __syncthreads();
  }
  const Batch b = batch_of(a, of_batch);
  const int64_t most = a.chosen_count > a.rejected_count ? a.chosen_count : a.rejected_count;
  for (int64_t i = threadIdx.x; i < most; i += kThreads) {
    if (negative(a.chosen_lengths, i, a.chosen_count) ||
        negative(a.rejected_lengths, i, a.rejected_count))
      a.place.flags[static_cast<int>(Flag::lengths)] = 1;
    visit(a, b, i, sums);
  }
  for (int k = 0; k < a.options.count; ++k) {
    const PreferenceTerm& term = a.options.terms[k];
    if (!sorts(term.loss)) continue;
    __syncthreads();  // what others added up lies where this term's indices lead
    for (int64_t i = threadIdx.x; i < a.chosen_count; i += kThreads)
      visit_sorted(a, b, term, i, sums);
  }
  block_sum(sums);
  if (threadIdx.x == 0) finish(a, b, sums);
}

}  // namespace

void run(const Preference& a) { launch(preference_kernel, 1, kThreads, 0, a); }

}  // namespace finefuse::cuda
