// The whole encoder in one launch: a block owns a sequence, a warp its strips of 16 tokens.
//
// Everything of a strip stays in its warp's registers from the input through all layers; only keys
// and values are shared, and P never leaves registers. An exact class has one warp a strip; the
// others lay the activations, in bf16 and lane order, to shared memory (or to the workspace) when a
// warp goes on to its next strip.
#pragma once

#include "cuda/encoder_attention.cuh"
#include "cuda/encoder_fragments.cuh"
#include "cuda/encoder_tokens.cuh"

namespace seqkernels::cuda {

// tiles += W_2 act(W_1 y + b_1), in chunks of the hidden layer.
template <class Class>
__device__ __forceinline__ void feed_forward(const Place<Class>& here, const Vector16* layer,
                                             const uint32_t (&y)[Class::kModelTiles][4],
                                             float (&tiles)[Class::kModelTiles][2][4]) {
  constexpr int kChunkTiles = kHiddenChunk / kTile;
  constexpr int kChunkVectors = kChunkTiles * Class::kModelTiles * kTileVectors;
  const EncoderLayout& l = here.p.layout;
  const int chunks = l.hidden_rows / kHiddenChunk;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float hidden[kChunkTiles][2][4];
    set_rows(hidden, layer + l.linear1_bias + chunk * kHiddenChunk / 4);
    multiply_weights(hidden, y, here.matrix(layer, l.linear1 + chunk * kChunkVectors));
    activate(here.p, hidden);
    uint32_t operand[kChunkTiles][4];
    pack(hidden, operand);
    multiply_weights(tiles, operand, here.matrix(layer, l.linear2 + chunk * kChunkVectors));
  }
}

// A strip's activations at rest between two steps.
template <class Class>
__device__ __forceinline__ void load_rest_strip(const Place<Class>& here, int strip,
                                                uint32_t (&x)[Class::kModelTiles][4]) {
#pragma unroll
  for (int i = 0; i < Class::kModelTiles; ++i) {
    const int at = here.p.x_rest + (strip * Class::kModelTiles + i) * kTileVectors;
    const Vector16 v = here.load_rest(at, here.p.x_in_workspace);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i][j] = v.v[j];
  }
}
template <class Class>
__device__ __forceinline__ void store_rest_strip(const Place<Class>& here, int strip,
                                                 const uint32_t (&x)[Class::kModelTiles][4]) {
#pragma unroll
  for (int i = 0; i < Class::kModelTiles; ++i) {
    const int at = here.p.x_rest + (strip * Class::kModelTiles + i) * kTileVectors;
    here.store_rest(at, here.p.x_in_workspace, {{x[i][0], x[i][1], x[i][2], x[i][3]}});
  }
}

// What attention reads: x, or its norm.
template <class Class>
__device__ __forceinline__ void normalize_first(const Place<Class>& here, const Vector16* layer,
                                                const uint32_t (&x)[Class::kModelTiles][4],
                                                uint32_t (&y)[Class::kModelTiles][4]) {
  const EncoderParams& p = here.p;
  if (p.norm_first) {
    float tiles[Class::kModelTiles][2][4];
#pragma unroll
    for (int i = 0; i < Class::kModelTiles; ++i) unpack(x[i], tiles[i]);
    layer_norm<Class>(p, tiles, layer + p.layout.norm1_weight, layer + p.layout.norm1_bias,
                      p.layer_norm_eps);
    pack(tiles, y);
  } else {
#pragma unroll
    for (int i = 0; i < Class::kModelTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = x[i][j];
    }
  }
}

// The attention of a head to the keys and values at rest, as `attention_block` wants it.
struct AttendToRest {
  template <class Class>
  __device__ __forceinline__ void operator()(const Place<Class>& here, const Vector16* layer,
                                             int head, const uint32_t (&y)[Class::kModelTiles][4],
                                             uint32_t (&attended)[Class::kHeadTiles][4]) const {
    attend(here, layer, head, y, attended);
  }
};

// tiles = x + W_o a + b_o
template <class Class, class Attend>
__device__ __forceinline__ void attention_block(const Place<Class>& here, const Vector16* layer,
                                                const uint32_t (&x)[Class::kModelTiles][4],
                                                float (&tiles)[Class::kModelTiles][2][4],
                                                Attend attend_head) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderLayout& l = here.p.layout;
  const bool has_keys = here.num_keys > 0;
  const Vector16* bias = layer + (has_keys ? l.out_bias : l.out_bias_alone);
  const Vector16* weights = here.matrix(layer, l.out);
  if constexpr (Class::kExact) {
    // All heads before the sums of the out-projection take their registers.
    // Without a key they are 0.
    uint32_t attended[Class::kHeads][kTiles][4] = {};
    if (has_keys) {
#pragma unroll
      for (int head = 0; head < Class::kHeads; ++head)
        attend_head(here, layer, head, x, attended[head]);
    }
    set_rows(tiles, bias);
    add_residual(tiles, x);
    scheduling_fence();
#pragma unroll
    for (int head = 0; head < Class::kHeads; ++head) {
      multiply_weights(tiles, attended[head],
                       weights + head * kTiles * Class::kModelTiles * kTileVectors);
    }
  } else {
    set_rows(tiles, bias);
    add_residual(tiles, x);
    uint32_t y[Class::kModelTiles][4];
    normalize_first(here, layer, x, y);
#pragma unroll 1
    for (int head = 0; has_keys && head < l.heads; ++head) {
      uint32_t attended[kTiles][4];
      attend_head(here, layer, head, y, attended);
      multiply_weights(tiles, attended,
                       weights + head * kTiles * Class::kModelTiles * kTileVectors);
    }
  }
}

