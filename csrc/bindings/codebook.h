// Codebook quantisation and products with packed codes: see bindings/ops.h.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "ops/codebook.h"

namespace finefuse {

inline void check_blocksize(const char* name, int64_t blocksize) {
  if (blocksize < 1) {
    throw pybind11::value_error(std::string(name) + ": " + std::to_string(blocksize) +
                                "; positive");
  }
}

inline void check_code(int entries, int64_t blocksize) {
  if (code_bits(entries) == 0) {
    throw pybind11::value_error("code: " + std::to_string(entries) +
                                " entries; allowed are 4, 8, 16 and 256");
  }
  check_blocksize("blocksize", blocksize);
}

template <class Backend>
void quantize(Array x, int dtype, int64_t count, Array code, int entries, int rule,
              int64_t blocksize, Array codes, Array absmax, Place place) {
  check_code(entries, blocksize);
  if (is_wide(dtype)) {
    throw pybind11::type_error("x: float32, bfloat16 or float16, not float64");
  }
  pybind11::gil_scoped_release nogil;
  need("x", x, count);
  need("code", code, entries);
  need("codes", codes, count);
  need("absmax", absmax, count);
  Backend::run(Quantize{x.data, static_cast<DType>(dtype), count, floats(code), entries,
                        static_cast<CodeRule>(rule), blocksize, bytes(codes), floats(absmax),
                        place});
}

// The argument lists of dequantize and codebook_linear name the same array of codes.
inline CodebookArray codebook_array(int64_t count, const Array& codes, const Array& code,
                                    int entries, const Array& absmax, const Array& absmax_codes,
                                    const Array& nested_code, const Array& nested_absmax,
                                    int64_t nested_blocksize, double offset, int64_t blocksize) {
  check_code(entries, blocksize);
  need("codes", codes, count);
  need("code", code, entries);
  if (absmax.data == nullptr && count > 0) {
    need("absmax_codes", absmax_codes, count);
    need("nested_code", nested_code, count);
    need("nested_absmax", nested_absmax, count);
    check_blocksize("nested_blocksize", nested_blocksize);
  }
  return {bytes(codes),
          floats(code),
          entries,
          {floats(absmax), bytes(absmax_codes), floats(nested_code), floats(nested_absmax),
           nested_blocksize, static_cast<float>(offset)},
          blocksize};
}

template <class Backend>
void dequantize(Array codes, int64_t count, Array code, int entries, Array absmax,
                Array absmax_codes, Array nested_code, Array nested_absmax,
                int64_t nested_blocksize, double offset, int64_t blocksize, Array out, int dtype,
                Place place) {
  if (is_wide(dtype)) {
    throw pybind11::type_error("out: float32, bfloat16 or float16, not float64");
  }
  const CodebookArray from =
      codebook_array(count, codes, code, entries, absmax, absmax_codes, nested_code, nested_absmax,
                     nested_blocksize, offset, blocksize);
  pybind11::gil_scoped_release nogil;
  need("out", out, count);
  Backend::run(Dequantize{from, count, out.data, static_cast<DType>(dtype), place});
}

template <class Backend>
void codebook_linear(Array x, int dtype, int64_t tokens, Array codes, Array code, int entries,
                     Array absmax, Array absmax_codes, Array nested_code, Array nested_absmax,
                     int64_t nested_blocksize, double offset, int64_t blocksize, int64_t rows,
                     int64_t columns, bool transposed, Array bias, Array y, Place place) {
  if (is_wide(dtype)) {
    throw pybind11::type_error("x: float32, bfloat16 or float16, not float64");
  }
  const CodebookArray weight =
      codebook_array(rows * columns, codes, code, entries, absmax, absmax_codes, nested_code,
                     nested_absmax, nested_blocksize, offset, blocksize);
  pybind11::gil_scoped_release nogil;
  need("x", x, tokens * (transposed ? rows : columns));
  need("y", y, tokens * (transposed ? columns : rows));
  Backend::run(CodebookLinear{x.data, static_cast<DType>(dtype), tokens, weight, rows, columns,
                              transposed, bias.data, y.data, nullptr, place});
}

}  // namespace finefuse
