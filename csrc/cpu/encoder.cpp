// The encoder's entry point: checks a call, turns masks into token lists, spreads sequences over
// threads, and fills what no kernel computes (padded rows, empty users).
#include "seqkernels/encoder.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>

#include "cpu/encoder_model.h"
#include "cpu/encoder_pack.h"
#include "cpu/isa_table.h"

namespace seqkernels {
namespace cpu {
namespace {

#include "cpu/bf16.h"

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("encoder: " + what);
}

void check_shape(const EncoderShape& s) {
  if (s.d_model < 1 || s.nhead < 1 || s.d_model % s.nhead != 0) {
    refuse("nhead: expected a divisor of d_model = " + std::to_string(s.d_model) + ", got " +
           std::to_string(s.nhead));
  }
  if (s.dim_feedforward < 1)
    refuse("dim_feedforward: expected at least 1, got " + std::to_string(s.dim_feedforward));
  if (s.activation == Activation::kNone)
    refuse("activation: expected relu, gelu, gelu_tanh or leaky_relu, got none");
  if (s.num_layers < 1) refuse("layers: expected at least one layer, got none");
}

void check_parameters(const EncoderShape& s, const EncoderParameters& p) {
  if (p.layers.size() != static_cast<size_t>(s.num_layers)) {
    refuse("layers: expected " + std::to_string(s.num_layers) + ", got " +
           std::to_string(p.layers.size()));
  }
  for (const EncoderLayerParameters& w : p.layers) {
    if (!w.in_proj_weight || !w.out_proj_weight || !w.linear1_weight || !w.linear2_weight) {
      refuse("layers: expected four weight matrices in every layer, got a null pointer");
    }
  }
}

int64_t tokens_of(const EncoderCall& call) {
  return call.length + (call.fusion == Fusion::kAppend ? 1 : 0);
}

void check_call(const EncoderShape& shape, const EncoderCall& call) {
  if (call.batch < 1 || call.length < 0 || tokens_of(call) < 1) {
    refuse("x: expected [B >= 1, L >= 1, E], got B = " + std::to_string(call.batch) +
           ", L = " + std::to_string(call.length));
  }
  if (tokens_of(call) > INT32_MAX / 2)
    refuse("x: expected fewer than 2^30 tokens, got " + std::to_string(call.length));
  if (call.mask && call.lengths)
    refuse("key_padding_mask, lengths: expected at most one of them, got both");
  if ((call.fusion == Fusion::kNone) != (call.candidate == nullptr)) {
    refuse("candidate: expected exactly with fusion \"concat\" or \"append\"");
  }
  if (call.fusion == Fusion::kConcat &&
      (call.candidate_dim < 0 || call.candidate_dim > shape.d_model)) {
    refuse("candidate: expected at most d_model = " + std::to_string(shape.d_model) +
           " columns, got " + std::to_string(call.candidate_dim));
  }
  if (call.user_index) {
    for (int64_t b = 0; b < call.batch; ++b) {
      if (call.user_index[b] < 0 || call.user_index[b] >= call.users) {
        refuse("user_index: expected values in 0 .. " + std::to_string(call.users - 1) + ", got " +
               std::to_string(call.user_index[b]) + " at index " + std::to_string(b));
      }
    }
  }
  if (call.lengths) {
    for (int64_t b = 0; b < (call.user_index ? call.users : call.batch); ++b) {
      if (call.lengths[b] < 0 || call.lengths[b] > call.length) {
        refuse("lengths: expected values in 0 .. " + std::to_string(call.length) + ", got " +
               std::to_string(call.lengths[b]) + " at index " + std::to_string(b));
      }
    }
  }
}

// Which tokens of one sequence are valid.
struct Validity {
  const EncoderCall& call;
  int64_t user;
  bool operator()(int64_t position) const {
    int64_t l = position;
    if (call.fusion == Fusion::kAppend) {
      if (position == (call.latest_last() ? call.length : 0)) return true;
      if (!call.latest_last()) --l;
    }
    if (call.mask) return call.mask[user * call.mask_stride_b + l * call.mask_stride_l] == 0;
    return !call.lengths || l < call.lengths[user];
  }
};

// Fills `position` [T] and the rest of the task.
SequenceTask plan_sequence(const EncoderCall& call, int64_t index, int32_t* position) {
  const int64_t tokens = tokens_of(call);
  const int64_t user = call.user_index ? call.user_index[index] : index;
  const Validity valid{call, user};
  const bool summary = call.latest_k >= 0;
  // The window's tokens come first, so that the last layer can stop after them.
  const bool descending = summary && call.latest_last();
  int count = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t p = descending ? tokens - 1 - i : i;
    if (valid(p)) position[count++] = static_cast<int32_t>(p);
  }
  SequenceTask task{&call, index, user, count, count, count, position, 0};
  if (summary) {
    if (call.latest_last()) {
      task.window_begin = (count > 0 ? position[0] : tokens - 1) - call.latest_k + 1;
    } else {
      task.window_begin = count > 0 ? position[0] : 0;
    }
  }
  if (call.padding == Padding::kCompute) {
    for (int64_t p = 0; p < tokens; ++p) {
      if (!valid(p)) position[task.num_tokens++] = static_cast<int32_t>(p);
    }
    task.num_queries_last = task.num_tokens;
  } else if (summary && !call.pool_max()) {
    int inside = 0;
    while (inside < count && position[inside] >= task.window_begin &&
           position[inside] < task.window_begin + call.latest_k)
      ++inside;
    task.num_queries_last = inside;
  }
  return task;
}

// Whether every padded position stands behind the valid ones of its sequence.
bool pads_at_end_only(const EncoderCall& call) {
  for (int64_t b = 0; call.mask && b < call.batch; ++b) {
    const uint8_t* row = call.mask + b * call.mask_stride_b;
    bool ignored = false;
    for (int64_t l = 0; l < call.length; ++l) {
      const bool ignores = row[l * call.mask_stride_l] != 0;
      if (ignored && !ignores) return false;
      ignored = ignores;
    }
  }
  return true;
}

// A packed model with its kernel.
class Runner {
 public:
  Runner(const EncoderKernelEntry& kernel, const EncoderShape& shape, const void* packed)
      : kernel_(kernel), model_(packed_model(shape, kernel.layout, packed)) {}

