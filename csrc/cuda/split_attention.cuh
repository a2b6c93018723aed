// The split encoder's attention: a block owns a head of a sequence, a warp its strips of 16 tokens.
//
// K and V of the head are projected from the activations in the workspace and stay in shared
// memory; then each warp projects Q of a strip, attends and leaves the result in the workspace.
#pragma once

#include "cuda/encoder_attention.cuh"
#include "cuda/encoder_tokens.cuh"
#include "cuda/split_params.h"

namespace seqkernels::cuda {

template <int kHeadRows>
struct SplitAttentionClass {
  static constexpr int kHeadTiles = kHeadRows / kTile;
  static constexpr bool kExact = false;
  static constexpr int kBlocks = kHeadRows <= 64 ? 2 : 1;  // of a multiprocessor, by registers
};

// For the tiles of a strip and a head's weights: function(j, left operand, weights of column tile
// j), step by step along the model's columns. `rows` and `weights` point to this lane's part of
// their first tiles, [step] and [step][kTiles].
template <int kTiles, class Function>
__device__ __forceinline__ void each_product(const Vector16* rows, const Vector16* weights,
                                             int steps, Function function) {
  constexpr int kParts = kTiles > 4 ? 2 : 1;  // of a step
  constexpr int kPart = kTiles / kParts;
  struct Operands {
    Vector16 a, b[kPart];
  };
  const auto load = [&](Operands& to, int part) {
    to.a = load_global(rows + part / kParts * kTileVectors);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
      to.b[j] = load_global(weights + (part * kPart + j) * kTileVectors);
  };
  const auto multiply_part = [&](const Operands& now, int first) {
    scheduling_fence();
#pragma unroll
    for (int j = 0; j < kPart; ++j) function(first + j, now.a.v, now.b[j]);
  };
  // What is multiplied next is on its way meanwhile. The number of steps is even.
  Operands even, odd;
  load(even, 0);
  const int parts = steps * kParts;
#pragma unroll 1
  for (int part = 0; part < parts; part += 2) {
    load(odd, part + 1);
    multiply_part(even, 0);
    if (part + 2 < parts) load(even, part + 2);
    multiply_part(odd, kTiles - kPart);
  }
}

// K and V of a strip, to memory.
template <class Class>
__device__ __forceinline__ void project_keys_and_values(const Place<Class>& here,
                                                        const Vector16* keys,
                                                        const Vector16* values, int steps,
                                                        int strip, const Vector16* rows) {
  constexpr int kTiles = Class::kHeadTiles;
  float tiles[kTiles][2][4];
  const auto multiply_each = [&](int j, const uint32_t (&x)[4], const Vector16& w) {
    multiply(tiles[j], x, w);
  };
  clear(tiles);
  each_product<kTiles>(rows, keys, steps, multiply_each);
  store_keys(here, 0, strip, tiles);
  clear(tiles);
  if (here.p.keys_in_workspace) {
    each_product<kTiles>(
        rows, values, steps,
        [&](int j, const uint32_t (&x)[4], const Vector16& w) { multiply_left(tiles[j], w, x); });
    store_values_transposed(here, 0, strip, tiles);
  } else {
    each_product<kTiles>(rows, values, steps, multiply_each);
    store_values(here, 0, strip, tiles);
  }
}

template <class Class>
__global__ void __launch_bounds__(32 * kSplitWarps, Class::kBlocks)
    split_attention_kernel(const __grid_constant__ SplitParams params) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderParams& p = params.encoder;
  const EncoderLayout& l = p.layout;
  const int sequence = block_index() / l.heads, head = block_index() % l.heads;
  const Sequence s = start_sequence(p, params.first_sequence + sequence);
  if (s.num_keys == 0) return;
  const Place<Class> here{p, lane_index(), s.num_keys};
  const int warp = warp_index();
  const int steps = l.model_rows / kTile;
  const Vector16* layer = reinterpret_cast<const Vector16*>(p.packed) + params.layer * l.layer;
  const int head_vectors = kTiles * steps * kTileVectors;
  const Vector16* query = here.matrix(layer, l.query + head * head_vectors);
  const Vector16* keys = here.matrix(layer, l.key + head * head_vectors);
  const Vector16* values = here.matrix(layer, l.value + head * head_vectors);
  const int64_t first_strip = int64_t{1} * sequence * p.strips;
  const Vector16* rows = reinterpret_cast<const Vector16*>(params.source) +
                         first_strip * steps * kTileVectors + here.lane;
  Vector16* attended = reinterpret_cast<Vector16*>(params.attended) +
                       (first_strip * l.heads + head) * kTiles * kTileVectors + here.lane;

  const int key_strips = (s.num_keys + kTile - 1) / kTile;
#pragma unroll 1
  for (int strip = warp; strip < key_strips; strip += p.warps) {
    const Vector16* from = rows + int64_t{1} * strip * steps * kTileVectors;
    project_keys_and_values(here, keys, values, steps, strip, from);
  }
  sync_threads();
  const bool last = params.layer + 1 == p.num_layers;
  const int strips = (s.num_tokens + kTile - 1) / kTile;
#pragma unroll 1
  for (int strip = warp; strip < strips; strip += p.warps) {
    if (last && !is_read(p, s, strip, s.num_tokens > s.num_keys)) continue;
    uint32_t q[kTiles][4];
    {
      float tiles[kTiles][2][4];
      set_rows(tiles, layer + l.query_bias + head * kTiles * 4);
      each_product<kTiles>(
          rows + int64_t{1} * strip * steps * kTileVectors, query, steps,
          [&](int j, const uint32_t (&x)[4], const Vector16& w) { multiply(tiles[j], x, w); });
      pack_query(p, tiles, q);
    }
    uint32_t result[kTiles][4];
    attend_to_keys(here, 0, q, result);
    Vector16* to = attended + int64_t{1} * strip * l.heads * kTiles * kTileVectors;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store_global(to + i * kTileVectors,
                   Vector16{{result[i][0], result[i][1], result[i][2], result[i][3]}});
    }
  }
}

}  // namespace seqkernels::cuda
