// How arrays cross into C++: as addresses, taken from the object while the call holds it.
//
// The argument itself (a torch tensor, a NumPy array or None) is passed, never an integer made
// beforehand: Python keeps the arguments alive for the call, so that f(g.contiguous()) is safe,
// where f(g.contiguous().data_ptr()) would free the copy first.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/place.h"

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

// The number of threads (an int), or (the stream's address, the flags) on a GPU.
template <> struct type_caster<finefuse::Place> {
  PYBIND11_TYPE_CASTER(finefuse::Place, const_name("int | tuple[int, Tensor]"));

  bool load(handle source, bool convert) {
    if (PyLong_Check(source.ptr())) {
      value.threads = static_cast<int>(PyLong_AsLong(source.ptr()));
      return !PyErr_Occurred();
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    type_caster<finefuse::Array> flags;
    if (!flags.load(PyTuple_GET_ITEM(source.ptr(), 1), convert)) return false;
    value.flags = static_cast<int32_t*>(static_cast<finefuse::Array&>(flags).data);
    value.stream = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail
