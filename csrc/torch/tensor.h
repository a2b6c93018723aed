// Tensors of torch, and the arguments of a call.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "seqkernels/options.h"
#include "torch/stable_abi.h"

namespace seqkernels::torch_abi {

// Owns a reference to a tensor.
class Tensor {
 public:
  explicit Tensor(TensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) torch.aoti_torch_delete_tensor_object(handle_);
  }

  // Not filled.
  static Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                      int32_t dtype, int32_t device_type, int32_t device_index) {
    TensorHandle made = nullptr;
    SEQKERNELS_TORCH(aoti_torch_empty_strided, static_cast<int64_t>(sizes.size()), sizes.data(),
                     strides.data(), dtype, device_type, device_index, &made);
    return Tensor(made);
  }
  static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type,
                      int32_t device_index) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1))
      strides[i] = stride;
    return empty(sizes, strides, dtype, device_type, device_index);
  }

  int64_t dim() const { return get<int64_t>(torch.aoti_torch_get_dim); }
  const int64_t* sizes() const { return get<int64_t*>(torch.aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(torch.aoti_torch_get_strides); }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int64_t stride(int64_t i) const { return strides()[i]; }
  int32_t dtype() const { return get<int32_t>(torch.aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(torch.aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(torch.aoti_torch_get_device_index); }
  bool is_contiguous() const { return get<bool>(torch.aoti_torch_is_contiguous); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim(); ++i) n *= size(i);
    return n;
  }

  template <class T>
  const T* data() const {
    return static_cast<const T*>(get<const void*>(torch.torch_get_const_data_ptr));
  }
  template <class T>
  T* mutable_data() const {
    return static_cast<T*>(get<void*>(torch.torch_get_mutable_data_ptr));
  }

  // Another reference to the same tensor.
  Tensor another() const {
    TensorHandle made = nullptr;
    SEQKERNELS_TORCH(aoti_torch_new_tensor_handle, handle_, &made);
    return Tensor(made);
  }
  // A contiguous copy.
  Tensor as(int32_t dtype, int32_t device_type, int32_t device_index) const {
    Tensor made = empty({sizes(), sizes() + dim()}, dtype, device_type, device_index);
    SEQKERNELS_TORCH(aoti_torch_copy_, made.handle_, handle_, 0);
    return made;
  }
  Tensor contiguous() const { return as(dtype(), device_type(), device_index()); }
  // A copy of [N, C, L] whose channels lie closest in memory.
  Tensor contiguous_transposed() const {
    const int64_t n = size(0), c = size(1), l = size(2);
    Tensor made = empty({n, c, l}, {c * l, 1, c}, dtype(), device_type(), device_index());
    SEQKERNELS_TORCH(aoti_torch_copy_, made.handle_, handle_, 0);
    return made;
  }
  void zero() const { SEQKERNELS_TORCH(aoti_torch_zero_, handle_); }

  std::string shape() const {
    std::string text = "shape (";
    for (int64_t i = 0; i < dim(); ++i) text += (i ? ", " : "") + std::to_string(size(i));
    return text + (dim() == 1 ? ",)" : ")");
  }

  Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

 private:
  template <class T>
  T get(Status (*function)(TensorHandle, T*)) const {
    T value{};
    check(function(handle_, &value), "a tensor's property");
    return value;
  }
  TensorHandle handle_;
};

using OptionalTensor = std::optional<Tensor>;

// Takes the arguments of a boxed call one after another. All are to be taken, whatever is wrong
// with one of them, for they own memory; `done` then throws what was wrong.
class Arguments {
 public:
  explicit Arguments(const Value* stack) : at_(stack) {}

  Tensor tensor() { return Tensor(reinterpret_cast<TensorHandle>(*at_++)); }
  OptionalTensor optional_tensor() { return tensor_of(*at_++); }
  std::vector<OptionalTensor> tensors() {
    std::vector<OptionalTensor> made;
    each([&](Value v) { made.push_back(tensor_of(v)); });
    return made;
  }
  std::string text() {
    const StringHandle handle = reinterpret_cast<StringHandle>(*at_++);
    size_t length = 0;
    const char* data = nullptr;
    SEQKERNELS_TORCH(torch_string_length, handle, &length);
    SEQKERNELS_TORCH(torch_string_c_str, handle, &data);
    std::string made(data, length);
    SEQKERNELS_TORCH(torch_delete_string, handle);
    return made;
  }

  // A field of an options record; its name is for errors.
  void field(const char*, bool& to) { to = (*at_++ & 0xff) != 0; }
  void field(const char*, int& to) { to = static_cast<int>(static_cast<int64_t>(*at_++)); }
  void field(const char*, float& to) { to = static_cast<float>(number(*at_++)); }
  void field(const char*, double& to) { to = number(*at_++); }
  void field(const char*, std::vector<double>& to) {
    each([&](Value v) { to.push_back(number(v)); });
  }
  template <class Options>
  void options(Options& to) {
    Options::each(to, [&](const char* name, auto& value) { field(name, value); });
  }
  template <class E>
    requires std::is_enum_v<E>
  void field(const char* name, E& to) {
    const std::string given = text();
    try {
      to = value_of<E>(name, given);
    } catch (const std::invalid_argument&) {
      if (!error_) error_ = std::current_exception();
    }
  }
  // An optional whole number; what stands for none is there already.
  void field(const char*, int64_t& to) {
    if (const auto given = unwrap(*at_++)) to = static_cast<int64_t>(*given);
  }
  void field(const char*, std::optional<double>& to) {
    if (const auto given = unwrap(*at_++)) to = number(*given);
  }

  void done() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static double number(Value v) {
    double made;
    std::memcpy(&made, &v, sizeof made);
    return made;
  }
  // torch allocates the values of optional arguments, and leaves them to the kernel.
  static std::optional<Value> unwrap(Value v) {
    Value* given = reinterpret_cast<Value*>(v);
    if (!given) return {};
    const Value value = *given;
    delete given;
    return value;
  }
  static OptionalTensor tensor_of(Value v) {
    const auto given = unwrap(v);
    if (!given) return {};
    return Tensor(reinterpret_cast<TensorHandle>(*given));
  }
  template <class Visit>
  void each(Visit visit) {
    const ListHandle list = reinterpret_cast<ListHandle>(*at_++);
    size_t count = 0;
    SEQKERNELS_TORCH(torch_list_size, list, &count);
    for (size_t i = 0; i < count; ++i) {
      Value element = 0;
      SEQKERNELS_TORCH(torch_list_get_item, list, i, &element);
      visit(element);
    }
    SEQKERNELS_TORCH(torch_delete_list, list);
  }

  const Value* at_;
  std::exception_ptr error_;
};

}  // namespace seqkernels::torch_abi
