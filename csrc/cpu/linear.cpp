// The linear layer's entry point: packs weights and norms, cuts a call into tasks, spreads them
// over threads.
#include "seqkernels/linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "cpu/isa_table.h"
#include "cpu/linear_model.h"

namespace seqkernels {
namespace cpu {
namespace {

#include "cpu/bf16.h"

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("linear: " + what);
}

void check_norm(const char* name, const NormShape& shape, const NormParameters& n) {
  if (shape.present && (!n.mean || !n.var))
    refuse(std::string(name) + ": expected mean and variance, got a null pointer");
}

void check_shape(const LinearShape& s) {
  if (s.in_features < 1 || s.out_features < 1) {
    refuse("weight: expected [F >= 1, K >= 1], got [" + std::to_string(s.out_features) + ", " +
           std::to_string(s.in_features) + "]");
  }
  if (s.in_features > INT32_MAX / 4 || s.out_features > INT32_MAX / 4)
    refuse("weight: expected fewer than 2^29 rows and columns");
}

void check_parameters(const LinearShape& s, const LinearParameters& p) {
  if (!p.weight) refuse("weight: expected a matrix, got a null pointer");
  check_norm("input_norm", s.input_norm, p.input_norm);
  check_norm("output_norm", s.output_norm, p.output_norm);
}

// Lays weights and norms one behind the other. Without `to` it says where they lie and writes
// nothing.
class Packer {
 public:
  Packer(const LinearShape& shape, const LinearKernelEntry& kernel, const uint32_t* memory,
         uint32_t* to)
      : shape_(shape), lanes_(kernel.lanes), pair_(kernel.pair), memory_(memory), to_(to) {}

  size_t bytes() const { return static_cast<size_t>(words_) * sizeof(uint32_t); }

  PackedLinear lay(const LinearParameters& p) {
    PackedLinear m;
    m.in_features = shape_.in_features;
    m.out_features = shape_.out_features;
    m.steps = static_cast<int>(round_up((shape_.in_features + pair_ - 1) / pair_, kPanelSteps));
    m.strips = (shape_.out_features + lanes_ - 1) / lanes_;
    m.activation = shape_.activation;
    m.negative_slope = shape_.negative_slope;
    m.weight = weight(m, p.weight);
    m.input_norm = norm(shape_.input_norm, p.input_norm, shape_.in_features, nullptr);
    m.output_norm = norm(shape_.output_norm, p.output_norm, shape_.out_features, p.bias);
    if (!shape_.output_norm.present) {
      const int64_t begin = take_floats(shape_.out_features);
      if (float* bias = floats(begin); bias && p.bias)
        std::memcpy(bias, p.bias, static_cast<size_t>(shape_.out_features) * sizeof(float));
      m.bias = at(begin);
    }
    return m;
  }

 private:
  int64_t take(int64_t words) {
    const int64_t begin = words_;
    words_ += round_up(words, 16);
    return begin;
  }
  int64_t take_floats(int64_t count) { return take(round_up(count, lanes_) + lanes_); }
  const float* at(int64_t begin) const {
    return memory_ ? reinterpret_cast<const float*>(memory_ + begin) : nullptr;
  }
  float* floats(int64_t begin) const {
    return to_ ? reinterpret_cast<float*>(to_ + begin) : nullptr;
  }

  // [strip][step][lane]
  const uint32_t* weight(const PackedLinear& m, const float* from) {
    const int64_t begin = take(m.strips * m.steps * lanes_);
    const int64_t k_count = m.in_features;
    uint32_t* to = to_ ? to_ + begin : nullptr;
    for (int64_t strip = 0; to && strip < m.strips; ++strip) {
      for (int64_t step = 0; step < m.steps; ++step) {
        for (int64_t lane = 0; lane < lanes_; ++lane, ++to) {
          const int64_t feature = strip * lanes_ + lane;
          if (feature >= m.out_features) continue;
          const float* row = from + feature * k_count;
          const auto element = [&](int64_t k) {
            return k < k_count ? static_cast<uint32_t>(round_to_bf16(row[k])) : 0u;
          };
          if (shape_.precision == Precision::kFp32) {
            if (step < k_count) std::memcpy(to, row + step, sizeof(float));
          } else {
            *to = pair_ == 2 ? element(2 * step) | element(2 * step + 1) << 16
                             : element(step) << 16;  // a bf16 widened to fp32
          }
        }
      }
    }
    return memory_ ? memory_ + begin : nullptr;
  }

