// A softmax-policy bandit: what crosses from Python to the kernels. A simulator: CPU only.
#pragma once
#include <cstdint>

#include "core/dispatch.h"

namespace finefuse {

// A reward is 0 or 1: what follows from it is a table of two numbers.
struct BanditRewards {
  double adjusted[2];   // by reward
  double advantage[2];  // adjusted - baseline
};

// One agent, `steps` steps on from `logits`.
struct BanditAgent {
  int64_t actions, steps;
  const double* probs;     // (actions,) of a reward
  const double* uniforms;  // (steps, 2) in [0, 1): of the action, of the reward
  BanditRewards table;
  double learning_rate;
  double* logits;                           // (actions,), updated in place
  double *rewards, *adjusted, *cumulative;  // (steps,)
  double total;                             // the rewards before the first step
  double* workspace;                        // bandit_workspace(actions), aligned to 64 bytes
};

inline constexpr int64_t kBanditLanes = 8;          // the widest vector
inline int64_t bandit_workspace(int64_t actions) {  // in bytes: six numbers an action
  return 48 * ((actions + kBanditLanes - 1) / kBanditLanes * kBanditLanes);
}

// Many agents from logits 0, each with random numbers of its own.
struct BanditAgents {
  int64_t actions, agents, steps;
  const double* probs;  // (actions,)
  uint64_t seed;
  BanditRewards table;
  double learning_rate;
  double* logits;                           // (agents, actions)
  double *rewards, *adjusted, *cumulative;  // (agents, steps)
  char* workspace;                          // bandit_workspace(a), aligned to 64 bytes
  int threads;
};

inline constexpr int64_t kBanditArmBytes = 256;  // of an action in a group of agents
inline int64_t bandit_workspace(const BanditAgents& a) {
  return a.threads * a.actions * kBanditArmBytes;
}

struct BanditKernels {
  void (*agent)(const BanditAgent&);
  void (*agents)(const BanditAgents&);
};

}  // namespace finefuse

FF_DECLARE_KERNELS(BanditKernels, bandit_kernels)
