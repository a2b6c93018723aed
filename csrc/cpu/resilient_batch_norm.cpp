// The entry point of `resilient_batch_norm`: brings every layout to rows, lays the constants of the
// channels beside them, and spreads the rows over threads.
#include "seqkernels/resilient_batch_norm.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "cpu/isa_table.h"
#include "cpu/parallel.h"
#include "cpu/resilient_batch_norm_model.h"

namespace seqkernels {
namespace cpu {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("resilient_batch_norm: " + what);
}

void check_call(const ResilientBatchNormCall& call) {
  if (call.channels < 1)
    refuse("channels: expected at least 1, got " + std::to_string(call.channels));
  if (call.outer < 0 || call.inner < 0) {
    refuse("outer, inner: expected sizes, got " + std::to_string(call.outer) + " and " +
           std::to_string(call.inner));
  }
  if (!call.constants && (!call.norm.mean || !call.norm.var))
    refuse("mean, var: expected both, got a null pointer");
  if (!(call.norm.eps >= 0) || !(call.norm.min_var >= 0) || !(call.norm.max_abs >= 0))
    refuse("eps, min_var, max_abs: expected numbers that are not negative");
}

// Where rows of contiguous values lie: `outer` blocks of `inner` of them. Value i of a row belongs
// to channel (i / repeat) % channels; with `one_per_row` row r of a block belongs to channel r.
struct Rows {
  int64_t outer, inner, width;
  int64_t x_outer, x_row, out_outer, out_row;
  int64_t repeat;
  bool one_per_row;
  int64_t tail;  // values in one more row, shorter than the others, at the end of the only block

  bool has_gaps() const { return out_row != width || (outer > 1 && out_outer != inner * width); }
};

constexpr int64_t kMostConstants = 2048;  // beside a row; four arrays of them stay in the caches

Rows rows_of(const ResilientBatchNormCall& c) {
  Rows r{c.outer,
         c.inner,
         c.channels,
         c.x_stride_outer,
         c.x_stride_row,
         c.out_stride_outer,
         c.out_stride_row,
         1,
         false,
         0};
  if (!c.channels_last) {
    const bool packed = c.x_stride_row == c.inner && c.out_stride_row == c.inner;
    if (packed && c.channels * c.inner <= kMostConstants) {
      // All channels of one n are a row: short runs of positions are not worth one each.
      r = {
          1,     c.outer, c.channels * c.inner, 0, c.x_stride_outer, 0, c.out_stride_outer, c.inner,
          false, 0};
    } else {
      r.inner = c.channels;
      r.width = c.inner;
      r.one_per_row = true;
      return r;
    }
  }
  if (r.outer > 1 && r.x_outer == r.inner * r.x_row && r.out_outer == r.inner * r.out_row) {
    r.inner *= r.outer;
    r.outer = 1;
  }
  // Rows without gaps, narrower than some vectors: several make one, of whole cache lines.
  if (r.outer == 1 && r.x_row == r.width && r.out_row == r.width) {
    constexpr int64_t kLine = 32;
    int64_t together = kLine / std::gcd(r.width, kLine);
    while (together * r.width < 256) together *= 2;
    if (together > 1 && together * r.width <= kMostConstants && together <= r.inner) {
      r.tail = r.inner % together * r.width;
      r.inner /= together;
      r.width *= together;
      r.x_row = r.out_row = r.width;
    }
  }
  return r;
}

// Constants of the channels, [4][C].
void fill_constants(int64_t channels, const ChannelNorm& norm, float* to) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    const ChannelConstants k = channel_constants(norm, channel, 0.0f);
    to[channel] = k.offset;
    to[channels + channel] = k.inverse;
    to[2 * channels + channel] = k.scale;
    to[3 * channels + channel] = k.shift;
  }
}

// Four arrays of `count` values each, at `constants` one behind the other.
PackedChannelNorm arrays_of(const ResilientBatchNormCall& call, const float* constants,
                            int64_t count) {
  return {call.norm.bounded() ? PackedChannelNorm::kBounded : PackedChannelNorm::kExact,
          call.norm.max_abs,
          constants,
          constants + count,
          constants + 2 * count,
          constants + 3 * count};
}