  PackedChannelNorm norm(const NormShape& shape, const NormParameters& p, int64_t channels,
                         const float* added) {
    PackedChannelNorm packed;
    if (!shape.present) return packed;
    packed.kind = shape.bounded() ? PackedChannelNorm::kBounded : PackedChannelNorm::kExact;
    packed.max_abs = shape.max_abs;
    int64_t begins[4];
    for (int64_t& begin : begins) begin = take_floats(channels);
    const ChannelNorm n{shape, p};
    for (int64_t c = 0; to_ && c < channels; ++c) {
      const ChannelConstants constants = channel_constants(n, c, added ? added[c] : 0.0f);
      floats(begins[0])[c] = constants.offset;
      floats(begins[1])[c] = constants.inverse;
      floats(begins[2])[c] = constants.scale;
      floats(begins[3])[c] = constants.shift;
    }
    packed.offset = at(begins[0]);
    packed.inverse = at(begins[1]);
    packed.scale = at(begins[2]);
    packed.shift = at(begins[3]);
    return packed;
  }

  const LinearShape& shape_;
  const int lanes_, pair_;
  const uint32_t* memory_;
  uint32_t* to_;
  int64_t words_ = 0;
};

// A packed layer with its kernel.
class Runner {
 public:
  Runner(const LinearKernelEntry& kernel, const LinearShape& shape, const void* packed)
      : kernel_(kernel),
        m_(Packer(shape, kernel, static_cast<const uint32_t*>(packed), nullptr).lay({})) {}

  size_t workspace_bytes() const { return panel_bytes(max_panel_rows()); }

  void forward(const LinearCall& call) const {
    if (call.rows < 0) refuse("x: expected rows >= 0, got " + std::to_string(call.rows));
    if (call.rows == 0) return;
    if (call.out_stride == m_.out_features) {
      prefer_large_pages(call.out,
                         static_cast<size_t>(call.rows * m_.out_features) * (call.is_bf16 ? 2 : 4));
    }
    Run run{*this, call, plan(call), {}};
    run_parallel(static_cast<int>(std::min<int64_t>(run.plan.threads, run.plan.tasks())),
                 &Runner::thread_main, &run);
  }

 private:
  // A call as row blocks x column chunks, one task each.
  struct Plan {
    int threads;
    int64_t row_blocks, column_chunks;
    int64_t block_rows;  // a multiple of kPanelRows
    int64_t tasks() const { return row_blocks * column_chunks; }
  };

  struct Run {
    const Runner& linear;
    const LinearCall& call;
    Plan plan;
    std::atomic<int64_t> next;
  };

  int64_t panel_row_bytes() const { return static_cast<int64_t>(m_.steps) * 4; }
  size_t panel_bytes(int64_t rows) const { return static_cast<size_t>(rows * panel_row_bytes()); }

  // As many rows as leave the second-level cache to the weights, but enough to use each weight
  // that is loaded often.
  int64_t max_panel_rows() const {
    constexpr int64_t kPanelBytes = 128 << 10;
    const int64_t fitting = kPanelBytes / panel_row_bytes() / kPanelRows * kPanelRows;
    return std::clamp<int64_t>(fitting, 2 * kPanelRows, 8 * kPanelRows);
  }

