#include "ops/distill.h"

namespace finefuse::FF_ISA_NS {
namespace {

int64_t first_bad_teacher(const Distill&, TeacherFault*) { return -1; }
void distill(const Distill&) {}

}  // namespace

const DistillKernels& distill_kernels() {
  static constexpr DistillKernels kernels{first_bad_teacher, distill};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
