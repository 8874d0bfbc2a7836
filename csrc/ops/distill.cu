#include "core/cuda_utils.cuh"
#include "ops/distill.h"

namespace finefuse::cuda {

void run(const Distill&) {}

}  // namespace finefuse::cuda
