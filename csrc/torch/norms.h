// The numbers of a batch norm in fp32.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "seqkernels/channel_norm.h"
#include "torch/checks.h"

namespace seqkernels::torch_abi {

// A bound must not grow, nor vanish, when it becomes fp32.
inline float bound_of(double value) {
  const float nearest = static_cast<float>(value);
  return nearest > value ? std::nextafter(nearest, 0.0f) : nearest;
}
inline float floor_of(double value) {
  const float nearest = static_cast<float>(value);
  return value > 0 && nearest == 0 ? std::numeric_limits<float>::denorm_min() : nearest;
}

// eps, min_var and, where there is a bound, max_abs; nothing: there is no norm.
inline NormShape norm_shape(const std::string& op, const std::vector<double>& numbers) {
  if (numbers.empty()) return {};
  if (numbers.size() != 2 && numbers.size() != 3)
    refuse(op, "input_norm, output_norm: expected nothing, or eps, min_var and perhaps max_abs");
  const double most = std::numeric_limits<double>::infinity();
  return {true, static_cast<float>(numbers[0]), floor_of(numbers[1]),
          bound_of(numbers.size() == 3 ? numbers[2] : most)};
}

}  // namespace seqkernels::torch_abi