  size_t workspace_bytes(int64_t tokens) const {
    const Layout layout(*this, tokens, 1);
    return layout.shared + layout.own;
  }

  void score_request(const EncoderCall& call) const {
    check_call(model().shape, call);
    RequestRun run{*this, call, Layout(*this, tokens_of(call), 1), {}, {}, {}, 0};
    // A user's candidates together, in their order: [users] first and behind last in `order`.
    run.order.resize(static_cast<size_t>(call.batch));
    std::vector<int64_t> begin(static_cast<size_t>(call.users) + 1, 0);
    for (int64_t b = 0; b < call.batch; ++b) ++begin[static_cast<size_t>(call.user_index[b]) + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t b = 0; b < call.batch; ++b) {
      run.order[static_cast<size_t>(next[static_cast<size_t>(call.user_index[b])]++)] = b;
    }
    // Each piece computes its user's part anew, which costs about as much as a candidate: small
    // pieces only where threads would have none.
    constexpr int64_t kSmall = 16;
    const int threads = thread_count(call);
    const auto share = [&](int64_t pieces) { return (call.batch + pieces - 1) / pieces; };
    const int64_t most = std::max(share(4 * threads), std::min(kSmall, share(threads)));
    for (size_t u = 0; u + 1 < begin.size(); ++u) {
      const int64_t count = begin[u + 1] - begin[u];
      const int64_t pieces = (count + most - 1) / most;
      for (int64_t i = 0; i < pieces; ++i) {
        run.pieces.push_back({begin[u] + count * i / pieces, begin[u] + count * (i + 1) / pieces});
      }
    }
    const bool shares = call.fusion == Fusion::kConcat && !model().shape.norm_first;
    if (shares) run.user_bytes = whole_lines(kernel_.user_bytes(model(), tokens_of(call)));
    run_parallel(
        static_cast<int>(std::min<int64_t>(threads, static_cast<int64_t>(run.pieces.size()))),
        &Runner::request_main, &run);
  }

  void forward(const EncoderCall& given) const {
    check_call(model().shape, given);
    EncoderCall call = given;
    if (call.padding == Padding::kStock)
      call.padding = pads_at_end_only(call) ? Padding::kZero : Padding::kCompute;
    if (call.computes_padding)
      call.padding = *call.computes_padding ? Padding::kCompute : Padding::kZero;
    Run run{*this, call, Layout(*this, tokens_of(call), 1), {}, {}, nullptr, {}, {}};
    const int threads = thread_count(call);
    run.team = call.batch % threads != 0 && call.batch < 4 * threads;
    if (run.team) {
      run.layout = Layout(*this, tokens_of(call), threads);
      run.shared.reset(new TeamMemory(run.layout.shared));
    }
    run_parallel(threads, &Runner::thread_main, &run);
  }

 private:
  static size_t whole_lines(size_t n) {
    return static_cast<size_t>(round_up(static_cast<int64_t>(n), 64));
  }

