// The fused encoder of one sequence, on any product engine. Included by the kernel sources inside
// their own namespace, so that no inline function compiled for one instruction set can be linked
// into another.
//
// Tokens lie in lanes: activations are kept as operands [strip][step][lane] of kLanes tokens a
// strip, and every product is (weights or keys or values) x (activations), so that sums over
// features and over keys run down a register and need no shuffles:
//     S^T [keys, queries] = K Q^T      P^T = exp2(S^T)      O^T [d, queries] = V^T P^T / sum
// One group of at most kMaxStrips strips passes through everything after K and V without leaving
// the cache.
//
// Numerics: operands bf16 (or fp32 where the instruction set multiplies only that), sums fp32. The
// scale 1/sqrt(head_dim) log2(e) is applied to Q in fp32. Softmax takes no maximum: bf16 has fp32's
// range, so P = exp2(s) is as good as exp2(s - max) while the row's sum stays within 2^-32 .. 2^100
// and P V is finite: products that flush to zero are below 2^-126, and weigh at most 2^-94 each
// beside the values. A row that leaves this range takes a second pass with its maximum. The
// residual rests in fp32 within a layer and in the operand format between layers.

// Each stage is a function of its own, so that a profile shows where the time goes.
#define SEQKERNELS_STAGE __attribute__((noinline))

// Hands out consecutive pieces of a block of memory, 64-byte aligned; with a null block it only
// counts.
struct Arena {
  uint32_t* base;
  int64_t words = 0;
  uint32_t* take(int64_t count) {
    uint32_t* at = base ? base + words : nullptr;
    words += round_up(count, 16);
    return at;
  }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }
};

template <class Encoder>
struct RequestKernel;

template <class Product>
struct EncoderKernel {
  using Engine = Product;
  using Isa = typename Product::Isa;
  using V = typename Isa::V;
  using Element = typename Isa::Element;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kPair = Isa::kPair;
  static constexpr int kRows = Product::kRows;
  static constexpr int kMaxStrips = Product::kMaxStrips;

  static constexpr int strips_of(int64_t tokens) {
    return static_cast<int>((tokens + kLanes - 1) / kLanes);
  }
  // Steps that hold `tokens` keys: whole strips, and with tiles whole tiles.
  static constexpr int64_t key_steps_of(int64_t tokens) {
    return round_up(strips_of(tokens) * kLanes / kPair, Product::kStepAlign);
  }
  // Steps that a product has to run through: tiles only know whole ones.
  static constexpr int steps_to_run(int elements) {
    return static_cast<int>(round_up((elements + kPair - 1) / kPair, Product::kStepAlign));
  }

  // Memory that a team shares.
  struct Shared {
    uint32_t* x;       // [strip][model step][lane]: the residual stream at rest
    uint32_t* normed;  // the same after norm1, with norm_first; else x itself
    uint32_t* keys;    // [head][strip][head step][lane = key]; with tiles [head][strip][head step /
                       // 16] tiles
    uint32_t* values;  // [feature strip][key step][lane = feature]; with tiles [feature / 16][key
                       // step / 16] tiles
    int64_t x_strip, key_strip, key_head, value_strip;
    int64_t words;

    Shared(const PackedModel& m, int64_t tokens, void* memory) {
      Arena arena{static_cast<uint32_t*>(memory)};
      const int64_t strips = strips_of(tokens);
      x_strip = static_cast<int64_t>(m.model_steps) * kLanes;
      key_strip = static_cast<int64_t>(m.head_steps) * kLanes;
      key_head = strips * key_strip;
      value_strip = key_steps_of(tokens) * kLanes;
      x = arena.take(strips * x_strip);
      normed = m.shape.norm_first ? arena.take(strips * x_strip) : x;
      keys = arena.take(m.shape.nhead * key_head);
      values = arena.take(strips_of(m.concat_rows) * value_strip);
      words = arena.words;
    }
  };

