#include "ops/prune.h"

namespace finefuse::FF_ISA_NS {
namespace {

void prune(const Prune&) {}
void prune_codes(const PruneCodes&) {}

}  // namespace

const PruneKernels& prune_kernels() {
  static constexpr PruneKernels kernels{prune, prune_codes};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
