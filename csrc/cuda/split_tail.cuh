// The split encoder's rows: a block owns a group of strips of a sequence, a warp a range of
// columns.
//
// split_tokens_kernel brings the tokens to the workspace. split_tail_kernel is the layer behind
// attention: out-projection, residual, norm, feed-forward part in chunks of the hidden layer,
// residual, norm. The residual and all sums are fp32 in registers; what is multiplied by weights
// goes through shared memory in bf16. The last layer writes the output.
#pragma once

#include "cuda/split_rows.cuh"

namespace seqkernels::cuda {

// tiles += vector
template <class Class, int kTiles>
__device__ __forceinline__ void add_to_rows(const Group<Class>& group, const Vector16* vector,
                                            float (&tiles)[Class::kStrips][kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const Vector16 v = load_global(vector + i * 4 + group.lane % 4);
    group.each([&](int m) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        tiles[m][i][j / 4][j % 4] += bits_as_float(v.v[2 * (j / 4) + j % 2]);
    });
    if (i % 2 == 1) scheduling_fence();
  }
}

// The group's strips of attention's result, to shared memory, by all warps.
template <class Class>
__device__ __forceinline__ void fetch_attended(const Group<Class>& group) {
  const int tiles = group.concat_tiles();
  const Vector16* from = group.rows(group.p.attended, tiles);
  Vector16* to = shared_vectors(group.p.operand) + group.lane;
#pragma unroll 1
  for (int i = group.warp; i < group.count * tiles; i += group.p.encoder.warps)
    copy_async_16(to + i * kTileVectors, from + i * kTileVectors);
  copy_async_commit();
}

// tiles = x + W_o a + b_o
template <class Class>
__device__ __forceinline__ void attention_block(const Group<Class>& group, const Vector16* layer,
                                                bool has_keys, GroupTiles<Class>& tiles) {
  const EncoderLayout& l = group.layout();
  if (has_keys) fetch_attended(group);
  group.each([&](int m) {
    const Vector16* x = group.own(group.p.x, m);
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i)
      unpack(load_global_coherent(x + i * kTileVectors).v, tiles[m][i]);
    scheduling_fence();
  });
  const Vector16* bias = layer + (has_keys ? l.out_bias : l.out_bias_alone);
  add_to_rows(group, bias + group.first_tile() * 4, tiles);
  copy_async_wait<0>();
  sync_threads();
  if (!has_keys) return;
  const int steps = group.concat_tiles();
  const Vector16* weights = layer + l.out + group.first_tile() * steps * kTileVectors + group.lane;
  multiply_rows(group, shared_vectors(group.p.operand) + group.lane, steps, weights, steps, tiles);
}

// tiles += W_2 act(W_1 y + b_1), y in shared memory.
template <class Class>
__device__ __forceinline__ void feed_forward(const Group<Class>& group, const Vector16* layer,
                                             GroupTiles<Class>& tiles) {
  constexpr int kHidden = Class::kHiddenTiles;
  const EncoderLayout& l = group.layout();
  const int warps = group.p.encoder.warps, steps = group.model_tiles();
  const int hidden_tiles = l.hidden_rows / kTile, parts = hidden_tiles / kHidden;
  const Vector16* y = shared_vectors(group.p.operand) + group.lane;
  Vector16* rest = shared_vectors(group.p.hidden) + group.lane;
  const Vector16* linear2 =
      layer + l.linear2 + group.first_tile() * hidden_tiles * kTileVectors + group.lane;
  const int rest_tiles = warps * kHidden;  // of a strip
#pragma unroll 1
  for (int first = 0; first < parts; first += warps) {
    const int part = first + group.warp;
    float hidden[Class::kStrips][kHidden][2][4];
    if (part < parts) {
      group.each([&](int m) { clear(hidden[m]); });
      add_to_rows(group, layer + l.linear1_bias + part * kHidden * 4, hidden);
      const Vector16* weights =
          layer + l.linear1 + part * kHidden * steps * kTileVectors + group.lane;
      multiply_rows(group, y, steps, weights, steps, hidden);
      group.each([&](int m) { activate(group.p.encoder, hidden[m]); });
    }
    if (first > 0) sync_threads();
    if (part < parts) {
      group.each([&](int m) {
#pragma unroll
        for (int i = 0; i < kHidden; ++i) {
          const int tile = m * rest_tiles + group.warp * kHidden + i;
          store_shared(rest + tile * kTileVectors, pack_left(hidden[m][i]));
        }
      });
    }
    sync_threads();
    const int here = parts - first < warps ? parts - first : warps;
    multiply_rows(group, rest, rest_tiles, linear2 + first * kHidden * Class::kTiles * kTileVectors,
                  here * kHidden, tiles);
  }
}

