// Codebook quantisation on the CPU: how decoding (ops/codebook_decode.h) and encoding
// (ops/codebook_encode.h) are split over threads, and products with packed codes.
//
// clang-format off
//   pass               reads + writes an element (4 bits)     bound by
//   dequantize         0.5 + sizeof(T)                        memory; in cache the stores
//   quantize           sizeof(T) + 0.5                        memory; 8 bits: one gather an element
//   codebook_linear    0.5 of the weight, for all tokens      decoding for one token, then multiply-adds
// clang-format on
//
// Linear: from the packed bytes. A 32-bit word holds 8 codes, so that shifting it brings each of
// them in turn to where the permute looks; x is laid out to match. float32 accumulators, one per
// lane over all columns; a block's scale is applied to its partial sum.
//
// Everything is split by elements, rows or columns, never by the number of threads. Bits promised
// by SPEC section 1 come from plain multiplications and additions: no fused multiply-add there.
#include "ops/codebook.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "core/sizes.h"
#include "core/vec.h"
#include "ops/codebook_decode.h"
#include "ops/codebook_encode.h"

namespace finefuse::FF_ISA_NS {
namespace {

// ---- dequantising -------------------------------------------------------------------------------

template <class T> void dequantize_t(const Dequantize& a) {
  constexpr int64_t kSpan = 4096;
  T* out = static_cast<T*>(a.out);
  const Code16 code16(a.from.code, a.from.entries);
  const int64_t bytes = a.count * static_cast<int64_t>(sizeof(T));
  const bool stream = a.from.entries == 16 && bytes > kStreamBytes &&
                      reinterpret_cast<uintptr_t>(out) % kStreamAlign == 0 &&
                      a.from.blocksize * static_cast<int64_t>(sizeof(T)) % kStreamAlign == 0;
  advise_huge_pages(out, static_cast<size_t>(bytes));
  parallel_for(ceil_div(a.count, kSpan), kSpan * (sizeof(T) + 1), a.place.threads,
               [&](int64_t first, int64_t last) {
                 const int64_t begin = first * kSpan, end = smaller(last * kSpan, a.count);
                 if (stream) {
                   decode_span<T, 4, true>(a.from, code16, begin, end, out + begin);
                   stream_fence();
                 } else {
                   decode_span(a.from, code16, begin, end, out + begin);
                 }
               });
}

void dequantize(const Dequantize& a) {
  by_dtype_but_f64(a.dtype, [&]<class T>(T) { dequantize_t<T>(a); });
}

// ---- quantising ---------------------------------------------------------------------------------

template <class T> void quantize_t(const Quantize& a) {
  constexpr int64_t kStage = 512;   // codes between encoding and packing; a multiple of 8
  constexpr int64_t kBatch = 2048;  // elements that stay in the first-level cache
  const T* x = static_cast<const T*>(a.x);
  const Coder coder(a);
  // As many blocks as fill whole bytes are one item.
  int64_t blocks = 1;
  while (blocks * a.blocksize % 8 != 0) blocks *= 2;
  const int64_t item = blocks * a.blocksize, items = ceil_div(a.count, item);
  // Blocks whose absmax is found before the first of them is encoded: one block after the other
  // would wait for each division.
  const int64_t batch = a.blocksize < kBatch ? kBatch / a.blocksize : 1;
  parallel_for(items, item * (sizeof(T) + 1), a.place.threads, [&](int64_t first, int64_t last) {
    alignas(64) uint8_t stage[kStage + kCodes];
    int64_t staged = 0;
    uint8_t* out = a.codes + packed_bytes(first * item, a.entries);
    const int64_t stop = smaller(last * item, a.count), block_end = (stop - 1) / a.blocksize + 1;
    for (int64_t b = first * blocks; b < block_end; b += batch) {
      const int64_t batch_end = smaller(b + batch, block_end);
      for (int64_t k = b; k < batch_end; ++k) {
        const int64_t begin = k * a.blocksize;
        a.absmax[k] = block_absmax(x + begin, smaller(a.blocksize, stop - begin));
      }
      for (int64_t k = b; k < batch_end; ++k) {
        const int64_t end = smaller((k + 1) * a.blocksize, stop);
        // The next batch: the memory would stand idle meanwhile.
        const char* ahead = reinterpret_cast<const char*>(x + (k + batch) * a.blocksize);
        for (int64_t i = 0; i < a.blocksize * static_cast<int64_t>(sizeof(T)); i += 64) {
          __builtin_prefetch(ahead + i);
        }
        for (int64_t i = k * a.blocksize; i < end;) {
          const int64_t n = smaller(end - i, kStage - staged);
          encode(coder, x + i, n, a.absmax[k], stage + staged);
          staged += n;
          i += n;
          if (staged == kStage) {
            pack_bits(stage, kStage, coder.bits, out);
            out += packed_bytes(kStage, a.entries);
            staged = 0;
          }
        }
      }
    }
    const int unit = coder.bits == 3 ? 8 : 8 / coder.bits;
    while (staged % unit != 0) stage[staged++] = coder.zero;
    pack_bits(stage, staged, coder.bits, out);
  });
}

void quantize(const Quantize& a) {
  by_dtype_but_f64(a.dtype, [&]<class T>(T) { quantize_t<T>(a); });
}

// ---- linear -------------------------------------------------------------------------------------

constexpr int kN = kLanes<float>;
constexpr int64_t kGroup = 8 * kN;  // columns that one vector of packed 4-bit codes holds
static_assert(kCodebookPad % kGroup == 0);
constexpr int64_t kColumns = 4096;  // float32 elements of x at a time, over all tokens
constexpr int64_t kPanel = 16;      // rows that share them
#if defined(__AVX512F__)
constexpr int kMostGrouped = 8;  // tokens for which codes are decoded in registers; for more, into
constexpr int kLeastBlock = 16;  // a buffer
#else
constexpr int kMostGrouped = 2;
constexpr int kLeastBlock = 32;
#endif

// The place in a group of the element that dot_codes has in this lane of its vector e of 8.
//   AVX-512: codes are read as 16 words of 8; vector e is element e of all words.
//   AVX2: bytes of one nibble, 16 a lane, widened by unpacking: even elements, then odd ones.
constexpr int element_of(int e, int lane) {
#if defined(__AVX512F__)
  return 8 * lane + e;
#else
  return 2 * (4 * (e & 3) + (lane & 3) + 16 * (lane >> 2)) + (e >> 2);
#endif
}

// Tokens are taken eight, four, two or one at a time.
constexpr int pass_tokens(int64_t left) {
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// x as float32 for a pass of `tokens`, padded with zeros. Columns come in chunks of
// kColumns / tokens; in a chunk the tokens follow one another, since a whole row apart they would
// share the sets of the first-level cache. `grouped`: each group in the order of dot_codes.
template <class T> void widen(const T* x, int64_t columns, int tokens, bool grouped, float* out) {
  const int64_t stride = codebook_workspace(1, columns);
  for (int64_t column = 0; column < stride; column += kColumns / tokens) {
    const int64_t chunk_end = smaller(column + kColumns / tokens, stride);
    for (int t = 0; t < tokens; ++t) {
      for (int64_t g = column; g < chunk_end; g += kGroup, out += kGroup) {
        float natural[kGroup] = {};
        const int64_t n = smaller(columns - g, kGroup);
        for (int64_t i = 0; i < n; i += kN) {
          const int k = static_cast<int>(smaller(n - i, kN));
          store_partial(natural + i, load_partial(x + t * columns + g + i, k, 0.0), k);
        }
        for (int i = 0; i < kGroup; ++i) {
          out[i] = natural[grouped ? element_of(i / kN, i % kN) : i];
        }
      }
    }
  }
}

// Whether dot_codes serves: its vectors lie in one row, and each lane of a vector in one block.
bool fits_groups(const CodebookLinear& a) {
#if defined(__AVX2__)
  const int64_t size = a.weight.blocksize;
  return a.weight.entries == 16 && a.columns % kGroup == 0 &&
         (kMostGrouped == 8 || a.tokens <= kMostGrouped) && size >= kLeastBlock &&
         (size & (size - 1)) == 0;
#else
  (void)a;
  return false;
#endif
}

// sums[t] += w·x[t] over n decoded weights (a multiple of kN).
template <int kTokens>
FF_INLINE void dot_floats(const float* w, const float* x, int64_t stride, int64_t n, VecF* sums) {
  // Two multiply-adds a cycle, four cycles each: eight sums that do not wait for one another.
  constexpr int kSets = kTokens < 8 ? 8 / kTokens : 1;
  VecF sum[kSets][kTokens] = {};
  const auto add = [&](int set, int64_t i) FF_LAMBDA {
    const VecF v = load(w + i);
    for (int t = 0; t < kTokens; ++t) sum[set][t] = fma(v, load(x + t * stride + i), sum[set][t]);
  };
  int64_t i = 0;
  for (; i + kSets * kN <= n; i += kSets * kN) {
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add(set, i + set * kN);
  }
  for (; i < n; i += kN) add(0, i);
  for (int set = 0; set < kSets; ++set) {
    for (int t = 0; t < kTokens; ++t) sums[t] += sum[set][t];
  }
}

#if defined(__AVX2__)

#if defined(__AVX512F__)
// Element e of the 8 in a 32-bit word of packed codes starts at this bit.
constexpr int kCodeBit[8] = {4, 0, 12, 8, 20, 16, 28, 24};
#endif

// The same from packed codes that begin `skip` elements into the block of scales[0].
template <int kTokens>
FF_INLINE void dot_codes(const uint8_t* codes, const float* scales, int log2_block, int64_t skip,
                         const Code16& code, const float* x, int64_t stride, int64_t n,
                         VecF* sums) {
  VecI scale_at;  // the block of each lane of a vector, from that of the first
  for (int i = 0; i < kN; ++i) scale_at[i] = (element_of(0, i) & -8) >> log2_block;
#if defined(__AVX512F__)
  const __m512 table = (__m512)load(code.entry);
#else
  const Lut<float> lut = Lut<float>::make<true>(code, 1.0f);
  const __m256i low_half = _mm256_set1_epi8(15);
#endif
  VecF sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = sums[t];
  for (int64_t i = 0; i < n; i += kGroup) {
    VecU words;
    __builtin_memcpy(&words, codes + i / 2, sizeof words);
    VecF part[kTokens];
    const auto add = [&](int e, VecF w) FF_LAMBDA {
      for (int t = 0; t < kTokens; ++t) {
        const VecF v = load(x + t * stride + i + e * kN);
        part[t] = e == 0 ? w * v : fma(w, v, part[t]);
      }
    };
#if defined(__AVX512F__)
#pragma GCC unroll 8
    for (int e = 0; e < 8; ++e) {  // the permute looks at the lowest four bits
      add(e, (VecF)_mm512_permutexvar_ps((__m512i)(words >> kCodeBit[e]), table));
    }
#else
#pragma GCC unroll 2
    for (int e = 0; e < 8; e += 4) {
      const __m256i c = (__m256i)(e == 0 ? words >> 4 : words) & low_half;
      __m256i b[4];
      for (int k = 0; k < 4; ++k) b[k] = _mm256_shuffle_epi8(lut.plane[k], c);
      const __m256i w[4] = {_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpacklo_epi8(b[2], b[3]),
                            _mm256_unpackhi_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[2], b[3])};
      add(e, (VecF)_mm256_unpacklo_epi16(w[0], w[1]));
      add(e + 1, (VecF)_mm256_unpackhi_epi16(w[0], w[1]));
      add(e + 2, (VecF)_mm256_unpacklo_epi16(w[2], w[3]));
      add(e + 3, (VecF)_mm256_unpackhi_epi16(w[2], w[3]));
    }
#endif
    const float* first = scales + ((skip + i) >> log2_block);
#if defined(__AVX512F__)
    const VecF scale = (VecF)_mm512_permutexvar_ps((__m512i)scale_at, (__m512)load(first));
#else
    const VecF scale = (VecF)_mm256_permutevar8x32_ps((__m256)load(first), (__m256i)scale_at);
#endif
    for (int t = 0; t < kTokens; ++t) sum[t] = fma(part[t], scale, sum[t]);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = sum[t];
}

#endif

// The same from the decoded weights [at, at + n).
template <int kTokens>
void dot_decoded(const CodebookLinear& a, const Code16& code16, bool grouped, int64_t at,
                 const float* x, int64_t stride, int64_t n, VecF* sums) {
  alignas(64) float w[kColumns];
  decode_span(a.weight, code16, at, at + n, w);
  int64_t padded = n;
  while (padded % kN != 0) w[padded++] = 0.0f;
  if (grouped) {
    for (int64_t g = 0; g < n; g += kGroup) {
      float natural[kGroup];
      __builtin_memcpy(natural, w + g, sizeof natural);
      for (int i = 0; i < kGroup; ++i) w[g + i] = natural[element_of(i / kN, i % kN)];
    }
  }
  dot_floats<kTokens>(w, x, stride, padded, sums);
}

// Rows [begin, end) of the weight for a pass of kTokens tokens from `token` on.
template <class T, int kTokens>
void linear_rows(const CodebookLinear& a, bool grouped, int64_t token, int64_t begin, int64_t end) {
  const int64_t columns = codebook_workspace(1, a.columns);  // as widen padded them
  const Code16 code16(a.weight.code, a.weight.entries);
  const int64_t chunk = kColumns / kTokens;
  const bool from_codes = grouped && kTokens <= kMostGrouped;
  const auto x_at = [&](int64_t column)
                        FF_LAMBDA { return a.workspace + token * columns + column * kTokens; };
  const auto stride_at = [&](int64_t column) FF_LAMBDA { return smaller(chunk, columns - column); };
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t rows = smaller(kPanel, end - panel);
    VecF sums[kPanel][kTokens] = {};
    for (int64_t column = 0; column < a.columns; column += chunk) {
      const int64_t n = smaller(chunk, a.columns - column);
      const float* x = x_at(column);
      const int64_t stride = stride_at(column);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (panel + r) * a.columns + column;
#if defined(__AVX2__)
        if (from_codes) {
          const int log2_block = 63 - __builtin_clzll(static_cast<uint64_t>(a.weight.blocksize));
          float scales[kScaleBatch + kN];  // a vector is read from any of them on
          const int64_t first = at >> log2_block, count = ((at + n - 1) >> log2_block) - first + 1;
          if (a.weight.absmax.values != nullptr)
            __builtin_memcpy(scales, a.weight.absmax.values + first,
                             static_cast<size_t>(count) * sizeof(float));
          else
            decode_scales(a.weight.absmax, first, count, scales);
          store(scales + count, VecF{});
          dot_codes<kTokens <= kMostGrouped ? kTokens : 1>(
              a.weight.codes + at / 2, scales, log2_block, at & (a.weight.blocksize - 1), code16, x,
              stride, n, sums[r]);
          continue;
        }
#endif
        dot_decoded<kTokens>(a, code16, grouped, at, x, stride, n, sums[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      // Sums that are not scaled yet may overflow where the product does not; and an infinite
      // absmax makes NaN of a code of 0, which its block's partial sum hides.
      bool finite = true;
      for (int t = 0; t < kTokens; ++t) {
        finite &= __builtin_fabs(static_cast<double>(horizontal_sum(sums[r][t]))) <= kMaxFloat;
      }
      if (from_codes && !finite) {
        for (int t = 0; t < kTokens; ++t) sums[r][t] = VecF{};
        for (int64_t column = 0; column < a.columns; column += chunk) {
          dot_decoded<kTokens>(a, code16, grouped, (panel + r) * a.columns + column, x_at(column),
                               stride_at(column), smaller(chunk, a.columns - column), sums[r]);
        }
      }
      const double b = bias == nullptr ? 0.0 : load_scalar(bias + panel + r);
      for (int t = 0; t < kTokens; ++t) {
        store_scalar(y + (token + t) * a.rows + panel + r, horizontal_sum(sums[r][t]) + b);
      }
    }
  }
}

template <class T> void linear_t(const CodebookLinear& a) {
  const int64_t columns = codebook_workspace(1, a.columns);
  const bool grouped = fits_groups(a);
  for (int64_t t = 0; t < a.tokens; t += pass_tokens(a.tokens - t)) {
    widen(static_cast<const T*>(a.x) + t * a.columns, a.columns, pass_tokens(a.tokens - t), grouped,
          a.workspace + t * columns);
  }
  parallel_for(a.rows, a.columns * (a.tokens + 1) / 2, a.place.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = 0; t < a.tokens; t += pass_tokens(a.tokens - t)) {
                   switch (pass_tokens(a.tokens - t)) {
                     case 8: linear_rows<T, 8>(a, grouped, t, begin, end); break;
                     case 4: linear_rows<T, 4>(a, grouped, t, begin, end); break;
                     case 2: linear_rows<T, 2>(a, grouped, t, begin, end); break;
                     default: linear_rows<T, 1>(a, grouped, t, begin, end);
                   }
                 }
               });
}

// dx = dy·W by spans of columns, each summed over the rows in order, kBlockRows at a time: one
// chain over thousands of rows would lose a digit.
template <class T> void linear_transposed_t(const CodebookLinear& a) {
  constexpr int64_t kSpan = 512, kRows = 4, kBlockRows = 128;
  const Code16 code16(a.weight.code, a.weight.entries);
  const T* dy = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.y);
  parallel_for(ceil_div(a.columns, kSpan), a.rows * kSpan, a.place.threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t span = first; span < last; ++span) {
                   const int64_t column = span * kSpan, n = smaller(kSpan, a.columns - column);
                   const int64_t padded = (n + kN - 1) / kN * kN;
                   float* totals = a.workspace + column * a.tokens;  // (tokens, padded)
                   float* sums = totals + codebook_workspace(a.tokens, a.columns);
                   const auto size = static_cast<size_t>(a.tokens * padded) * sizeof *sums;
                   const auto add = [&] {
                     for (int64_t i = 0; i < a.tokens * padded; i += kN) {
                       store(totals + i, load(totals + i) + load(sums + i));
                     }
                   };
                   __builtin_memset(totals, 0, size);
                   __builtin_memset(sums, 0, size);
                   for (int64_t r = 0; r < a.rows; r += kRows) {
                     if (r > 0 && r % kBlockRows == 0) {
                       add();
                       __builtin_memset(sums, 0, size);
                     }
                     const int64_t rows = smaller(kRows, a.rows - r);
                     alignas(64) float w[kRows][kSpan];
                     if (rows < kRows || n < padded) __builtin_memset(w, 0, sizeof w);
                     for (int64_t j = 0; j < rows; ++j) {
                       const int64_t at = (r + j) * a.columns + column;
                       decode_span(a.weight, code16, at, at + n, w[j]);
                     }
                     for (int64_t t = 0; t < a.tokens; ++t) {
                       VecF g[kRows];
                       for (int64_t j = 0; j < kRows; ++j) {
                         g[j] = splat<VecF>(j < rows ? load_scalar(dy + t * a.rows + r + j) : 0.0);
                       }
                       for (int64_t i = 0; i < padded; i += kN) {
                         VecF sum = load(sums + t * padded + i);
                         for (int64_t j = 0; j < kRows; ++j) sum = fma(g[j], load(w[j] + i), sum);
                         store(sums + t * padded + i, sum);
                       }
                     }
                   }
                   add();
                   for (int64_t t = 0; t < a.tokens; ++t) {
                     for (int64_t i = 0; i < n; i += kN) {
                       store_partial(dx + t * a.columns + column + i, load(totals + t * padded + i),
                                     static_cast<int>(smaller(kN, n - i)));
                     }
                   }
                 }
               });
}

template <class T> void codebook_linear_t(const CodebookLinear& a) {
  if (a.transposed)
    linear_transposed_t<T>(a);
  else
    linear_t<T>(a);
}

void codebook_linear(const CodebookLinear& a) {
  by_dtype_but_f64(a.dtype, [&]<class T>(T) { codebook_linear_t<T>(a); });
}

}  // namespace

const CodebookKernels& codebook_kernels() {
  static constexpr CodebookKernels kernels{quantize, dequantize, codebook_linear};
  return kernels;
}

}  // namespace finefuse::FF_ISA_NS
