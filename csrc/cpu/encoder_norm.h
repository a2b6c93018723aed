// Layer norm, and the residual stream on its way from and to the operands in which it rests between
// layers. Included by encoder_kernel.h.

template <class Product>
struct EncoderNorm : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using typename Workspace::Context;
  using typename Workspace::Isa;
  using typename Workspace::V;
  using Workspace::kLanes;
  using Workspace::kPair;

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
};
