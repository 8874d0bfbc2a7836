// Which instruction set the kernels run on: found once from cpuid, lowered by FINEFUSE_ISA.
//
// The sources in csrc/ops are compiled once per level into the namespace FF_ISA_NS (baseline, avx2,
// avx512, avx512bf16). Each of them exports one function that returns its table of kernels;
// FF_KERNELS(name) picks the table of the level in force.
#pragma once

namespace finefuse {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

Isa machine_isa();              // the highest level this machine runs
Isa current_isa();              // the level in force
const char* isa_name(Isa isa);  // "baseline", "avx2", "avx512", "avx512bf16"
bool isa_from_name(const char* name, Isa* isa);
bool set_isa(Isa isa);  // false, and nothing changed, above machine_isa()

}  // namespace finefuse

#if defined(__x86_64__)
#define FF_DECLARE_KERNELS(Table, name) \
  namespace finefuse {                  \
  namespace baseline {                  \
  const Table& name();                  \
  }                                     \
  namespace avx2 {                      \
  const Table& name();                  \
  }                                     \
  namespace avx512 {                    \
  const Table& name();                  \
  }                                     \
  namespace avx512bf16 {                \
  const Table& name();                  \
  }                                     \
  }
#define FF_KERNELS(name)                                                                     \
  (::finefuse::current_isa() == ::finefuse::Isa::avx512bf16 ? ::finefuse::avx512bf16::name() \
   : ::finefuse::current_isa() == ::finefuse::Isa::avx512   ? ::finefuse::avx512::name()     \
   : ::finefuse::current_isa() == ::finefuse::Isa::avx2     ? ::finefuse::avx2::name()       \
                                                            : ::finefuse::baseline::name())
#else  // Arm and the rest: the baseline level alone
#define FF_DECLARE_KERNELS(Table, name) \
  namespace finefuse {                  \
  namespace baseline {                  \
  const Table& name();                  \
  }                                     \
  }
#define FF_KERNELS(name) (::finefuse::baseline::name())
#endif
