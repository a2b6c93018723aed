// Request scoring: one user, many candidates, on any product engine. Included by the kernel sources
// inside their own namespace, behind encoder_kernel.h.
//
// With fusion "concat" a token is x_i = [e_i ; c], so the first layer's projections are those of
// the events plus those of the candidate: q_i + a, k_i + d, v_i + f. In a row of scores
//     (q_i + a) (k_j + d) = q_i k_j + a k_j + (terms without j, which softmax drops)
// and with E_ij = 2^(q_i k_j - max_j q_i k_j) <= 1, which is the user's, and w_j = 2^(a k_j - max_j
// a k_j) <= 1, which is the candidate's (both scaled by log2(e) / sqrt(head_dim)),
//     attention_i = sum_j E_ij w_j v_j / sum_j E_ij w_j + f
// So a candidate costs the first layer neither the projections of its tokens, nor scores, nor
// exponentials: L of them instead of L x L. Everything behind attention, and all layers above, are
// the candidate's own and run as for a sequence.
//
// E w underflows where the largest E of a row and the largest w stand far apart. As both are at
// most 1, nothing overflows that would not in a sequence of its own, and what flushes to zero is
// below 2^-126; a row whose sum is not above 2^-64 (or NaN) makes the candidate run as a
// sequence of its own instead.

template <class Encoder>
struct RequestKernel {
  using Product = typename Encoder::Engine;
  using Isa = typename Encoder::Isa;
  using V = typename Encoder::V;
  using Element = typename Encoder::Element;
  using Context = typename Encoder::Context;
  using Input = typename Encoder::Input;
  using Output = typename Encoder::Output;
  using KeysValues = typename Encoder::KeysValues;
  using Attention = typename Encoder::Attention;
  static constexpr int kLanes = Encoder::kLanes;
  static constexpr int kPair = Encoder::kPair;
  static constexpr int kRows = Encoder::kRows;
  static constexpr float kSmallestSum = 0x1p-64f;

  // What all candidates of a user share, and the candidate's own scratch beside it.
  struct User {
    uint32_t* x;    // [strip][model step][lane]: tokens with zeros for the candidate
    uint32_t* exp;  // [head][strip][key step][lane = query]: E
    float* keys;    // [concat row][strip][lane = key]: k without bias, fp32
    float* values;  // lanes: [feature strip][key][lane = feature]; tiles: [concat row][strip][lane
                    // = key]
    uint32_t* weighted;  // w_j v_j, in the layout of EncoderWorkspace::Shared::values
    float* query_part;   // [candidate row][feature lane]: W_q of the candidate's columns, scaled
    float* value_part;   // the same of W_v
    float* a;            // [feature lane]: the candidate's query part
    float* f;            // [feature lane]: its value part, with the bias
    float* w;            // [head][strip][lane = key]
    int64_t exp_head, value_strip, features, key_lanes;
    int64_t words;

    User(const PackedModel& m, int64_t tokens, void* memory) {
      Arena arena{static_cast<uint32_t*>(memory)};
      const int64_t strips = Encoder::strips_of(tokens);
      const int64_t exp_strip = Encoder::key_steps_of(tokens) * kLanes;
      exp_head = strips * exp_strip;
      features = round_up(m.concat_rows, kLanes);
      key_lanes = strips * kLanes;
      value_strip = key_lanes * kLanes;
      x = arena.take(strips * m.model_steps * kLanes);
      exp = arena.take(m.shape.nhead * exp_head);
      keys = arena.take_floats(features * key_lanes);
      values = arena.take_floats(features * key_lanes);
      weighted = arena.take(features / kLanes * Encoder::key_steps_of(tokens) * kLanes);
      query_part = arena.take_floats(m.shape.d_model * features);
      value_part = arena.take_floats(m.shape.d_model * features);
      a = arena.take_floats(features);
      f = arena.take_floats(features);
      w = arena.take_floats(m.shape.nhead * key_lanes);
      words = arena.words;
    }
  };

  // ---- the candidate's columns of packed weights ----

