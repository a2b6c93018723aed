#include "cuda/encoder_pack.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda/split_plan.h"

namespace seqkernels::cuda {
namespace {

#include "cpu/bf16.h"

constexpr int kLargestFusedModel = 128;

bool is_split(const EncoderShape& s) {
  return s.d_model > kLargestFusedModel;
}

// The smallest general instance that holds the shape; -1: there is none.
int general_instance(const EncoderShape& s) {
  const std::vector<EncoderInstance>& all = encoder_instances();
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i].exact() && all[i].model_rows >= s.d_model && all[i].head_rows >= s.head_dim())
      return static_cast<int>(i);
  }
  return -1;
}

int exact_instance(const EncoderShape& s) {
  const std::vector<EncoderInstance>& all = encoder_instances();
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].exact() && !s.norm_first && all[i].model_rows == s.d_model &&
        all[i].heads == s.nhead && all[i].head_rows == s.head_dim())
      return static_cast<int>(i);
  }
  return -1;
}

// Writes matrices and vectors at their offsets.
class Packer {
 public:
  explicit Packer(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  // value(row, column) of packed rows and columns.
  template <class Value>
  void matrix(int64_t offset, int rows, int columns, int group_rows, Value value) {
    const int steps = columns / kTile, group = group_rows / kTile;
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) {
        const int tile_row = row / kTile, step = column / kTile, r = row % kTile,
                  c = column % kTile;
        const int64_t tile =
            (static_cast<int64_t>(tile_row / group) * steps + step) * group + tile_row % group;
        const int lane = 4 * (r % 8) + c % 8 / 2, word = 2 * (r / 8) + c / 8;
        const uint16_t half = round_to_bf16(value(row, column));
        const int64_t at = (offset + tile * kTileVectors + lane) * 16 + word * 4 + c % 2 * 2;
        std::memcpy(memory_ + at, &half, 2);
      }
    }
  }
  template <class Value>
  void vector(int64_t offset, int n, Value value) {
    for (int i = 0; i < n; ++i) {
      const int r = i % kTile;
      const float v = value(i);
      const int64_t at = offset * 16 + (i / kTile * 16 + r % 8 / 2 * 4 + r / 8 * 2 + r % 2) * 4;
      std::memcpy(memory_ + at, &v, 4);
    }
  }

 private:
  unsigned char* memory_;
};

