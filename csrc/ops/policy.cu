// Policy-gradient losses, value loss and advantages on NVIDIA GPUs.
//
//   kernel            reads + writes               bound by                      split
//   policy_logits     sizeof(T) + sizeof(T) of a   memory; the gradient reads    a block a row, or
//                     logit                        the row from shared memory,   a cluster
//                                                  or a longer one again
//   policy            up to 6 + 1 numbers a token  memory where there are many   a block a sequence
//                                                  tokens, else the launches
//   value_loss        2·(up to 3) + 1 a token      memory                        kValueBlock tokens
//   group_advantages  1 + 1 a reward               the launch                    a warp a group
//   gae               2 + 2 a token                memory                        a block a sequence
//
// A row of logits: float32 a thread (float64 for float64). All that is done for a token once is
// double (policy_table.h), and so are sums between threads, in a fixed order: the same bits every
// time. An action out of range is not followed: its row's loss is NaN, its gradient 0, and a flag
// is set. Nor are offsets that do not part the tokens: loss and metrics are NaN, and so is the
// gradient of tokens that they leave to no sequence.
#include "core/cuda_utils.cuh"
#include "core/logit_rows.cuh"
#include "core/segments.cuh"
#include "ops/policy.h"
#include "ops/policy_table.h"

namespace finefuse::cuda {
namespace {

constexpr int kTokenThreads = 256;

__device__ Segment sequence(const PolicyTokens& a, int64_t i, const Place& place) {
  return segment_at(a.offsets, a.sequences, a.length, a.total, i, place);
}

__device__ double own_sum(const double* x, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += x[i];
  return sum;
}

// ---- from log-probabilities: a block a sequence -------------------------------------------------

// scratch: five arrays of as many numbers as there are sequences, in the order of kPolicySums.

__device__ bool counts(const Policy& a, int64_t t) { return a.mask == nullptr || a.mask[t]; }

__global__ void __launch_bounds__(kTokenThreads) policy_count_kernel(const Policy a) {
  const int64_t i = blockIdx.x;
  const Segment s = sequence(a.tokens, i, a.place);
  double count[1] = {0};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) count[0] += counts(a, t);
  block_sum(count);
  if (threadIdx.x == 0) a.scratch[i] = s.bad ? NAN : count[0];
}

// The tokens in all, left where each sequence's loss will be.
__global__ void __launch_bounds__(kTokenThreads) policy_total_kernel(const Policy a) {
  const int64_t sequences = a.tokens.sequences;
  double all[1] = {own_sum(a.scratch, sequences)};
  block_sum_all(all);
  for (int64_t i = threadIdx.x; i < sequences; i += blockDim.x) a.scratch[sequences + i] = all[0];
}

// The gradient of a token may depend on all of its sequence, through the ratio: then the tokens are
// gone through twice more, from L2.
__global__ void __launch_bounds__(kTokenThreads, 2) policy_kernel(const Policy a) {
  const PolicyTokens& tokens = a.tokens;
  const PolicyOptions& o = a.options;
  const int64_t i = blockIdx.x, sequences = tokens.sequences;
  const bool by_token = o.importance == Importance::token;
  const bool none = o.reduction == PolicyReduction::none;
  const Segment s = sequence(tokens, i, a.place);
  const int64_t first = s.begin + threadIdx.x;
  const double n = a.scratch[i], all = a.scratch[sequences + i];
  double start[1] = {0};
  if (!by_token) {
    for (int64_t t = first; t < s.end; t += blockDim.x) {
      if (counts(a, t)) start[0] += log_ratio_at(tokens, o, t, a.logprobs[t]);
    }
  }
  block_sum_all(start);
  const double sequence_x = o.importance == Importance::mean ? start[0] / n : start[0];
  const double share = token_share(o, n, all, sequences);
  double sums[5] = {0, 0, 0, 0, 0};  // loss, low, high, approximate KL, upstream·by_x
  // the second time with what the whole sequence passes back to each of its tokens
  double each = 0;
  for (int turn = 0; turn < (by_token ? 1 : 2); ++turn) {
    for (int64_t t = first; t < s.end; t += blockDim.x) {
      if (!counts(a, t)) {
        if (turn > 0) continue;
        if (none && a.out) a.out.set(t, 0);
        a.gradient.set(t, 0);
        continue;
      }
      const double lp = a.logprobs[t], A = tokens.advantages[tokens.by_token ? t : i];
      const double g = a.upstream ? share * a.upstream[t] : share;
      const Token<double> token = token_at(tokens, o, t, lp, A);
      const TokenLoss<double> term = token_loss<OneToken>(o, token, sequence_x, n);
      if (by_token || turn > 0) {
        a.gradient.set(t, g * term.by_lp + (by_token ? g * term.by_x : each));
      }
      if (turn > 0) continue;
      if (none && a.out) a.out.set(t, term.value);
      sums[0] += term.value;
      sums[1] += term.low;
      sums[2] += term.high;
      sums[3] += term.approx_kl;
      sums[4] += g * term.by_x;
    }
    if (turn == 0) {
      block_sum_all(sums);
      each = o.importance == Importance::mean ? sums[4] / n : sums[4];
    }
  }
  if (threadIdx.x != 0) return;
  const double side_share = clipped_share(o, n, all, sequences);
  const double factors[4] = {share, side_share, side_share, 1 / all};
  for (int k = 0; k < 4; ++k) {
    a.scratch[(k + 1) * sequences + i] = s.bad ? NAN : n == 0 ? 0.0 : factors[k] * sums[k];
  }
}

__global__ void __launch_bounds__(kTokenThreads) policy_sum_kernel(const Policy a) {
  const int64_t sequences = a.tokens.sequences;
  double sums[4];
  FF_UNROLL for (int k = 0; k < 4; ++k) {
    sums[k] = own_sum(a.scratch + (k + 1) * sequences, sequences);
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  if (a.options.reduction != PolicyReduction::none && a.out) a.out.set(0, sums[0]);
  for (int k = 0; a.metrics && k < 3; ++k) a.metrics.set(k, sums[k + 1]);
}

// ---- from logits: a block a row -----------------------------------------------------------------

__device__ double* sums_of(const PolicyLogits& a, int64_t r) {
  return a.scratch + a.tokens.sequences + r * kPolicyRowSums;
}

__global__ void __launch_bounds__(kTokenThreads) policy_logits_count_kernel(const PolicyLogits a) {
  const int64_t i = blockIdx.x;
  const Segment s = sequence(a.tokens, i, a.place);
  double count[1] = {0};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += blockDim.x) {
    count[0] += a.actions[t] != a.ignore_index;
  }
  block_sum(count);
  if (threadIdx.x == 0) a.scratch[i] = s.bad ? NAN : count[0];
}

// A row's sequence, its share of the loss and the number of tokens in all, left where its sums will
// be: a search and a sum over the sequences here, by a thread a row, and not between the two passes
// over the row.
__global__ void __launch_bounds__(kTokenThreads) policy_logits_share_kernel(const PolicyLogits a) {
  const PolicyTokens& tokens = a.tokens;
  double all[1] = {own_sum(a.scratch, tokens.sequences)};
  block_sum_all(all);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= a.shape.rows) return;
  const int64_t i = segment_or_none(tokens.offsets, tokens.sequences, tokens.length, r);
  double* row = sums_of(a, r);
  const double n = i < 0 ? NAN : a.scratch[i];  // NaN: bad offsets
  row[0] = n != n ? NAN : token_share(a.options, n, all[0], tokens.sequences);
  row[1] = static_cast<double>(i);
  row[3] = all[0];
}