  // Memory of one thread, for one group of strips.
  struct Own {
    uint32_t* rows;   // [lane][model step]: tokens on their way in; [lane][D] fp32 on their way out
    uint32_t* query;  // [strip][head step][lane] of one head
    uint32_t* p;      // [strip][key step][lane]
    uint32_t* concat;   // [strip][concat step][lane]: the heads' outputs
    uint32_t* operand;  // [strip][model step][lane]: input of the feed-forward part
    uint32_t* hidden;   // [strip][hidden step][lane]
    float* residual;    // [model row][strip][lane]
    float* pool;        // [model row][lane]: running maximum
    int64_t rows_stride, query_strip, p_strip, concat_strip, operand_strip, hidden_strip;
    int64_t words;

    Own(const PackedModel& m, int64_t tokens, void* memory) {
      Arena arena{static_cast<uint32_t*>(memory)};
      const int64_t group = strips_of(tokens) < kMaxStrips ? strips_of(tokens) : kMaxStrips;
      const int64_t rows_rounded = round_up(m.model_rows, kLanes);
      rows_stride = round_up(m.model_rows > m.model_steps ? m.model_rows : m.model_steps, kLanes);
      query_strip = static_cast<int64_t>(m.head_steps) * kLanes;
      p_strip = key_steps_of(tokens) * kLanes;
      concat_strip = static_cast<int64_t>(m.concat_steps) * kLanes;
      operand_strip = static_cast<int64_t>(m.model_steps) * kLanes;
      hidden_strip = static_cast<int64_t>(m.hidden_steps) * kLanes;
      rows = arena.take(kLanes * rows_stride);
      query = arena.take(group * query_strip);
      p = arena.take(group * p_strip);
      concat = arena.take(group * concat_strip);
      operand = arena.take(group * operand_strip);
      hidden = arena.take(group * hidden_strip);
      residual = arena.take_floats(rows_rounded * group * kLanes);
      pool = arena.take_floats(rows_rounded * kLanes);
      words = arena.words;
    }
  };

  // Everything the stages of one sequence need.
  struct Context {
    const PackedModel& m;
    const SequenceTask& task;
    Shared shared;
    Own own;
  };

  // ---- tokens in and out ----

  static inline void convert(const void* src, bool is_bf16, int64_t offset, int64_t n,
                             Element* dst) {
    if (is_bf16) {
      Isa::elements_from_bf16(static_cast<const uint16_t*>(src) + offset, n, dst);
    } else {
      Isa::elements_from_fp32(static_cast<const float*>(src) + offset, n, dst);
    }
  }

  // row [model_steps * kPair] = token `position`, zeros behind it.
  static void load_token(const Context& c, int64_t position, Element* row) {
    const EncoderCall& call = *c.task.call;
    const int64_t d_model = c.m.shape.d_model;
    const int64_t candidate_offset = c.task.index * call.candidate_stride;
    const bool append = call.fusion == Fusion::kAppend;
    if (append && position == (call.latest_last() ? call.length : 0)) {
      convert(call.candidate, call.is_bf16, candidate_offset, d_model, row);
    } else {
      const int64_t l = append && !call.latest_last() ? position - 1 : position;
      const int64_t width = call.fusion == Fusion::kConcat ? d_model - call.candidate_dim : d_model;
      convert(call.x, call.is_bf16, c.task.user * call.stride_b + l * call.stride_l, width, row);
      if (width < d_model)
        convert(call.candidate, call.is_bf16, candidate_offset, d_model - width, row + width);
    }
    for (int64_t i = d_model; i < static_cast<int64_t>(c.m.model_steps) * kPair; ++i) row[i] = 0;
  }

  static SEQKERNELS_STAGE void load_strips(const Context& c, int strip_begin, int strip_end) {
    const int steps = c.m.model_steps;
    for (int strip = strip_begin; strip < strip_end; ++strip) {
      for (int lane = 0; lane < kLanes; ++lane) {
        Element* row = reinterpret_cast<Element*>(c.own.rows + lane * c.own.rows_stride);
        const int token = strip * kLanes + lane;
        if (token < c.task.num_tokens) {
          load_token(c, c.task.position[token], row);
        } else {
          __builtin_memset(row, 0, static_cast<size_t>(steps) * 4);
        }
      }
      transpose_rows(c, steps, c.shared.x + strip * c.shared.x_strip);
    }
  }

