#include "cpu/encoder_pack.h"

#include <cstring>

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

// Lays operands one behind the other. Without `to` it says where they lie and writes nothing.
class Packer {
 public:
  Packer(const uint32_t* memory, uint32_t* to, const OperandLayout& layout)
      : memory_(memory), to_(to), layout_(layout) {}
  size_t words() const { return words_; }

  // Value(row, k) is called for all rows and k, padding included. `width` 0: a tiled left operand.
  template <class Value>
  const uint32_t* operand(int rows, int steps, int width, Value value) {
    const size_t begin = take(static_cast<size_t>(rows) * static_cast<size_t>(steps));
    if (!to_) return at(begin);
    uint32_t* to = to_ + begin;
    for (int row = 0; row < rows; ++row) {
      for (int step = 0; step < steps; ++step) {
        const size_t word_at =
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
        to[word_at] = word;
      }
    }
    return at(begin);
  }

  template <class Value>
  const float* vector(int count, Value value) {
    const size_t begin = take(static_cast<size_t>(round_up(count, 16)));
    for (int i = 0; to_ && i < count; ++i) {
      const float v = value(i);
      std::memcpy(to_ + begin + i, &v, sizeof v);
    }
    return reinterpret_cast<const float*>(at(begin));
  }

 private:
  size_t take(size_t count) {
    const size_t begin = words_;
    words_ += static_cast<size_t>(round_up(static_cast<int64_t>(count), 16));
    return begin;
  }
  const uint32_t* at(size_t begin) const { return memory_ ? memory_ + begin : nullptr; }
  const uint32_t* memory_;
  uint32_t* to_;
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

// The model whose operands the packer lays; the parameters are read where it writes.
PackedModel lay(Packer& packer, const EncoderShape& shape, const EncoderParameters& parameters,
                const OperandLayout& layout) {
  const auto rows = [&](int64_t n) { return static_cast<int>(round_up(n, layout.row_align)); };
  const auto steps = [&](int64_t n) {
    return static_cast<int>(round_up(n / layout.pair, layout.step_align));
  };
  PackedModel m;
  m.shape = shape;
  m.head_rows = rows(shape.head_dim());
  m.model_rows = rows(shape.d_model);
  m.concat_rows = shape.nhead * m.head_rows;
  m.hidden_rows = rows(shape.dim_feedforward);
  m.head_steps = steps(m.head_rows);
  m.model_steps = steps(m.model_rows);
  m.concat_steps = steps(m.concat_rows);
  m.hidden_steps = steps(m.hidden_rows);
  const EncoderLayerParameters none;
  m.layers.reserve(static_cast<size_t>(shape.num_layers));
  for (size_t n = 0; n < static_cast<size_t>(shape.num_layers); ++n) {
    const bool given = n < parameters.layers.size();
    m.layers.push_back(pack_layer(packer, m, given ? parameters.layers[n] : none, layout));
  }
  if (shape.has_final_norm) {
    const int d = shape.d_model;
    m.final_norm_weight = packer.vector(
        m.model_rows, [&](int i) { return element(parameters.final_norm_weight, i, d, 1.0f); });
    m.final_norm_bias = packer.vector(
        m.model_rows, [&](int i) { return element(parameters.final_norm_bias, i, d, 0.0f); });
  }
  return m;
}

}  // namespace

size_t packed_bytes(const EncoderShape& shape, const OperandLayout& layout) {
  Packer packer(nullptr, nullptr, layout);
  lay(packer, shape, {}, layout);
  return packer.words() * sizeof(uint32_t);
}

void pack(const EncoderShape& shape, const EncoderParameters& parameters,
          const OperandLayout& layout, void* memory) {
  std::memset(memory, 0, packed_bytes(shape, layout));
  uint32_t* words = static_cast<uint32_t*>(memory);
  Packer packer(words, words, layout);
  lay(packer, shape, parameters, layout);
}

PackedModel packed_model(const EncoderShape& shape, const OperandLayout& layout,
                         const void* memory) {
  Packer packer(static_cast<const uint32_t*>(memory), nullptr, layout);
  return lay(packer, shape, {}, layout);
}

}  // namespace seqkernels::cpu