// What the block remembers of its row between the passes, in shared memory: registers are short
// while thread 0 works out the gradient.
template <class T> struct RowToken {
  const T* z;  // of the part that is this block's
  T* out;
  int64_t count, y, sequence;
  double z_y, share, all;
  bool first;
};

// kStaged: the row fits in shared memory, of one block or of a cluster of them, and the gradient
// reads it there. It is written with the term of the entropy whether there is one or not: an
// instruction an element beside memory.
template <class T, bool kStaged>
__global__ void FF_ROW_BOUNDS policy_logits_kernel(const PolicyLogits a) {
  __shared__ RowToken<T> token;
  const int64_t vocab = a.shape.vocab, r = row_of_block<kStaged>(), y = a.actions[r];
  const T* z = row_of<T>(a.logits, r);
  const RowPart part = row_part<kStaged>(z, vocab);
  double* row = sums_of(a, r);
  if (y == a.ignore_index || y < 0 || y >= vocab) {
    const bool ignored = y == a.ignore_index;
    if (!ignored) raise(a.place, Flag::targets);
    if (part.first && threadIdx.x < kPolicyRowSums) {
      row[threadIdx.x] = threadIdx.x > 0 || ignored ? 0.0 : NAN;
    }
    row_zero(row_of<T>(a.gradient, r) + part.begin, part.count);
    return;
  }
  if (threadIdx.x == 0) {  // before any block of the cluster writes there
    T* out = row_of<T>(a.gradient, r) + part.begin;
    token = {z + part.begin,       out,    part.count, y - part.begin, static_cast<int64_t>(row[1]),
             to_accumulator(z[y]), row[0], row[3],     part.first};
  }
  RowStats stats;
  if constexpr (kStaged) {
    const T* own = z + part.begin;
    stats =
        row_stats<T, true, false, Access::stream>(own, part.count, a.temperature, stage_of(own));
    stats = row_stats_of_all(stats, a.temperature);
  } else {
    stats = row_stats<T, true, false, Access::keep>(z, vocab, a.temperature, nullptr);
  }
  RowLogprob known{};
  if (threadIdx.x == 0) known = row_logprob(stats, token.z_y, a.temperature);
  const RowLogprob& s = broadcast(known);
  Coefficients mine{};
  if (threadIdx.x == 0) {
    const PolicyTokens& tokens = a.tokens;
    PolicyOptions o = a.options;
    o.importance = Importance::token;  // the only one here: the compiler drops the rest
    const int64_t t = row_of_block<kStaged>(), i = tokens.by_token ? t : token.sequence;
    const double A = i < 0 ? NAN : tokens.advantages[i];
    const Token<double> known_token = token_at(tokens, o, t, s.logp, A);
    const TokenLoss<double> term = token_loss<OneToken>(o, known_token, 0, 1);
    if (token.first) {
      double* sums = sums_of(a, t);
      sums[0] = token.share * term.value;
      sums[1] = term.high - term.low;
      sums[2] = term.approx_kl;
      sums[3] = s.entropy;
    }
    const double upstream = a.upstream ? a.upstream[0] : 1.0;
    const double g = upstream * token.share * (term.by_lp + term.by_x);
    const double h = -upstream * a.entropy_coef / token.all;
    mine.zero = g == 0.0 && h == 0.0;
    const LogprobGradient d = logprob_gradient(s, a.temperature, g, h, 0.0);
    mine.row = d.row;
    mine.at_target = d.at_target;
  }
  const Coefficients& shared = broadcast(mine);
  if constexpr (kStaged) {
    write_gradient<T, true, Access::keep>(stage_of(token.z), token.out, token.count, token.y,
                                          shared);
    row_end();
  } else {
    write_gradient<T, true, Access::stream>(token.z, token.out, token.count, token.y, shared);
  }
}

