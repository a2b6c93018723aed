// The tokens of a sequence: which there are, their way into fragments, and the output's rows.
//
// An encoder without positions does not care for the order of its tokens, so a mask becomes a list
// of positions in shared memory: the valid tokens first (the keys), then, if they are to be
// computed, the padded ones. In a summary the list starts with the window's tokens.
#pragma once

#include "cuda/encoder_fragments.cuh"

namespace seqkernels::cuda {

__device__ __forceinline__ int32_t* positions() {
  return reinterpret_cast<int32_t*>(shared_memory() + kPositionsOffset);
}

// One sequence, the same in all threads. What can be said again is not kept in registers.
struct Sequence {
  int64_t index;   // the row of candidate and out
  int num_keys;    // the first tokens of the list
  int num_tokens;  // of the list

  // The row of x, mask and lengths.
  __device__ __forceinline__ int64_t user(const EncoderParams& p) const {
    if (!p.user_index) return index;
    const int64_t user = load_global(p.user_index + index);
    return user < 0 ? 0 : user < p.users ? user : p.users - 1;
  }
  // Of the summary: its slot j holds position window_begin + j.
  __device__ __forceinline__ int window_begin(const EncoderParams& p) const {
    if (p.latest_k < 0) return 0;
    const int none = p.latest_last ? p.tokens - 1 : 0;
    const int first = num_keys > 0 ? load_shared(positions()) : none;
    return p.latest_last ? first - p.latest_k + 1 : first;
  }
};

// Whether padded tokens are computed; the same in all threads.
__device__ __forceinline__ bool computes_padding(const EncoderParams& p) {
  if (p.computes_padding) return shuffle(load_global(p.computes_padding) != 0 ? 1 : 0, 0) != 0;
  return p.padding == Padding::kCompute;
}

__device__ __forceinline__ bool is_valid(const EncoderParams& p, int64_t user, int position) {
  int l = position;
  if (p.fusion == Fusion::kAppend) {
    if (position == (p.latest_last ? p.length : 0)) return true;
    if (!p.latest_last) --l;
  }
  if (p.mask) return load_global(p.mask + user * p.mask_stride_b + l * p.mask_stride_l) == 0;
  return !p.lengths || l < load_global(p.lengths + user);
}

// The list of a mask, by one warp.
__device__ __forceinline__ int list_masked(const EncoderParams& p, int64_t user, bool descending,
                                           bool computes) {
  const int lane = lane_index();
  int count = 0;  // valid tokens so far
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += 32) {
    const int i = first + lane;
    const int position = descending ? p.tokens - 1 - i : i;
    const bool valid = i < p.tokens && is_valid(p, user, position);
    int before = valid ? 1 : 0;  // becomes the valid tokens up to this one
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle(before, (lane - distance) & 31);
      if (lane >= distance) before += other;
    }
    const int all = shuffle(before, 31);
    if (valid) {
      store_shared(positions() + count + before - 1, position);
    } else if (i < p.tokens && computes) {
      // Padded tokens fill the list from its end.
      store_shared(positions() + p.tokens - 1 - (i - count - before), position);
    }
    count += all;
  }
  return count;
}

// The list of the first `events` events, by all threads.
__device__ __forceinline__ void list_prefix(const EncoderParams& p, int events, bool descending,
                                            bool computes) {
  const bool append = p.fusion == Fusion::kAppend;
  const int count = events + (append ? 1 : 0);
  // What stands before the padded tokens: the events, and a candidate that is the first token.
  const int before = events + (append && !p.latest_last ? 1 : 0);
  const int listed = computes ? p.tokens : count;
#pragma unroll 1
  for (int i = thread_index(); i < listed; i += 32 * p.warps) {
    int position;
    if (i < count) {
      position = descending ? count - 1 - i : i;
      if (append && p.latest_last && position == events) position = p.length;
    } else {
      position = before + i - count;
    }
    store_shared(positions() + i, position);
  }
}

