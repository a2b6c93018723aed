// A linear layer on any product engine, its norms and its activation in the same pass. Included by
// the kernel sources inside their own namespace.
//
// Numerics: the norm in front works in fp32 on x as it is, then x and the weights are rounded to
// the operand (bf16; or fp32, with weights that are packed as they are or as bf16 widened); sums,
// bias, the norm behind and the activation are fp32; the output is rounded once.

template <class Product>
struct LinearKernel {
  using Isa = typename Product::Isa;
  using V = typename Isa::V;
  using Element = typename Isa::Element;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kChunk = kPanelSteps * Isa::kPair;  // elements in a tile's row

  // ---- x into the panel ----

  // buffer [kLanes] = norm(x) of some channels, fp32
  template <bool kBounded>
  static void normalize(const PackedChannelNorm& norm, const float* x, int64_t channel, int count,
                        float* to) {
    const V max_abs = Isa::set1(norm.max_abs);
    for (int i = 0; i < count; i += kLanes) {
      const ChannelNormVectors<Isa, kBounded> n(norm, channel + i);
      Isa::store(to + i, n(Isa::load(x + i), max_abs));
    }
  }

  // One row of a tile: `count` elements of x from `channel` on.
  static inline __attribute__((always_inline)) void convert(const PackedLinear& m,
                                                            const LinearCall& call, int64_t row,
                                                            int64_t channel, int count,
                                                            Element* to) {
    const int64_t offset = row * call.x_stride + channel;
    const uint16_t* bf16 = static_cast<const uint16_t*>(call.x) + offset;
    const float* fp32 = static_cast<const float*>(call.x) + offset;
    if (m.input_norm.kind == PackedChannelNorm::kNone) {
      if (call.is_bf16) {
        Isa::elements_from_bf16(bf16, count, to);
      } else {
        Isa::elements_from_fp32(fp32, count, to);
      }
      return;
    }
    alignas(64) float x[kChunk] = {};
    if (call.is_bf16) {
      for (int i = 0; i < count; ++i) x[i] = widen_bf16(bf16[i]);
    } else {
      __builtin_memcpy(x, fp32, static_cast<size_t>(count) * 4);
    }
    if (m.input_norm.kind == PackedChannelNorm::kExact) {
      normalize<false>(m.input_norm, x, channel, count, x);
    } else {
      normalize<true>(m.input_norm, x, channel, count, x);
    }
    Isa::elements_from_fp32(x, count, to);
  }

