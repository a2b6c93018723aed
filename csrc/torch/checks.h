// What the ops check of their tensors. Errors are std::invalid_argument, as
// `<op>: <argument>: expected <what>, got <actual>`.
#pragma once

#include <stdexcept>
#include <string>

#include "torch/tensor.h"

namespace seqkernels::torch_abi {

[[noreturn]] inline void refuse(const std::string& op, const std::string& what) {
  throw std::invalid_argument(op + ": " + what);
}

inline std::string dtype_name(int32_t dtype) {
  if (dtype == torch.aoti_torch_dtype_float32()) return "float32";
  if (dtype == torch.aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == torch.aoti_torch_dtype_bool()) return "bool";
  if (dtype == torch.aoti_torch_dtype_int32()) return "int32";
  if (dtype == torch.aoti_torch_dtype_int64()) return "int64";
  return "another dtype";
}

inline void check_on(const std::string& op, const char* name, const Tensor& tensor,
                     int32_t device_type, int32_t device_index) {
  if (tensor.device_type() != device_type || tensor.device_index() != device_index)
    refuse(op, std::string(name) + ": expected the device of x, got another one");
}

// Whether the dtype is bf16; fp32 is the other one that kernels take.
inline bool is_bf16(const std::string& op, const Tensor& x) {
  const int32_t dtype = x.dtype();
  if (dtype == torch.aoti_torch_dtype_bfloat16()) return true;
  if (dtype == torch.aoti_torch_dtype_float32()) return false;
  refuse(op, "x: expected float32 or bfloat16, got " + dtype_name(dtype));
}

// int32 or int64, as contiguous int64.
inline Tensor whole_numbers(const std::string& op, const char* name, Tensor given) {
  const int32_t dtype = given.dtype(), int64 = torch.aoti_torch_dtype_int64();
  if (dtype == int64 && given.is_contiguous()) return given;
  if (dtype != int64 && dtype != torch.aoti_torch_dtype_int32())
    refuse(op, std::string(name) + ": expected int32 or int64, got " + dtype_name(dtype));
  return given.as(int64, given.device_type(), given.device_index());
}

// The last dimension contiguous.
inline Tensor readable(Tensor given) {
  return given.stride(given.dim() - 1) == 1 || given.size(given.dim() - 1) == 1
             ? std::move(given)
             : given.contiguous();
}

// Weights as a kernel's packing reads them: fp32, contiguous, in host memory. An absent one stays
// absent.
class HostWeights {
 public:
  explicit HostWeights(std::vector<OptionalTensor> given) : given_(std::move(given)) {
    const int32_t fp32 = torch.aoti_torch_dtype_float32();
    const int32_t cpu = torch.aoti_torch_device_type_cpu();
    for (OptionalTensor& w : given_) {
      const bool plain =
          !w || (w->dtype() == fp32 && w->device_type() == cpu && w->is_contiguous());
      if (!plain) w = w->as(fp32, cpu, -1);
    }
  }
  size_t count() const { return given_.size(); }
  const OptionalTensor& operator[](size_t i) const { return given_[i]; }
  const float* data(size_t i) const { return given_[i] ? given_[i]->data<float>() : nullptr; }

 private:
  std::vector<OptionalTensor> given_;
};

inline int num_threads() {
  uint32_t threads = 1;
  SEQKERNELS_TORCH(torch_get_num_threads, &threads);
  return static_cast<int>(threads);
}

inline Tensor host_bytes(int64_t count) {
  return Tensor::empty({count}, torch.aoti_torch_dtype_uint8(), torch.aoti_torch_device_type_cpu(),
                       -1);
}

inline void check_packed(const std::string& op, const Tensor& packed, int64_t bytes) {
  if (packed.dim() != 1 || packed.size(0) != bytes ||
      packed.dtype() != torch.aoti_torch_dtype_uint8()) {
    refuse(op, "packed: expected the " + std::to_string(bytes) +
                   " bytes that belong to model, got " + packed.shape());
  }
}

// A record that travels as a tensor of bytes in host memory, for the model of packed weights.
template <class Record>
Tensor as_bytes(const Record& record) {
  Tensor made = host_bytes(static_cast<int64_t>(sizeof record));
  std::memcpy(made.mutable_data<void>(), &record, sizeof record);
  return made;
}

template <class Record>
Record from_bytes(const std::string& op, const Tensor& bytes) {
  Record record{};
  const uint64_t magic = record.magic;
  if (bytes.dtype() == torch.aoti_torch_dtype_uint8() && bytes.dim() == 1 &&
      bytes.size(0) == static_cast<int64_t>(sizeof record) &&
      bytes.device_type() == torch.aoti_torch_device_type_cpu()) {
    std::memcpy(&record, bytes.data<void>(), sizeof record);
    if (record.magic == magic) return record;
  }
  refuse(op, "model: expected what pack_" + op + " of this version returned");
}

// The results of pack_<op>.
template <class Model>
void return_packed(Value* stack, const Model& model, Tensor packed) {
  stack[0] = as_bytes(model).release();
  stack[1] = packed.release();
}

// The arguments of <op>_packed for an op of one input.
template <class Model>
struct PackedCall {
  Tensor x;
  Model model;
  Tensor packed;
};

template <class Model>
PackedCall<Model> take_packed_call(const std::string& op, const Value* stack) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const Tensor bytes = arguments.tensor();
  Tensor packed = arguments.tensor();
  return {std::move(x), from_bytes<Model>(op, bytes), std::move(packed)};
}

}  // namespace seqkernels::torch_abi