// Lists the tokens of sequence `index`, whose padding the option answers, or a byte where there is
// one. The block meets twice.
template <bool kAskDevice = true>
__device__ __forceinline__ Sequence start_sequence(const EncoderParams& p, int64_t index) {
  Sequence s{index, 0, 0};
  const int64_t user = s.user(p);
  const bool computes = kAskDevice ? computes_padding(p) : p.padding == Padding::kCompute;
  const bool descending = p.latest_k >= 0 && p.latest_last;
  int32_t* header = reinterpret_cast<int32_t*>(shared_memory());
  if (p.mask) {
    if (warp_index() == 0) {
      const int count = list_masked(p, user, descending, computes);
      if (lane_index() == 0) store_shared(header, static_cast<int32_t>(count));
    }
    sync_threads();
    s.num_keys = load_shared(header);
  } else {
    int64_t events = p.length;
    if (p.lengths) {
      const int64_t length = load_global(p.lengths + user);
      events = length < 0 ? 0 : length < p.length ? length : p.length;
    }
    list_prefix(p, static_cast<int>(events), descending, computes);
    s.num_keys = static_cast<int>(events) + (p.fusion == Fusion::kAppend ? 1 : 0);
    sync_threads();
  }
  s.num_keys = shuffle(s.num_keys, 0);
  s.num_tokens = computes ? p.tokens : s.num_keys;
  return s;
}

// Whether the last layer has to compute this strip: without a pool only the window's tokens count.
// All lanes get the same answer. With kAgreed a shuffle tells ptxas so: large kernels spill without
// it, and in small ones ptxas would add a second version of the shuffle for diverged warps.
// Computed padding is not in order in the list, so then every strip is needed.
template <bool kAgreed = true>
__device__ __forceinline__ bool is_read(const EncoderParams& p, const Sequence& s, int strip,
                                        bool computes_padding) {
  if (p.latest_k < 0 || p.pool_max || computes_padding) return true;
  const int slot = load_shared(positions() + strip * kTile) - s.window_begin(p);
  const bool read = slot >= 0 && slot < p.latest_k;
  return kAgreed ? shuffle(read ? 1 : 0, 0) != 0 : read;
}

// ---- in ----

// Element `column` of an event with the candidate behind it; 0 beyond both.
__device__ __forceinline__ float load_column(const EncoderParams& p, int64_t event,
                                             int64_t candidate, int event_dim, int column) {
  if (column >= p.d_model) return 0.0f;
  const bool is_event = column < event_dim;
  const int64_t at = is_event ? event + column : candidate + column - event_dim;
  const void* from = is_event ? p.x : p.candidate;
  if (p.is_bf16) return bf16_low(load_global(static_cast<const uint16_t*>(from) + at));
  return load_global(static_cast<const float*>(from) + at);
}

// Columns column .. column + 7 of token `position` in bf16.
__device__ __forceinline__ Vector16 load_columns(const EncoderParams& p, const Sequence& s,
                                                 int position, int column) {
  const bool append = p.fusion == Fusion::kAppend;
  const bool is_candidate = append && position == (p.latest_last ? p.length : 0);
  const int l = append && !p.latest_last ? position - 1 : position;
  const int64_t event = s.user(p) * p.stride_b + l * p.stride_l;
  const int64_t candidate = s.index * p.candidate_stride;
  const int event_dim = is_candidate ? 0 : p.event_dim;
  Vector16 packed{{0u, 0u, 0u, 0u}};
  if (p.vector_input) {
    if (column >= p.d_model) return packed;
    const bool is_event = column < event_dim;
    const int64_t at = is_event ? event + column : candidate + column - event_dim;
    const void* from = is_event ? p.x : p.candidate;
    if (p.is_bf16) {
      return load_global(
          reinterpret_cast<const Vector16*>(static_cast<const uint16_t*>(from) + at));
    }
    const Vector16* values =
        reinterpret_cast<const Vector16*>(static_cast<const float*>(from) + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vector16 v = load_global(values + i);
      packed.v[2 * i] = pack_bf16(bits_as_float(v.v[0]), bits_as_float(v.v[1]));
      packed.v[2 * i + 1] = pack_bf16(bits_as_float(v.v[2]), bits_as_float(v.v[3]));
    }
    return packed;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed.v[i] = pack_bf16(load_column(p, event, candidate, event_dim, column + 2 * i),
                            load_column(p, event, candidate, event_dim, column + 2 * i + 1));
  }
  return packed;
}

