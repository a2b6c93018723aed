// Tiles of 16 x 16 in a warp's registers: products, packing, biases, residuals, norms.
//
// A *fragment* is a tile in bf16, four words a lane, as the left operand of mma.m16n8k16; the same
// words in another order are the right operands of two products with the transposed tile. A *tile*
// [2][4] is fp32: the accumulators of columns 0 .. 7 and 8 .. 15. Packing a tile in place gives its
// fragment of either kind, so that no value ever changes lanes between two products.
//
// With g = lane / 4 and t = lane % 4 a lane holds rows g and g + 8.
#pragma once

#include "cuda/encoder_params.h"
#include "cuda/ptx.cuh"

namespace seqkernels::cuda {

// A kernel's shape: what is known when it is compiled.
template <int kModelRows, int kHeadRows, int kHeadCount, int kMostWarps>
struct EncoderClass {
  static constexpr int kModel = kModelRows;
  static constexpr int kModelTiles = kModelRows / kTile;
  static constexpr int kHeadTiles = kHeadRows / kTile;
  static constexpr int kHeads = kHeadCount;        // 0: any number
  static constexpr bool kExact = kHeadCount != 0;  // no padded columns, norm last
  static constexpr int kWarps = kMostWarps;
};

// ptxas hoists loads until it spills; so many 16-byte loads it may have in flight.
constexpr int kLoadsAPhase = 9;

__device__ __forceinline__ void pack(const float (&tile)[2][4], uint32_t (&fragment)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    fragment[2 * half] = pack_bf16(tile[half][0], tile[half][1]);
    fragment[2 * half + 1] = pack_bf16(tile[half][2], tile[half][3]);
  }
}

// The same as it lies in memory.
__device__ __forceinline__ Vector16 pack_left(const float (&tile)[2][4]) {
  uint32_t fragment[4];
  pack(tile, fragment);
  return {{fragment[0], fragment[1], fragment[2], fragment[3]}};
}

// The same as the right operand of `multiply`.
__device__ __forceinline__ Vector16 pack_right(const float (&tile)[2][4]) {
  return {{pack_bf16(tile[0][0], tile[0][1]), pack_bf16(tile[1][0], tile[1][1]),
           pack_bf16(tile[0][2], tile[0][3]), pack_bf16(tile[1][2], tile[1][3])}};
}

__device__ __forceinline__ void unpack(const uint32_t (&fragment)[4], float (&tile)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    tile[half][0] = bf16_low(fragment[2 * half]);
    tile[half][1] = bf16_high(fragment[2 * half]);
    tile[half][2] = bf16_low(fragment[2 * half + 1]);
    tile[half][3] = bf16_high(fragment[2 * half + 1]);
  }
}

// tile += a b^T
__device__ __forceinline__ void multiply(float (&tile)[2][4], const uint32_t (&a)[4],
                                         const Vector16& b) {
  mma_m16n8k16(tile[0], a, b.v[0], b.v[1]);
  mma_m16n8k16(tile[1], a, b.v[2], b.v[3]);
}

// tiles [rows, tile columns of `weights`] += a [rows, kSteps] weights^T; `weights` points to this
// lane's part of the first tile of [kSteps][kTiles].
template <int kTiles, int kSteps>
__device__ __forceinline__ void multiply_weights(float (&tiles)[kTiles][2][4],
                                                 const uint32_t (&a)[kSteps][4],
                                                 const Vector16* weights) {
  constexpr int kPhase = kTiles < kLoadsAPhase ? kLoadsAPhase / kTiles : 1;  // steps
#pragma unroll
  for (int first = 0; first < kSteps; first += kPhase) {
    Vector16 b[kPhase][kTiles];
#pragma unroll
    for (int i = 0; i < kPhase && first + i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        b[i][j] = load_global(weights + ((first + i) * kTiles + j) * kTileVectors);
    }
#pragma unroll
    for (int i = 0; i < kPhase && first + i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply(tiles[j], a[first + i], b[i][j]);
    }
    scheduling_fence();
  }
}

// tile += a b^T with the operands of `multiply`, transposed: a comes from memory, b is a fragment.
__device__ __forceinline__ void multiply_left(float (&tile)[2][4], const Vector16& a,
                                              const uint32_t (&b)[4]) {
  const uint32_t left[4] = {a.v[0], a.v[2], a.v[1], a.v[3]};
  mma_m16n8k16(tile[0], left, b[0], b[2]);
  mma_m16n8k16(tile[1], left, b[1], b[3]);
}

