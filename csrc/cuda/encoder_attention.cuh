// Keys and values at rest, and the attention of one strip to all of them.
//
// A tile of K [16 tokens, 16 of a head] is a fragment packed in place, 16 bytes a lane in lane
// order. A tile of V is written as four blocks of 8 x 8, 4 bytes a lane in lane order, which
// ldmatrix reads transposed. So every access of a warp goes through whole 128-byte lines, and none
// meets a bank conflict. In the workspace, where there is no ldmatrix, V^T is computed instead and
// lies as K does. b_k is left out, since it shifts all scores of a row alike, and b_v is in the
// bias of the out-projection, since the rows of P sum to 1.
//
// Softmax takes no maximum: bf16 has the range of fp32, so P = exp2(s) is as good as exp2(s - max)
// while the row's sum stays within 2^-32 .. 2^100 and P V is finite: products that flush to zero
// are below 2^-126, and weigh at most 2^-94 each beside the values. So key tiles pass one after
// another, in any number, and nothing is ever rescaled. Rows that leave the range take a second
// pass with their maximum, which enters as what the scores are added to; the rows beside them keep
// their bits. The sum is a product with ones, of the P that was rounded.
#pragma once

#include "cuda/encoder_fragments.cuh"

namespace seqkernels::cuda {

// What one thread knows of its place.
template <class Class>
struct Place {
  const EncoderParams& p;
  int lane;
  int num_keys;

  // The block's part of the workspace.
  __device__ __forceinline__ Vector16* workspace() const {
    return reinterpret_cast<Vector16*>(p.workspace + block_index() * p.workspace_stride);
  }
  __device__ __forceinline__ Vector16 load_rest(int at, bool in_workspace) const {
    if constexpr (!Class::kExact) {
      if (in_workspace) return load_global_coherent(workspace() + at + lane);
    }
    return load_shared(reinterpret_cast<const Vector16*>(shared_memory()) + at + lane);
  }
  __device__ __forceinline__ void store_rest(int at, bool in_workspace, const Vector16& v) const {
    if constexpr (!Class::kExact) {
      if (in_workspace) {
        store_global(workspace() + at + lane, v);
        return;
      }
    }
    store_shared(reinterpret_cast<Vector16*>(shared_memory()) + at + lane, v);
  }
  // A tile of values [16 tokens, 16 of a head] goes to shared memory in four blocks of 8 x 8, which
  // ldmatrix transposes; `multiply` gets V^T.
  __device__ __forceinline__ void store_values(int at, const float (&tile)[2][4]) const {
    uint32_t blocks[4];
    pack(tile, blocks);
    uint32_t* to = reinterpret_cast<uint32_t*>(shared_memory() + int64_t{16} * at) + lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(to + 32 * i, blocks[i]);
  }
  __device__ __forceinline__ Vector16 load_values(int at) const {
    if constexpr (!Class::kExact) {
      if (p.keys_in_workspace) return load_global_coherent(workspace() + at + lane);
    }
    Vector16 v;
    ldmatrix_x4_trans(v.v, shared_memory() + 16 * (at + lane));
    return v;
  }
  // Of a head's first tile at this strip, in K or V.
  __device__ __forceinline__ int tile_of(int base, int head, int strip) const {
    return base + (head * p.strips + strip) * Class::kHeadTiles * kTileVectors;
  }
  // This lane's part of a matrix of the layer.
  __device__ __forceinline__ const Vector16* matrix(const Vector16* layer, int offset) const {
    return layer + offset + lane;
  }
};

// K of a head and strip, to memory.
template <class Class>
__device__ __forceinline__ void store_keys(const Place<Class>& here, int head, int strip,
                                           const float (&tiles)[Class::kHeadTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < Class::kHeadTiles; ++i) {
    here.store_rest(here.tile_of(here.p.keys, head, strip) + i * kTileVectors,
                    here.p.keys_in_workspace, pack_right(tiles[i]));
  }
}

// V likewise, to shared memory. Values of padded tokens are set to zero, not multiplied by it: they
// may be NaN.
template <class Class>
__device__ __forceinline__ void store_values(const Place<Class>& here, int head, int strip,
                                             float (&tiles)[Class::kHeadTiles][2][4]) {
  const int at = here.tile_of(here.p.values, head, strip);
  const int left = here.num_keys - strip * kTile;
  const int token = here.lane / 4;
#pragma unroll
  for (int i = 0; i < Class::kHeadTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (token + 8 * (j % 4 / 2) >= left) tiles[i][j / 4][j % 4] = 0.0f;
    }
    here.store_values(at + i * kTileVectors, tiles[i]);
  }
}

