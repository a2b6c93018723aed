// Batch norm with given statistics, within bounds (channel_norm.h has the formula), and an
// activation: one pass over memory, 16 bytes at a time where everything is aligned to 16 bytes.
//
// A thread has the same values of every row it visits, so it makes the constants of their channels
// once and keeps them in registers. All of it is fp32: the mean is taken off before anything is
// rounded or multiplied, and no step is fused, so that each rounds monotonically and |y| is at most
// the same expression of max_abs, |weight| and |bias|, bit for bit. The result is rounded once.
//
// Letters: V values of a thread, W values of a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/kernel_tables.h"
#include "cuda/ptx.cuh"

namespace seqkernels::cuda {

// ---- values of a type in registers ----

// V values as they lie in memory; T is float, or uint16_t for bf16.
template <class T, int kValues>
struct Packed {
  using Word = Vector16;
  static_assert(kValues * sizeof(T) == 16);

  static __device__ __forceinline__ void store(Word* p, const Word& word) {
    store_global_whole(p, word);
  }
  static __device__ __forceinline__ void unpack(const Word& word, float (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        values[2 * i] = bf16_low(word.v[i]);
        values[2 * i + 1] = bf16_high(word.v[i]);
      } else {
        values[i] = bits_as_float(word.v[i]);
      }
    }
  }
  static __device__ __forceinline__ Word pack(const float (&values)[kValues]) {
    Word word;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        word.v[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
      } else {
        word.v[i] = float_as_bits(values[i]);
      }
    }
    return word;
  }
};

template <class T>
struct Packed<T, 1> {
  using Word = T;

  static __device__ __forceinline__ void store(Word* p, Word word) { store_global(p, word); }
  static __device__ __forceinline__ void unpack(Word word, float (&values)[1]) {
    if constexpr (sizeof(T) == 2) {
      values[0] = bf16_low(word);
    } else {
      values[0] = word;
    }
  }
  static __device__ __forceinline__ Word pack(const float (&values)[1]) {
    if constexpr (sizeof(T) == 2) {
      return static_cast<Word>(pack_bf16(values[0], 0.0f) & 0xffff);
    } else {
      return values[0];
    }
  }
};

// ---- arithmetic ----

// Exact:   y = (x + offset) scale + shift
// Bounded: y = clamp((x + offset) inverse) scale + shift, NaN counting as 0 in the clamp
struct ChannelNormConstants {
  float offset, inverse, scale, shift;
};

// To about 1 ulp, from denormals to infinity; 1 / sqrt(0) is infinite. Without the subroutines that
// a division and a root call, for which the registers of a thread would be spilled.
__device__ __forceinline__ float inverse_root(float v) {
  const bool small = v < 0x1p-100f;
  const float scaled = small ? v * 0x1p48f : v;
  const float y = rsqrt_approx(scaled);
  const float error = fmaf(-scaled * y, y, 1.0f);
  const float better = error == error ? fmaf(0.5f * y, error, y) : y;
  return small ? better * 0x1p24f : better;
}

// With a bound, statistics without meaning give inverse = 0, so that z is 0, or NaN where x is not
// finite, which counts as 0. Without one a negative variance gives NaN.
template <bool kBounded>
__device__ __forceinline__ ChannelNormConstants make_constants(const ResilientBatchNormParams& p,
                                                               float mean, float var, float weight,
                                                               float bias) {
  constexpr float kLargest = 0x1.fffffep127f;
  float inverse = inverse_root((kBounded && var < p.min_var ? p.min_var : var) + p.eps);
  float offset = -mean;
  if (kBounded && !(fabsf(mean) <= kLargest && var >= 0.0f && var <= kLargest)) {
    offset = inverse = 0.0f;
  }
  return {offset, inverse, kBounded ? weight : multiply_rounded(weight, inverse), bias};
}

template <bool kBounded>
__device__ __forceinline__ float normalize(float x, const ChannelNormConstants& c, float max_abs) {
  float z = add_rounded(x, c.offset);
  if constexpr (kBounded) {
    z = multiply_rounded(z, c.inverse);
    z = z != z ? 0.0f : fminf(fmaxf(z, -max_abs), max_abs);
  }
  return add_rounded(multiply_rounded(z, c.scale), c.shift);
}

__device__ __forceinline__ float gelu(float y) {
  const float half = 0.5f * y;
  return half + half * erf_fp32(y * 0.70710678f);
}
// y / (1 + exp(-2 sqrt(2 / pi) (y + 0.044715 y^3))), the same as 0.5 y (1 + tanh(...)).
__device__ __forceinline__ float gelu_tanh(float y) {
  constexpr float kScale = -2.0f * 0.79788456f * 1.44269504f;
  const float inner = y * (0.044715f * y * y + 1.0f);
  return y * reciprocal_approx(1.0f + exp2_approx(kScale * inner));
}

