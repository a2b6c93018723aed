// Request scoring, one user and many candidates, in two launches: what the first layer computes of
// the events alone, a block a user and head; then everything else, a block a candidate.
//
// With tokens [e_i ; c] the first layer's projections are those of the events plus those of the
// candidate: q_i + a, k_i + d, v_i + f. In a row of scores (q_i + a) (k_j + d) = q_i k_j + a k_j +
// terms without j, which softmax drops. With E_ij = 2^(q_i k_j - max_j q_i k_j), the user's, and
// w_j = 2^(a k_j - max_j a k_j), the candidate's, both at most 1,
//     attention_i = sum_j E_ij w_j v_j / sum_j E_ij w_j + f
// so a candidate costs the first layer neither projections, nor scores, nor exponentials but L.
// Everything behind attention, and all layers above, run as in the encoder's kernel.
//
// E is rounded to bf16, w too, w v again from fp32; the sums are products of the rounded E and w. A
// row whose sum is not above 2^-64 (or NaN) makes its candidate start again, as a sequence of its
// own: E w underflows where the two largest stand far apart.
#pragma once

#include "cuda/encoder.cuh"
#include "cuda/kernel_tables.h"

namespace seqkernels::cuda {

constexpr float kSmallestSum = 0x1p-64f;  // of a row of E w

// ---- where things lie ----

template <class T>
__device__ __forceinline__ T* shared_at(int offset) {
  return reinterpret_cast<T*>(shared_memory() + int64_t{16} * offset);
}

// A user's part of the workspace, this lane's column of it.
template <class Class>
struct UserPart {
  const RequestParams& r;
  Vector16* base;

  __device__ __forceinline__ UserPart(const RequestParams& params, int64_t slot)
      : r(params),
        base(reinterpret_cast<Vector16*>(params.workspace + slot * params.user_bytes) +
             lane_index()) {}
  // The user of this block's candidate: said again where it is needed, for the registers.
  __device__ __forceinline__ explicit UserPart(const RequestParams& params)
      : UserPart(params, load_shared(shared_at<int32_t>(params.slot))) {}

  __device__ __forceinline__ Vector16* exponentials(int head, int strip, int key_strip) const {
    const int strips = r.encoder.strips;
    return base + r.exponentials + ((head * strips + strip) * strips + key_strip) * kTileVectors;
  }
  __device__ __forceinline__ Vector16* keys(int head, int strip) const {
    return base + r.keys + (head * r.encoder.strips + strip) * Class::kHeadTiles * kTileVectors;
  }
  __device__ __forceinline__ Vector16* values(int head, int strip) const {
    return base + r.values +
           (head * r.encoder.strips + strip) * Class::kHeadTiles * 2 * kTileVectors;
  }
};

// Words {0, 1} and {8, 9} of a vector of 16 at columns 2 t: what a lane's columns of a tile need.
__device__ __forceinline__ void load_columns_of_tile(const float* vector, float (&columns)[2][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector8 v =
        load_shared(reinterpret_cast<const Vector8*>(vector + 8 * half + 2 * (lane_index() % 4)));
    columns[half][0] = bits_as_float(v.v[0]);
    columns[half][1] = bits_as_float(v.v[1]);
  }
}

// ---- a user ----

// K and V of a head and strip: the keys to shared memory, both to the user's part.
template <class Class>
__device__ __forceinline__ void keep_keys_and_values(const Place<Class>& here,
                                                     const UserPart<Class>& user,
                                                     const Vector16* layer, int head, int strip,
                                                     const uint32_t (&x)[Class::kModelTiles][4]) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderParams& p = here.p;
  const int head_vectors = kTiles * Class::kModelTiles * kTileVectors;
  float tiles[kTiles][2][4];
  clear(tiles);
  multiply_weights(tiles, x, here.matrix(layer, p.layout.key + head * head_vectors));
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const Vector16 k = pack_right(tiles[i]);
    here.store_rest(here.tile_of(p.keys, head, strip) + i * kTileVectors, false, k);
    store_global(user.keys(head, strip) + i * kTileVectors,
                 Vector16{{k.v[0], k.v[2], k.v[1], k.v[3]}});
  }
  clear(tiles);
  multiply_weights(tiles, x, here.matrix(layer, p.layout.value + head * head_vectors));
  const int left = here.num_keys - strip * kTile - here.lane / 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector16 v;
      // Set to zero, not multiplied by it: values of padded tokens may be NaN.
