#include "cpu/encoder_pack.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace seqkernels::cpu {
namespace {

#include "cpu/bf16.h"

// Where a packed row or column comes from: heads are padded one by one.
struct HeadPadding {
  int heads, head_dim, head_rows;
  // Index in the unpadded dimension, -1 where the packed one only pads.
  int source(int packed) const {
    const int head = packed / head_rows;
    const int r = packed % head_rows;
    return head < heads && r < head_dim ? head * head_dim + r : -1;
  }
};

// Writes consecutive operands; without memory it only counts.
class Packer {
 public:
  Packer(uint32_t* memory, const OperandLayout& layout) : memory_(memory), layout_(layout) {}
  size_t words() const { return words_; }

  // Value(row, k) is called for all rows and k, padding included. `width` 0: a tiled left operand.
  template <class Value>
  const uint32_t* operand(int rows, int steps, int width, Value value) {
    uint32_t* to = take(static_cast<size_t>(rows) * static_cast<size_t>(steps));
    if (!to) return nullptr;
    for (int row = 0; row < rows; ++row) {
      for (int step = 0; step < steps; ++step) {
        const size_t at =
            width ? (static_cast<size_t>(row / width) * steps + step) * width + row % width
                  : static_cast<size_t>(row / 16) * steps * 16 + step / 16 * 256 + row % 16 * 16 +
                        step % 16;
        uint32_t word;
        if (layout_.pair == 2) {
          word = round_to_bf16(value(row, 2 * step)) |
                 static_cast<uint32_t>(round_to_bf16(value(row, 2 * step + 1))) << 16;
        } else {
          word = static_cast<uint32_t>(round_to_bf16(value(row, step)))
                 << 16;  // a bf16 widened to fp32
        }
        to[at] = word;
      }
    }
    return to;
  }

  template <class Value>
  const float* vector(int count, Value value) {
    uint32_t* to = take(static_cast<size_t>(round_up(count, 16)));
    if (!to) return nullptr;
    for (int i = 0; i < count; ++i) {
      const float v = value(i);
      std::memcpy(to + i, &v, sizeof v);
    }
    return reinterpret_cast<const float*>(to);
  }