// The transposed result: tiles [tile rows of `weights`, rows] += weights a^T.
template <int kTiles, int kSteps>
__device__ __forceinline__ void multiply_weights_left(float (&tiles)[kTiles][2][4],
                                                      const uint32_t (&a)[kSteps][4],
                                                      const Vector16* weights) {
  constexpr int kPhase = kTiles < kLoadsAPhase ? kLoadsAPhase / kTiles : 1;
#pragma unroll
  for (int first = 0; first < kSteps; first += kPhase) {
    Vector16 b[kPhase][kTiles];
#pragma unroll
    for (int i = 0; i < kPhase && first + i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        b[i][j] = load_global(weights + ((first + i) * kTiles + j) * kTileVectors);
    }
#pragma unroll
    for (int i = 0; i < kPhase && first + i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply_left(tiles[j], b[i][j], a[first + i]);
    }
    scheduling_fence();
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&tiles)[kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) tiles[i][j / 4][j % 4] = 0.0f;
  }
}

// Every row of the tiles = the vector.
template <int kTiles>
__device__ __forceinline__ void set_rows(float (&tiles)[kTiles][2][4], const Vector16* vector) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const Vector16 v = load_global(vector + i * 4 + lane_index() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tiles[i][half][0] = tiles[i][half][2] = bits_as_float(v.v[2 * half]);
      tiles[i][half][1] = tiles[i][half][3] = bits_as_float(v.v[2 * half + 1]);
    }
  }
}

// tiles += x, by products with the identity: no unpacked copy of x is ever in registers.
template <int kTiles>
__device__ __forceinline__ void add_residual(float (&tiles)[kTiles][2][4],
                                             const uint32_t (&x)[kTiles][4]) {
  const int row = lane_index() / 4, column = 2 * (lane_index() % 4);
  const uint32_t identity = row == column       ? 0x00003f80u
                            : row == column + 1 ? 0x3f800000u
                                                : 0u;  // 1 in bf16
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[2] = {x[i][2 * half], x[i][2 * half + 1]};
      mma_m16n8k8(tiles[i][half], a, identity);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void pack(const float (&tiles)[kTiles][2][4],
                                     uint32_t (&fragments)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) pack(tiles[i], fragments[i]);
}

// The sum over the four lanes that share rows.
__device__ __forceinline__ float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Layer norm of each row, in place. Columns that only pad come as 0, do not count, and leave as 0:
// their weight and bias are 0.
template <class Class>
__device__ __forceinline__ void layer_norm(const EncoderParams& p,
                                           float (&tiles)[Class::kModelTiles][2][4],
                                           const Vector16* weight, const Vector16* bias,
                                           float eps) {
  constexpr int kTiles = Class::kModelTiles;
  const int t = lane_index() % 4;
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[0] += tiles[i][half][0] + tiles[i][half][1];
      sum[1] += tiles[i][half][2] + tiles[i][half][3];
    }
  }
  const float mean[2] = {sum_of_row(sum[0]) * p.inverse_d, sum_of_row(sum[1]) * p.inverse_d};
  float square[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float d = tiles[i][half][j] - mean[j / 2];
        if (!Class::kExact) {
          const int column = 32 * (i / 2) + 8 * t + 4 * (i % 2) + 2 * half + j % 2;
          d = column < p.d_model ? d : 0.0f;
        }
        square[j / 2] += d * d;
      }
    }
  }
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) scale[r] = rsqrt_approx(sum_of_row(square[r]) * p.inverse_d + eps);
  scheduling_fence();  // or addresses of the loads below spill
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const Vector16 w = load_global(weight + i * 4 + t);
    const Vector16 b = load_global(bias + i * 4 + t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float z = (tiles[i][half][j] - mean[j / 2]) * scale[j / 2];
        tiles[i][half][j] =
            z * bits_as_float(w.v[2 * half + j % 2]) + bits_as_float(b.v[2 * half + j % 2]);
      }
    }
    if (i % 2 == 1) scheduling_fence();
  }
}

// NaN stays NaN.
template <int kTiles>
__device__ __forceinline__ void activate(const EncoderParams& p, float (&tiles)[kTiles][2][4]) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) tiles[i][j / 4][j % 4] = function(tiles[i][j / 4][j % 4]);
    }
  };
  static_assert(kActivations == 5, "every activation has its branch here");
  if (p.activation == Activation::kRelu) {
    each([](float x) { return x < 0.0f ? 0.0f : x; });
  } else if (p.activation == Activation::kLeakyRelu) {
    each([&](float x) { return x < 0.0f ? x * p.negative_slope : x; });
  } else if (p.activation == Activation::kGelu) {
    each([](float x) { return 0.5f * x * (1.0f + erf_fp32(x * 0.70710678f)); });
  } else {
    each([](float x) {
      return 0.5f * x * (1.0f + tanh_fp32(0.79788456f * (x + 0.044715f * x * x * x)));
    });
  }
}

}  // namespace seqkernels::cuda