#pragma unroll
      for (int j = 0; j < 4; ++j)
        v.v[j] = left > 8 * (j / 2) ? float_as_bits(tiles[i][half][j]) : 0u;
      store_global(user.values(head, strip) + (2 * i + half) * kTileVectors, v);
    }
  }
}

// E of a head and strip.
template <class Class>
__device__ __forceinline__ void keep_exponentials(const Place<Class>& here,
                                                  const UserPart<Class>& user,
                                                  const Vector16* layer, int head, int strip,
                                                  const uint32_t (&x)[Class::kModelTiles][4]) {
  uint32_t q[Class::kHeadTiles][4];
  project_queries(here, layer, head, x, q);
  float top[2];
  largest_scores(here, head, q, top);
#pragma unroll 1
  for (int key_strip = 0; key_strip * kTile < here.num_keys; ++key_strip) {
    float scores[1][2][4];
    score<Class, 1>(here, head, key_strip, q, top, scores);
    each_score(here.lane, key_strip, here.num_keys, scores,
               [](float& s, int, bool exists) { s = exists ? exp2_approx(s) : 0.0f; });
    uint32_t e[4];
    pack(scores[0], e);
    store_global(user.exponentials(head, strip, key_strip), Vector16{{e[0], e[1], e[2], e[3]}});
  }
}

// A block for each user and head.
template <class Class>
__global__ void __launch_bounds__(32 * Class::kWarps, 1)
    request_user_kernel(const __grid_constant__ RequestParams r) {
  const EncoderParams& p = r.encoder;
  const int warp = warp_index();
  const int slot = block_index() / p.layout.heads, head = block_index() % p.layout.heads;
  const Sequence s = start_sequence<false>(p, r.first_user + slot);
  const Place<Class> here{p, lane_index(), s.num_keys};
  const UserPart<Class> user(r, slot);
  const int strips = (s.num_tokens + kTile - 1) / kTile;
  const Vector16* layer = reinterpret_cast<const Vector16*>(p.packed);
  uint32_t x[Class::kModelTiles][4];
  for (int strip = warp; strip * kTile < s.num_keys; strip += p.warps) {
    load_strip(p, s, strip, 0, x);
    keep_keys_and_values(here, user, layer, head, strip, x);
    if constexpr (Class::kExact) break;
  }
  sync_threads();
  for (int strip = warp; strip < strips; strip += p.warps) {
    load_strip(p, s, strip, 0, x);
    keep_exponentials(here, user, layer, head, strip, x);
    if constexpr (Class::kExact) break;
  }
}

// ---- a candidate ----

// The candidate's columns column .. column + 7, zeros in the events' place.
__device__ __forceinline__ Vector16 load_candidate(const EncoderParams& p, int64_t index,
                                                   int column) {
  Vector16 v = load_columns(p, Sequence{index, 0, 0}, 0, column);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + 2 * i < p.event_dim) v.v[i] &= 0xffff0000u;
    if (column + 2 * i + 1 < p.event_dim) v.v[i] &= 0x0000ffffu;
  }
  return v;
}