  // Sizes in bytes, each a multiple of 64.
  struct Layout {
    size_t kernel_shared, pooled, shared, kernel_own, own;
    Layout(const Runner& e, int64_t tokens, int team) {
      kernel_shared = whole_lines(e.kernel_.shared_bytes(e.model(), tokens));
      pooled = whole_lines(static_cast<size_t>(team) * e.model().shape.d_model * sizeof(float));
      shared = kernel_shared + pooled;
      kernel_own = whole_lines(e.kernel_.private_bytes(e.model(), tokens));
      own = kernel_own + whole_lines(static_cast<size_t>(tokens) * sizeof(int32_t));
    }
  };

  struct TeamMemory {
    explicit TeamMemory(size_t bytes)
        : data(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}))) {}
    ~TeamMemory() { ::operator delete(data, std::align_val_t{64}); }
    TeamMemory(const TeamMemory&) = delete;
    TeamMemory& operator=(const TeamMemory&) = delete;
    std::byte* data;
  };

  struct Run {
    const Runner& encoder;
    const EncoderCall& call;
    Layout layout;
    std::atomic<int64_t> next;
    Barrier barrier;
    std::unique_ptr<TeamMemory> shared;  // of a team; else each thread has its own
    std::atomic<bool> starved;           // a thread of the team has no workspace
    bool team;
  };

  // Candidates order[begin] .. order[end - 1], all of one user.
  struct Piece {
    int64_t begin, end;
  };

  struct RequestRun {
    const Runner& encoder;
    const EncoderCall& call;
    Layout layout;
    std::vector<int64_t> order;  // [B] candidates, by user
    std::vector<Piece> pieces;
    std::atomic<int64_t> next;
    size_t user_bytes;  // 0: nothing is shared
  };

  static void request_main(void* context, int, int) {
    RequestRun& run = *static_cast<RequestRun*>(context);
    std::byte* memory = static_cast<std::byte*>(
        thread_workspace(run.layout.own + run.layout.shared + run.user_bytes));
    run.encoder.kernel_.enter();
    const int64_t count = static_cast<int64_t>(run.pieces.size());
    for (int64_t i = run.next++; i < count; i = run.next++) {
      run.encoder.run_piece(run, run.pieces[static_cast<size_t>(i)], memory);
    }
    run.encoder.kernel_.leave();
  }

  void run_piece(const RequestRun& run, const Piece& piece, std::byte* own) const {
    std::byte* shared = own + run.layout.own;
    std::byte* user = shared + run.layout.shared;
    float* pooled = reinterpret_cast<float*>(shared + run.layout.kernel_shared);
    Barrier alone;
    SequenceTask task = plan_sequence(run.call, run.order[static_cast<size_t>(piece.begin)],
                                      reinterpret_cast<int32_t*>(own + run.layout.kernel_own));
    const bool shares = run.user_bytes > 0 && task.num_keys > 0;
    if (shares) kernel_.prepare_user(model(), task, shared, own, user);
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      task.index = run.order[static_cast<size_t>(i)];
      if (task.num_tokens > 0) {
        if (!shares || !kernel_.run_candidate(model(), task, shared, own, user, pooled)) {
          kernel_.run(model(), task, shared, own, pooled, &alone, 0, 1);
        }
      }
      if (run.call.is_bf16) {
        finish_sequence<uint16_t>(task, pooled, 1);
      } else {
        finish_sequence<float>(task, pooled, 1);
      }
    }
  }

  const PackedModel& model() const { return model_; }

  // Multiply-adds of the longest possible sequence, the measure of whether another thread pays.
  int thread_count(const EncoderCall& call) const {
    constexpr double kWorkPerThread = 2e6;
    const EncoderShape& s = model().shape;
    const double tokens = static_cast<double>(tokens_of(call));
    const double d = s.d_model;
    const double work =
        s.num_layers * tokens * (4 * d * d + 2 * d * s.dim_feedforward + 2 * d * tokens);
    const double useful = std::max(1.0, work * static_cast<double>(call.batch) / kWorkPerThread);
    return static_cast<int>(std::min<double>(std::max(1, call.num_threads), useful));
  }

  static void thread_main(void* context, int rank, int size) {
    Run& run = *static_cast<Run*>(context);
    if (run.team) {
      run_in_team(run, rank, size);
      return;
    }
    std::byte* memory =
        static_cast<std::byte*>(thread_workspace(run.layout.own + run.layout.shared));
    const Runner& encoder = run.encoder;
    encoder.kernel_.enter();
    for (int64_t b = run.next++; b < run.call.batch; b = run.next++) {
      encoder.run_sequence(run, b, memory + run.layout.own, memory, 0, 1);
    }
    encoder.kernel_.leave();
  }

  // All threads on one sequence after another. A team works together or not at all.
  static void run_in_team(Run& run, int rank, int size) {
    std::byte* memory = nullptr;
    try {
      memory = static_cast<std::byte*>(thread_workspace(run.layout.own));
    } catch (const std::bad_alloc&) {
      run.starved = true;
    }
    run.barrier.wait(size);
    if (run.starved) throw std::bad_alloc();
    const Runner& encoder = run.encoder;
    encoder.kernel_.enter();
    for (int64_t b = 0; b < run.call.batch; ++b)
      encoder.run_sequence(run, b, run.shared->data, memory, rank, size);
    encoder.kernel_.leave();
  }

  void run_sequence(Run& run, int64_t b, std::byte* shared, std::byte* own, int rank,
                    int size) const {
    float* pooled = reinterpret_cast<float*>(shared + run.layout.kernel_shared);
    const SequenceTask task =
        plan_sequence(run.call, b, reinterpret_cast<int32_t*>(own + run.layout.kernel_own));
    if (task.num_tokens > 0) {
      kernel_.run(model(), task, shared, own, pooled, &run.barrier, rank, size);
      if (size > 1) run.barrier.wait(size);
    }
    if (rank == 0) {
      if (run.call.is_bf16) {
        finish_sequence<uint16_t>(task, pooled, size);
      } else {
        finish_sequence<float>(task, pooled, size);
      }
    }
  }

  // What a padded position leaves: 0, through the final norm where there is one.
  float padded_value(int feature) const {
    return model().shape.has_final_norm ? model().final_norm_bias[feature] : 0.0f;
  }

  static void convert(float value, float* to) { *to = value; }
  static void convert(float value, uint16_t* to) { *to = round_to_bf16(value); }

  template <class T>
  void finish_sequence(const SequenceTask& task, const float* pooled, int size) const {
    const EncoderCall& call = *task.call;
    const int d = model().shape.d_model;
    const int64_t tokens = tokens_of(call);
    const Validity valid{call, task.user};
    T* out = static_cast<T*>(call.out) + task.index * call.out_stride_b;
    const auto fill_row = [&](T* row, bool padded) {
      for (int i = 0; i < d; ++i) convert(padded ? padded_value(i) : 0.0f, row + i);
    };
    const bool fills = call.padding != Padding::kCompute;
    if (call.latest_k < 0) {
      for (int64_t p = 0; fills && p < tokens && task.num_keys < tokens; ++p) {
        if (!valid(p)) fill_row(out + p * call.out_stride_l, true);
      }
      return;
    }
    for (int64_t slot = 0; slot < call.latest_k; ++slot) {
      const int64_t p = task.window_begin + slot;
      const bool inside = p >= 0 && p < tokens;
      if (!inside || (fills && !valid(p))) fill_row(out + slot * d, inside);
    }
    if (!call.pool_max()) return;
    T* to = out + call.latest_k * d;
    const bool counts_padded = call.padding == Padding::kZero && task.num_keys < tokens;
    for (int i = 0; i < d; ++i) {
      bool any = task.num_tokens > 0;
      float best = any ? pooled[i] : 0.0f;
      const auto count = [&](float y) {
        if (!any || (!(y <= best) && best == best)) best = y;
        any = true;
      };
      for (int t = 1; t < size && task.num_tokens > 0; ++t)
        count(pooled[static_cast<size_t>(t) * d + i]);
      if (counts_padded) count(padded_value(i));
      convert(best + 0.0f, to + i);  // -0 becomes 0: which zero wins must not depend on the order
    }
  }

  const EncoderKernelEntry& kernel_;
  const PackedModel model_;
};

}  // namespace