  static float element(uint32_t word, int64_t k) {
    if constexpr (kPair == 2) {
      return widen_bf16(static_cast<uint16_t>(k % 2 ? word >> 16 : word & 0xffff));
    } else {
      float value;
      __builtin_memcpy(&value, &word, 4);
      return value;
    }
  }

  // Entry (row, k) of a packed left operand of `steps` steps.
  static float left_entry(const uint32_t* base, int steps, int row, int64_t k) {
    const int64_t step = k / kPair;
    if constexpr (Product::kTiles) {
      return element(base[row / 16 * static_cast<int64_t>(steps) * 16 + step / 16 * 256 +
                          row % 16 * 16 + step % 16],
                     k);
    } else {
      constexpr int kWidth = Product::kWeightWidth;
      return element(
          base[(row / kWidth * static_cast<int64_t>(steps) + step) * kWidth + row % kWidth], k);
    }
  }

  // Entry (row, k) of the value weights: a right operand, but on tiles.
  static float value_entry(const uint32_t* base, int steps, int row, int64_t k) {
    if constexpr (Product::kTiles) {
      return left_entry(base, steps, row, k);
    } else {
      const int64_t step = k / kPair;
      return element(
          base[(row / kLanes * static_cast<int64_t>(steps) + step) * kLanes + row % kLanes], k);
    }
  }

  // ---- the user ----

  static void prepare_user(const PackedModel& m, const SequenceTask& task, void* shared_memory,
                           void* own_memory, void* user_memory) {
    const Context c{m, task, typename Encoder::Shared(m, task.num_tokens, shared_memory),
                    typename Encoder::Own(m, task.num_tokens, own_memory)};
    const User u(m, task.num_tokens, user_memory);
    // What only pads whole tiles, and keys beyond the last, must be zero.
    __builtin_memset(own_memory, 0, static_cast<size_t>(c.own.words) * 4);
    __builtin_memset(shared_memory, 0, static_cast<size_t>(c.shared.words) * 4);
    __builtin_memset(user_memory, 0, static_cast<size_t>(u.words) * 4);
    const PackedLayer& layer = m.layers[0];
    const int strips = Encoder::strips_of(task.num_tokens);

    load_events(c, u, strips);
    KeysValues::project_keys(c, layer, 0, strips);
    keep_keys(c, u, layer, strips);
    keep_values(c, u, layer, strips);
    Encoder::for_groups(0, strips,
                        [&](auto n, int group) { keep_exponentials<n.value>(c, u, layer, group); });

    const int64_t first = m.shape.d_model - task.call->candidate_dim;
    const float scale = score_scale(m);
    for (int64_t j = 0; j < task.call->candidate_dim; ++j) {
      for (int row = 0; row < m.concat_rows; ++row) {
        u.query_part[j * u.features + row] =
            left_entry(layer.query, m.model_steps, row, first + j) * scale;
        u.value_part[j * u.features + row] =
            value_entry(layer.value, m.model_steps, row, first + j);
      }
    }
  }

  static float score_scale(const PackedModel& m) {
    return 1.44269504f / __builtin_sqrtf(static_cast<float>(m.shape.head_dim()));
  }

  // x of the shared memory and of the user = tokens with zeros in the candidate's place.
  static void load_events(const Context& c, const User& u, int strips) {
    const EncoderCall& call = *c.task.call;
    const int64_t width = c.m.shape.d_model - call.candidate_dim;
    const int steps = c.m.model_steps;
    for (int strip = 0; strip < strips; ++strip) {
      for (int lane = 0; lane < kLanes; ++lane) {
        Element* row = reinterpret_cast<Element*>(c.own.rows + lane * c.own.rows_stride);
        __builtin_memset(row, 0, static_cast<size_t>(steps) * 4);
        const int token = strip * kLanes + lane;
        if (token < c.task.num_tokens) {
          const int64_t offset =
              c.task.user * call.stride_b + c.task.position[token] * call.stride_l;
          Input::convert(call.x, call.is_bf16, offset, width, row);
        }
      }
      Input::transpose_rows(c, steps, c.shared.x + strip * c.shared.x_strip);
    }
    __builtin_memcpy(u.x, c.shared.x, static_cast<size_t>(strips * c.shared.x_strip) * 4);
  }

