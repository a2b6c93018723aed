#include "cuda/request_scoring_plan.h"

#include "cuda/encoder_pack.h"

namespace seqkernels::cuda {
namespace {

// Of all users that are prepared at once: some hundreds of the reference problem.
constexpr int64_t kMostWorkspace = int64_t{64} << 20;

// What a candidate's block needs behind what an encoder's needs; in bytes.
struct CandidateMemory {
  int64_t parts, scores, tops, weights, misfits, slot = 16;
  CandidateMemory(const EncoderLayout& layout, int64_t tokens, int64_t warps) {
    const int64_t tiles = layout.heads * ((tokens + kTile - 1) / kTile);
    parts = int64_t{8} * layout.concat_rows;
    scores = tiles * kTile * 4;
    tops = round_up_to(tiles * 4, 16);
    weights = tiles * kTile * 2;
    misfits = round_up_to(warps * 4, 16);
  }
  int64_t bytes() const { return parts + scores + tops + weights + misfits + slot; }
};

struct UserMemory {
  int64_t exponentials, keys, values;
  UserMemory(const EncoderLayout& layout, int64_t tokens) {
    const int64_t rows = round_up_to(tokens, kTile);
    exponentials = layout.heads * rows * rows * 2;
    keys = rows * layout.concat_rows * 2;
    values = 2 * keys;
  }
  int64_t bytes() const { return exponentials + keys + values; }
};

// In request_instances(); -1: there is none.
int instance_of(const EncoderPlan& plan) {
  if (plan.instance < 0) return -1;
  const std::vector<EncoderInstance>& all = request_instances();
  const auto found =
      std::find(all.begin(), all.end(), encoder_instances()[static_cast<size_t>(plan.instance)]);
  return found == all.end() ? -1 : static_cast<int>(found - all.begin());
}

}  // namespace

const std::vector<EncoderInstance>& request_instances() {
#define SEQKERNELS_INSTANCE(...) EncoderInstance{__VA_ARGS__},
  static const std::vector<EncoderInstance> all = {
      SEQKERNELS_CUDA_REQUEST_INSTANCES(SEQKERNELS_INSTANCE)};
#undef SEQKERNELS_INSTANCE
  return all;
}

RequestPlan plan_request_scoring(const EncoderShape& shape, const EncoderCall& call,
                                 const EncoderDevice& device) {
  RequestPlan plan;
  const auto refuse = [&](const std::string& reason) { plan.reasons.push_back(reason); };
  if (!call.user_index) refuse("user_index: expected one, got none");
  if (call.fusion != Fusion::kConcat) {
    refuse(std::string("fusion: expected concat, got ") +
           (call.fusion == Fusion::kAppend ? "append" : "none"));
  }
  if (shape.norm_first) refuse("norm_first: expected false, got true");
  plan.candidates = plan_encoder(shape, call, device);
  for (const std::string& reason : plan.candidates.reasons) refuse(reason);
  if (!plan.reasons.empty()) return plan;

  plan.instance = instance_of(plan.candidates);
  if (plan.instance < 0) {
    refuse("d_model and head_dim: expected sizes that a kernel was compiled for, got " +
           std::to_string(shape.d_model) + " and " + std::to_string(shape.head_dim()));
    return plan;
  }
  const EncoderLayout layout = encoder_layout(shape);
  plan.shared_bytes = plan.candidates.shared_bytes +
                      CandidateMemory(layout, call.length, plan.candidates.threads / 32).bytes();
  if (plan.candidates.workspace_bytes > 0 || plan.shared_bytes > device.shared_bytes) {
    refuse("x: expected tokens that fit a block's " + std::to_string(device.shared_bytes) +
           " bytes of shared memory, got " + std::to_string(call.length));
    return plan;
  }
  plan.user_bytes = UserMemory(layout, call.length).bytes();
  plan.users_at_once = std::max<int64_t>(1, kMostWorkspace / plan.user_bytes);
  plan.workspace_bytes = std::min(plan.users_at_once, call.users) * plan.user_bytes;
  return plan;
}

RequestParams request_params(const EncoderShape& shape, const RequestPlan& plan,
                             const EncoderCall& call, const void* packed, void* workspace) {
  RequestParams r{};
  r.encoder = encoder_params(shape, plan.candidates, call, packed, nullptr);
  r.workspace = static_cast<unsigned char*>(workspace);
  r.user_bytes = plan.user_bytes;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at / 16;
    at += bytes;
    return static_cast<int>(offset);
  };
  const UserMemory user(r.encoder.layout, call.length);
  r.exponentials = take(user.exponentials);
  r.keys = take(user.keys);
  r.values = take(user.values);
  at = plan.candidates.shared_bytes;
  const CandidateMemory candidate(r.encoder.layout, call.length, r.encoder.warps);
  r.parts = take(candidate.parts);
  r.scores = take(candidate.scores);
  r.tops = take(candidate.tops);
  r.weights = take(candidate.weights);
  r.slot = take(candidate.slot);
  r.misfits = take(candidate.misfits);
  return r;
}

}  // namespace seqkernels::cuda
