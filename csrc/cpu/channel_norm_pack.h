// The constants of a batch norm's channels, as the kernels want them.
#pragma once

#include <cmath>
#include <cstdint>

#include "seqkernels/channel_norm.h"

namespace seqkernels::cpu {

// Exact:   y = (x + offset) * scale + shift
// Bounded: y = clamp((x + offset) * inverse) * scale + shift, NaN counting as 0 in the clamp
struct PackedChannelNorm {
  enum Kind { kNone, kExact, kBounded };
  Kind kind = kNone;
  float max_abs = 0.0f;
  const float* offset = nullptr;
  const float* inverse = nullptr;  // kBounded only
  const float* scale = nullptr;
  const float* shift = nullptr;
};

struct ChannelConstants {
  float offset, inverse, scale, shift;
};

// `added` goes onto x before the norm: the bias of a product. With a bound, statistics without
// meaning give inverse = 0, so that z is 0, or NaN where x is not finite, which counts as 0.
inline ChannelConstants channel_constants(const ChannelNorm& n, int64_t channel, float added) {
  const double mean = n.mean[channel], var = n.var[channel];
  const double weight = n.weight ? n.weight[channel] : 1.0;
  const double floor = n.min_var;
  // Without a bound a negative variance gives NaN.
  const bool raised = n.bounded() && var < floor;
  double inverse = 1.0 / std::sqrt((raised ? floor : var) + static_cast<double>(n.eps));
  double offset = added - mean;
  ChannelConstants c{};
  c.shift = n.bias ? n.bias[channel] : 0.0f;
  if (n.bounded()) {
    if (!std::isfinite(mean) || !std::isfinite(var) || var < 0.0) offset = inverse = 0.0;
    c.inverse = static_cast<float>(inverse);
    c.scale = static_cast<float>(weight);
  } else {
    c.scale = static_cast<float>(weight * inverse);
  }
  c.offset = static_cast<float>(offset);
  return c;
}

}  // namespace seqkernels::cpu