// V^T, a tile's rows columns of the head, to the workspace.
template <class Class>
__device__ __forceinline__ void store_values_transposed(const Place<Class>& here, int head,
                                                        int strip,
                                                        float (&tiles)[Class::kHeadTiles][2][4]) {
  const int at = here.tile_of(here.p.values, head, strip);
  const int left = here.num_keys - strip * kTile;
  const int token = 2 * (here.lane % 4);
#pragma unroll
  for (int i = 0; i < Class::kHeadTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (token + 8 * (j / 4) + j % 2 >= left) tiles[i][j / 4][j % 4] = 0.0f;
    }
    here.store_rest(at + i * kTileVectors, true, pack_right(tiles[i]));
  }
}

// K and V of a strip, to memory.
template <class Class>
__device__ __forceinline__ void project_keys_and_values(
    const Place<Class>& here, const Vector16* layer, int strip,
    const uint32_t (&x)[Class::kModelTiles][4]) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderParams& p = here.p;
  const int head_vectors = kTiles * Class::kModelTiles * kTileVectors;
  const int heads = Class::kExact ? Class::kHeads : p.layout.heads;
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    float tiles[kTiles][2][4];
    clear(tiles);
    multiply_weights(tiles, x, here.matrix(layer, p.layout.key + head * head_vectors));
    store_keys(here, head, strip, tiles);
    const Vector16* weights = here.matrix(layer, p.layout.value + head * head_vectors);
    clear(tiles);
    if (!Class::kExact && p.keys_in_workspace) {
      multiply_weights_left(tiles, x, weights);
      store_values_transposed(here, head, strip, tiles);
    } else {
      multiply_weights(tiles, x, weights);
      store_values(here, head, strip, tiles);
    }
  }
}

// scores [16 queries, kTiles tiles of keys] = q k^T - top, from key tile `first` on.
template <class Class, int kTiles>
__device__ __forceinline__ void score(const Place<Class>& here, int head, int first,
                                      const uint32_t (&q)[Class::kHeadTiles][4],
                                      const float (&top)[2], float (&scores)[kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) scores[i][j / 4][j % 4] = -top[j % 4 / 2];
  }
#pragma unroll
  for (int step = 0; step < Class::kHeadTiles; ++step) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = here.tile_of(here.p.keys, head, first + i) + step * kTileVectors;
      multiply(scores[i], q[step], here.load_rest(at, here.p.keys_in_workspace));
    }
    scheduling_fence();
  }
}

// Calls function(score, whether the key exists) for the elements of scores.
template <int kTiles, class Function>
__device__ __forceinline__ void each_score(int lane, int first, int num_keys,
                                           float (&scores)[kTiles][2][4], Function function) {
  const bool whole = (first + kTiles) * kTile <= num_keys;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int key = (first + i) * kTile + 8 * (j / 4) + 2 * (lane % 4) + j % 2;
      function(scores[i][j / 4][j % 4], j % 4 / 2, whole || key < num_keys);
    }
  }
}

// out += P V and sum += P 1 over kTiles tiles of keys.
template <class Class, int kTiles>
__device__ __forceinline__ void attend_to_tiles(const Place<Class>& here, int head, int first,
                                                const uint32_t (&q)[Class::kHeadTiles][4],
                                                const float (&top)[2],
                                                float (&out)[Class::kHeadTiles][2][4],
                                                float (&sum)[4]) {
  float scores[kTiles][2][4];
  score<Class, kTiles>(here, head, first, q, top, scores);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) scores[i][j / 4][j % 4] = exp2_approx(scores[i][j / 4][j % 4]);
  }
  if ((first + kTiles) * kTile > here.num_keys) {
    each_score(here.lane, first, here.num_keys, scores,
               [](float& s, int, bool exists) { s = exists ? s : 0.0f; });
  }
  uint32_t weights[kTiles][4];
  pack(scores, weights);
  scheduling_fence();
  constexpr uint32_t kOnes = 0x3f803f80u;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) mma_m16n8k16(sum, weights[i], kOnes, kOnes);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Class::kHeadTiles; ++j) {
      const int at = here.tile_of(here.p.values, head, first + i) + j * kTileVectors;
      multiply(out[j], weights[i], here.load_values(at));
    }
    scheduling_fence();
  }
}

