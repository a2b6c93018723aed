// K and V of all tokens, which a team computes before any of its threads attends to them. Included
// by encoder_kernel.h.

template <class Product>
struct EncoderKeysValues : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using typename Workspace::Context;
  using typename Workspace::Isa;
  using typename Workspace::V;
  using Workspace::for_groups;
  using Workspace::kLanes;
  using Workspace::kPair;
  using Workspace::kRows;
  using Workspace::steps_to_run;
  using Workspace::store_rows;
  using Workspace::strips_of;
  using Workspace::weights;

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
};