template <class Class>
__device__ __forceinline__ void store_rows(const Group<Class>& group, unsigned char* to,
                                           const GroupTiles<Class>& tiles) {
  group.each([&](int m) {
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i)
      store_global(group.own(to, m) + i * kTileVectors, pack_left(tiles[m][i]));
  });
}

// A layer norm of the group's rows: its parameters, and where it goes.
struct RowNorm {
  const Vector16 *weight, *bias;
  float eps;
  float* sums;
  bool in_place;
  Vector16* to_shared;       // in bf16, [strip][tile], or null
  unsigned char* to_global;  // likewise
};

template <class Class>
__device__ __forceinline__ void normalize(const Group<Class>& group, const RowNorm& norm,
                                          GroupTiles<Class>& tiles) {
  each_normalized(group, norm.sums, norm.weight, norm.bias, norm.eps, tiles,
                  [&](int m, int i, const float (&y)[2][4]) {
                    if (norm.to_shared) {
                      const int tile = m * group.model_tiles() + group.first_tile() + i;
                      store_shared(norm.to_shared + tile * kTileVectors + group.lane, pack_left(y));
                    } else if (norm.to_global) {
                      store_global(group.own(norm.to_global, m) + i * kTileVectors, pack_left(y));
                    }
                    if (!norm.in_place) return;
#pragma unroll
                    for (int j = 0; j < 8; ++j) tiles[m][i][j / 4][j % 4] = y[j / 4][j % 4];
                  });
}

// A group of strips through a layer behind attention.
template <class Class>
__device__ __forceinline__ void run_group(const Group<Class>& group, const Sequence& s, bool last) {
  const EncoderParams& p = group.p.encoder;
  const EncoderLayout& l = p.layout;
  const Vector16* packed = reinterpret_cast<const Vector16*>(p.packed);
  const Vector16* layer = packed + group.p.layer * l.layer;
  // Sums lie where nobody else is at work: attended rows are in use until the first norm, y and the
  // hidden layer after it, and the hidden layer for the longest.
  float* at_hidden = reinterpret_cast<float*>(shared_vectors(group.p.hidden));
  float* at_operand = reinterpret_cast<float*>(shared_vectors(group.p.operand));

  // A norm follows attention, the feed-forward part and, in the end, all layers; there is one copy
  // of its code.
  enum Step { kAttention, kFeedForward, kFinal };
  GroupTiles<Class> tiles;
#pragma unroll 1
  for (int step = kAttention; step <= kFinal; ++step) {
    RowNorm norm{};
    norm.eps = p.layer_norm_eps;
    norm.in_place = !p.norm_first;
    norm.sums = at_operand;
    if (step == kAttention) {
      attention_block(group, layer, s.num_keys > 0, tiles);
      norm.weight = layer + (p.norm_first ? l.norm2_weight : l.norm1_weight);
      norm.bias = layer + (p.norm_first ? l.norm2_bias : l.norm1_bias);
      norm.sums = at_hidden;
      norm.to_shared = shared_vectors(group.p.operand);
    } else if (step == kFeedForward) {
      add_to_rows(group, layer + l.linear2_bias + group.first_tile() * 4, tiles);
      sync_threads();
      feed_forward(group, layer, tiles);
      if (p.norm_first) {
        // The next layer's first norm, for attention.
        if (last) continue;
        store_rows(group, group.p.x, tiles);
        norm.weight = layer + l.layer + l.norm1_weight;
        norm.bias = layer + l.layer + l.norm1_bias;
        norm.to_global = group.p.source;
      } else {
        norm.weight = layer + l.norm2_weight;
        norm.bias = layer + l.norm2_bias;
        norm.to_global = last ? nullptr : group.p.x;
      }
    } else {
      if (!last) return;
      if (!p.has_final_norm) break;
      norm.weight = packed + l.final_weight;
      norm.bias = packed + l.final_bias;
      norm.eps = p.final_norm_eps;
      norm.sums = p.norm_first ? at_operand : at_hidden;
      norm.in_place = true;
    }
    normalize(group, norm, tiles);
  }
  group.each([&](int m) {
    store_strip(p, s, group.first + m, group.first_tile() * kTile, pool_of(p, 0, 0), tiles[m]);
    scheduling_fence();
  });
}