// The strip's rows from a column on, a multiple of 32; those beyond the last token are 0.
template <int kTiles>
__device__ __forceinline__ void load_strip(const EncoderParams& p, const Sequence& s, int strip,
                                           int column, uint32_t (&x)[kTiles][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = strip * kTile + g + 8 * r;
    const bool exists = token < s.num_tokens;
    const int position = exists ? load_shared(positions() + token) : 0;
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      Vector16 v{{0u, 0u, 0u, 0u}};
      if (exists) v = load_columns(p, s, position, column + 32 * j + 8 * t);
      x[2 * j][r] = v.v[0];
      x[2 * j][2 + r] = v.v[1];
      x[2 * j + 1][r] = v.v[2];
      x[2 * j + 1][2 + r] = v.v[3];
    }
  }
  // The same values again, in registers that no load has bound to one another.
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i][j] = pack_bf16(bf16_low(x[i][j]), bf16_high(x[i][j]));
  }
}

// ---- out ----

__device__ __forceinline__ void store_column(const EncoderParams& p, int64_t at, float value) {
  if (p.is_bf16) {
    store_global(static_cast<uint16_t*>(p.out) + at,
                 static_cast<uint16_t>(pack_bf16(value, 0.0f) & 0xffffu));
  } else {
    store_global(static_cast<float*>(p.out) + at, value);
  }
}

// Writes eight columns of the row that starts at element `row`.
__device__ __forceinline__ void store_columns(const EncoderParams& p, int64_t row, int column,
                                              const float (&y)[8]) {
  if (p.vector_output) {
    if (column >= p.d_model) return;
    if (p.is_bf16) {
      Vector16 v;
#pragma unroll
      for (int i = 0; i < 4; ++i) v.v[i] = pack_bf16(y[2 * i], y[2 * i + 1]);
      store_global(reinterpret_cast<Vector16*>(static_cast<uint16_t*>(p.out) + row + column), v);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vector16 v;
#pragma unroll
        for (int j = 0; j < 4; ++j) v.v[j] = float_as_bits(y[4 * i + j]);
        store_global(reinterpret_cast<Vector16*>(static_cast<float*>(p.out) + row + column + 4 * i),
                     v);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < p.d_model) store_column(p, row + column + i, y[i]);
  }
}

// A NaN wins, as in torch.max.
__device__ __forceinline__ float larger(float y, float best) {
  return !(y <= best) && best == best ? y : best;
}

__device__ __forceinline__ float* pool_of(const EncoderParams& p, int index, int model_rows) {
  return reinterpret_cast<float*>(shared_memory() + int64_t{16} * p.pool) + index * model_rows;
}

// By one warp.
__device__ __forceinline__ void reset_pool(float* pool, int columns) {
  for (int i = lane_index() * 4; i < columns; i += 128) {
    constexpr uint32_t kLowest = 0xff800000u;  // -infinity
    store_shared(reinterpret_cast<Vector16*>(pool + i),
                 Vector16{{kLowest, kLowest, kLowest, kLowest}});
  }
}

