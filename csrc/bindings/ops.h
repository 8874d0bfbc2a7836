// The functions of _C and of _CUDA: the same names and arguments on both, from arrays to the struct
// that a kernel takes. They know neither torch nor its tensors: shapes, types and strides were
// checked by the Python side (_op.py, numpy/), indices are checked by the backend: on the CPU
// before anything is written, on a GPU by the kernel, which flags them and never follows them.
//
// A backend is a struct of static functions: `run`, overloaded on the argument struct, and
// check_targets, check_offsets, check_lengths, check_segments, check_teacher.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/codebook.h"
#include "bindings/distill.h"
#include "bindings/dora.h"
#include "bindings/logprobs.h"
#include "bindings/lora.h"
#include "bindings/policy.h"
#include "bindings/preference.h"
#include "bindings/prune.h"
#include "bindings/segmented.h"

namespace finefuse {

template <class Backend> void define_ops(pybind11::module_& m) {
  m.def("token_logprobs", token_logprobs<Backend>);
  m.def("token_logprobs_backward", token_logprobs_backward<Backend>);
  m.def("cross_entropy", cross_entropy<Backend>);
  m.def("scale_gradient", scale_gradient<Backend>);
  m.def("sequence_sums", sequence_sums<Backend>);
  m.def("sequence_sums_backward", sequence_sums_backward<Backend>);
  m.def("preference", preference<Backend>);
  m.def("distill", distill<Backend>);
  m.def("prune", prune<Backend>);
  m.def("prune_codes", prune_codes<Backend>);
  m.def("policy", policy<Backend>);
  m.def("policy_logits", policy_logits<Backend>);
  m.def("value_loss", value_loss<Backend>);
  m.def("group_advantages", group_advantages<Backend>);
  m.def("gae", gae<Backend>);
  m.def("quantize", quantize<Backend>);
  m.def("dequantize", dequantize<Backend>);
  m.def("codebook_linear", codebook_linear<Backend>);
  m.def("lora_shrink", lora_shrink<Backend>);
  m.def("lora_shrink_group", lora_shrink_group<Backend>);
  m.def("lora_expand", lora_expand<Backend>);
  m.def("lora_dropout", lora_dropout<Backend>);
  m.def("segmented_shrink", segmented_shrink<Backend>);
  m.def("segmented_expand", segmented_expand<Backend>);
  m.def("dora_norm", dora_norm<Backend>);
  m.def("dora_scale", dora_scale<Backend>);
  m.def("dora_scale_backward", dora_scale_backward<Backend>);
}

}  // namespace finefuse