template <int kValues>
__device__ __forceinline__ void activate(float (&y)[kValues], Activation kind, float slope) {
  static_assert(kActivations == 5, "every activation has its branch here");
  if (kind == Activation::kNone) return;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (kind == Activation::kRelu) {
      y[i] = y[i] < 0.0f ? 0.0f : y[i];
    } else if (kind == Activation::kLeakyRelu) {
      y[i] = y[i] < 0.0f ? y[i] * slope : y[i];
    } else {
      y[i] = kind == Activation::kGelu ? gelu(y[i]) : gelu_tanh(y[i]);
    }
  }
}

// ---- a thread's channels ----

template <int kValues>
__device__ __forceinline__ void load_channels(const float* from, float missing,
                                              float (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    Vector16 word{};
    if (from) word = load_global(reinterpret_cast<const Vector16*>(from + i));
#pragma unroll
    for (int j = 0; j < 4; ++j) values[i + j] = from ? bits_as_float(word.v[j]) : missing;
  }
}

template <bool kBounded>
__device__ __forceinline__ ChannelNormConstants constants_of(const ResilientBatchNormParams& p,
                                                             int64_t channel) {
  return make_constants<kBounded>(p, load_global(p.mean + channel), load_global(p.var + channel),
                                  p.weight ? load_global(p.weight + channel) : 1.0f,
                                  p.bias ? load_global(p.bias + channel) : 0.0f);
}

// Those of values `first` to `first` + V - 1 of a row; beyond the row's end any will do.
template <int kValues, bool kBounded>
__device__ __forceinline__ void constants_of_values(const ResilientBatchNormParams& p,
                                                    int32_t first,
                                                    ChannelNormConstants (&c)[kValues]) {
  const int32_t run = first / p.repeat;
  int32_t channel = run % p.channels;
  if constexpr (kValues > 1) {
    if (p.aligned_channels) {
      float mean[kValues], var[kValues], weight[kValues], bias[kValues];
      load_channels(p.mean + channel, 0.0f, mean);
      load_channels(p.var + channel, 0.0f, var);
      load_channels(p.weight ? p.weight + channel : nullptr, 1.0f, weight);
      load_channels(p.bias ? p.bias + channel : nullptr, 0.0f, bias);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        c[i] = make_constants<kBounded>(p, mean[i], var[i], weight[i], bias[i]);
      }
      return;
    }
  }
  int32_t left = p.repeat - (first - run * p.repeat);  // values of this channel
  c[0] = constants_of<kBounded>(p, channel);
#pragma unroll
  for (int i = 1; i < kValues; ++i) {
    c[i] = c[i - 1];
    if (--left == 0) {
      left = p.repeat;
      channel = channel + 1 == p.channels ? 0 : channel + 1;
      c[i] = constants_of<kBounded>(p, channel);
    }
  }
}

// ---- the kernel ----

// The row a thread is at.
struct RowCursor {
  int64_t row, outer, inner;
  __device__ __forceinline__ void advance(const ResilientBatchNormParams& p) {
    row += p.step_row;
    outer += p.step_outer;
    inner += p.step_inner;
    if (inner >= p.inner) {
      inner -= p.inner;
      ++outer;
    }
  }
  __device__ __forceinline__ int64_t in_x(const ResilientBatchNormParams& p) const {
    return outer * p.x_stride_outer + inner * p.x_stride_row;
  }
  __device__ __forceinline__ int64_t in_out(const ResilientBatchNormParams& p) const {
    return outer * p.out_stride_outer + inner * p.out_stride_row;
  }
};

template <class T, int kValues, bool kBounded, bool kOnePerRow>
struct ResilientBatchNormThread {
  using Values = Packed<T, kValues>;
  const ResilientBatchNormParams& p;
  int64_t first;                                             // of the row's values
  ChannelNormConstants constants[kOnePerRow ? 1 : kValues];  // kOnePerRow: made for each row

