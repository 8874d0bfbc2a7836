// finefuse._C: the CPU kernels on raw addresses. It knows neither torch nor its tensors: shapes,
// types and strides were checked by the Python side (python/finefuse/_op.py), indices are checked
// here, before anything is written.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array.h"
#include "core/memory.h"
#include "ops/logprobs.h"
#include "ops/preference.h"

namespace py = pybind11;
using namespace finefuse;

namespace {

LogitsShape shape_of(const Layout& l) {
  return {static_cast<DType>(l.field[0]), l.field[1], l.field[2]};
}
LogitRows rows_of(const Array& a, const Layout& l) {
  return {a.data, l.field[3], l.field[4], l.field[5]};
}
bool is_wide(const Layout& l) { return static_cast<DType>(l.field[0]) == DType::f64; }
Indices indices(const Array& a, bool int32) {
  return {a.data, int32 ? IndexType::i32 : IndexType::i64};
}
double* doubles(const Array& a) { return static_cast<double*>(a.data); }

void check_targets(const Indices& targets, const LogitsShape& shape, int64_t ignore_index) {
  const int64_t bad =
      FF_KERNELS(logprobs_kernels).first_bad_target(targets, shape.rows, shape.vocab, ignore_index);
  if (bad < 0) return;
  throw py::value_error("targets: element " + std::to_string(bad) + " is " +
                        std::to_string(targets[bad]) + "; allowed are 0 to " +
                        std::to_string(shape.vocab - 1) + " and ignore_index (" +
                        std::to_string(ignore_index) + ")");
}

void check_offsets(const Indices& offsets, int64_t segments, int64_t total) {
  for (int64_t i = 0; i <= segments; ++i) {
    const int64_t low = i == 0 ? 0 : offsets[i - 1];
    if (offsets[i] < low || offsets[i] > total || (i == 0 && offsets[i] != 0) ||
        (i == segments && offsets[i] != total)) {
      throw py::value_error("cu_seqlens: element " + std::to_string(i) + " is " +
                            std::to_string(offsets[i]) + "; it must rise from 0 to the " +
                            std::to_string(total) + " tokens given");
    }
  }
}

// None or a tensor without storage where a kernel would read.
void need(const char* name, const Array& array, int64_t count) {
  if (count > 0 && array.data == nullptr) {
    throw py::type_error(std::string(name) + ": a tensor with data, not None");
  }
}

void check_lengths(const char* name, const Reals& lengths, int64_t pairs) {
  for (int64_t i = 0; lengths && i < pairs; ++i) {
    if (!(lengths[i] >= 0)) {
      throw py::value_error(std::string(name) + ": element " + std::to_string(i) + " is " +
                            std::to_string(lengths[i]) + "; allowed are 0 and above");
    }
  }
}

void token_logprobs(Array logits, Layout layout, Array targets, bool int32, int64_t ignore_index,
                    double temperature, Array logprobs, Array entropy, Array lse, Array saved,
                    int threads) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  py::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  check_targets(y, shape, ignore_index);
  FF_KERNELS(logprobs_kernels)
      .token_logprobs({shape,
                       rows_of(logits, layout),
                       y,
                       ignore_index,
                       temperature,
                       {logprobs.data, wide},
                       {entropy.data, wide},
                       {lse.data, wide},
                       doubles(saved),
                       threads});
}

void token_logprobs_backward(Array logits, Layout layout, Array gradient, Layout gradient_layout,
                             Array targets, bool int32, int64_t ignore_index, double temperature,
                             Array saved, Array g, Array h, Array l, int threads) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  py::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  need("out", gradient, shape.rows);
  need("saved", saved, shape.rows);
  check_targets(y, shape, ignore_index);
  FF_KERNELS(logprobs_kernels)
      .token_logprobs_backward({shape,
                                rows_of(logits, layout),
                                rows_of(gradient, gradient_layout),
                                y,
                                ignore_index,
                                temperature,
                                doubles(saved),
                                {g.data, wide},
                                {h.data, wide},
                                {l.data, wide},
                                threads});
}