// One strip through a layer behind its keys and values. The last layer leaves the output in
// `tiles`, the others the next x.
template <class Class, class Attend>
__device__ __forceinline__ void run_strip(const Place<Class>& here, const Vector16* layer,
                                          bool last, uint32_t (&x)[Class::kModelTiles][4],
                                          float (&tiles)[Class::kModelTiles][2][4],
                                          Attend attend_head) {
  const EncoderParams& p = here.p;
  const EncoderLayout& l = p.layout;
  const bool norm_first = !Class::kExact && p.norm_first;
  attention_block(here, layer, x, tiles, attend_head);
  if (norm_first) {
    pack(tiles, x);
    layer_norm<Class>(p, tiles, layer + l.norm2_weight, layer + l.norm2_bias, p.layer_norm_eps);
    uint32_t y[Class::kModelTiles][4];
    pack(tiles, y);
    set_rows(tiles, layer + l.linear2_bias);
    add_residual(tiles, x);
    feed_forward(here, layer, y, tiles);
  } else {
    layer_norm<Class>(p, tiles, layer + l.norm1_weight, layer + l.norm1_bias, p.layer_norm_eps);
    pack(tiles, x);
    set_rows(tiles, layer + l.linear2_bias);
    add_residual(tiles, x);
    feed_forward(here, layer, x, tiles);
    layer_norm<Class>(p, tiles, layer + l.norm2_weight, layer + l.norm2_bias, p.layer_norm_eps);
  }
  if (!last) {
    pack(tiles, x);
  } else if (p.has_final_norm) {
    const Vector16* packed = reinterpret_cast<const Vector16*>(p.packed);
    layer_norm<Class>(p, tiles, packed + l.final_weight, packed + l.final_bias, p.final_norm_eps);
  }
}

template <class Class>
__device__ __forceinline__ void run_sequence(const EncoderParams& p, int64_t index) {
  const int warp = warp_index();
  const Sequence s = start_sequence(p, index);
  const Place<Class> here{p, lane_index(), s.num_keys};
  const int strips = (s.num_tokens + kTile - 1) / kTile;
  const int key_strips = (s.num_keys + kTile - 1) / kTile;
  if (p.pool_max) reset_pool(pool_of(p, warp, Class::kModel), Class::kModel);

  uint32_t x[Class::kModelTiles][4];
  for (int strip = warp; strip < strips; strip += p.warps) {
    load_strip(p, s, strip, 0, x);
    if constexpr (Class::kExact) break;
    store_rest_strip(here, strip, x);
  }
  const Vector16* layer = reinterpret_cast<const Vector16*>(p.packed);
#pragma unroll 1
  for (int i = 0; i < p.num_layers && strips > 0; ++i, layer += p.layout.layer) {
    const bool last = i + 1 == p.num_layers;
    for (int strip = warp; strip < key_strips; strip += p.warps) {
      if constexpr (Class::kExact) {
        project_keys_and_values(here, layer, strip, x);
        break;
      } else {
        uint32_t y[Class::kModelTiles][4];
        load_rest_strip(here, strip, x);
        normalize_first(here, layer, x, y);
        project_keys_and_values(here, layer, strip, y);
      }
    }
    sync_threads();
    for (int strip = warp; strip < strips; strip += p.warps) {
      if (last && !is_read<(Class::kModel > 64)>(p, s, strip, s.num_tokens > s.num_keys)) {
        if constexpr (Class::kExact) break;
        continue;
      }
      float tiles[Class::kModelTiles][2][4];
      if constexpr (!Class::kExact) load_rest_strip(here, strip, x);
      run_strip(here, layer, last, x, tiles, AttendToRest{});
      if (last) {
        store_strip(p, s, strip, 0, pool_of(p, warp, Class::kModel), tiles);
      } else if constexpr (!Class::kExact) {
        store_rest_strip(here, strip, x);
      }
      if constexpr (Class::kExact) break;
    }
    sync_threads();
  }
  finish_sequence(p, s, p.warps, Class::kModel);
}

template <class Class>
__global__ void __launch_bounds__(32 * Class::kWarps, 1)
    encoder_kernel(const __grid_constant__ EncoderParams p) {
  if constexpr (Class::kExact) {
    run_sequence<Class>(p, block_index());
  } else {
    // The grid has no block without a sequence. That the first is not asked for tells ptxas that
    // the warps of a block stay together.
    for (int64_t index = block_index();;) {
      run_sequence<Class>(p, index);
      index += grid_size();
      if (index >= p.batch) break;
      sync_threads();
    }
  }
}

}  // namespace seqkernels::cuda