float rounded(float x) {
  const uint32_t bits = static_cast<uint32_t>(round_to_bf16(x)) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

void pack_layer(Packer& packer, int64_t base, const EncoderLayout& l, const EncoderShape& s,
                const EncoderLayerParameters& w) {
  const int d = s.d_model, f = s.dim_feedforward;
  // Heads are padded one by one; -1: only pads.
  const auto head_row = [&](int packed) {
    const int r = packed % l.head_rows;
    return r < s.head_dim() ? packed / l.head_rows * s.head_dim() + r : -1;
  };
  const auto at = [](const float* p, int row, int column, int rows, int columns) {
    return row >= 0 && row < rows && column >= 0 && column < columns
               ? p[static_cast<size_t>(row) * static_cast<size_t>(columns) +
                   static_cast<size_t>(column)]
               : 0.0f;
  };
  const auto element = [](const float* p, int i, int n, float absent) {
    return i < 0 || i >= n ? 0.0f : p ? p[i] : absent;
  };
  const int projections[] = {l.query, l.key, l.value};
  for (int which = 0; which < 3; ++which) {
    const float* weight = w.in_proj_weight + static_cast<size_t>(which) * static_cast<size_t>(d) *
                                                 static_cast<size_t>(d);
    packer.matrix(
        base + projections[which], l.concat_rows, l.model_rows, l.head_rows,
        [&](int row, int column) { return at(weight, head_row(row), model_column(column), d, d); });
  }
  packer.matrix(base + l.out, l.model_rows, l.concat_rows, l.model_group, [&](int row, int column) {
    return at(w.out_proj_weight, model_column(row), head_row(column), d, d);
  });
  packer.matrix(
      base + l.linear1, l.hidden_rows, l.model_rows, l.hidden_group,
      [&](int row, int column) { return at(w.linear1_weight, row, model_column(column), f, d); });
  packer.matrix(
      base + l.linear2, l.model_rows, l.hidden_rows, l.model_group,
      [&](int row, int column) { return at(w.linear2_weight, model_column(row), column, d, f); });

  packer.vector(base + l.query_bias, l.concat_rows,
                [&](int i) { return element(w.in_proj_bias, head_row(i), d, 0.0f); });
  packer.vector(base + l.out_bias, l.model_rows, [&](int i) {
    const int row = model_column(i);
    double sum = element(w.out_proj_bias, row, d, 0.0f);
    for (int j = 0; w.in_proj_bias && row < d && j < d; ++j) {
      sum += static_cast<double>(rounded(at(w.out_proj_weight, row, j, d, d))) *
             static_cast<double>(w.in_proj_bias[2 * d + j]);
    }
    return static_cast<float>(sum);
  });
  const auto model_vector = [&](int offset, const float* p, float absent) {
    packer.vector(base + offset, l.model_rows,
                  [&](int i) { return element(p, model_column(i), d, absent); });
  };
  model_vector(l.out_bias_alone, w.out_proj_bias, 0.0f);
  packer.vector(base + l.linear1_bias, l.hidden_rows,
                [&](int i) { return element(w.linear1_bias, i, f, 0.0f); });
  model_vector(l.linear2_bias, w.linear2_bias, 0.0f);
  model_vector(l.norm1_weight, w.norm1_weight, 1.0f);
  model_vector(l.norm1_bias, w.norm1_bias, 0.0f);
  model_vector(l.norm2_weight, w.norm2_weight, 1.0f);
  model_vector(l.norm2_bias, w.norm2_bias, 0.0f);
}

// Memory of a block, in bytes: what its parts need and where they start.
struct BlockMemory {
  int64_t positions, pool, keys, x;
  BlockMemory(const EncoderInstance& instance, const EncoderLayout& layout, int64_t tokens,
              int warps, bool pools) {
    const int64_t strips = (tokens + kTile - 1) / kTile;
    positions = kPositionsOffset + round_up_to(strips * kTile * 4, 16);
    pool = pools ? static_cast<int64_t>(warps) * layout.model_rows * 4 : 0;
    keys = strips * kTile * layout.concat_rows * 2;  // and as much for the values
    x = instance.exact() ? 0 : strips * kTile * layout.model_rows * 2;
  }
};

bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace

const std::vector<EncoderInstance>& encoder_instances() {
#define SEQKERNELS_INSTANCE(...) EncoderInstance{__VA_ARGS__},
  static const std::vector<EncoderInstance> all = {
      SEQKERNELS_CUDA_ENCODER_INSTANCES(SEQKERNELS_INSTANCE)};
#undef SEQKERNELS_INSTANCE
  return all;
}

EncoderLayout encoder_layout(const EncoderShape& shape) {
  if (is_split(shape)) return split_layout(shape);
  const int instance = general_instance(shape);
  if (instance < 0) throw std::invalid_argument("encoder: cuda: no kernel takes the shape");
  const EncoderInstance& i = encoder_instances()[static_cast<size_t>(instance)];
  return {i.model_rows,     i.head_rows,  shape.nhead, shape.dim_feedforward,
          shape.num_layers, i.model_rows, kHiddenChunk};
}

std::vector<std::string> encoder_unsupported_reasons(const EncoderShape& s) {
  std::vector<std::string> reasons;
  const auto refuse = [&](const char* what, const std::string& expected, int64_t got) {
    reasons.push_back(std::string(what) + ": expected " + expected + ", got " +
                      std::to_string(got));
  };
  const int largest_model = split_instances().back().model_rows();
  if (s.d_model < 1 || s.d_model > largest_model)
    refuse("d_model", "at most " + std::to_string(largest_model), s.d_model);
  if (s.nhead < 1 || s.d_model % std::max(1, s.nhead) != 0)
    refuse("nhead", "a divisor of d_model = " + std::to_string(s.d_model), s.nhead);
  constexpr int kLargestFeedForward = 1 << 16;
  if (s.dim_feedforward < 1 || s.dim_feedforward > kLargestFeedForward)
    refuse("dim_feedforward", "at most " + std::to_string(kLargestFeedForward), s.dim_feedforward);
  constexpr int kMostLayers = 64;
  if (s.num_layers < 1 || s.num_layers > kMostLayers)
    refuse("layers", "1 to " + std::to_string(kMostLayers), s.num_layers);
  if (s.activation == Activation::kNone)
    reasons.push_back("activation: expected relu, gelu, gelu_tanh or leaky_relu, got none");
  const int largest_head = split_attention_instances().back();
  if (reasons.empty() && s.head_dim() > largest_head)
    refuse("head_dim", "at most " + std::to_string(largest_head), s.head_dim());
  if (reasons.empty() && is_split(s) && s.nhead > split_most_heads(s))
    refuse("nhead", "at most " + std::to_string(split_most_heads(s)), s.nhead);
  return reasons;
}

size_t encoder_packed_bytes(const EncoderShape& shape) {
  return static_cast<size_t>(encoder_layout(shape).total) * 16;
}

void pack_encoder(const EncoderShape& shape, const EncoderParameters& parameters, void* packed) {
  const EncoderLayout l = encoder_layout(shape);
  if (parameters.layers.size() != static_cast<size_t>(shape.num_layers))
    throw std::invalid_argument("encoder: layers: expected " + std::to_string(shape.num_layers) +
                                ", got " + std::to_string(parameters.layers.size()));
  Packer packer(packed);
  for (int i = 0; i < shape.num_layers; ++i) {
    pack_layer(packer, static_cast<int64_t>(i) * l.layer, l, shape,
               parameters.layers[static_cast<size_t>(i)]);
  }
  const auto final_vector = [&](int offset, const float* p, float absent) {
    packer.vector(offset, l.model_rows, [&](int i) {
      const int column = model_column(i);
      return column >= shape.d_model ? 0.0f : p ? p[column] : absent;
    });
  };
  final_vector(l.final_weight, parameters.final_norm_weight, 1.0f);
  final_vector(l.final_bias, parameters.final_norm_bias, 0.0f);
}

EncoderPlan plan_encoder(const EncoderShape& shape, const EncoderCall& call,
                         const EncoderDevice& device) {
  EncoderPlan plan;
  plan.reasons = encoder_unsupported_reasons(shape);
  if (!plan.reasons.empty()) return plan;
  const int64_t tokens = tokens_of(call);
  constexpr int64_t kMostTokens = 1 << 24;
  if (tokens < 1 || tokens > kMostTokens) {
    plan.reasons.push_back("x: expected 1 to " + std::to_string(kMostTokens) + " tokens, got " +
                           std::to_string(tokens));
    return plan;
  }
  if (call.latest_k > kMostTokens) {
    plan.reasons.push_back("latest_k: expected at most " + std::to_string(kMostTokens) + ", got " +
                           std::to_string(call.latest_k));
    return plan;
  }
  if (is_split(shape)) {
    plan_split(shape, call, device, plan);
    return plan;
  }
  const EncoderLayout layout = encoder_layout(shape);
  const int64_t strips = (tokens + kTile - 1) / kTile;
  const auto memory_of = [&](int instance, int warps) {
    return BlockMemory(encoder_instances()[static_cast<size_t>(instance)], layout, tokens, warps,
                       call.pool_max());
  };
  constexpr int64_t kMostBlocks = INT_MAX;
  const int exact = exact_instance(shape);
  if (exact >= 0 && call.batch <= kMostBlocks &&
      strips <= encoder_instances()[static_cast<size_t>(exact)].warps) {
    const BlockMemory m = memory_of(exact, static_cast<int>(strips));
    const int64_t bytes = m.positions + m.pool + 2 * m.keys;
    if (bytes <= device.shared_bytes) {
      plan.instance = exact;
      plan.threads = static_cast<int>(strips) * 32;
      plan.grid = static_cast<int>(std::min(call.batch, kMostBlocks));
      plan.shared_bytes = bytes;
      return plan;
    }
  }
  plan.instance = general_instance(shape);
  const int warps = static_cast<int>(
      std::min<int64_t>(strips, encoder_instances()[static_cast<size_t>(plan.instance)].warps));
  const BlockMemory m = memory_of(plan.instance, warps);
  plan.threads = warps * 32;
  plan.grid = static_cast<int>(std::min(call.batch, kMostBlocks));
  plan.shared_bytes = m.positions + m.pool + 2 * m.keys + m.x;
  if (plan.shared_bytes <= device.shared_bytes) return plan;

  // What does not fit goes to global memory: of as many blocks as run at once.
  constexpr int kBlocksAtOnce = 2;
  plan.grid = static_cast<int>(
      std::min<int64_t>(call.batch, int64_t{kBlocksAtOnce} * std::max(1, device.multiprocessors)));
  plan.shared_bytes -= m.x;
  plan.workspace_bytes = m.x * plan.grid;
  if (plan.shared_bytes <= device.shared_bytes) return plan;
  plan.shared_bytes -= 2 * m.keys;
  plan.workspace_bytes = (m.x + 2 * m.keys) * plan.grid;
  plan.keys_in_workspace = true;
  if (plan.shared_bytes > device.shared_bytes) {
    plan.reasons.push_back(
        "x: expected at most " +
        std::to_string((device.shared_bytes - m.pool - kPositionsOffset) / 64 * kTile) +
        " tokens on this device, got " + std::to_string(tokens));
  }
  return plan;
}

EncoderParams encoder_call_params(const EncoderShape& shape, const EncoderCall& call,
                                  const EncoderLayout& layout, const void* packed) {
  EncoderParams p{};
  p.packed = static_cast<const unsigned char*>(packed);
  p.layout = layout;
  p.d_model = shape.d_model;
  p.num_layers = shape.num_layers;
  p.activation = shape.activation;
  p.negative_slope = shape.negative_slope;
  p.layer_norm_eps = shape.layer_norm_eps;
  p.final_norm_eps = shape.final_norm_eps;
  p.inverse_d = 1.0f / static_cast<float>(shape.d_model);
  p.score_scale = 1.44269504f / std::sqrt(static_cast<float>(shape.head_dim()));
  p.norm_first = shape.norm_first;
  p.has_final_norm = shape.has_final_norm;

  p.x = call.x;
  p.candidate = call.candidate;
  p.mask = call.mask;
  p.lengths = call.lengths;
  p.user_index = call.user_index;
  p.out = call.out;
  p.batch = call.batch;
  p.users = call.users;
  p.stride_b = call.stride_b;
  p.stride_l = call.stride_l;
  p.candidate_stride = call.candidate_stride;
  p.mask_stride_b = call.mask_stride_b;
  p.mask_stride_l = call.mask_stride_l;
  p.out_stride_b = call.out_stride_b;
  p.out_stride_l = call.out_stride_l;
  p.length = static_cast<int>(call.length);
  p.tokens = static_cast<int>(tokens_of(call));
  p.strips = (p.tokens + kTile - 1) / kTile;
  const int64_t joined = call.fusion == Fusion::kConcat ? call.candidate_dim : 0;
  p.event_dim = shape.d_model - static_cast<int>(joined);
  p.latest_k = static_cast<int>(call.latest_k);
  p.fusion = call.fusion;
  p.padding = call.computes_padding ? Padding::kZero : call.padding;
  p.computes_padding = call.computes_padding;
  p.is_bf16 = call.is_bf16;
  p.latest_last = call.latest_last();
  p.pool_max = call.pool_max();

  // Eight columns are 16 bytes of bf16 or 32 of fp32, aligned to 16.
  const int64_t element = call.is_bf16 ? 2 : 4;
  const auto whole = [&](int64_t stride) { return stride * element % 16 == 0; };
  p.vector_input = p.event_dim % 8 == 0 && p.d_model % 8 == 0 && aligned(call.x, 16) &&
                   whole(call.stride_b) && whole(call.stride_l) && aligned(call.candidate, 16) &&
                   (!call.candidate || whole(call.candidate_stride));
  p.vector_output = p.d_model % 8 == 0 && aligned(call.out, 16) && whole(call.out_stride_b) &&
                    (call.latest_k >= 0 || whole(call.out_stride_l));
  return p;
}

EncoderParams encoder_params(const EncoderShape& shape, const EncoderPlan& plan,
                             const EncoderCall& call, const void* packed, void* workspace) {
  const EncoderInstance& instance = encoder_instances()[static_cast<size_t>(plan.instance)];
  EncoderParams p = encoder_call_params(shape, call, encoder_layout(shape), packed);
  p.warps = plan.threads / 32;
  const BlockMemory m(instance, p.layout, p.tokens, p.warps, call.pool_max());
  p.keys_in_workspace = plan.keys_in_workspace;
  p.x_in_workspace = plan.workspace_bytes > 0;
  p.workspace = static_cast<unsigned char*>(workspace);
  p.workspace_stride = plan.grid > 0 ? plan.workspace_bytes / plan.grid : 0;
  int64_t shared = m.positions, global = 0;
  const auto take = [](int64_t& at, int64_t bytes) {
    const int64_t offset = at / 16;
    at += bytes;
    return static_cast<int>(offset);
  };
  p.pool = take(shared, m.pool);
  p.keys = take(p.keys_in_workspace ? global : shared, m.keys);
  p.values = take(p.keys_in_workspace ? global : shared, m.keys);
  p.x_rest = take(p.x_in_workspace ? global : shared, m.x);
  return p;
}

}  // namespace seqkernels::cuda
