// Tokens in: rows of events and candidates, joined as the fusion says, become operands with tokens
// in the lanes. Included by encoder_kernel.h.

template <class Product>
struct EncoderInput : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using typename Workspace::Context;
  using typename Workspace::Element;
  using typename Workspace::Isa;
  using Workspace::kLanes;
  using Workspace::kPair;

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
};
