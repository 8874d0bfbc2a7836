// Distillation from logits: what crosses from Python to the kernel.
#pragma once
#include "core/dispatch.h"
#include "core/logit_rows.h"
#include "core/place.h"

namespace finefuse {

// The numbers are the contract with python/finefuse/_args/distill.py (DISTILL_KINDS). The Python
// side makes jsd with beta 0 the forward and with beta 1 the reverse KL.
enum class DistillKind : int { forward_kl = 0, reverse_kl = 1, jsd = 2 };

// Row r counts where mask[r] and its target is not ignore_index (absent: all). Its loss is
//
//   kl_weight · D(student, teacher)/T-softmaxes + ce_weight · (-log softmax(student)[target])
//
// ce_weight is 0 where there are no targets; the cross-entropy is at temperature 1. Rows that do
// not count are never read: loss 0, gradient 0.
struct Distill {
  LogitsShape shape;  // of the student: its type, rows, and the columns that count (vocab_size)
  int64_t width;      // columns of a row of the gradient; those from shape.vocab on become 0
  LogitRows student, gradient;  // gradient.data null: none wanted; may be the student's own
  LogitRows
      teacher;  // (rows, vocab) logits; with teacher_indices (rows, top) log-probabilities at T
  DType teacher_dtype;
  Indices teacher_indices;  // (rows, top), contiguous, or null
  int64_t top;
  DistillKind kind;
  double beta, temperature, kl_weight, ce_weight;
  const uint8_t* mask;  // (rows,) or null
  Indices targets;      // (rows,) or null
  int64_t ignore_index;
  Reduction reduction;  // mean: over the rows that count; over none of them 0
  Reals loss;           // (rows,) for none, else one; may be absent (a backward)
  double* scratch;      // (rows,), for mean and sum
  Reals upstream;       // (rows,) for none, else one; the gradient is of upstream·loss; absent: 1
  Place place;
};

// What may be wrong with a row of a top-K teacher (the CPU raises it, a GPU flags it).
enum class TeacherFault : int { none = 0, index = 1, twice = 2, mass = 3 };

struct DistillKernels {
  // The first row that counts with a fault, -1 if there is none.
  int64_t (*first_bad_teacher)(const Distill&, TeacherFault*);
  void (*distill)(const Distill&);
};

namespace cuda {  // distill.cu
void run(const Distill&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(DistillKernels, distill_kernels)