  // x [model step][lane] = own.rows [lane][model step]
  static void transpose_rows(const Context& c, int steps, uint32_t* x) {
    for (int step = 0; step < steps; step += kLanes) {
      if (step + kLanes <= steps) {
        Isa::transpose(c.own.rows + step, c.own.rows_stride, x + step * kLanes, kLanes);
      } else {
        alignas(64) uint32_t block[kLanes * kLanes];
        Isa::transpose(c.own.rows + step, c.own.rows_stride, block, kLanes);
        __builtin_memcpy(x + step * kLanes, block, static_cast<size_t>(steps - step) * kLanes * 4);
      }
    }
  }

  // Writes the residual of a finished group to the output and to the pool's running maximum.
  template <int kStrips>
  static SEQKERNELS_STAGE void store_group(const Context& c, int strip_begin) {
    const EncoderCall& call = *c.task.call;
    const int d_model = c.m.shape.d_model;
    float* rows = reinterpret_cast<float*>(c.own.rows);  // [lane][D]
    for (int s = 0; s < kStrips; ++s) {
      const int first = (strip_begin + s) * kLanes;
      const int count =
          c.task.num_queries_last - first < kLanes ? c.task.num_queries_last - first : kLanes;
      if (call.pool_max()) pool_strip<kStrips>(c, s, count);
      if (call.latest_k == 0) continue;
      bool transposed = false;
      for (int lane = 0; lane < count; ++lane) {
        const int64_t position = c.task.position[first + lane];
        int64_t offset = c.task.index * call.out_stride_b;
        if (call.latest_k < 0) {
          offset += position * call.out_stride_l;
        } else {
          const int64_t slot = position - c.task.window_begin;
          if (slot < 0 || slot >= call.latest_k) continue;
          offset += slot * d_model;
        }
        if (!transposed) {
          for (int row = 0; row < d_model; row += kLanes) {
            Isa::transpose(
                reinterpret_cast<const uint32_t*>(c.own.residual + (row * kStrips + s) * kLanes),
                kStrips * kLanes, reinterpret_cast<uint32_t*>(rows + row), c.own.rows_stride);
          }
          transposed = true;
        }
        const float* row = rows + lane * c.own.rows_stride;
        if (call.is_bf16) {
          Isa::bf16_from_fp32(row, d_model, static_cast<uint16_t*>(call.out) + offset);
        } else {
          __builtin_memcpy(static_cast<float*>(call.out) + offset, row,
                           static_cast<size_t>(d_model) * 4);
        }
      }
    }
  }

  // A NaN wins, as in torch.max.
  template <int kStrips>
  static void pool_strip(const Context& c, int s, int count) {
    const auto counted = Isa::first_lanes(count);
    for (int row = 0; row < c.m.shape.d_model; ++row) {
      const V y = Isa::load(c.own.residual + (row * kStrips + s) * kLanes);
      const V best = Isa::load(c.own.pool + row * kLanes);
      const auto better = Isa::mask_and(Isa::mask_not(Isa::less(y, best)), Isa::ordered(best));
      Isa::store(c.own.pool + row * kLanes, Isa::select(Isa::mask_and(counted, better), y, best));
    }
  }

  static void reset_pool(const Context& c) {
    for (int i = 0; i < c.m.shape.d_model * kLanes; ++i) c.own.pool[i] = -__builtin_inff();
  }

  static void reduce_pool(const Context& c, float* pooled) {
    for (int row = 0; row < c.m.shape.d_model; ++row) {
      float best = c.own.pool[row * kLanes];
      for (int lane = 1; lane < kLanes; ++lane) {
        const float y = c.own.pool[row * kLanes + lane];
        if (!(y <= best) && best == best) best = y;
      }
      pooled[row] = best;
    }
  }

