// Preference losses on NVIDIA GPUs: one block, pairs over its threads, sums in a fixed order.
//
// A pair reads up to 6 numbers and writes 5; there are as many pairs as sequences, so the launch is
// what it costs. All arithmetic is double, as on the CPU.
#include "core/cuda_utils.cuh"
#include "ops/preference.h"
#include "ops/preference_table.h"

namespace finefuse::cuda {
namespace {

constexpr int kThreads = 256;

__device__ bool negative(const Reals& lengths, int64_t i) { return lengths && !(lengths[i] >= 0); }

__global__ void __launch_bounds__(kThreads) preference_kernel(const Preference a) {
  const double pairs = static_cast<double>(a.chosen_count);
  const double scale = a.options.reduction != Reduction::mean ? 1.0
                       : a.chosen_count == 0                  ? 0.0
                                                              : 1.0 / pairs;
  double sums[2] = {0, 0};  // loss, pairs won
  for (int64_t i = threadIdx.x; i < a.chosen_count; i += kThreads) {
    Pair p = pair_at(a, i);
    if (negative(a.chosen_lengths, i) || negative(a.rejected_lengths, i)) {
      p = {NAN, NAN, {NAN, NAN, NAN}};
      a.place.flags[static_cast<int>(Flag::lengths)] = 1;
    }
    sums[0] += p.loss.v;
    sums[1] += p.r_w > p.r_l;
    if (a.options.reduction == Reduction::none) a.out.set(i, p.loss.v);
    a.gradient.set(i, scale * p.loss.w);
    a.gradient.set(a.chosen_count + i, scale * p.loss.l);
    a.chosen_rewards.set(i, a.options.beta * p.r_w);
    a.rejected_rewards.set(i, a.options.beta * p.r_l);
    a.margins.set(i, a.options.beta * (p.r_w - p.r_l));
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  if (a.options.reduction != Reduction::none) a.out.set(0, scale * sums[0]);
  a.accuracy.set(0, a.chosen_count == 0 ? 0 : sums[1] / pairs);
}

}  // namespace

void run(const Preference& a) { launch(preference_kernel, 1, kThreads, 0, a); }

}  // namespace finefuse::cuda
