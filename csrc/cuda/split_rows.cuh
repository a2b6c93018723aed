// Strips of rows in a block: each warp owns a range of columns of all of them.
//
// A weight is read once for all strips of the group. What all warps need as a left operand lies in
// shared memory in lane order; sums over a row meet there too.
#pragma once

#include "cuda/encoder_fragments.cuh"
#include "cuda/encoder_tokens.cuh"
#include "cuda/split_params.h"

namespace seqkernels::cuda {

// A kernel for models of more than 16 kColumnTiles (kSplitWarps / 2) columns and up to twice as
// many.
template <int kColumnTiles, int kStripCount>
struct SplitClass {
  static constexpr int kTiles = kColumnTiles;  // of columns that a warp owns
  static constexpr int kStrips = kStripCount;  // of a group, at most
  static constexpr int kHiddenTiles = hidden_tiles_of(kColumnTiles);
};

__device__ __forceinline__ Vector16* shared_vectors(int offset) {
  return reinterpret_cast<Vector16*>(shared_memory()) + offset;
}

// What one thread knows of its block's group of strips.
template <class Class>
struct Group {
  const SplitParams& p;
  int64_t sequence;  // of the workspace
  int first, count;  // strips of the sequence
  int warp, lane;

  __device__ __forceinline__ const EncoderLayout& layout() const { return p.encoder.layout; }
  __device__ __forceinline__ int first_tile() const { return warp * Class::kTiles; }
  __device__ __forceinline__ int model_tiles() const { return layout().model_rows / kTile; }
  __device__ __forceinline__ int concat_tiles() const { return layout().concat_rows / kTile; }

  // This lane's part of the strips' first tile in a part of the workspace.
  __device__ __forceinline__ Vector16* rows(unsigned char* base, int tiles) const {
    const int64_t strip = sequence * p.encoder.strips + first;
    return reinterpret_cast<Vector16*>(base) + strip * tiles * kTileVectors + lane;
  }
  // Of the tiles that the warp owns.
  __device__ __forceinline__ Vector16* own(unsigned char* base, int strip) const {
    return rows(base, model_tiles()) + (strip * model_tiles() + first_tile()) * kTileVectors;
  }
  // Calls function(strip) for the strips of the group.
  template <class Function>
  __device__ __forceinline__ void each(Function function) const {
#pragma unroll
    for (int m = 0; m < Class::kStrips; ++m) {
      if (m < count) function(m);
    }
  }
};

// tiles [strip][kTiles] += left weights^T. `left` is this lane's part of the first tile of
// [strip][left_tiles] in shared memory, `weights` of [steps][kTiles].
template <class Class, int kTiles>
__device__ __forceinline__ void multiply_rows(const Group<Class>& group, const Vector16* left,
                                              int left_tiles, const Vector16* weights, int steps,
                                              float (&tiles)[Class::kStrips][kTiles][2][4]) {
  constexpr int kParts = kTiles >= 4 ? 2 : 1;  // of a step
  constexpr int kPart = kTiles / kParts;
  const auto load = [&](Vector16(&b)[kPart], int part) {
#pragma unroll
    for (int j = 0; j < kPart; ++j) b[j] = load_global(weights + (part * kPart + j) * kTileVectors);
  };
  // Weights of the next part are on their way while this one multiplies.
  const int parts = steps * kParts;
  const auto multiply_part = [&](const Vector16(&now)[kPart], Vector16(&next)[kPart], int part,
                                 int first) {
    if (part + 1 < parts) load(next, part + 1);
    scheduling_fence();
    group.each([&](int m) {
      const Vector16 a = load_shared(left + (m * left_tiles + part / kParts) * kTileVectors);
#pragma unroll
      for (int j = 0; j < kPart; ++j) multiply(tiles[m][first + j], a.v, now[j]);
    });
  };
  Vector16 even[kPart], odd[kPart];
  load(even, 0);
#pragma unroll 1
  for (int part = 0; part < parts; part += 2) {
    multiply_part(even, odd, part, 0);
    if (part + 1 < parts) multiply_part(odd, even, part + 1, kTiles - kPart);
  }
}

// Sums over the rows of a strip, in `memory` of the block: each warp stores its part of sum
// `which`, 0 or 1, and behind a barrier loads the whole.
template <class Class>
__device__ __forceinline__ float* sum_of_strip(const Group<Class>& group, float* memory, int strip,
                                               int which, int warp) {
  return memory + ((2 * strip + which) * kSplitWarps + warp) * kSumsStride + group.lane / 4;
}
template <class Class>
__device__ __forceinline__ void store_sums(const Group<Class>& group, float* memory, int strip,
                                           int which, const float (&values)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(values[r]);
    float* to = sum_of_strip(group, memory, strip, which, group.warp) + 8 * r;
    if (group.lane % 4 == 0) store_shared(to, sum);
  }
}
template <class Class>
__device__ __forceinline__ void load_sums(const Group<Class>& group, float* memory, int strip,
                                          int which, float (&values)[2]) {
  const int t = group.lane % 4, warps = group.p.encoder.warps;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum =
        t < warps ? load_shared(sum_of_strip(group, memory, strip, which, t) + 8 * r) : 0.0f;
    if (t + 4 < warps) sum += load_shared(sum_of_strip(group, memory, strip, which, t + 4) + 8 * r);
    values[r] = sum_of_row(sum);
  }
}