  // keys [concat row][strip][lane = key]
  static void keep_keys(const Context& c, const User& u, const PackedLayer& layer, int strips) {
    const PackedModel& m = c.m;
    const LeftOperand a = Encoder::weights(layer.key, m.model_steps);
    Encoder::for_groups(0, strips, [&](auto n, int group) {
      Product::template run<n.value>(
          a, 0, m.concat_rows, nullptr, c.shared.x + group * c.shared.x_strip, c.shared.x_strip,
          Encoder::steps_to_run(m.shape.d_model),
          [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
            for (int i = 0; i < kRows; ++i) {
              Isa::store(u.keys + (r + i) * u.key_lanes + (group + s) * kLanes, y[i]);
            }
          });
    });
  }

  // values without bias, in fp32; zero for tokens that are no keys
  static void keep_values(const Context& c, const User& u, const PackedLayer& layer, int strips) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    if constexpr (Product::kTiles) {
      const LeftOperand a = Encoder::weights(layer.value, m.model_steps);
      Encoder::for_groups(0, strips, [&](auto n, int group) {
        Product::template run<n.value>(
            a, 0, m.concat_rows, nullptr, c.shared.x + group * c.shared.x_strip, c.shared.x_strip,
            Encoder::steps_to_run(m.shape.d_model),
            [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
              const int left = num_keys - (group + s) * kLanes;
              const auto valid = Isa::first_lanes(left < 0 ? 0 : left);
              for (int i = 0; i < kRows; ++i) {
                Isa::store(u.values + (r + i) * u.key_lanes + (group + s) * kLanes,
                           Isa::select(valid, y[i], Isa::zero()));
              }
            });
      });
    } else {
      const LeftOperand a{c.shared.x, c.shared.x_strip, kLanes};
      const ptrdiff_t weight_strip = static_cast<ptrdiff_t>(m.model_steps) * kLanes;
      Encoder::for_groups(0, Encoder::strips_of(m.concat_rows), [&](auto n, int group) {
        Product::template run<n.value>(
            a, 0, static_cast<int>(round_up(num_keys, kRows)), nullptr,
            layer.value + group * weight_strip, weight_strip,
            Encoder::steps_to_run(m.shape.d_model),
            [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
              for (int i = 0; i < kRows && r + i < num_keys; ++i) {
                Isa::store(u.values + (group + s) * u.value_strip + (r + i) * kLanes, y[i]);
              }
            });
      });
    }
  }

  // exp [head][strip][key step][lane]: 2^(score - the row's largest)
  template <int kStrips>
  static void keep_exponentials(const Context& c, const User& u, const PackedLayer& layer,
                                int strip_begin) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    for (int head = 0; head < m.shape.nhead; ++head) {
      Attention::template project_queries<kStrips>(c, layer, head, strip_begin);
      V top[kStrips], sum[kStrips];
      Attention::template largest_scores<kStrips>(c, head, top);
      for (int s = 0; s < kStrips; ++s) sum[s] = Isa::zero();
      Product::template run<kStrips>(
          Attention::keys_of(c, head), 0, Attention::key_rows_of(c), nullptr, c.own.query,
          c.own.query_strip, Encoder::steps_to_run(m.shape.head_dim()),
          [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
            uint32_t* to = u.exp + head * u.exp_head + (strip_begin + s) * c.own.p_strip;
            Attention::exponentiate(y, top[s], r, num_keys, to, sum[s]);
          });
    }
  }

  // ---- a candidate ----

  static bool run_candidate(const PackedModel& m, const SequenceTask& task, void* shared_memory,
                            void* own_memory, void* user_memory, float* pooled) {
    const Context c{m, task, typename Encoder::Shared(m, task.num_tokens, shared_memory),
                    typename Encoder::Own(m, task.num_tokens, own_memory)};
    const User u(m, task.num_tokens, user_memory);
    if constexpr (Product::kTiles) {
      __builtin_memset(own_memory, 0, static_cast<size_t>(c.own.words) * 4);
      __builtin_memset(shared_memory, 0, static_cast<size_t>(c.shared.words) * 4);
    }
    const int strips = Encoder::strips_of(task.num_tokens);
    join_candidate(c, u, strips);
    weigh_keys(c, u);
    weigh_values(c, u);
    if (task.call->pool_max()) Output::reset_pool(c);
    const bool last = m.shape.num_layers == 1;
    bool fits = true;
    Encoder::for_groups(0, last ? Encoder::strips_of(task.num_queries_last) : strips,
                        [&](auto n, int group) {
                          fits = fits && attend<n.value>(c, u, group);
                          if (fits) Encoder::template finish_group<n.value>(c, 0, group);
                        });
    if (!fits) return false;
    Barrier alone;
    Encoder::run_layers(c, 1, &alone, 0, 1);
    if (task.call->pool_max()) Output::reduce_pool(c, pooled);
    return true;
  }

  // x = the user's tokens with the candidate's columns, a and f = its query and value parts.
  static void join_candidate(const Context& c, const User& u, int strips) {
    const PackedModel& m = c.m;
    const EncoderCall& call = *c.task.call;
    const int64_t first = m.shape.d_model - call.candidate_dim;
    Element* row = reinterpret_cast<Element*>(c.own.rows);  // one token with zeros for the event
    __builtin_memset(row, 0, static_cast<size_t>(m.model_steps) * 4);
    Input::convert(call.candidate, call.is_bf16, c.task.index * call.candidate_stride,
                   call.candidate_dim, row + first);
    const uint32_t* words = c.own.rows;
    const int first_step = static_cast<int>(first / kPair);
    for (int strip = 0; strip < strips; ++strip) {
      uint32_t* x = c.shared.x + strip * c.shared.x_strip;
      __builtin_memcpy(x, u.x + strip * c.shared.x_strip,
                       static_cast<size_t>(c.shared.x_strip) * 4);
      const int left = c.task.num_tokens - strip * kLanes;
      const int count = left < kLanes ? left : kLanes;
      for (int step = first_step; step < m.model_steps; ++step) {
        // The word in which event and candidate meet has zeros where the other one has a value.
        for (int lane = 0; lane < count; ++lane) x[step * kLanes + lane] |= words[step];
      }
    }
    for (int64_t i = 0; i < u.features; i += kLanes) {
      V a = Isa::zero();
      V f = Isa::load(m.layers[0].value_bias + i);
      for (int64_t j = 0; j < call.candidate_dim; ++j) {
        const V value = Isa::set1(element(words[(first + j) / kPair], first + j));
        a = Isa::fma(value, Isa::load(u.query_part + j * u.features + i), a);
        f = Isa::fma(value, Isa::load(u.value_part + j * u.features + i), f);
      }
      Isa::store(u.a + i, a);
      Isa::store(u.f + i, f);
    }
  }

  // w [head][key] = 2^(a k_j - the largest of them)
  static void weigh_keys(const Context& c, const User& u) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    for (int head = 0; head < m.shape.nhead; ++head) {
      float* w = u.w + head * u.key_lanes;
      V top = Isa::set1(-3.4e38f);
      for (int key = 0; key < num_keys; key += kLanes) {
        V t = Isa::zero();
        for (int r = head * m.head_rows; r < (head + 1) * m.head_rows; ++r) {
          t = Isa::fma(Isa::set1(u.a[r]), Isa::load(u.keys + r * u.key_lanes + key), t);
        }
        Isa::store(w + key, t);
        top = Isa::max(top, Isa::select(Isa::first_lanes(num_keys - key), t, top));
      }
      alignas(64) float lanes[kLanes];
      Isa::store(lanes, top);
      float largest = lanes[0];
      for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
      for (int key = 0; key < num_keys; key += kLanes) {
        const V e = VectorMath<Isa>::exp2_fine(Isa::sub(Isa::load(w + key), Isa::set1(largest)));
        Isa::store(w + key, Isa::select(Isa::first_lanes(num_keys - key), e, Isa::zero()));
      }
    }
  }

  // weighted = w_j v_j, as the left operand of the product with E
  static void weigh_values(const Context& c, const User& u) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    if constexpr (Product::kTiles) {
      for (int row = 0; row < m.concat_rows; ++row) {
        const float* w = u.w + row / m.head_rows * u.key_lanes;
        uint32_t* tile = u.weighted + row / 16 * c.shared.value_strip + row % 16 * 16;
        for (int strip = 0; strip * kLanes < num_keys; ++strip) {
          const V y = Isa::mul(Isa::load(w + strip * kLanes),
                               Isa::load(u.values + row * u.key_lanes + strip * kLanes));
          Isa::store_bf16(reinterpret_cast<uint16_t*>(tile + strip / 2 * 256 + strip % 2 * 8), y);
        }
      }
    } else {
      for (int64_t i = 0; i * kLanes < m.concat_rows; ++i) {
        const float* values = u.values + i * u.value_strip;
        uint32_t* to = u.weighted + i * c.shared.value_strip;
        // Lanes of one head share their weight.
        const int first = static_cast<int>(i * kLanes) / m.head_rows;
        int final = static_cast<int>(i * kLanes + kLanes - 1) / m.head_rows;
        if (final >= m.shape.nhead) final = m.shape.nhead - 1;
        for (int key = 0; key < num_keys; key += 2) {
          V w[2];
          for (int half = 0; half < 2; ++half) {
            w[half] =
                Isa::set1(key + half < num_keys ? u.w[first * u.key_lanes + key + half] : 0.0f);
            if (first == final) continue;
            alignas(64) float lanes[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
              int head = static_cast<int>(i * kLanes + lane) / m.head_rows;
              if (head > final) head = final;
              lanes[lane] = key + half < num_keys ? u.w[head * u.key_lanes + key + half] : 0.0f;
            }
            w[half] = Isa::load(lanes);
          }
          Isa::store_pair(to + key / kPair * kLanes,
                          Isa::mul(w[0], Isa::load(values + key * kLanes)),
                          Isa::mul(w[1], Isa::load(values + (key + 1) * kLanes)));
        }
      }
    }
  }

  // concat = sum_j E_ij w_j v_j / sum_j E_ij w_j + f; false where a sum is out of range
  template <int kStrips>
  static SEQKERNELS_STAGE bool attend(const Context& c, const User& u, int strip_begin) {
    const PackedModel& m = c.m;
    const int num_keys = c.task.num_keys;
    for (int head = 0; head < m.shape.nhead; ++head) {
      const uint32_t* exp = u.exp + head * u.exp_head + strip_begin * c.own.p_strip;
      const float* w = u.w + head * u.key_lanes;
      V inverse[kStrips];
      for (int s = 0; s < kStrips; ++s) {
        V sum[2] = {Isa::zero(), Isa::zero()};
        for (int key = 0; key < num_keys; key += 2) {
          V even, odd;
          Isa::load_pair(exp + s * c.own.p_strip + key / kPair * kLanes, even, odd);
          sum[0] = Isa::fma(even, Isa::set1(w[key]), sum[0]);
          sum[1] = Isa::fma(odd, Isa::set1(w[key + 1]), sum[1]);  // 0 beyond the last key
        }
        const V whole = Isa::add(sum[0], sum[1]);
        const auto fits = Isa::mask_or(Isa::less(Isa::set1(kSmallestSum), whole),
                                       Isa::mask_not(Attention::first_tokens(c, strip_begin + s)));
        if (Isa::any(Isa::mask_not(fits))) return false;
        inverse[s] = Isa::div(Isa::set1(1.0f), whole);
      }
      const LeftOperand values{u.weighted, c.shared.value_strip, kLanes};
      const int head_row = head * m.head_rows;
      Product::template run<kStrips>(
          values, head_row, head_row + m.head_rows, nullptr, exp, c.own.p_strip,
          Encoder::steps_to_run(num_keys),
          [&](int r, int s, const V(&y)[kRows]) __attribute__((always_inline)) {
            V o[kRows];
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
              o[i] = Isa::fma(y[i], inverse[s], Isa::set1(u.f[r + i]));
            }
            Encoder::store_rows(c.own.concat + s * c.own.concat_strip + r / kPair * kLanes, o);
          });
    }
    return true;
  }
};