void cross_entropy(Array logits, Layout layout, Array gradient, Layout gradient_layout,
                   Array targets, bool int32, int64_t ignore_index, double label_smoothing,
                   int reduction, double scale, Array loss, Array row_loss, Array upstream,
                   int threads) {
  const LogitsShape shape = shape_of(layout);
  const bool wide = is_wide(layout);
  const Indices y = indices(targets, int32);
  py::gil_scoped_release nogil;
  need("logits", logits, shape.rows);
  need("targets", targets, shape.rows);
  check_targets(y, shape, ignore_index);
  FF_KERNELS(logprobs_kernels)
      .cross_entropy({shape,
                      rows_of(logits, layout),
                      rows_of(gradient, gradient_layout),
                      y,
                      ignore_index,
                      label_smoothing,
                      static_cast<Reduction>(reduction),
                      {loss.data, wide},
                      doubles(row_loss),
                      {upstream.data, wide},
                      scale,
                      threads});
}

void sequence_sums(Array logprobs, bool wide, Array mask, Array offsets, bool int32,
                   int64_t segments, int64_t length, int64_t total, bool average, Array sums,
                   int threads) {
  const Indices ends = indices(offsets, int32);
  py::gil_scoped_release nogil;
  need("token_lp", logprobs, total);
  if (ends.data != nullptr) check_offsets(ends, segments, total);
  FF_KERNELS(logprobs_kernels)
      .sequence_sums({{logprobs.data, wide},
                      static_cast<const uint8_t*>(mask.data),
                      ends,
                      segments,
                      length,
                      total,
                      average,
                      {sums.data, wide},
                      threads});
}

void sequence_sums_backward(Array gradient, bool wide, Array mask, Array offsets, bool int32,
                            int64_t segments, int64_t length, int64_t total, bool average,
                            Array out, int threads) {
  const Indices ends = indices(offsets, int32);
  py::gil_scoped_release nogil;
  need("g", gradient, segments);
  if (ends.data != nullptr) check_offsets(ends, segments, total);
  FF_KERNELS(logprobs_kernels)
      .sequence_sums_backward({{gradient.data, wide},
                               static_cast<const uint8_t*>(mask.data),
                               ends,
                               segments,
                               length,
                               total,
                               average,
                               {out.data, wide},
                               threads});
}

void preference(Array chosen, Array rejected, Array ref_chosen, Array ref_rejected,
                Array chosen_lengths, Array rejected_lengths, bool wide, int64_t pairs, int loss,
                double beta, double label_smoothing, int reduction, Array out, Array chosen_rewards,
                Array rejected_rewards, Array margins, Array accuracy, Array gradient) {
  const auto reals = [wide](const Array& a) { return Reals{a.data, wide}; };
  py::gil_scoped_release nogil;
  need("chosen", chosen, pairs);
  need("rejected", rejected, pairs);
  check_lengths("chosen_lengths", reals(chosen_lengths), pairs);
  check_lengths("rejected_lengths", reals(rejected_lengths), pairs);
  FF_KERNELS(preference_kernels)
      .preference({pairs, reals(chosen), reals(rejected), reals(ref_chosen), reals(ref_rejected),
                   reals(chosen_lengths), reals(rejected_lengths),
                   static_cast<PreferenceLoss>(loss), beta, label_smoothing,
                   static_cast<Reduction>(reduction), reals(out), reals(chosen_rewards),
                   reals(rejected_rewards), reals(margins), reals(accuracy), reals(gradient)});
}

std::string set_isa_by_name(const std::string& name) {
  Isa isa;
  if (!isa_from_name(name.c_str(), &isa)) {
    throw py::value_error("isa: '" + name + "'; allowed are baseline, avx2, avx512, avx512bf16");
  }
  const std::string before = isa_name(current_isa());
  if (!set_isa(isa)) {
    throw py::value_error("isa: this machine runs up to " + std::string(isa_name(machine_isa())) +
                          ", not " + name);
  }
  return before;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of finefuse on raw addresses; called through finefuse's public functions.";
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set level in force.");
  m.def("machine_isa", [] { return isa_name(machine_isa()); }, "The highest level here.");
  m.def("_set_isa", set_isa_by_name, "Set the level (tests); returns the one before.");
  m.def("token_logprobs", token_logprobs);
  m.def("token_logprobs_backward", token_logprobs_backward);
  m.def("cross_entropy", cross_entropy);
  m.def("sequence_sums", sequence_sums);
  m.def("sequence_sums_backward", sequence_sums_backward);
  m.def("preference", preference);
}