// Writes a finished strip, from a column on, to the output and to the running maximum `pool`.
template <int kTiles>
__device__ __forceinline__ void store_strip(const EncoderParams& p, const Sequence& s, int strip,
                                            int column, float* pool,
                                            const float (&tiles)[kTiles][2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  if (p.latest_k != 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = strip * kTile + g + 8 * r;
      if (token >= s.num_tokens) continue;
      const int position = load_shared(positions() + token);
      int64_t row = s.index * p.out_stride_b;
      if (p.latest_k < 0) {
        row += position * p.out_stride_l;
      } else {
        const int slot = position - s.window_begin(p);
        if (slot < 0 || slot >= p.latest_k) continue;
        row += static_cast<int64_t>(slot) * p.d_model;
      }
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = tiles[2 * j + i / 4][i / 2 % 2][2 * r + i % 2];
        store_columns(p, row, column + 32 * j + 8 * t, y);
      }
    }
  }
  if (!p.pool_max) return;
  constexpr float kLowest = -__builtin_inff();
  const bool exists[2] = {strip * kTile + g < s.num_tokens, strip * kTile + g + 8 < s.num_tokens};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    Vector16* best = reinterpret_cast<Vector16*>(pool + column + 32 * (i / 2) + 8 * t) + i % 2;
    Vector16 v;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = exists[0] ? tiles[i][j / 2][j % 2] : kLowest;
      const float b = exists[1] ? tiles[i][j / 2][2 + j % 2] : kLowest;
      float most = larger(a, b);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) most = larger(shuffle_xor(most, mask), most);
      v.v[j] = float_as_bits(most);
    }
    if (g == 0) {
      const Vector16 old = load_shared(best);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v.v[j] = float_as_bits(larger(bits_as_float(v.v[j]), bits_as_float(old.v[j])));
      }
      store_shared(best, v);
    }
  }
}

// What a padded position leaves: 0, through the final norm where there is one.
__device__ __forceinline__ float padded_value(const EncoderParams& p, int column) {
  if (!p.has_final_norm) return 0.0f;
  // model_column backwards
  const int t = column % 32 / 8, e = column % 8;
  const int64_t at =
      int64_t{4} * p.layout.final_bias + 16 * (2 * (column / 32) + e / 4) + 4 * t + e % 4;
  return load_global(reinterpret_cast<const float*>(p.packed) + at);
}

// Everything that no strip writes: padded rows, slots outside, the largest of `pools` running
// maxima. Behind a barrier.
__device__ __forceinline__ void finish_sequence(const EncoderParams& p, const Sequence& s,
                                                int pools, int model_rows) {
  const bool fills = s.num_tokens < p.tokens;  // padded tokens are not computed
  const int64_t user = s.user(p);
  const int window_begin = s.window_begin(p);
  const int64_t out = s.index * p.out_stride_b;
  const int rows = p.latest_k < 0 ? (fills ? p.tokens : 0) : p.latest_k;
#pragma unroll 1
  for (int row = thread_index() / 32; row < rows; row += p.warps) {
    const int position = p.latest_k < 0 ? row : window_begin + row;
    const bool inside = position >= 0 && position < p.tokens;
    if (inside && !(fills && !is_valid(p, user, position))) continue;
    const int64_t at =
        out + (p.latest_k < 0 ? row * p.out_stride_l : static_cast<int64_t>(row) * p.d_model);
#pragma unroll 1
    for (int column = lane_index(); column < p.d_model; column += 32)
      store_column(p, at + column, inside ? padded_value(p, column) : 0.0f);
  }
  if (!p.pool_max) return;
  const bool counts_padded = p.padding == Padding::kZero && fills;
#pragma unroll 1
  for (int column = thread_index(); column < p.d_model; column += 32 * p.warps) {
    float best = -__builtin_inff();
    if (s.num_tokens > 0) {
#pragma unroll 1
      for (int pool = 0; pool < pools; ++pool)
        best = larger(load_shared(pool_of(p, pool, model_rows) + column), best);
    }
    if (counts_padded) {
      best = larger(padded_value(p, column), best);
    } else if (s.num_tokens == 0) {
      best = 0.0f;
    }
    // -0 becomes 0: which zero wins must not depend on the order.
    store_column(p, out + int64_t{1} * p.latest_k * p.d_model + column, best + 0.0f);
  }
}

}  // namespace seqkernels::cuda