template <class Class>
__global__ void __launch_bounds__(32 * kSplitWarps, 1)
    split_tail_kernel(const __grid_constant__ SplitParams params) {
  const EncoderParams& p = params.encoder;
  const bool last = params.layer + 1 == p.num_layers;
  const int sequence = block_index() / params.blocks, block = block_index() % params.blocks;
  const Sequence s = start_sequence(p, params.first_sequence + sequence);
  Group<Class> group{params, sequence, 0, 0, warp_index(), lane_index()};
  if (last && p.pool_max) {
    constexpr int kColumns = Class::kTiles * kTile;
    reset_pool(pool_of(p, group.warp, kColumns), kColumns);
  }
  int strips = (s.num_tokens + kTile - 1) / kTile;
  // Those that the summary shows come first.
  while (last && strips > 0 && !is_read(p, s, strips - 1, s.num_tokens > s.num_keys)) --strips;
#pragma unroll 1
  for (int first = block * params.group; first < strips; first += params.blocks * params.group) {
    group.first = first;
    group.count = strips - first < params.group ? strips - first : params.group;
    if (first > block * params.group) sync_threads();
    run_group(group, s, last);
  }
  if (last && block == 0) {
    sync_threads();
    finish_sequence(p, s, 1, p.layout.model_rows);
  }
}

template <class Class>
__global__ void __launch_bounds__(32 * kSplitWarps, 1)
    split_tokens_kernel(const __grid_constant__ SplitParams params) {
  const EncoderParams& p = params.encoder;
  const int sequence = block_index() / params.blocks, block = block_index() % params.blocks;
  const Sequence s = start_sequence(p, params.first_sequence + sequence);
  const int strips = (s.num_tokens + kTile - 1) / kTile, first = block * params.group;
  if (first >= strips) return;
  const int left = strips - first;
  const Group<Class> group{params,       sequence,
                           first,        left < params.group ? left : params.group,
                           warp_index(), lane_index()};
  GroupTiles<Class> tiles;
  group.each([&](int m) {
    uint32_t x[Class::kTiles][4];
    load_strip(p, s, first + m, group.first_tile() * kTile, x);
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i) {
      store_global(group.own(params.x, m) + i * kTileVectors,
                   Vector16{{x[i][0], x[i][1], x[i][2], x[i][3]}});
      unpack(x[i], tiles[m][i]);
    }
  });
  if (!p.norm_first) return;
  const Vector16* layer = reinterpret_cast<const Vector16*>(p.packed);
  RowNorm norm{};
  norm.weight = layer + p.layout.norm1_weight;
  norm.bias = layer + p.layout.norm1_bias;
  norm.eps = p.layer_norm_eps;
  norm.sums = reinterpret_cast<float*>(shared_vectors(params.hidden));
  norm.to_global = params.source;
  normalize(group, norm, tiles);
}

}  // namespace seqkernels::cuda