size_t encoder_packed_bytes(const EncoderKernelEntry& kernel, const EncoderShape& shape) {
  check_shape(shape);
  return packed_bytes(shape, kernel.layout);
}

void pack_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape,
                  const EncoderParameters& parameters, void* packed) {
  check_shape(shape);
  check_parameters(shape, parameters);
  pack(shape, parameters, kernel.layout, packed);
}

void run_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape, const void* packed,
                 const EncoderCall& call) {
  const Runner runner(kernel, shape, packed);
  if (call.user_index) {
    runner.score_request(call);
  } else {
    runner.forward(call);
  }
}

}  // namespace cpu

size_t encoder_packed_bytes(int isa, const EncoderShape& shape) {
  return cpu::encoder_packed_bytes(cpu::encoder_kernel(isa), shape);
}

void pack_encoder(int isa, const EncoderShape& shape, const EncoderParameters& parameters,
                  void* packed) {
  cpu::pack_encoder(cpu::encoder_kernel(isa), shape, parameters, packed);
}

void run_encoder(int isa, const EncoderShape& shape, const void* packed, const EncoderCall& call) {
  cpu::run_encoder(cpu::encoder_kernel(isa), shape, packed, call);
}

size_t encoder_workspace_bytes(int isa, const EncoderShape& shape, int64_t tokens) {
  return cpu::Runner(cpu::encoder_kernel(isa), shape, nullptr).workspace_bytes(tokens);
}

}  // namespace seqkernels