__global__ void __launch_bounds__(kMaxThreads) policy_logits_sum_kernel(const PolicyLogits a) {
  double sums[6] = {own_sum(a.scratch, a.tokens.sequences), 0, 0, 0, 0, 0};
  for (int64_t r = threadIdx.x; r < a.shape.rows; r += blockDim.x) {
    const double* row = sums_of(a, r);
    sums[1] += row[0];
    sums[2] += row[1] < 0;
    sums[3] += row[1] > 0;
    sums[4] += row[2];
    sums[5] += row[3];
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  const double all = sums[0], each = all == 0 ? 0 : 1 / all, entropy = each * sums[5];
  double loss = all != all ? all : sums[1];
  if (a.entropy_coef != 0) loss -= a.entropy_coef * entropy;
  if (a.out) a.out.set(0, loss);
  if (!a.metrics) return;
  for (int k = 0; k < 3; ++k) a.metrics.set(k, each * sums[k + 2]);
  a.metrics.set(3, entropy);
}

// ---- value loss: a block kValueBlock tokens -----------------------------------------------------

template <class F> __device__ void value_block(const ValueLoss& a, const F& f) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kValueBlock;
  const int64_t end = begin + kValueBlock < a.total ? begin + kValueBlock : a.total;
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const bool counts = a.mask == nullptr || a.mask[t], clipped = static_cast<bool>(a.old_values);
    ValueTerm<double> term{0, 0};
    if (counts) {
      const double old = clipped ? a.old_values[t] : 0;
      term = value_term(a.values[t], a.returns[t], old, a.clip, clipped);
    }
    f(t, counts, term.value, term.slope);
  }
}

