// Batch norm over rows of values. Included by the kernel sources inside their own namespace.
//
// Every value goes through the same instructions, wherever it lies in a row and in a vector: the
// end of a row is copied to a whole vector first. So results do not depend on how rows were cut.

template <class Isa>
struct ResilientBatchNormKernel {
  using V = typename Isa::V;
  static constexpr int kLanes = Isa::kLanes;

  static V load(const float* p) { return Isa::load(p); }
  static V load(const uint16_t* p) { return Isa::load_bf16(p); }
  static void store(float* p, V a) { Isa::store(p, a); }
  static void store(uint16_t* p, V a) { Isa::store_bf16(p, a); }

  // One row; constants(i) gives the ChannelNormVectors of values i .. i + kLanes - 1.
  template <class T, class Constants, class Activate>
  static inline void run_row(const T* x, T* out, int64_t width, Constants&& constants, V max_abs,
                             Activate&& activate) {
    int64_t i = 0;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
      // Several rows ahead: the hardware looks no further than a page.
#pragma GCC unroll 4
      for (int64_t line = 0; line < 4 * kLanes; line += kLine) {
        __builtin_prefetch(x + i + line + 2048 / sizeof(T));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * kLanes;
        store(out + at, activate(constants(at)(load(x + at), max_abs)));
      }
    }
    for (; i + kLanes <= width; i += kLanes) {
      store(out + i, activate(constants(i)(load(x + i), max_abs)));
    }
    if (i < width) {
      const size_t bytes = static_cast<size_t>(width - i) * sizeof(T);
      T values[kLanes] = {};
      __builtin_memcpy(values, x + i, bytes);
      store(values, activate(constants(i)(load(values), max_abs)));
      __builtin_memcpy(out + i, values, bytes);
    }
  }

  template <class T, bool kBounded>
  static void run_rows(const ResilientBatchNormTask& t) {
    using Vectors = ChannelNormVectors<Isa, kBounded>;
    const T* x = static_cast<const T*>(t.x);
    T* out = static_cast<T*>(t.out);
    const V max_abs = Isa::set1(t.norm.max_abs);
    with_activation<Isa>(t.activation, t.negative_slope, [&](auto activate) {
      for (int64_t r = 0; r < t.rows; ++r) {
        const T* from = x + r * t.x_stride;
        T* to = out + r * t.out_stride;
        if (t.one_per_row) {
          const Vectors same(t.norm, r, BroadcastChannel{});
          run_row(from, to, t.width, [&](int64_t) { return same; }, max_abs, activate);
        } else {
          run_row(
              from, to, t.width, [&](int64_t i) { return Vectors(t.norm, i); }, max_abs, activate);
        }
      }
    });
  }

  static void run(const ResilientBatchNormTask& t) {
    const bool bounded = t.norm.kind == PackedChannelNorm::kBounded;
    if (t.is_bf16) {
      bounded ? run_rows<uint16_t, true>(t) : run_rows<uint16_t, false>(t);
    } else {
      bounded ? run_rows<float, true>(t) : run_rows<float, false>(t);
    }
  }

  static ResilientBatchNormKernelEntry entry() { return {&run}; }
};
