// finefuse._CUDA: the CUDA kernels on raw addresses (bindings/ops.h), on the caller's stream and
// the current device. cudart is linked statically, so importing it needs no driver; a call without
// one raises.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "bindings/ops.h"

namespace py = pybind11;

namespace {

// Indices lie on the device: the kernels look at them.
struct Cuda {
  static void check_targets(const char*, const finefuse::Indices&, const finefuse::LogitsShape&,
                            int64_t) {}
  static void check_offsets(const finefuse::Indices&, int64_t, int64_t) {}
  static void check_segments(const finefuse::Segments&, int64_t) {}
  static void check_teacher(const finefuse::Distill&) {}
  static void check_lengths(const char*, const finefuse::Reals&, int64_t) {}
  template <class Args> static void run(const Args& args) { finefuse::cuda::run(args); }
};

}  // namespace

PYBIND11_MODULE(_CUDA, m, py::mod_gil_not_used()) {
  m.doc() =
      "CUDA kernels of finefuse on raw addresses; called through finefuse's public functions.";
  m.attr("architectures") = FF_CUDA_ARCHITECTURES;
#if defined(FF_CUDA_ON_CPU)
  m.attr("emulated") = true;  // the build of the tests: see tests/cuda_on_cpu
#else
  m.attr("emulated") = false;
#endif
  m.def(
      "device_count",
      [] {
        int count = 0;
        return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
      },
      "CUDA devices here; 0 without a driver.");
  finefuse::define_ops<Cuda>(m);
  m.def("lora_linear", finefuse::lora_linear<Cuda>);
}
