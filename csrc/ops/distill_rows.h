// Rows of any type in blocks of kBlock elements, widened to the accumulator type where it is
// another, and gradients narrowed again: so nothing of the distillation on the CPU is a template
// over two types. sizeof(T) bytes an element, from or to memory; the block itself stays in the
// first cache. Compiled per ISA level (core/parallel.h).
#pragma once
#include "core/softmax_row.h"
#include "ops/distill.h"

namespace finefuse::FF_ISA_NS {
namespace {

using detail::kBlock;

struct Row {
  char* data;
  DType dtype;
};

int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

Row row_at(const LogitRows& rows, DType dtype, int64_t r) {
  const int64_t size = size_of(dtype);
  const LogitRows in_bytes{rows.data, rows.inner, rows.outer_stride * size,
                           rows.inner_stride * size};
  return {row_of<char>(in_bytes, r), dtype};
}

template <class T> void widen(const T* z, int64_t n, float* out) {
  constexpr int N = kLanes<float>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(out + i, load(z + i));
  const int k = static_cast<int>(n - i);
  if (k > 0) store_partial(out + i, load_partial(z + i, k, 0.0), k);
}
template <class T> void widen(const T* z, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_scalar(z + i);
}
void widen(const double* z, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(z[i]);
}

// Elements [i, i + n) of a row: where they are, or widened into `buffer`.
template <class A> const A* block_of(const Row& row, int64_t i, int64_t n, A* buffer) {
  constexpr DType kOwn = sizeof(A) == 4 ? DType::f32 : DType::f64;
  if (row.dtype == kOwn) return reinterpret_cast<const A*>(row.data) + i;
  switch (row.dtype) {
    case DType::f32:
      if constexpr (sizeof(A) == 8) widen(reinterpret_cast<const float*>(row.data) + i, n, buffer);
      break;
    case DType::bf16: widen(reinterpret_cast<const bf16*>(row.data) + i, n, buffer); break;
    case DType::f16: widen(reinterpret_cast<const f16*>(row.data) + i, n, buffer); break;
    case DType::f64:
      if constexpr (sizeof(A) == 4) widen(reinterpret_cast<const double*>(row.data) + i, n, buffer);
      break;
  }
  return buffer;
}

double element(const Row& row, int64_t i) {
  switch (row.dtype) {
    case DType::f32: return reinterpret_cast<const float*>(row.data)[i];
    case DType::bf16: return load_scalar(reinterpret_cast<const bf16*>(row.data) + i);
    case DType::f16: return load_scalar(reinterpret_cast<const f16*>(row.data) + i);
    case DType::f64: return reinterpret_cast<const double*>(row.data)[i];
  }
  return 0.0;
}

template <class T> FF_INLINE VecH half_bits(VecF x) {
  if constexpr (__is_same(T, bf16)) {
    return __builtin_convertvector(round_to_bf16(x) >> 16, VecH);  // a quiet NaN stays one
  }
  return to_f16_bits(x);
}

template <bool kStream, class T> void narrow(const Accumulator<T>* g, T* out, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  if constexpr (kStream) {  // up to the first aligned element
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kStreamAlign);
    int64_t head = past == 0 ? 0 : (kStreamAlign - past) / static_cast<int64_t>(sizeof(T));
    if (head > n) head = n;
    for (; i < head; i += N) {
      const int k = head - i < N ? static_cast<int>(head - i) : N;
      store_partial(out + i, load_partial(g + i, k, 0.0), k);
    }
    i = head;
  }
  for (; i + 2 * N <= n; i += 2 * N) {
    if constexpr (sizeof(T) == 2) {
      VecU both;
      const VecH h[2] = {half_bits<T>(load(g + i)), half_bits<T>(load(g + i + N))};
      __builtin_memcpy(&both, h, sizeof both);
      store_bytes<kStream>(out + i, both);
    } else {
      const Vec<T> x[2] = {load(g + i), load(g + i + N)};
      store_pair_finite<kStream>(out + i, x);
    }
  }
  for (; i < n; i += N) {
    const int k = n - i < N ? static_cast<int>(n - i) : N;
    store_partial(out + i, load_partial(g + i, k, 0.0), k);
  }
}
template <class T> void narrow(const Accumulator<T>* g, T* out, int64_t n, bool stream) {
  stream ? narrow<true>(g, out, n) : narrow<false>(g, out, n);
}

template <class A> void store_block(const A* g, const Row& out, int64_t i, int64_t n, bool stream) {
  if constexpr (sizeof(A) == 8) {
    narrow(g, reinterpret_cast<double*>(out.data) + i, n, stream);
  } else if (out.dtype == DType::f32) {
    narrow(g, reinterpret_cast<float*>(out.data) + i, n, stream);
  } else if (out.dtype == DType::bf16) {
    narrow(g, reinterpret_cast<bf16*>(out.data) + i, n, stream);
  } else {
    narrow(g, reinterpret_cast<f16*>(out.data) + i, n, stream);
  }
}

void zero(const Row& out, int64_t begin, int64_t end) {
  const int64_t size = size_of(out.dtype);
  __builtin_memset(out.data + begin * size, 0, static_cast<size_t>((end - begin) * size));
}

template <class A> void fill(const Row& out, int64_t n, double value) {
  A g[kBlock];
  for (A& x : g) x = static_cast<A>(value);
  for (int64_t i = 0; i < n; i += kBlock) {
    store_block(g, out, i, n - i < kBlock ? n - i : kBlock, false);
  }
}

}  // namespace
}  // namespace finefuse::FF_ISA_NS
