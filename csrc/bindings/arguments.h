// What the bindings of all families make of their arguments: rows of logits, indices, numbers, and
// the check that an array is there.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array.h"
#include "core/logit_rows.h"

namespace finefuse {

inline LogitsShape shape_of(const Layout& l) {
  return {static_cast<DType>(l.field[0]), l.field[1], l.field[2]};
}
inline LogitRows rows_of(const Array& a, const Layout& l) {
  return {a.data, l.field[3], l.field[4], l.field[5]};
}
inline bool is_wide(int dtype) { return static_cast<DType>(dtype) == DType::f64; }
inline bool is_wide(const Layout& l) { return shape_of(l).dtype == DType::f64; }
inline Indices indices(const Array& a, bool int32) {
  return {a.data, int32 ? IndexType::i32 : IndexType::i64};
}
inline double* doubles(const Array& a) { return static_cast<double*>(a.data); }
inline float* floats(const Array& a) { return static_cast<float*>(a.data); }
inline uint8_t* bytes(const Array& a) { return static_cast<uint8_t*>(a.data); }

// None or a tensor without storage where a kernel would read.
inline void need(const char* name, const Array& array, int64_t count) {
  if (count > 0 && array.data == nullptr) {
    throw pybind11::type_error(std::string(name) + ": an array with data, not None");
  }
}

}  // namespace finefuse
