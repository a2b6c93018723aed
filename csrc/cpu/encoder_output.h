// Tokens out: rows of the last layer go to the output or to their slots of the summary, and into
// the max pool. Included by encoder_kernel.h.

template <class Product>
struct EncoderOutput : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using typename Workspace::Context;
  using typename Workspace::Isa;
  using typename Workspace::V;
  using Workspace::kLanes;

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
};
