// finefuse._C: the CPU kernels on raw addresses (bindings/ops.h).
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/ops.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "ops/bandit.h"

namespace py = pybind11;
using namespace finefuse;

namespace {

struct Cpu {
  static void check_targets(const char* name, const Indices& targets, const LogitsShape& shape,
                            int64_t ignore_index) {
    const int64_t bad = FF_KERNELS(logprobs_kernels)
                            .first_bad_target(targets, shape.rows, shape.vocab, ignore_index);
    if (bad < 0) return;
    throw py::value_error(std::string(name) + ": element " + std::to_string(bad) + " is " +
                          std::to_string(targets[bad]) + "; allowed are 0 to " +
                          std::to_string(shape.vocab - 1) + " and ignore_index (" +
                          std::to_string(ignore_index) + ")");
  }

  static void check_offsets(const Indices& offsets, int64_t segments, int64_t total) {
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

  static void check_lengths(const char* name, const Reals& lengths, int64_t pairs) {
    for (int64_t i = 0; lengths && i < pairs; ++i) {
      if (!(lengths[i] >= 0)) {
        throw py::value_error(std::string(name) + ": element " + std::to_string(i) + " is " +
                              std::to_string(lengths[i]) + "; allowed are 0 and above");
      }
    }
  }

  static void check_segments(const Segments& s, int64_t tokens) {
    bool good = s.begins[0] >= 0 && s.begins[s.adapters] <= tokens;
    for (int64_t i = 0; i < s.adapters; ++i) good = good && s.begins[i] <= s.begins[i + 1];
    for (int64_t t = 0; t < tokens; ++t) good = good && s.order[t] >= 0 && s.order[t] < tokens;
    if (!good) throw py::value_error("order, begins: not what the forward made");
  }

  static void check_teacher(const Distill& a) {
    TeacherFault fault = TeacherFault::none;
    const int64_t row = FF_KERNELS(distill_kernels).first_bad_teacher(a, &fault);
    if (row < 0) return;
    const std::string where = "row " + std::to_string(row);
    if (fault == TeacherFault::mass) {
      throw py::value_error(
          "teacher_logits: the probabilities of " + where +
          " add up to more than 1; with teacher_indices they are log-probabilities");
    }
    throw py::value_error("teacher_indices: " + where +
                          (fault == TeacherFault::twice ? " has an index twice"
                                                        : " has an index that is not in [0, " +
                                                              std::to_string(a.shape.vocab) + ")"));
  }

  // Kept by each thread, since calls are concurrent: fresh memory costs more than what is done in
  // it.
  static void* workspace(int64_t bytes) {
    thread_local std::vector<double> memory;
    const auto size = static_cast<size_t>((bytes + 7) / 8);
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }
  // For so many numbers of the accumulator's type.
  static void* workspace(int64_t count, DType dtype) { return workspace(count * size_of(dtype)); }
  static int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

  static void run(const TokenLogprobs& a) { FF_KERNELS(logprobs_kernels).token_logprobs(a); }
  static void run(const TokenLogprobsBackward& a) {
    FF_KERNELS(logprobs_kernels).token_logprobs_backward(a);
  }
  static void run(const CrossEntropy& a) { FF_KERNELS(logprobs_kernels).cross_entropy(a); }
  static void run(const ScaleGradient& a) { FF_KERNELS(logprobs_kernels).scale_gradient(a); }
  static void run(const SequenceSums& a) { FF_KERNELS(logprobs_kernels).sequence_sums(a); }
  static void run(const SequenceSumsBackward& a) {
    FF_KERNELS(logprobs_kernels).sequence_sums_backward(a);
  }
  static void run(const Quantize& a) { FF_KERNELS(codebook_kernels).quantize(a); }
  static void run(const Dequantize& a) { FF_KERNELS(codebook_kernels).dequantize(a); }
  static void run(CodebookLinear a) {
    const int64_t count = codebook_workspace(a.tokens, a.columns) * (a.transposed ? 2 : 1);
    a.workspace = static_cast<float*>(workspace(count, DType::f32));
    FF_KERNELS(codebook_kernels).codebook_linear(a);
  }
  // A part of the workspace for each member.
  static void run(LoraShrinkGroup group) {
    const DType dtype = group.members[0].dtype;
    int64_t count = 0;
    for (int m = 0; m < group.count; ++m) count += lora_workspace(group.members[m]);
    char* memory = static_cast<char*>(workspace(count, dtype));
    for (int m = 0; m < group.count; ++m) {
      group.members[m].workspace = memory;
      memory += lora_workspace(group.members[m]) * size_of(dtype);
    }
    FF_KERNELS(lora_kernels).shrink(group.members, group.count);
  }
  static void run(const LoraShrink& a) { run(LoraShrinkGroup{{a}, 1}); }
  static void run(LoraExpand a) {
    a.workspace = workspace(lora_workspace(a), a.dtype);
    FF_KERNELS(lora_kernels).expand(a);
  }
  static void run(const LoraDropout& a) { FF_KERNELS(lora_kernels).dropout(a); }
  static void run(const SegmentedShrink& a) { FF_KERNELS(segmented_kernels).shrink(a); }
  static void run(const SegmentedExpand& a) { FF_KERNELS(segmented_kernels).expand(a); }
  static void run(DoraNorm a) {
    a.workspace = workspace(dora_workspace(a), a.dtype);
    FF_KERNELS(dora_kernels).norm(a);
  }
  static void run(const DoraScale& a) { FF_KERNELS(dora_kernels).scale(a); }
  static void run(DoraScaleBackward a) {
    a.workspace = workspace(dora_workspace(a), a.dtype);
    FF_KERNELS(dora_kernels).scale_backward(a);
  }
  static void run(const Policy& a) { FF_KERNELS(policy_kernels).policy(a); }
  static void run(const PolicyLogits& a) { FF_KERNELS(policy_kernels).policy_logits(a); }
  static void run(const ValueLoss& a) { FF_KERNELS(policy_kernels).value_loss(a); }
  static void run(const GroupAdvantages& a) { FF_KERNELS(policy_kernels).group_advantages(a); }
  static void run(const Gae& a) { FF_KERNELS(policy_kernels).gae(a); }
  static void run(const Distill& a) { FF_KERNELS(distill_kernels).distill(a); }
  static void run(Prune a) {
    a.workspace = workspace(prune_cpu_workspace(a));
    FF_KERNELS(prune_kernels).prune(a);
  }
  static void run(const PruneCodes& a) { FF_KERNELS(prune_kernels).prune_codes(a); }
  static void run(const Preference& a) { FF_KERNELS(preference_kernels).preference(a); }
};

// The rows of each adapter, which the other segmented kernels take; on a GPU torch sorts them.
void segment_rows(Array adapter, bool int32, int64_t tokens, int64_t adapters, Array order,
                  Array begins) {
  need("adapter", adapter, tokens);
  need("order", order, tokens);
  need("begins", begins, 1);
  const SegmentRows a{indices(adapter, int32), tokens, adapters, static_cast<int64_t*>(order.data),
                      static_cast<int64_t*>(begins.data)};
  py::gil_scoped_release nogil;
  const int64_t bad = FF_KERNELS(segmented_kernels).first_bad_adapter(a);
  if (bad >= 0) {
    throw py::value_error("adapter: element " + std::to_string(bad) + " is " +
                          std::to_string(a.adapter[bad]) + "; allowed are 0 to " +
                          std::to_string(adapters - 1) + " and -1 for none");
  }
  FF_KERNELS(segmented_kernels).rows(a);
}

char* aligned_workspace(int64_t bytes) {
  constexpr uintptr_t kLine = 64;
  const auto address = reinterpret_cast<uintptr_t>(Cpu::workspace(bytes + kLine));
  return reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
}

// The bandit is a simulator: on the CPU alone.
void bandit_agent(Array probs, int64_t actions, Array uniforms, int64_t steps,
                  std::array<double, 2> adjusted, std::array<double, 2> advantage,
                  double learning_rate, Array logits, Array rewards, Array adjusted_rewards,
                  Array cumulative, double total) {
  py::gil_scoped_release nogil;
  need("probs", probs, actions);
  need("logits", logits, actions);
  for (const Array& array : {uniforms, rewards, adjusted_rewards, cumulative}) {
    need("uniforms, rewards, adjusted, cumulative", array, steps);
  }
  FF_KERNELS(bandit_kernels)
      .agent({actions,
              steps,
              doubles(probs),
              doubles(uniforms),
              {{adjusted[0], adjusted[1]}, {advantage[0], advantage[1]}},
              learning_rate,
              doubles(logits),
              doubles(rewards),
              doubles(adjusted_rewards),
              doubles(cumulative),
              total,
              reinterpret_cast<double*>(aligned_workspace(bandit_workspace(actions)))});
}

void bandit_agents(Array probs, int64_t actions, int64_t agents, int64_t steps, uint64_t seed,
                   std::array<double, 2> adjusted, std::array<double, 2> advantage,
                   double learning_rate, Array logits, Array rewards, Array adjusted_rewards,
                   Array cumulative, int threads) {
  py::gil_scoped_release nogil;
  need("probs", probs, actions);
  need("logits", logits, agents * actions);
  for (const Array& array : {rewards, adjusted_rewards, cumulative}) {
    need("rewards, adjusted, cumulative", array, agents * steps);
  }
  BanditAgents a{actions,
                 agents,
                 steps,
                 doubles(probs),
                 seed,
                 {{adjusted[0], adjusted[1]}, {advantage[0], advantage[1]}},
                 learning_rate,
                 doubles(logits),
                 doubles(rewards),
                 doubles(adjusted_rewards),
                 doubles(cumulative),
                 nullptr,
                 threads};
  a.workspace = aligned_workspace(bandit_workspace(a));
  FF_KERNELS(bandit_kernels).agents(a);
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
  m.def(
      "advise_huge_pages",
      [](Array array, int64_t bytes) { advise_huge_pages(array.data, static_cast<size_t>(bytes)); },
      "Before an array's first write: ask for huge pages.");
  define_ops<Cpu>(m);
  m.def("segment_rows", segment_rows);
  m.def("bandit_agent", bandit_agent);
  m.def("bandit_agents", bandit_agents);
}