// The constants of `count` values after each other, in `memory` [4][count] where they are not those
// of the channels as they are.
PackedChannelNorm spread(const ResilientBatchNormCall& call, int64_t count, int64_t repeat,
                         float* memory) {
  const int64_t channels = call.channels;
  if (count == channels && repeat == 1) {
    if (!call.constants) fill_constants(channels, call.norm, memory);
    return arrays_of(call, call.constants ? call.constants : memory, channels);
  }
  const float* constants = call.constants;
  if (!constants) {
    float* own = memory + 4 * count;
    fill_constants(channels, call.norm, own);
    constants = own;
  }
  const int64_t period = channels * repeat;
  for (int a = 0; a < 4; ++a) {
    float* array = memory + a * count;
    for (int64_t channel = 0; channel < channels; ++channel)
      std::fill_n(array + channel * repeat, repeat, constants[a * channels + channel]);
    for (int64_t done = period; done < count;) {
      const int64_t more = std::min(done, count - done);
      std::copy_n(array, more, array + done);
      done += more;
    }
  }
  return arrays_of(call, memory, count);
}

struct Run {
  const ResilientBatchNormKernelEntry& kernel;
  const ResilientBatchNormCall& call;
  const Rows& rows;
  PackedChannelNorm norm;

  void block(int64_t outer, int64_t first, int64_t count, int64_t width) const {
    const int64_t element = call.is_bf16 ? 2 : 4;
    const auto at = [&](int64_t per_outer, int64_t per_row) {
      return (outer * per_outer + first * per_row) * element;
    };
    ResilientBatchNormTask task;
    task.x = static_cast<const char*>(call.x) + at(rows.x_outer, rows.x_row);
    task.out = static_cast<char*>(call.out) + at(rows.out_outer, rows.out_row);
    task.rows = count;
    task.width = width;
    task.x_stride = rows.x_row;
    task.out_stride = rows.out_row;
    task.is_bf16 = call.is_bf16;
    task.norm = norm;
    task.one_per_row = rows.one_per_row;
    if (rows.one_per_row) {
      for (const float** p :
           {&task.norm.offset, &task.norm.inverse, &task.norm.scale, &task.norm.shift}) {
        *p += first;
      }
    }
    task.activation = call.activation;
    task.negative_slope = call.negative_slope;
    kernel.run(task);
  }

  static void thread_main(void* context, int rank, int size) {
    const Run& run = *static_cast<const Run*>(context);
    const Rows& rows = run.rows;
    const int64_t total = rows.outer * rows.inner;
    const auto part = [&](int64_t i) { return total / size * i + std::min(total % size, i); };
    const int64_t end = part(rank + 1);
    for (int64_t row = part(rank); row < end;) {
      const int64_t outer = row / rows.inner, first = row % rows.inner;
      const int64_t count = std::min(end - row, rows.inner - first);
      run.block(outer, first, count, rows.width);
      row += count;
    }
    if (rows.tail > 0 && rank == size - 1) run.block(0, rows.inner, 1, rows.tail);
  }
};

}  // namespace
}  // namespace cpu

size_t packed_channel_norm_bytes(int64_t channels) {
  return static_cast<size_t>(4 * channels) * sizeof(float);
}

void pack_channel_norm(int64_t channels, const ChannelNorm& norm, void* packed) {
  cpu::fill_constants(channels, norm, static_cast<float*>(packed));
}

void run_resilient_batch_norm(int isa, const ResilientBatchNormCall& call) {
  const cpu::ResilientBatchNormKernelEntry& kernel = cpu::resilient_batch_norm_kernel(isa);
  cpu::check_call(call);
  if (call.outer == 0 || call.inner == 0) return;
  const cpu::Rows rows = cpu::rows_of(call);
  const int64_t constants = rows.one_per_row ? rows.inner : rows.width;
  float* memory = static_cast<float*>(
      cpu::thread_workspace(static_cast<size_t>(4 * (constants + call.channels)) * sizeof(float)));
  cpu::Run run{kernel, call, rows, cpu::spread(call, constants, rows.repeat, memory)};

  constexpr int64_t kValuesPerThread = 32768;
  const int64_t values = call.outer * call.inner * call.channels;
  if (!rows.has_gaps()) {
    cpu::prefer_large_pages(call.out, static_cast<size_t>(values) * (call.is_bf16 ? 2 : 4));
  }
  const int threads = static_cast<int>(
      std::clamp<int64_t>(values / kValuesPerThread, 1, std::max(1, call.num_threads)));
  cpu::run_parallel(threads, &cpu::Run::thread_main, &run);
}

}  // namespace seqkernels