 private:
  uint32_t* take(size_t count) {
    uint32_t* at = memory_ ? memory_ + words_ : nullptr;
    words_ += static_cast<size_t>(round_up(static_cast<int64_t>(count), 16));
    return at;
  }
  uint32_t* memory_;
  const OperandLayout& layout_;
  size_t words_ = 0;
};

// p[i] for i < n, else 0; `absent` where there is no p.
float element(const float* p, int i, int n, float absent) {
  return i < 0 || i >= n ? 0.0f : (p ? p[i] : absent);
}

PackedLayer pack_layer(Packer& packer, const PackedModel& m, const EncoderLayerParameters& w,
                       const OperandLayout& layout) {
  const int d = m.shape.d_model;
  const int f = m.shape.dim_feedforward;
  const HeadPadding heads{m.shape.nhead, m.shape.head_dim(), m.head_rows};
  const int left = layout.tiles ? 0 : layout.weight_width;
  const int right = layout.tiles ? 0 : layout.lanes;
  const int concat = m.shape.nhead * m.head_rows;
  const int value_rows = static_cast<int>(round_up(concat, layout.lanes));

  // Rows of one of q, k, v in in_proj_weight.
  const auto projection = [&](int which) {
    return [&, which](int row, int k) {
      const int source = heads.source(row);
      if (source < 0 || k >= d) return 0.0f;
      return w.in_proj_weight[(static_cast<size_t>(which) * d + source) * d + k];
    };
  };
  const auto projection_bias = [&](int which) {
    return [&, which](int row) {
      return element(w.in_proj_bias ? w.in_proj_bias + which * d : nullptr, heads.source(row), d,
                     0.0f);
    };
  };
  const auto matrix = [](const float* p, int rows, int columns) {
    return [=](int row, int k) {
      return row < rows && k < columns ? p[static_cast<size_t>(row) * columns + k] : 0.0f;
    };
  };
  const auto vector = [](const float* p, int n, float absent) {
    return [=](int i) { return element(p, i, n, absent); };
  };

  PackedLayer layer;
  layer.query = packer.operand(concat, m.model_steps, left, projection(0));
  layer.key = packer.operand(concat, m.model_steps, left, projection(1));
  layer.value = packer.operand(value_rows, m.model_steps, right, projection(2));
  layer.out = packer.operand(m.model_rows, m.concat_steps, left, [&](int row, int k) {
    const int source = heads.source(k);
    return row < d && source >= 0 ? w.out_proj_weight[static_cast<size_t>(row) * d + source] : 0.0f;
  });
  layer.linear1 =
      packer.operand(m.hidden_rows, m.model_steps, left, matrix(w.linear1_weight, f, d));
  layer.linear2 =
      packer.operand(m.model_rows, m.hidden_steps, left, matrix(w.linear2_weight, d, f));
  layer.query_bias = packer.vector(concat, projection_bias(0));
  layer.value_bias = packer.vector(value_rows, projection_bias(2));
  layer.out_bias = packer.vector(m.model_rows, vector(w.out_proj_bias, d, 0.0f));
  layer.linear1_bias = packer.vector(m.hidden_rows, vector(w.linear1_bias, f, 0.0f));
  layer.linear2_bias = packer.vector(m.model_rows, vector(w.linear2_bias, d, 0.0f));
  layer.norm1_weight = packer.vector(m.model_rows, vector(w.norm1_weight, d, 1.0f));
  layer.norm1_bias = packer.vector(m.model_rows, vector(w.norm1_bias, d, 0.0f));
  layer.norm2_weight = packer.vector(m.model_rows, vector(w.norm2_weight, d, 1.0f));
  layer.norm2_bias = packer.vector(m.model_rows, vector(w.norm2_bias, d, 0.0f));
  return layer;
}

void pack(Packer& packer, PackedModel& m, const EncoderParameters& parameters,
          const OperandLayout& layout) {
  m.layers.clear();
  for (const EncoderLayerParameters& w : parameters.layers)
    m.layers.push_back(pack_layer(packer, m, w, layout));
  if (m.shape.has_final_norm) {
    const int d = m.shape.d_model;
    m.final_norm_weight = packer.vector(
        m.model_rows, [&](int i) { return element(parameters.final_norm_weight, i, d, 1.0f); });
    m.final_norm_bias = packer.vector(
        m.model_rows, [&](int i) { return element(parameters.final_norm_bias, i, d, 0.0f); });
  }
}

}  // namespace

void PackedEncoder::Free::operator()(uint32_t* p) const {
  std::free(p);
}

PackedEncoder::PackedEncoder(const EncoderShape& shape, const EncoderParameters& parameters,
                             const OperandLayout& layout) {
  const auto rows = [&](int64_t n) { return static_cast<int>(round_up(n, layout.row_align)); };
  const auto steps = [&](int64_t n) {
    return static_cast<int>(round_up(n / layout.pair, layout.step_align));
  };
  model_.shape = shape;
  model_.head_rows = rows(shape.head_dim());
  model_.model_rows = rows(shape.d_model);
  model_.concat_rows = shape.nhead * model_.head_rows;
  model_.hidden_rows = rows(shape.dim_feedforward);
  model_.head_steps = steps(model_.head_rows);
  model_.model_steps = steps(model_.model_rows);
  model_.concat_steps = steps(model_.concat_rows);
  model_.hidden_steps = steps(model_.hidden_rows);

  Packer counter(nullptr, layout);
  pack(counter, model_, parameters, layout);
  words_ = counter.words();
  memory_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, words_ * sizeof(uint32_t))));
  if (!memory_) throw std::bad_alloc();
  std::memset(memory_.get(), 0, words_ * sizeof(uint32_t));
  Packer packer(memory_.get(), layout);
  pack(packer, model_, parameters, layout);
}

}  // namespace seqkernels::cpu
