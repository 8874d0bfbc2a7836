// Element types as they cross from Python, and what each is computed in.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FF_HD __host__ __device__
#else
#define FF_HD
#endif
// static: no symbol compiled for one instruction set can be picked for another
#define FF_TABLE FF_HD static inline

namespace finefuse {

// The numbers are the contract with python/finefuse/_args/__init__.py (DTYPES, REDUCTIONS).
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
enum class IndexType : int { i64 = 0, i32 = 1 };
enum class Reduction : int { none = 0, sum = 1, mean = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Statistics and accumulations: float32, or float64 for float64 input.
template <class T> struct AccumulatorOf {
  using type = float;
};
template <> struct AccumulatorOf<double> {
  using type = double;
};
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// Calls f with a value of the element type.
template <class F> static inline void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64: return f(double{});
  }
}
// The same where float64 is not offered: nothing is called.
template <class F> static inline void by_dtype_but_f64(DType dtype, const F& f) {
  by_dtype(dtype, [&]<class T>(T x) {
    if constexpr (sizeof(T) < 8) f(x);
  });
}

// An array of targets or actions, int32 or int64.
struct Indices {
  const void* data;
  IndexType type;
  FF_HD int64_t operator[](int64_t i) const {
    return type == IndexType::i64 ? static_cast<const int64_t*>(data)[i]
                                  : static_cast<const int32_t*>(data)[i];
  }
};

// An array of float32 or float64, of the accumulator type of the op it belongs to; may be absent.
struct Reals {
  void* data;
  bool wide;  // float64
  FF_HD explicit operator bool() const { return data != nullptr; }
  FF_HD double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  FF_HD void set(int64_t i, double value) const {
    if (wide)
      static_cast<double*>(data)[i] = value;
    else
      static_cast<float*>(data)[i] = static_cast<float>(value);
  }
};

}  // namespace finefuse
