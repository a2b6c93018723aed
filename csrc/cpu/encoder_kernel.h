// The fused encoder of one sequence, on any product engine. Included by the kernel sources inside
// their own namespace, so that no inline function compiled for one instruction set can be linked
// into another. The files that this one includes hold the stages; this one takes a sequence through
// them.
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

// clang-format off
#include "cpu/encoder_workspace.h"
#include "cpu/encoder_input.h"
#include "cpu/encoder_output.h"
#include "cpu/encoder_norm.h"
#include "cpu/encoder_keys_values.h"
#include "cpu/encoder_attention.h"
#include "cpu/encoder_feed_forward.h"
// clang-format on

template <class Encoder>
struct RequestKernel;

template <class Product>
struct EncoderKernel : EncoderWorkspace<Product> {
  using Workspace = EncoderWorkspace<Product>;
  using Input = EncoderInput<Product>;
  using Output = EncoderOutput<Product>;
  using Norm = EncoderNorm<Product>;
  using KeysValues = EncoderKeysValues<Product>;
  using Attention = EncoderAttention<Product>;
  using FeedForward = EncoderFeedForward<Product>;
  using typename Workspace::Context;
  using typename Workspace::Isa;
  using typename Workspace::Own;
  using typename Workspace::Shared;
  using Workspace::for_groups;
  using Workspace::kLanes;
  using Workspace::kPair;
  using Workspace::strips_of;

  // ---- one group of strips through a layer, behind K and V ----

  template <int kStrips>
  static void run_group(const Context& c, int layer_index, int strip_begin) {
    Attention::template attend<kStrips>(c, c.m.layers[static_cast<size_t>(layer_index)],
                                        strip_begin);
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

    Attention::template finish_attention<kStrips>(c, layer, strip_begin);
    const float* weight = shape.norm_first ? layer.norm2_weight : layer.norm1_weight;
    const float* bias = shape.norm_first ? layer.norm2_bias : layer.norm1_bias;
    Norm::template layer_norm<kStrips>(m, weight, bias, shape.layer_norm_eps, c.own.residual,
                                       !shape.norm_first, c.own.operand, c.own.operand_strip);
    with_activation<Isa>(shape.activation, shape.negative_slope, [&](auto activate) {
      FeedForward::template feed_forward<kStrips>(c, layer, activate);
    });
    if (!shape.norm_first) {
      Norm::template layer_norm<kStrips>(m, layer.norm2_weight, layer.norm2_bias,
                                         shape.layer_norm_eps, c.own.residual, last,
                                         last ? nullptr : x, c.shared.x_strip);
    } else if (!last) {
      Norm::template store_residual<kStrips>(c, strip_begin);
    }
    if (last) {
      if (shape.has_final_norm) {
        Norm::template layer_norm<kStrips>(m, m.final_norm_weight, m.final_norm_bias,
                                           shape.final_norm_eps, c.own.residual, true, nullptr, 0);
      }
      Output::template store_group<kStrips>(c, strip_begin);
    }
  }

  // ---- the sequence ----

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
    Input::load_strips(c, begin, end);
    if (task.call->pool_max()) Output::reset_pool(c);
    run_layers(c, 0, barrier, rank, size);
    if (task.call->pool_max())
      Output::reduce_pool(c, pooled + static_cast<int64_t>(rank) * m.shape.d_model);
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
          Norm::template load_residual<n.value>(c, group);
          Norm::template layer_norm<n.value>(
              m, layer.norm1_weight, layer.norm1_bias, m.shape.layer_norm_eps, c.own.residual,
              false, c.shared.normed + group * c.shared.x_strip, c.shared.x_strip);
        });
      }
      KeysValues::project_keys(c, layer, begin, end);
      KeysValues::project_values(c, layer, begin, end);
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
