#include "core/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace finefuse {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // reads cpuid and, through xgetbv, what the system saves
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)) {
    return Isa::baseline;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi"))) {
    return Isa::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::baseline;
#endif
}

Isa initial() {
  Isa isa = machine_isa(), wanted;
  const char* name = std::getenv("FINEFUSE_ISA");
  if (name != nullptr && isa_from_name(name, &wanted) && wanted < isa) isa = wanted;
  return isa;
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() { return state().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

bool set_isa(Isa isa) {
  if (isa > machine_isa()) return false;
  state().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace finefuse