  Plan plan(const LinearCall& call) const {
    // Multiply-adds below which another thread costs more than it gives.
    constexpr double kWorkPerThread = 1e6;
    const double work = static_cast<double>(call.rows) * static_cast<double>(m_.in_features) *
                        static_cast<double>(m_.out_features);
    Plan p{};
    p.threads = static_cast<int>(
        std::clamp(work / kWorkPerThread, 1.0, static_cast<double>(std::max(1, call.num_threads))));
    const int64_t units = (call.rows + kPanelRows - 1) / kPanelRows;
    const int64_t most = max_panel_rows() / kPanelRows;
    p.row_blocks = (units + most - 1) / most;
    // A multiple of the threads, where there are rows enough for it.
    if (units >= p.threads) p.row_blocks = std::min(round_up(p.row_blocks, p.threads), units);
    p.block_rows = (units + p.row_blocks - 1) / p.row_blocks * kPanelRows;
    p.row_blocks = (call.rows + p.block_rows - 1) / p.block_rows;
    p.column_chunks = std::min<int64_t>((p.threads + p.row_blocks - 1) / p.row_blocks, m_.strips);
    return p;
  }

  static void thread_main(void* context, int, int) {
    Run& run = *static_cast<Run*>(context);
    const Runner& linear = run.linear;
    const Plan& p = run.plan;
    uint32_t* panel = static_cast<uint32_t*>(thread_workspace(linear.panel_bytes(p.block_rows)));
    linear.kernel_.enter();
    for (int64_t i = run.next++; i < p.tasks(); i = run.next++) {
      const int64_t block = i / p.column_chunks, chunk = i % p.column_chunks;
      LinearTask task{};
      task.row_begin = block * p.block_rows;
      task.row_end = std::min(task.row_begin + p.block_rows, run.call.rows);
      task.strip_begin = linear.m_.strips * chunk / p.column_chunks;
      task.strip_end = linear.m_.strips * (chunk + 1) / p.column_chunks;
      linear.kernel_.run(linear.m_, run.call, task, panel);
    }
    linear.kernel_.leave();
  }

  const LinearKernelEntry& kernel_;
  const PackedLinear m_;
};

}  // namespace

size_t linear_packed_bytes(const LinearKernelEntry& kernel, const LinearShape& shape) {
  check_shape(shape);
  Packer packer(shape, kernel, nullptr, nullptr);
  packer.lay({});
  return packer.bytes();
}

void pack_linear(const LinearKernelEntry& kernel, const LinearShape& shape,
                 const LinearParameters& parameters, void* packed) {
  check_parameters(shape, parameters);
  if (shape.precision == Precision::kFp32 && kernel.pair != 1)
    refuse("precision: expected a kernel that multiplies fp32");
  std::memset(packed, 0, linear_packed_bytes(kernel, shape));
  uint32_t* words = static_cast<uint32_t*>(packed);
  Packer(shape, kernel, words, words).lay(parameters);
}

void run_linear(const LinearKernelEntry& kernel, const LinearShape& shape, const void* packed,
                const LinearCall& call) {
  Runner(kernel, shape, packed).forward(call);
}

}  // namespace cpu

size_t linear_packed_bytes(int isa, const LinearShape& shape) {
  return cpu::linear_packed_bytes(cpu::linear_kernel(isa, shape.precision), shape);
}

void pack_linear(int isa, const LinearShape& shape, const LinearParameters& parameters,
                 void* packed) {
  cpu::pack_linear(cpu::linear_kernel(isa, shape.precision), shape, parameters, packed);
}

void run_linear(int isa, const LinearShape& shape, const void* packed, const LinearCall& call) {
  cpu::run_linear(cpu::linear_kernel(isa, shape.precision), shape, packed, call);
}

size_t linear_workspace_bytes(int isa, const LinearShape& shape) {
  return cpu::Runner(cpu::linear_kernel(isa, shape.precision), shape, nullptr).workspace_bytes();
}

}  // namespace seqkernels
