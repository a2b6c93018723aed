// The element-wise functions that end a product or a norm.
#pragma once

namespace seqkernels {

// GELU exact (erf) and by tanh; kLeakyRelu has a slope beside it.
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kLeakyRelu = 4 };

}  // namespace seqkernels
