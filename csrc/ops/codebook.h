// Codebook quantisation, byte-compatible with bitsandbytes: what crosses from Python to the
// kernels. The formats are SPEC section 1; docs/codebook.md repeats them.
#pragma once
#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/place.h"

namespace finefuse {

// How a scaled element x' becomes a code.
enum class CodeRule : int {
  sorted = 0,  // the number of m_i = float32((c_i + c_{i+1})/2) with x' > m_i
  fp4 = 1      // FP4's thresholds on |x'|, bit 3 the sign
};

// 4, 8, 16 or 256 entries: 2, 3, 4 or 8 bits, packed most significant bits first.
constexpr int code_bits(int entries) {
  return entries == 4 ? 2 : entries == 8 ? 3 : entries == 16 ? 4 : entries == 256 ? 8 : 0;
}
// Whole bytes; 3-bit codes come in groups of eight in three bytes.
constexpr int64_t packed_bytes(int64_t count, int entries) {
  const int bits = code_bits(entries);
  return bits == 3 ? (count + 7) / 8 * 3 : (count * bits + 7) / 8;
}

// x' = x·(1/absmax) of its block of `blocksize` elements (the last may be short), then the rule.
struct Quantize {
  const void* x;  // (count,) float32, bfloat16 or float16
  DType dtype;
  int64_t count;
  const float* code;  // (entries,)
  int entries;
  CodeRule rule;
  int64_t blocksize;
  uint8_t* codes;  // (packed_bytes(count, entries),); padded with the code of 0
  float* absmax;   // (blocks,)
  Place place;
};

// The absmax of each block: given, or, where `values` is null, quantised itself:
// float32(code[codes[b]]·absmax[b / blocksize]) + offset, two roundings.
struct BlockScales {
  const float* values;   // (blocks,)
  const uint8_t* codes;  // (blocks,)
  const float* code;     // (256,)
  const float* absmax;   // (ceil(blocks / blocksize),)
  int64_t blocksize;
  float offset;
};

// float32(code[c]·absmax) of every element.
struct CodebookArray {
  const uint8_t* codes;
  const float* code;  // (entries,)
  int entries;
  BlockScales absmax;
  int64_t blocksize;
};

struct Dequantize {
  CodebookArray from;
  int64_t count;
  void* out;  // (count,), each rounded to dtype
  DType dtype;
  Place place;
};

// y = x·Wᵀ + bias, or dx = dy·W where transposed, for a few tokens.
struct CodebookLinear {
  const void* x;  // (tokens, columns), or dy (tokens, rows); contiguous
  DType dtype;    // of x, bias and y
  int64_t tokens;
  CodebookArray weight;  // (rows, columns), row by row; blocks ignore rows
  int64_t rows, columns;
  bool transposed;
  const void* bias;  // (rows,), may be absent
  void* y;           // (tokens, rows), or dx (tokens, columns)
  float* workspace;  // CPU: (codebook_workspace(tokens, columns),), twice that if transposed
  Place place;
};

// Rows of x as float32, each padded to whole vectors.
inline constexpr int64_t kCodebookPad = 128;
constexpr int64_t codebook_workspace(int64_t tokens, int64_t columns) {
  return tokens * ((columns + kCodebookPad - 1) / kCodebookPad * kCodebookPad);
}

struct CodebookKernels {
  void (*quantize)(const Quantize&);
  void (*dequantize)(const Dequantize&);
  void (*codebook_linear)(const CodebookLinear&);
};

namespace cuda {  // codebook.cu
void run(const Quantize&);
void run(const Dequantize&);
void run(const CodebookLinear&);
}  // namespace cuda

}  // namespace finefuse

FF_DECLARE_KERNELS(CodebookKernels, codebook_kernels)
