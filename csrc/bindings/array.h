// How arrays cross into C++: as addresses, taken from the object while the call holds it.
//
// The argument itself (a torch tensor, a NumPy array or None) is passed, never an integer made
// beforehand: Python keeps the arguments alive for the call, so that f(g.contiguous()) is safe,
// where f(g.contiguous().data_ptr()) would free the copy first.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace finefuse {

struct Array {
  void* data = nullptr;  // null for None
};

// (dtype, rows, vocab, inner, outer_stride, inner_stride), see _op.logit_rows: LogitsShape,
// LogitRows.
struct Layout {
  int64_t field[6];
};

}  // namespace finefuse

namespace pybind11::detail {

template <> struct type_caster<finefuse::Array> {
  PYBIND11_TYPE_CASTER(finefuse::Array, const_name("Tensor | ndarray | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (npy_api::get().PyArray_Check_(source.ptr())) {
      value.data = array_proxy(source.ptr())->data;
      return true;
    }
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const object address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
    if (!address) throw error_already_set();
    value.data = PyLong_AsVoidPtr(address.ptr());
    if (value.data == nullptr && PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

template <> struct type_caster<finefuse::Layout> {
  PYBIND11_TYPE_CASTER(finefuse::Layout, const_name("tuple[int, int, int, int, int, int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 6) return false;
    for (int i = 0; i < 6; ++i) {
      value.field[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
      if (value.field[i] == -1 && PyErr_Occurred()) throw error_already_set();
    }
    return true;
  }
};

}  // namespace pybind11::detail