// The candidate's part of every query and value: products with the weights' tiles on the left and
// the candidate in all columns on the right. The value's bias is in that of the out-projection.
template <class Class>
__device__ __forceinline__ void project_candidate(const RequestParams& r, int64_t index, int warp) {
  constexpr int kTiles = Class::kHeadTiles;
  const EncoderParams& p = r.encoder;
  const int of_queries = p.layout.heads * kTiles;  // tiles
  const Vector16* packed = reinterpret_cast<const Vector16*>(p.packed) + lane_index();
#pragma unroll 1
  for (int tile = warp; tile < 2 * of_queries; tile += p.warps) {
    const bool is_query = tile < of_queries;
    const int at = is_query ? tile : tile - of_queries;
    const Vector16* weights =
        packed + (is_query ? p.layout.query : p.layout.value) +
        (at / kTiles * kTiles * Class::kModelTiles + at % kTiles) * kTileVectors;
    float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int pair = p.event_dim / 32; pair < Class::kModelTiles / 2; ++pair) {
      const Vector16 c = load_candidate(p, index, 32 * pair + 8 * (lane_index() % 4));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Vector16 w = load_global(weights + (2 * pair + i) * kTiles * kTileVectors);
        const uint32_t left[4] = {w.v[0], w.v[2], w.v[1], w.v[3]};
        mma_m16n8k16(y, left, c.v[2 * i], c.v[2 * i + 1]);
      }
    }
    const float scale = is_query ? p.score_scale : 1.0f;
    if (lane_index() % 4 == 0) {
      float* part = shared_at<float>(r.parts) + tile * kTile + lane_index() / 4;
      store_shared(part, y[0] * scale);
      store_shared(part + 8, y[2] * scale);
    }
  }
}

// Scores of the candidate's query part and a strip's keys, and the largest of them.
template <class Class>
__device__ __forceinline__ void score_keys(const Place<Class>& here, const RequestParams& r,
                                           int head, int strip) {
  constexpr int kTiles = Class::kHeadTiles;
  const Vector16* keys = UserPart<Class>(r).keys(head, strip);
  float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // rows are keys, columns are all the same
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const Vector16 k = load_global(keys + i * kTileVectors);
    float a[2][2];
    load_columns_of_tile(shared_at<float>(r.parts) + (head * kTiles + i) * kTile, a);
    mma_m16n8k16(scores, k.v, pack_bf16(a[0][0], a[0][1]), pack_bf16(a[1][0], a[1][1]));
  }
  constexpr float kLowest = -3.4e38f;
  const int left = here.num_keys - strip * kTile - here.lane / 4;
  const float rows[2] = {left > 0 ? scores[0] : kLowest, left > 8 ? scores[2] : kLowest};
  float top = rows[0] > kLowest ? rows[0] : kLowest;
  top = rows[1] > top ? rows[1] : top;
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) {
    const float other = shuffle_xor(top, mask);
    top = other > top ? other : top;
  }
  const int tile = head * here.p.strips + strip;
  if (here.lane % 4 == 0) {
    float* to = shared_at<float>(r.scores) + tile * kTile + here.lane / 4;
    store_shared(to, rows[0]);
    store_shared(to + 8, rows[1]);
  }
  if (here.lane == 0) store_shared(shared_at<float>(r.tops) + tile, top);
}

// w of a strip's keys, and their values times w, to shared memory.
template <class Class>
__device__ __forceinline__ void weigh_values(const Place<Class>& here, const RequestParams& r,
                                             int head, int strip) {
  const int first = head * here.p.strips;
  float top = -3.4e38f;
  for (int i = here.lane; i * kTile < here.num_keys; i += 32) {
    const float other = load_shared(shared_at<float>(r.tops) + first + i);
    top = other > top ? other : top;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = shuffle_xor(top, mask);
    top = other > top ? other : top;
  }
  const float* scores = shared_at<float>(r.scores) + (first + strip) * kTile + here.lane / 4;
  const uint32_t w =
      pack_bf16(exp2_approx(load_shared(scores) - top), exp2_approx(load_shared(scores + 8) - top));
  const uint32_t next = shuffle_xor(w, 4);
  if (here.lane % 8 == 0) {
    store_shared(shared_at<Vector8>(r.weights) + (first + strip) * 4 + here.lane / 8,
                 Vector8{{(w & 0xffffu) | next << 16, w >> 16 | (next & 0xffff0000u)}});
  }
  const float rows[2] = {bf16_low(w), bf16_high(w)};
  const Vector16* values = UserPart<Class>(r).values(head, strip);
#pragma unroll
  for (int i = 0; i < Class::kHeadTiles; ++i) {
    float tile[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector16 v = load_global(values + (2 * i + half) * kTileVectors);
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[half][j] = bits_as_float(v.v[j]) * rows[j / 2];
    }
    here.store_values(here.tile_of(here.p.values, head, strip) + i * kTileVectors, tile);
  }
}

