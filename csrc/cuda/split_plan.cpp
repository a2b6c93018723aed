#include "cuda/split_plan.h"

#include <algorithm>
#include <string>

#include "cuda/encoder_pack.h"

namespace seqkernels::cuda {
namespace {

constexpr int kTileBytes = 16 * kTileVectors;

template <class Instances, class Rows>
int smallest(const Instances& all, int wanted, Rows rows) {
  for (size_t i = 0; i < all.size(); ++i) {
    if (rows(all[i]) >= wanted) return static_cast<int>(i);
  }
  return -1;
}

int instance_of(const EncoderShape& s) {
  return smallest(split_instances(), s.d_model,
                  [](const SplitInstance& i) { return i.model_rows(); });
}
int attention_instance_of(const EncoderShape& s) {
  return smallest(split_attention_instances(), s.head_dim(), [](int rows) { return rows; });
}

// Bytes of shared memory: offsets of the parts of a tail's block, and of its whole.
struct TailMemory {
  int64_t pool, operand, hidden, total;
  TailMemory(const EncoderLayout& l, const SplitInstance& instance, int64_t strips, int group,
             int warps, bool pools) {
    pool = kPositionsOffset + strips * kTile * 4;
    operand = pool + (pools ? int64_t{4} * l.model_rows : 0);
    hidden =
        operand + int64_t{1} * group * (std::max(l.model_rows, l.concat_rows) / kTile) * kTileBytes;
    const int chunk = warps * hidden_tiles_of(instance.column_tiles);
    total = hidden + int64_t{1} * group * chunk * kTileBytes;
  }
};

// Bytes of the workspace that a sequence takes: offsets of its parts, and of its whole.
struct SequenceMemory {
  int64_t activations, attended, keys;
  SequenceMemory(const EncoderLayout& l, int64_t strips, bool keys_in_workspace) {
    activations = strips * kTile * l.model_rows * 2;
    attended = strips * kTile * l.concat_rows * 2;
    keys = keys_in_workspace ? 2 * attended : 0;
  }
  int64_t total(bool norm_first) const {
    return activations * (norm_first ? 2 : 1) + attended + keys;
  }
};

}  // namespace

int SplitInstance::model_rows() const {
  return column_tiles * kTile * kSplitWarps;
}

const std::vector<SplitInstance>& split_instances() {
#define SEQKERNELS_INSTANCE(...) SplitInstance{__VA_ARGS__},
  static const std::vector<SplitInstance> all = {
      SEQKERNELS_CUDA_SPLIT_INSTANCES(SEQKERNELS_INSTANCE)};
#undef SEQKERNELS_INSTANCE
  return all;
}

const std::vector<int>& split_attention_instances() {
#define SEQKERNELS_INSTANCE(rows) rows,
  static const std::vector<int> all = {
      SEQKERNELS_CUDA_SPLIT_ATTENTION_INSTANCES(SEQKERNELS_INSTANCE)};
#undef SEQKERNELS_INSTANCE
  return all;
}

int split_most_heads(const EncoderShape& s) {
  constexpr int kMostColumns = 2048;  // 64 KB a strip, of 99 KB
  return kMostColumns / split_attention_instances()[static_cast<size_t>(attention_instance_of(s))];
}

EncoderLayout split_layout(const EncoderShape& s) {
  const SplitInstance& i = split_instances()[static_cast<size_t>(instance_of(s))];
  const int head_rows = split_attention_instances()[static_cast<size_t>(attention_instance_of(s))];
  const int group = i.column_tiles * kTile;
  return {static_cast<int>(round_up_to(s.d_model, group)),
          head_rows,
          s.nhead,
          s.dim_feedforward,
          s.num_layers,
          group,
          hidden_tiles_of(i.column_tiles) * kTile};
}

void plan_split(const EncoderShape& shape, const EncoderCall& call, const EncoderDevice& device,
                EncoderPlan& plan) {
  SplitPlan& split = plan.split;
  split.instance = instance_of(shape);
  split.attention = attention_instance_of(shape);
  const EncoderLayout l = split_layout(shape);
  const SplitInstance& instance = split_instances()[static_cast<size_t>(split.instance)];
  const int64_t tokens = tokens_of(call), strips = (tokens + kTile - 1) / kTile;
  split.warps = l.model_rows / (instance.column_tiles * kTile);
  split.attention_warps = static_cast<int>(std::min<int64_t>(strips, kSplitWarps));

  const int64_t positions = kPositionsOffset + strips * kTile * 4;
  const auto tail = [&](int group) {
    return TailMemory(l, instance, strips, group, split.warps, call.pool_max()).total;
  };
  // Of about the same size, and no more of them than there have to be, unless multiprocessors would
  // be idle.
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t groups = divide(strips, instance.strips);
  while (groups < strips && tail(static_cast<int>(divide(strips, groups))) > device.shared_bytes)
    ++groups;
  split.group = static_cast<int>(divide(strips, groups));
  const int64_t idle = divide(device.multiprocessors, std::max<int64_t>(1, call.batch));
  split.blocks = static_cast<int>(std::clamp(idle, groups, strips));
  split.tail_bytes = tail(split.group);
  if (split.tail_bytes > device.shared_bytes) {
    const int64_t rest = device.shared_bytes - (split.tail_bytes - strips * kTile * 4);
    plan.reasons.push_back("x: expected at most " + std::to_string(rest / 64 * kTile) +
                           " tokens on this device, got " + std::to_string(tokens));
    return;
  }
  split.tokens_bytes = positions + split.group * kSumsBytes;

  const int64_t keys = 2 * strips * kTile * l.head_rows * 2;  // and values
  split.attention_bytes = positions + keys;
  plan.keys_in_workspace = split.attention_bytes > device.shared_bytes;
  if (plan.keys_in_workspace) split.attention_bytes = positions;

  // More sequences at once would keep no multiprocessor busier.
  constexpr int64_t kBlocksEach = 8;
  const int64_t blocks = kBlocksEach * std::max(1, device.multiprocessors);
  split.sequences = std::min(call.batch, divide(blocks, groups));
  plan.workspace_bytes =
      split.sequences * SequenceMemory(l, strips, plan.keys_in_workspace).total(shape.norm_first);
}

std::vector<SplitLaunch> split_launches(const EncoderShape& shape, const EncoderPlan& plan,
                                        const EncoderCall& call, const void* packed,
                                        void* workspace) {
  const SplitPlan& split = plan.split;
  SplitParams params{};
  EncoderParams& p = params.encoder;
  p = encoder_call_params(shape, call, split_layout(shape), packed);
  const EncoderLayout& l = p.layout;
  const SplitInstance& instance = split_instances()[static_cast<size_t>(split.instance)];
  const SequenceMemory each(l, p.strips, plan.keys_in_workspace);

  unsigned char* at = static_cast<unsigned char*>(workspace);
  const auto take = [&](int64_t bytes_each) {
    unsigned char* const part = at;
    at += bytes_each * split.sequences;
    return part;
  };
  params.x = take(each.activations);
  params.source = shape.norm_first ? take(each.activations) : params.x;
  params.attended = take(each.attended);
  p.workspace = take(each.keys);
  p.keys_in_workspace = plan.keys_in_workspace;

  std::vector<SplitLaunch> launches;
  const auto launch = [&](SplitStep step, int64_t count, int blocks, int warps, int64_t bytes) {
    p.warps = warps;
    params.blocks = blocks;
    params.group = std::min(split.group, (p.strips + blocks - 1) / blocks);
    launches.push_back({step, static_cast<int>(count * blocks), 32 * warps, bytes, params});
  };
  const auto vectors = [](int64_t bytes) { return static_cast<int>(bytes / 16); };
  for (int64_t first = 0; first < call.batch; first += split.sequences) {
    const int64_t count = std::min(split.sequences, call.batch - first);
    params.first_sequence = first;
    params.layer = 0;
    const int64_t positions = kPositionsOffset + int64_t{4} * p.strips * kTile;
    params.hidden = vectors(positions);
    launch(SplitStep::kTokens, count, split.blocks, split.warps, split.tokens_bytes);
    for (; params.layer < shape.num_layers; ++params.layer) {
      // A head's keys and values, in shared memory or in the block's part of the workspace.
      const int64_t keys = each.attended / l.heads;
      p.keys = plan.keys_in_workspace ? 0 : vectors(positions);
      p.values = p.keys + vectors(keys);
      p.workspace_stride = 2 * keys;
      launch(SplitStep::kAttention, count, l.heads, split.attention_warps, split.attention_bytes);
      const TailMemory memory(l, instance, p.strips, split.group, split.warps, call.pool_max());
      p.pool = vectors(memory.pool);
      params.operand = vectors(memory.operand);
      params.hidden = vectors(memory.hidden);
      // A running maximum is one block's.
      const bool whole = call.pool_max() && params.layer + 1 == shape.num_layers;
      launch(SplitStep::kTail, count, whole ? 1 : split.blocks, split.warps, split.tail_bytes);
    }
  }
  return launches;
}

}  // namespace seqkernels::cuda
