// Batch norm with given statistics, channel by channel:
//
//     z = (x - mean) / sqrt(max(var, min_var) + eps);   y = weight * clamp(z, -max_abs, max_abs) +
//     bias
//
// With a bound, a channel whose statistics are not finite or whose variance is negative has z = 0,
// and so has NaN. Without one the values go where arithmetic takes them, as in torch's batch norm.
#pragma once

#include <limits>

namespace seqkernels {

struct NormShape {
  bool present = false;
  float eps = 1e-5f;
  float min_var = 0.0f;
  float max_abs = std::numeric_limits<float>::infinity();

  bool operator==(const NormShape&) const = default;
  bool bounded() const {
    return min_var > 0.0f || max_abs < std::numeric_limits<float>::infinity();
  }
};

// fp32 and contiguous, one value per channel.
struct NormParameters {
  const float* mean = nullptr;
  const float* var = nullptr;
  const float* weight = nullptr;  // null: 1
  const float* bias = nullptr;    // null: 0
};

struct ChannelNorm : NormShape, NormParameters {};

}  // namespace seqkernels