// As `attend`, for the first layer of a candidate; says so where a row's sum is out of range.
template <class Class>
__device__ __forceinline__ void attend_to_user(const Place<Class>& here, const RequestParams& r,
                                               const Sequence& s, int head, int strip, int warp,
                                               uint32_t (&attended)[Class::kHeadTiles][4]) {
  constexpr int kTiles = Class::kHeadTiles;
  constexpr int kTilesAtOnce = 4;
  const int key_tiles = (here.num_keys + kTile - 1) / kTile;
  const Vector16* exponentials = UserPart<Class>(r).exponentials(head, strip, 0);
  float out[kTiles][2][4], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  clear(out);
#pragma unroll 1
  for (int first = 0; first < key_tiles; first += kTilesAtOnce) {
    Vector16 e[kTilesAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      if (first + i < key_tiles) e[i] = load_global(exponentials + (first + i) * kTileVectors);
    }
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      if (first + i >= key_tiles) continue;
      const Vector8 w = load_shared(shared_at<Vector8>(r.weights) +
                                    (head * here.p.strips + first + i) * 4 + here.lane % 4);
      mma_m16n8k16(sum, e[i].v, w.v[0], w.v[1]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int at = here.tile_of(here.p.values, head, first + i) + j * kTileVectors;
        multiply(out[j], e[i].v, here.load_values(at));
      }
    }
    scheduling_fence();
  }
  // Both factors are at most 1, so that no sum is too large.
  const int left = s.num_tokens - strip * kTile - here.lane / 4;
  const bool fits =
      all((sum[0] > kSmallestSum || left <= 0) && (sum[2] > kSmallestSum || left <= 8));
  if (!fits && here.lane == 0) store_shared(shared_at<uint32_t>(r.misfits) + warp, 1u);
  const float inverse[2] = {reciprocal_approx(sum[0]), reciprocal_approx(sum[2])};
  const float* part = shared_at<float>(r.parts) + (here.p.layout.heads + head) * kTiles * kTile;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float f[2][2];
    load_columns_of_tile(part + i * kTile, f);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& y = out[i][j / 4][j % 4];
      y = y * inverse[j % 4 / 2] + f[j / 4][j % 2];
    }
  }
  pack(out, attended);
  scheduling_fence();
}

// Calls function(head, strip) for the warp's strips of keys.
template <class Class, class Function>
__device__ __forceinline__ void each_key_strip(const Place<Class>& here, int key_strips, int warp,
                                               Function function) {
#pragma unroll 1
  for (int head = 0; head < here.p.layout.heads; ++head) {
    for (int strip = warp; strip < key_strips; strip += here.p.warps) {
      function(head, strip);
      if constexpr (Class::kExact) break;
    }
  }
}

// Whether no warp met a row that does not fit; the same in all threads.
__device__ __forceinline__ bool all_fit(const RequestParams& r) {
  bool fits = true;
  if (lane_index() < r.encoder.warps)
    fits = load_shared(shared_at<uint32_t>(r.misfits) + lane_index()) == 0;
  return all(fits);
}

// The attention of the first layer to the user, of all others to the keys and values at rest.
struct AttendOfCandidate {
  const RequestParams& r;
  const Sequence& s;
  bool with_user;
  int strip, warp;

  template <class Class>
  __device__ __forceinline__ void operator()(const Place<Class>& here, const Vector16* layer,
                                             int head, const uint32_t (&y)[Class::kModelTiles][4],
                                             uint32_t (&attended)[Class::kHeadTiles][4]) const {
    if (with_user) {
      attend_to_user(here, r, s, head, strip, warp, attended);
    } else {
      attend(here, layer, head, y, attended);
    }
  }
};

