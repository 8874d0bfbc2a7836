// finefuse._CUDA: the CUDA kernels on raw addresses, on the caller's stream. cudart is linked
// statically, so importing it needs no driver; a call without one says so.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_CUDA, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of finefuse on raw addresses.";
  m.attr("architectures") = FF_CUDA_ARCHITECTURES;
  m.def(
      "device_count",
      [] {
        int count = 0;
        return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
      },
      "CUDA devices here; 0 without a driver.");
}