  static __attribute__((noinline)) void load_panel(const PackedLinear& m, const LinearCall& call,
                                                   const LinearTask& task, uint32_t* panel) {
    const int64_t rows = round_up(task.row_end - task.row_begin, kPanelRows);
    const int tiles = m.steps / kPanelSteps;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = task.row_begin + r;
      uint32_t* to = panel + r / kPanelRows * tiles * 256 + r % kPanelRows * kPanelSteps;
      for (int tile = 0; tile < tiles; ++tile, to += 256) {
        const int64_t channel = static_cast<int64_t>(tile) * kChunk;
        const int64_t left = m.in_features - channel;
        Element* elements = reinterpret_cast<Element*>(to);
        if (row < task.row_end && left >= kChunk) {
          convert(m, call, row, channel, kChunk, elements);  // a constant count: no calls inside
          continue;
        }
        __builtin_memset(to, 0, kPanelSteps * 4);
        if (row < task.row_end) convert(m, call, row, channel, static_cast<int>(left), elements);
      }
    }
  }

  // ---- the product ----

  static inline void store(void* out, bool is_bf16, int64_t offset, int count, V y) {
    if (count >= kLanes) {
      if (is_bf16) {
        Isa::store_bf16(static_cast<uint16_t*>(out) + offset, y);
      } else {
        Isa::store(static_cast<float*>(out) + offset, y);
      }
      return;
    }
    if (is_bf16) {
      uint16_t whole[kLanes];
      Isa::store_bf16(whole, y);
      __builtin_memcpy(static_cast<uint16_t*>(out) + offset, whole, static_cast<size_t>(count) * 2);
    } else {
      float whole[kLanes];
      Isa::store(whole, y);
      __builtin_memcpy(static_cast<float*>(out) + offset, whole, static_cast<size_t>(count) * 4);
    }
  }

  // What follows the sums of some consecutive rows and a strip. It is there once for each norm and
  // activation, and the products below, unrolled as they are, once for all of them: to compile them
  // for each took ten times as long.
  static __attribute__((noinline)) void finish(const PackedLinear& m, const LinearCall& call,
                                               int64_t row, int rows, int64_t feature,
                                               const V* sums) {
    const int64_t features = m.out_features - feature;
    const int count = static_cast<int>(features < kLanes ? features : kLanes);
    const V max_abs = Isa::set1(m.output_norm.max_abs);
    with_activation<Isa>(m.activation, m.negative_slope, [&](auto activate) {
      const auto each = [&](const auto& norm) __attribute__((always_inline)) {
        int64_t offset = row * call.out_stride + feature;
        for (int r = 0; r < rows; ++r, offset += call.out_stride)
          store(call.out, call.is_bf16, offset, count, activate(norm(sums[r])));
      };
      if (m.output_norm.kind == PackedChannelNorm::kNone) {
        const V bias = Isa::load(m.bias + feature);
        each([&](V y) { return Isa::add(y, bias); });
      } else if (m.output_norm.kind == PackedChannelNorm::kExact) {
        const ChannelNormVectors<Isa, false> norm(m.output_norm, feature);
        each([&](V y) { return norm(y, max_abs); });
      } else {
        const ChannelNormVectors<Isa, true> norm(m.output_norm, feature);
        each([&](V y) { return norm(y, max_abs); });
      }
    });
  }

  template <int kStrips, bool kOneRow = false>
  static __attribute__((noinline)) void product(const PackedLinear& m, const LinearCall& call,
                                                const LinearTask& task, const uint32_t* panel,
                                                int64_t strip) {
    const LeftOperand a{panel, static_cast<ptrdiff_t>(m.steps) * kPanelRows, kPanelRows};
    const ptrdiff_t b_stride = static_cast<ptrdiff_t>(m.steps) * kLanes;
    const int rows = static_cast<int>(task.row_end - task.row_begin);
    const auto epilogue = [&](int row, int s, const auto& c) __attribute__((always_inline)) {
      constexpr int kRows = static_cast<int>(sizeof(c) / sizeof(V));
      V sums[kRows];  // in memory, which the accumulators are not
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r] = c[r];
      const int left = rows - row;
      if (left > 0)
        finish(m, call, task.row_begin + row, left < kRows ? left : kRows, (strip + s) * kLanes,
               sums);
    };
    const uint32_t* b = m.weight + strip * b_stride;
    const int steps = steps_to_run(m.in_features);
    if constexpr (kOneRow) {
      Product::template run_one_row<kStrips>(a, b, b_stride, steps, epilogue);
    } else {
      Product::template run<kStrips>(a, 0, rows, b, b_stride, steps, epilogue);
    }
  }

  static int steps_to_run(int64_t elements) {
    const int64_t steps = (elements + Isa::kPair - 1) / Isa::kPair;
    return static_cast<int>(Product::kWholeTiles ? round_up(steps, kPanelSteps) : steps);
  }

  static void run(const PackedLinear& m, const LinearCall& call, const LinearTask& task,
                  uint32_t* panel) {
    load_panel(m, call, task, panel);
    int64_t strip = task.strip_begin;
    if constexpr (Product::kOneRowStrips > 0) {
      if (task.row_end - task.row_begin == 1) {
        for (; strip + Product::kOneRowStrips <= task.strip_end; strip += Product::kOneRowStrips)
          product<Product::kOneRowStrips, true>(m, call, task, panel, strip);
      }
    }
    for (; strip + Product::kMaxStrips <= task.strip_end; strip += Product::kMaxStrips)
      product<Product::kMaxStrips>(m, call, task, panel, strip);
    for (; strip < task.strip_end; ++strip) product<1>(m, call, task, panel, strip);
  }

  static LinearKernelEntry entry() {
    return {kLanes, Isa::kPair, &run, &Product::enter, &Product::leave};
  }
};