__global__ void __launch_bounds__(kTokenThreads) value_loss_kernel(const ValueLoss a) {
  double sums[2] = {0, 0};
  value_block(a, [&](int64_t, bool counts, double value, double) {
    sums[0] += counts;
    sums[1] += value;
  });
  block_sum(sums);
  if (threadIdx.x != 0) return;
  a.scratch[blockIdx.x] = sums[0];
  a.scratch[gridDim.x + blockIdx.x] = sums[1];
}

// The mean, by the first block, and the gradient.
__global__ void __launch_bounds__(kTokenThreads) value_loss_gradient_kernel(const ValueLoss a) {
  const int64_t blocks = value_loss_blocks(a.total);
  double sums[2] = {own_sum(a.scratch, blocks), 0};
  if (blockIdx.x == 0) sums[1] = own_sum(a.scratch + blocks, blocks);
  block_sum_all(sums);
  const double share = sums[0] == 0 ? 0 : 1 / sums[0];
  if (blockIdx.x == 0 && threadIdx.x == 0) a.out.set(0, share * sums[1]);
  if (!a.gradient) return;
  value_block(a, [&](int64_t t, bool, double, double slope) { a.gradient.set(t, share * slope); });
}

// ---- advantages of groups: a warp a group -------------------------------------------------------

struct Moments {
  double count, mean, deviation;
};
// Of rewards first, first + step, ... of each thread together, as `sum` adds them up; NaN is left
// out.
template <class Sum>
__device__ Moments moments(const Reals& r, int64_t first, int64_t end, int64_t step,
                           const Sum& sum) {
  double count = 0, total = 0, squares = 0;
  for (int64_t i = first; i < end; i += step) {
    const double x = r[i];
    if (x == x) count += 1, total += x;
  }
  count = sum(count), total = sum(total);
  const double mean = count > 0 ? total / count : 0.0;
  for (int64_t i = first; i < end; i += step) {
    const double x = r[i];
    if (x == x) squares += (x - mean) * (x - mean);
  }
  squares = sum(squares);
  return {count, mean, count > 1 ? sqrt(squares / (count - 1)) : 0.0};
}

// By batch there is one block: nobody else would have the deviation of all.
__global__ void __launch_bounds__(kTokenThreads) group_advantages_kernel(const GroupAdvantages a) {
  const bool by_batch = a.scale == AdvantageScale::batch;
  double deviation = 0;
  if (by_batch) {
    const auto over_block = [](double x) {
      double sum[1] = {x};
      block_sum_all(sum);
      return sum[0];
    };
    deviation =
        moments(a.rewards, threadIdx.x, a.groups * a.group_size, blockDim.x, over_block).deviation;
  }
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; g < a.groups;
       g += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t first = g * a.group_size + lane, end = (g + 1) * a.group_size;
    const Moments m = moments(a.rewards, first, end, 32, [](double x) { return warp_sum(x); });
    double factor = 1;
    if (a.scale != AdvantageScale::none) {
      factor = 1 / ((by_batch ? deviation : m.deviation) + 1e-4);
    }
    // r - the mean of the n - 1 others = (r - mean)·n/(n - 1)
    if (a.leave_one_out) factor *= m.count > 1 ? m.count / (m.count - 1) : 0.0;
    for (int64_t i = first; i < end; i += 32) {
      const double r = a.rewards[i];
      a.out.set(i, r != r ? 0.0 : factor * (r - m.mean));
    }
  }
}

// ---- GAE: a block a sequence, a scan from its end -----------------------------------------------

// What follows a token: its advantage and its value.
struct After {
  double advantage, value;
};

// What a stretch of tokens makes of what follows it: A = p·A' + q·v' + s, v = w. Stretches compose,
// so that threads can; one without a token that counts changes nothing.
struct Stretch {
  double p, q, s, w;
  int live;
  __device__ After operator()(const After& x) const {
    return live != 0 ? After{p * x.advantage + q * x.value + s, w} : x;
  }
};
__device__ Stretch then(const Stretch& late, const Stretch& early) {
  if (late.live == 0) return early;
  if (early.live == 0) return late;
  return {early.p * late.p, early.p * late.q, early.p * late.s + early.q * late.w + early.s,
          early.w, 1};
}

