// Attention of one group of strips: Q, scores, softmax and P V head by head, then the
// out-projection and the residual. Included by encoder_kernel.h.

template <class Product>
struct EncoderAttention : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using typename Workspace::Context;
  using typename Workspace::Isa;
  using typename Workspace::V;
  using Workspace::kLanes;
  using Workspace::kPair;
  using Workspace::kRows;
  using Workspace::steps_to_run;
  using Workspace::store_rows;
  using Workspace::weights;

  static LeftOperand keys_of(const Context& c, int head) {
    return {c.shared.keys + head * c.shared.key_head, c.shared.key_strip, Product::kTokenWidth};
  }

  // own.query [strip][head step][lane], scaled by log2(e) / sqrt(head_dim).
  template <int kStrips>
  static inline __attribute__((always_inline)) void project_queries(const Context& c,
                                                                    const PackedLayer& layer,
                                                                    int head, int strip_begin) {
    const PackedModel& m = c.m;
    const V scale =
        Isa::set1(1.44269504f / __builtin_sqrtf(static_cast<float>(m.shape.head_dim())));
    const int head_row = head * m.head_rows;
    Product::template run<kStrips>(
        weights(layer.query, m.model_steps), head_row, head_row + m.head_rows, layer.query_bias,
        c.shared.normed + strip_begin * c.shared.x_strip, c.shared.x_strip,
        steps_to_run(m.shape.d_model),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
          V q[kRows];
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) q[i] = Isa::mul(y[i], scale);
          store_rows(c.own.query + s * c.own.query_strip + (r - head_row) / kPair * kLanes, q);
        });
  }

  static int key_rows_of(const Context& c) {
    return static_cast<int>(round_up(c.task.num_keys, Product::kRowAlign));
  }

  // top = the largest score of each query in own.query.
  template <int kStrips>
  static inline __attribute__((always_inline)) void largest_scores(const Context& c, int head,
                                                                   V (&top)[kStrips]) {
    const int num_keys = c.task.num_keys;
    for (int s = 0; s < kStrips; ++s) top[s] = Isa::set1(-3.4e38f);
    Product::template run<kStrips>(keys_of(c, head), 0, key_rows_of(c), nullptr, c.own.query,
                                   c.own.query_strip, steps_to_run(c.m.shape.head_dim()),
                                   [&](int r, int s, const V(&y)[kRows])
                                       __attribute__((always_inline)) {
                                         for (int i = 0; i < kRows && r + i < num_keys; ++i)
                                           top[s] = Isa::max(top[s], y[i]);
                                       });
  }

  template <int kStrips>
  static SEQKERNELS_STAGE void attend(const Context& c, const PackedLayer& layer, int strip_begin) {
    if (c.task.num_keys == 0) {  // no valid key: attention output 0
      __builtin_memset(c.own.concat, 0, static_cast<size_t>(kStrips * c.own.concat_strip) * 4);
      return;
    }
    for (int head = 0; head < c.m.shape.nhead; ++head) {
      project_queries<kStrips>(c, layer, head, strip_begin);
      V top[kStrips], sum[kStrips];
      for (int s = 0; s < kStrips; ++s) top[s] = Isa::zero();
      attend_to_keys<kStrips>(c, head, top, sum);
      // Lanes without a token count as in range.
      bool in_range = true;
      for (int s = 0; s < kStrips; ++s) {
        const auto fits =
            Isa::mask_or(is_in_range(sum[s]), Isa::mask_not(first_tokens(c, strip_begin + s)));
        in_range = in_range && !Isa::any(Isa::mask_not(fits));
      }
      if (__builtin_expect(!in_range, 0)) {
        V first_sum[kStrips];  // what has an address is not kept in registers
        for (int s = 0; s < kStrips; ++s) first_sum[s] = sum[s];
        attend_with_maximum<kStrips>(c, head, first_sum);
      }
    }
  }

  static auto is_in_range(V sum) {
    return Isa::between(sum, Isa::set1(0x1p-32f), Isa::set1(0x1p100f));
  }
  // Lanes of a strip that hold a token.
  static auto first_tokens(const Context& c, int strip) {
    return Isa::first_lanes(c.task.num_tokens - strip * kLanes);
  }

  // The second pass of a head. Rows whose first sum was in range keep their bits.
  template <int kStrips>
  static SEQKERNELS_STAGE void attend_with_maximum(const Context& c, int head,
                                                   const V (&first_sum)[kStrips]) {
    V top[kStrips], sum[kStrips];
    largest_scores<kStrips>(c, head, top);
    for (int s = 0; s < kStrips; ++s) {
      top[s] = Isa::select(is_in_range(first_sum[s]), Isa::zero(), top[s]);
    }
    attend_to_keys<kStrips>(c, head, top, sum);
  }

  // concat of a head = P V / sum P with P = exp2(scores - top); sum becomes NaN where P V is not
  // finite.
  template <int kStrips>
  static inline __attribute__((always_inline)) void attend_to_keys(const Context& c, int head,
                                                                   const V (&top)[kStrips],
                                                                   V (&sum)[kStrips]) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    for (int s = 0; s < kStrips; ++s) sum[s] = Isa::zero();
    Product::template run<kStrips>(
        keys_of(c, head), 0, key_rows_of(c), nullptr, c.own.query, c.own.query_strip,
        steps_to_run(m.shape.head_dim()),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
          exponentiate(y, top[s], r, num_keys, c.own.p + s * c.own.p_strip, sum[s]);
        });
    V inverse[kStrips];
    for (int s = 0; s < kStrips; ++s) inverse[s] = Isa::div(Isa::set1(1.0f), sum[s]);
    const LeftOperand values{c.shared.values, c.shared.value_strip, kLanes};
    const int head_row = head * m.head_rows;
    Product::template run<kStrips>(
        values, head_row, head_row + m.head_rows, nullptr, c.own.p, c.own.p_strip,
        steps_to_run(num_keys),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
          V o[kRows];
          V nothing = Isa::zero();  // NaN where y is not finite
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            nothing = Isa::fma(y[i], Isa::zero(), nothing);
            o[i] = Isa::mul(y[i], inverse[s]);
          }
          sum[s] = Isa::add(sum[s], nothing);
          store_rows(c.own.concat + s * c.own.concat_strip + r / kPair * kLanes, o);
        });
  }

  // p [key step][lane] = exp2(y - top) for keys r .. r + kRows - 1, zero beyond the last key; sum
  // += their sum.
  static inline __attribute__((always_inline)) void exponentiate(const V (&y)[kRows], V top, int r,
                                                                 int num_keys, uint32_t* p,
                                                                 V& sum) {
    V e[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) e[i] = Isa::exp2_for_operand(Isa::sub(y[i], top));
    if (r + kRows > num_keys) {
      for (int i = 0; i < kRows; ++i) e[i] = r + i < num_keys ? e[i] : Isa::zero();
    }
    V partial = Isa::add(e[0], e[1]);
#pragma GCC unroll 8
    for (int i = 2; i < kRows; i += 2) partial = Isa::add(partial, Isa::add(e[i], e[i + 1]));
    sum = Isa::add(sum, partial);
    store_rows(p + r / kPair * kLanes, e);
  }

  template <int kStrips>
  static SEQKERNELS_STAGE void finish_attention(const Context& c, const PackedLayer& layer,
                                                int strip_begin) {
    const PackedModel& m = c.m;
    float* residual = c.own.residual;
    Product::template run<kStrips>(
        weights(layer.out, m.concat_steps), 0, m.model_rows, layer.out_bias, c.own.concat,
        c.own.concat_strip, steps_to_run(m.concat_rows),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
          const uint32_t* x =
              c.shared.x + (strip_begin + s) * c.shared.x_strip + r / kPair * kLanes;
#pragma GCC unroll 8
          for (int i = 0; i < kRows; i += 2) {
            V a, b;
            Isa::load_pair(x + i / kPair * kLanes, a, b);
            Isa::store(residual + ((r + i) * kStrips + s) * kLanes, Isa::add(y[i], a));
            Isa::store(residual + ((r + i + 1) * kStrips + s) * kLanes, Isa::add(y[i + 1], b));
          }
        });
  }
};