  // ---- layer norm ----

  // Over the features of each token of residual [row][strip][lane]. Writes back to it and / or to
  // operand [strip][step][lane].
  template <int kStrips>
  static SEQKERNELS_STAGE void layer_norm(const PackedModel& m, const float* weight,
                                          const float* bias, float eps, float* residual,
                                          bool write_back, uint32_t* operand,
                                          int64_t operand_strip) {
    const int d_model = m.shape.d_model;
    const V inverse = Isa::set1(1.0f / static_cast<float>(d_model));
    for (int s = 0; s < kStrips; ++s) {
      float* h = residual + s * kLanes;
      constexpr ptrdiff_t kRow = kStrips * kLanes;
      V sum[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
      int row = 0;
      for (; row + 4 <= d_model; row += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] = Isa::add(sum[i], Isa::load(h + (row + i) * kRow));
      }
      for (; row < d_model; ++row) sum[0] = Isa::add(sum[0], Isa::load(h + row * kRow));
      const V mean =
          Isa::mul(Isa::add(Isa::add(sum[0], sum[1]), Isa::add(sum[2], sum[3])), inverse);

      V square[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
      row = 0;
      for (; row + 4 <= d_model; row += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const V d = Isa::sub(Isa::load(h + (row + i) * kRow), mean);
          square[i] = Isa::fma(d, d, square[i]);
        }
      }
      for (; row < d_model; ++row) {
        const V d = Isa::sub(Isa::load(h + row * kRow), mean);
        square[0] = Isa::fma(d, d, square[0]);
      }
      const V variance = Isa::mul(
          Isa::add(Isa::add(square[0], square[1]), Isa::add(square[2], square[3])), inverse);
      const V scale = Isa::div(Isa::set1(1.0f), Isa::sqrt(Isa::add(variance, Isa::set1(eps))));

      // Rows that only pad have weight and bias 0 and stay 0.
      uint32_t* to = operand ? operand + s * operand_strip : nullptr;
      for (row = 0; row < m.model_rows; row += 2) {
        V y[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const V z = Isa::mul(Isa::sub(Isa::load(h + (row + i) * kRow), mean), scale);
          y[i] = Isa::fma(z, Isa::set1(weight[row + i]), Isa::set1(bias[row + i]));
          if (write_back) Isa::store(h + (row + i) * kRow, y[i]);
        }
        if (to) Isa::store_pair(to + row / kPair * kLanes, y[0], y[1]);
      }
    }
  }

  // residual [row][strip][lane] = x at rest
  template <int kStrips>
  static void load_residual(const Context& c, int strip_begin) {
    for (int s = 0; s < kStrips; ++s) {
      const uint32_t* x = c.shared.x + (strip_begin + s) * c.shared.x_strip;
      for (int row = 0; row < c.m.model_rows; row += 2) {
        V y[2];
        Isa::load_pair(x + row / kPair * kLanes, y[0], y[1]);
        Isa::store(c.own.residual + ((row + 0) * kStrips + s) * kLanes, y[0]);
        Isa::store(c.own.residual + ((row + 1) * kStrips + s) * kLanes, y[1]);
      }
    }
  }

  template <int kStrips>
  static void store_residual(const Context& c, int strip_begin) {
    for (int s = 0; s < kStrips; ++s) {
      uint32_t* x = c.shared.x + (strip_begin + s) * c.shared.x_strip;
      for (int row = 0; row < c.m.model_rows; row += 2) {
        Isa::store_pair(x + row / kPair * kLanes,
                        Isa::load(c.own.residual + (row * kStrips + s) * kLanes),
                        Isa::load(c.own.residual + ((row + 1) * kStrips + s) * kLanes));
      }
    }
  }

