// The linear layer's entry point: packs weights and norms, cuts a call into tasks, spreads them
// over threads.
#include "seqkernels/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/isa_table.h"
#include "cpu/linear_model.h"

namespace seqkernels {
namespace cpu {
namespace {

#include "cpu/bf16.h"

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("linear: " + what);
}

void check_norm(const char* name, const ChannelNorm& n) {
  if (n.present() && !n.var)
    refuse(std::string(name) + ": expected a variance beside the mean, got none");
}

void check_parameters(const LinearParameters& p) {
  if (p.in_features < 1 || p.out_features < 1) {
    refuse("weight: expected [F >= 1, K >= 1], got [" + std::to_string(p.out_features) + ", " +
           std::to_string(p.in_features) + "]");
  }
  if (p.in_features > INT32_MAX / 4 || p.out_features > INT32_MAX / 4)
    refuse("weight: expected fewer than 2^29 rows and columns");
  if (!p.weight) refuse("weight: expected a matrix, got a null pointer");
  check_norm("input_norm", p.input_norm);
  check_norm("output_norm", p.output_norm);
}

// 64-byte aligned memory of 32-bit words, zero at first.
class Words {
 public:
  explicit Words(int64_t count)
      : count_(round_up(count, 16)),
        data_(static_cast<uint32_t*>(std::aligned_alloc(64, bytes()))) {
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes());
  }
  Words(Words&& other) noexcept : count_(other.count_), data_(other.data_) {
    other.data_ = nullptr;
  }
  ~Words() { std::free(data_); }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(uint32_t); }
  uint32_t* data() { return data_; }

 private:
  int64_t count_;
  uint32_t* data_;
};

class CpuLinear final : public Linear {
 public:
  CpuLinear(const LinearParameters& p, const LinearKernelEntry& kernel) : kernel_(kernel) {
    m_.in_features = p.in_features;
    m_.out_features = p.out_features;
    m_.steps =
        static_cast<int>(round_up((p.in_features + kernel.pair - 1) / kernel.pair, kPanelSteps));
    m_.strips = (p.out_features + kernel.lanes - 1) / kernel.lanes;
    m_.activation = p.activation;
    m_.negative_slope = p.negative_slope;
    pack_weight(p.weight, p.fp32_operands);
    m_.input_norm = pack_norm(p.input_norm, p.in_features, nullptr);
    m_.output_norm = pack_norm(p.output_norm, p.out_features, p.bias);
    if (!p.output_norm.present()) {
      float* bias = take_floats(p.out_features);
      for (int64_t f = 0; f < p.out_features && p.bias; ++f) bias[f] = p.bias[f];
      m_.bias = bias;
    }
  }

  size_t packed_bytes() const override {
    size_t bytes = 0;
    for (const Words& block : memory_) bytes += block.bytes();
    return bytes;
  }

  size_t workspace_bytes() const override { return panel_bytes(max_panel_rows()); }

  void forward(const LinearCall& call) const override {
    if (call.rows < 0) refuse("x: expected rows >= 0, got " + std::to_string(call.rows));
    if (call.rows == 0) return;
    if (call.out_stride == m_.out_features) {
      prefer_large_pages(call.out,
                         static_cast<size_t>(call.rows * m_.out_features) * (call.is_bf16 ? 2 : 4));
    }
    Run run{*this, call, plan(call), {}};
    run_parallel(static_cast<int>(std::min<int64_t>(run.plan.threads, run.plan.tasks())),
                 &CpuLinear::thread_main, &run);
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
    const CpuLinear& linear;
    const LinearCall& call;
    Plan plan;
    std::atomic<int64_t> next;
  };

  uint32_t* take(int64_t words) {
    memory_.emplace_back(words);
    return memory_.back().data();
  }
  float* take_floats(int64_t count) {
    return reinterpret_cast<float*>(take(round_up(count, kernel_.lanes) + kernel_.lanes));
  }

  // [strip][step][lane]
  void pack_weight(const float* weight, bool fp32_operands) {
    const int64_t k_count = m_.in_features;
    uint32_t* to = take(m_.strips * m_.steps * kernel_.lanes);
    m_.weight = to;
    for (int64_t strip = 0; strip < m_.strips; ++strip) {
      for (int64_t step = 0; step < m_.steps; ++step) {
        for (int64_t lane = 0; lane < kernel_.lanes; ++lane, ++to) {
          const int64_t feature = strip * kernel_.lanes + lane;
          if (feature >= m_.out_features) continue;
          const float* row = weight + feature * k_count;
          const auto element = [&](int64_t k) {
            return k < k_count ? static_cast<uint32_t>(round_to_bf16(row[k])) : 0u;
          };
          if (fp32_operands) {
            if (step < k_count) std::memcpy(to, row + step, sizeof(float));
          } else {
            *to = kernel_.pair == 2 ? element(2 * step) | element(2 * step + 1) << 16
                                    : element(step) << 16;  // a bf16 widened to fp32
          }
        }
      }
    }
  }

  PackedChannelNorm pack_norm(const ChannelNorm& n, int64_t channels, const float* added) {
    PackedChannelNorm packed;
    if (!n.present()) return packed;
    packed.kind = n.bounded() ? PackedChannelNorm::kBounded : PackedChannelNorm::kExact;
    packed.max_abs = n.max_abs;
    float* arrays[4];
    for (float*& array : arrays) array = take_floats(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const ChannelConstants constants = channel_constants(n, c, added ? added[c] : 0.0f);
      arrays[0][c] = constants.offset;
      arrays[1][c] = constants.inverse;
      arrays[2][c] = constants.scale;
      arrays[3][c] = constants.shift;
    }
    packed.offset = arrays[0];
    packed.inverse = arrays[1];
    packed.scale = arrays[2];
    packed.shift = arrays[3];
    return packed;
  }

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
    const CpuLinear& linear = run.linear;
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
  std::vector<Words> memory_;
  PackedLinear m_;
};

}  // namespace

std::unique_ptr<Linear> make_linear(const LinearKernelEntry& kernel,
                                    const LinearParameters& parameters) {
  check_parameters(parameters);
  if (parameters.fp32_operands && kernel.pair != 1)
    refuse("fp32_operands: expected a kernel that multiplies fp32");
  return std::make_unique<CpuLinear>(parameters, kernel);
}

}  // namespace cpu

std::unique_ptr<Linear> make_linear(const std::string& isa, const LinearParameters& parameters) {
  return cpu::make_linear(cpu::linear_kernel(isa, parameters.fp32_operands), parameters);
}

}  // namespace seqkernels
