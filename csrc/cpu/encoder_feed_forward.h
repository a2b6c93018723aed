// The feed-forward part of one group of strips, added to its residual. Included by
// encoder_kernel.h.

template <class Product>
struct EncoderFeedForward : EncoderWorkspace<Product> {
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
};
