// Packed weights together with the kernel that reads them.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>

#include "seqkernels/encoder.h"
#include "seqkernels/linear.h"
#include "seqkernels/processor.h"

// The contracts of csrc/cpu/encoder_model.h and linear_model.h that run a kernel whatever the
// processor says of itself.
namespace seqkernels::cpu {
struct EncoderKernelEntry;
struct LinearKernelEntry;
size_t encoder_packed_bytes(const EncoderKernelEntry& kernel, const EncoderShape& shape);
void pack_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape,
                  const EncoderParameters& parameters, void* packed);
void run_encoder(const EncoderKernelEntry& kernel, const EncoderShape& shape, const void* packed,
                 const EncoderCall& call);
size_t linear_packed_bytes(const LinearKernelEntry& kernel, const LinearShape& shape);
void pack_linear(const LinearKernelEntry& kernel, const LinearShape& shape,
                 const LinearParameters& parameters, void* packed);
void run_linear(const LinearKernelEntry& kernel, const LinearShape& shape, const void* packed,
                const LinearCall& call);
// Null where not compiled in.
__attribute__((weak)) const EncoderKernelEntry& encoder_amx_bf16();
__attribute__((weak)) const LinearKernelEntry& linear_amx_bf16();
}  // namespace seqkernels::cpu

namespace seqkernels::test {

// Exactly so many bytes, so that a sanitizer sees the first one behind them.
class PackedMemory {
 public:
  explicit PackedMemory(size_t bytes) : data_(std::aligned_alloc(64, bytes)) {
    if (!data_) throw std::bad_alloc();
  }
  ~PackedMemory() { std::free(data_); }
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

class Encoder {
 public:
  Encoder(const std::string& name, const EncoderShape& shape, const EncoderParameters& parameters)
      : Encoder(runnable_isa(name), shape, parameters) {}
  Encoder(const cpu::EncoderKernelEntry& kernel, const EncoderShape& shape,
          const EncoderParameters& parameters)
      : packed_(cpu::encoder_packed_bytes(kernel, shape)) {
    cpu::pack_encoder(kernel, shape, parameters, packed_.data());
    run_ = [&kernel, shape](const void* packed, const EncoderCall& call) {
      cpu::run_encoder(kernel, shape, packed, call);
    };
  }
  void forward(const EncoderCall& call) const { run_(packed_.data(), call); }

 private:
  Encoder(int isa, const EncoderShape& shape, const EncoderParameters& parameters)
      : packed_(encoder_packed_bytes(isa, shape)) {
    pack_encoder(isa, shape, parameters, packed_.data());
    run_ = [isa, shape](const void* packed, const EncoderCall& call) {
      run_encoder(isa, shape, packed, call);
    };
  }
  PackedMemory packed_;
  std::function<void(const void*, const EncoderCall&)> run_;
};

class Linear {
 public:
  Linear(const std::string& name, const LinearShape& shape, const LinearParameters& parameters)
      : Linear(runnable_isa(name), shape, parameters) {}
  Linear(const cpu::LinearKernelEntry& kernel, const LinearShape& shape,
         const LinearParameters& parameters)
      : packed_(cpu::linear_packed_bytes(kernel, shape)) {
    cpu::pack_linear(kernel, shape, parameters, packed_.data());
    run_ = [&kernel, shape](const void* packed, const LinearCall& call) {
      cpu::run_linear(kernel, shape, packed, call);
    };
  }
  void forward(const LinearCall& call) const { run_(packed_.data(), call); }

 private:
  Linear(int isa, const LinearShape& shape, const LinearParameters& parameters)
      : packed_(linear_packed_bytes(isa, shape)) {
    pack_linear(isa, shape, parameters, packed_.data());
    run_ = [isa, shape](const void* packed, const LinearCall& call) {
      run_linear(isa, shape, packed, call);
    };
  }
  PackedMemory packed_;
  std::function<void(const void*, const LinearCall&)> run_;
};

}  // namespace seqkernels::test
