// A softmax-policy bandit: one agent on a given stream of uniforms, or many on counters.
//
// One agent does, operation by operation, what NumPy does for
//     p = e / e.sum() with e = exp(logits - logits.max()); cdf = p.cumsum(); cdf /= cdf[-1]
//     action = cdf.searchsorted(u, side="right"); logits += lr * (onehot - p) * advantage
// so that the actions are the same: the sum in NumPy's order (eight partial sums, halves beyond
// 128), the running sum in order, no fused multiply-add, and exp with the bits of glibc's. A step
// is a chain of latencies, about 200 cycles at 10 actions; where the advantage is 0 nothing changes
// and the step is a search in the running sum. Where NumPy's exp is another (AVX-512) the
// probabilities agree to the rounding.
//
// Many agents: an agent in each lane, two vectors of them a group, groups over threads; per action
// and step an exponential and three passes over (actions, lanes), which stay in the first or second
// cache. The order of summation is that of the actions whatever the lanes, and the random numbers
// are Philox4x32-10 of (seed; agent, step), so that bits do not depend on the number of threads.
// Everything is double.
#include "ops/bandit.h"

#include "core/parallel.h"
#include "core/philox.h"
#include "core/vec.h"

namespace finefuse::FF_ISA_NS {
namespace {

constexpr int kWide = kLanes<double>;
static_assert(kWide <= kBanditLanes);

// ---- one agent ---------------------------------------------------------------------------------

#if defined(__AVX2__)

// 2^(k/128) = scale·(1 + tail), scale rounded: bits of scale less those that k << 45 adds.
struct ExpTable {
  double tail[128];
  uint64_t scale[128];
};

constexpr double split_high(double a) {
  const double c = 0x1.0000002p27 * a;
  return c - (c - a);
}

constexpr ExpTable exp_table() {
  ExpTable table{};
  constexpr double high = 0x1.0163da9fb3335p+0, low = 0x1.b61299ab8cdb7p-54;  // 2^(1/128)
  double h = 1, l = 0;
  for (uint64_t k = 0; k < 128; ++k) {
    table.scale[k] = __builtin_bit_cast(uint64_t, h) - (k << 45);
    table.tail[k] = l / h;
    // (h + l)·(high + low) in two doubles (Dekker)
    const double a = split_high(h), b = h - a, c = split_high(high), d = high - c;
    const double product = h * high;
    const double rest = ((a * c - product) + a * d + b * c) + b * d + (h * low + l * high);
    h = product + rest;
    l = rest - (h - product);
  }
  return table;
}

constexpr ExpTable kExp = exp_table();

// exp(x) for x <= 0 with the bits of glibc's (2.28 and later, with fused multiply-add; error 0.511
// units in the last place): r = x - k·ln(2)/128, 2^(k/128) from the table, a polynomial of
// degree 5.
FF_INLINE VecD exp_as_libm(VecD x) {
  const VecD magic = splat<VecD>(0x1.8p52);
  const VecD shifted = x * splat<VecD>(0x1.71547652b82fep7) + magic, k = shifted - magic;
  VecD r = fma(k, splat<VecD>(-0x1.62e42fefa0000p-8), x);
  r = fma(k, splat<VecD>(-0x1.cf79abc9e3b39p-47), r);
  const VecL index = (VecL)shifted & 127;
#if defined(__AVX512F__)
  const VecD tail = (VecD)_mm512_i64gather_pd((__m512i)index, kExp.tail, 8);
  const VecL bits = (VecL)_mm512_i64gather_epi64((__m512i)index, kExp.scale, 8);
#else
  VecD tail;
  VecL bits;
  for (int i = 0; i < kWide; ++i) {
    tail[i] = kExp.tail[index[i]];
    bits[i] = static_cast<int64_t>(kExp.scale[index[i]]);
  }
#endif
  const VecD scale = (VecD)(bits + ((VecL)shifted << 45));
  const VecD r2 = r * r;
  const VecD low = fma(r, splat<VecD>(0x1.555555555543cp-3), splat<VecD>(0x1.ffffffffffdbdp-2));
  const VecD high = fma(r, splat<VecD>(0x1.1111167a4d017p-7), splat<VecD>(0x1.55555cf172b91p-5));
  const VecD p = fma(r2 * r2, high, fma(r2, low, tail + r));
  VecD e = fma(scale, p, scale);
  const VecL tiny = x < splat<VecD>(-512);  // towards denormal numbers and zero
#if defined(__AVX512F__)
  const int any = _mm512_movepi64_mask((__m512i)tiny);
#else
  const int any = _mm256_movemask_pd((__m256d)tiny);
#endif
  if (__builtin_expect(any != 0, 0)) {
    for (int i = 0; i < kWide; ++i) {
      if (tiny[i]) e[i] = __builtin_exp(x[i]);
    }
  }
  return e;
}

#else

FF_INLINE VecD exp_as_libm(VecD x) {
  for (int i = 0; i < kWide; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

#endif

// numpy.sum of n contiguous numbers, bit by bit: up to 128 of them, and any number.
FF_INLINE double sum_of_few(const double* a, int64_t n) {
  double sum = 0;
  int64_t i = 0;
  if (n >= 8) {
    double r[8];
    for (int j = 0; j < 8; ++j) r[j] = a[j];
    for (i = 8; i + 8 <= n; i += 8) {
      for (int j = 0; j < 8; ++j) r[j] += a[i + j];
    }
    sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  }
  for (; i < n; ++i) sum += a[i];
  return sum;
}

double pairwise_sum(const double* a, int64_t n) {
  if (n <= 128) return sum_of_few(a, n);
  const int64_t half = n / 2 - n / 2 % 8;
  return pairwise_sum(a, half) + pairwise_sum(a + half, n - half);
}

// cdf.searchsorted(u, side="right") for cdf = running / running[n - 1], near `guess`.
FF_INLINE int64_t first_above(const double* running, int64_t n, double u, int64_t guess) {
  const double last = running[n - 1];
  if (guess > n - 1) guess = n - 1;
  while (guess > 0 && running[guess - 1] / last > u) --guess;
  while (running[guess] / last <= u) ++guess;  // ends: u < 1 = last / last
  return guess;
}

struct Arms {  // kWide actions
  VecD z, p;   // logits, probabilities
  VecL index;  // of the action
  VecL valid;  // all bits, or none where there is no such action
};

FF_INLINE VecD only(VecL mask, VecD v) { return (VecD)(mask & (VecL)v); }

// kFixed vectors of actions, or any number of them for 0.
template <int kFixed> void agent_of(const BanditAgent& a) {
  const int64_t n = a.actions, vectors = kFixed > 0 ? kFixed : (n + kWide - 1) / kWide;
  Arms local[kFixed + 1];
  Arms* arms = kFixed > 0 ? local : reinterpret_cast<Arms*>(a.workspace);
  double small[(kFixed + 1) * kWide];
  double* p = kFixed > 0 ? small : reinterpret_cast<double*>(arms + vectors);
  double running_small[(kFixed + 1) * kWide];
  double* running = kFixed > 0 ? running_small : p + vectors * kWide;
  const VecD lowest = splat<VecD>(-__builtin_inf());
  VecD most = lowest;
  for (int64_t i = 0; i < vectors; ++i) {
    Arms& arm = arms[i];
    for (int k = 0; k < kWide; ++k) {
      const int64_t j = i * kWide + k;
      arm.index[k] = j;
      arm.valid[k] = j < n ? -1 : 0;
      arm.z[k] = a.logits[j < n ? j : 0];
    }
    most = max(arm.z, most);
  }
  double largest = horizontal_max(most);
  double total = a.total;
  bool changed = true;
  const VecD rate = splat<VecD>(a.learning_rate);
  for (int64_t t = 0; t < a.steps; ++t) {
    const double u = a.uniforms[2 * t];
    int64_t action = 0;
    if (changed) {
      const VecD top = splat<VecD>(largest);
      for (int64_t i = 0; i < vectors; ++i) {
        arms[i].p = only(arms[i].valid, exp_as_libm(arms[i].z - top));
        store(p + i * kWide, arms[i].p);
      }
      // Zeros follow the last action: they may be summed, where that leaves NumPy's order as it is.
      constexpr int64_t kPadded = kFixed * kWide;
      const VecD sum = splat<VecD>(kFixed > 0 && n / 8 == kPadded / 8 ? sum_of_few(p, kPadded)
                                                                      : pairwise_sum(p, n));
      for (int64_t i = 0; i < vectors; ++i) {
        arms[i].p /= sum;
        store(p + i * kWide, arms[i].p);
      }
      double c = 0;
      for (int64_t i = 0; i < (kFixed > 0 ? kPadded : n); ++i) {
        c += p[i];
        running[i] = c;
        action += c <= u;
      }
    } else {
      for (int64_t low = 0, high = n; low < high;) {  // the first above u
        const int64_t middle = low + (high - low) / 2;
        if (running[middle] <= u) {
          action = low = middle + 1;
        } else {
          high = middle;
        }
      }
    }
    action = first_above(running, n, u, action);
    const bool reward = a.uniforms[2 * t + 1] < a.probs[action];
    a.rewards[t] = reward;
    a.adjusted[t] = a.table.adjusted[reward];
    a.cumulative[t] = total += reward;
    const double advantage = a.table.advantage[reward];
    changed = advantage != 0;
    if (!changed) continue;
    const VecD by = splat<VecD>(advantage);
    const VecL chosen = VecL{} + action;
    most = lowest;
    for (int64_t i = 0; i < vectors; ++i) {
      Arms& arm = arms[i];
      const VecD onehot = only(arm.index == chosen, splat<VecD>(1));
      arm.z += rate * (onehot - arm.p) * by;
      most = max(arm.valid ? arm.z : lowest, most);
    }
    largest = horizontal_max(most);
  }
  for (int64_t j = 0; j < n; ++j) a.logits[j] = arms[j / kWide].z[j % kWide];
}

void agent(const BanditAgent& a) {
  switch ((a.actions + kWide - 1) / kWide) {
    case 1: return agent_of<1>(a);
    case 2: return agent_of<2>(a);
    case 3: return agent_of<3>(a);
    case 4: return agent_of<4>(a);
    default: return agent_of<0>(a);
  }
}

// ---- many agents -------------------------------------------------------------------------------

constexpr int kAgents = 2 * kWide;  // of a group: as many as Philox has lanes
static_assert(kAgents == kLanes<float>);
typedef int32_t HalfI __attribute__((vector_size(FF_VECTOR_BYTES / 2)));

// Two words a lane to 53 bits of [0, 1).
FF_INLINE void uniforms(VecU high, VecU low, VecD (&u)[2]) {
  HalfI h[2], l[2];
  const VecU top = high >> 5, rest = low >> 6;
  __builtin_memcpy(h, &top, sizeof top);
  __builtin_memcpy(l, &rest, sizeof rest);
  for (int k = 0; k < 2; ++k) {
    u[k] = (__builtin_convertvector(h[k], VecD) * 0x1p26 + __builtin_convertvector(l[k], VecD)) *
           0x1p-53;
  }
}

struct Group {  // an action's logits and their exponentials
  VecD z[2], e[2];
};
static_assert(sizeof(Group) <= kBanditArmBytes);

void agent_group(const BanditAgents& a, int64_t first, Group* arms) {
  const int64_t n = a.actions;
  const auto live = static_cast<int>(a.agents - first < kAgents ? a.agents - first : kAgents);
  const double log2e = 0x1.71547652b82fep0;
  const VecD floor = splat<VecD>(exp_floor<double>(log2e));
  VecU agent_low, agent_high;
  for (int i = 0; i < kAgents; ++i) {
    agent_low[i] = static_cast<uint32_t>(first + i);
    agent_high[i] = static_cast<uint32_t>(static_cast<uint64_t>(first + i) >> 32);
  }
  for (int64_t i = 0; i < n; ++i) arms[i].z[0] = arms[i].z[1] = VecD{};
  VecD largest[2] = {}, sum[2] = {};
  double total[kAgents] = {};
  bool changed = true;
  for (int64_t t = 0; t < a.steps; ++t) {
    VecU words[4] = {agent_low, agent_high, VecU{} + static_cast<uint32_t>(t),
                     VecU{} + static_cast<uint32_t>(static_cast<uint64_t>(t) >> 32)};
    philox4x32(a.seed, words);
    VecD u[2], v[2];
    uniforms(words[0], words[1], u);
    uniforms(words[2], words[3], v);
    if (changed) {
      sum[0] = sum[1] = VecD{};
      for (int64_t i = 0; i < n; ++i) {
        VecD x[2] = {arms[i].z[0] - largest[0], arms[i].z[1] - largest[1]}, e[2];
        exp_scaled<Precision::exact>(x, e, log2e, floor);
        for (int k = 0; k < 2; ++k) {
          arms[i].e[k] = e[k];
          sum[k] += e[k];
        }
      }
    }
    // The action: how many running sums are at most u·sum. The last is above, but for its rounding.
    VecL action[2] = {};
    VecD c[2] = {};
    const VecD bound[2] = {u[0] * sum[0], u[1] * sum[1]};
    for (int64_t i = 0; i + 1 < n; ++i) {
      for (int k = 0; k < 2; ++k) {
        c[k] += arms[i].e[k];
        action[k] -= (VecL)(c[k] <= bound[k]);
      }
    }
    VecD step[2];  // learning rate · advantage
    changed = false;
    for (int i = 0; i < live; ++i) {
      const int k = i / kWide, lane = i % kWide;
      const bool reward = v[k][lane] < a.probs[action[k][lane]];
      const int64_t at = (first + i) * a.steps + t;
      const double advantage = a.table.advantage[reward];
      step[k][lane] = a.learning_rate * advantage;
      changed |= advantage != 0;
      a.rewards[at] = reward;
      a.adjusted[at] = a.table.adjusted[reward];
      a.cumulative[at] = total[i] += reward;
    }
    for (int i = live; i < kAgents; ++i) step[i / kWide][i % kWide] = 0;
    if (!changed) continue;
    const VecD by[2] = {step[0] / sum[0], step[1] / sum[1]};
    for (int k = 0; k < 2; ++k) {
      for (int lane = 0; lane < kWide; ++lane) {
        arms[action[k][lane]].z[k][lane] += step[k][lane];
      }
      largest[k] = splat<VecD>(-__builtin_inf());
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int k = 0; k < 2; ++k) {
        const VecD z = arms[i].z[k] - by[k] * arms[i].e[k];
        arms[i].z[k] = z;
        largest[k] = max(z, largest[k]);
      }
    }
  }
  for (int i = 0; i < live; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      a.logits[(first + i) * n + j] = arms[j].z[i / kWide][i % kWide];
    }
  }
}

void agents(const BanditAgents& a) {
  const int64_t groups = (a.agents + kAgents - 1) / kAgents;
  // In bytes, as parallel_for counts: what passes through the caches.
  const int64_t work = a.steps * (a.actions + 8) * static_cast<int64_t>(sizeof(Group));
  parallel_for(groups, work, a.threads, [&](int64_t begin, int64_t end) {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    auto* arms = reinterpret_cast<Group*>(a.workspace + thread * a.actions * kBanditArmBytes);
    for (int64_t g = begin; g < end; ++g) agent_group(a, g * kAgents, arms);
  });
}

}  // namespace

const BanditKernels& bandit_kernels() {
  static constexpr BanditKernels kernels{agent, agents};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