// Columns of a strip that only pad become 0, or the row's mean: then they add nothing to a sum, or
// to one of squares. What they hold in between is nobody's affair, since weights of padded columns
// are 0.
template <class Class>
__device__ __forceinline__ void set_padded_columns(const Group<Class>& group,
                                                   const float (&values)[2],
                                                   float (&tiles)[Class::kTiles][2][4]) {
  const int columns = group.p.encoder.d_model - group.first_tile() * kTile;  // the warp's
  if (columns >= Class::kTiles * kTile) return;
  const int left = columns - 8 * (group.lane % 4);
#pragma unroll
  for (int i = 0; i < Class::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (32 * (i / 2) + 4 * (i % 2) + 2 * (j / 4) + j % 2 >= left)
        tiles[i][j / 4][j % 4] = values[j % 4 / 2];
    }
  }
}

template <class Class>
using GroupTiles = float[Class::kStrips][Class::kTiles][2][4];

// Calls function(strip, tile, layer norm of the tile). `sums` is memory for two sums of each strip,
// where nothing else may happen before the block meets again. It meets twice in here.
template <class Class, class Function>
__device__ __forceinline__ void each_normalized(const Group<Class>& group, float* sums,
                                                const Vector16* weight, const Vector16* bias,
                                                float eps, GroupTiles<Class>& tiles,
                                                Function function) {
  const float inverse_d = group.p.encoder.inverse_d;
  const auto load_mean = [&](int m, float (&mean)[2]) {
    load_sums(group, sums, m, 0, mean);
    mean[0] *= inverse_d;
    mean[1] *= inverse_d;
  };
  group.each([&](int m) {
    float sum[2] = {0.0f, 0.0f};
    set_padded_columns(group, sum, tiles[m]);
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j % 4 / 2] += tiles[m][i][j / 4][j % 4];
    }
    store_sums(group, sums, m, 0, sum);
  });
  sync_threads();
  group.each([&](int m) {
    float mean[2], square[2] = {0.0f, 0.0f};
    load_mean(m, mean);
    set_padded_columns(group, mean, tiles[m]);
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float d = tiles[m][i][j / 4][j % 4] - mean[j % 4 / 2];
        square[j % 4 / 2] += d * d;
      }
    }
    store_sums(group, sums, m, 1, square);
  });
  sync_threads();
  const int first = group.first_tile() * 4 + group.lane % 4;
  group.each([&](int m) {
    float mean[2], scale[2];
    load_mean(m, mean);
    load_sums(group, sums, m, 1, scale);
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = rsqrt_approx(scale[r] * inverse_d + eps);
#pragma unroll
    for (int i = 0; i < Class::kTiles; ++i) {
      const Vector16 w = load_global(weight + first + i * 4);
      const Vector16 b = load_global(bias + first + i * 4);
      float y[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float z = (tiles[m][i][half][j] - mean[j / 2]) * scale[j / 2];
          y[half][j] =
              z * bits_as_float(w.v[2 * half + j % 2]) + bits_as_float(b.v[2 * half + j % 2]);
        }
      }
      function(m, i, y);
      scheduling_fence();
    }
  });
}

}  // namespace seqkernels::cuda
