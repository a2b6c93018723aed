// The encoder's entry point: checks a call, turns masks into token lists, spreads sequences over
// threads, and fills what no kernel computes (padded rows, empty users).
#include "seqkernels/encoder.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
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

void check_shape(const EncoderShape& s, const EncoderParameters& p) {
  if (s.d_model < 1 || s.nhead < 1 || s.d_model % s.nhead != 0) {
    refuse("nhead: expected a divisor of d_model = " + std::to_string(s.d_model) + ", got " +
           std::to_string(s.nhead));
  }
  if (s.dim_feedforward < 1)
    refuse("dim_feedforward: expected at least 1, got " + std::to_string(s.dim_feedforward));
  if (s.activation == Activation::kNone)
    refuse("activation: expected relu, gelu, gelu_tanh or leaky_relu, got none");
  if (p.layers.empty()) refuse("layers: expected at least one layer, got none");
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
  if (call.lengths) {
    for (int64_t b = 0; b < call.batch; ++b) {
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
  int64_t index;
  bool operator()(int64_t position) const {
    int64_t l = position;
    if (call.fusion == Fusion::kAppend) {
      if (position == (call.latest_last ? call.length : 0)) return true;
      if (!call.latest_last) --l;
    }
    if (call.mask) return call.mask[index * call.mask_stride_b + l * call.mask_stride_l] == 0;
    return !call.lengths || l < call.lengths[index];
  }
};

// Fills `position` [T] and the rest of the task.
SequenceTask plan_sequence(const EncoderCall& call, int64_t index, int32_t* position) {
  const int64_t tokens = tokens_of(call);
  const Validity valid{call, index};
  const bool summary = call.latest_k >= 0;
  // The window's tokens come first, so that the last layer can stop after them.
  const bool descending = summary && call.latest_last;
  int count = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t p = descending ? tokens - 1 - i : i;
    if (valid(p)) position[count++] = static_cast<int32_t>(p);
  }
  SequenceTask task{&call, index, count, count, count, position, 0};
  if (summary) {
    if (call.latest_last) {
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
  } else if (summary && !call.pool_max) {
    int inside = 0;
    while (inside < count && position[inside] >= task.window_begin &&
           position[inside] < task.window_begin + call.latest_k)
      ++inside;
    task.num_queries_last = inside;
  }
  return task;
}

class CpuEncoder final : public Encoder {
 public:
  CpuEncoder(const EncoderShape& shape, const EncoderParameters& parameters,
             const EncoderKernelEntry& kernel)
      : kernel_(kernel), packed_(shape, parameters, kernel.layout) {}

  size_t packed_bytes() const override { return packed_.bytes(); }

  size_t workspace_bytes(int64_t tokens) const override {
    const Layout layout(*this, tokens, 1);
    return layout.shared + layout.own;
  }

  void forward(const EncoderCall& call) const override {
    check_call(model().shape, call);
    Run run{*this, call, Layout(*this, tokens_of(call), 1), {}, {}, nullptr, {}, nullptr, {}};
    const int threads = thread_count(call);
    run.team = call.batch % threads != 0 && call.batch < 4 * threads;
    if (run.team) {
      run.layout = Layout(*this, tokens_of(call), threads);
      run.shared.reset(new TeamMemory(run.layout.shared));
    }
    run_parallel(threads, &CpuEncoder::thread_main, &run);
    if (run.error) std::rethrow_exception(run.error);
  }

 private:
  // Sizes in bytes, each a multiple of 64.
  struct Layout {
    size_t kernel_shared, pooled, shared, kernel_own, own;
    Layout(const CpuEncoder& e, int64_t tokens, int team) {
      const auto whole_lines = [](size_t n) {
        return static_cast<size_t>(round_up(static_cast<int64_t>(n), 64));
      };
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
    const CpuEncoder& encoder;
    const EncoderCall& call;
    Layout layout;
    std::atomic<int64_t> next;
    Barrier barrier;
    std::unique_ptr<TeamMemory> shared;  // of a team; else each thread has its own
    std::mutex error_mutex;
    std::exception_ptr error;
    bool team;
  };

  const PackedModel& model() const { return packed_.model(); }

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
    std::byte* memory = nullptr;
    try {
      memory = static_cast<std::byte*>(
          thread_workspace(run.layout.own + (run.team ? 0 : run.layout.shared)));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(run.error_mutex);
      run.error = std::current_exception();
    }
    if (run.team) run.barrier.wait(size);  // a team works together or not at all
    if (!memory || (run.team && run.error)) return;
    const CpuEncoder& encoder = run.encoder;
    encoder.kernel_.enter();
    if (run.team) {
      for (int64_t b = 0; b < run.call.batch; ++b)
        encoder.run_sequence(run, b, run.shared->data, memory, rank, size);
    } else {
      for (int64_t b = run.next++; b < run.call.batch; b = run.next++) {
        encoder.run_sequence(run, b, memory + run.layout.own, memory, 0, 1);
      }
    }
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
    const Validity valid{call, task.index};
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
    if (!call.pool_max) return;
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
  const PackedEncoder packed_;
};

}  // namespace

std::unique_ptr<Encoder> make_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape,
                                      const EncoderParameters& parameters) {
  check_shape(shape, parameters);
  return std::make_unique<CpuEncoder>(shape, parameters, kernel);
}

}  // namespace cpu

std::unique_ptr<Encoder> make_encoder(const std::string& isa, const EncoderShape& shape,
                                      const EncoderParameters& parameters) {
  return cpu::make_encoder(cpu::encoder_kernel(isa), shape, parameters);
}

}  // namespace seqkernels