  // [V] in place
  __device__ __forceinline__ void compute(float (&values)[kValues],
                                          const ChannelNormConstants& of_row) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = normalize<kBounded>(values[i], kOnePerRow ? of_row : constants[i], p.max_abs);
    }
    activate(values, p.activation, p.negative_slope);
  }
  __device__ __forceinline__ ChannelNormConstants of_row(const RowCursor& row) const {
    if constexpr (kOnePerRow) {
      return constants_of<kBounded>(p, row.inner);
    } else {
      return constants[0];
    }
  }

  // All V values of `kRows` rows, every load before the first use.
  template <int kRows>
  __device__ __forceinline__ void run_rows(RowCursor& row) const {
    using Word = typename Values::Word;
    Word words[kRows];
    Word* out[kRows];
    ChannelNormConstants channel[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* from = static_cast<const T*>(p.x) + row.in_x(p) + first;
      words[i] = load_global(reinterpret_cast<const Word*>(from));
      out[i] = reinterpret_cast<Word*>(static_cast<T*>(p.out) + row.in_out(p) + first);
      channel[i] = of_row(row);
      row.advance(p);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float values[kValues];
      Values::unpack(words[i], values);
      compute(values, channel[i]);
      Values::store(out[i], Values::pack(values));
    }
  }

  // The values before the end of a row.
  __device__ __forceinline__ void run_part(const RowCursor& row, int64_t count) const {
    using One = Packed<T, 1>;
    const ChannelNormConstants channel = of_row(row);
    const T* from = static_cast<const T*>(p.x) + row.in_x(p) + first;
    T* to = static_cast<T*>(p.out) + row.in_out(p) + first;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i >= count) continue;
      float value[1];
      One::unpack(load_global(from + i), value);
      value[0] = normalize<kBounded>(value[0], kOnePerRow ? channel : constants[i], p.max_abs);
      activate(value, p.activation, p.negative_slope);
      One::store(to + i, One::pack(value));
    }
  }
};

template <class T, int kValues, bool kBounded, bool kOnePerRow>
__global__ void __launch_bounds__(ResilientBatchNormPlan::kThreads, 2)
    resilient_batch_norm_kernel(const ResilientBatchNormParams p) {
  constexpr int kRows = 2;
  const int32_t thread = block_index() * ResilientBatchNormPlan::kThreads + thread_index();
  const int64_t pieces = (p.width + kValues - 1) / kValues;
  const int64_t rows = p.outer * p.inner;

  // Neighbours have neighbouring pieces of a row.
  const int32_t first_row = thread / p.beside;
  if (first_row >= p.step_row) return;
  const int32_t inner = static_cast<int32_t>(p.inner < INT32_MAX ? p.inner : INT32_MAX);
  const RowCursor start{first_row, first_row / inner, first_row % inner};
  for (int64_t piece = thread - first_row * p.beside; piece < pieces; piece += p.beside) {
    ResilientBatchNormThread<T, kValues, kBounded, kOnePerRow> own{p, piece * kValues, {}};
    if constexpr (!kOnePerRow) {
      constants_of_values<kValues, kBounded>(p, static_cast<int32_t>(own.first), own.constants);
    }
    const int64_t end = own.first + kValues;
    const int64_t whole = end > p.width ? 0 : end > p.last_width ? rows - 1 : rows;
    RowCursor row = start;
    while (row.row + (kRows - 1) * p.step_row < whole) own.template run_rows<kRows>(row);
    while (row.row < whole) own.template run_rows<1>(row);
    for (; row.row < rows; row.advance(p)) {
      const int64_t width = row.row + 1 == rows ? p.last_width : p.width;
      own.run_part(row, width - own.first);
    }
  }
}

// Everything that is compiled.
ResilientBatchNormKernel resilient_batch_norm_kernel_of(const ResilientBatchNormPlan& plan) {
  static constexpr ResilientBatchNormKernel kKernels[2][2][2][2] = {
      {{{resilient_batch_norm_kernel<float, 1, false, false>,
         resilient_batch_norm_kernel<float, 1, false, true>},
        {resilient_batch_norm_kernel<float, 1, true, false>,
         resilient_batch_norm_kernel<float, 1, true, true>}},
       {{resilient_batch_norm_kernel<float, 4, false, false>,
         resilient_batch_norm_kernel<float, 4, false, true>},
        {resilient_batch_norm_kernel<float, 4, true, false>,
         resilient_batch_norm_kernel<float, 4, true, true>}}},
      {{{resilient_batch_norm_kernel<uint16_t, 1, false, false>,
         resilient_batch_norm_kernel<uint16_t, 1, false, true>},
        {resilient_batch_norm_kernel<uint16_t, 1, true, false>,
         resilient_batch_norm_kernel<uint16_t, 1, true, true>}},
       {{resilient_batch_norm_kernel<uint16_t, 8, false, false>,
         resilient_batch_norm_kernel<uint16_t, 8, false, true>},
        {resilient_batch_norm_kernel<uint16_t, 8, true, false>,
         resilient_batch_norm_kernel<uint16_t, 8, true, true>}}}};
  return kKernels[plan.is_bf16][plan.vectorized][plan.bounded][plan.one_per_row];
}

}  // namespace seqkernels::cuda
