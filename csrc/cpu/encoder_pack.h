// Packs torch's parameters into the operands a kernel reads.
#pragma once

#include <memory>

#include "cpu/encoder_model.h"

namespace seqkernels::cpu {

// A packed model with the memory it points into.
class PackedEncoder {
 public:
  PackedEncoder(const EncoderShape& shape, const EncoderParameters& parameters,
                const OperandLayout& layout);
  const PackedModel& model() const { return model_; }
  size_t bytes() const { return words_ * sizeof(uint32_t); }

 private:
  struct Free {
    void operator()(uint32_t* p) const;
  };
  PackedModel model_;
  std::unique_ptr<uint32_t, Free> memory_;
  size_t words_ = 0;
};

}  // namespace seqkernels::cpu