// Thread j of a block takes the j-th token from the end of what is left: neighbours read
// neighbours.
__global__ void __launch_bounds__(kTokenThreads) gae_kernel(const Gae a) {
  __shared__ Stretch of_warp[2][kTokenThreads / 32];  // in turn: one barrier a turn
  const int64_t i = blockIdx.x, stride = a.length + (a.bootstrap ? 1 : 0);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double decay = a.gamma * a.lam;
  After after{0, a.bootstrap ? a.values[i * stride + a.length] : 0.0};
  int turn = 0;
  for (int64_t last = a.length - 1; last >= 0; last -= blockDim.x, turn ^= 1) {
    const int64_t t = last - threadIdx.x, at = i * a.length + t;
    Stretch x{1, 0, 0, 0, 0};
    if (t >= 0 && (a.mask == nullptr || a.mask[at])) {
      const double v = a.values[i * stride + t];
      x = {decay, a.gamma, a.rewards[at] - v, v, 1};
    }
    const bool live = x.live != 0;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned all = 0xffffffffu;
      const Stretch late{__shfl_up_sync(all, x.p, step), __shfl_up_sync(all, x.q, step),
                         __shfl_up_sync(all, x.s, step), __shfl_up_sync(all, x.w, step),
                         __shfl_up_sync(all, x.live, step)};
      if (lane >= step) x = then(late, x);
    }
    if (lane == 31) of_warp[turn][warp] = x;
    __syncthreads();
    After before_warp = after;
    for (int w = 0; w < warps; ++w) {
      if (w == warp) before_warp = after;
      after = of_warp[turn][w](after);
    }
    if (t < 0) continue;
    const After own = x(before_warp);
    a.advantages.set(at, live ? own.advantage : 0.0);
    a.returns.set(at, live ? own.advantage + own.value : 0.0);
  }
}

}  // namespace

void run(const Policy& a) {
  if (a.tokens.offsets.data != nullptr) {
    fill_segments(a.gradient, a.tokens.total, a.place);
    if (a.options.reduction == PolicyReduction::none && a.out) {
      fill_segments(a.out, a.tokens.total, a.place);
    }
  }
  launch(policy_count_kernel, a.tokens.sequences, kTokenThreads, 0, a);
  launch(policy_total_kernel, 1, kTokenThreads, 0, a);
  launch(policy_kernel, a.tokens.sequences, kTokenThreads, 0, a);
  launch(policy_sum_kernel, 1, kTokenThreads, 0, a);
}

void run(const PolicyLogits& a) {
  launch(policy_logits_count_kernel, a.tokens.sequences, kTokenThreads, 0, a);
  launch(policy_logits_share_kernel, ceil_div(a.shape.rows, kTokenThreads), kTokenThreads, 0, a);
  by_dtype(a.shape.dtype, [&]<class T>(T) {
    launch_rows<T>(policy_logits_kernel<T, true>, policy_logits_kernel<T, false>, a);
  });
  launch(policy_logits_sum_kernel, 1, kMaxThreads, 0, a);
}

void run(const ValueLoss& a) {
  const int64_t blocks = value_loss_blocks(a.total);
  launch(value_loss_kernel, blocks, kTokenThreads, 0, a);
  launch(value_loss_gradient_kernel, a.gradient && blocks > 0 ? blocks : 1, kTokenThreads, 0, a);
}

void run(const GroupAdvantages& a) {
  constexpr int64_t warps = kTokenThreads / 32;
  const int64_t blocks = a.scale == AdvantageScale::batch ? 1 : ceil_div(a.groups, warps);
  launch(group_advantages_kernel, a.groups > 0 ? blocks : 0, kTokenThreads, 0, a);
}

void run(const Gae& a) {
  const int64_t threads = a.length < kTokenThreads ? (a.length + 31) / 32 * 32 : kTokenThreads;
  if (threads > 0) launch(gae_kernel, a.sequences, static_cast<int>(threads), 0, a);
}

}  // namespace finefuse::cuda
