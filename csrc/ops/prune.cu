#include "core/cuda_utils.cuh"
#include "ops/prune.h"

namespace finefuse::cuda {

void run(const Prune&) {}
void run(const PruneCodes&) {}

}  // namespace finefuse::cuda