  static inline void store_rows(uint32_t* at, const V (&y)[kRows]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 2) Isa::store_pair(at + r / kPair * kLanes, y[r], y[r + 1]);
  }

  static LeftOperand weights(const uint32_t* base, int steps) {
    return {base, static_cast<ptrdiff_t>(steps) * Product::kWeightWidth, Product::kWeightWidth};
  }

  // ---- keys and values of all tokens ----

  static SEQKERNELS_STAGE void project_keys(const Context& c, const PackedLayer& layer,
                                            int strip_begin, int strip_end) {
    const PackedModel& m = c.m;
    const LeftOperand a = weights(layer.key, m.model_steps);
    const int rows = m.shape.nhead * m.head_rows;
    // A block of weights stays in the first-level cache while all strips pass.
    for (int row = 0; row < rows; row += Product::kRowAlign) {
      const int head = row / m.head_rows;
      for_groups(strip_begin, strip_end, [&](auto strips, int group) {
        Product::template run<strips.value>(
            a, row, row + Product::kRowAlign, nullptr, c.shared.normed + group * c.shared.x_strip,
            c.shared.x_strip, steps_to_run(m.shape.d_model),
            [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
              uint32_t* strip =
                  c.shared.keys + head * c.shared.key_head + (group + s) * c.shared.key_strip;
              store_rows(strip + (r - head * m.head_rows) / kPair * kLanes, y);
            });
      });
    }
    if constexpr (Product::kTiles) {
      // A strip's tile [step][key] becomes a left tile [key][step] in place.
      for (int head = 0; head < m.shape.nhead; ++head) {
        for (int strip = strip_begin; strip < strip_end; ++strip) {
          uint32_t* tile = c.shared.keys + head * c.shared.key_head + strip * c.shared.key_strip;
          // The steps that only pad hold the previous layer's keys, transposed: NaN among them
          // would not vanish against the query's zeros.
          const int steps = m.head_rows / kPair;
          __builtin_memset(tile + steps * kLanes, 0,
                           static_cast<size_t>(m.head_steps - steps) * kLanes * 4);
          for (int step = 0; step < m.head_steps; step += kLanes) {
            alignas(64) uint32_t block[kLanes * kLanes];
            Isa::transpose(tile + step * kLanes, kLanes, block, kLanes);
            __builtin_memcpy(tile + step * kLanes, block, sizeof block);
          }
        }
      }
    }
  }

  // Values of padded tokens are set to zero, not multiplied by it: they may hold NaN.
  static SEQKERNELS_STAGE void project_values(const Context& c, const PackedLayer& layer,
                                              int strip_begin, int strip_end) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    if constexpr (Product::kTiles) {
      const LeftOperand a = weights(layer.value, m.model_steps);
      const int rows = m.shape.nhead * m.head_rows;
      for (int row = 0; row < rows; row += Product::kRowAlign) {
        for_groups(strip_begin, strip_end, [&](auto strips, int group) {
          Product::template run<strips.value>(
              a, row, row + Product::kRowAlign, layer.value_bias,
              c.shared.normed + group * c.shared.x_strip, c.shared.x_strip,
              steps_to_run(m.shape.d_model),
              [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
                const int strip = group + s;
                const int left = num_keys - strip * kLanes;
                const auto valid = Isa::first_lanes(left < 0 ? 0 : left);
                uint32_t* tile = c.shared.values + r / 16 * c.shared.value_strip + strip / 2 * 256;
                for (int i = 0; i < kRows; ++i) {
                  uint16_t* half =
                      reinterpret_cast<uint16_t*>(tile + (r % 16 + i) * 16 + strip % 2 * 8);
                  Isa::store_bf16(half, Isa::select(valid, y[i], Isa::zero()));
                }
              });
        });
      }
    } else {
      // Rows are tokens and lanes are features here: the result is a left operand for the product
      // with P.
      const LeftOperand a{c.shared.normed, c.shared.x_strip, kLanes};
      const int row_begin = strip_begin * kLanes;
      const int keys_rounded = static_cast<int>(round_up(num_keys, kRows));
      const int row_end = strip_end * kLanes < keys_rounded ? strip_end * kLanes : keys_rounded;
      const ptrdiff_t weight_strip = static_cast<ptrdiff_t>(m.model_steps) * kLanes;
      for_groups(0, strips_of(m.concat_rows), [&](auto strips, int group) {
        Product::template run<strips.value>(
            a, row_begin, row_end, nullptr, layer.value + group * weight_strip, weight_strip,
            steps_to_run(m.shape.d_model),
            [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
              const V bias = Isa::load(layer.value_bias + (group + s) * kLanes);
              V v[kRows];
#pragma GCC unroll 8
              for (int i = 0; i < kRows; ++i) v[i] = Isa::add(y[i], bias);
              if (r + kRows > num_keys) {
                for (int i = 0; i < kRows; ++i) v[i] = r + i < num_keys ? v[i] : Isa::zero();
              }
              store_rows(c.shared.values + (group + s) * c.shared.value_strip + r / kPair * kLanes,
                         v);
            });
      });
    }
  }

  // ---- one group of strips through the rest of a layer ----

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

  template <int kStrips, class Activate>
  static SEQKERNELS_STAGE void feed_forward(const Context& c, const PackedLayer& layer,
                                            Activate activate) {
    const PackedModel& m = c.m;
    float* residual = c.own.residual;
    Product::template run<kStrips>(
        weights(layer.linear1, m.model_steps), 0, m.hidden_rows, layer.linear1_bias, c.own.operand,
        c.own.operand_strip, steps_to_run(m.shape.d_model),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
          V h[kRows];
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) h[i] = activate(y[i]);
          store_rows(c.own.hidden + s * c.own.hidden_strip + r / kPair * kLanes, h);
        });
    Product::template run<kStrips>(
        weights(layer.linear2, m.hidden_steps), 0, m.model_rows, layer.linear2_bias, c.own.hidden,
        c.own.hidden_strip, steps_to_run(m.shape.dim_feedforward),
        [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            float* h = residual + ((r + i) * kStrips + s) * kLanes;
            Isa::store(h, Isa::add(Isa::load(h), y[i]));
          }
        });
  }

  template <int kStrips>
  static void run_group(const Context& c, int layer_index, int strip_begin) {
    attend<kStrips>(c, c.m.layers[static_cast<size_t>(layer_index)], strip_begin);
    finish_group<kStrips>(c, layer_index, strip_begin);
  }

  // What follows attention.
  template <int kStrips>
  static void finish_group(const Context& c, int layer_index, int strip_begin) {
    const PackedModel& m = c.m;
    const EncoderShape& shape = m.shape;
    const PackedLayer& layer = m.layers[static_cast<size_t>(layer_index)];
    const bool last = layer_index + 1 == shape.num_layers;
    uint32_t* x = c.shared.x + strip_begin * c.shared.x_strip;

    finish_attention<kStrips>(c, layer, strip_begin);
    const float* weight = shape.norm_first ? layer.norm2_weight : layer.norm1_weight;
    const float* bias = shape.norm_first ? layer.norm2_bias : layer.norm1_bias;
    layer_norm<kStrips>(m, weight, bias, shape.layer_norm_eps, c.own.residual, !shape.norm_first,
                        c.own.operand, c.own.operand_strip);
    with_activation<Isa>(shape.activation, shape.negative_slope,
                         [&](auto activate) { feed_forward<kStrips>(c, layer, activate); });
    if (!shape.norm_first) {
      layer_norm<kStrips>(m, layer.norm2_weight, layer.norm2_bias, shape.layer_norm_eps,
                          c.own.residual, last, last ? nullptr : x, c.shared.x_strip);
    } else if (!last) {
      store_residual<kStrips>(c, strip_begin);
    }
    if (last) {
      if (shape.has_final_norm) {
        layer_norm<kStrips>(m, m.final_norm_weight, m.final_norm_bias, shape.final_norm_eps,
                            c.own.residual, true, nullptr, 0);
      }
      store_group<kStrips>(c, strip_begin);
    }
  }

  // ---- the sequence ----

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // Calls body(Constant<n>, first strip) for groups of n <= kMaxStrips strips of about the same
  // size.
  template <class Body>
  static void for_groups(int strip_begin, int strip_end, Body&& body) {
    const int strips = strip_end - strip_begin;
    const int groups = (strips + kMaxStrips - 1) / kMaxStrips;
    for (int g = 0; g < groups; ++g) {
      const int begin = strip_begin + strips * g / groups;
      switch (strip_begin + strips * (g + 1) / groups - begin) {
        case 1:
          body(Constant<1>{}, begin);
          break;
        case 2:
          body(Constant<2>{}, begin);
          break;
        default:
          body(Constant<kMaxStrips>{}, begin);
          break;
      }
    }
  }

  static void run(const PackedModel& m, const SequenceTask& task, void* shared_memory,
                  void* own_memory, float* pooled, Barrier* barrier, int rank, int size) {
    const Context c{m, task, Shared(m, task.num_tokens, shared_memory),
                    Own(m, task.num_tokens, own_memory)};
    const int strips = strips_of(task.num_tokens);
    const int begin = strips * rank / size;
    const int end = strips * (rank + 1) / size;
    if constexpr (Product::kTiles) {
      // Whole tiles are multiplied: what only pads them must be zero.
      __builtin_memset(own_memory, 0, static_cast<size_t>(c.own.words) * 4);
      if (rank == 0) __builtin_memset(shared_memory, 0, static_cast<size_t>(c.shared.words) * 4);
      barrier->wait(size);
    }
    load_strips(c, begin, end);
    if (task.call->pool_max()) reset_pool(c);
    run_layers(c, 0, barrier, rank, size);
    if (task.call->pool_max())
      reduce_pool(c, pooled + static_cast<int64_t>(rank) * m.shape.d_model);
  }

  // The layers from `first` on, by thread `rank` of `size`.
  static void run_layers(const Context& c, int first, Barrier* barrier, int rank, int size) {
    const PackedModel& m = c.m;
    const SequenceTask& task = c.task;
    const int strips = strips_of(task.num_tokens);
    const int begin = strips * rank / size;
    const int end = strips * (rank + 1) / size;
    for (int i = first; i < m.shape.num_layers; ++i) {
      const PackedLayer& layer = m.layers[static_cast<size_t>(i)];
      if (m.shape.norm_first) {
        for_groups(begin, end, [&](auto n, int group) {
          load_residual<n.value>(c, group);
          layer_norm<n.value>(m, layer.norm1_weight, layer.norm1_bias, m.shape.layer_norm_eps,
                              c.own.residual, false, c.shared.normed + group * c.shared.x_strip,
                              c.shared.x_strip);
        });
      }
      project_keys(c, layer, begin, end);
      project_values(c, layer, begin, end);
      barrier->wait(size);
      const int queries = i + 1 == m.shape.num_layers ? strips_of(task.num_queries_last) : strips;
      for_groups(queries * rank / size, queries * (rank + 1) / size,
                 [&](auto n, int group) { run_group<n.value>(c, i, group); });
      barrier->wait(size);
    }
  }

  static EncoderKernelEntry entry() {
    EncoderKernelEntry e;
    e.layout = {kLanes,
                kPair,
                Product::kRowAlign,
                Product::kStepAlign,
                Product::kTiles,
                Product::kWeightWidth};
    e.shared_bytes = [](const PackedModel& m, int64_t tokens) {
      return static_cast<size_t>(Shared(m, tokens, nullptr).words) * 4;
    };
    e.private_bytes = [](const PackedModel& m, int64_t tokens) {
      return static_cast<size_t>(Own(m, tokens, nullptr).words) * 4;
    };
    e.run = &run;
    using Request = RequestKernel<EncoderKernel>;
    e.user_bytes = [](const PackedModel& m, int64_t tokens) {
      return static_cast<size_t>(typename Request::User(m, tokens, nullptr).words) * 4;
    };
    e.prepare_user = &Request::prepare_user;
    e.run_candidate = &Request::run_candidate;
    e.enter = &Product::enter;
    e.leave = &Product::leave;
    return e;
  }
};