// The largest score of the lane's two rows.
template <class Class>
__device__ __forceinline__ void largest_scores(const Place<Class>& here, int head,
                                               const uint32_t (&q)[Class::kHeadTiles][4],
                                               float (&top)[2]) {
  const float zero[2] = {0.0f, 0.0f};
  top[0] = top[1] = -3.4e38f;
#pragma unroll 1
  for (int first = 0; first * kTile < here.num_keys; ++first) {
    float scores[1][2][4];
    score<Class, 1>(here, head, first, q, zero, scores);
    each_score(here.lane, first, here.num_keys, scores, [&](float s, int row, bool exists) {
      top[row] = exists && s > top[row] ? s : top[row];
    });
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const float other = shuffle_xor(top[row], mask);
      top[row] = other > top[row] ? other : top[row];
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void pack_query(const EncoderParams& p, float (&tiles)[kTiles][2][4],
                                           uint32_t (&q)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) tiles[i][j / 4][j % 4] *= p.score_scale;
  }
  pack(tiles, q);
}

// The attention of one head to all keys, [16, head rows] in bf16. There is at least one.
template <class Class>
__device__ __forceinline__ void attend_to_keys(const Place<Class>& here, int head,
                                               const uint32_t (&q)[Class::kHeadTiles][4],
                                               uint32_t (&attended)[Class::kHeadTiles][4]) {
  constexpr int kTiles = Class::kHeadTiles;
  constexpr int kTilesAtOnce = 2;
  float out[kTiles][2][4], sum[4], top[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    clear(out);
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    const int key_tiles = (here.num_keys + kTile - 1) / kTile;
    int first = 0;
#pragma unroll 1
    for (; first + kTilesAtOnce <= key_tiles; first += kTilesAtOnce)
      attend_to_tiles<Class, kTilesAtOnce>(here, head, first, q, top, out, sum);
    if (first < key_tiles) attend_to_tiles<Class, 1>(here, head, first, q, top, out, sum);

    if (pass > 0) break;
    // 0 times what is not finite is NaN, which is in no range.
    float checked[2] = {sum[0], sum[2]};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) checked[j % 4 / 2] += 0.0f * out[i][j / 4][j % 4];
    }
    const auto in_range = [](float s) { return s >= 0x1p-32f && s <= 0x1p100f; };
    if (all(in_range(checked[0]) && in_range(checked[1]))) break;
    largest_scores(here, head, q, top);
#pragma unroll
    for (int row = 0; row < 2; ++row) {  // the four lanes of a row share its sum, not its columns
      if (in_range(0.25f * sum_of_row(checked[row]))) top[row] = 0.0f;
    }
  }
  const float inverse[2] = {reciprocal_approx(sum[0]), reciprocal_approx(sum[2])};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[i][j / 4][j % 4] *= inverse[j % 4 / 2];
  }
  pack(out, attended);
  scheduling_fence();
}

// The queries of one head, [16, head rows] in bf16, scaled.
template <class Class>
__device__ __forceinline__ void project_queries(const Place<Class>& here, const Vector16* layer,
                                                int head,
                                                const uint32_t (&x)[Class::kModelTiles][4],
                                                uint32_t (&q)[Class::kHeadTiles][4]) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderLayout& l = here.p.layout;
  float tiles[kTiles][2][4];
  set_rows(tiles, layer + l.query_bias + head * kTiles * 4);
  const int head_vectors = kTiles * Class::kModelTiles * kTileVectors;
  multiply_weights(tiles, x, here.matrix(layer, l.query + head * head_vectors));
  pack_query(here.p, tiles, q);
}

// The attention of one head from the strip's activations on.
template <class Class>
__device__ __forceinline__ void attend(const Place<Class>& here, const Vector16* layer, int head,
                                       const uint32_t (&x)[Class::kModelTiles][4],
                                       uint32_t (&attended)[Class::kHeadTiles][4]) {
  uint32_t q[Class::kHeadTiles][4];
  project_queries(here, layer, head, x, q);
  attend_to_keys(here, head, q, attended);
}

}  // namespace seqkernels::cuda