template <class Class>
__device__ __forceinline__ void score_candidate(const RequestParams& r, int64_t index) {
  const EncoderParams& p = r.encoder;
  const int warp = warp_index();
  const int64_t user = Sequence{index, 0, 0}.user(p);
  if (user < r.first_user || user >= r.end_user) return;
  if (thread_index() == 0)
    store_shared(shared_at<int32_t>(r.slot), static_cast<int32_t>(user - r.first_user));
  if (lane_index() == 0) store_shared(shared_at<uint32_t>(r.misfits) + warp, 0u);
  project_candidate<Class>(r, index, warp);
  const Sequence s = start_sequence<false>(p, index);
  const Place<Class> here{p, lane_index(), s.num_keys};
  const int strips = (s.num_tokens + kTile - 1) / kTile;
  const int key_strips = (s.num_keys + kTile - 1) / kTile;

  // The first layer runs with the user's part, or (0) as those above it, or one after the other.
  constexpr int kWithUser = -1;
  uint32_t x[Class::kModelTiles][4];
#pragma unroll 1
  for (int step = s.num_keys > 0 ? kWithUser : 0; step < p.num_layers && strips > 0;) {
    const bool with_user = step == kWithUser;
    const int number = with_user ? 0 : step;
    const bool last = number + 1 == p.num_layers;
    const Vector16* layer =
        reinterpret_cast<const Vector16*>(p.packed) + int64_t{1} * number * p.layout.layer;
    if (number == 0) {
      if (p.pool_max) reset_pool(pool_of(p, warp, Class::kModel), Class::kModel);
      for (int strip = warp; strip < strips; strip += p.warps) {
        load_strip(p, s, strip, 0, x);
        if constexpr (Class::kExact) break;
        store_rest_strip(here, strip, x);
      }
    }
    if (with_user) {
      each_key_strip(here, key_strips, warp,
                     [&](int head, int strip) { score_keys(here, r, head, strip); });
      sync_threads();
      each_key_strip(here, key_strips, warp,
                     [&](int head, int strip) { weigh_values(here, r, head, strip); });
    } else {
      for (int strip = warp; strip < key_strips; strip += p.warps) {
        if constexpr (!Class::kExact) load_rest_strip(here, strip, x);
        project_keys_and_values(here, layer, strip, x);
        if constexpr (Class::kExact) break;
      }
    }
    sync_threads();
    for (int strip = warp; strip < strips; strip += p.warps) {
      if (last && !is_read<Class::kExact>(p, s, strip, p.padding == Padding::kCompute)) {
        if constexpr (Class::kExact) break;
        continue;
      }
      float tiles[Class::kModelTiles][2][4];
      if constexpr (!Class::kExact) load_rest_strip(here, strip, x);
      run_strip(here, layer, last, x, tiles, AttendOfCandidate{r, s, with_user, strip, warp});
      if (last) {
        store_strip(p, s, strip, 0, pool_of(p, warp, Class::kModel), tiles);
      } else if constexpr (!Class::kExact) {
        store_rest_strip(here, strip, x);
      }
      if constexpr (Class::kExact) break;
    }
    sync_threads();
    step = !with_user ? step + 1 : all_fit(r) ? 1 : 0;
  }
  finish_sequence(p, s, p.warps, Class::kModel);
}

template <class Class>
__global__ void __launch_bounds__(32 * Class::kWarps, 1)
    request_candidate_kernel(const __grid_constant__ RequestParams r) {
  if constexpr (Class::kExact) {
    score_candidate<Class>(r, block_index());
  } else {
    for (int64_t index = block_index(); index < r.encoder.batch; index += grid_size()) {
      score_candidate<Class>(r, index);
      if (index + grid_size() < r.encoder.batch) sync_threads();
    }
  }
}

RequestKernelFunction request_kernel_of(RequestKernel kernel, int instance) {
#define SEQKERNELS_KERNEL(...)                      \
  {&request_user_kernel<EncoderClass<__VA_ARGS__>>, \
   &request_candidate_kernel<EncoderClass<__VA_ARGS__>>},
  static constexpr RequestKernelFunction kKernels[][2] = {
      SEQKERNELS_CUDA_REQUEST_INSTANCES(SEQKERNELS_KERNEL)};
#undef SEQKERNELS_KERNEL
  return kKernels[instance][static_cast<int>(kernel)];
}

}  // namespace seqkernels::cuda
